"""`bench ladder`: the gate compared with no memory, memory without reuse, and reuse by similarity alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optillm_memory.bench.in_process import Variant, cached_encoder, empty_memory, run
from optillm_memory.bench.stream import oracle, probability
from optillm_memory.bench.tasks import Task, shuffled

_AVERAGED = ("accuracy", "accuracy_last_1000", "llm_calls", "served", "served_last_1000", "error_per_hit", "seconds")


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
    """Return the gate's figures, as means over the seeds, and those of the other variants under their names.

    Each seed has its own order of the tasks, its own upstream `random:P`, and an empty memory. `within_limit` is the
    number of seeds in which the error among the served answers was at most `max_error`.
    """
    share = probability(upstream)
    variants = [
        Variant("gate", {"reuse": {"max_error": max_error}}),
        Variant("none", {"mode": "off"}),
        Variant("inject", {}),
        Variant("top1", {}, top1=similarity),
    ]
    say("encoding the tasks")
    encoder = cached_encoder([task.input for task in tasks])
    found: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for seed in seeds:
        order = shuffled(tasks, seed)
        for variant in variants if seed == seeds[0] else variants[:1]:  # the others hardly differ from seed to seed
            with empty_memory(encoder) as memory:
                result = run(memory, order, oracle(share, tasks, seed), variant, tick=tick)
            found[variant.name].append(result.figures())
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
    """Return how often the whole list of tasks is asked."""
    return seeds + 3


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in _AVERAGED}
