"""All families of tasks."""

from __future__ import annotations

from benchmarks.multistep import database, desk, shop
from benchmarks.multistep.task import Family, Task

FAMILIES: tuple[Family, ...] = (*shop.FAMILIES, *desk.FAMILIES, *database.FAMILIES)


def tasks(first: int, count: int, families: tuple[Family, ...] = FAMILIES) -> list[Task]:
    """Return this many tasks of each family, numbered from `first`."""
    return [Task(family, number) for family in families for number in range(first, first + count)]
