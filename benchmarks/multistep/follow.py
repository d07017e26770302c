"""Following a procedure: which of its steps are made, which is next, and with what arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.agent_policy import Call
from benchmarks.multistep.block import Line, Origin
from benchmarks.multistep.view import SAY, Made, View, values_at


@dataclass(frozen=True, slots=True)
class Understanding:
    """What the agent understands without a procedure.

    `value` is what it would give a tool's argument now, None where it does not know; `satisfied` whether it has found
    what it looks for with a tool; `question` how it asks the user.
    """

    value: Callable[[str, str], str | None]
    satisfied: Callable[[str], bool]
    writes: Callable[[str], bool]
    question: str


def next_step(lines: Sequence[Line], view: View, own: Understanding) -> tuple[Line, Call] | None:
    """Return the line of a procedure that is next, with its call.

    None where all lines are done, and where the procedure does not fit: its next call has failed, or a value that it
    names is nowhere. Then it is not followed any further.
    """
    progress = _Progress(lines, view, own)
    for line in lines:
        made = progress.made(line)
        if line.each:
            calls = progress.calls(line)
            left = [call for call in calls if not view.tried(call.tool, call.arguments)]
            if made and (own.satisfied(line.tool) or not left):
                continue
            return (line, left[0]) if left else None
        if made:
            continue
        if line.tool == SAY:
            return line, Call(SAY, {"text": own.question})
        calls = progress.calls(line)
        if not calls or view.tried(calls[0].tool, calls[0].arguments):
            return None
        return line, calls[0]
    return None


class _Progress:
    """The steps of a conversation that were made for each line of a procedure."""

    def __init__(self, lines: Sequence[Line], view: View, own: Understanding) -> None:
        self._lines, self._view, self._own = lines, view, own
        self._made: dict[int, list[Made]] = {}
        unused = [m for m in view.made if not m.failed]
        for line in lines:
            # Each line has the earliest step that fits it; one that is made for each of a list has all of them.
            fitting = [m for m in unused if m.tool == line.tool and self._fits(line, m)]
            self._made[line.number] = mine = fitting if line.each else fitting[:1]
            unused = [m for m in unused if all(m is not used for used in mine)]

    def made(self, line: Line) -> list[Made]:
        """Return the steps made for a line, oldest first."""
        return self._made[line.number]

    def calls(self, line: Line) -> list[Call]:
        """Return the calls that a line may mean, the likeliest first; empty where a value is nowhere."""
        values = {name: self._values(line, name, origin) for name, origin in line.arguments.items()}
        if not all(values.values()):
            return []
        several = max((len(found) for found in values.values()), default=1) if line.each else 1
        return [
            Call(line.tool, {name: found[min(i, len(found) - 1)] for name, found in values.items()})
            for i in range(several)
        ]

    def _values(self, line: Line, name: str, origin: Origin) -> list[str]:
        own = self._own.value(line.tool, name)
        if origin.kind == "constant":
            return [origin.text]
        if origin.kind == "user":
            return [own] if own is not None and self._stated(own) else [v for v in [self._view.slots.get(name)] if v]
        if origin.kind == "step":
            found = self._shown(origin)
            return [own] if own in found and own is not None and not line.each else found
        # Left to the agent: what it changes it thinks about; where it only looks it takes what has the right name.
        likely = own if self._own.writes(line.tool) else self._view.latest(name) or own
        return [likely] if likely is not None else []

    def _stated(self, value: str) -> bool:
        replies = [str(m.shown) for m in self._view.made if m.tool == SAY]
        return any(value in text for text in (*self._view.slots.values(), *replies))

    def _shown(self, origin: Origin) -> list[str]:
        """Return the values at a path: in the step that is named, or where that step is left out, in the latest."""
        made = self._made.get(origin.step)
        steps = [m for m in self._view.made if not m.failed and m.tool] if made is None else made
        for anywhere in (False, True):
            if found := [v for m in steps for v in values_at(m.shown, origin.text, anywhere=anywhere)]:
                return list(dict.fromkeys(found))
        return []

    def _fits(self, line: Line, made: Made) -> bool:
        """Whether a step is that of a line: by what the line says of its arguments, and by what the agent means."""
        for name, origin in line.arguments.items():
            given = made.arguments.get(name)
            if origin.kind == "constant" and given != origin.text:
                return False
            if origin.kind == "step" and (found := self._shown(origin)) and given not in found:
                return False
            own = None if line.each else self._own.value(line.tool, name)
            if origin.kind in ("user", "free") and own is not None and given != own:
                return False
        return True
