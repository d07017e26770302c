"""Tasks: what is asked, how the agent knows to do it, and what counts as solved."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.agent_policy import Call
from benchmarks.multistep.view import SAY, View
from benchmarks.multistep.world import UNCHANGED, Change, Tool, World

UNKNOWN = "unknown"  # what the agent puts where it lacks a value
Source = Callable[[View], "str | None"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step that a task needs.

    `needed` returns the arguments of its next call, None where nothing is left to do; `meant` those that the agent
    means, done or not. `slips` are mistakes that it is likely to make just here.
    """

    tool: str
    needed: Callable[[View], Mapping[str, str] | None]
    meant: Callable[[View], Mapping[str, str] | None]
    slips: tuple[Callable[[View], Call], ...] = ()


@dataclass(frozen=True)
class Domain:
    """The agent's surroundings: its instructions, its tools, and what it tries where it does not know better.

    `guesses` are calls with `{slot}` in them: some are refused, some show what nobody needs.
    `allowed`: tools that change state and that the operator lets memory serve by name.
    """

    name: str
    system: str
    tools: tuple[Tool, ...]
    guesses: tuple[Call, ...]
    allowed: tuple[str, ...] = ()

    @property
    def read_only(self) -> list[str]:
        """The tools that change nothing."""
        return [tool.name for tool in self.tools if not tool.writes]


@dataclass(frozen=True)
class Case:
    """What one task is about: the names in its request, the user's reply, the facts of its check, and its world.

    `wanted` are the state-changing calls that solve it, less free fields; `fact` is what the last answer, or what is
    submitted, has to hold.
    """

    slots: Mapping[str, str]
    reply: str
    wanted: tuple[tuple[str, Mapping[str, str]], ...]
    fact: str
    world: Callable[[Change], World]


@dataclass(frozen=True)
class Family:
    """A kind of task. `asks` holds `{slot}` for names; `answer` is the agent's last text."""

    name: str
    domain: Domain
    asks: str
    steps: tuple[Step, ...]
    answer: Callable[[View], str]
    case: Callable[[int], Case]

    @property
    def least_llm_calls(self) -> int:
        """How many calls of the LLM remain where memory serves all that it may."""
        domain, tools = self.domain, [step.tool for step in self.steps]
        served = {*domain.read_only, *domain.allowed}
        return sum(tool not in served for tool in tools) + ("submit" not in tools)


@dataclass(frozen=True)
class Task:
    """One task of a family: its number determines all names and values."""

    family: Family
    number: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells a task from all others."""
        return self.family.name, self.number

    @functools.cached_property
    def case(self) -> Case:
        """What it is about."""
        return self.family.case(self.number)

    @property
    def asked(self) -> str:
        """The request."""
        return self.family.asks.format(**self.case.slots)

    def world(self, change: Change = UNCHANGED) -> World:
        """Return its environment as it is before the first step."""
        return self.case.world(change)

    def solved(self, world: World, answer: str) -> bool:
        """Whether an environment, and the agent's last answer, are as they should be: that and nothing else was done.

        What the user has to agree to must have been agreed to before.
        """
        free = {tool.name: tool.free for tool in self.family.domain.tools}
        done = [
            (write.tool, {k: v for k, v in write.arguments.items() if k != free[write.tool]}) for write in world.writes
        ]
        asks = any(step.tool == SAY for step in self.family.steps)
        agreed = not asks or all(write.agreed for write in world.writes)
        fact = self.case.fact
        stated = fact in answer if world.submitted is None else fact == world.submitted
        return stated and agreed and done == [(tool, dict(given)) for tool, given in self.case.wanted]


def understood(asked: str, families: Sequence[Family]) -> tuple[Family, dict[str, str]] | None:
    """Return the family of a request, with the names in it; None where no family asks like this."""
    for family in families:
        if match := _pattern(family.asks).fullmatch(asked):
            return family, match.groupdict()
    return None


@functools.cache
def _pattern(asks: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", asks)
    return re.compile("".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>.+?)" for i, p in enumerate(parts)))


# -- the parts of which steps are made -------------------------------------------------------------


def slot(name: str) -> Source:
    """Return the source of a value that the request names."""
    return lambda view: view.slots.get(name)


def seen(tool: str, key: str) -> Source:
    """Return the source of a value that a tool showed at its top."""

    def find(view: View) -> str | None:
        found: Any = next((shown for shown in reversed(view.results(tool)) if isinstance(shown, dict)), {})
        value = found.get(key)
        return value if isinstance(value, str) else None

    return find


def once(tool: Tool, *, slips: tuple[Callable[[View], Call], ...] = (), **sources: Source) -> Step:
    """Return a step that is one call."""

    def meant(view: View) -> Mapping[str, str]:
        return {name: source(view) or UNKNOWN for name, source in sources.items()}

    def needed(view: View) -> Mapping[str, str] | None:
        given = meant(view)
        return None if view.did(tool.name, given, tool.free) else given

    return Step(tool.name, needed, meant, slips)


def until(tool: Tool, field_: str, ids: Callable[[View], Sequence[str]], found: Source) -> Step:
    """Return a step that is made for one id after the other until it shows what is looked for."""

    def needed(view: View) -> Mapping[str, str] | None:
        if found(view) is not None:
            return None
        return next(({field_: value} for value in ids(view) if not view.tried(tool.name, {field_: value})), None)

    return Step(tool.name, needed, needed)


def question(text: str) -> Step:
    """Return the step of asking the user, and of waiting for the reply."""

    def needed(view: View) -> Mapping[str, str] | None:
        return None if any(m.tool == SAY for m in view.made) else {"text": text.format(**view.slots)}

    return Step(SAY, needed, needed)
