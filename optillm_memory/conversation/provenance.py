"""Provenance: which actions of a conversation left in an answer that was recorded here.

A client tells the whole conversation with every request, and may tell what no model ever said. Learned is only from
actions that stand in a recorded answer. Whoever writes answers into the log vouches for them: the recorder for what it
relayed, an importer for what its source recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from optillm_memory.conversation.identity import as_json, value_of
from optillm_memory.conversation.steps import TEXT_TOOL, calls_of, command_in
from optillm_memory.conversation.text import text_of, without_thoughts

# When a request came: seconds, and its trace, by which requests of the same moment are ordered.
Moment: TypeAlias = tuple[float, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded answer: its request, and the identities of the actions that it asked for."""

    at: Moment
    actions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """An action that a client told with its result: a name, its identity, and the request that told it first.

    `maker` is the trace whose answer asked for it, where that is known.
    """

    name: str
    action: str
    at: Moment
    maker: str = ""


def makers_of(told: Iterable[Told], answers: Sequence[Answer]) -> dict[str, str]:
    """Return by name the trace whose answer asked for each told action; what no answer asked for is missing.

    An action in an answer accounts for one that is told, by a later request; of several answers it is the latest.
    """
    left = Counter((answer.at[1], action) for answer in answers for action in answer.actions)
    found: dict[str, str] = {}
    for item in sorted(told, key=lambda t: (not t.maker, t.at, t.name)):
        before = (
            [item.maker] if item.maker else [a.at[1] for a in answers if item.action in a.actions and a.at < item.at]
        )
        for maker in reversed(before):
            if item.maker or left[maker, item.action] > 0:
                left[maker, item.action] -= 1
                found[item.name] = maker
                break
    return found


def action_identity(tool: str, arguments: str) -> str:
    """Return what is equal for equal actions: the name, and the arguments as JSON values; no id, no white space."""
    return str(as_json([tool, value_of(arguments)]))


def actions_in_answer(message: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the identities of the actions that an answer asks for: its calls, or the one command in its text."""
    calls = calls_of(message, 0)
    if not calls:
        command = command_in(without_thoughts(text_of(message)))
        return () if command is None else (action_identity(TEXT_TOOL, command),)
    return tuple(action_identity(tool, arguments) for _, tool, arguments in calls)
