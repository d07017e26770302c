"""The commands of `python -m benchmarks`."""

from __future__ import annotations

import importlib
from typing import Any

import click

from optillm_memory.bench.options import limited, max_error, numbers, progress, reported, say, seeded
from optillm_memory.bench.report import Output
from optillm_memory.errors import AgentMemoryError

# Commands in modules that import much: NAME is the command `NAME` of `benchmarks/NAME.py`.
_LAZY = ("ann",)


class _Benchmarks(click.Group):
    """Loads some commands only when they are used, and prints our errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY:
            found = getattr(importlib.import_module(f"benchmarks.{cmd_name}"), cmd_name)
            assert isinstance(found, click.Command)
            return found
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AgentMemoryError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Benchmarks)
def main() -> None:
    """Measure the project itself: compared with other memories, under faults, with agents."""


@main.command()
@limited
@click.option("--holdout", type=click.FloatRange(0, 1), default=0.5, show_default=True,
              help="Share of episodes without memory in the runs with a holdout.")  # fmt: skip
@click.option("--part", type=click.Choice(("all", "shell", "multistep")), default="all", show_default=True,
              help="The tasks with a real shell, the simulated tasks of many steps, or both.")  # fmt: skip
@click.option("--instances", type=click.IntRange(1), default=12, show_default=True,
              help="Tasks of each family, of many steps.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True,
              help="Number of times that these are done, with other names.")  # fmt: skip
@max_error(0.05, "Largest error at which memory may serve an action.")
@seeded
@reported
def agent(
    limit: int | None,
    holdout: float,
    part: str,
    instances: int,
    seeds: int,
    max_error: float,
    seed: int,
    output: Output,
) -> None:
    """Let a scripted agent do tasks, and again in a new process: with and without memory, procedures and actions.

    --limit is of the tasks with a shell. --seed is the first of the --seeds.
    """
    from benchmarks.agent import run
    from benchmarks.agent_tasks import TASKS
    from benchmarks.multistep import passes

    figures: dict[str, Any] = {}
    tasks = TASKS[:limit]
    if part != "multistep":
        with progress(3 * len(tasks), "tasks") as bar:
            figures |= run(tasks, seed=seed, share=holdout, say=say, tick=lambda: bar.update(1))
    if part != "shell":
        with progress(passes.episodes(seeds, instances), "tasks") as bar:
            figures["multistep"] = passes.run(
                seeds=seeds, seed=seed, instances=instances, max_error=max_error, share=holdout, say=say,
                tick=lambda: bar.update(1),
            )  # fmt: skip
    settings = {"holdout": holdout, "part": part, "seed": seed, "encoder": "hashing"}
    output.write(
        figures,
        {**settings, "tasks": len(tasks), "instances": instances, "seeds": seeds, "max_error": max_error},
    )


@main.command()
@click.option("--kills", type=click.IntRange(0), default=1000, show_default=True, help="Number of `kill -9`.")
@click.option("--power-losses", type=click.IntRange(0), default=500, show_default=True, help="Number of power losses.")
@click.option("--processes", type=click.IntRange(1), default=8, show_default=True, help="Concurrent processes.")
@click.option("--threads", type=click.IntRange(1), default=4, show_default=True, help="Threads of each process.")
@click.option("--seconds", type=click.FloatRange(0), default=300.0, show_default=True, help="Duration of their writes.")
@seeded
@reported
def durability(output: Output, **settings: Any) -> None:
    """Kill it, cut its power, let many processes write at once, and look for everything that was acknowledged."""
    from benchmarks.durability import STEPS_OF_SOAK, run

    steps = settings["kills"] + settings["power_losses"] + (STEPS_OF_SOAK if settings["seconds"] else 0)
    with progress(steps, "steps") as bar:
        figures = run(**settings, say=say, tick=lambda: bar.update(1))
    output.write(figures, settings)


# The packages of the other memories, for --help: a test compares them with those that the benchmark looks for.
PEER_PACKAGES = "chromadb mem0ai faiss-cpu qdrant-client langgraph langgraph-checkpoint-sqlite sqlite-vec gptcache"


@main.command(
    epilog=f"Nothing is installed for you. To install the others:\n\n\b\n  pip install {PEER_PACKAGES}\n\n"
    "add/s is one caller who waits for each record, ours until it is on disk; ingest/s one who does not wait, and all "
    "of ours are on disk at the end: prepared traces with their feedback; requests/s the same with whole requests, "
    "parsed in that time. The others have only one way: their adds return when they choose.",
)
@numbers("--sizes", "10000,100000", "Records in each memory")
@click.option("--peer", "chosen", multiple=True, help="A memory; repeatable [default: all that are installed].")
@click.option("--simd", type=click.Choice(("all", "avx2")), default="all", show_default=True,
              help="All instructions of the processor, or AVX2 alone (not for chromadb).")  # fmt: skip
@seeded
@reported
def peers(sizes: list[int], chosen: tuple[str, ...], simd: str, seed: int, output: Output) -> None:
    """Put the same records into other memories and ask the same questions: speed, LLM calls, durability."""
    from benchmarks.peer_kinds import PEERS
    from benchmarks.peers import run, table, versions_of

    if unknown := [name for name in chosen if name not in PEERS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PEERS)}", param_hint="--peer")
    names = chosen or tuple(PEERS)
    figures: dict[str, Any] = run(sizes, names, seed=seed, say=say, simd=simd)
    versions = {name: found for name in names if (found := versions_of(name))}
    text = "\n".join(f"{size} records\n{table(found)}" for size, found in figures.items())
    output.write(figures, {"sizes": sizes, "peers": versions, "seed": seed, "simd": simd}, text)
    if len(versions) < len(names):
        say(f"to measure the others as well: pip install {PEER_PACKAGES}")
