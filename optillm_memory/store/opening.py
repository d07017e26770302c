"""Opening a store by what the setting `db` names: a file, or a PostgreSQL server."""

from __future__ import annotations

from collections.abc import Callable

from optillm_memory.records import ThreadStarter
from optillm_memory.settings import expanded, is_url
from optillm_memory.store.base import Store
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.threads import start_thread


def open_store(
    db: str,
    *,
    queue_size: int,
    normal: Callable[[str], str],
    read_only: bool = False,
    start: ThreadStarter = start_thread,
) -> Store:
    """Open the store that a `postgresql://` URL or a path names. Raises StoreTooNew and StoreUnavailable.

    Opened `read_only`, it makes no file, migrates nothing and starts no thread; it raises NotFound where there is no
    memory, and StoreError for the schema of an earlier release.
    """
    if is_url(db):
        from optillm_memory.store.postgres.store import PostgresStore  # noqa: PLC0415 - a file needs nothing of it

        return PostgresStore(db, queue_size=queue_size, normal=normal, read_only=read_only, start=start)
    return SqliteStore(expanded(db), queue_size=queue_size, normal=normal, read_only=read_only, start=start)
