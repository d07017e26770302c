"""Whether an agent's later actions are the steps of a procedure: by tool, and by tool and arguments."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache

from optillm_memory.bench.trajectories.actions import arguments_of, named_as_changing
from optillm_memory.bench.trajectories.runs import SAY, Act, Run
from optillm_memory.conversation.text import text_of
from optillm_memory.learn.procedures.mine import ProcedureStep
from optillm_memory.learn.procedures.values import Slot, leaves, parsed, stands_in, text_of_leaf

Follows = Callable[[ProcedureStep, Act], bool]


def by_tool(step: ProcedureStep, act: Act) -> bool:
    """Whether an action is of a step's tool; a text turn that the user replied to is of the tool `say`."""
    return step.tool == act.tool


def by_arguments(run: Run) -> Follows:
    """Return whether an action of a run has a step's tool and arguments.

    A step's arguments are bound to what the run holds before the action: an action whose value stands where the step
    says that it comes from has the argument, and so has any where the step leaves it free. An argument that the step
    does not know, and one that the action does not have, is wrong.
    """

    def follows(step: ProcedureStep, act: Act) -> bool:
        if not by_tool(step, act):
            return False
        if act.tool == SAY:
            return True
        given = given_in(act.arguments)
        slots = {slot.name: slot for slot in step.slots}
        return given.keys() <= slots.keys() and all(
            slot.kind == "free" or (slot.name in given and all(_bound(slot, v, act, run) for v in given[slot.name]))
            for slot in slots.values()
        )

    return follows


def given_in(arguments: str) -> dict[str, list[str]]:
    """Return the values of a call's arguments as texts, by their JSON paths."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path, leaf in leaves(arguments_of(arguments)):
        found[path].append(text_of_leaf(leaf))
    return dict(found)


def _bound(slot: Slot, value: str, act: Act, run: Run) -> bool:
    """Whether a value stands, before an action, where a slot says that it comes from."""
    if slot.kind == "constant":
        return slot.origin in (value, _quoted(value))
    if slot.kind == "user":
        return _fits(slot.origin, value) and any(stands_in(value, text) for text in said_before(run, act.index))
    if slot.kind == "step":
        tool, _, path = slot.origin.partition(":")
        earlier = [a.observation for a in run.acts if a.index < act.index and a.tool == tool]
        if not path:  # a text without structure
            return any(stands_in(value, text) for text in earlier)
        return any(value in values_at(text).get(path, ()) for text in earlier)
    return False


def said_before(run: Run, index: int) -> list[str]:
    """Return what the user said before a message."""
    return [text_of(m) for m in run.messages[:index] if m.get("role") == "user"]


@lru_cache(maxsize=4096)
def values_at(observation: str) -> dict[str, frozenset[str]]:
    """Return the values of a JSON observation by their paths."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path, leaf in leaves(parsed(observation)):
        found[path].add(text_of_leaf(leaf))
    return {path: frozenset(values) for path, values in found.items()}


def _fits(shape: str, value: str) -> bool:
    try:
        return not shape or re.fullmatch(shape, value) is not None
    except re.error:
        return False


def _quoted(value: str) -> str:
    return f'"{value}"'


def common(steps: Sequence[ProcedureStep], acts: Sequence[Act], follows: Follows) -> int:
    """Return the length of the longest common subsequence of steps and actions."""
    before = [0] * (len(acts) + 1)
    for step in steps:
        row = [0]
        for j, act in enumerate(acts):
            row.append(before[j] + 1 if follows(step, act) else max(before[j + 1], row[j]))
        before = row
    return before[-1]


def writes(step: ProcedureStep) -> bool:
    """Whether a step changes state: as the procedure says, or as its tool's name does."""
    return step.writes or named_as_changing(step.tool)


def misleading(steps: Sequence[ProcedureStep], acts: Sequence[Act]) -> tuple[int, int]:
    """Return how many steps that change state a run never made, and how many there are."""
    changing = [step for step in steps if writes(step)]
    made = {act.tool for act in acts if act.writes}
    return sum(step.tool not in made for step in changing), len(changing)


def covered(steps: Sequence[ProcedureStep], acts: Sequence[Act], offered_at: int) -> tuple[int, int]:
    """Return how many of a run's successful changes of state stand in steps that were offered in time; and all of them.

    A step stands for one action, one that repeats for all of its tool.
    """
    changing = [act for act in acts if act.writes and not act.failed]
    offered: defaultdict[str, int] = defaultdict(int)
    for step in steps:
        if writes(step):
            offered[step.tool] += len(changing) if step.repeats else 1
    found = 0
    for act in changing:
        if act.index >= offered_at and offered[act.tool]:
            offered[act.tool] -= 1
            found += 1
    return found, len(changing)
