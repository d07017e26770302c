"""`optillm-memory demo`: the main job on an embedded model, with no key and no network."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from optillm_memory.cli import render


@click.command()
@click.option("--baseline", type=click.IntRange(1, 48), default=6, show_default=True, help="Tasks without memory.")
@click.option("--session", type=click.IntRange(1, 72), default=34, show_default=True, help="Tasks in each session.")
@click.option("--again", type=click.IntRange(1, 48), default=18, show_default=True, help="Tasks at the end.")
@click.option("--seed", default=0, show_default=True, help="Seeds the tasks' order.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def demo(baseline: int, session: int, again: int, seed: int, out: Path | None) -> None:
    """Let a small model sort support requests, with and without memory, across a restart."""
    from optillm_memory.bench import report
    from optillm_memory.demo.run import HOLDOUT, MAX_ERROR, curve, play

    started = time.perf_counter()
    click.echo("SmolLM2-135M answers 12 kinds of support request through optillm. It is never trained: what it")
    click.echo("gets right, or is shown after a failure, is remembered and put before similar requests.\n")
    parts, uplift = play(baseline=baseline, session=session, again=again, seed=seed, say=_say, bar=_bar)
    seconds = round(time.perf_counter() - started, 1)
    points = curve([part.result for part in parts[1:3]])
    rows = {part.name: part.figures() for part in parts}
    click.echo("\n" + render.table(rows))
    click.echo(f"\nlearning curve: accuracy over the last 12 tasks; the restart came after task {session}")
    click.echo(_curve(points))
    click.echo(f"\nthe ladder: {again} tasks, most of them asked before; verified answers may be reused at an error of")
    click.echo(f"at most {MAX_ERROR:.0%} in the second go" + _ladder(rows["again"], rows["again, reuse"]))
    click.echo(f"\nuplift, by the {HOLDOUT:.0%} of episodes that were held out: " + _uplift(uplift))
    click.echo(f"\nthe whole demo took {seconds} s")
    figures = {"parts": rows, "curve": points, "uplift": uplift, "seconds": seconds}
    settings = {"baseline": baseline, "session": session, "again": again, "seed": seed, "holdout": HOLDOUT}
    report.write(report.report(figures, {**settings, "max_error": MAX_ERROR}), out)


@contextlib.contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[], None]]:
    with click.progressbar(length=length, label=f"{label:15}", file=sys.stderr) as bar:
        yield lambda: bar.update(1)


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


def _say(text: str) -> None:
    click.echo(text, err=True)
