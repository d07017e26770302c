"""The baseline of procedures: the agent's most frequent steps, offered to all."""

from __future__ import annotations

from collections.abc import Sequence

from optillm_memory.bench.trajectories.following import Follows, by_tool, given_in, said_before, values_at
from optillm_memory.bench.trajectories.runs import SAY, Act, Run
from optillm_memory.bench.trajectories.values import FAMILIES
from optillm_memory.learn.procedures.mine import ProcedureStep
from optillm_memory.learn.procedures.values import Slot, is_specific, shape_of, stands_in

_TELLING = 4  # characters from which a value is looked for in what was said: `no` stands everywhere


class Frequent:
    """The steps of all runs so far, by how many runs made each; with arguments or by tool alone.

    A step with arguments says where each comes from, as those of procedures do: from the latest observation that held
    it, from the user's words (of any shape), the same value in three families or more, or free.
    """

    def __init__(self, *, arguments: bool) -> None:
        """Start with no run."""
        self._arguments = arguments
        self._runs: dict[ProcedureStep, int] = {}
        self._places: dict[ProcedureStep, float] = {}  # sums of where in the run, from 0 to 1
        self._families: dict[tuple[str, str, str], set[str]] = {}

    def add(self, run: Run) -> None:
        """Count a run."""
        first: dict[ProcedureStep, int] = {}
        if self._arguments:
            for act in run.acts:
                for path, values in given_in(act.arguments).items():
                    for value in values:
                        self._families.setdefault((act.tool, path, value), set()).add(run.family)
        for place, act in enumerate(run.acts):
            if not act.failed:
                first.setdefault(self._step(act, run), place)
        for step, place in first.items():
            self._runs[step] = self._runs.get(step, 0) + 1
            self._places[step] = self._places.get(step, 0.0) + place / len(run.acts)

    def steps(self, count: int, done: Sequence[Act], follows: Follows = by_tool) -> list[ProcedureStep]:
        """Return the most frequent steps in their usual order, without those that a run has made already."""
        left = [s for s in self._runs if s.tool == SAY or not any(follows(s, act) for act in done)]
        chosen = sorted(left, key=lambda s: -self._runs[s])[:count]
        return sorted(chosen, key=lambda s: self._places[s] / self._runs[s])

    def _step(self, act: Act, run: Run) -> ProcedureStep:
        if not self._arguments or act.tool == SAY:
            return ProcedureStep(act.tool)
        slots = []
        for path, values in sorted(given_in(act.arguments).items()):
            origins = {self._slot(path, value, act, run) for value in values}
            slots.append(origins.pop() if len(origins) == 1 else Slot(path, "free"))
        return ProcedureStep(act.tool, tuple(slots))

    def _slot(self, path: str, value: str, act: Act, run: Run) -> Slot:
        if is_specific(shape_of(value)) or len(value) >= _TELLING:
            for earlier in reversed([a for a in run.acts if a.index < act.index and a.tool != SAY]):
                for where, held in values_at(earlier.observation).items():
                    if where and value in held:
                        return Slot(path, "step", f"{earlier.tool}:{where}")
            if any(stands_in(value, text) for text in said_before(run, act.index)):
                return Slot(path, "user")
        many = len(self._families.get((act.tool, path, value), ())) >= FAMILIES
        return Slot(path, "constant", value) if many else Slot(path, "free")
