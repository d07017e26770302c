"""Records for benches of the store: as many as wanted, with texts and vectors that lie like real ones, by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optillm_memory.records import Feedback, Scope, Trace
from optillm_memory.store import fold
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

Vectors = NDArray[np.float32]
Operation = Callable[[Transaction], None]


@dataclass(frozen=True, slots=True)
class Record:
    """One task with its vector; its number is the last word of its task."""

    number: int
    scope: Scope
    task: str
    vector: Vectors


class Records:
    """`size` records; every hundredth is in a small scope of its own. A part is made again in the same way."""

    def __init__(self, size: int, seed: int = 0) -> None:
        """Draw what all blocks share."""
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
        """Return texts and vectors to ask with: half of them near a record, half on a subject of some of them."""
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


def scope_of(number: int) -> Scope:
    """Return the scope that a record is in."""
    return SMALL if number % _SMALL_EVERY == _SMALL_EVERY - 1 else LARGE


def trace_of(record: Record, prefix: str = "bench") -> Trace:
    """Return the trace of a record, as a request would leave it."""
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
    """Return what a request, and the feedback on it that makes it an exemplar, write: its vector is ready-made."""
    made = replace(trace_of(record, prefix), scope=scope)
    vector = [(key_hash(made.task), record.vector.tobytes())]
    said = Feedback(f"{prefix}-{record.number}", "success", True, "code", made.trace_id, None, None, made.created_at)

    def arrives(tx: Transaction) -> None:
        tx.vectors.put(vector, fingerprint)
        tx.add_trace(made, prefixes=[f"{prefix}-{record.number}"])
        fold.trace_arrived(tx, made)

    def judged(tx: Transaction) -> None:
        fold.feedback_arrived(tx, scope.tenant, None, said, received_at=made.created_at)

    return arrives, judged


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)
