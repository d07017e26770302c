"""Opening a store by what the setting `db` names: a file, or a PostgreSQL server."""

from __future__ import annotations

import time
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
    seal: bool = False,
    seal_folder: str = "",
    clock: Callable[[], float] = time.time,
    start: ThreadStarter = start_thread,
) -> Store:
    """Open the store that a `postgresql://` URL or a path names. Raises StoreTooNew and StoreUnavailable.

    Opened `read_only`, it makes no file, migrates nothing and starts no thread; it raises NotFound where there is no
    memory, and StoreError for the schema of an earlier release. A file is sealed if it was before, or with `seal`.
    """
    if is_url(db):
        from optillm_memory.store.postgres.store import PostgresStore  # noqa: PLC0415 - a file needs nothing of it

        return PostgresStore(db, queue_size=queue_size, normal=normal, read_only=read_only, clock=clock, start=start)
    return SqliteStore(
        expanded(db), queue_size=queue_size, normal=normal, read_only=read_only, seal=seal, seal_folder=seal_folder,
        clock=clock, start=start,
    )  # fmt: skip
