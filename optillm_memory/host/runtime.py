"""The plugin's Memory, one for each process, and the reason if there is none."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading

from optillm_memory.conversation.language import DETECTOR_LOCK
from optillm_memory.errors import AgentMemoryError, InvalidField
from optillm_memory.host.credentials import NamedKeys, make_operator_key, operator_key_path, reporters_of, tenants_of
from optillm_memory.host.disconnects import DisconnectWatcher
from optillm_memory.host.failopen import FailOpen
from optillm_memory.host.limits import FeedbackLimits
from optillm_memory.host.upstream import HostUpstream
from optillm_memory.learn.forms import form_named
from optillm_memory.memory import Memory
from optillm_memory.records import Level
from optillm_memory.settings import Settings

logger = logging.getLogger(__name__)
# The tenant of callers without a key, and what it was called in earlier releases.
KEYLESS, _FORMERLY = "local", "anonymous"
# Servers that may load the app in one process and serve it from others.
_FORKING = ("gunicorn", "uwsgi", "uwsgidecorators")


class Runtime:
    """Opens memory once for the process; `fault` says why if there is none."""

    def __init__(self) -> None:
        """Read the settings and open memory; if either fails, memory is off and the host serves without it."""
        self.memory: Memory | None = None
        self.fault = ""
        self.settings = Settings()
        self.tenants = self.reporters = NamedKeys("", "")
        self._keyless = ""
        try:
            self.settings = checked_settings()
            self.tenants, self.reporters = tenants_of(self.settings), reporters_of(self.settings)
            self.memory = Memory(self.settings)
            logger.info("agent_memory: memory is in %s", self.settings.place)
        except InvalidField as error:
            self._off(f"{error}; `optillm-memory doctor` checks all settings")
        except AgentMemoryError as error:
            self._off(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the host must start
            self._off(f"{type(error).__name__}: {error}")
        self.operator_key = self._operator_key()
        self.fail_open = FailOpen(self.settings.deadline_ms / 1000)
        # An upstream that hangs must not use up the threads that recall for other requests.
        self.second_calls = FailOpen(self.settings.guard_timeout_s, self.fail_open.faults)
        self.upstream = HostUpstream()
        self.deleting = threading.Lock()
        self.feedback_limits = FeedbackLimits(
            self.settings.feedback_rate, self.settings.pending_feedback, self._waiting_feedback
        )
        self.disconnects = DisconnectWatcher(self.fail_open.quietly)

    def _waiting_feedback(self, tenant: str | None) -> int:
        return self.memory.waiting_feedback(tenant) if self.memory else 0

    @property
    def keyless_tenant(self) -> str:
        """The tenant of all callers without a key.

        Where an earlier release recorded them under another name, they keep it, and with it their data: the ids of
        memories are made of it.
        """
        if not self._keyless and self.memory is not None:
            with contextlib.suppress(AgentMemoryError):  # asked again when the database can be read
                self._keyless = _FORMERLY if self.memory.has_tenant(_FORMERLY) else KEYLESS
        return self._keyless or KEYLESS

    def _operator_key(self) -> str:
        try:
            return make_operator_key(self.settings)
        except (OSError, InvalidField) as error:
            logger.warning("agent_memory: nobody can be the operator over HTTP: no secret could be made: %s", error)
            return ""

    def _off(self, fault: str) -> None:
        self.fault = fault
        logger.error("agent_memory: memory is off: %s", fault)


def checked_settings() -> Settings:
    """Return the settings of the environment. Raises InvalidField for any value that memory could not run with."""
    settings = Settings.from_env()
    form_named(settings.answer_form)
    assert settings.place  # raises for a path in a home directory that does not exist
    assert operator_key_path(settings)
    tenants_of(settings)
    reporters_of(settings)
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


def level() -> Level:
    """Return the level of redaction, without opening memory for it."""
    return _runtime.settings.level if _runtime is not None else "default"


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
