"""Nothing is lost that was acknowledged: killed at random moments, and written by two processes at once."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from builders import lexical_memory

from optillm_memory.store.connection import sqlite3

# Imports once, then forks a child for each line on stdin: the child answers requests and prints each feedback's id
# and its trace's once both are acknowledged. A fork before any thread is safe, and costs no second import.
NURSERY = """
import os, sys
from optillm_memory import Memory, Settings

def work(path, name):
    memory = Memory(Settings(db=path, encoder="none", holdout=0))
    print("up", memory.store.fault or "ok", flush=True)
    number = 0
    while True:
        turns = []
        for _ in range(3):
            number += 1
            body = {"model": "m", "messages": [{"role": "user", "content": f"task {number} of {name}"}]}
            turns.append(memory.begin(body))
            memory.finish(turns[-1], {"choices": [{"message": {"role": "assistant", "content": f"done {number}"}}]})
        said = [{"trace_id": t.trace_id, "metric": "success", "value": True, "source": "code"} for t in turns]
        for turn, receipt in zip(turns, memory.feedback(said)):
            assert receipt.status == "applied", receipt
            os.write(1, f"{receipt.feedback_id} {turn.trace_id}\\n".encode())
        if number >= int(sys.argv[1]):
            memory.close()
            os._exit(0)

print("ready", flush=True)
for line in sys.stdin:
    path, name = line.split()
    child = os.fork()
    if child == 0:
        try:
            work(path, name)
        finally:
            os._exit(1)
    print("child", child, flush=True)
    if sys.argv[2] == "wait":
        os.waitpid(child, 0)
        print("ended", flush=True)
"""


class Nursery:
    """A process that forks workers on a database file."""

    def __init__(self, requests: int, *, wait: bool) -> None:
        """Start it; each worker ends by itself after so many requests."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(requests), "wait" if wait else "on"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in: IO[bytes] = self.process.stdin
        self._out: IO[bytes] = self.process.stdout
        assert self.line(30) == "ready"

    def fork(self, path: Path, name: str) -> int:
        """Start a worker that has opened the file; return its process id."""
        self._in.write(f"{path} {name}\n".encode())
        self._in.flush()
        first, second = sorted((self.line(20), self.line(20)))  # the two processes print in any order
        assert second == "up ok", second
        return int(first.removeprefix("child "))

    def line(self, timeout_s: float) -> str:
        """Return the next line; unbuffered, so that what one worker said is not taken for another's."""
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([self._out], [], [], timeout_s)[0], "the worker said nothing"
            text += os.read(self._out.fileno(), 1)
        return text.decode().strip()

    def lines(self, until_s: float) -> Iterator[str]:
        """Give the lines that come until a moment."""
        while (left := until_s - time.monotonic()) > 0 and select.select([self._out], [], [], left)[0]:
            yield self.line(1)

    def close(self) -> None:
        """End it."""
        self._in.close()
        self._out.close()
        self.process.wait(10)


@pytest.fixture
def nursery(request: pytest.FixtureRequest) -> Iterator[Nursery]:
    """Give a nursery; the parameters are those of its constructor."""
    made = Nursery(**request.param)
    yield made
    made.process.kill()
    made.close()


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    """Return what a query of the file gives, on a connection of its own."""
    connection = sqlite3.connect(path)
    try:
        found: list[tuple[object, ...]] = connection.execute(sql).fetchall()
    finally:
        connection.close()
    return found


@pytest.mark.parametrize("nursery", [{"requests": 10**9, "wait": False}], indirect=True)
def test_killed_at_any_moment_no_acknowledged_feedback_is_lost(nursery: Nursery, tmp_path: Path) -> None:
    """After each of 50 `kill -9` all that was acknowledged is there and learned, the file is whole, the start clean."""
    path, moments = tmp_path / "memory.db", random.Random(7)
    acknowledged: set[tuple[object, ...]] = set()
    for round_ in range(50):
        worker = nursery.fork(path, f"round-{round_}")  # says so when it could not open the file cleanly
        for line in nursery.lines(time.monotonic() + moments.uniform(0.0, 0.35)):
            acknowledged.add(tuple(line.split()))
        os.kill(worker, signal.SIGKILL)
        for line in nursery.lines(time.monotonic() + 0.02):
            acknowledged.add(tuple(line.split()))
        present = set(rows(path, "SELECT feedback_id, trace_id FROM feedback JOIN traces USING (trace_id)"))
        assert not acknowledged - present
        assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert len(acknowledged) > 100
    assert not list(tmp_path.glob("*corrupt*"))
    with lexical_memory(tmp_path) as memory:
        assert memory.store.stats()["traces_by_outcome"]["success"] >= len(acknowledged)
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
    print(f"{len(acknowledged)} acknowledged, {len(present)} on disk")


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """Two processes that record and learn in one file at the same time both find all of theirs in it."""
    path, each = tmp_path / "memory.db", 120
    nurseries = [Nursery(each, wait=True) for _ in range(2)]
    try:
        for number, made in enumerate(nurseries):
            made.fork(path, f"process-{number}")
        said = []
        for made in nurseries:
            while (line := made.line(30)) != "ended":
                said.append(line)
    finally:
        for made in nurseries:
            made.process.kill()
            made.close()
    assert len(said) == 2 * each
    present = {f"{f} {t}" for f, t in rows(path, "SELECT feedback_id, trace_id FROM feedback")}
    assert set(said) == present
    assert rows(path, "SELECT count(*) FROM traces") == [(2 * each,)]
    assert rows(path, "SELECT count(*), min(status) FROM memories") == [(2 * each, "verified")]
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
