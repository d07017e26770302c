"""The table `calls`: the model calls that an approach made for a trace, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.store.sqlite.connection import Connection, WritingConnection, objects


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of a model: what it was asked, and all it answered (one text a choice) or the error that came."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    answers: Sequence[str] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_ms: float = 0.0
    error: str | None = None


@dataclass
class CallTable:
    """The write half."""

    db: WritingConnection

    def add(self, trace_id: str, calls: Sequence[ModelCall]) -> None:
        """Append the calls that were made for a trace, in the order of their answers."""
        self.db.later(
            "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    trace_id, ordinal, call.model, call.prompt_tokens, call.completion_tokens, call.latency_ms,
                    json.dumps(list(call.messages)), json.dumps(list(call.answers)), call.error,
                )
                for ordinal, call in enumerate(calls)
            ],
        )  # fmt: skip


def calls_of(db: Connection, trace_id: str) -> list[dict[str, Any]]:
    """Return the calls that were made for a trace."""
    found = objects(
        db,
        "SELECT model, prompt_tokens, completion_tokens, latency_ms, error, messages, answer AS answers FROM calls "
        "WHERE trace_id = ? ORDER BY ordinal",
        (trace_id,),
    )
    return [
        {**call, "messages": json.loads(call["messages"]), "answers": json.loads(call["answers"])} for call in found
    ]
