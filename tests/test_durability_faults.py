"""A disk that is full, fails or may not be written, a writer that stands still, a file that others lock."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import apsw
import pytest
from builders import body, lexical_memory, response, teach
from faults import asides, known, served, told

from benchmarks.acknowledged import integrity
from benchmarks.faultdisk import Disk, on
from optillm_memory import Memory, StoreUnavailable
from optillm_memory.store.sqlite import connection as store_connection
from optillm_memory.store.transaction import Transaction


class Trouble:
    """What a disk meets with: an error for some operations, on files whose names end so, while it lasts."""

    def __init__(self) -> None:
        """Start without any."""
        self.error: Exception | None = None
        self.operations: tuple[str, ...] = ()
        self.suffix = ""
        self.met = 0

    def begin(self, error: Exception, *operations: str, suffix: str = "") -> None:
        """Let these operations fail from now on."""
        self.error, self.operations, self.suffix, self.met = error, operations, suffix, 0

    def end(self) -> None:
        """Let all be well again."""
        self.error = None

    def __call__(self, operation: str, path: str) -> None:
        """Meet an operation."""
        if self.error is not None and operation in self.operations and path.endswith(self.suffix):
            self.met += 1
            raise self.error


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    """Give the trouble of the disk that every connection of the test's store goes through."""
    made = Trouble()
    disk = Disk(made)
    with on(disk):
        yield made
    disk.unregister()


FULL, EIO, READ_ONLY = apsw.FullError("full"), apsw.IOError("EIO"), apsw.ReadOnlyError("read-only")


@pytest.mark.parametrize(
    ("error", "operations", "suffix"),
    [
        (FULL, ("write", "truncate"), ""),
        (FULL, ("write", "truncate"), "-wal"),
        (EIO, ("write",), ""),
        (EIO, ("sync",), ""),
        (EIO, ("read", "write", "truncate", "sync", "open", "delete"), ""),
        (READ_ONLY, ("write", "truncate"), ""),
    ],
    ids=["full", "full-wal", "eio-write", "eio-sync", "eio-all", "read-only"],
)
def test_a_disk_that_fails(
    tmp_path: Path, trouble: Trouble, error: Exception, operations: tuple[str, ...], suffix: str
) -> None:
    """Requests are served, nothing is acknowledged meanwhile, what was before is there; then writing goes on."""
    with lexical_memory(tmp_path) as memory:
        before = teach(memory, "a task of before", "done")
        waiting = served(memory, "a task that feedback waits for")
        memory.settle()
        trouble.begin(error, *operations, suffix=suffix)
        for number in range(5):
            served(memory, f"a task {number} of meanwhile")
            with pytest.raises(StoreUnavailable):
                told(memory, waiting)
        assert trouble.met
        trouble.end()
        assert told(memory, waiting, within_s=10) == "applied"
        assert memory.store.fault == ""
        after = teach(memory, "a task of after", "done")
        assert known(memory, before, waiting, after)
    assert integrity(tmp_path / "memory.db") == "ok"
    assert asides(tmp_path) == []
    with lexical_memory(tmp_path) as memory:
        assert known(memory, before, waiting, after)


def test_a_checkpoint_that_fails_costs_nothing(
    tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the WAL cannot be copied into the database it grows, and every acknowledged feedback is kept in it."""
    monkeypatch.setattr("optillm_memory.store.sqlite.writer.WAL_BYTES", 40_000)
    with lexical_memory(tmp_path) as memory:
        memory.settle()
        trouble.begin(EIO, "write", "sync", suffix="memory.db")
        turns = [teach(memory, f"a task {number}", "done") for number in range(20)]
        assert trouble.met
        trouble.end()
        assert known(memory, *turns)
    assert integrity(tmp_path / "memory.db") == "ok"
    with lexical_memory(tmp_path) as memory:
        assert known(memory, *turns)


def test_a_disk_whose_reads_fail_serves_requests_without_memory(tmp_path: Path, trouble: Trouble) -> None:
    """A read that fails is named as a fault of memory; the next one after the trouble finds everything again."""
    with lexical_memory(tmp_path) as memory:
        turn = teach(memory, "a task", "done")
        memory.store._readers.close()
        trouble.begin(EIO, "read", "open")
        served(memory, "a task")
        with pytest.raises(Exception, match="cannot read"):
            memory.stats()
        trouble.end()
        assert known(memory, turn)
        assert asides(tmp_path) == []


def paused(memory: Memory) -> Callable[[], None]:
    """Have the writer stand still inside an operation; return what lets it go on."""
    inside, go_on = threading.Event(), threading.Event()

    def stand(_tx: Transaction) -> None:
        inside.set()
        go_on.wait(60)

    memory.store.post(stand)
    assert inside.wait(10)
    return go_on.set


def test_a_writer_that_stands_still(tmp_path: Path) -> None:
    """Requests are served, the queue is bounded, feedback is refused after its limit, and nothing of it is lost."""
    with lexical_memory(tmp_path, queue_size=40) as memory:
        turn = served(memory, "a task")
        memory.settle()
        go_on = paused(memory)
        said = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
        receipts = memory.submit_feedback(said)
        with pytest.raises(FutureTimeoutError):
            receipts(0.05)
        for number in range(60):
            served(memory, f"a task {number} of meanwhile")
        with pytest.raises(StoreUnavailable, match="too many"):
            memory.submit_feedback(said)
        assert 0 < memory.store.lost < 60
        go_on()
        assert receipts(10)[0].status == "applied"
        assert told(memory, turn) == "applied"
        assert memory.stats()["traces"] + memory.store.lost == 61


def test_closing_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that hangs with a full queue keeps nobody from leaving."""
    monkeypatch.setattr("optillm_memory.store.writer._CLOSING_S", 0.05)
    memory = lexical_memory(tmp_path, queue_size=1)
    writer: Any = memory.store._writer
    until = time.monotonic() + 60
    while writer._queue.qsize() and time.monotonic() < until:
        time.sleep(0.01)  # the first read has the writer look at its file
    go_on = paused(memory)
    memory.finish(memory.begin(body("a task")), response("done"))
    memory.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        memory.feedback({"trace_id": "t", "metric": "success", "value": True, "source": "code"})
    go_on()


LOCKS = """
import sys
from sqlite_utils.utils import sqlite3
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.readline()
db.execute("ROLLBACK")
"""


def test_a_file_that_another_process_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the writer waits: requests are served, feedback is refused, and all is well when it lets go."""
    monkeypatch.setattr(store_connection, "BUSY_TIMEOUT_S", 0.1)
    with lexical_memory(tmp_path) as memory:
        turn = teach(memory, "a task", "done")
        waiting = served(memory, "a task that feedback waits for")
        memory.settle()
        other = subprocess.Popen(
            [sys.executable, "-c", LOCKS, str(tmp_path / "memory.db")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert memory.recall("a task")  # who reads is not kept waiting
        served(memory, "a task of meanwhile")
        for _ in range(8):  # however often: what nobody waits for is kept meanwhile, and keeps nobody waiting
            with pytest.raises(StoreUnavailable, match="locked"):
                told(memory, waiting)
        other.communicate("let go\n")
        assert told(memory, waiting, within_s=10) == "applied"
        memory.settle()
        assert (memory.store.lost, memory.stats()["traces"]) == (0, 3)
        assert known(memory, turn, waiting)
