"""Offering: the procedure that a running episode may follow, from the solved episodes that are nearest to its goal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from optillm_memory.learn.conflicts import superseded
from optillm_memory.learn.procedures.effects import COMMAND_FIELDS, effect_of
from optillm_memory.learn.procedures.mine import SAY, ProcedureStep, folded
from optillm_memory.learn.procedures.values import Slot

SUPPORTS = 8  # solved episodes that one procedure is made of at most
_WITHIN = 0.08  # of similarity: what is farther behind the nearest is another kind of goal
_SAME = 0.6  # share of the steps that two procedures of one kind have in common
_READ_SUPPORT, _WRITE_SUPPORT = 0.5, 0.75  # share of the supports that a step must have
# What may be said of another episode where it comes again: a word of the kind of task, no name, number or id.
_PLAIN = re.compile(r"[a-z]+(?:[ _-][a-z]+)*|\d|true|false")
_KEY = re.compile(r"(?!.*(?:\d{3}|[A-Z]\d|\d[A-Z]))[A-Za-z_][A-Za-z0-9_]*")  # no id, as far as one can see


@dataclass(frozen=True, slots=True)
class Solved:
    """A solved episode: its memory, how similar its goal is to the one at hand, and its procedure.

    `equal`: the goal is the same word for word, the user wrote a single message, and it is the same user. `value` is
    the posterior success, `misled` when an action that was served from it was last found wrong (0: never).
    """

    memory_id: str
    episode_id: str
    similarity: float
    steps: tuple[ProcedureStep, ...]
    at: float = 0.0
    equal: bool = False
    value: float = 1.0
    misled: float = 0.0


@dataclass(frozen=True, slots=True)
class Offer:
    """A procedure as it is offered: its steps, how many of them are done, and the episodes that support it.

    `memory_id` is that of the solved episode which it follows most. `verbatim`: what only looks, or hands in the
    result, is given with its arguments as they were.
    """

    steps: tuple[ProcedureStep, ...]
    done: int
    support: tuple[str, ...]
    similarity: float
    memory_id: str = ""
    verbatim: bool = False

    @property
    def remaining(self) -> tuple[ProcedureStep, ...]:
        """The steps that are not done yet."""
        return self.steps[self.done :]


def offer(
    nearest: Sequence[Solved],
    done: Sequence[str],
    is_constant: Callable[[str], bool] = lambda _: False,
    is_known: Callable[[str], bool] = lambda _: True,
) -> Offer | None:
    """Return the procedure that the nearest solved episodes (best first) agree on, less what is done already.

    `done` are the tools of the steps that succeeded, in order; `is_constant` tells whether a value belongs to the kind
    of task, `is_known` whether a tool is one of the agent's. None where the episodes agree on nothing, where nothing of
    it remains, and where it would say nothing.
    """
    nearest = [replace(s, steps=folded(s.steps)) for s in nearest if s.steps]
    equal = _standing([s for s in nearest if s.equal])
    if not nearest:
        return None
    if equal:
        best, near = max(equal, key=lambda s: s.at), equal  # newest evidence first: the world may have changed
        steps = best.steps
    else:
        near = [s for s in nearest if s.similarity >= nearest[0].similarity - _WITHIN][:SUPPORTS]
        best = max(near, key=lambda s: (_centrality(s, near), s.similarity))
        steps = _agreed(best, near)
    steps = without_idle_questions(_of_known_tools(steps, is_known))
    steps = tuple(_spoken(step, is_constant, verbatim=bool(equal)) for step in steps)
    at = _progress(steps, done)
    found = Offer(steps, at, tuple(s.episode_id for s in near), near[0].similarity, best.memory_id, bool(equal))
    acts = [step for step in found.remaining if step.tool != SAY]
    tells = any(map(_tells, acts)) and 2 * sum(map(_is_empty, acts)) <= len(acts)
    return found if tells else None


def _of_known_tools(steps: Sequence[ProcedureStep], is_known: Callable[[str], bool]) -> tuple[ProcedureStep, ...]:
    """Return the steps up to the first change by a tool that the agent may not have, without looks by such tools."""
    end = next((n for n, step in enumerate(steps) if step.writes and not is_known(step.tool)), len(steps))
    return tuple(step for step in steps[:end] if step.tool == SAY or is_known(step.tool))


def without_idle_questions(steps: Sequence[ProcedureStep]) -> tuple[ProcedureStep, ...]:
    """Return the steps without the questions that no change follows: what the user was asked for is not among them."""
    kept: list[ProcedureStep] = []
    changes = False
    for step in reversed(steps):
        if step.tool != SAY or changes:
            kept.append(step)
            changes = step.tool != SAY and (changes or step.writes)
    return tuple(reversed(kept))


def _standing(equal: Sequence[Solved]) -> list[Solved]:
    """Return the solutions of one goal without those that a later one with another result supersedes."""
    times: dict[str, list[float]] = {}
    for item in equal:
        if result := _result(item.steps):
            times.setdefault(result, []).append(item.at)
    gone = superseded(times)
    return [item for item in equal if _result(item.steps) not in gone]


def _result(steps: Sequence[ProcedureStep]) -> str:
    """Return the result of a solution: what its last step handed in, or else saw; empty where that is not known."""
    last = steps[-1]
    handed_in = effect_of(last.tool, last.arguments) == "submits"
    return last.arguments if handed_in and last.arguments else last.observed


def _centrality(one: Solved, near: Sequence[Solved]) -> float:
    """Return what a procedure has in common with the others: the largest is the medoid."""
    return sum(len(aligned(one.steps, s.steps)) / max(len(one.steps), len(s.steps)) for s in near)


def _agreed(best: Solved, near: Sequence[Solved]) -> tuple[ProcedureStep, ...]:
    """Return the steps that enough of the episodes share, up to the first change of state that they do not agree on.

    Of what one episode alone changed, all but the first was perhaps another wish of its user.
    """
    votes: list[list[ProcedureStep]] = [[] for _ in best.steps]
    for other in near:
        for i, j in aligned(best.steps, other.steps):
            votes[i].append(other.steps[j])
    kept: list[ProcedureStep] = []
    for step, found in zip(best.steps, votes, strict=True):
        share = len(found) / len(near)
        if share < (_WRITE_SUPPORT if step.writes else _READ_SUPPORT):
            if step.writes:
                break
            continue
        kept.append(replace(step, slots=_slots(step, found), repeats=any(f.repeats for f in found)))
    changes = [place for place, step in enumerate(kept) if step.writes]
    return tuple(kept[: changes[0] + 1] if len(changes) > 1 and len(near) == 1 else kept)


def _slots(step: ProcedureStep, found: Sequence[ProcedureStep]) -> tuple[Slot, ...]:
    """Return the arguments: where most of the episodes had the value from; free where they do not agree.

    What a change takes from an observation may be what somebody chose: all have to agree, and one alone tells it only
    of a field of the same name.
    """
    slots = []
    for name in dict.fromkeys(slot.name for slot in step.slots):
        votes = Counter(slot for other in found for slot in dict.fromkeys(other.slots) if slot.name == name)
        (slot, count), *_ = votes.most_common(1)
        agreed = 2 * count > len(found)
        if step.writes and slot.kind == "step":
            agreed = count == len(found) and (count > 1 or _last(slot.name) == _last(slot.origin))
        slots.append(slot if agreed else Slot(name, "free"))
    return tuple(slots)


def _last(path: str) -> str:
    return re.split(r"[.:]", path.replace("[]", "").replace("{}", ""))[-1]


def _spoken(step: ProcedureStep, is_constant: Callable[[str], bool], *, verbatim: bool) -> ProcedureStep:
    """Return a step as it may be shown: no value of another episode, but where the goal is the same."""
    if verbatim and step.arguments:
        return step
    slots = tuple(
        Slot(s.name, "free")
        if (s.kind == "constant" and not (_PLAIN.fullmatch(s.origin) and is_constant(s.origin)))
        or (s.kind == "step" and not _is_schema(s.origin.partition(":")[2]))
        else s
        for s in step.slots
        if _is_schema(s.name)
    )
    return replace(step, slots=slots, arguments="", observed="")


def _is_schema(path: str) -> bool:
    """Whether a JSON path consists of names of fields, not of data."""
    return all(_KEY.fullmatch(part) for part in path.replace("[]", "").replace("{}", "").split(".") if part)


def _is_empty(step: ProcedureStep) -> bool:
    """Whether a step only says that a tool of many uses, such as a shell, was used, or for what the user wrote."""
    commands = [slot.kind for slot in step.slots if slot.name in COMMAND_FIELDS]
    return bool(commands) and not step.arguments and (not _tells(step) or all(kind == "user" for kind in commands))


def _tells(step: ProcedureStep) -> bool:
    """Whether a step tells where a value comes from, or what it is."""
    return bool(step.arguments and step.slots) or any(slot.kind != "free" for slot in step.slots)


def _progress(steps: Sequence[ProcedureStep], done: Sequence[str]) -> int:
    """Return how many of the steps are done: the place after the last one that was made, in order."""
    at = 0
    for tool in done:
        if tool != SAY:
            for place in range(at, len(steps)):
                if steps[place].tool == tool:
                    at = place + 1
                    break
    return at


def agreeing(nearest: Sequence[Solved], count: int) -> list[Solved]:
    """Return the largest group of solved episodes that did the same, best first; none with fewer than `count`."""
    groups = [[other for other in nearest if did_the_same(one.steps, other.steps)] for one in nearest]
    largest = max(groups, key=len, default=[])
    return largest if len(largest) >= count else []


def did_the_same(one: Sequence[ProcedureStep], other: Sequence[ProcedureStep]) -> bool:
    """Whether two procedures changed the same in the same order, and have most of their steps in common."""
    one, other = folded(one), folded(other)
    share = len(aligned(one, other)) / max(len(one), len(other), 1)
    return share >= _SAME and [s.tool for s in one if s.writes] == [s.tool for s in other if s.writes]


def aligned(one: Sequence[ProcedureStep], other: Sequence[ProcedureStep]) -> list[tuple[int, int]]:
    """Return the pairs of a longest common subsequence by tool (Needleman and Wunsch 1970, without mismatches)."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i in range(len(one) - 1, -1, -1):
        for j in range(len(other) - 1, -1, -1):
            same = one[i].tool == other[j].tool
            table[i][j] = 1 + table[i + 1][j + 1] if same else max(table[i + 1][j], table[i][j + 1])
    pairs = []
    i = j = 0
    while i < len(one) and j < len(other):
        if one[i].tool == other[j].tool:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
