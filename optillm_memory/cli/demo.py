"""`optillm-memory demo`: the main job on an embedded model, with no key and no network."""

from __future__ import annotations

import click


@click.command()
def demo() -> None:
    """Show it."""
