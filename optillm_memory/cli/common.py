"""What the commands share: their options, the memory they open, how they print."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from optillm_memory.errors import NotFound
from optillm_memory.memory import Memory
from optillm_memory.records import Scope
from optillm_memory.settings import Settings, is_url
from optillm_memory.store.sqlite.connection import DatabaseError

_TELL_EVERY_S = 2.0


def database(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command on the database has."""
    return _with_database(command, "a file or a postgresql:// URL")


def database_file(command: Callable[..., None]) -> Callable[..., None]:
    """Add them to a command that works on files only."""
    return _with_database(command, "a file; for a server use pg_dump, or optillm-memory copy")


def _with_database(command: Callable[..., None], kinds: str) -> Callable[..., None]:
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return click.option(
        "--db", type=click.Path(dir_okay=False), default=None,
        help=f"The database: {kinds} [default: OPTILLM_AGENT_MEMORY_DB or ~/.optillm/agent_memory.db].",
    )(command)  # fmt: skip


def scoped(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a scope."""
    for name, default in (("agent-id", ""), ("user-id", ""), ("namespace", "default")):
        command = click.option(f"--{name}", default=default, help=f"The scope's {name.replace('-', '_')}.")(command)
    return click.option(
        "--tenant", default=None, help="The scope's tenant [default: the only one that has the namespace]."
    )(command)


def opened(db: str | None, *, encoder: str | None = "none", make: bool = False) -> Memory:
    """Open the memory that a command works on; `encoder` None takes the one that is set.

    Raises NotFound where there is none: only a command that may `make` one takes a mistyped name for a new file.
    """
    settings = settings_for(db, encoder=encoder)
    if not make:
        refuse_missing(settings)
    return Memory(settings)


def refuse_missing(settings: Settings) -> None:
    """Raise NotFound where there is no database file, or no memory on the server."""
    if not _is_there(settings):
        what = "no memory on" if is_url(settings.db) else "no database"
        raise NotFound(f"there is {what} {settings.place}; optillm makes it when it serves, --db names another")


def _is_there(settings: Settings) -> bool:
    if not is_url(settings.db):
        return settings.path.is_file()
    from optillm_memory.store.postgres.schema import is_there

    try:
        return is_there(settings.db)
    except DatabaseError:
        return True  # what is wrong with it is told by whoever opens it


def settings_for(db: str | None, *, encoder: str | None = None) -> Settings:
    """Return the settings from the environment, with what an option names."""
    overrides: dict[str, Any] = {"db": db, "encoder": encoder}
    return Settings.from_env(**{name: value for name, value in overrides.items() if value})


def file_of(settings: Settings) -> Path:
    """Return the database file. Raises ClickException for a server, NotFound where there is none."""
    if is_url(settings.db):
        raise click.ClickException(
            f"{settings.place} is a server: use pg_dump, or optillm-memory copy, which copies it to a file"
        )
    refuse_missing(settings)
    return settings.path


def scope_named(memory: Memory, tenant: str | None, namespace: str, user_id: str, agent_id: str) -> Scope:
    """Return the scope that the options name."""
    tenants = [tenant] if tenant is not None else memory.store.tenants(namespace)
    if len(tenants) > 1:
        raise click.UsageError(f"several tenants have this namespace; name one with --tenant: {', '.join(tenants)}")
    return Scope(tenants[0] if tenants else "", namespace, user_id, agent_id)


def printed(value: Any, *, as_json: bool, text: Callable[[], str]) -> None:
    """Print a result for people, or as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str) if as_json else text())


@contextlib.contextmanager
def progress(*, every_s: float = _TELL_EVERY_S) -> Iterator[Callable[[str], None]]:
    """Give what shows how far a command has come, on stderr: what is printed stays as it is.

    On a terminal it is one line that changes and is gone at the end. Where a log is written it is a line now and then,
    and the last.
    """
    terminal = sys.stderr.isatty()
    told_at, last = -math.inf, ""

    def told(line: str) -> None:
        nonlocal told_at, last
        if terminal:
            click.echo(f"\r\x1b[K{line}", err=True, nl=False)
        elif time.monotonic() - told_at >= every_s:
            click.echo(line, err=True)
            told_at, line = time.monotonic(), ""
        last = line

    try:
        yield told
    finally:
        if terminal and last:
            click.echo("\r\x1b[K", err=True, nl=False)
        elif last:
            click.echo(last, err=True)
