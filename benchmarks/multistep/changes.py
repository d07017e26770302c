"""Changed environments: one episode in an environment that is not the one in which memory learned.

    with opened(path) as memory:
        warm(memory, "cancel_order", range(10))
        found = changed(memory, "cancel_order", 3, Change("refusal", "get_order_details"))
        assert not found.served_after_mismatch

`CHANGES` holds a change of every kind with a family that it concerns.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.multistep.episode import Course, run_episode
from benchmarks.multistep.families import FAMILIES
from benchmarks.multistep.passes import NAMESPACE, serving
from benchmarks.multistep.policy import Agent
from benchmarks.multistep.task import Family, Task
from benchmarks.multistep.world import Change
from optillm_memory.memory import Memory

CHANGES = (
    ("cancel_order", Change("tool_renamed", "get_order_details")),
    ("track_parcel", Change("tool_renamed", "get_tracking")),
    ("warranty", Change("tool_renamed", "get_device")),
    ("late", Change("column_dropped")),
    ("spent", Change("column_dropped")),
    ("dearest", Change("column_dropped")),
    ("return_item", Change("id_gone")),
    ("route_ticket", Change("id_gone")),
    ("warranty", Change("id_gone")),
    ("gift_card", Change("refusal", "get_gift_card")),
    ("unlock_account", Change("refusal", "get_account")),
    ("spent", Change("refusal", "sql")),
)


def family_named(name: str) -> Family:
    """Return a family by its name. Raises KeyError."""
    return {family.name: family for family in FAMILIES}[name]


def warm(memory: Memory, name: str, numbers: Iterable[int], *, max_error: float | None = None, seed: str = "w") -> None:
    """Do tasks of a family in an unchanged environment; with `max_error` memory may serve actions."""
    family = family_named(name)
    options = {"namespace": NAMESPACE, **(serving(family.domain, max_error) if max_error else {})}
    for number in numbers:
        run_episode(Task(family, number), Agent(f"{seed}/{number}"), memory, options)
    memory.settle()


def changed(
    memory: Memory, name: str, number: int, change: Change, *, max_error: float = 0.05, follow: float = 1.0
) -> Course:
    """Do one task in a changed environment, with leave to serve actions.

    See `Course`: `mismatch` is the first step that was not as it would have been, `served_after_mismatch` what memory
    served all the same after it; `served` tells of each action whether its tool was offered at all.
    """
    family = family_named(name)
    options = {"namespace": NAMESPACE, **serving(family.domain, max_error)}
    course = run_episode(Task(family, number), Agent("changed", follow), memory, options, change=change)
    memory.settle()
    return course
