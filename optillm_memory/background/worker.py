"""A background worker: one thread that does one thing after another, and rests so that requests get the processor."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from optillm_memory.background.threads import start_thread
from optillm_memory.errors import StoreError

logger = logging.getLogger(__name__)

_BURST_S = 0.004  # of work, after which others may have the processor
_LONGEST_REST_S = 0.05
_CLOSING_S = 10.0


class Closed(Exception):
    """What was being done is of no use any more: everything is being closed."""


class BackgroundWorker:
    """One thread, started with the first thing to do."""

    def __init__(self, name: str) -> None:
        """Name the thread."""
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._worked_since = 0.0
        self._remaining = 0

    @property
    def remaining(self) -> int:
        """How many things are being done or wait."""
        return 0 if self._closing.is_set() else self._remaining

    @property
    def busy(self) -> bool:
        """Whether anything is being done or waits."""
        return self.remaining > 0

    def do(self, work: Callable[[], None]) -> None:
        """Have something done after what waits; nothing any more once this is closing."""
        with self._changed:
            if self._closing.is_set():
                return
            if self._thread is None:  # first: where no thread can be started, nothing is counted that nobody does
                self._thread = start_thread(self._name, self._run)
            self._remaining += 1
            self._queue.put(work)

    def rest(self) -> None:
        """Give way to others for as long as was worked, more or less. Raises Closed."""
        worked = time.perf_counter() - self._worked_since
        if worked < _BURST_S and not self._closing.is_set():
            return
        if self._closing.wait(min(worked / 2, _LONGEST_REST_S)):
            raise Closed
        self._worked_since = time.perf_counter()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is done that was to be done; return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.busy, timeout_s)

    def close(self) -> None:
        """End what is being done, and the thread."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
            self._queue.put(None)
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSING_S)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None and not self._closing.is_set():
            self._worked_since = time.perf_counter()
            try:
                work()
            except (StoreError, OSError) as error:
                logger.warning("agent_memory: %s: not done: %s", self._name, error)
            except BaseException as error:  # should this thread end, all that waits would wait for good
                if not isinstance(error, Closed):
                    logger.exception("agent_memory: %s: not done", self._name)
            finally:
                with self._changed:
                    self._remaining -= 1
                    self._changed.notify_all()
