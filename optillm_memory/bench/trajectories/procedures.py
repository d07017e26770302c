"""Procedures: whether the right one is known in time, and whether the runs that were resolved agree with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.bench.shares import mean, share
from optillm_memory.bench.trajectories.baseline import Frequent
from optillm_memory.bench.trajectories.following import by_arguments, by_tool, common, covered, misleading
from optillm_memory.bench.trajectories.replay import Episode
from optillm_memory.bench.trajectories.runs import Run
from optillm_memory.learn.procedures.offer import Offer

_COMPARED = ("procedure", "baseline")


def eligible(episodes: Sequence[Episode]) -> list[Episode]:
    """Return the episodes a family of which was solved before."""
    solved: set[str] = set()
    found = []
    for episode in episodes:
        if episode.run.family in solved:
            found.append(episode)
        if episode.run.resolved:
            solved.add(episode.run.family)
    return found


def procedures(episodes: Sequence[Episode], runs: Sequence[Run]) -> dict[str, Any]:
    """Return how well procedures are known, and how well the runs that were resolved agree with them."""
    known = eligible(episodes)
    families = {str(run.number): run.family for run in runs}
    timely = [[supporting(offer, e.run, families) for at, offer in e.offers if at <= e.run.last_call] for e in known]
    resolved = [e for e in known if e.run.resolved]
    offered = [(e.run, *e.offers[0]) for e in resolved if e.offers]
    missed = [misleading(offer.remaining, run.acts) for run, _, offer in offered]
    found = [covered(offer.remaining, run.acts, at) for run, at, offer in offered]
    return {
        "eligible": len(known),
        "eligible_resolved": len(resolved),
        **share("procedure_known", sum(any(shares) for shares in timely), len(known)),
        **mean("procedure_support", [share for shares in timely for share in shares]),
        **agreement(offered, runs),
        **share("misleading_steps", sum(n for n, _ in missed), sum(n for _, n in missed)),
        **share("state_changing_recall", sum(n for n, _ in found), sum(n for _, n in found)),
    }


def supporting(offer: Offer, run: Run, families: Mapping[str, str]) -> float:
    """Return the share of an offer's supporting episodes that are of a run's family."""
    own = sum(families.get(episode) == run.family for episode in offer.support)
    return own / len(offer.support) if offer.support else 0.0


def agreement(offered: Sequence[tuple[Run, int, Offer]], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the shares of offered steps that the run made later, in order, beside those of the baseline."""
    values: dict[str, list[float]] = {f"{what}_{by}": [] for by in ("tools", "actions") for what in _COMPARED}
    frequent = {"tools": Frequent(arguments=False), "actions": Frequent(arguments=True)}
    place = {run.number: (at, offer) for run, at, offer in offered}
    for run in runs:
        if run.number in place:
            at, offer = place[run.number]
            later, done = run.from_index(at), [act for act in run.acts if act.index < at and not act.failed]
            for by, follows in (("tools", by_tool), ("actions", by_arguments(run))):
                steps = offer.remaining
                base = frequent[by].steps(len(steps), done, follows)
                values[f"procedure_{by}"].append(common(steps, later, follows) / len(steps))
                values[f"baseline_{by}"].append(common(base, later, follows) / len(base) if base else 0.0)
        for counted in frequent.values():
            counted.add(run)
    return {key: value for name, found in values.items() for key, value in mean(name, found).items()}
