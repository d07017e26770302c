"""`bench ladder`: the gate beside no memory, memory without reuse, and reuse by similarity alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optillm_memory.bench.local import Way, empty_memory, remembering, run
from optillm_memory.bench.stream import oracle, probability
from optillm_memory.bench.tasks import Task, shuffled

_MEANT = ("accuracy", "accuracy_last_1000", "llm_calls", "served", "served_last_1000", "error_per_hit", "seconds")


def compare(
    tasks: Sequence[Task],
    *,
    upstream: str,
    max_error: float,
    similarity: float,
    seeds: Sequence[int],
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the gate's figures, as means over the seeds, and beside them those of the other ways by name.

    Each seed has its own order of the tasks, its own upstream `random:P`, and an empty memory. `within_limit` is the
    number of seeds in which the error among the answers that were served was at most `max_error`.
    """
    share = probability(upstream)
    ways = [
        Way("gate", {"reuse": {"max_error": max_error}}),
        Way("none", {"mode": "off"}),
        Way("inject", {}),
        Way("top1", {}, top1=similarity),
    ]
    say("encoding the tasks")
    encoder = remembering([task.input for task in tasks])
    found: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    for seed in seeds:
        order = shuffled(tasks, seed)
        for way in ways if seed == seeds[0] else ways[:1]:  # the others hardly differ from seed to seed
            with empty_memory(encoder) as memory:
                result = run(memory, order, oracle(share, tasks, seed), way, tick=tick)
            found[way.name].append(result.figures())
    figures = {name: _mean(rows) for name, rows in found.items()}
    gate, gate_calls = found["gate"], figures["gate"]["llm_calls"]
    return {
        **figures.pop("gate"),
        "requests": len(tasks),
        "llm_calls_saved": round(figures["none"]["llm_calls"] - gate_calls, 1),
        "seeds": len(gate),
        "within_limit": sum(g["error_per_hit"] <= max_error for g in gate),
        "error_per_hit_worst": max(g["error_per_hit"] for g in gate),
        **figures,
    }


def rounds(seeds: int) -> int:
    """Return how often the tasks are gone through."""
    return seeds + 3


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in _MEANT}
