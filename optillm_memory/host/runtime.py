"""The process's one Memory behind the plugin, and what stands in for it where it cannot be opened."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading

from optillm_memory.conversation.language import DETECTOR_LOCK
from optillm_memory.errors import AgentMemoryError
from optillm_memory.host.failopen import FailOpen
from optillm_memory.memory import Memory
from optillm_memory.settings import Settings

logger = logging.getLogger(__name__)
# Servers that may load the app in one process and serve it from others.
_FORKING = ("gunicorn", "uwsgi", "uwsgidecorators")


class Runtime:
    """Opens memory once for the process; `fault` says why there is none."""

    def __init__(self) -> None:
        """Read the settings; a bad one keeps memory off and is named, since the host must go on."""
        self.memory: Memory | None = None
        self.fault = ""
        self.settings = Settings()
        try:
            self.settings = Settings.from_env()
            self.memory = Memory(self.settings)
            logger.info("agent_memory: memory is in %s", self.settings.place)
        except (AgentMemoryError, OSError) as error:
            self.fault = str(error)
            logger.error("agent_memory: memory is off: %s", error)
        self.fail_open = FailOpen(self.settings.deadline_ms / 1000)
        # An upstream that hangs must not take the threads that recall for others.
        self.second_calls = FailOpen(self.settings.guard_timeout_s, self.fail_open.faults)


_lock = threading.Lock()
_runtime: Runtime | None = None
# What a parent process had opened: its threads are not in this process, and its connections are not this process's to
# use or to close. It is kept, so that nothing closes it.
_of_parents: list[Runtime] = []
_PAUSE_S = 2.0  # a commit takes milliseconds; a disk that hangs must not hold up the fork
_paused: Memory | None = None  # whose writer waits while this process forks


def runtime() -> Runtime:
    """Return the process's runtime, opened at first use."""
    global _runtime  # noqa: PLW0603
    with _lock:
        if _runtime is None:
            _runtime = Runtime()
        return _runtime


def open_early() -> None:
    """Open memory before the first request, unless this process may only be the parent of those that serve."""
    if not any(name in sys.modules for name in _FORKING):
        runtime()


def _close() -> None:
    if _runtime is not None and _runtime.memory is not None:
        _runtime.memory.close()


def _before_fork() -> None:
    global _paused  # noqa: PLW0603
    memory = _runtime.memory if _runtime is not None else None
    # What SQLite holds in a commit would be held in the child for as long as that lives.
    _paused = memory if memory is not None and memory.store.pause(_PAUSE_S) else None


def _after_fork() -> None:
    if _paused is not None:
        _paused.store.resume()


def _leave_to_parent() -> None:
    global _lock, _runtime  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have held it
    if _runtime is not None:
        _of_parents.append(_runtime)
        _runtime = None


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_leave_to_parent)
    # A child must not find it held by a thread that it does not have.
    os.register_at_fork(
        before=DETECTOR_LOCK.acquire, after_in_parent=DETECTOR_LOCK.release, after_in_child=DETECTOR_LOCK.release
    )
