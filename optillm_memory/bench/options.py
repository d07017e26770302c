"""What the bench commands share: their options, the progress bar, and messages on standard error."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from optillm_memory.bench.report import Output
from optillm_memory.conversation.printable import printable

Decorator = Callable[[Callable[..., None]], Callable[..., None]]
SUPPORT_TASKS = "support_tasks.jsonl"


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--output` and `--json`; the command gets both as one `output` and writes its report to it."""

    @functools.wraps(command)
    def wrapped(*args: Any, output_file: Path | None, as_json: bool, **kwargs: Any) -> None:
        command(*args, output=Output(output_file, as_json), **kwargs)

    json_flag = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
    file = click.option(
        "--output", "output_file", type=click.Path(dir_okay=False, path_type=Path), callback=_in_a_folder,
        help="Write the figures to this file, as JSON.",
    )  # fmt: skip
    return file(json_flag(wrapped))


def _in_a_folder(_ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():  # found out now, not after an hour of measuring
        raise click.BadParameter(f"there is no folder {path.parent}")
    return path


def data_file(help_: str, name: str = "--data") -> Decorator:
    """Add an option for a file of the user's own."""
    return click.option(name, type=click.Path(exists=True, dir_okay=False, path_type=Path), help=help_)


def numbers(name: str, default: str, help_: str) -> Decorator:
    """Add an option for whole numbers with commas between them."""
    return click.option(
        name, default=default, show_default=True, callback=_split, metavar="N,N,…", help=f"{help_}, with commas."
    )


def _split(_ctx: click.Context, _param: click.Parameter, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter("give whole numbers with commas between them") from None


def max_error(default: float | None, help_: str = "Largest error at which the gate may serve an answer.") -> Decorator:
    """Add the option for the error that reuse may have."""
    share = click.FloatRange(0, 1, min_open=True, max_open=True)
    return click.option("--max-error", type=share, default=default, show_default=default is not None, help=help_)


seeded: Decorator = click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
limited: Decorator = click.option("--limit", type=click.IntRange(1), help="Largest number of tasks.")
tasks_file = data_file("Tasks, one JSON object with `input` and `output` per line [default: the support tasks].")


def name_of(data: Path | None, default: str = SUPPORT_TASKS) -> str:
    """Return the name of the data that was measured with, for the report."""
    return data.name if data else default


def progress(length: int, label: str) -> Any:
    """Return a progress bar on standard error, so that the figures stay alone on standard output."""
    return click.progressbar(length=length, label=label, file=sys.stderr)


def say(text: str) -> None:
    """Print a message on standard error."""
    click.echo(printable(text), err=True)
