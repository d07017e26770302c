"""A turnstile between processes that write to one file: they go through one at a time, in the order they came.

SQLite has a waiting writer sleep and look again, ever longer: of many, some wait for seconds while others pass them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: SQLite's own waiting has to do
    fcntl = None

_GATE, _ROOM = 0, 1  # bytes of the file: who has the gate is the next in the room


class Turnstile:
    """Locks on a file of its own, which the kernel gives out in order and takes back from whoever dies.

    Only for the order: without it, or where its file cannot be made, SQLite's lock still keeps writers apart.
    """

    def __init__(self, path: Path) -> None:
        """Keep the path; the file is made when it is needed first."""
        self._path = path
        self._file: int | None = None

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Wait for our turn; let the next one in afterwards."""
        entered = self._enter()
        try:
            yield
        finally:
            if entered:
                self._lock(fcntl.LOCK_UN, _ROOM)

    def _enter(self) -> bool:
        if fcntl is None:
            return False
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return False
        # One lock would not do: who lets it go and wants it again at once is quicker than who has to wake up for it.
        if not self._lock(fcntl.LOCK_EX, _GATE):
            return False
        entered = self._lock(fcntl.LOCK_EX, _ROOM)
        self._lock(fcntl.LOCK_UN, _GATE)
        return entered

    def _lock(self, what: int, which: int) -> bool:
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
