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

from optillm_memory.background.threads import start_thread
from optillm_memory.conversation.redact import redact
from optillm_memory.request.deadline import Deadline

logger = logging.getLogger(__name__)

T = TypeVar("T")
_WORKERS = 32
_TIMEOUTS = (TimeoutError, FutureTimeoutError)  # two unrelated errors before Python 3.11
_counting = threading.Lock()  # several may count into the same faults


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

    def call(self, work: Callable[[], T], deadline: Deadline | float | None = None) -> tuple[T | None, str]:
        """Return (result, "") or (None, name of the fault).

        It is back within the deadline: so many seconds, or what remains of a request's, whose clock then runs.
        """
        if isinstance(deadline, Deadline):
            with deadline.running():
                return self.call(work, deadline.remaining_s)
        future: Future[T] = Future()
        try:
            self._ensure_worker()
            self._work.put((work, future))
            return future.result(self.deadline_s if deadline is None else max(deadline, 0.0)), ""
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
        with _counting:
            self.faults[name] += 1
        logger.warning("agent_memory: the request goes on without memory: %s: %s", name, redact(str(error)))
        return name

    def _ensure_worker(self) -> None:
        """Start a thread where none is idle. Raises what keeps a first one from being started."""
        if self._idle.acquire(blocking=False):
            return
        with self._lock:
            if self._threads < _WORKERS:
                try:
                    start_thread("agent-memory-recall", self._serve)
                except RuntimeError:  # the process may have no more threads: those that there are have to do
                    if not self._threads:
                        raise
                else:
                    self._threads += 1

    def _serve(self) -> None:
        while True:
            work, future = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                    future.set_exception(error)
            self._idle.release()
