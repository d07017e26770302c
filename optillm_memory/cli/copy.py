"""The command that copies a store to another database."""

from __future__ import annotations

import click

from optillm_memory.cli.common import printed, printing, progress
from optillm_memory.cli.render import mapping


@click.command()
@click.argument("source")
@click.argument("target")
@printing
def copy(source: str, target: str, *, as_json: bool) -> None:
    """Copy everything from SOURCE to an empty TARGET, files or postgresql:// URLs, and check the copy."""
    from optillm_memory.store.maintenance.copying import copy as copied

    with progress() as show:
        found = copied(source, target, lambda table, done, total: show(f"{table}: {done} of {total} rows"))
    printed(found, as_json=as_json, text=lambda: mapping(found))
