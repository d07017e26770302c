"""The commands; each does one thing to the database, or starts the host."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from optillm_memory.cli.common import database, limited, opened, printed, printing, reading, say, scope_named, scoped
from optillm_memory.cli.render import finding_line, mapping, memory_lines, trace_lines
from optillm_memory.conversation.printable import printable
from optillm_memory.errors import AgentMemoryError
from optillm_memory.learn.uplift import summary as uplift_summary
from optillm_memory.memory import Memory
from optillm_memory.records import COMMAND_LINE, METRICS
from optillm_memory.request.route import summary as policy_summary
from optillm_memory.settings import table

_OF_THE_ENCODER = ("encoder", "encoder_reason", "memories_without_vector")  # commands that only count load none


class _Cli(click.Group):
    """Prints our errors in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AgentMemoryError as error:
            raise click.ClickException(printable(str(error))) from error


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
@click.option("--uninstall", "remove", is_flag=True, help="Remove the plugin file.")
@printing
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
@click.option("--security", is_flag=True, help="Name the open doors of this installation instead.")
@printing
def doctor(directory: Path, *, security: bool, as_json: bool) -> None:
    """Check settings, database, encoder and optillm without changing anything; exit with 1 if something is broken."""
    from optillm_memory.host.doctor import examine
    from optillm_memory.host.security import doors

    findings = []
    for finding in doors() if security else examine(directory):
        findings.append(finding)
        if not as_json:
            say(finding_line(finding.level, finding.name, finding.message), err=False)
    printed([asdict(f) for f in findings], as_json=as_json, text=None)
    if any(f.level == "fail" for f in findings):
        sys.exit(1)


@main.command()
@reading()
def stats(memory: Memory) -> Any:
    """Count what is stored."""
    return {name: count for name, count in memory.stats().items() if name not in _OF_THE_ENCODER}


@main.command()
@reading(trace_lines)
@limited(20)
@click.option("--text", default="", help="Only traces whose task or answer contains this text.")
def traces(memory: Memory, limit: int, text: str) -> Any:
    """List the latest traces, newest first."""
    return memory.traces(limit=limit, text=text)


@main.command()
@reading()
@click.argument("identifier")
def show(memory: Memory, identifier: str) -> Any:
    """Show one trace or one memory, by its id."""
    is_memory = identifier.startswith(("mem-", "fix-", "proc-"))
    return memory.described(identifier) if is_memory else memory.trace(identifier)


@main.command()
@reading()
@click.argument("trace_id")
def why(memory: Memory, trace_id: str) -> Any:
    """Explain why a request was answered as it was."""
    return memory.why(trace_id)


@main.command()
@reading(memory_lines)
@limited(20)
def memories(memory: Memory, limit: int) -> Any:
    """List memories of every status, newest first."""
    return [record.as_dict() for record in memory.memories(limit=limit)]


@main.command()
@reading(lambda found: mapping(uplift_summary(found)))
@limited(20, "Largest number of memories of one scope.")
def uplift(memory: Memory, limit: int) -> Any:
    """Show how memory changed the outcome of episodes, measured by the holdout."""
    return memory.uplift(limit=limit)


@main.command()
@reading(lambda found: mapping(policy_summary(found)), encoder=None)
@scoped
def policy(memory: Memory, **scope: Any) -> Any:
    """Show the arms of approach `auto`, what is estimated of each, and why."""
    return memory.policy(scope_named(memory, **scope))


@main.command()
@reading(lambda found: memory_lines(found) if found else "nothing relevant", encoder=None)
@click.argument("query")
@limited(5)
@scoped
def recall(memory: Memory, query: str, limit: int, **scope: Any) -> Any:
    """Show what a request with the task QUERY would recall."""
    return [hit.as_dict() for hit in memory.recall(query, scope=scope_named(memory, **scope), limit=limit)]


def _moment(text: str | None) -> str | float | None:
    try:
        return float(text or "")
    except ValueError:
        return text


@main.command()
@click.argument("trace_id", required=False)
@click.option("--episode", "episode_id", help="The episode, instead of a trace.")
@click.option("--success/--failure", "success", default=None, help="Whether it succeeded.")
@click.option("--score", type=float, help="How well it went, from 0 to 1.")
@click.option("--demonstration", help="The right answer.")
@click.option("--error", help="The error it ended in.")
@click.option("--comment", help="A remark.")
@click.option(
    "--source", type=click.Choice(["human", "code", "llm"]), default="human", show_default=True, help="Who judged it."
)
@click.option("--valid-until", help="The moment from which on it no longer holds: ISO 8601, or Unix seconds.")
@click.option("--feedback-id", help="Makes the feedback idempotent.")
@click.option("--retract", help="The id of feedback to undo.")
@database
def feedback(
    trace_id: str | None, episode_id: str | None, source: str, feedback_id: str | None, retract: str | None,
    valid_until: str | None, db: str | None, *, as_json: bool, **metrics: Any,
) -> None:  # fmt: skip
    """Report how a trace or an episode went."""
    values = [(metric, metrics[metric]) for metric in METRICS if metrics[metric] is not None]
    if retract:
        items: list[dict[str, Any]] = [{"feedback_id": retract, "value": None}]
    elif not values:
        raise click.UsageError("give a result: --success, --failure, --score, --demonstration, --error or --comment")
    elif feedback_id and len(values) > 1:
        raise click.UsageError("--feedback-id is the id of one feedback; give only one result with it")
    else:
        about = {"trace_id": trace_id} if trace_id else {"episode_id": episode_id}
        shared = {**about, "source": source, "feedback_id": feedback_id, "valid_until": _moment(valid_until)}
        items = [{**shared, "metric": metric, "value": value} for metric, value in values]
    with opened(db, make=True) as memory:
        receipts = [r.as_dict() for r in memory.feedback(items, reporter=COMMAND_LINE)]
    printed(receipts, as_json=as_json, text=lambda: "\n".join(f"{r['feedback_id']}  {r['status']}" for r in receipts))


@main.command()
@database
@click.option("--accept-changes", is_flag=True, help="Go on although the seal shows that the log was changed.")
def rebuild(db: str | None, *, accept_changes: bool, as_json: bool) -> None:
    """Derive all memories again from the log."""
    started = time.monotonic()
    with opened(db) as memory:
        found = memory.rebuild(accept_changes=accept_changes)
    timed = {**found, "seconds": round(time.monotonic() - started, 3)}
    printed(timed, as_json=as_json, text=lambda: mapping(timed))


@main.command()
@printing
def settings(*, as_json: bool) -> None:
    """List the settings with their defaults."""
    found = [{"name": name, "default": default, "help": help_} for name, default, help_ in table()]
    lines = (f"  {name} (default {default}): {help_}" for name, default, help_ in table())
    printed(found, as_json=as_json, text=lambda: "\n".join(lines))


def _add_later_commands() -> None:
    from optillm_memory.bench.commands import bench
    from optillm_memory.cli.authority import COMMANDS as OF_AUTHORITY
    from optillm_memory.cli.copy import copy
    from optillm_memory.cli.maintain import COMMANDS
    from optillm_memory.demo.command import demo

    for command in (demo, bench, copy, *COMMANDS, *OF_AUTHORITY):
        main.add_command(command)


_add_later_commands()
