"""A turnstile between processes that write to one file: they go through one at a time, in the order they came.

SQLite has a waiting writer sleep and look again, ever longer: of many, some wait for seconds while others pass them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optillm_memory.records import ThreadStarter

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: SQLite's own waiting has to do
    fcntl = None

_GATE, _ROOM = 0, 1  # bytes of the file: who has the gate is the next in the room
# Long enough for all that may stand before us. Whoever stands longer was stopped, perhaps in the middle of a commit:
# then SQLite's lock says so, where there is a limit to waiting.
PATIENCE_S = 5.0
_AGAIN_S = 0.05  # as long as one waits who has waited in vain before


class Turnstile:
    """Locks on a file of its own, which the kernel gives out in order and takes back from whoever dies.

    Only for the order: without it, where its file cannot be made, or where somebody stands in it for too long, SQLite's
    lock still keeps writers apart. One thread goes through it.
    """

    def __init__(self, path: Path, start: ThreadStarter) -> None:
        """Keep the path; the file is made when it is needed first. `start` starts the thread that waits for a turn."""
        self._path = path
        self._start = start
        self._file: int | None = None
        self._lock = threading.Lock()
        self._waiting = False  # a thread of ours stands before the turnstile
        self._wanted = False  # and somebody wants to go through when it has come to its turn
        self._turn = threading.Event()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Wait for our turn, within limits; let the next one in afterwards."""
        entered = self._enter()
        try:
            yield
        finally:
            if entered:
                self._do(fcntl.LOCK_UN, _ROOM)

    def _enter(self) -> bool:
        if fcntl is None:
            return False
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return False
        with self._lock:
            before, self._wanted = self._waiting, True
            if not before:
                if self._through(fcntl.LOCK_NB):
                    return True
                # Nothing can be waited for with a limit but by another thread; it goes on waiting when we do not.
                self._turn.clear()
                try:
                    self._start("agent-memory-turnstile", self._wait)  # which waits for the lock at the end
                except RuntimeError:  # no thread can be started: SQLite's lock has to do
                    return False
                self._waiting = True
        self._turn.wait(_AGAIN_S if before else PATIENCE_S)
        with self._lock:
            self._wanted = False
            return not self._waiting and self._turn.is_set()

    def _wait(self) -> None:
        entered = self._through(0)
        with self._lock:
            self._waiting = False
            if entered and self._wanted:
                self._turn.set()
            elif entered:
                self._do(fcntl.LOCK_UN, _ROOM)

    def _through(self, how: int) -> bool:
        # One lock would not do: who lets it go and wants it again at once is quicker than who has to wake up for it.
        if not self._do(fcntl.LOCK_EX | how, _GATE):
            return False
        entered = self._do(fcntl.LOCK_EX | how, _ROOM)
        self._do(fcntl.LOCK_UN, _GATE)
        return entered

    def _do(self, what: int, which: int) -> bool:
        if self._file is None:  # closed meanwhile
            return False
        try:
            fcntl.lockf(self._file, what, 1, which)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of the file, which stays: to remove it would part those who wait from those who come."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
