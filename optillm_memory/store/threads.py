"""Starting a thread: the one way in which this package does so. It is the store's, which is also opened on its own."""

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
