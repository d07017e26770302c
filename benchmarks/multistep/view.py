"""What the agent makes of its prompt: the names in the request, and each step so far with what it showed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.multistep.world import VERIFY, has_failed

SAY = ""  # the tool of a question to the user
_BLOCK = re.compile(r"\s*<agent_memory[^>]*>.*?</agent_memory[^>]*>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Made:
    """One step that was made: a call with its observation, or a question with the user's reply."""

    tool: str
    arguments: Mapping[str, str]
    shown: Any
    failed: bool = False

    @property
    def refused(self) -> bool:
        """Whether it failed only because something else has to come first."""
        return self.failed and VERIFY in str(self.shown)


@dataclass(frozen=True, slots=True)
class View:
    """The request's names by slot, and the steps so far, oldest first. Tools are under the names the agent knows."""

    slots: Mapping[str, str]
    made: tuple[Made, ...] = ()

    def results(self, tool: str) -> list[Any]:
        """Return what a tool showed, each time that it worked."""
        return [m.shown for m in self.made if m.tool == tool and not m.failed]

    def did(self, tool: str, arguments: Mapping[str, str], free: str = "") -> bool:
        """Whether a call has worked; the field `free` may have any value."""
        wanted = {k: v for k, v in arguments.items() if k != free}
        return any(
            m.tool == tool and not m.failed and {k: v for k, v in m.arguments.items() if k != free} == wanted
            for m in self.made
        )

    def tried(self, tool: str, arguments: Mapping[str, str]) -> bool:
        """Whether a call was made, whatever came of it; one that was refused for now was not."""
        return any(m.tool == tool and dict(m.arguments) == dict(arguments) and not m.refused for m in self.made)

    def latest(self, field: str) -> str | None:
        """Return the latest value that an observation showed under a field, else the request's name for it."""
        for made in reversed(self.made):
            if not made.failed and (found := next(values_at(made.shown, field, anywhere=True), None)) is not None:
                return found
        return self.slots.get(field)


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text with what memory inserted."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def own_text(message: Mapping[str, Any]) -> str:
    """Return a message's text without what memory inserted."""
    return _BLOCK.sub("", text_of(message)).strip()


def read(messages: Sequence[Mapping[str, Any]], slots: Mapping[str, str], known: Mapping[str, str]) -> View:
    """Return the view of a conversation; `known` maps the offered names of tools to those that the agent knows."""
    made: list[Made] = []
    shown = {str(m.get("tool_call_id")): own_text(m) for m in messages if m.get("role") == "tool"}
    question = ""
    for message in messages:
        if message.get("role") == "assistant":
            question = own_text(message)
            for call in message.get("tool_calls") or []:
                function, text = call["function"], shown.get(str(call["id"]))
                if text is not None:
                    name = str(function["name"])
                    given = {str(k): str(v) for k, v in json.loads(function["arguments"]).items()}
                    made.append(Made(known.get(name, name), given, _parsed(text), has_failed(text)))
        elif message.get("role") == "user" and question:
            made.append(Made(SAY, {"text": question}, own_text(message)))
            question = ""
    return View(slots, tuple(made))


def values_at(value: Any, path: str, *, anywhere: bool = False) -> Iterator[str]:
    """Return the values at a path as texts: `a.b`, `[]` for the places of a list, `{}` for the keys of an object.

    `anywhere` looks for the path at any depth.
    """
    yield from _values(value, re.findall(r"\[\d*\]|\{\}|[^.\[\]{}]+", path))
    if anywhere:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        for part in inner:
            yield from values_at(part, path, anywhere=True)


def _values(value: Any, path: Sequence[str]) -> Iterator[str]:
    if path:
        for inner in _inside(value, path[0], last=len(path) == 1):
            yield from _values(inner, path[1:])
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, (dict, list)):
        yield json.dumps(value)


def _inside(value: Any, part: str, *, last: bool) -> list[Any]:
    if isinstance(value, dict):
        if part == "{}":
            return list(value) if last else list(value.values())
        return [value[part]] if part in value else []
    if not isinstance(value, list) or not part.startswith("["):
        return []
    return value if part == "[]" else value[int(part[1:-1]) :][:1]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
