"""Short ways to make what the tests of the rooms are about: requests, responses, traces, feedback, a memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optillm_memory import Feedback, FeedbackReceipt, Hit, Memory, MemoryRecord, Scope, Settings, Turn
from optillm_memory.records import Trace, new_trace_id

SCOPE = Scope("local")
NOW = 1_700_000_000.0
FRAME = "00000000"


def examples(count: int) -> int:
    """Return how many examples a property that is dear is tried with: twenty times as many in `.ci/full`."""
    return count * (20 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 1)


def settings(tmp_path: Path, **values: Any) -> Settings:
    """Return settings for a lexical memory without a holdout, in the test's own directory."""
    return Settings(
        **{"db": str(tmp_path / "memory.db"), "encoder": "none", "holdout": 0.0, "reuse_audit": 0.0, **values}
    )


def lexical_memory(tmp_path: Path, **values: Any) -> Memory:
    """Open a memory without an encoder."""
    return Memory(settings(tmp_path, **values))


def hashing_memory(tmp_path: Path, **values: Any) -> Memory:
    """Open a memory on the shipped encoder, ready."""
    memory = Memory(settings(tmp_path, encoder="hashing", **values))
    assert memory.encoder.wait(10) == "ready"
    return memory


def body(*messages: str | Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a chat request; a plain text stands for a user message."""
    said = [{"role": "user", "content": m} if isinstance(m, str) else dict(m) for m in messages]
    return {"model": "m", "messages": said, **fields}


def assistant(text: str) -> dict[str, Any]:
    """Return an answer as a client sends it back."""
    return {"role": "assistant", "content": text}


def response(*answers: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a completion with one choice for each answer."""
    said = [assistant(a) if isinstance(a, str) else dict(a) for a in answers]
    return {
        "choices": [{"index": i, "message": m, "finish_reason": "stop"} for i, m in enumerate(said)],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


def ask(memory: Memory, request: str | Mapping[str, Any], answer: str = "an answer", **keywords: Any) -> Turn:
    """Take one request through memory to its end, and wait until it is on disk."""
    turn = memory.begin(body(request) if isinstance(request, str) else request, **keywords)
    memory.finish(turn, response(answer))
    memory.store.flush()
    return turn


def tell(memory: Memory, turn: Turn, value: Any = True, **fields: Any) -> FeedbackReceipt:
    """Give feedback on a turn: by default that its answer passed its tests."""
    said = {"trace_id": turn.trace_id, "metric": "success", "value": value, "source": "code", **fields}
    return memory.feedback(said)[0]


def teach(memory: Memory, task: str, answer: str, **keywords: Any) -> Turn:
    """Let memory see a task answered and verified."""
    turn = ask(memory, task, answer, **keywords)
    assert tell(memory, turn).status == "applied"
    return turn


def trace(task: str = "list the files", answer: str | None = "ls", **fields: Any) -> Trace:
    """Return a trace as a request of one plain turn leaves it."""
    made = Trace(
        trace_id=new_trace_id(), scope=SCOPE, episode_id="ep-1", created_at=NOW, model="m", approach="none",
        action="plain", held_out=False, propensity=1.0, task=task, frame=FRAME, messages="[]", answer=answer,
        finish_reason="stop", error=None, skipped="[]", prompt_tokens=1, completion_tokens=1, latency_ms=1.0,
        recall_ms=0.5,
    )  # fmt: skip
    return replace(made, **fields)


def feedback(value: Any = True, **fields: Any) -> Feedback:
    """Return feedback on trace `t1`: by default a success that code reports."""
    made = Feedback("fb-1", "success", value, "code", "t1", None, None, NOW)
    return replace(made, **fields)


def hit(task: str = "a task", answer: str = "an answer", score: float = 1.0, **fields: Any) -> Hit:
    """Return a hit as recall gives it."""
    memory_id = f"mem-{abs(hash((task, answer))):x}"
    made = MemoryRecord(memory_id, "exemplar", "verified", SCOPE, task, answer, FRAME, 1, 0, 0, 0, NOW)
    return Hit(replace(made, **fields), score, 0.9, None)
