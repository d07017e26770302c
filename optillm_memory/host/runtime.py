"""The process's one Memory behind the plugin, and what stands in for it where it cannot be opened."""

from __future__ import annotations

import atexit
import logging
import threading

from optillm_memory.errors import AgentMemoryError
from optillm_memory.host.failopen import FailOpen
from optillm_memory.memory import Memory
from optillm_memory.settings import Settings

logger = logging.getLogger(__name__)


class Runtime:
    """Opens memory once for the process; `fault` says why there is none."""

    def __init__(self) -> None:
        """Read the settings; a bad one keeps memory off and is named, since the host must go on."""
        self.memory: Memory | None = None
        self.fault = ""
        deadline_ms = Settings().deadline_ms
        try:
            settings = Settings.from_env()
            deadline_ms = settings.deadline_ms
            self.memory = Memory(settings)
            atexit.register(self.memory.close)
            logger.info("agent_memory: memory is in %s", settings.place)
        except (AgentMemoryError, OSError) as error:
            self.fault = str(error)
            logger.error("agent_memory: memory is off: %s", error)
        self.fail_open = FailOpen(deadline_ms / 1000)


_lock = threading.Lock()
_runtime: Runtime | None = None


def runtime() -> Runtime:
    """Return the process's runtime, opened at first use."""
    global _runtime  # noqa: PLW0603
    with _lock:
        if _runtime is None:
            _runtime = Runtime()
        return _runtime
