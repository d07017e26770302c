"""Recorded runs of agents: rows of a JSONL file with their messages, their actions, and the family of their task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optillm_memory.bench.rows import read_rows
from optillm_memory.bench.trajectories.actions import canonical_action, changes_state, failed
from optillm_memory.conversation.text import text_of
from optillm_memory.errors import InvalidField

FIRST_MESSAGE = "first-message"
SAY = ""  # the tool of a text turn that the user replied to, as in a procedure


@dataclass(frozen=True, slots=True)
class Act:
    """One action of a run: the index of its message, its tool and arguments, and what was observed.

    `key` is its canonical form; `failed` and `writes` (it changes state) are told from the texts.
    """

    index: int
    tool: str
    arguments: str
    observation: str
    key: str
    failed: bool
    writes: bool


@dataclass(frozen=True, slots=True)
class Run:
    """One recorded run: its number in the file, the family of its task, how it ended, and its messages."""

    number: int
    name: str
    family: str
    resolved: bool
    model: str
    tools: Sequence[Mapping[str, Any]]
    messages: Sequence[Mapping[str, Any]]
    acts: tuple[Act, ...]

    @property
    def answered(self) -> list[int]:
        """The indexes of the assistant's messages: each is the response to one request."""
        return [i for i, m in enumerate(self.messages) if i and m.get("role") == "assistant"]

    @property
    def last_call(self) -> int:
        """The index of the message with the last tool call, or, where there is none, of the last text turn; else -1."""
        calls = [act.index for act in self.acts if act.tool != SAY]
        return max(calls or [act.index for act in self.acts], default=-1)

    def from_index(self, index: int) -> list[Act]:
        """Return the actions from the response to one request on."""
        return [act for act in self.acts if act.index >= index]


def load_runs(path: Path, family: str = FIRST_MESSAGE, limit: int | None = None) -> list[Run]:
    """Read recorded runs; `family` is a regular expression over `id` (its first group, or all of it), or first-message.

    Raises InvalidField, naming the field with its place, for a bad row, a bad expression, and a file without rows; and
    OSError where the file cannot be read.
    """
    try:
        pattern = None if family == FIRST_MESSAGE else re.compile(family)
    except re.error as error:
        raise InvalidField("family", f"{family!r} is no regular expression: {error}") from error
    runs: list[Run] = []
    for row, place in read_rows(path):
        if limit is not None and len(runs) == limit:
            break
        runs.append(_run(len(runs), row, pattern, place))
    return runs


def _run(number: int, row: Mapping[str, Any], pattern: re.Pattern[str] | None, place: str) -> Run:
    messages, tools = row.get("messages"), row.get("tools") or []
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InvalidField("messages", f"must be a list of messages in {place}")
    if not isinstance(row.get("resolved"), bool):
        raise InvalidField("resolved", f"must be true or false in {place}")
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise InvalidField("tools", f"must be a list of tools in {place}")
    name = str(row.get("id") or number)
    if pattern is None:
        kind = next((text_of(m) for m in messages if m.get("role") == "user"), name)
    else:
        found = pattern.search(name)
        kind = ((found.group(1) if pattern.groups else found.group()) if found else None) or name
    model = str(row.get("model") or "agent")
    return Run(number, name, kind, row["resolved"], model, tools, messages, acts_of(messages))


def acts_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Act, ...]:
    """Return the actions of a run in order: tool calls with their results, and text turns with the user's reply."""
    found: list[Act] = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        results = []
        for later in messages[index + 1 :]:
            if later.get("role") != "tool":
                break
            results.append(later)
        calls = calls_in(message)
        for place, (call_id, tool, arguments) in enumerate(calls):
            own = [r for r in results if call_id and r.get("tool_call_id") == call_id]
            result = own[0] if own else results[place] if place < len(results) else {}
            found.append(_act(index, tool, arguments, text_of(result)))
        following = messages[index + 1] if index + 1 < len(messages) else {}
        if not calls and following.get("role") == "user":
            found.append(_act(index, SAY, "", text_of(following)))
    return tuple(found)


def calls_in(message: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (id, tool, arguments) of a message's tool calls."""
    found = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        arguments = function.get("arguments") or ""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        found.append((str(call.get("id") or ""), str(function.get("name") or ""), text))
    return found


def _act(index: int, tool: str, arguments: str, observation: str) -> Act:
    key = canonical_action(tool, arguments)
    if tool == SAY:
        return Act(index, tool, arguments, observation, key, failed=False, writes=False)
    return Act(index, tool, arguments, observation, key, failed(observation), changes_state(tool, arguments))
