"""Which SQLite library there is, and what its version can do."""

from __future__ import annotations

import importlib
import sqlite3 as stdlib_sqlite3
from typing import Any

try:  # as sqlite-utils does, which takes half a second to load and is needed only where there is something to migrate
    sqlite3: Any = importlib.import_module("pysqlite3")
except ImportError:
    sqlite3 = stdlib_sqlite3


def sqlite_version() -> str:
    """Return the version of the SQLite library in use."""
    return str(sqlite3.sqlite_version)


def wal_is_safe(version: str | None = None) -> bool:
    """Whether this SQLite is free of the WAL-reset bug (mended in 3.51.3, 3.50.7 and 3.44.6)."""
    parts = tuple(int(p) for p in (version or sqlite_version()).split("."))
    return parts >= (3, 51, 3) or (3, 50, 7) <= parts < (3, 51) or (3, 44, 6) <= parts < (3, 45)


def words_are_secure() -> bool:
    """Whether this SQLite takes a deleted row's words out of the full-text index at once, not with a later merge."""
    return tuple(int(part) for part in sqlite_version().split(".")) >= (3, 42)
