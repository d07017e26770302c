"""Opening a store by what the setting `db` names: a file, or a PostgreSQL server."""

from __future__ import annotations

import threading
from collections.abc import Callable

from optillm_memory.records import ThreadStarter
from optillm_memory.settings import expanded, is_url
from optillm_memory.store.base import Store
from optillm_memory.store.sqlite.store import SqliteStore


def _daemon(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=f"agent-memory-{name}", daemon=True)
    thread.start()
    return thread


def open_store(db: str, *, queue_size: int, normal: Callable[[str], str], start: ThreadStarter = _daemon) -> Store:
    """Open the store that a `postgresql://` URL or a path names. Raises StoreTooNew and StoreUnavailable.

    `start` starts the threads that the store needs.
    """
    if is_url(db):
        from optillm_memory.store.postgres.store import PostgresStore  # noqa: PLC0415 - a file needs nothing of it

        return PostgresStore(db, start=start, queue_size=queue_size, normal=normal)
    return SqliteStore(expanded(db), queue_size=queue_size, normal=normal)
