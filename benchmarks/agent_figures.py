"""The figures of the scripted agent: the cost of each pass, the reduction between them, and the holdout's uplift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_RESAMPLES = 10_000


@dataclass
class Episode:
    """The course of one task.

    `failed` names the kind of each failed action: a candidate by task, goal and position, independent of the names in
    it, or else the advice. `held_out` is the assignment that memory recorded; `actions` are those of its responses.
    """

    task: str
    renamed: bool = False
    steps: int = 0
    failed: list[str] = field(default_factory=list)
    advised_failed: int = 0
    llm_calls: int = 0
    extra_llm_calls: int = 0
    solved: bool = False
    held_out: bool = False
    advice: set[str] = field(default_factory=set)
    actions: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass
class Pass:
    """All episodes of a run through the tasks, with the LLM calls as the upstream counted them."""

    episodes: list[Episode]
    llm_calls: int
    seconds: float


def figures(first: Pass, second: Pass, third: Pass, *, share: float) -> dict[str, Any]:
    """Return the figures of pass 1, of pass 2, and of pass 2 with a holdout.

    A failing action is repeated if its kind failed in pass 1, or before in the same episode. A fall is the share of
    pass 1's failing actions, or steps, that pass 2 avoids; the cost of bad advice in pass 1 is not counted.
    """
    known = frozenset(kind for episode in first.episodes for kind in episode.failed)
    one, two = summary(first, frozenset()), summary(second, known)
    for renamed, name in ((False, "same_names"), (True, "other_names")):
        two[name] = _against(first.episodes, [e for e in second.episodes if e.renamed == renamed], known)
    with_memory = [e for e in third.episodes if not e.held_out]
    held_out = [e for e in third.episodes if e.held_out]
    differences = {name: uplift(with_memory, held_out, of) for name, of in _measures(known).items()}
    return {
        "pass_1": one,
        "pass_2": two,
        "fall_in_repeated_failing_actions": _fall(_own_failures(first.episodes), two["repeated_failing_actions"]),
        "fall_in_steps": _fall(_own_steps(first.episodes), two["steps"]),
        "tasks_lost": _lost(first.episodes, second.episodes),
        "holdout": {
            "share": share,
            "with_memory": _against(first.episodes, with_memory, known),
            "held_out": {
                **_against(first.episodes, held_out, known),
                "seen_in_responses": sum(e.actions["holdout"] > 0 for e in held_out),
            },
            "uplift": {name: found[0] if found else None for name, found in differences.items()},
            "interval_95": {name: found[1] if found else None for name, found in differences.items()},
            "seconds": round(third.seconds, 1),
        },
    }


def summary(run: Pass, known: frozenset[str]) -> dict[str, Any]:
    """Return the totals of a pass; `known` are the kinds that failed before it."""
    episodes = run.episodes
    skipped: Counter[str] = sum((e.skipped for e in episodes), Counter())
    return {
        "tasks": len(episodes),
        "solved": sum(e.solved for e in episodes),
        "steps": sum(e.steps for e in episodes),
        "failed_actions": sum(len(e.failed) for e in episodes),
        "repeated_failing_actions": sum(repeated(e, known) for e in episodes),
        "failed_advised_actions": sum(e.advised_failed for e in episodes),
        "advice": sum(len(e.advice) for e in episodes),
        "llm_calls": run.llm_calls,
        "extra_llm_calls": sum(e.extra_llm_calls for e in episodes),
        "seconds": round(run.seconds, 1),
        "skipped": dict(sorted(skipped.items())),
    }


def repeated(episode: Episode, known: frozenset[str]) -> int:
    """Return how many failed actions of an episode are of a known kind, or fail there a second time."""
    return len(episode.failed) - len(set(episode.failed) - known)


def uplift(
    with_memory: Sequence[Episode], without: Sequence[Episode], of: Callable[[Episode], float]
) -> tuple[float, list[float]] | None:
    """Return the mean with memory minus the mean without, and its 95 % interval; None where one side is empty.

    The interval is the percentile bootstrap's over episodes, each side resampled separately, with a fixed seed: equal
    episodes have an equal interval.
    """
    if not with_memory or not without:
        return None
    chance = np.random.default_rng(0)
    means = []
    for side in (with_memory, without):
        values = np.array([of(e) for e in side], dtype=float)
        drawn = chance.integers(len(values), size=(_RESAMPLES, len(values)))
        means.append((values.mean(), values[drawn].mean(axis=1)))
    low, high = np.quantile(means[0][1] - means[1][1], [0.025, 0.975])
    return round(float(means[0][0] - means[1][0]), 3), [round(float(low), 3), round(float(high), 3)]


def _measures(known: frozenset[str]) -> dict[str, Callable[[Episode], float]]:
    return {
        "repeated_failing_actions": lambda e: repeated(e, known),
        "steps": lambda e: e.steps,
        "solved": lambda e: e.solved,
    }


def _against(first: Sequence[Episode], later: Sequence[Episode], known: frozenset[str]) -> dict[str, Any]:
    """Return the totals of some later episodes, compared with the same tasks in pass 1."""
    before = {e.task: e for e in first}
    same = [before[e.task] for e in later]
    again, steps = sum(repeated(e, known) for e in later), sum(e.steps for e in later)
    return {
        "tasks": len(later),
        "solved": sum(e.solved for e in later),
        "steps": steps,
        "repeated_failing_actions": again,
        "fall_in_repeated_failing_actions": _fall(_own_failures(same), again),
        "fall_in_steps": _fall(_own_steps(same), steps),
    }


def _own_failures(episodes: Sequence[Episode]) -> int:
    return sum(len(e.failed) - e.advised_failed for e in episodes)


def _own_steps(episodes: Sequence[Episode]) -> int:
    return sum(e.steps - e.advised_failed for e in episodes)


def _fall(before: float, after: float) -> float | None:
    return round(1 - after / before, 3) if before else None


def _lost(first: Sequence[Episode], second: Sequence[Episode]) -> list[str]:
    after = {e.task: e.solved for e in second}
    return sorted(e.task for e in first if e.solved and not after.get(e.task, False))
