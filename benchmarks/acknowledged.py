"""Check that a database file has all feedback that it acknowledged: undamaged, once each, and learned as logged."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from typing_extensions import Self

from optillm_memory.errors import AgentMemoryError
from optillm_memory.memory import Memory
from optillm_memory.settings import Settings
from optillm_memory.store.sqlite.connection import DatabaseError, connect


@dataclass
class Faults:
    """The faults of a file after a test; all zero if there are none."""

    lost: int = 0  # acknowledged, but missing
    doubled: int = 0  # stored or learned more than once
    corrupt: int = 0  # files that fail SQLite's own check, cannot be opened, or were set aside
    differing: int = 0  # files whose learned state differs from a rebuild of their log

    def __add__(self, other: Self) -> Faults:
        """Return the sum of both."""
        return Faults(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def opened(path: Path) -> Memory:
    """Open a memory without an encoder and without a holdout."""
    return Memory(Settings(db=str(path), encoder="none", holdout=0.0))


def damage(path: Path) -> Faults:
    """Check the file itself with SQLite's own check."""
    aside = list(path.parent.glob(f"{path.name}.corrupt-*"))
    return Faults(corrupt=int(bool(aside) or (path.exists() and integrity(path) != "ok")))


def check(path: Path, acknowledged: Mapping[str, str]) -> Faults:
    """Check a file that no process uses against what it acknowledged: feedback ids with their traces' ids.

    Every task was asked once, so each memory must have one success.
    """
    found = damage(path)
    with opened(path) as memory:
        if memory.store.fault:
            return found + Faults(lost=len(acknowledged), corrupt=1)
        present = _feedback_in(path)
        found += Faults(
            lost=sum(not present[pair] for pair in acknowledged.items()), doubled=sum(n > 1 for n in present.values())
        )
        learned = memory.store.list_memories(None, limit=1 << 40)
        found += Faults(doubled=sum(record.successes > 1 for record in learned))
        before = memory.store.derived()
        try:
            memory.rebuild()
        except AgentMemoryError:
            return found + Faults(corrupt=1)
        return found + Faults(differing=int(memory.store.derived() != before))


def request(memory: Memory, task: str) -> str:
    """Run a request through memory; return its trace's id."""
    turn = memory.begin({"model": "m", "messages": [{"role": "user", "content": task}]})
    memory.finish(turn, {"choices": [{"message": {"role": "assistant", "content": f"done: {task}"}}]})
    return turn.trace_id


def send_feedback(memory: Memory, trace_id: str) -> str:
    """Report success of a request; return the id of the feedback, which is now acknowledged."""
    (receipt,) = memory.feedback({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"})
    return receipt.feedback_id


def integrity(path: Path) -> str:
    """Return the result of SQLite's own check: `ok`, or the fault.

    The connection may write: a journal that a crash left is rolled back first, as at any start.
    """
    try:
        with contextlib.closing(connect(path)) as db:
            return str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except DatabaseError as error:
        return str(error)


def _feedback_in(path: Path) -> Counter[tuple[str, str]]:
    """Return how often each feedback is stored with its trace: (feedback id, trace id)."""
    with contextlib.closing(connect(path)) as db:
        return Counter(db.execute("SELECT feedback_id, trace_id FROM feedback JOIN traces USING (trace_id)"))
