"""Work behind the requests' backs: one thread that does one thing after another, and leaves others room."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from optillm_memory.errors import StoreError

logger = logging.getLogger(__name__)

_BURST_S = 0.004  # of work, after which others may have the processor
_LONGEST_REST_S = 0.05


class Closed(Exception):
    """What was being done is of no use any more: everything is being closed."""


class BackgroundWorker:
    """One thread, started with the first thing to do."""

    def __init__(self, name: str) -> None:
        """Name the thread."""
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._worked_since = 0.0
        self._left = 0

    @property
    def busy(self) -> bool:
        """Whether anything is being done, or waits to be."""
        return self._left > 0

    def do(self, work: Callable[[], None]) -> None:
        """Have something done after what waits."""
        with self._lock:
            if self._closing.is_set():
                return
            self._left += 1
            self._queue.put(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def rest(self) -> None:
        """Give way to others for as long as was worked, more or less. Raises Closed."""
        worked = time.perf_counter() - self._worked_since
        if worked < _BURST_S and not self._closing.is_set():
            return
        if self._closing.wait(min(worked / 2, _LONGEST_REST_S)):
            raise Closed
        self._worked_since = time.perf_counter()

    def close(self) -> None:
        """End what is being done, and the thread."""
        with self._lock:
            self._closing.set()
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join(10)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None and not self._closing.is_set():
            self._worked_since = time.perf_counter()
            try:
                work()
            except Closed:
                return
            except (StoreError, OSError) as error:
                logger.warning("agent_memory: vectors are not up to date: %s", error)
            except Exception:
                logger.exception("agent_memory: vectors are not up to date")
            with self._lock:
                self._left -= 1
