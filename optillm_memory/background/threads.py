"""Threads: the one place that starts them, and the one order in which all that runs on them is closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


def start_thread(name: str, work: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread `agent-memory-<name>`; neither a request nor the end of the process waits for it."""
    thread = threading.Thread(target=work, name=f"agent-memory-{name}", daemon=True)
    thread.start()
    return thread


def close_in_order(*steps: Callable[[], None]) -> None:
    """Take every step in this order, also after one that raises; then raise the last error, with those before it."""
    with contextlib.ExitStack() as stack:
        for step in reversed(steps):
            stack.callback(step)
