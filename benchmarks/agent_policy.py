"""The scripted agent: the calls that it tries for each task, and how it decides from its prompt alone.

The policy, in full. The first user message names the task. Each task is a sequence of goals, and for each goal the
agent has candidate calls, the likeliest first; all but the last are mistakes that people and models make.
1. A goal is reached by the first call that did not fail; after the last goal the agent answers that it is done.
2. If its last call failed and the prompt names what worked instead of exactly that call, it does that.
3. Else it takes its first candidate that has not failed in this attempt at the goal. If the prompt says that this call
   is known to fail, it does what worked instead, or takes its next candidate if nothing is known to have worked.
4. Advice is followed once: a call that was advised and failed is not made again. Advice on any other call is ignored.
It keeps nothing between two requests: equal prompts get equal answers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DONE = "Done."
GIVEN_UP = "I could not do it."
UNKNOWN_TASK = "I do not know how to do this."
FIELDS = {"bash": "command", "python": "code"}
_SLOT = re.compile(r"%([a-z]{2,12})%")
_BLOCK = re.compile(r"<agent_memory[^>]*>\n?(.*?)</agent_memory[^>]*>", re.DOTALL)
_ITEM = re.compile(r"\d{1,3}\. ")
_EXIT_CODE = re.compile(r"^Exit code: (-?\d+)$", re.MULTILINE)
_WHERE = re.compile(r"as `([^`]*)` of `([^`]*)`")


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call: its text is the command, the code, or all arguments as JSON."""

    tool: str
    arguments: Mapping[str, str]

    @property
    def text(self) -> str:
        """The text that memory would show."""
        field = FIELDS.get(self.tool)
        if field is not None:
            return self.arguments.get(field, "")
        return json.dumps(dict(self.arguments), sort_keys=True, ensure_ascii=False)

    @property
    def same(self) -> tuple[str, str]:
        """The key by which two calls are the same."""
        return self.tool, self.text.strip()


@dataclass(frozen=True, slots=True)
class AgentTask:
    """A kind of task: the request, the agent's candidate calls for each goal, and the check for success.

    `%name%` is the slot of a name that the request contains (in backquotes) and that `names` fills: the first for pass
    1, the last for pass 2. `setup` and `check` are shell scripts for the sandbox; the check exits 0 on success.
    """

    name: str
    asks: str
    goals: tuple[tuple[Call, ...], ...]
    check: str
    names: tuple[Mapping[str, str], ...] = ({},)
    setup: str = ""


@dataclass(frozen=True, slots=True)
class Tip:
    """One item of advice: this action failed; `instead` worked, or did when it came `first` (None: nothing known)."""

    action: str
    instead: str | None = None
    tool: str = ""
    first: bool = False


@dataclass(frozen=True, slots=True)
class Try:
    """A call of this conversation, and whether its observation shows that it failed."""

    call: Call
    failed: bool


def bash(*commands: str) -> tuple[Call, ...]:
    """Return a goal's candidates as shell commands, the one that works last."""
    return tuple(Call("bash", {"command": command}) for command in commands)


def python(*codes: str) -> tuple[Call, ...]:
    """Return a goal's candidates as Python code, the one that works last."""
    return tuple(Call("python", {"code": code}) for code in codes)


def write(content: str, *paths: str) -> tuple[Call, ...]:
    """Return a goal's candidates for a file's path, the one that works last."""
    return tuple(Call("write_file", {"path": path, "content": content}) for path in paths)


def normal(text: str) -> str:
    """Return a text with its white space normalized."""
    return " ".join(text.split())


def filled(text: str, names: Mapping[str, str]) -> str:
    """Return a text with its `%name%` slots filled; an unknown slot raises KeyError."""
    return _SLOT.sub(lambda slot: names[slot[1]], text)


def goals_of(task: AgentTask, names: Mapping[str, str]) -> list[list[Call]]:
    """Return the agent's candidates for each goal of a task with these names."""
    return [
        [Call(c.tool, {key: filled(value, names) for key, value in c.arguments.items()}) for c in goal]
        for goal in task.goals
    ]


def understood(text: str, tasks: Iterable[AgentTask]) -> list[list[Call]] | None:
    """Return the candidates for the task of a text, with its names; None for an unknown task."""
    for task in tasks:
        if (match := _pattern(task.asks).fullmatch(text)) is not None:
            return goals_of(task, match.groupdict())
    return None


def decide(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tasks: Iterable[AgentTask]
) -> Call | str:
    """Return the next call, or a closing answer: a pure function of the prompt, described above."""
    asked = next((_said(m) for m in messages if m.get("role") == "user"), "")
    goals = understood(asked, tasks)
    if goals is None:
        return UNKNOWN_TASK
    offered = {tool.get("function", {}).get("name") for tool in tools}
    tries = tries_in(messages)
    reached = sum(not t.failed for t in tries)
    if reached >= len(goals):
        return DONE
    failed = _latest_failures(tries)
    tips = [tip for message in messages for tip in tips_in(_text(message))]
    seen = {call.same for call in failed}
    if failed and (better := _better(failed[-1], tips, seen)):
        return better
    warned: list[Call] = []
    for call in goals[reached]:
        if call.same in seen or call.tool not in offered:
            continue
        if not any(normal(tip.action) == normal(call.text) for tip in tips):
            return call
        if better := _better(call, tips, seen):
            return better
        warned.append(call)
    # All remaining candidates are known to fail: one is tried all the same before giving up.
    return warned[0] if warned else GIVEN_UP


def tries_in(messages: Sequence[Mapping[str, Any]]) -> list[Try]:
    """Return the calls of a conversation that have an observation, in order."""
    shown = {str(m.get("tool_call_id")): _said(m) for m in messages if m.get("role") == "tool"}
    found = []
    for message in messages:
        for made in message.get("tool_calls") or []:
            if (observation := shown.get(str(made["id"]))) is not None:
                function = made["function"]
                call = Call(str(function["name"]), json.loads(function["arguments"]))
                found.append(Try(call, failed_in(observation)))
    return found


def failed_in(observation: str) -> bool:
    """Whether an observation shows a failure: its exit code, or a tool's own `Error`."""
    codes = _EXIT_CODE.findall(observation)
    return codes[-1] != "0" if codes else observation.startswith("Error")


def tips_in(text: str) -> list[Tip]:
    """Return the advice of the memory blocks in a text.

    An item begins with its number. A line that starts with `| ` is quoted and belongs to the label line before it; a
    label says `failed` over the action, `what worked` over its replacement. Items of other shapes are ignored.
    """
    found = []
    for block in _BLOCK.findall(text):
        items: list[list[tuple[str, list[str]]]] = []
        for line in block.splitlines():
            if line.startswith("|"):
                if items:
                    items[-1][-1][1].append(line[2:])
            elif _ITEM.match(line):
                items.append([(line, [])])
            elif items:
                items[-1].append((line, []))
        found += [tip for item in items if (tip := _tip(item)) is not None]
    return found


def _tip(parts: Sequence[tuple[str, list[str]]]) -> Tip | None:
    label, action = parts[0]
    if "failed" not in label or not action:
        return None
    for label, lines in parts[1:]:
        if "what worked" in label and lines:
            where = _WHERE.search(label)
            return Tip("\n".join(action), "\n".join(lines), where[2] if where else "", first="after this" in label)
    return Tip("\n".join(action))


def _better(call: Call, tips: Sequence[Tip], seen: set[tuple[str, str]]) -> Call | None:
    """Return what worked instead of a call, the latest advice first, without what has failed already."""
    for tip in reversed(tips):
        if tip.instead is None or normal(tip.action) != normal(call.text):
            continue
        text = tip.instead
        if tip.first:
            text = f"{text} && {call.text}" if call.tool == "bash" else f"{text}\n{call.text}"
        better = _call(tip.tool or call.tool, text)
        if better is not None and better.same not in seen:
            return better
    return None


def _call(tool: str, text: str) -> Call | None:
    if tool in FIELDS:
        return Call(tool, {FIELDS[tool]: text})
    try:
        arguments = json.loads(text)
    except ValueError:
        return None
    texts = isinstance(arguments, dict) and all(isinstance(v, str) for v in arguments.values())
    return Call(tool, arguments) if texts else None


def _latest_failures(tries: Sequence[Try]) -> list[Call]:
    """Return the failed calls since the last goal was reached."""
    failed: list[Call] = []
    for one in tries:
        failed = [*failed, one.call] if one.failed else []
    return failed


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _said(message: Mapping[str, Any]) -> str:
    return _BLOCK.sub("", _text(message)).strip()


@functools.cache
def _pattern(asks: str) -> re.Pattern[str]:
    parts = _SLOT.split(asks)
    known: set[str] = set()
    pattern = ""
    for index, part in enumerate(parts):
        if index % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={part})" if part in known else f"(?P<{part}>[^`]+)"
            known.add(part)
    return re.compile(pattern)
