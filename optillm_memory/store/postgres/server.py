"""The server as the place where everything lives: how much space it takes, and giving space back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from optillm_memory.records import Scope
from optillm_memory.settings import without_password
from optillm_memory.store.postgres.connection import SCHEMA, PostgresConnection, PostgresReaders
from optillm_memory.store.postgres.schema import TABLES
from optillm_memory.store.postgres.search import UNCOUNTED, may_build
from optillm_memory.store.sqlite.connection import DatabaseError

_WEIGHED_S, _SAMPLED = 60.0, 5_000  # how long a mean size holds; rows that it is taken from
_TURN_S = 1.0  # between two tries to get the lock of those who build or rewrite vectors


class Server:
    """The schema on a server."""

    def __init__(self, url: str, readers: PostgresReaders) -> None:
        self._url = url
        self._readers = readers
        self._weighed = (-_WEIGHED_S, 0.0)  # when, and the bytes that go with one trace

    @property
    def place(self) -> str:
        """The URL, without its password."""
        return without_password(self._url)

    def size_bytes(self) -> int:
        """Return how much room all of it takes."""
        with self._readers.borrow() as db:
            return int(db.execute(_SIZE).fetchone()[0])

    def used_bytes(self, db: Any, traces: int) -> int:
        """Return how many bytes the rows of all tables have.

        What deleted rows leave free in a table is the server's to use again, and does not count.
        """
        weighed_at, each = self._weighed
        if time.monotonic() - weighed_at > _WEIGHED_S:
            each = sum(_bytes_of(db, table) for table in TABLES) / max(traces, 1)
            self._weighed = (time.monotonic(), each)
        return int(traces * each)

    def outdate_indexes(self, scopes: Iterable[Scope] | None) -> None:
        """Do nothing: the vectors are in the tables."""

    def copy_wal(self) -> None:
        """Do nothing: the server does so by itself."""

    def erase(self, *, progress: Callable[[str], None]) -> list[str]:
        """Have the server remove deleted rows from its tables and statistics, while others read and write.

        Their bytes stay in pages until those are used again, or until `compact`; the server's write-ahead log and its
        backups are its operator's.
        """
        try:
            with closing(PostgresConnection(self._url)) as connection:
                for table in TABLES:
                    progress(f"removing deleted rows from {table}")
                    connection.execute(f"VACUUM (ANALYZE) {table}")
                    _drop_old_statistics(connection, table)
        except DatabaseError as error:
            return [f"deleted rows may be left in the tables: {error}"]
        return []

    def compact(self, *, progress: Callable[[str], None]) -> list[str]:
        """Rewrite the tables without what was deleted, one at a time, each locked meanwhile, and their statistics.

        The server's write-ahead log and its backups are its operator's.
        """
        try:
            with closing(PostgresConnection(self._url)) as connection:
                while not may_build(connection):
                    progress("waiting until an index of vectors is built")
                    time.sleep(_TURN_S)
                others = []
                for table in TABLES:
                    progress(f"writing the table {table} anew")
                    if not _rewrite(connection, "VACUUM (FULL, ANALYZE)", table):
                        others.append(table)
                    _drop_old_statistics(connection, table)
                _drop_index_statistics(connection)
                left = [f"only their owner can write these tables anew: {', '.join(others)}"] if others else []
                return left + _rewrite_statistics(connection)
        except DatabaseError as error:
            return [f"the tables could not be written anew, so deleted rows may be left in them: {error}"]

    def set_aside(self, *, delete: bool) -> list[str]:  # noqa: ARG002
        """Return nothing: a server sets no database aside."""
        return []


def _rewrite(connection: PostgresConnection, how: str, table: str) -> bool:
    """Have a table rewritten; whether it was: for a table of another owner the server only warns."""
    before = connection.execute(_FILE, (table,)).fetchone()
    connection.execute(f"{how} {table}")
    return bool(connection.execute(_FILE, (table,)).fetchone() != before)


def _drop_index_statistics(connection: PostgresConnection) -> None:
    """Rebuild the indexes of vectors that have statistics: those of an index can be dropped in no other way."""
    for index, definition in connection.execute(_COUNTED).fetchall():
        connection.execute("BEGIN")  # nobody finds it missing
        connection.execute(f"DROP INDEX {index}")
        connection.execute(definition)
        connection.execute(UNCOUNTED.format(index))
        connection.execute("COMMIT")


def _drop_old_statistics(connection: PostgresConnection, table: str) -> None:
    """Drop the planner's statistics of values that are gone: ANALYZE keeps them where it finds no row at all."""
    known = connection.execute("SELECT 1 FROM pg_stats WHERE schemaname = ? AND tablename = ?", (SCHEMA, table))
    if known.fetchone() is None or connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():
        return
    columns = connection.execute(_COLUMNS, (table,)).fetchall()
    names, blanks = ", ".join(name for name, _ in columns), ", ".join(_BLANK[kind] for _, kind in columns)
    connection.execute("BEGIN")  # a row that nobody sees
    connection.execute(f"INSERT INTO {table}({names}) VALUES ({blanks})")
    connection.execute(f"ANALYZE {table}")
    key, kind = columns[0]
    connection.execute(f"DELETE FROM {table} WHERE {key} = {_BLANK[kind]}")
    connection.execute("COMMIT")


def _rewrite_statistics(connection: PostgresConnection) -> list[str]:
    """Have the catalog of statistics rewritten; return why not, where that is forbidden."""
    try:
        if _rewrite(connection, "VACUUM FULL", "pg_catalog.pg_statistic"):
            return []
        reason = "only the database's owner can write it anew"
    except DatabaseError as error:
        reason = str(error)
    return [f"earlier statistics may be left in the file of pg_catalog.pg_statistic: {reason}"]


def _bytes_of(db: Any, table: str) -> float:
    count = int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    share = min(100.0, 100.0 * _SAMPLED / max(count, 1))
    sample = f"SELECT coalesce(avg(pg_column_size(t)), 0) FROM {table} AS t TABLESAMPLE SYSTEM ({share:.6f})"
    return count * float(db.execute(sample).fetchone()[0])


_COUNTED = """
    SELECT relname, pg_get_indexdef(indexrelid) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    JOIN pg_attribute ON attrelid = indexrelid AND attnum = 1 AND coalesce(attstattarget, -1) <> 0
    WHERE indrelid = to_regclass('vectors') AND indexprs IS NOT NULL"""
_FILE = "SELECT pg_relation_filenode(to_regclass(?))"
_COLUMNS = """
    SELECT attname, typname FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
    WHERE attrelid = to_regclass(?) AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"""
_BLANK = {"text": "''", "int8": "0", "float8": "0", "bool": "FALSE", "vector": "'[0]'"}
_SIZE = """
    SELECT coalesce(sum(pg_total_relation_size(pg_class.oid)), 0) FROM pg_class
    JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = 'agent_memory' AND relkind = 'r'"""
