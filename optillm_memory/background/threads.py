"""Threads: the one place that starts them, and the one order in which all that runs on them is closed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread of this name; neither a request nor the end of the process waits for it.

    An error that ends it is logged: whoever has it started leaves nothing locked or marked as under way (`finally`).
    """

    def run() -> None:
        try:
            work()
        except BaseException:
            logger.exception("agent_memory: the thread %s was ended by an error", name)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


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
