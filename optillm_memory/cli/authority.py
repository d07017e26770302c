"""Who may do what: the operator's secret, and the reporters whose feedback is taken for evidence."""

from __future__ import annotations

import secrets
import time
from typing import Any

import click

from optillm_memory.cli.common import database, opened, printed, printing, reading, refuse_missing, settings_for
from optillm_memory.cli.render import mapping
from optillm_memory.memory import Memory


@click.command("operator-key")
@database
def operator_key(db: str | None, *, as_json: bool) -> None:
    """Print the secret that makes its sender the operator over HTTP, in the header X-Agent-Memory-Operator."""
    from optillm_memory.host.credentials import operator_key_path, read_operator_key

    settings = settings_for(db)
    refuse_missing(settings)
    key = read_operator_key(settings)
    if not key:
        raise click.ClickException(f"there is no {operator_key_path(settings)}; the server makes it when it starts")
    printed({"operator_key": key}, as_json=as_json, text=lambda: key)


@click.group()
def reporters() -> None:
    """Show whose feedback there is, and take back all that came of a reporter's."""


@reporters.command()
@click.argument("name")
@printing
def key(name: str, *, as_json: bool) -> None:
    """Print a new key for NAME, and what the file of reporters (or of tenants) is to hold of it; nothing is kept."""
    from optillm_memory.host.credentials import digest_of

    made = secrets.token_urlsafe(32)
    found = {"key": made, "file": {name: f"sha256:{digest_of(made)}"}}
    printed(found, as_json=as_json, text=lambda: mapping(found))


def _lines(found: list[dict[str, Any]]) -> str:
    rows = []
    for each in found:
        last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["last_at"]))
        rows.append(f"{each['reporter']:24} {each['feedback']:8}  {last}{'  revoked' if each['revoked'] else ''}")
    return "\n".join(rows) or "no reporters"


@reporters.command("list")
@reading(_lines)
def listed(memory: Memory) -> Any:
    """List the reporters of feedback: how much they said, when last, and who was revoked."""
    return memory.reporters()


@reporters.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@database
def revoke(name: str, db: str | None, *, yes: bool, as_json: bool) -> None:
    """Take back for good all that came of the feedback of the reporter NAME, and accept none any more."""
    with opened(db) as memory:
        if not yes:
            click.confirm(f"Take back all that {name} reported, for good?", abort=True, err=True)
        found = memory.revoke(name)
    printed(found, as_json=as_json, text=lambda: mapping(found))


COMMANDS: tuple[click.Command, ...] = (operator_key, reporters)
