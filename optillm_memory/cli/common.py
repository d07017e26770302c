"""What the commands share: their options, the memory they open, how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from optillm_memory.memory import Memory
from optillm_memory.records import Scope
from optillm_memory.settings import Settings, is_url


def database(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command on the database has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return click.option(
        "--db", type=click.Path(dir_okay=False), default=None,
        help="The database: a file or a postgresql:// URL "
        "[default: OPTILLM_AGENT_MEMORY_DB or ~/.optillm/agent_memory.db].",
    )(command)  # fmt: skip


def scoped(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a scope."""
    for name, default in (("agent-id", ""), ("user-id", ""), ("namespace", "default")):
        command = click.option(f"--{name}", default=default, help=f"The scope's {name.replace('-', '_')}.")(command)
    return click.option(
        "--tenant", default=None, help="The scope's tenant [default: the only one that has the namespace]."
    )(command)


def opened(db: str | None, *, encoder: str | None = "none") -> Memory:
    """Open the memory that a command works on; `encoder` None takes the one that is set."""
    return Memory(settings_for(db, encoder=encoder))


def settings_for(db: str | None, *, encoder: str | None = None) -> Settings:
    """Return the settings from the environment, with what an option names."""
    overrides: dict[str, Any] = {"db": db, "encoder": encoder}
    return Settings.from_env(**{name: value for name, value in overrides.items() if value})


def file_of(settings: Settings) -> Path:
    """Return the database file. Refuses a server: it has tools of its own."""
    if is_url(settings.db):
        raise click.ClickException(
            f"{settings.place} is a server; use its own tools (pg_amcheck, pg_dump), or copy it to a file: "
            "optillm-memory copy"
        )
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


def told(line: str) -> None:
    """Show progress where a person looks on, without touching what is printed; an empty line takes it away."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{line}", err=True, nl=False)
