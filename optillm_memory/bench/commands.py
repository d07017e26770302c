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
from optillm_memory.settings import Settings


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
@click.option("--max-error", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Let verified answers be reused at this error.")  # fmt: skip
@_reported
def stream(
    limit: int | None, feedback: Any, upstream: str, url: str | None, model: str | None, key: str, mode: str, *,
    vote: bool, holdout: float, max_error: float | None, seed: int, out: Path | None, data: Path | None,
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
            server = stack.enter_context(own_server(upstream, tasks, seed=seed, env=env, say=say))
        bar = stack.enter_context(progress(len(tasks), "tasks"))
        result = run(
            server,
            tasks,
            feedback=feedback,
            mode=mode,
            vote=vote,
            max_error=max_error,
            namespace=f"bench-{seed}",
            tick=lambda _: bar.update(1),
        )
        figures = result.figures()
        if server.calls is not None:
            figures["llm_calls"] = server.calls()
    settings = {
        "data": data.name if data else "support_tasks.jsonl", "limit": limit, "feedback": feedback, "mode": mode,
        "upstream": url or upstream, "seed": seed, "holdout": holdout, "max_error": max_error,
    }  # fmt: skip
    whole = report.report(figures, settings)
    report.write(whole, out)
    click.echo(render.mapping(figures))


@bench.command()
@click.option("--limit", type=click.IntRange(1), help="How many tasks at most.")
@click.option("--upstream", default="random:0.7", show_default=True, help="The upstream: random:P.")
@click.option("--max-error", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05,
              show_default=True, help="The error that the gate may serve at.")  # fmt: skip
@click.option("--similarity", type=click.FloatRange(-1, 1), default=0.8, show_default=True,
              help="From here on the way `top1` serves its nearest neighbour's answer.")  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs of the gate, in other orders."
)
@_reported
def ladder(
    limit: int | None, upstream: str, max_error: float, similarity: float, seeds: int, *, seed: int,
    out: Path | None, data: Path | None,
) -> None:  # fmt: skip
    """Stream tasks through the gate in this process, beside no memory, injection alone, and similarity alone."""
    from optillm_memory.bench import report
    from optillm_memory.bench.ladder import compare, rounds
    from optillm_memory.bench.tasks import load_tasks

    tasks = load_tasks(data)[:limit]
    with progress(rounds(seeds) * len(tasks), "tasks") as bar:
        figures = compare(
            tasks, upstream=upstream, max_error=max_error, similarity=similarity, seeds=range(seed, seed + seeds),
            say=say, tick=lambda: bar.update(1),
        )  # fmt: skip
    settings = {
        "data": data.name if data else "support_tasks.jsonl", "limit": limit, "upstream": upstream,
        "max_error": max_error, "similarity": similarity, "seed": seed, "seeds": seeds,
    }  # fmt: skip
    report.write(report.report(figures, settings), out)
    click.echo(render.mapping(figures))


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Rows with `a`, `b`, `same_answer`, perhaps `category` [default: the built-in ones].")  # fmt: skip
@click.option("--traffic", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Tasks that the gate learns from before [default: the support tasks, thrice].")  # fmt: skip
@click.option("--max-error", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05,
              show_default=True, help="The error that the gate may serve at.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seeds everything random.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def near_misses(data: Path | None, traffic: Path | None, max_error: float, seed: int, out: Path | None) -> None:
    """Ask what only looks like a question that was answered, and what is one."""
    from optillm_memory.bench import report
    from optillm_memory.bench.near_misses import load_pairs, measure
    from optillm_memory.bench.tasks import load_tasks, shuffled

    pairs, tasks = load_pairs(data), shuffled(load_tasks(traffic), seed)
    with progress(len(tasks), "tasks") as bar:
        figures = measure(pairs, tasks, max_error=max_error, seed=seed, say=say, tick=lambda: bar.update(1))
    names = {
        "data": data.name if data else "near_misses.jsonl",
        "traffic": traffic.name if traffic else "support_tasks.jsonl",
    }
    report.write(report.report(figures, {**names, "max_error": max_error, "seed": seed}), out)
    click.echo(render.mapping(figures))


@bench.command()
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Rows with `prompt` and `arms`: {name: {reward, cost}}, perhaps `task` "
                   "[default: made up on the support tasks].")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="How many orders of the rows.")
@click.option("--cost-weight", type=click.FloatRange(0), default=0.1, show_default=True,
              help="What the cost counts for, in units of the dearest arm's mean cost.")  # fmt: skip
@click.option("--exploration-budget", type=click.FloatRange(0, 1), default=Settings().exploration_budget,
              show_default=True, help="Reward a request that exploring may cost.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="The first of the seeds.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def route(
    data: Path | None, seeds: int, cost_weight: float, exploration_budget: float, seed: int, out: Path | None
) -> None:  # fmt: skip
    """Have the policy choose among arms whose every reward is known."""
    from optillm_memory.bench import report
    from optillm_memory.bench.route import SCENARIOS, lines, load_rows, made_up, run, scenarios, vectors_of

    rows = load_rows(data) if data else made_up(seed)
    say("encoding the prompts")
    vectors = vectors_of(rows)
    with progress(len(SCENARIOS) * seeds, "runs") as bar:
        figures = run(
            rows, vectors, seeds=range(seed, seed + seeds), weight=cost_weight, exploration_budget=exploration_budget,
            tick=lambda: bar.update(1),
        )  # fmt: skip
    settings = {
        "data": data.name if data else "support_tasks.jsonl", "cost_weight": cost_weight,
        "exploration_budget": exploration_budget, "seed": seed, "seeds": seeds, "scenarios": scenarios(),
    }  # fmt: skip
    report.write(report.report(figures, settings), out)
    click.echo(render.mapping(lines(figures)))


@bench.command()
@click.option("--size", type=click.IntRange(1), default=1000, show_default=True, help="Exemplars in memory.")
@click.option("--clients", default="1,8,32", show_default=True, help="Numbers of clients at once, with commas.")
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="How long each is measured."
)
@click.option("--repeats", type=click.IntRange(10), default=200, show_default=True, help="Round trips of each kind.")
@_reported
def decide(
    size: int, clients: str, seconds: float, repeats: int, *, seed: int, out: Path | None, data: Path | None
) -> None:
    """Measure decisions a second, in process and over HTTP, and a hit's round trip beside one of `none`."""
    from optillm_memory.bench import report
    from optillm_memory.bench.decide import run
    from optillm_memory.bench.tasks import load_tasks

    numbers = numbers_of(clients, "--clients")
    with progress(2 * len(numbers) + 1, "measurements") as bar:
        figures = run(
            load_tasks(data), size=size, clients=numbers, seconds=seconds, repeats=repeats, seed=seed, say=say,
            tick=lambda: bar.update(1),
        )  # fmt: skip
    settings = {"size": size, "seconds": seconds, "repeats": repeats, "seed": seed}
    report.write(report.report(figures, {**settings, "data": data.name if data else "support_tasks.jsonl"}), out)
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

    numbers = numbers_of(sizes, "--sizes")
    length = len(numbers) * (repeats + 10)
    with progress(length, "round trips") as bar:
        figures = run(load_tasks(data), sizes=numbers, repeats=repeats, seed=seed, say=say, tick=lambda: bar.update(1))
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
    from benchmarks.agent import run
    from benchmarks.agent_tasks import TASKS
    from optillm_memory.bench import report

    tasks = TASKS[:limit]
    with progress(3 * len(tasks), "tasks") as bar:
        figures = run(tasks, seed=seed, share=holdout, say=say, tick=lambda: bar.update(1))
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
    with progress(2 * len(rows), "suggestions") as bar:
        figures = run(rows, tick=lambda _: bar.update(1))
    report.write(report.report(figures, {"data": data.name if data else "fix_cases.jsonl"}), out)
    stream = {f"stream {name}": value for name, value in figures.pop("stream").items()}
    click.echo(render.mapping({**figures, **stream}))


@bench.command()
@click.option("--db", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="The database file with the log; it is only read.")  # fmt: skip
@click.option("--token-price", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Reward that a thousand tokens must be worth.")  # fmt: skip
@click.option("--second-price", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Reward that a second must be worth.")  # fmt: skip
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def replay(db: Path, token_price: float, second_price: float, out: Path | None) -> None:
    """Estimate what each arm, and the policy itself, would have earned on the traffic in a log."""
    from optillm_memory.bench import report
    from optillm_memory.bench.replay import lines, run
    from optillm_memory.learn.offpolicy import Prices
    from optillm_memory.store.tables.exposures import read_decisions

    figures = run(read_decisions(db, None), Prices(token_price, second_price))
    settings = {"db": db.name, "token_price": token_price, "second_price": second_price}
    report.write(report.report(figures, settings), out)
    click.echo(render.mapping(lines(figures)))


def numbers_of(text: str, option: str) -> list[int]:
    """Return the numbers that an option gives with commas between. Raises BadParameter."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter("give whole numbers with commas between", param_hint=option) from None


def progress(length: int, label: str) -> Any:
    """Return a progress bar beside the figures."""
    return click.progressbar(length=length, label=label, file=sys.stderr)


def say(text: str) -> None:
    """Tell what goes on, beside the figures."""
    click.echo(text, err=True)
