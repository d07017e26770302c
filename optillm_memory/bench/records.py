"""Synthetic records for benches of the store: any number, reproducible by seed, distributed like real ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optillm_memory.conversation.parse import key_of
from optillm_memory.recall.encoder import REFERENCE
from optillm_memory.records import Feedback, Scope, Trace
from optillm_memory.store import fold
from optillm_memory.store.announced import Announced, Arrival, Submission
from optillm_memory.store.tables.vectors import key_hash
from optillm_memory.store.transaction import Transaction

LARGE, SMALL = Scope("bench"), Scope("bench", "small")
FINGERPRINT = "bench-384"
# A sentence encoder's vectors of 384 numbers spread over far fewer directions (some 65, by the participation ratio
# of their variances), and have neighbours of their own subject nearby.
DIMENSION, _DIRECTIONS = 384, 65.0
_OF_SUBJECT, _A_SUBJECT = 0.6, 40  # the part of the variance that records of one subject share; records of a subject
_WORDS, _LENGTH, _ZIPF = 30_000, 12, 1.1
_BLOCK = 4_096
_SMALL_EVERY = 100

Vector = NDArray[np.float32]
Vectors = NDArray[np.float32]
Operation = Callable[[Transaction], None]


@dataclass(frozen=True, slots=True)
class Record:
    """One task with its vector; its number is the last word of its task."""

    number: int
    scope: Scope
    task: str
    vector: Vector


class Records:
    """`size` records; every hundredth is in a small scope of its own. Any part of them can be made again."""

    def __init__(self, size: int, seed: int = 0) -> None:
        """Draw the words, directions and subjects that all blocks share."""
        self.size, self._seed = size, seed
        rng = np.random.default_rng(seed)
        decay = np.exp(-np.arange(DIMENSION) / _DIRECTIONS)
        self._spread = np.sqrt(decay).astype(np.float32)
        self._subjects = self._drawn(rng, max(50, size // _A_SUBJECT))
        letters = rng.integers(97, 123, size=(_WORDS, 10), dtype=np.uint8)
        lengths = rng.integers(3, 10, size=_WORDS)
        self._words = [bytes(row[:n]).decode() for row, n in zip(letters, lengths, strict=True)]
        shares = 1.0 / np.arange(1, _WORDS + 1) ** _ZIPF
        self._upto = np.cumsum(shares / shares.sum())

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, self.size, _BLOCK):
            vectors = self.block(start)
            rng = np.random.default_rng([self._seed, start, 1])
            for number, vector in enumerate(vectors, start):
                yield Record(number, scope_of(number), f"{self._text(rng)} {number}", vector)

    def block(self, start: int) -> Vectors:
        """Return the vectors of the records from a number on, which is a multiple of the block's size."""
        count = min(_BLOCK, self.size - start)
        rng = np.random.default_rng([self._seed, start, 0])
        subjects = self._subjects[rng.integers(len(self._subjects), size=count)]
        own = self._drawn(rng, count)
        return _unit(np.sqrt(_OF_SUBJECT) * subjects + np.sqrt(1 - _OF_SUBJECT) * own)

    def blocks(self) -> Iterator[tuple[int, Vectors]]:
        """Yield (first number, vectors) of all blocks."""
        for start in range(0, self.size, _BLOCK):
            yield start, self.block(start)

    def queries(self, count: int) -> list[tuple[str, Vectors]]:
        """Return texts and vectors of queries: half of them near a record, half on a subject of some records."""
        rng = np.random.default_rng([self._seed, 7])
        found = []
        for index in range(count):
            own = self._drawn(rng, 1)[0]
            if index % 2:
                start = int(rng.integers((self.size + _BLOCK - 1) // _BLOCK)) * _BLOCK
                block = self.block(start)
                vector = np.sqrt(0.8) * block[rng.integers(len(block))] + np.sqrt(0.2) * own
            else:
                subject = self._subjects[rng.integers(len(self._subjects))]
                vector = np.sqrt(_OF_SUBJECT) * subject + np.sqrt(1 - _OF_SUBJECT) * own
            found.append((self._text(rng), _unit(vector[None])[0]))
        return found

    def _drawn(self, rng: np.random.Generator, count: int) -> Vectors:
        return _unit(rng.standard_normal((count, DIMENSION), dtype=np.float32) * self._spread)

    def _text(self, rng: np.random.Generator) -> str:
        return " ".join(self._words[i] for i in np.searchsorted(self._upto, rng.random(_LENGTH)).tolist())


class KnownEncoder:
    """An encoder that knows the vectors of all texts in advance, so that encoding costs nothing."""

    def __init__(self, fingerprint: str = "bench-known-384") -> None:
        """Know the texts that an encoder service asks for at its start."""
        self.fingerprint = fingerprint
        self._vectors: dict[str, Vector] = {}
        for text, record in zip(REFERENCE, Records(len(REFERENCE), seed=1 << 20), strict=True):
            self.learn(text, record.vector)

    def learn(self, text: str, vector: Vector) -> None:
        """Add a text with its vector."""
        self._vectors[text] = self._vectors[key_of(text)] = vector

    def vector(self, text: str) -> Vector:
        """Return a text's vector; an unknown text gets a random one, which is far from all others."""
        if (vector := self._vectors.get(text)) is None:
            drawn = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSION)
            vector = self._vectors[text] = (drawn / np.linalg.norm(drawn)).astype(np.float32)
        return vector

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of several texts."""
        return np.stack([self.vector(text) for text in texts])


def scope_of(number: int) -> Scope:
    """Return the scope that a record is in."""
    return SMALL if number % _SMALL_EVERY == _SMALL_EVERY - 1 else LARGE


def trace_of(record: Record, prefix: str = "bench") -> Trace:
    """Return the trace of a record, as a request would write it."""
    return Trace(
        trace_id=f"chatcmpl-{prefix}-{record.number:024x}", scope=record.scope, episode_id=f"{prefix}-{record.number}",
        created_at=1e9 + record.number, model="model", approach="none", action="plain", held_out=False, propensity=0.05,
        task=record.task, frame="frame", messages=f'[{{"role": "user", "content": "{record.task}"}}]',
        answer=f"answer {record.number % 1000}", finish_reason="stop", error=None, skipped="[]", prompt_tokens=20,
        completion_tokens=5, latency_ms=1.0, recall_ms=1.0, tags={}, extra_calls=0, partition="partition",
    )  # fmt: skip


def operations(
    record: Record, scope: Scope, *, prefix: str = "bench", fingerprint: str = FINGERPRINT
) -> tuple[Operation, Operation]:
    """Return the writes of a request and of the feedback that makes it an exemplar; its vector is known in advance."""
    made = replace(trace_of(record, prefix), scope=scope)
    vector = [(key_hash(made.task), record.vector.tobytes())]
    feedback = Feedback(
        f"{prefix}-{record.number}", "success", True, "code", made.trace_id, None, None, made.created_at
    )

    def arrives(tx: Transaction) -> None:
        tx.vectors.put(vector, fingerprint)
        tx.add_trace(made, prefixes=[f"{prefix}-{record.number}"])
        fold.trace_arrived(tx, made)

    def judged(tx: Transaction) -> None:
        fold.feedback_arrived(tx, scope.tenant, None, feedback, received_at=made.created_at)

    return (
        Announced(arrives, arrivals=[Arrival(made.trace_id, made.episode_id)]),
        Announced(judged, feedback=[Submission(scope.tenant, feedback.feedback_id, made.trace_id)]),
    )


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
