"""Fail open: the one place where a fault in memory is kept from the user's request."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_WORKERS = 32
# Python 3.10 has two timeout errors that are no kin.
_TIMEOUTS = (TimeoutError, FutureTimeoutError)


class FailOpen:
    """Calls into memory with a deadline; a fault is logged, counted and named, never raised.

    Work runs on daemon threads, so that neither a request nor the end of the process waits for one that hangs.
    """

    def __init__(self, deadline_s: float, faults: Counter[str] | None = None) -> None:
        """Keep the deadline, and count into `faults`; threads are started as they are needed, 32 at most."""
        self.deadline_s = deadline_s
        self.faults: Counter[str] = Counter() if faults is None else faults
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads = 0
        self._lock = threading.Lock()

    def call(self, work: Callable[[], T], deadline_s: float | None = None) -> tuple[T | None, str]:
        """Return (result, "") or (None, name of the fault) by the deadline (or another one) at the latest."""
        future: Future[T] = Future()
        self._work.put((work, future))
        self._ensure_worker()
        try:
            return future.result(self.deadline_s if deadline_s is None else deadline_s), ""
        except _TIMEOUTS as error:
            future.cancel()
            return None, self._fault("deadline", error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request goes on
            return None, self._fault(type(error).__name__, error)

    def quietly(self, work: Callable[[], Any]) -> str:
        """Run quick work on this thread; return "" or the name of the fault."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the request goes on
            return self._fault(type(error).__name__, error)
        return ""

    def _fault(self, name: str, error: BaseException) -> str:
        with self._lock:
            self.faults[name] += 1
        logger.warning("agent_memory: the request goes on without memory: %s: %s", name, error)
        return name

    def _ensure_worker(self) -> None:
        if self._idle.acquire(blocking=False):
            return
        with self._lock:
            if self._threads == _WORKERS:
                return
            self._threads += 1
        threading.Thread(target=self._serve, name="agent-memory-recall", daemon=True).start()

    def _serve(self) -> None:
        while True:
            work, future = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                    future.set_exception(error)
            self._idle.release()
