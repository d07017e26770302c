"""The plugin's Memory, one for each process, and the reason if there is none."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading

from optillm_memory.conversation.language import DETECTOR_LOCK
from optillm_memory.errors import AgentMemoryError, InvalidField
from optillm_memory.host.disconnects import DisconnectWatcher
from optillm_memory.host.failopen import FailOpen
from optillm_memory.host.upstream import HostUpstream
from optillm_memory.learn.forms import form_named
from optillm_memory.memory import Memory
from optillm_memory.settings import Settings

logger = logging.getLogger(__name__)
# Servers that may load the app in one process and serve it from others.
_FORKING = ("gunicorn", "uwsgi", "uwsgidecorators")


class Runtime:
    """Opens memory once for the process; `fault` says why if there is none."""

    def __init__(self) -> None:
        """Read the settings and open memory; if either fails, memory is off and the host serves without it."""
        self.memory: Memory | None = None
        self.fault = ""
        self.settings = Settings()
        try:
            self.settings = checked_settings()
            self.memory = Memory(self.settings)
            logger.info("agent_memory: memory is in %s", self.settings.place)
        except InvalidField as error:
            self._off(f"{error}; `optillm-memory doctor` checks all settings")
        except AgentMemoryError as error:
            self._off(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the host must start
            self._off(f"{type(error).__name__}: {error}")
        self.fail_open = FailOpen(self.settings.deadline_ms / 1000)
        # An upstream that hangs must not use up the threads that recall for other requests.
        self.second_calls = FailOpen(self.settings.guard_timeout_s, self.fail_open.faults)
        self.upstream = HostUpstream()
        self.disconnects = DisconnectWatcher(self.fail_open.quietly)

    def _off(self, fault: str) -> None:
        self.fault = fault
        logger.error("agent_memory: memory is off: %s", fault)


def checked_settings() -> Settings:
    """Return the settings of the environment. Raises InvalidField for any value that memory could not run with."""
    settings = Settings.from_env()
    form_named(settings.answer_form)
    assert settings.place  # raises for a path in a home directory that does not exist
    return settings


_lock = threading.Lock()
_runtime: Runtime | None = None
# Opened by a parent process: its threads do not exist here, and its connections must be neither used nor closed here.
# A reference is kept so that the garbage collector does not close them.
_of_parents: list[Runtime] = []
_PAUSE_S = 2.0  # a commit takes milliseconds; a disk that hangs must not hold up the fork
_paused: Memory | None = None  # its writer is paused while this process forks


def runtime() -> Runtime:
    """Return the process's runtime, opened at first use."""
    global _runtime  # noqa: PLW0603
    with _lock:
        if _runtime is None:
            _runtime = Runtime()
        return _runtime


def open_early() -> None:
    """Open memory before the first request, unless this process may be the parent of the serving processes."""
    if not any(name in sys.modules for name in _FORKING):
        runtime()


def _close() -> None:
    if _runtime is not None:
        _runtime.upstream.close()
        if _runtime.memory is not None:
            _runtime.memory.close()


def _before_fork() -> None:
    global _paused  # noqa: PLW0603
    memory = _runtime.memory if _runtime is not None else None
    # A lock that SQLite holds during a commit would stay locked in the child forever.
    _paused = memory if memory is not None and memory.pause(_PAUSE_S) else None


def _after_fork() -> None:
    if _paused is not None:
        _paused.resume()


def _leave_to_parent() -> None:
    global _lock, _runtime  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have held it
    if _runtime is not None:
        _of_parents.append(_runtime)
        _runtime = None


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_leave_to_parent)
    # A child must not inherit the lock in a held state: the thread that would release it is not in the child.
    os.register_at_fork(
        before=DETECTOR_LOCK.acquire, after_in_parent=DETECTOR_LOCK.release, after_in_child=DETECTOR_LOCK.release
    )
