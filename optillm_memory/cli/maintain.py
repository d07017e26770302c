"""Looking after the database: verify, migrate, backup, forget, compact, reembed."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from optillm_memory.cli.common import (
    database,
    database_file,
    file_of,
    opened,
    printed,
    progress,
    refuse_missing,
    say,
    settings_for,
)
from optillm_memory.cli.render import finding_line, mapping
from optillm_memory.conversation.printable import printable
from optillm_memory.settings import is_url

_DAY_S = 86_400


@click.command()
@click.option("--deep", is_flag=True, help="Also fold a copy of the log, and compare all words.")
@click.option("--mend", is_flag=True, help="Delete rows that belong to nothing, and vectors of a wrong length.")
@database
def verify(db: str | None, *, deep: bool, mend: bool, as_json: bool) -> None:
    """Check the database, its indexes and what is derived; exit with 1 where something is wrong."""
    from optillm_memory.learn.forms import form_named
    from optillm_memory.store.maintenance import verify as checks

    settings = settings_for(db)
    place = settings.db if is_url(settings.db) else file_of(settings)
    if mend:
        with opened(db) as memory:
            found = memory.mend()
        say(f"deleted: {json.dumps(found)}")
    shown = []
    normal, folder = form_named(settings.answer_form), settings.seal_folder
    for check in checks.verify(place, deep=deep, normal=normal, seal_folder=folder):
        shown.append(check.as_dict())
        if not as_json:
            say(finding_line(check.level, check.name, check.message), err=False)
    printed(shown, as_json=as_json, text=None)
    if any(check["level"] == "fail" for check in shown):
        sys.exit(1)


@click.command()
@database
def migrate(db: str | None, *, as_json: bool) -> None:
    """Bring the schema of the database up to this release; commands that only look do not."""
    from optillm_memory.learn.outcomes import normal_answer
    from optillm_memory.store.opening import open_store

    settings = settings_for(db)
    refuse_missing(settings)
    store = open_store(
        settings.db, queue_size=1, normal=normal_answer, seal=settings.seal, seal_folder=settings.seal_folder
    )
    fault = store.fault
    store.close()
    if fault:
        raise click.ClickException(printable(fault))
    found = {"database": settings.place, "schema": "current"}
    printed(found, as_json=as_json, text=lambda: mapping(found))


@click.command()
@click.argument("destination", type=click.Path(dir_okay=False, path_type=Path))
@database_file
def backup(destination: Path, db: str | None, *, as_json: bool) -> None:
    """Copy the database to DESTINATION while it is in use, and check the copy."""
    from optillm_memory.store.maintenance import backup as copies

    source, started = file_of(settings_for(db)), time.monotonic()
    with progress() as told:
        copies.backup(source, destination, progress=lambda done, total: told(f"{done} of {total} pages"))
    found = {
        "path": str(destination), "bytes": destination.stat().st_size, **copies.counts_of(destination),
        "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    printed(found, as_json=as_json, text=lambda: mapping(found))


@click.command()
@click.option("--trace", "trace_id", help="One request.")
@click.option("--episode", "episode_id", help="All requests of an episode.")
@click.option("--memory", "memory_id", help="What a memory rests on, and so the memory.")
@click.option("--namespace", help="All of a namespace.")
@click.option("--user-id", help="All of a user.")
@click.option("--agent-id", help="All of an agent.")
@click.option("--tenant", help="Of this tenant alone.")
@click.option("--older-than", "days", type=click.FloatRange(min=0), help="What is older than so many days.")
@click.option("--with-set-aside", is_flag=True, help="Also delete earlier databases that are kept because corrupt.")
@click.option("--dry-run", is_flag=True, help="Only say how much it would be.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@database
def forget(
    db: str | None, *, days: float | None, with_set_aside: bool, dry_run: bool, yes: bool, as_json: bool, **named: Any
) -> None:
    """Delete for good what all the options given have in common, and wait until its bytes are out of all files."""
    from optillm_memory.store.maintenance.selection import Selection

    selection = Selection(**named, before=None if days is None else time.time() - days * _DAY_S)
    with opened(db, read_only=dry_run) as memory:
        counts = memory.counts(selection)
        if dry_run:
            printed(counts, as_json=as_json, text=lambda: mapping(counts))
            return
        if any(counts.values()) and not yes:
            say(mapping(counts))
            click.confirm("Delete this for good?", abort=True, err=True)
        with progress() as told:
            found = memory.forget(selection, with_set_aside=with_set_aside, progress=told)
    for line in found["left"]:
        say(line)
    printed(found, as_json=as_json, text=lambda: mapping(found))
    if found["left"]:
        sys.exit(1)


@click.command()
@click.option("--prune", is_flag=True, help="Delete the vectors of other encoders when all is embedded.")
@database
def reembed(db: str | None, *, prune: bool, as_json: bool) -> None:
    """Give every memory its vector by the encoder that is set; may be interrupted and run again."""
    found: dict[str, Any] = {}
    try:
        with opened(db, encoder=None) as memory, progress() as told:
            if memory.encoder.wait(1) == "loading":
                told("the encoder is being loaded")
                memory.encoder.wait(600)
            found["encoder"] = memory.encoder.fingerprint or memory.encoder.state
            if memory.encoder.state != "ready":
                reason = memory.encoder.reason or "OPTILLM_AGENT_MEMORY_ENCODER is `none`"
                raise click.ClickException(f"there is no encoder: {printable(reason)}")
            found["embedded"] = memory.reembed(progress=told)
            if prune:
                found["pruned"] = memory.prune_vectors()
                found["left"] = memory.compact(progress=told)
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; what was embedded is kept: run it again to go on") from None
    printed(found, as_json=as_json, text=lambda: mapping(found))


@click.command()
@database
def compact(db: str | None, *, as_json: bool) -> None:
    """Rewrite the database without what was deleted, and give the disk space back; others wait meanwhile."""
    with opened(db) as memory, progress() as told:
        before = memory.stats()["bytes"]
        left = memory.compact(progress=told)
        found = {"bytes_before": before, "bytes": memory.stats()["bytes"], "left": left}
    for line in left:
        say(line)
    printed(found, as_json=as_json, text=lambda: mapping(found))
    if left:
        sys.exit(1)


@click.command()
@click.option("--accept", is_flag=True, help="Seal everything as it is found; what was wrong is settled.")
@click.option("--new-key", is_flag=True, help="Seal everything as it is found, with a new key.")
@click.option("--remove", is_flag=True, help="Take the seal off, and delete its key.")
@database_file
def seal(db: str | None, *, accept: bool, new_key: bool, remove: bool, as_json: bool) -> None:
    """Compare every row with the seal, or seal a database; exit with 1 where it was changed from outside."""
    from optillm_memory.learn.outcomes import normal_answer
    from optillm_memory.store.sqlite.store import SqliteStore

    if accept + new_key + remove > 1:
        raise click.UsageError("use one of --accept, --new-key and --remove")
    settings = settings_for(db)
    path, changes = file_of(settings), accept or new_key or remove
    with contextlib.closing(
        SqliteStore(path, normal=normal_answer, read_only=not changes, seal_folder=settings.seal_folder)
    ) as store:
        wrong = store.check_seal()
        if remove:
            store.remove_seal()
        elif changes:
            store.accept_seal(new_key=new_key)
        found = {**store.described_seal(), "wrong": [] if changes else wrong, "accepted": wrong if changes else []}
    printed(found, as_json=as_json, text=lambda: mapping(found))
    if found["wrong"]:
        sys.exit(1)


COMMANDS: tuple[click.Command, ...] = (verify, seal, migrate, backup, forget, compact, reembed)
