"""The commands; each does one thing to the database file, or starts the host."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from optillm_memory.cli import render
from optillm_memory.cli.common import database, opened, printed, scope_named, scoped
from optillm_memory.errors import AgentMemoryError
from optillm_memory.records import METRICS
from optillm_memory.settings import table


class _Cli(click.Group):
    """Says our errors in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AgentMemoryError as error:
            raise click.ClickException(str(error)) from error


def _settings_help() -> str:
    return "\n".join(f"  {name} (default {default}): {help_}" for name, default, help_ in table())


@click.group(cls=_Cli, epilog="Settings are environment variables; `optillm-memory settings` lists them.")
@click.version_option(package_name="optillm-memory")
def main() -> None:
    """Give the optillm proxy persistent agent memory."""


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help-serve"]})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Start stock optillm with the plugin; ARGUMENTS are optillm's own (try `serve --help`)."""
    from optillm_memory.host.launcher import serve as run

    run(arguments)


@main.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option("--uninstall", "remove", is_flag=True, help="Take the plugin file away again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def install(directory: Path, *, remove: bool, as_json: bool) -> None:
    """Write the plugin file, so that plain `optillm` started in DIRECTORY loads it."""
    from optillm_memory.host import install as files

    if remove:
        removed = files.uninstall(directory)
        printed({"removed": removed}, as_json=as_json, text=lambda: "removed" if removed else "there was none")
        return
    path = files.install(directory)
    printed({"path": str(path)}, as_json=as_json, text=lambda: f"{path}: start optillm in {directory}")


@main.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(directory: Path, *, as_json: bool) -> None:
    """Check optillm, the database, SQLite and the encoder; exit with 1 where something is broken."""
    from optillm_memory.host.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine(directory):
        findings.append(finding)
        if not as_json:
            click.echo(render.finding(finding.level, finding.name, finding.message))
    if as_json:
        click.echo(json.dumps([f.as_dict() for f in findings], indent=2))
    if any(f.level == "fail" for f in findings):
        sys.exit(1)


@main.command()
@database
def stats(db: str | None, *, as_json: bool) -> None:
    """Count what is stored."""
    with opened(db) as memory:
        found = memory.store.stats()
    printed(found, as_json=as_json, text=lambda: render.mapping(found))


@main.command()
@click.option("--limit", default=20, show_default=True, help="How many at most.")
@click.option("--query", default="", help="Only those whose task or answer holds this text.")
@database
def traces(limit: int, query: str, db: str | None, *, as_json: bool) -> None:
    """List the latest traces, newest first."""
    with opened(db) as memory:
        found = memory.store.traces(None, limit=limit, text=query)
    printed(found, as_json=as_json, text=lambda: render.traces(found))


@main.command()
@click.argument("identifier")
@database
def show(identifier: str, db: str | None, *, as_json: bool) -> None:
    """Show one trace or one memory, by its id."""
    with opened(db) as memory:
        is_memory = identifier.startswith(("mem-", "fix-"))
        found = memory.described(identifier) if is_memory else memory.trace(identifier)
    printed(found, as_json=as_json, text=lambda: render.mapping(found))


@main.command()
@click.argument("trace_id")
@database
def why(trace_id: str, db: str | None, *, as_json: bool) -> None:
    """Say why a request was answered as it was."""
    with opened(db) as memory:
        found = memory.why(trace_id)
    printed(found, as_json=as_json, text=lambda: render.mapping(found))


@main.command()
@click.option("--limit", default=20, show_default=True, help="How many at most.")
@database
def memories(limit: int, db: str | None, *, as_json: bool) -> None:
    """List memories of every status, newest first."""
    with opened(db) as memory:
        found = [{**asdict(m), "value": round(m.value, 4)} for m in memory.store.list_memories(None, limit=limit)]
    printed(found, as_json=as_json, text=lambda: render.memories(found))


@main.command()
@click.option("--limit", default=20, show_default=True, help="How many memories of a scope at most.")
@database
def uplift(limit: int, db: str | None, *, as_json: bool) -> None:
    """Show what memory changed in the outcome of episodes, as the holdout tells."""
    from optillm_memory.learn.uplift import report, summary

    with opened(db) as memory:
        found = report(memory.store.exposures.episodes(None), limit=limit)
    printed(found, as_json=as_json, text=lambda: render.mapping(summary(found)))


@main.command()
@scoped
@database
def policy(
    tenant: str | None, namespace: str, user_id: str, agent_id: str, db: str | None, *, as_json: bool
) -> None:  # fmt: skip
    """Show the arms of approach `auto`, what is believed of each, and why."""
    from optillm_memory.request.route import summary

    with opened(db, encoder=None) as memory:
        memory.encoder.wait(120)
        found = memory.policy(scope_named(memory, tenant, namespace, user_id, agent_id))
    printed(found, as_json=as_json, text=lambda: render.mapping(summary(found)))


@main.command()
@click.argument("query")
@click.option("--limit", default=5, show_default=True, help="How many at most.")
@scoped
@database
def recall(
    query: str, limit: int, tenant: str | None, namespace: str, user_id: str, agent_id: str, db: str | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what a request with the task QUERY would recall."""
    with opened(db, encoder=None) as memory:
        memory.encoder.wait(120)
        hits = memory.recall(query, scope=scope_named(memory, tenant, namespace, user_id, agent_id), limit=limit)
    found = [{**asdict(h.memory), "score": h.score, "cosine": h.cosine, "lexical": h.lexical} for h in hits]
    printed(found, as_json=as_json, text=lambda: render.memories(found) if found else "nothing relevant")


@main.command()
@click.argument("trace_id", required=False)
@click.option("--episode", "episode_id", help="The episode, in place of a trace.")
@click.option("--success/--failure", "success", default=None, help="How it went.")
@click.option("--score", type=float, help="How well it went, from 0 to 1.")
@click.option("--demonstration", help="The right answer.")
@click.option("--error", "error_text", help="The error it ended in.")
@click.option("--comment", help="A remark.")
@click.option(
    "--source", type=click.Choice(["human", "code", "llm"]), default="human", show_default=True, help="Who says so."
)
@click.option("--feedback-id", help="Makes it idempotent.")
@click.option("--retract", help="The id of feedback to undo.")
@database
def feedback(
    trace_id: str | None, episode_id: str | None, success: bool | None, score: float | None, demonstration: str | None,
    error_text: str | None, comment: str | None, source: str, feedback_id: str | None, retract: str | None,
    db: str | None, *, as_json: bool,
) -> None:  # fmt: skip
    """Say how a trace or an episode went."""
    given = {
        "success": success,
        "score": score,
        "demonstration": demonstration,
        "error": error_text,
        "comment": comment,
    }
    values = [(metric, given[metric]) for metric in METRICS if given[metric] is not None]
    if retract:
        items: list[dict[str, Any]] = [{"feedback_id": retract, "value": None}]
    elif not values:
        raise click.UsageError("say how it went: --success, --failure, --score, --demonstration, --error or --comment")
    else:
        about = {"trace_id": trace_id} if trace_id else {"episode_id": episode_id}
        items = [
            {**about, "metric": metric, "value": value, "source": source, "feedback_id": feedback_id}
            for metric, value in values
        ]
        if feedback_id and len(items) > 1:
            raise click.UsageError("--feedback-id names one feedback; give one metric with it")
    with opened(db, make=True) as memory:
        receipts = [r.as_dict() for r in memory.feedback(items)]
    printed(receipts, as_json=as_json, text=lambda: "\n".join(f"{r['feedback_id']}  {r['status']}" for r in receipts))


@main.command()
@database
def rebuild(db: str | None, *, as_json: bool) -> None:
    """Derive all memories again from the log."""
    started = time.monotonic()
    with opened(db) as memory:
        found = memory.rebuild()
    found_all = {**found, "seconds": round(time.monotonic() - started, 3)}
    printed(found_all, as_json=as_json, text=lambda: render.mapping(found_all))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def settings(*, as_json: bool) -> None:
    """List the settings with their defaults."""
    found = [{"name": name, "default": default, "help": help_} for name, default, help_ in table()]
    printed(found, as_json=as_json, text=_settings_help)


def _add_later_commands() -> None:
    from optillm_memory.bench import store_commands as bench_store
    from optillm_memory.bench.commands import bench
    from optillm_memory.cli.copy import copy
    from optillm_memory.cli.maintain import COMMANDS
    from optillm_memory.demo.command import demo

    bench_store.add_to(bench)
    for command in (demo, bench, copy, *COMMANDS):
        main.add_command(command)


_add_later_commands()
