"""`optillm-memory demo`: the main job on an embedded model, with no key and no network."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from optillm_memory.cli import render


@click.command()
@click.option("--baseline", type=click.IntRange(1, 48), default=12, show_default=True, help="Tasks without memory.")
@click.option("--session", type=click.IntRange(1, 84), default=48, show_default=True, help="Tasks in each session.")
@click.option("--seed", default=0, show_default=True, help="Seeds the tasks' order.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def demo(baseline: int, session: int, seed: int, out: Path | None) -> None:
    """Let a small model sort support requests, with and without memory, across a restart."""
    from optillm_memory.bench import report
    from optillm_memory.bench.demo import curve, play

    started = time.perf_counter()
    click.echo("SmolLM2-135M answers 12 kinds of support request through optillm. It is never trained: what it")
    click.echo("gets right, or is shown after a failure, is remembered and put before similar requests.\n")
    parts = play(baseline=baseline, session=session, seed=seed, say=_say, bar=_bar)
    seconds = round(time.perf_counter() - started, 1)
    points = curve([part.result for part in parts[1:]])
    rows = {part.name: part.figures() for part in parts}
    click.echo("\n" + render.table(rows))
    click.echo(f"\nlearning curve: accuracy over the last 12 tasks; the restart came after task {session}")
    click.echo(_curve(points))
    click.echo(f"\nthe whole demo took {seconds} s")
    figures = {"parts": rows, "curve": points, "seconds": seconds}
    report.write(report.report(figures, {"baseline": baseline, "session": session, "seed": seed}), out)


@contextlib.contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[], None]]:
    with click.progressbar(length=length, label=f"{label:15}", file=sys.stderr) as bar:
        yield lambda: bar.update(1)


def _curve(points: Sequence[tuple[int, float]]) -> str:
    return "\n".join(f"{done:5}  {accuracy:4.0%}  {'█' * round(accuracy * 40)}" for done, accuracy in points)


def _say(text: str) -> None:
    click.echo(text, err=True)
