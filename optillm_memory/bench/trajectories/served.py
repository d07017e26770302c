"""Actions that memory served: whether one was right, as far as the recorded run tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.bench.trajectories.actions import canonical_action, submits
from optillm_memory.bench.trajectories.runs import SAY, Act, Run, calls_in
from optillm_memory.bench.trajectories.values import folded


@dataclass(frozen=True, slots=True)
class Served:
    """What memory answered a request with: its canonical actions, and the index of the message they stand for."""

    index: int
    actions: tuple[str, ...]

    @classmethod
    def of(cls, index: int, completion: Mapping[str, Any]) -> Served | None:
        """Return what a completion serves; None where it holds no action."""
        actions = actions_of(completion["choices"][0]["message"])
        return cls(index, actions) if actions else None


def actions_of(message: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the canonical actions of an assistant's message."""
    return tuple(canonical_action(tool, arguments) for _, tool, arguments in calls_in(message))


def is_right(served: Served, run: Run, earlier: Sequence[Run]) -> bool:
    """Whether a served action was right, in a run that was resolved.

    It is if the run made it later, or now, with success; or if its verified observation, that of the latest resolved
    run before which made it (of the same family, if there is one), equals what the run's last successful step observed.
    Of several actions at once each must be right.
    """
    later = {act.key for act in run.from_index(served.index) if not act.failed}
    last = next((act for act in reversed(run.acts) if _solves(act)), None)
    goal = folded(last.observation) if last else ""
    return all(key in later or (goal and verified_observation(key, run, earlier) == goal) for key in served.actions)


def verified_observation(key: str, run: Run, earlier: Sequence[Run]) -> str | None:
    """Return what was observed after an action in the latest resolved run before this one; its own family's first."""
    before = [r for r in reversed(earlier) if r.resolved and r.number < run.number]
    for candidates in ([r for r in before if r.family == run.family], before):
        for other in candidates:
            for act in reversed(other.acts):
                if act.key == key and not act.failed:
                    return folded(act.observation)
    return None


def _solves(act: Act) -> bool:
    return act.tool != SAY and not act.failed and not submits(act.tool)
