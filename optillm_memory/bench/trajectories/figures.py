"""The figures of `bench trajectories`, from what a replay saw; shares with their counts and 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optillm_memory.bench.report import quantile
from optillm_memory.bench.shares import share
from optillm_memory.bench.trajectories.injections import fixes, foreign, injected
from optillm_memory.bench.trajectories.procedures import eligible, procedures
from optillm_memory.bench.trajectories.replay import Episode, Replayed
from optillm_memory.bench.trajectories.runs import Run
from optillm_memory.bench.trajectories.served import is_right

_LAST = 500  # eligible episodes that coverage is given for besides all


def figures(replayed: Replayed, runs: Sequence[Run]) -> dict[str, Any]:
    """Return all figures of a replay of these runs."""
    return {
        "episodes": len(replayed.episodes),
        **injected(replayed, runs),
        **fixes(replayed.insertions),
        **procedures(replayed.episodes, runs),
        **foreign(replayed.insertions, runs),
        **actions(replayed.episodes, runs),
        "answers_served": replayed.answers_served,
        "begin_p50_ms": _quantile(replayed.begin_ms, 0.5),
        "begin_p99_ms": _quantile(replayed.begin_ms, 0.99),
        "learn_p99_ms": _quantile(replayed.learn_ms, 0.99),
        "db_bytes": replayed.db_bytes,
        "wal_peak_bytes": replayed.wal_peak_bytes,
        "skipped": dict(replayed.skipped.most_common()),
    }


def actions(episodes: Sequence[Episode], runs: Sequence[Run]) -> dict[str, Any]:
    """Return how many episodes had an action served, how many first serves were right, and how many came too early.

    Too early is what was served to a family that was never solved before.
    """
    known = eligible(episodes)
    numbers = {e.run.number for e in known}
    unsolved = [e for e in episodes if e.run.number not in numbers]
    judged = [is_right(e.served, e.run, runs) for e in episodes if e.served is not None and e.run.resolved]
    return {
        **share("action_coverage", sum(e.served is not None for e in known), len(known)),
        **share(
            f"action_coverage_last_{_LAST}", sum(e.served is not None for e in known[-_LAST:]), len(known[-_LAST:])
        ),
        **share("action_precision", sum(judged), len(judged)),
        **share("action_served_unsolved", sum(e.served is not None for e in unsolved), len(unsolved)),
    }


def _quantile(values: Sequence[float], at: float) -> float | None:
    return round(quantile(values, at), 2) if values else None
