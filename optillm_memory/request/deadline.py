"""The deadline of a request: how long memory may hold it up, in all the places where it does."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

DEADLINE_S = 0.3


class Deadline:
    """A budget of time for one request, spent while memory works and not while the model answers. Thread-safe."""

    def __init__(self, limit_s: float = DEADLINE_S) -> None:
        """Start with all of it; the clock does not run yet."""
        self._lock = threading.Lock()
        self._unspent_s = limit_s
        self._running = 0
        self._since = 0.0

    @property
    def remaining_s(self) -> float:
        """How long memory may still work on this request; negative where it took longer."""
        with self._lock:
            return self._unspent_s - (time.perf_counter() - self._since if self._running else 0.0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the clock run; within another `running` of this deadline, time is counted once."""
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._unspent_s -= time.perf_counter() - self._since
