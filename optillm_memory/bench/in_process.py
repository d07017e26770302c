"""A stream of tasks through memory in this process: the server's decisions without its round trips."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optillm_memory.bench.stream import MAX_TOKENS, Result
from optillm_memory.bench.tasks import Task
from optillm_memory.conversation.parse import key_of
from optillm_memory.errors import EncoderUnavailable
from optillm_memory.memory import Memory
from optillm_memory.recall.encoder import Encoder, Vectors, load_encoder
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings

_ENCODED_AT_ONCE = 256
_FAST = Path("/dev/shm")  # decisions are measured here, not the disk
Upstream = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer a stream: the request's `agent_memory` field, and the similarity from which `top1` serves."""

    name: str
    field: Mapping[str, Any]
    top1: float | None = None


class CachedEncoder:
    """An encoder with a cache: several runs on the same tasks encode them once."""

    def __init__(self, encoder: Encoder, texts: Sequence[str]) -> None:
        """Encode the keys of all texts in batches."""
        self._encoder = encoder
        self.fingerprint = encoder.fingerprint
        self._cache: dict[str, Any] = {}
        keys = list(dict.fromkeys(key_of(text) for text in texts))
        for start in range(0, len(keys), _ENCODED_AT_ONCE):
            batch = keys[start : start + _ENCODED_AT_ONCE]
            self._cache.update(zip(batch, encoder.encode(batch), strict=True))

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors from the cache, and encode what is not in it."""
        fresh = [text for text in texts if text not in self._cache]
        if fresh:
            self._cache.update(zip(fresh, self._encoder.encode(fresh), strict=True))
        return np.stack([self._cache[text] for text in texts])


def bench_encoder() -> Encoder:
    """Load the configured encoder. Raises EncoderUnavailable."""
    encoder = load_encoder(Settings.from_env().encoder)
    if encoder is None:
        raise EncoderUnavailable("this bench needs an encoder, and OPTILLM_AGENT_MEMORY_ENCODER is none")
    return encoder


def cached_encoder(texts: Sequence[str]) -> CachedEncoder:
    """Load the configured encoder and encode these texts. Raises EncoderUnavailable."""
    return CachedEncoder(bench_encoder(), texts)


@contextlib.contextmanager
def empty_memory(encoder: Encoder, **settings: Any) -> Iterator[Memory]:
    """Open a memory on an empty database, with its encoder ready."""
    with tempfile.TemporaryDirectory(prefix="optillm-memory-bench-", dir=_FAST if _FAST.is_dir() else None) as folder:
        made = Settings.from_env(db=str(Path(folder) / "memory.db"), **{"holdout": 0.0, **settings})
        with Memory(made, encoder=lambda: encoder) as memory:
            memory.encoder.wait(120)
            yield memory


def run(
    memory: Memory,
    tasks: Sequence[Task],
    upstream: Upstream,
    variant: Variant,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Result:
    """Ask for each task in turn, with feedback before the next; after a failure it has the right answer."""
    result = Result()
    started = time.perf_counter()
    for task in tasks:
        turn, answer, action = ask(memory, task.input, upstream, variant)
        right = answer.strip() == task.output
        result.add(right=right, action=action)
        if action != "reuse":  # nobody checks an answer that was reused
            send_feedback(memory, turn, task, right=right)
        tick()
    result.seconds = time.perf_counter() - started
    return result


def ask(memory: Memory, text: str, upstream: Upstream, variant: Variant) -> tuple[Turn, str, str]:
    """Ask for one task; return (turn, answer, action)."""
    messages = [{"role": "user", "content": text}]
    body = {"model": "bench", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0.0}
    turn = memory.begin({**body, "agent_memory": dict(variant.field)})
    if turn.action == "reuse":
        completion = turn.reused()
        memory.finish(turn, completion)
        return turn, str(completion["choices"][0]["message"]["content"]), "reuse"
    nearest = memory.recall(text, limit=1) if variant.top1 is not None else []
    if nearest and variant.top1 is not None and (nearest[0].cosine or 0.0) >= variant.top1:
        return turn, nearest[0].memory.answer, "reuse"
    answer = upstream({"messages": turn.messages})
    message = {"role": "assistant", "content": answer}
    memory.finish(turn, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    return turn, answer, turn.action


def send_feedback(memory: Memory, turn: Turn, task: Task, *, right: bool) -> None:
    """Submit feedback with source `code`: the right answer is known."""
    items: list[dict[str, Any]] = [{"trace_id": turn.trace_id, "metric": "success", "value": right, "source": "code"}]
    if not right:
        items.append({"trace_id": turn.trace_id, "metric": "demonstration", "value": task.output, "source": "code"})
    memory.feedback(items)
