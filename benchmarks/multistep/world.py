"""The environment of one task: tools with a state of their own, a user who replies, and switches that change it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ChangeKind = Literal["none", "tool_renamed", "column_dropped", "id_gone", "refusal"]
SUBMIT, VERIFY = "submit", "verify_identity"


class Refused(Exception):
    """A tool's own error; its text is the observation."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as the agent knows it. `writes`: it changes state; `free`: its result does not depend on this field."""

    name: str
    does: str
    fields: tuple[str, ...] = ()
    writes: bool = False
    free: str = ""

    def definition(self, name: str) -> dict[str, Any]:
        """Return the definition in OpenAI's form, under this name."""
        properties = {field: {"type": "string"} for field in self.fields}
        parameters = {"type": "object", "properties": properties, "required": list(self.fields)}
        return {"type": "function", "function": {"name": name, "description": self.does, "parameters": parameters}}


@dataclass(frozen=True, slots=True)
class Change:
    """How an environment differs from the one in which memory learned.

    `tool_renamed`: `tool` has `_v2` behind its name. `column_dropped`: the column that the query needs has another
    name. `id_gone`: the first id of the list that the agent looks through is no longer known. `refusal`: `tool` refuses
    until the user's identity is verified.
    """

    kind: ChangeKind = "none"
    tool: str = ""


UNCHANGED = Change()


@dataclass(frozen=True, slots=True)
class Write:
    """A change of state that the agent made, and whether the user had agreed to it before."""

    tool: str
    arguments: Mapping[str, str]
    agreed: bool


class World:
    """The state behind one task's tools. `run` holds what each tool does; `error` is the form of its refusals.

    `gone` is the id that is listed and not known, where there is one.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        run: Mapping[str, Callable[..., Any]],
        *,
        reply: str,
        error: Callable[[str], str],
        change: Change = UNCHANGED,
        gone: str = "",
    ) -> None:
        self._tools, self._run, self._reply, self._error = tools, run, reply, error
        self._names = {t.name: f"{t.name}_v2" if _is(change, "tool_renamed", t.name) else t.name for t in tools}
        self._refuses = change.tool if change.kind == "refusal" else ""
        self._agreed = False
        self.gone = gone if change.kind == "id_gone" else ""
        self.writes: list[Write] = []
        self.submitted: str | None = None

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """The tools as a request offers them."""
        return [tool.definition(self._names[tool.name]) for tool in self._tools]

    def known(self, name: str) -> str:
        """Return the name by which an unchanged environment knows a tool."""
        return next((old for old, new in self._names.items() if new == name), name)

    def call(self, name: str, arguments: Mapping[str, str]) -> str:
        """Execute a call; return the observation."""
        tool = next((t for t in self._tools if self._names[t.name] == name), None)
        if tool is None:
            return self._error(f"no tool is called {name}")
        if set(arguments) != set(tool.fields):
            return self._error(f"{name} takes {', '.join(tool.fields) or 'no arguments'}")
        if tool.name == self._refuses:
            return self._error(f"access denied, call {VERIFY} first")
        try:
            found = self._run[tool.name](**arguments)
        except Refused as refused:
            return self._error(str(refused))
        if tool.name == VERIFY:
            self._refuses = ""
        if tool.name == SUBMIT:
            self.submitted = arguments["answer"]
        elif tool.writes:
            self.writes.append(Write(tool.name, dict(arguments), self._agreed))
        return found if isinstance(found, str) else json.dumps(found)

    def answer(self, _question: str) -> str:
        """Return the user's reply to a question, which agrees to what was proposed."""
        self._agreed = True
        return self._reply


def has_failed(observation: str) -> bool:
    """Whether an observation shows a refusal, in any of the forms that the environments use."""
    return observation.startswith(("Error", '{"error"'))


def _is(change: Change, kind: ChangeKind, tool: str) -> bool:
    return change.kind == kind and change.tool == tool
