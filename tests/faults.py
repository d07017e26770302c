"""What the tests of faults ask of a memory: that requests are served as the host serves them, and what it knows."""

from __future__ import annotations

import time
from pathlib import Path

from builders import body, response

from optillm_memory import Memory, StoreUnavailable, Turn
from optillm_memory.host.failopen import FailOpen

DEADLINE_S = 5.0  # generous: what waits for a disk or for a lock waits longer


def served(memory: Memory, task: str) -> Turn:
    """Take a request through memory as the host does: within a deadline, and whatever fails there."""
    fail_open = FailOpen(DEADLINE_S)
    request = body(task)
    begun, _ = fail_open.call(lambda: memory.begin(request))
    assert "deadline" not in fail_open.faults
    turn = begun or memory.new_turn(request)
    assert fail_open.quietly(lambda: memory.finish(turn, response("done"))) == ""
    return turn


def told(memory: Memory, turn: Turn, *, within_s: float = 0.0) -> str:
    """Tell that a turn went well, again and again for so long while it is refused; return the status."""
    said = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
    until = time.monotonic() + within_s
    while True:
        try:
            return memory.feedback({**said, "feedback_id": f"on-{turn.trace_id}"})[0].status
        except StoreUnavailable:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def known(memory: Memory, *turns: Turn) -> bool:
    """Whether every turn is in the log with exactly one feedback, and was learned from."""
    learned = {record.task for record in memory.store.list_memories(None, limit=10_000) if record.successes == 1}
    return all(
        len(memory.trace(turn.trace_id)["feedback"]) == 1 and memory.trace(turn.trace_id)["task"] in learned
        for turn in turns
    )


def asides(folder: Path) -> list[Path]:
    """Return the databases that were set aside, without their journals."""
    return sorted(p for p in folder.glob("*.corrupt-*") if not p.name.endswith(("-wal", "-shm", "-journal")))
