"""Injections in their context, for a person to read: the request's end, what was injected, what the agent did next."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.bench.trajectories.replay import Insertion
from optillm_memory.bench.trajectories.runs import calls_in
from optillm_memory.conversation.text import text_of

_MESSAGES = 3  # of the request that are shown
_AFTER = 3  # messages after the request
_LENGTH = 600  # characters of a message
_RULE = "=" * 100


def sample(insertions: Sequence[Insertion], count: int, seed: int) -> list[dict[str, Any]]:
    """Return a seeded sample of insertions with their context, in the order in which they were made."""
    chosen = sorted(random.Random(seed).sample(range(len(insertions)), min(count, len(insertions))))
    return [in_context(insertions[number]) for number in chosen]


def in_context(insertion: Insertion) -> dict[str, Any]:
    """Return an insertion as it is shown, its texts shortened but for what was injected."""
    run, index = insertion.run, insertion.index
    return {
        "id": run.name,
        "episode": run.number,
        "resolved": run.resolved,
        "message": index,
        "kinds": insertion.kinds,
        "form": insertion.placement.form,
        "before": [line_of(m) for m in run.messages[max(0, index - _MESSAGES) : index]],
        "injected": insertion.text,
        "after": [line_of(m) for m in run.messages[index : index + _AFTER]],
    }


def as_text(shown: Sequence[Mapping[str, Any]]) -> str:
    """Return shown insertions as text."""
    parts = []
    for number, item in enumerate(shown, 1):
        ended = "resolved" if item["resolved"] else "not resolved"
        head = f"{number}. {item['id']} (episode {item['episode']}, {ended}), before message {item['message']}"
        parts += [
            _RULE, head, "", *item["before"], "", f"--- injected: {item['kinds']}, as {item['form']}", item["injected"],
            "--- what the agent did next", *item["after"],
        ]  # fmt: skip
    return "\n".join(parts)


def line_of(message: Mapping[str, Any]) -> str:
    """Return a message in one paragraph, shortened."""
    calls = [f"{tool}({arguments})" for _, tool, arguments in calls_in(message)]
    return f"[{message.get('role')}] " + "  ".join(shortened(t) for t in (text_of(message), *calls) if t.strip())


def shortened(text: str) -> str:
    """Return the beginning and the end of a long text."""
    if len(text) <= _LENGTH:
        return text
    half = _LENGTH // 2
    return f"{text[:half]} […] {text[-half:]}"
