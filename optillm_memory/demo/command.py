"""`optillm-memory demo`: the whole loop on an embedded model, with no key and no network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from optillm_memory.bench.options import progress, reported, say, seeded
from optillm_memory.bench.report import Output

_INTRODUCTION = """\
SmolLM2-135M answers 12 kinds of support request through optillm. It is never trained: memory stores its right
answers, and the right answer after each failure, and adds them to the prompts of similar requests.
"""


@click.command()
@click.option("--baseline", type=click.IntRange(1, 48), default=6, show_default=True, help="Tasks without memory.")
@click.option("--session", type=click.IntRange(1, 72), default=34, show_default=True, help="Tasks in each session.")
@click.option("--again", type=click.IntRange(1, 48), default=18, show_default=True, help="Tasks at the end.")
@seeded
@reported
def demo(baseline: int, session: int, again: int, seed: int, output: Output) -> None:
    """Let a small model sort support requests, with and without memory, across a restart."""
    from optillm_memory.demo.run import HOLDOUT, MAX_ERROR, curve, play

    started = time.perf_counter()
    if not output.as_json:
        click.echo(_INTRODUCTION)
    parts, uplift = play(baseline=baseline, session=session, again=again, seed=seed, say=say, bar=_bar)
    seconds = round(time.perf_counter() - started, 1)
    points = curve([part.result for part in parts[1:3]])
    rows = {part.name: part.figures() for part in parts}
    text = "\n".join(
        [
            "\n" + _table(rows),
            f"\nlearning curve: accuracy over the last 12 tasks; the restart came after task {session}",
            _curve(points),
            f"\nthe ladder: {again} tasks, most of them asked before; in the second run verified answers may be reused",
            f"at an error of at most {MAX_ERROR:.0%}" + _ladder(rows["again"], rows["again, reuse"]),
            f"\nuplift, from the {HOLDOUT:.0%} of episodes that were held out: " + _uplift(uplift),
            f"\nthe whole demo took {seconds} s",
        ]
    )
    figures = {"parts": rows, "curve": points, "uplift": uplift, "seconds": seconds}
    settings = {"baseline": baseline, "session": session, "again": again, "seed": seed, "holdout": HOLDOUT}
    output.write(figures, {**settings, "max_error": MAX_ERROR}, text)


@contextlib.contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[], None]]:
    with progress(length, f"{label:15}") as bar:
        yield lambda: bar.update(1)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [" " * 16 + "".join(f"{name:>11}" for name in columns)]
    for name, row in rows.items():
        cells = [f"{row[c]:.1%}" if c == "accuracy" else str(row[c]) for c in columns]
        lines.append(f"{name:16}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _curve(points: Sequence[tuple[int, float]]) -> str:
    return "\n".join(f"{done:5}  {accuracy:4.0%}  {'█' * round(accuracy * 40)}" for done, accuracy in points)


def _ladder(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    lines = (("accuracy", ".0%"), ("llm_calls", ""), ("seconds", ""))
    return "".join(f"\n  {name:10} {before[name]:{form}} → {after[name]:{form}}" for name, form in lines)


def _uplift(found: Mapping[str, Any]) -> str:
    counts = [f"{side['successes']} of {side['episodes']}" for side in (found["with_memory"], found["without_memory"])]
    if found["uplift"] is None:
        return f"not known yet ({counts[0]} right with memory, {counts[1]} without)"
    return (
        f"{found['uplift']:+.2f} ({found['confidence']:.0%} interval {found['low']:+.2f} to {found['high']:+.2f}; "
        f"{counts[0]} right with memory, {counts[1]} without)"
    )
