"""`optillm-memory bench NAME`: measure, show, and write the figures."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from optillm_memory.cli import render


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--seed", default=0, show_default=True, help="Seeds everything random.")(command)
    out = click.Path(dir_okay=False, path_type=Path)
    command = click.option("--json", "out", type=out, help="Write the figures to this file.")(command)
    data = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(
        "--data", type=data, help="Tasks, with `input` and `output` a line [default: the support tasks]."
    )(command)  # fmt: skip


@click.group()
def bench() -> None:
    """Measure the real thing."""


@bench.command()
@click.option("--limit", type=click.IntRange(1), help="How many tasks at most.")
@click.option("--feedback", type=click.Choice(["demonstration", "binary", "none"]), default="demonstration",
              show_default=True, help="What is told after each answer.")  # fmt: skip
@click.option("--upstream", default="smollm2", show_default=True, help="An upstream of its own: smollm2 or random:P.")
@click.option("--url", help="An OpenAI-compatible server with memory, in place of one of its own.")
@click.option("--model", help="The model's name there, with its prefix.")
@click.option("--key", default="sk-bench", show_default=True, help="The caller's key there.")
@click.option("--mode", type=click.Choice(["readwrite", "write", "off"]), default="readwrite", show_default=True,
              help="`off` and `write` answer without memory.")  # fmt: skip
@click.option("--vote", is_flag=True, help="Also measure what recall alone would answer.")
@click.option("--holdout", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Share of episodes without memory, on a server of its own.")  # fmt: skip
@_reported
def stream(
    limit: int | None, feedback: Any, upstream: str, url: str | None, model: str | None, key: str, mode: str, *,
    vote: bool, holdout: float, seed: int, out: Path | None, data: Path | None,
) -> None:  # fmt: skip
    """Stream tasks through a real server, with feedback after each."""
    from optillm_memory.bench import report
    from optillm_memory.bench.stream import Server, own_server, run
    from optillm_memory.bench.tasks import load_tasks, shuffled

    tasks = load_tasks(data)
    if data is None:
        tasks = shuffled(tasks, seed)
    tasks = tasks[:limit]
    if url and not model:
        raise click.UsageError("--url needs --model, as in agent_memory-gpt-4o-mini")
    with contextlib.ExitStack() as stack:
        if url and model:
            server = Server(url, model, key)
        else:
            env = {"OPTILLM_AGENT_MEMORY_HOLDOUT": str(holdout)}
            server = stack.enter_context(own_server(upstream, tasks, seed=seed, env=env, say=_say))
        bar = stack.enter_context(_bar(len(tasks), "tasks"))
        result = run(
            server,
            tasks,
            feedback=feedback,
            mode=mode,
            vote=vote,
            namespace=f"bench-{seed}",
            tick=lambda _: bar.update(1),
        )
        figures = result.figures()
        if server.calls is not None:
            figures["llm_calls"] = server.calls()
    settings = {
        "data": data.name if data else "support_tasks.jsonl", "limit": limit, "feedback": feedback, "mode": mode,
        "upstream": url or upstream, "seed": seed, "holdout": holdout,
    }  # fmt: skip
    whole = report.report(figures, settings)
    report.write(whole, out)
    click.echo(render.mapping(figures))


@bench.command()
@click.option("--sizes", default="0,1000,10000", show_default=True, help="Numbers of traces, with commas.")
@click.option("--repeats", type=click.IntRange(1), default=200, show_default=True, help="Requests of each kind.")
@_reported
def latency(sizes: str, repeats: int, seed: int, out: Path | None, data: Path | None) -> None:
    """Measure a round trip with `none`, with memory, and the encoder alone."""
    from optillm_memory.bench import report
    from optillm_memory.bench.latency import run
    from optillm_memory.bench.tasks import load_tasks

    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise click.BadParameter("give whole numbers with commas between", param_hint="--sizes") from None
    length = len(numbers) * (repeats + 10)
    with _bar(length, "round trips") as bar:
        figures = run(load_tasks(data), sizes=numbers, repeats=repeats, seed=seed, say=_say, tick=lambda: bar.update(1))
    whole = report.report(figures, {"repeats": repeats, "seed": seed, "data": data.name if data else "support_tasks"})
    report.write(whole, out)
    for size, values in figures.items():
        click.echo(f"{size} traces  {json.dumps(values)}")


@bench.command()
@click.option("--limit", type=click.IntRange(1), help="How many tasks at most.")
@click.option("--holdout", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Share of episodes without memory in the third run.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seeds the order of the tasks.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def agent(limit: int | None, holdout: float, seed: int, out: Path | None) -> None:
    """Have an agent do real tasks, and again in a new process, with and without memory."""
    from optillm_memory.bench import report
    from optillm_memory.bench.agent import run
    from optillm_memory.bench.agent_tasks import TASKS

    tasks = TASKS[:limit]
    with _bar(3 * len(tasks), "tasks") as bar:
        figures = run(tasks, seed=seed, share=holdout, say=_say, tick=lambda: bar.update(1))
    whole = report.report(figures, {"tasks": len(tasks), "holdout": holdout, "seed": seed, "encoder": "hashing"})
    report.write(whole, out)
    for name, values in figures.items():
        click.echo(f"{name}  {json.dumps(values)}")


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Rows with `command`, `output`, `fix`, perhaps `group` [default: the built-in ones].")  # fmt: skip
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
def fixes(data: Path | None, out: Path | None) -> None:
    """Measure the corrections that memory suggests for failing commands: leave-one-out, and as a stream."""
    from optillm_memory.bench import report
    from optillm_memory.bench.fixes import load_rows, run

    rows = load_rows(data)
    with _bar(2 * len(rows), "suggestions") as bar:
        figures = run(rows, tick=lambda _: bar.update(1))
    report.write(report.report(figures, {"data": data.name if data else "fix_cases.jsonl"}), out)
    stream = {f"stream {name}": value for name, value in figures.pop("stream").items()}
    click.echo(render.mapping({**figures, **stream}))


def _bar(length: int, label: str) -> Any:
    return click.progressbar(length=length, label=label, file=sys.stderr)


def _say(text: str) -> None:
    click.echo(text, err=True)
