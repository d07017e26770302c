"""Tasks with a known answer, for the demo and the benches: the support tasks, or any JSONL file of the same shape."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optillm_memory.bench.rows import read_rows, text_field

SUPPORT_TASKS = Path(__file__).with_name("support_tasks.jsonl")


@dataclass(frozen=True, slots=True)
class Task:
    """One request and its right answer."""

    input: str
    output: str


def load_tasks(path: Path | None = None) -> list[Task]:
    """Read tasks from a JSONL file with the fields `input` and `output`; without a path, the support tasks.

    Further fields are ignored, and so are empty lines. Raises InvalidField, naming the field with its file and line,
    for a bad row and for a file without rows, and OSError where the file cannot be read.
    """
    rows = read_rows(path or SUPPORT_TASKS)
    return [Task(text_field(row, "input", place), text_field(row, "output", place)) for row, place in rows]


def shuffled(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Return the tasks in an order that depends on the seed alone."""
    order = list(tasks)
    random.Random(seed).shuffle(order)
    return order
