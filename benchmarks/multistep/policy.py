"""The scripted agent's policy on multi-step tasks, in full.

The first user message tells it the task. It knows which steps the task needs (`families`), but not what to do first.
1. Where the last call was refused until something else is done, it does that.
2. Where the prompt holds a procedure, it takes the procedure's next step with probability `follow`, drawn once for each
   step. It does as it is written there: a question that is missing is not asked. Where a step that it took has failed,
   or a value is not where the procedure says, it does not follow that procedure any more.
3. Else, before each step that the task needs, it tries one to four other calls: guesses that are refused, look-ups
   that nobody needs, and often the mistake that is likely just there. Before a question it tries at most one. Of a call
   that the prompt knows to fail it does what worked instead, or leaves it out.
4. When nothing is left to do it gives its answer. A call that its task needs and that failed makes it give up.
It keeps nothing between two requests: equal prompts get equal answers. `seed` is the only other source of chance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.agent_policy import GIVEN_UP, UNKNOWN_TASK, Call, Tip, tips_in
from benchmarks.multistep.advice import fails, instead
from benchmarks.multistep.block import procedure_in
from benchmarks.multistep.families import FAMILIES
from benchmarks.multistep.follow import Understanding, next_step
from benchmarks.multistep.task import UNKNOWN, Family, Step, understood
from benchmarks.multistep.view import SAY, View, own_text, read, text_of
from benchmarks.multistep.world import VERIFY

# As wasteful as on the tasks with a shell, where it makes 2.8 mistakes before each goal.
WASTED, BEFORE_A_QUESTION = (1, 2, 3, 4), (0, 1)
SLIP = 0.6  # how often it makes the mistake that is likely at a step


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent with its own chance. With `wasteful` off it makes no detours: that is how a task is best done."""

    seed: str = "0"
    follow: float = 1.0
    wasteful: bool = True
    families: Sequence[Family] = FAMILIES

    def decide(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Call | str:
        """Return the next call, or a text: a question (it ends with `?`) or the answer."""
        asked = next((own_text(m) for m in messages if m.get("role") == "user"), "")
        found = understood(asked, self.families)
        if found is None:
            return UNKNOWN_TASK
        family, slots = found
        offered = _offered(family, tools)
        view = read(messages, slots, offered)
        call = self._next(family, view, messages, asked, offered)
        if isinstance(call, str):
            return call
        if call.tool == SAY:
            return call.arguments["text"]
        name = next((n for n, known in offered.items() if known == call.tool), None)
        return Call(name, call.arguments) if name else GIVEN_UP

    def _next(
        self, family: Family, view: View, messages: Sequence[Mapping[str, Any]], asked: str, offered: Mapping[str, str]
    ) -> Call | str:
        if view.made and view.made[-1].refused:
            return Call(VERIFY, {})
        step = next(((i, s, n) for i, s in enumerate(family.steps) if (n := s.needed(view)) is not None), None)
        if step is None:
            return family.answer(view)
        index, needed, arguments = step
        lines = procedure_in(messages)
        # A tool that is not offered ends it: whoever wrote it down had other tools.
        if all(line.tool in ("", *offered) for line in lines):
            known = [replace(line, tool=offered.get(line.tool, SAY)) for line in lines]
            advised = next_step(known, view, _understanding(family, view))
            if advised and self._chance(asked, "follow", advised[0].number).random() < self.follow:
                return advised[1]
        right = Call(needed.tool, arguments)
        if view.tried(right.tool, right.arguments):
            return GIVEN_UP
        tips = [tip for message in messages for tip in tips_in(text_of(message))]
        return self._own(family, right, self._detours(family, needed, index, view, asked), view, tips)

    @staticmethod
    def _own(family: Family, right: Call, detours: Sequence[Call], view: View, tips: Sequence[Tip]) -> Call:
        """Return what the agent does without a procedure, with the advice on calls that fail."""
        fields = {tool.name: tool.fields for tool in family.domain.tools}
        last = view.made[-1] if view.made else None
        if last and last.failed and (better := instead(Call(last.tool, last.arguments), tips, view, fields)):
            return better
        for call in detours:
            if view.tried(call.tool, call.arguments):
                continue
            if not fails(call, tips):
                return call
            if better := instead(call, tips, view, fields):
                return better
        return right

    def _detours(self, family: Family, step: Step, index: int, view: View, asked: str) -> list[Call]:
        if not self.wasteful:
            return []
        chance = self._chance(asked, "detour", index)
        count = chance.choice(BEFORE_A_QUESTION if step.tool == SAY else WASTED)
        slips = [slip for slip in step.slips if chance.random() < SLIP]
        guesses = chance.sample(family.domain.guesses, min(count, len(family.domain.guesses)))
        filled = [Call(g.tool, {k: v.format_map(view.slots) for k, v in g.arguments.items()}) for g in guesses]
        return [*filled, *(slip(view) for slip in slips)]

    def _chance(self, asked: str, what: str, number: int) -> random.Random:
        return random.Random(f"{self.seed}|{asked}|{what}|{number}")


def _offered(family: Family, tools: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the offered tools by name, with the names by which the agent knows them: what they do tells it."""
    known = {tool.does: tool.name for tool in family.domain.tools}
    functions = [tool.get("function", {}) for tool in tools]
    return {str(f.get("name")): known.get(str(f.get("description")), str(f.get("name"))) for f in functions}


def _understanding(family: Family, view: View) -> Understanding:
    def value(tool: str, name: str) -> str | None:
        mine = [step for step in family.steps if step.tool == tool]
        found = next((n for s in mine if (n := s.needed(view))), None) or next(
            (n for s in mine if (n := s.meant(view))), {}
        )
        return None if found.get(name) == UNKNOWN else found.get(name)

    def satisfied(tool: str) -> bool:
        return all(s.needed(view) is None for s in family.steps if s.tool == tool)

    writes = {tool.name for tool in family.domain.tools if tool.writes}
    question = next((n["text"] for s in family.steps if s.tool == SAY and (n := s.needed(view))), "Shall I go on?")
    return Understanding(value, satisfied, writes.__contains__, question)
