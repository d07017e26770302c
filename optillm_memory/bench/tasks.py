"""Tasks with a known answer, for the demo and the benches: our own, or any JSONL file of their shape."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optillm_memory.errors import InvalidField

if TYPE_CHECKING:
    from collections.abc import Sequence

SUPPORT_TASKS = Path(__file__).with_name("support_tasks.jsonl")


@dataclass(frozen=True, slots=True)
class Task:
    """One request and its right answer."""

    input: str
    output: str


def load_tasks(path: Path | None = None) -> list[Task]:
    """Read tasks from a JSONL file with the fields `input` and `output`; without a path, the support tasks.

    Further fields are ignored, and so are empty lines. Raises InvalidField, naming the field with its
    file and line, for a bad row and for a file without rows, and OSError where the file cannot be read.
    """
    file = path or SUPPORT_TASKS
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidField("file", f"{file} is not UTF-8 text: {error}") from error
    # Not splitlines: JSON strings may hold U+2028 and the like unescaped.
    tasks = [
        _task(line, f"{file}, line {number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not tasks:
        raise InvalidField("file", f"{file} holds no rows")
    return tasks


def shuffled(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Give the tasks in an order that depends on the seed alone."""
    order = list(tasks)
    random.Random(seed).shuffle(order)
    return order


def _task(line: str, place: str) -> Task:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InvalidField("row", f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidField("row", f"{place} is not a JSON object")
    return Task(input=_text(row, "input", place), output=_text(row, "output", place))


def _text(row: dict[str, Any], name: str, place: str) -> str:
    if name not in row:
        raise InvalidField(name, f"missing in {place}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise InvalidField(name, f"must be a text that is not empty in {place}, but is {value!r:.80}")
    return value
