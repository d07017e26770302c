"""The next action that memory proposes, from solved episodes of the same kind that the running one goes along with.

Each of them is aligned with the steps that are done, and predicts its next step; its vote counts by its value and by
how similar its goal is. A prediction needs every argument: word for word where the goal is the same, else each from
where it came from before. Where observations differ in form from those of a solved episode, it predicts nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.conversation.actions import action_of
from optillm_memory.conversation.redact import is_whole
from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.gate import ACTION
from optillm_memory.learn.procedures.effects import effect_of, is_sql
from optillm_memory.learn.procedures.mine import SAY, ProcedureStep, RunStep
from optillm_memory.learn.procedures.offer import Solved
from optillm_memory.learn.procedures.values import (
    Slot,
    digest_of,
    found_by_shape,
    leaves,
    parsed,
    shape_of_observation,
    stands_in,
    text_of_leaf,
    values_at,
)

# The cosine by which a goal is farther away than the nearest when it has 1/e of its weight.
_BANDWIDTH = 0.06
_QUOTES = ("'", '"', "`")
_QUOTED = re.compile(r"'[^']*'?|\"[^\"]*\"?|`[^`]*`?|[^'\"`]+")
_PRIOR, _OF = 2.0, 3.0  # of the share of right predictions, beside one for each episode that agrees


@dataclass(frozen=True, slots=True)
class NextAction:
    """A tool call that memory proposes; `observed` is a digest of what it showed before, empty if unknown."""

    tool: str
    arguments: str
    observed: str = ""

    @property
    def key(self) -> str:
        """The form in which actions are compared."""
        return action_key(self.tool, self.arguments)

    def as_text(self) -> str:
        """Return the action as it is stored with its proposal."""
        return json.dumps([self.tool, self.arguments, self.observed], ensure_ascii=False)

    @classmethod
    def of_text(cls, text: str) -> NextAction:
        """Return a stored action."""
        return cls(*json.loads(text))


@dataclass(frozen=True, slots=True)
class _Group:
    """Solved episodes that predict the same: one action, or actions that showed the same to an equal goal."""

    marks: frozenset[str]
    votes: float
    members: tuple[tuple[NextAction, Solved], ...]

    @property
    def latest(self) -> tuple[NextAction, Solved]:
        """The newest prediction: the world behind the tools may have changed."""
        return max(self.members, key=lambda pair: pair[1].at)


def action_key(tool: str, arguments: str) -> str:
    """Return the form of an action in which equal ones are equal.

    White space and a final `;` do not count, nor does the case of SQL outside of quotes.
    """
    key = action_of(tool, arguments).key.rstrip("; ")
    if not is_sql(tool, arguments):
        return key
    return "".join(part if part[0] in _QUOTES else part.casefold() for part in _QUOTED.findall(key))


def propose_action(
    solved: Sequence[Solved],
    texts: Sequence[str],
    done: Sequence[RunStep],
    is_constant: Callable[[str], bool],
    *,
    misled: float = 0.0,
) -> Proposal | None:
    """Return the next action of a running episode with its score, None where nothing is predicted.

    `solved` are the nearest solved episodes, best first; `texts` what the user wrote, `done` the steps so far. The
    score is agreement x similarity x (n + 2) / (n + 3) for n episodes that agree. Nothing follows a failed step.
    `misled` is when an action from episodes of this kind was last served and found wrong (0: never).
    """
    if any(step.failed for step in done):
        return None
    equal = [s for s in solved if s.equal]
    considered = equal or list(solved)
    # An action that was served and found wrong speaks against all evidence before it: the world has changed.
    misled = max((s.misled for s in considered), default=0.0) if equal else misled
    current = [s for s in considered if s.at > misled]
    considered, vetoes = (current, ()) if current else (considered, ("quarantined",))
    groups: list[_Group] = []
    total, top = 0.0, considered[0].similarity if considered else 0.0
    for item in considered:
        vote = item.value * math.exp((item.similarity - top) / _BANDWIDTH)
        total += vote
        if (found := _next(item, texts, done, is_constant)) is not None:
            groups = _grouped(groups, found, item, vote)
    if not groups:
        return None
    best = max(groups, key=lambda group: (group.votes, group.latest[1].at))
    agreement = best.votes / total
    found, source = best.latest
    supporters = [source, *(item for _, item in best.members if item is not source)]
    similarity = 1.0 if equal else max(item.similarity for item in supporters)
    count = len(supporters)
    score = agreement * min(similarity, 1.0) * (count + _PRIOR) / (count + _OF)
    names = tuple(item.memory_id for item in supporters)
    return Proposal(found.as_text(), found.key, score, False, vetoes, names, agreement, similarity, 0.0)


def action_partition(frame: str, tool: str) -> str:
    """Return the gate's partition of a tool of an agent; what they pool is the labels of the agent's other tools."""
    own, agent = (
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=10).hexdigest()
        for text in (f"{frame}\x1f{tool}", frame)
    )
    return f"{ACTION}{own}-{ACTION}{agent}"


def label_of(
    proposed: NextAction, place: int | None, steps: Sequence[RunStep], *, served: bool, solved: bool | None
) -> bool | None:
    """Return whether an action that was proposed for the message at a place was right, None where that is not known.

    In an episode that was solved it was if the same step comes there or later and succeeds, or if it showed before what
    the last successful step showed here; where one of the two observations is missing nothing is known. One that was
    served is its episode's own step: wrong where that failed, or the episode did; `solved` is None where that is not
    known.
    """
    if place is None:
        return None
    later = [step for step in steps if step.message >= place]
    if served:
        own = next((step for step in later if step.message == place), None)
        return None if own is None else False if own.failed else solved
    return _is_right(proposed, later) if solved else None


def _is_right(proposed: NextAction, later: Sequence[RunStep]) -> bool | None:
    good = [step for step in later if step.tool != SAY and not step.failed]
    if any(action_key(step.tool, step.arguments) == proposed.key for step in good):
        return True
    looked = [step for step in good if step.effect != "submits"]
    if not looked:
        return False
    if not (proposed.observed and looked[-1].observation):
        return None
    return digest_of(looked[-1].observation) == proposed.observed


def _grouped(groups: Sequence[_Group], found: NextAction, item: Solved, vote: float) -> list[_Group]:
    """Return the groups with one more prediction, which may join some of them."""
    marks = frozenset((found.key, found.observed) if item.equal and found.observed else (found.key,))
    same = [group for group in groups if group.marks & marks]
    joined = _Group(
        marks.union(*(group.marks for group in same)),
        vote + sum(group.votes for group in same),
        (*(member for group in same for member in group.members), (found, item)),
    )
    return [*(group for group in groups if not group.marks & marks), joined]


def _next(
    solved: Solved, texts: Sequence[str], done: Sequence[RunStep], is_constant: Callable[[str], bool]
) -> NextAction | None:
    done = _along(solved, done)
    place = _place(solved, done)
    if place is None or place >= len(solved.steps):
        return None
    step = solved.steps[place]
    if step.tool == SAY or not step.called:
        return None
    if solved.equal and step.arguments and _still_holds(step, done):
        if effect_of(step.tool, step.arguments) == "submits" and not _showed_the_same(solved, done):
            return None  # a result is handed in again only where it rests on the same
        return NextAction(step.tool, step.arguments, step.observed) if _is_whole(step.arguments) else None
    bound = _bound(step, texts, done, is_constant)
    return None if bound is None else NextAction(step.tool, json.dumps(bound, ensure_ascii=False))


def _still_holds(step: ProcedureStep, done: Sequence[RunStep]) -> bool:
    """Whether each value that a step took from an earlier one stands there again."""
    given: dict[str, list[str]] = {}
    for where, leaf in leaves(parsed(step.arguments)):
        given.setdefault(where, []).append(text_of_leaf(leaf))
    for slot in step.slots:
        if slot.kind == "step" and (source := _source(slot, done)) is not None:
            shown = set(values_at(source.observation, _path(slot)))
            if not all(v in shown if shown else stands_in(v, source.observation) for v in given.get(slot.name, ())):
                return False
    return True


def _showed_the_same(solved: Solved, done: Sequence[RunStep]) -> bool:
    """Whether each step that is done showed what it showed in the solved episode; those are known to go along."""
    before = [step.observed for step in solved.steps if step.tool != SAY]
    now = [digest_of(step.observation) for step in done if step.tool != SAY]
    return all(shown in ("", seen) for shown, seen in zip(before, now, strict=False))


def _is_whole(arguments: str) -> bool:
    """Whether arguments are an object, and what was sent: the log may hold them redacted or shortened."""
    return is_whole(arguments) and isinstance(parsed(arguments), dict)


def _bound(
    step: ProcedureStep, texts: Sequence[str], done: Sequence[RunStep], is_constant: Callable[[str], bool]
) -> dict[str, Any] | None:
    """Return a step's arguments with this episode's values, None where one is not known."""
    shapes = [slot.origin for slot in step.slots if slot.kind == "user"]
    if len(set(shapes)) < len(shapes):
        return None  # which of them is which, and whether they are one, is not known
    bound: dict[str, Any] = {}
    for slot in step.slots:
        if not slot.name or any(mark in slot.name for mark in (".", "[]", "{}")):
            return None  # a nested argument: which values belong together is not known
        value = _value(slot, texts, done, is_constant)
        if value is None:
            return None
        bound[slot.name] = value
    return bound


def _along(solved: Solved, done: Sequence[RunStep]) -> Sequence[RunStep]:
    """Return the steps less the detours: to an equal goal, looks by tools that the solved episode did without."""
    if not solved.equal:
        return done
    own = {step.tool for step in solved.steps}
    return [step for step in done if step.tool in own or step.effect != "reads"]


def _place(solved: Solved, done: Sequence[RunStep]) -> int | None:
    """Return the place of the next step: after those that are done, None where these do not go along with it."""
    at = 0
    for step in done:
        if step.tool == SAY:
            continue
        found = next((n for n in range(at, len(solved.steps)) if _is(solved, n, step)), None)
        if found is None or any(s.tool != SAY for s in solved.steps[at:found]):
            return None
        at = found + 1
    return at


def _is(solved: Solved, place: int, done: RunStep) -> bool:
    step: ProcedureStep = solved.steps[place]
    if step.tool != done.tool or (step.shape and shape_of_observation(done.observation) != step.shape):
        return False
    return not (solved.equal and step.arguments) or action_key(step.tool, step.arguments) == action_key(
        done.tool, done.arguments
    )


def _value(slot: Slot, texts: Sequence[str], done: Sequence[RunStep], is_constant: Callable[[str], bool]) -> Any | None:
    """Return the value of an argument, None where it is not known for certain."""
    if slot.kind == "user":
        found = found_by_shape(slot.origin, texts)
        return found[0] if len(found) == 1 else None
    if slot.kind == "step":
        source = _source(slot, done)
        values = {} if source is None else values_at(source.observation, _path(slot))
        return next(iter(values.values())) if len(values) == 1 else None
    if slot.kind == "constant" and is_constant(slot.origin):
        return parsed(slot.origin)
    return None


def _source(slot: Slot, done: Sequence[RunStep]) -> RunStep | None:
    """Return the step that an argument's value comes from: the latest of its tool."""
    tool = slot.origin.partition(":")[0]
    return next((step for step in reversed(done) if step.tool == tool), None)


def _path(slot: Slot) -> str:
    return slot.origin.partition(":")[2]
