"""What the commands share: options, opening the database, printing results."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from optillm_memory.cli.render import mapping
from optillm_memory.conversation.printable import printable, printable_json
from optillm_memory.errors import NotFound
from optillm_memory.memory import Memory
from optillm_memory.records import Scope
from optillm_memory.settings import Settings, is_url
from optillm_memory.store.sqlite.connection import DatabaseError

Command = Callable[..., None]
ENCODER_S = 120.0  # at most, to load the encoder
_LINE_EVERY_S = 2.0
_OUTPUT = "optillm_memory.output"  # in the context: the file of --output


def printing(command: Command) -> Command:
    """Add `--json` and `--output` to a command that ends with `printed`."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return click.option(
        "--output", type=click.Path(dir_okay=False, path_type=Path), callback=_keep_output, expose_value=False,
        help="Also write the result to this file, as JSON.",
    )(command)  # fmt: skip


def _keep_output(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}")
    ctx.meta[_OUTPUT] = path


def printed(value: Any, *, as_json: bool, text: Callable[[], str] | None) -> None:
    """Print a result as JSON or as text (nothing if `text` is None), and write it to the file of `--output`."""
    rendered = printable_json(value)
    if (path := click.get_current_context().meta.get(_OUTPUT)) is not None:
        path.write_text(f"{rendered}\n", encoding="utf-8")
    if as_json:
        click.echo(rendered)
    elif text is not None:
        say(text(), err=False)


def say(text: str, *, err: bool = True) -> None:
    """Print a text for people, on standard error where it is no result; what it holds cannot act on the terminal."""
    click.echo(printable(text), err=err)


def database(command: Command, kinds: str = "a file or a postgresql:// URL") -> Command:
    """Add the options of a command on a database: `--db`, `--json` and `--output`."""
    return click.option(
        "--db", type=click.Path(dir_okay=False), default=None,
        help=f"The database: {kinds} [default: OPTILLM_AGENT_MEMORY_DB or ~/.optillm/agent_memory.db].",
    )(printing(command))  # fmt: skip


def database_file(command: Command) -> Command:
    """Add the same options to a command that works on files only."""
    return database(command, "a file; for a server use pg_dump, or optillm-memory copy")


def reading(
    text: Callable[[Any], str] = mapping, *, encoder: str | None = "none"
) -> Callable[[Callable[..., Any]], Command]:
    """Turn a function of a memory into a command: it opens the database for reading and prints what is returned.

    `text` renders the result for people. With `encoder` None the encoder from the settings is loaded first.
    """

    def decorate(function: Callable[..., Any]) -> Command:
        @database
        @functools.wraps(function)
        def command(*, db: str | None, as_json: bool, **options: Any) -> None:
            with opened(db, encoder=encoder, read_only=True) as memory:
                if encoder is None:
                    memory.encoder.wait(ENCODER_S)
                found = function(memory, **options)
            printed(found, as_json=as_json, text=lambda: text(found))

        return command

    return decorate


def limited(default: int, help_: str = "Largest number of results.") -> Callable[[Callable[..., Any]], Any]:
    """Add the option `--limit`."""
    return click.option("--limit", type=click.IntRange(1), default=default, show_default=True, help=help_)


def scoped(command: Command) -> Command:
    """Add the options that make up a scope."""
    for name, default in (("agent-id", ""), ("user-id", ""), ("namespace", "default")):
        command = click.option(f"--{name}", default=default, help=f"The scope's {name.replace('-', '_')}.")(command)
    return click.option(
        "--tenant", default=None, help="The scope's tenant [default: the only one that has the namespace]."
    )(command)


def opened(db: str | None, *, encoder: str | None = "none", make: bool = False, read_only: bool = False) -> Memory:
    """Open the memory that a command works on; `encoder` None uses the one from the settings.

    Raises NotFound if there is no such database, unless the command may `make` one: a mistyped name makes no file.
    """
    settings = settings_for(db, encoder=encoder)
    if not make:
        refuse_missing(settings)
    return Memory(settings, read_only=read_only)


def refuse_missing(settings: Settings) -> None:
    """Raise NotFound if there is no database file, or no memory on the server."""
    if not _is_there(settings):
        what = "no memory on" if is_url(settings.db) else "no database"
        raise NotFound(f"there is {what} {settings.place}; optillm creates it when it serves, --db selects another")


def _is_there(settings: Settings) -> bool:
    if not is_url(settings.db):
        return settings.path.is_file()
    from optillm_memory.store.postgres.schema import is_there

    try:
        return is_there(settings.db)
    except DatabaseError:
        return True  # opening it reports what is wrong


def settings_for(db: str | None, *, encoder: str | None = None) -> Settings:
    """Return the settings from the environment; options outrank them."""
    overrides: dict[str, Any] = {"db": db, "encoder": encoder}
    return Settings.from_env(**{name: value for name, value in overrides.items() if value})


def file_of(settings: Settings) -> Path:
    """Return the database file. Raises ClickException for a server, NotFound if there is no file."""
    if is_url(settings.db):
        raise click.ClickException(
            f"{settings.place} is a server: use pg_dump, or optillm-memory copy, which copies it to a file"
        )
    refuse_missing(settings)
    return settings.path


def scope_named(memory: Memory, tenant: str | None, namespace: str, user_id: str, agent_id: str) -> Scope:
    """Return the scope from the options."""
    tenants = [tenant] if tenant is not None else memory.tenants(namespace)
    if len(tenants) > 1:
        names = printable(", ".join(tenants))
        raise click.UsageError(f"several tenants have this namespace; choose one with --tenant: {names}")
    return Scope(tenants[0] if tenants else "", namespace, user_id, agent_id)


@contextlib.contextmanager
def progress(*, every_s: float = _LINE_EVERY_S) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a command's progress on standard error.

    On a terminal it is one changing line that disappears at the end. In a log it is a line every few seconds, and the
    last one.
    """
    terminal = sys.stderr.isatty()
    shown_at, last = -math.inf, ""

    def show(line: str) -> None:
        nonlocal shown_at, last
        if terminal:
            click.echo(f"\r\x1b[K{printable(line)}", err=True, nl=False)
        elif time.monotonic() - shown_at >= every_s:
            say(line)
            shown_at, line = time.monotonic(), ""
        last = line

    try:
        yield show
    finally:
        if terminal and last:
            click.echo("\r\x1b[K", err=True, nl=False)
        elif last:
            say(last)
