"""Mining: the steps of one solved episode that mattered, each argument bound to where its value came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optillm_memory.conversation.observation import Result, nearby, read
from optillm_memory.conversation.steps import steps_of
from optillm_memory.conversation.text import text_of
from optillm_memory.learn.procedures.effects import Effect, effect_of
from optillm_memory.learn.procedures.values import (
    Slot,
    digest_of,
    is_specific,
    leaves,
    origins_of,
    parsed,
    shape_of,
    shape_of_observation,
    stands_in_lowered,
    text_of_leaf,
    values_at,
)

SAY = ""  # the tool of a text turn that the user replied to
STEPS_MOST = 60  # of one procedure; a longer run is a search, and no way to go again
_VERBATIM = 2_000  # characters of arguments that are kept as they were


@dataclass(frozen=True, slots=True)
class RunStep:
    """One step of an episode as it was: a tool call with its observation, or a text turn with the user's reply.

    `told` is how many messages of the user stand before it, `message` the index of the message that asked for it, and
    `called` False where that was a command in its text.
    """

    tool: str
    arguments: str
    observation: str
    failed: bool = False
    effect: Effect = "unknown"
    told: int = 1
    message: int = 0
    called: bool = True


@dataclass(frozen=True, slots=True)
class ProcedureStep:
    """One step as it is kept: what to call, and where each argument's value comes from.

    `writes`: it changes the state of the world. `arguments` are those of the solved episode where the step only looked
    or handed in the result, else empty; `observed` is a digest of what it showed, `shape` of its form, empty where the
    episode ended with it. `called`: it was a tool call, and no command in a text. `repeats`: it was made for several
    values of a list.
    """

    tool: str
    slots: tuple[Slot, ...] = ()
    writes: bool = False
    arguments: str = ""
    observed: str = ""
    shape: str = ""
    called: bool = True
    repeats: bool = False

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str, str], ...]]:
        """What makes two steps the same step of a procedure: the tool, and where the values come from."""
        return self.tool, origins_of(self.slots)

    def as_json(self) -> list[Any]:
        """Return the step as it is stored."""
        slots = [[s.name, s.kind, s.origin] for s in self.slots]
        return [
            self.tool, slots, int(self.writes), self.arguments, self.observed, self.shape, int(self.called),
            int(self.repeats),
        ]  # fmt: skip

    @classmethod
    def of_json(cls, stored: Sequence[Any]) -> ProcedureStep:
        """Return a stored step."""
        tool, slots, writes, arguments, observed, shape, called, repeats = stored
        return cls(
            tool, tuple(Slot(*slot) for slot in slots), bool(writes), arguments, observed, shape, bool(called),
            bool(repeats),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Procedure:
    """What one solved episode did: what the user wrote (the goal is made of it), and the steps that mattered."""

    texts: tuple[str, ...]
    steps: tuple[ProcedureStep, ...]


@dataclass(slots=True)
class _Kept:
    step: RunStep
    shown: Mapping[str, str] = field(default_factory=dict)  # where each value stands in what it showed
    slots: list[Slot] = field(default_factory=list)
    needs: set[int] = field(default_factory=set)


def run_of(
    messages: Sequence[Mapping[str, Any]], is_answered: Callable[[int, str, str], bool] = lambda *_: True
) -> tuple[list[str], list[RunStep]]:
    """Return what the user wrote in a conversation, and its steps, in order.

    A text turn without an action, which a message of the user follows, is a step, too. `is_answered` tells of a
    message's index, a tool and its arguments whether an answer asked for that; other actions are left out.
    """
    by_message: dict[int, list[Any]] = {}
    results: dict[str, list[Result]] = {}
    for step in steps_of(messages, [str(index) for index in range(len(messages))]):
        place = len(results.setdefault(step.tool, []))
        if step.observation is not None:
            results[step.tool].append(Result(step.arguments, step.observation))
        by_message.setdefault(int(step.made), []).append((step, place))
    texts: list[str] = []
    steps: list[RunStep] = []
    observations = {s.observation for found in by_message.values() for s, _ in found}
    for index, message in enumerate(messages):
        text = text_of(message)
        if message.get("role") == "user" and text.strip() and text not in observations:
            before = messages[index - 1] if index else {}
            if before.get("role") == "assistant" and index - 1 not in by_message:
                steps.append(RunStep(SAY, "", text, told=len(texts), message=index - 1))
            texts.append(text)
        for made, place in by_message.get(index, ()):
            if not is_answered(index, made.tool, made.arguments):
                continue
            if made.observation is not None or index == len(messages) - 1:  # with the last one the episode ended
                observed = made.observation or ""
                others = nearby(results[made.tool], place, made.tool) if made.observation is not None else ()
                reading = read(observed, others, tool=made.tool, arguments=made.arguments)
                failed = reading.verdict == "failure"
                effect = effect_of(made.tool, made.arguments)
                called = not made.call_id.startswith("text-")
                steps.append(RunStep(made.tool, made.arguments, observed, failed, effect, len(texts), index, called))
    return texts, steps


def mined(texts: Sequence[str], steps: Sequence[RunStep]) -> Procedure | None:
    """Return the procedure of a solved episode; None where it has no steps, or too many.

    `texts` are what the user wrote. Steps that failed or came again are dropped; kept is what changed state, the
    question that the user answered before it, what showed a value that is used later, and what was done between a call
    that failed and the same call that worked. An episode that changed nothing keeps what it looked up.
    """
    kept: list[_Kept] = []
    seen: set[tuple[str, str]] = set()
    failed: dict[tuple[str, str], int] = {}  # and how many steps were kept before
    lowered = [text.lower() for text in texts]
    is_data = _Names(lowered)
    for step in steps:
        if step.tool == SAY:
            kept.append(_Kept(step))
        elif not step.failed and (step.tool, step.arguments) not in seen:
            seen.add((step.tool, step.arguments))
            made = _Kept(step, _shown(step.observation, is_data))
            if (since := failed.get((step.tool, step.arguments))) is not None:  # what came in between made it work
                made.needs.update(i for i in range(since, len(kept)) if kept[i].step.tool != SAY)
            _bind(made, kept, lowered[: step.told], is_data)
            kept.append(made)
        elif step.failed:
            failed[step.tool, step.arguments] = len(kept)
    wanted = _wanted(kept)
    found = tuple(_step(kept[i], repeats=_repeats(kept, i)) for i in sorted(wanted))
    if not any(step.tool != SAY for step in found) or len(found) > STEPS_MOST:
        return None
    return Procedure(tuple(texts), found)


class _Names:
    """Tells which keys of objects are data, and no fields: names that the user wrote."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._known: dict[str, bool] = {}

    def __call__(self, key: str) -> bool:
        if not key[:1].isupper():
            return False
        if key not in self._known:
            self._known[key] = any(stands_in_lowered(key.lower(), text) for text in self._texts)
        return self._known[key]


def _shown(observation: str, is_data: _Names) -> dict[str, str]:
    shown: dict[str, str] = {}
    for where, leaf in leaves(parsed(observation), is_data):
        if where:
            shown.setdefault(text_of_leaf(leaf), where)
    return shown


def _bind(made: _Kept, before: Sequence[_Kept], texts: Sequence[str], is_data: _Names) -> None:
    arguments = parsed(made.step.arguments)
    for path, leaf in leaves(arguments if isinstance(arguments, dict) else {"": arguments}, is_data):
        made.slots.append(_slot(path, text_of_leaf(leaf), made, before, texts))


def _slot(path: str, value: str, made: _Kept, before: Sequence[_Kept], texts: Sequence[str]) -> Slot:
    lowered = value.lower()
    if len(value) <= 200 and _is_telling(value):  # noqa: PLR2004 - a longer text is no value
        for index in range(len(before) - 1, -1, -1):
            earlier = before[index]
            if earlier.step.tool != SAY and (where := earlier.shown.get(value)) is not None:
                made.needs.add(index)
                return Slot(path, "step", f"{earlier.step.tool}:{where}")
        if any(stands_in_lowered(lowered, text) for text in texts):
            return Slot(path, "user", shape_of(value))
    # Whether it is one of the kind of task or of this case is known once others did the same.
    return Slot(path, "constant", value) if len(value) <= 40 else Slot(path, "free")  # noqa: PLR2004


def _is_telling(value: str) -> bool:
    """Whether a value tells where it came from: "no", 1 and true stand everywhere."""
    if len(value) <= 3:  # noqa: PLR2004
        return len(value) > 1 and is_specific(shape_of(value))
    return value not in ("true", "false", "null", "none")


def _wanted(kept: Sequence[_Kept]) -> set[int]:
    """Return which steps matter: those that changed state, and what they rest on.

    Of an episode that changed nothing, what the result that was handed in rests on, else the last look.
    """
    goals = [i for i, k in enumerate(kept) if k.step.effect == "writes"]
    submits = [i for i, k in enumerate(kept) if k.step.effect == "submits"]
    looks = [i for i, k in enumerate(kept) if k.step.tool != SAY and i not in submits]
    submits = submits[-1:]  # an earlier result was not the right one
    if not goals and not any(kept[i].needs for i in submits):
        goals = looks[-1:]
    goals = [*goals, *submits]
    wanted: set[int] = set()
    stack = list(goals)
    while stack:
        index = stack.pop()
        if index not in wanted:
            wanted.add(index)
            stack.extend(kept[index].needs)
    for index in goals:  # what the user agreed to before it, and after what was changed last
        since = max((g for g in goals if g < index), default=-1)
        asked = [i for i in range(since + 1, index) if kept[i].step.tool == SAY]
        wanted.update(asked[-1:])
    return wanted


def _repeats(kept: Sequence[_Kept], index: int) -> bool:
    """Whether a step was also made for other values of the same list, or only looked at one of several.

    Which of them is the right one is known when it has been looked at.
    """
    origins = origins_of(kept[index].slots)
    listed = [origin for _, kind, origin in origins if kind == "step" and ("[]" in origin or "{}" in origin)]
    if not listed:
        return False
    same = [k for k in kept if k.step.tool == kept[index].step.tool and origins_of(k.slots) == origins]
    if len({k.step.arguments for k in same}) > 1:
        return True
    return kept[index].step.effect == "reads" and any(_choices(kept[:index], origin) > 1 for origin in listed)


def _choices(before: Sequence[_Kept], origin: str) -> int:
    """Return how many values stood where one was taken from."""
    tool, _, path = origin.partition(":")
    latest = next((k.step for k in reversed(before) if k.step.tool == tool), None)
    return len(values_at(latest.observation, path)) if latest else 0


def _step(kept: _Kept, *, repeats: bool) -> ProcedureStep:
    step = kept.step
    looks = step.effect in ("reads", "submits") and len(step.arguments) <= _VERBATIM
    return ProcedureStep(
        step.tool,
        tuple(dict.fromkeys(kept.slots)),
        step.effect == "writes",
        arguments=step.arguments if looks else "",
        observed=digest_of(step.observation) if looks and step.observation else "",
        shape=shape_of_observation(step.observation) if step.tool != SAY and step.observation else "",
        called=step.called,
        repeats=repeats,
    )


def folded(steps: Iterable[ProcedureStep]) -> tuple[ProcedureStep, ...]:
    """Return steps with those that come again for other values of the same origin as one that repeats."""
    found: list[ProcedureStep] = []
    for step in steps:
        values = any(slot.kind in ("step", "user") for slot in step.slots)
        if found and step.tool != SAY and values and found[-1].key == step.key:
            found[-1] = replace(found[-1], arguments="", observed="", repeats=True)
        elif not (found and found[-1].tool == step.tool == SAY):
            found.append(step)
    return tuple(found)
