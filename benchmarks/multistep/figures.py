"""The figures of the multi-step passes: steps, calls of the LLM, tasks lost, served actions, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.multistep.episode import Course

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Outing:
    """One episode of a pass, with what it is compared to.

    `plain` is the same task by the same agent without memory, `best` the same without detours; `before` is the task in
    pass 1, None where its names are new.
    """

    course: Course
    plain: Course
    best: Course
    before: Course | None = None

    @property
    def lost(self) -> bool:
        """Whether the task was solved in pass 1, or is by the same agent without memory, and was not here."""
        return (self.before or self.plain).solved and not self.course.solved

    @property
    def errors(self) -> int:
        """How many actions were served in error.

        An action is right if it worked, was not made before in this episode, and is one that the agent's own episode
        without memory made with success, or the best one did.
        """
        right = {call.same for course in (self.plain, self.best) for call in course.worked}
        return sum(s.failed or s.again or s.call.same not in right for s in self.course.served)

    @property
    def needless(self) -> int:
        """How many actions were served that the best episode does not need; an agent may well make them itself."""
        best = {call.same for call in self.best.worked}
        return sum(s.call.same not in best for s in self.course.served)


def summary(outings: Sequence[Outing]) -> dict[str, Any]:
    """Return the figures of a pass over all its seeds. Shares are of pass 1, by the same tasks where they come again.

    `best_steps` are the least that solve the tasks; `saved_tokens` are those of the calls that the same agent without
    memory makes more, in prompts and completions; `net_tokens` those less what memory put into prompts.
    """
    courses = [o.course for o in outings]
    steps, calls = sum(c.steps for c in courses), sum(c.llm_calls for c in courses)
    injected, repeated = sum(c.injected for c in courses), sum(c.repeated for c in courses)
    saved = sum(_tokens(o.plain) - _tokens(o.course) for o in outings)
    return {
        "tasks": len(outings),
        "solved": sum(c.solved for c in courses),
        "lost": sum(o.lost for o in outings),
        "lost_tasks": sorted({f"{o.course.task.family.name} {o.course.task.number}" for o in outings if o.lost})[:20],
        "steps": steps,
        "steps_per_task": _ratio(steps, len(outings)),
        "best_steps_per_task": _ratio(sum(o.best.steps for o in outings), len(outings)),
        "llm_calls": calls,
        "llm_calls_per_task": _ratio(calls, len(outings)),
        "extra_llm_calls": sum(c.extra_llm_calls for c in courses),
        "procedures": sum(c.procedures for c in courses),
        "served_actions": sum(len(c.served) for c in courses),
        "served_answers": sum(c.served_answers for c in courses),
        "injected_tokens": injected,
        "repeated_tokens": repeated,
        "saved_tokens": saved,
        "net_tokens": saved - injected - repeated,
    }


def against(found: dict[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pass's figures with its shares of pass 1's."""
    shares = {
        "share_of_steps": _ratio(found["steps_per_task"], first["steps_per_task"]),
        "share_of_llm_calls": _ratio(found["llm_calls_per_task"], first["llm_calls_per_task"]),
    }
    return {**found, **shares}


def served_errors(by_seed: Sequence[Sequence[Outing]], max_error: float) -> dict[str, Any]:
    """Return the error per served action: over all seeds, with its interval, and in how many seeds it is in bounds.

    The interval is the percentile bootstrap's over seeds. A seed in which nothing was served is in bounds.
    """
    pairs = [(sum(o.errors for o in seed), sum(len(o.course.served) for o in seed)) for seed in by_seed]
    wrong, served = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    interval = None
    if served.sum():
        drawn = np.random.default_rng(0).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
        rates = wrong[drawn].sum(axis=1) / np.maximum(served[drawn].sum(axis=1), 1.0)
        interval = [round(float(q), 4) for q in np.quantile(rates, [0.025, 0.975])]
    needless = sum(o.needless for seed in by_seed for o in seed)
    return {
        "max_error": max_error,
        "served": int(served.sum()),
        "wrong": int(wrong.sum()),
        "error": _ratio(wrong.sum(), served.sum()),
        "interval_95": interval,
        "seeds": len(pairs),
        "seeds_within": int(np.sum(wrong <= max_error * served)),
        "by_seed": [_ratio(a, b) for a, b in pairs],
        "needless_share": _ratio(needless, served.sum()),
    }


def held_out(outings: Sequence[Outing]) -> dict[str, Any]:
    """Return the figures of the episodes that were held out, beside those of the same tasks without memory."""
    mine = [o for o in outings if o.course.held_out]
    others = [o for o in outings if not o.course.held_out]
    return {
        "held_out": _few(mine),
        "with_memory": _few(others),
        "unchanged": all(o.course.steps == o.plain.steps and o.course.solved == o.plain.solved for o in mine),
    }


def _few(outings: Sequence[Outing]) -> dict[str, Any]:
    count = len(outings)
    return {
        "tasks": count,
        "solved": sum(o.course.solved for o in outings),
        "steps_per_task": _ratio(sum(o.course.steps for o in outings), count),
        "steps_per_task_without_memory": _ratio(sum(o.plain.steps for o in outings), count),
    }


def _tokens(course: Course) -> int:
    return course.prompt_tokens + course.completion_tokens


def _ratio(part: float, whole: float) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None
