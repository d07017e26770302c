"""Uplift: the effect of memory on the outcome of episodes, by the randomised holdout; and which memories it retires.

The unit is the episode: it is held out as a whole, and has one outcome, the latest verified one. An episode is
*eligible* if memories were injected or reused in it, or would have been. Only the memories of the first such trace
count. Until then both sides were treated equally, so the comparison is unbiased; later memories depend on the effect of
earlier ones (a fix is recalled where the first exemplar did not help), and would be blamed for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from optillm_memory.learn.confidence import Counts, Interval, difference
from optillm_memory.records import SCOPE_PARTS, Scope

Standing = Literal["keep", "retire"]

ALPHA = 0.05
# For one memory; half of it for each end. A harmless memory is retired with probability 1 % at most over all time, so
# of many at most 1 in 100 is expected to be. It is per memory on purpose: a bound over all memories would hardly ever
# be reached, and would depend on their number.
MEMORY_ALPHA = 0.02
_SHARE_DIGITS = 9  # 1 - 0.95 is not quite 0.05


@dataclass(frozen=True, slots=True)
class Episode:
    """One unit of the comparison.

    `share` is its probability of being held out, 0 where it was not randomised; `success` its latest verified outcome,
    None without one; `memories` the (memory id, kind) of its first trace with memories, and `arm` the arm of that trace
    (of an episode that is not eligible: of its first trace). Equal tasks have equal keys; no task has an empty one.
    """

    scope: Scope
    episode_id: str
    created_at: float
    task_key: str
    arm: str
    held_out: bool
    share: float
    success: bool | None
    memories: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks whose exact text occurred with and without memory, by the latest episode of each side.

    The two outcomes of a single task differ by chance too: the effect of memory is the uplift.
    """

    compared: int
    fixed: int
    broken: int


@dataclass(frozen=True, slots=True)
class Uplift:
    """Outcome with memory minus outcome without, over some episodes, with its confidence sequence.

    `estimate` weights each outcome by its inverse propensity; None while a side has none. `unreported` counts the
    randomised episodes with and without memory that have no verified outcome: if their shares differ much, reporting
    depends on the treatment, and the figures are biased.
    """

    counts: tuple[Counts, ...]
    unreported: tuple[int, int]
    estimate: float | None
    interval: Interval
    alpha: float
    tasks: Tasks

    @property
    def standing(self) -> Standing:
        """Whether to keep a memory with this uplift: it is retired once the interval's upper end is below zero."""
        return "retire" if self.interval.high < 0 else "keep"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object: the counts of both sides, the uplift, and its effect in episodes and tasks.

        `episodes_gained` is the uplift times the episodes with memory: successes gained minus successes lost.
        """
        with_good = sum(c.with_successes for c in self.counts)
        with_all = with_good + sum(c.with_failures for c in self.counts)
        without_good = sum(c.without_successes for c in self.counts)
        without_all = without_good + sum(c.without_failures for c in self.counts)
        gained = (self.estimate, self.interval.low, self.interval.high)
        return {
            "uplift": _rounded(self.estimate),
            "low": _rounded(self.interval.low),
            "high": _rounded(self.interval.high),
            "confidence": 1 - self.alpha,
            "with_memory": {"episodes": with_all, "successes": with_good, "unreported": self.unreported[0]},
            "without_memory": {"episodes": without_all, "successes": without_good, "unreported": self.unreported[1]},
            "episodes_gained": {
                name: None if value is None else round(value * with_all, 1)
                for name, value in zip(("estimate", "low", "high"), gained, strict=True)
            },
            "tasks": asdict(self.tasks),
        }


def uplift(episodes: Iterable[Episode], alpha: float = ALPHA) -> Uplift:
    """Return the uplift over episodes; those that were not randomised are ignored."""
    randomised = [e for e in episodes if 0 < e.share < 1]
    reported = [e for e in randomised if e.success is not None]
    counts = tabulated((e.share, e.held_out, bool(e.success), 1) for e in reported)
    estimate, interval = _measured(counts, alpha)
    silent = [e.held_out for e in randomised if e.success is None]
    return Uplift(counts, (silent.count(False), silent.count(True)), estimate, interval, alpha, flipped_tasks(reported))


def tabulated(rows: Iterable[tuple[float, bool, bool, int]]) -> tuple[Counts, ...]:
    """Return the tables of (share, held out, success, how many), one for each share."""
    cells: defaultdict[float, dict[tuple[bool, bool], int]] = defaultdict(lambda: defaultdict(int))
    for share, held_out, success, number in rows:
        cells[round(share, _SHARE_DIGITS)][bool(held_out), bool(success)] += number
    return tuple(
        Counts(share, found[False, True], found[False, False], found[True, True], found[True, False])
        for share, found in sorted(cells.items())
    )


def standing(counts: Sequence[Counts]) -> Standing:
    """Whether to keep a memory with these counts; the same as `Uplift.standing`."""
    return "retire" if _measured(counts, MEMORY_ALPHA)[1].high < 0 else "keep"


def flipped_tasks(episodes: Iterable[Episode]) -> Tasks:
    """Count the tasks with episodes on both sides, and those whose latest outcomes differ."""
    latest: defaultdict[tuple[Scope, str], dict[bool, bool]] = defaultdict(dict)
    for episode in sorted(episodes, key=lambda e: (e.created_at, e.episode_id)):
        if episode.success is not None and episode.task_key:
            latest[episode.scope, episode.task_key][episode.held_out] = episode.success
    pairs = [(sides[False], sides[True]) for sides in latest.values() if len(sides) == 2]  # noqa: PLR2004
    return Tasks(len(pairs), pairs.count((True, False)), pairs.count((False, True)))


def report(episodes: Sequence[Episode], *, limit: int) -> dict[str, Any]:
    """Return the uplift over all episodes, and for each scope: over all, by kind, by arm and by memory.

    The kinds and memories of an episode share its outcome, so their effects are not separated. Of the memories at most
    `limit` are listed, those with the most episodes on both sides first.
    """
    scopes = _grouped(episodes, lambda e: [e.scope])
    return {
        "object": "uplift",
        **_both(episodes),
        "scopes": [{**asdict(scope), **_of_scope(found, limit)} for scope, found in scopes.items()],
    }


def summary(found: Mapping[str, Any]) -> dict[str, str]:
    """Return a report as lines of text by name."""
    lines = {"all episodes": _line(found["all"]), "eligible episodes": _line(found["eligible"])}
    for scope in found["scopes"]:
        name = "/".join(scope[key] for key in SCOPE_PARTS if scope[key])
        lines[name] = _line(scope["eligible"])
        lines |= {f"{name} kind {key}": _line(value) for key, value in scope["kinds"].items()}
        lines |= {f"{name} arm {key}": _line(value) for key, value in scope["arms"].items()}
        lines |= {f"{name} {m['memory_id']}": f"{_line(m)}  {m['verdict']}" for m in scope["memories"]}
    return lines


def _of_scope(episodes: Sequence[Episode], limit: int) -> dict[str, Any]:
    eligible = [e for e in episodes if e.memories]
    kinds = _grouped(eligible, lambda e: sorted({kind for _, kind in e.memories}))
    arms = _grouped(eligible, lambda e: [e.arm])
    memories = _grouped(eligible, lambda e: sorted(set(e.memories)))
    ranked = sorted(memories.items(), key=lambda item: (*_evidence_order(item[1]), item[0]))
    return {
        **_both(episodes),
        "kinds": {kind: uplift(found).as_dict() for kind, found in sorted(kinds.items())},
        "arms": {arm: uplift(found).as_dict() for arm, found in sorted(arms.items())},
        "memories": [_of_memory(memory, found) for memory, found in ranked[:limit]],
    }


def _both(episodes: Sequence[Episode]) -> dict[str, Any]:
    eligible = [e for e in episodes if e.memories]
    return {"all": uplift(episodes).as_dict(), "eligible": uplift(eligible).as_dict()}


def _of_memory(memory: tuple[str, str], episodes: Sequence[Episode]) -> dict[str, Any]:
    found = uplift(episodes, MEMORY_ALPHA)
    return {"memory_id": memory[0], "kind": memory[1], "verdict": found.standing, **found.as_dict()}


def _evidence_order(episodes: Sequence[Episode]) -> tuple[int, int]:
    sides = [e.held_out for e in episodes if e.success is not None and 0 < e.share < 1]
    return -min(sides.count(True), sides.count(False)), -len(sides)


def _grouped(episodes: Iterable[Episode], keys: Callable[[Episode], Iterable[Any]]) -> dict[Any, list[Episode]]:
    groups: dict[Any, list[Episode]] = {}
    for episode in episodes:
        for key in keys(episode):
            groups.setdefault(key, []).append(episode)
    return groups


def _measured(counts: Sequence[Counts], alpha: float) -> tuple[float | None, Interval]:
    estimate, interval = _weighted_difference(counts), difference(counts, alpha)
    if estimate is None:
        return None, interval
    # With very few episodes the estimate may lie outside: a wider interval is valid too.
    return estimate, Interval(min(interval.low, estimate), max(interval.high, estimate))


def _weighted_difference(counts: Sequence[Counts]) -> float | None:
    known = [c for c in counts if 0 < c.share < 1]
    with_all = sum((c.with_successes + c.with_failures) / (1 - c.share) for c in known)
    without_all = sum((c.without_successes + c.without_failures) / c.share for c in known)
    if not with_all or not without_all:
        return None
    with_good = sum(c.with_successes / (1 - c.share) for c in known)
    without_good = sum(c.without_successes / c.share for c in known)
    return with_good / with_all - without_good / without_all


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _line(figure: Mapping[str, Any]) -> str:
    sides = "  ".join(
        f"{name} {figure[key]['successes']}/{figure[key]['episodes']}"
        for name, key in (("with", "with_memory"), ("without", "without_memory"))
    )
    tasks = figure["tasks"]
    estimate = "unknown" if figure["uplift"] is None else f"{figure['uplift']:+.3f}"
    return (
        f"{estimate} [{figure['low']:+.3f}, {figure['high']:+.3f}]  {sides}  "
        f"tasks fixed {tasks['fixed']}, broken {tasks['broken']} of {tasks['compared']}"
    )
