"""The command that moves a store to another database."""

from __future__ import annotations

import click

from optillm_memory.cli import render
from optillm_memory.cli.common import printed, progress


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def copy(source: str, target: str, *, as_json: bool) -> None:
    """Copy everything from SOURCE to an empty TARGET, files or postgresql:// URLs, and check the copy."""
    from optillm_memory.store.maintenance.copying import copy as copied

    with progress() as told:
        found = copied(source, target, lambda table, done, total: told(f"{table}: {done} of {total} rows"))
    printed(found, as_json=as_json, text=lambda: render.mapping(found))
