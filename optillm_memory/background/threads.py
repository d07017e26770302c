"""Threads: how they are started, and the one order in which all that runs on them is closed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from optillm_memory.store.threads import start_thread

__all__ = ["close_in_order", "start_thread"]

logger = logging.getLogger(__name__)


def close_in_order(*steps: Callable[[], None]) -> None:
    """Take every step in this order, also after one that raises; errors are logged, and the first one is raised."""
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            logger.exception("agent_memory: a part could not be closed; the others are")
            errors.append(error)
    if errors:
        raise errors[0]
