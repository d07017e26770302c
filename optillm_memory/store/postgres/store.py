"""The store on PostgreSQL, for many proxies at once: SQLite's statements, and a search of vectors in the database."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from optillm_memory.errors import StoreUnavailable
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import Scope, ThreadStarter
from optillm_memory.settings import shown
from optillm_memory.store.base import Store
from optillm_memory.store.postgres.connection import SCHEMA, PostgresConnection, PostgresReaders, vector_text
from optillm_memory.store.postgres.schema import TABLES, migrate, refuse_other_schema
from optillm_memory.store.sqlite import connection as sqlite
from optillm_memory.store.tables import rows
from optillm_memory.store.transaction import Transaction
from optillm_memory.store.writer import ReadOnlyWriter, Writer, start_thread

logger = logging.getLogger(__name__)
T = TypeVar("T")
_WEIGHED_S, _SAMPLED = 60.0, 5_000  # how long a mean size holds; rows that it is taken from
_SEARCHED = 100  # candidates that the index keeps while it searches (pgvector's hnsw.ef_search)
# Whoever builds an index of vectors, or writes them anew, holds this; it is asked for, and never waited for inside a
# statement: that holds a snapshot, and an index that is built concurrently waits for all snapshots of others.
_BUILDERS_LOCK = 0x6F70746D656E
_LOOK_AGAIN_S = 10.0  # while another proxy builds, or after a failure
_TURN_S = 1.0  # between two tries to become the one who writes the vectors anew
# A transaction of the writer in which nothing happens for so long holds up all proxies, and is ended by the server. A
# fold computes between its statements, so it is no less than anybody waits for a commit.
_IDLE_S = 120


class PostgresTransaction(Transaction):
    """The operations of one commit on the writing connection."""

    def _insert(self, values: tuple[Any, ...]) -> int:
        return int(self._db.execute(f"{rows.INSERT_MEMORY} RETURNING number", values).fetchone()[0])

    def _as_stored(self, vector: bytes) -> str:
        return vector_text(vector)


class PostgresWriter(Writer):
    """One connection and one thread that write; other proxies' writers wait for their turn in the database."""

    def __init__(self, url: str, *, queue_size: int, within: Callable[[Any], Any], start: ThreadStarter) -> None:
        """Connect and bring the schema up; where that fails for now, each later operation tries again."""
        self._url = url
        super().__init__(shown(url), queue_size=queue_size, within=within, start=start)

    def _open(self) -> Any:
        try:
            connection = PostgresConnection(self._url)
        except sqlite.DatabaseError as error:
            raise StoreUnavailable(f"cannot write {self.place}: {error}") from error
        try:
            migrate(connection, self.place)
            connection.try_set("idle_in_transaction_session_timeout", f"{_IDLE_S}s")
        except sqlite.DatabaseError as error:
            connection.close()
            raise StoreUnavailable(f"cannot write {self.place}: {error}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _stands(self) -> bool:
        return not (self._connection is None or self._connection.closed)  # type: ignore[attr-defined]

    def _failed(self, error: Exception) -> None:  # noqa: ARG002
        # Whatever state it is in: a new one costs little.
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class PostgresStore(Store):
    """Reads on any thread, writes through one; the fold of all proxies goes through one at a time."""

    def __init__(
        self,
        url: str,
        *,
        queue_size: int = 10_000,
        normal: Callable[[str], str] = normal_answer,
        read_only: bool = False,
        start: ThreadStarter = start_thread,
    ) -> None:
        """Connect and bring the schema up; `normal` gives the form in which answers are compared.

        Raises StoreTooNew, and StoreUnavailable without psycopg. Opened `read_only`, it migrates nothing, builds no
        index and starts no thread; it raises NotFound where there is no memory, and StoreError for an older schema.
        """
        self.url = url
        self._read_only, self._start = read_only, start
        readers = PostgresReaders(url)
        writer: Writer | ReadOnlyWriter
        if read_only:
            writer = ReadOnlyWriter(shown(url))
            with readers.borrow() as db:
                refuse_other_schema(db, shown(url))
        else:
            within = partial(PostgresTransaction, normal=normal)
            writer = PostgresWriter(url, queue_size=queue_size, within=within, start=start)
        super().__init__(writer, readers)
        self._indexed: set[str] = set()  # encoders whose vectors have their index
        self._look_at: dict[str, float] = {}  # when to look again whether those of others have
        self._weighed = (-_WEIGHED_S, 0.0)  # when, and the bytes that go with one trace
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """Where the memories lie, as it may be shown."""
        return shown(self.url)

    def salt(self) -> bytes:
        """Return the database's secret for the holdout."""
        with self._readers.borrow() as db:
            return bytes(db.execute("SELECT value FROM salt").fetchone()[0])

    def nearest(
        self, scope: Scope, fingerprint: str, query: NDArray[np.float32], count: int
    ) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of the scope's nearest memories through HNSW; nothing while its index is built."""
        if not self._index_is_there(fingerprint, len(query)):
            return []
        sql = _NEAREST.format(dimension=len(query), fingerprint=_quoted(fingerprint))
        text = vector_text(query.astype(np.float32).tobytes())
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            db.execute(_SETTINGS, (str(max(_SEARCHED, 2 * count)),))
            found = db.execute(sql, (text, scope_id, text, count)).fetchall()
        best = sorted(((int(number), 1.0 - float(distance)) for number, distance in found), key=lambda pair: -pair[1])
        return best[:count]

    def size_bytes(self) -> int:
        """Return how much room all of it takes."""
        with self._readers.borrow() as db:
            return int(db.execute(_SIZE).fetchone()[0])

    def held(self) -> dict[str, int]:
        """Return how many traces there are, and how many bytes the rows of all tables have.

        What deleted rows leave free in a table is the server's to use again, and does not count.
        """
        with self._readers.borrow() as db:
            traces = int(db.execute("SELECT count(*) FROM traces").fetchone()[0])
            weighed_at, each = self._weighed
            if time.monotonic() - weighed_at > _WEIGHED_S:
                each = sum(_bytes_of(db, table) for table in TABLES) / max(traces, 1)
                self._weighed = (time.monotonic(), each)
        return {"traces": traces, "bytes": int(traces * each)}

    def erase(self, *, progress: Callable[[str], None]) -> list[str]:
        """Have the server take deleted rows out of its tables and statistics, while others read and write.

        Their bytes stay in pages until those are used again, or until `compact`; the server's write-ahead log and its
        backups are its operator's.
        """
        try:
            with closing(PostgresConnection(self.url)) as connection:
                for table in TABLES:
                    progress(f"taking deleted rows out of {table}")
                    connection.execute(f"VACUUM (ANALYZE) {table}")
                    _drop_old_statistics(connection, table)
        except sqlite.DatabaseError as error:
            return [f"deleted rows may be left in the tables: {error}"]
        return []

    def compact(self, *, progress: Callable[[str], None]) -> list[str]:
        """Write the tables anew without what was deleted, one at a time, each locked meanwhile, and their statistics.

        The server's write-ahead log and its backups are its operator's.
        """
        try:
            with closing(PostgresConnection(self.url)) as connection:
                while not _may_build(connection):
                    progress("waiting until an index of vectors is built")
                    time.sleep(_TURN_S)
                others = []
                for table in TABLES:
                    progress(f"writing the table {table} anew")
                    if not _anew(connection, "VACUUM (FULL, ANALYZE)", table):
                        others.append(table)
                    _drop_old_statistics(connection, table)
                _drop_index_statistics(connection)
                left = [f"only their owner can write these tables anew: {', '.join(others)}"] if others else []
                return left + _statistics_left(connection)
        except sqlite.DatabaseError as error:
            return [f"the tables could not be written anew, so deleted rows may be left in them: {error}"]

    def _postings(self, db: Any, scope_id: int, words: Sequence[str], depth: int) -> Mapping[str, list[int]]:
        # Each word has its own part of the statement, planned for that word: a rare one is looked up in the index,
        # which gives all or nothing; of one that is everywhere the first rows of the table soon have enough.
        each = ", ".join([_POSTINGS] * len(words))
        values = [value for word in words for value in (rows.scoped(scope_id, word), depth)]
        return dict(zip(words, db.execute(f"SELECT {each}", values, planned_anew=True).fetchone(), strict=True))

    def _holding_all(self, db: Any, scope_id: int, words: Sequence[str], depth: int, latest: int) -> list[int]:
        terms = [rows.scoped(scope_id, word) for word in words]
        return [int(row[0]) for row in db.execute(_HOLDING_ALL, (terms, latest, depth)).fetchall()]

    def _index_is_there(self, fingerprint: str, dimension: int) -> bool:
        """Whether the vectors of an encoder have their index; has it built where they do not."""
        with self._lock:
            if fingerprint in self._indexed:
                return True
            if time.monotonic() < self._look_at.get(fingerprint, 0.0):
                return False
        with self._readers.borrow() as db:
            there = _is_valid(db, _index_name(fingerprint))
        with self._lock:
            if there:
                self._indexed.add(fingerprint)
            elif self._look_at.get(fingerprint) != math.inf and not self._read_only:
                self._look_at[fingerprint] = math.inf  # a thread is at it
                self._start("agent-memory-hnsw", partial(self._build_index, fingerprint, dimension))
        return there

    def _build_index(self, fingerprint: str, dimension: int) -> None:
        there = False
        try:
            with closing(PostgresConnection(self.url)) as connection:
                there = _indexed(connection, fingerprint, dimension)
        except sqlite.DatabaseError as error:
            logger.error("agent_memory: the index of vectors could not be built: %s", error)
        finally:
            with self._lock:
                if there:
                    self._indexed.add(fingerprint)
                self._look_at[fingerprint] = time.monotonic() + _LOOK_AGAIN_S


def _indexed(connection: PostgresConnection, fingerprint: str, dimension: int) -> bool:
    """Whether the vectors of an encoder have their index now; builds it, unless another proxy is at it."""
    name = _index_name(fingerprint)
    if _is_valid(connection, name):
        return True
    if not _may_build(connection):
        return False
    if not _is_valid(connection, name):  # else another has finished meanwhile
        connection.execute(f"DROP INDEX IF EXISTS {name}")  # what one left who was stopped while it built
        connection.execute(
            f"CREATE INDEX CONCURRENTLY {name} ON vectors USING hnsw ((vector::halfvec({dimension})) "
            f"halfvec_cosine_ops) WHERE fingerprint = {_quoted(fingerprint)}"
        )
        connection.execute(_UNCOUNTED.format(name))
    return True


def _index_name(fingerprint: str) -> str:
    return "vectors_" + hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()


def _may_build(connection: PostgresConnection) -> bool:
    """Take the builders' lock, until the connection is closed, unless somebody else has it."""
    return bool(connection.execute("SELECT pg_try_advisory_lock(?)", (_BUILDERS_LOCK,)).fetchone()[0])


def _is_valid(connection: Any, name: str) -> bool:
    found = connection.execute(_VALID, (name,)).fetchone()
    return found is not None and bool(found[0])


def _anew(connection: PostgresConnection, how: str, table: str) -> bool:
    """Have a table written anew; whether it was: the server only warns whoever is not its owner."""
    before = connection.execute(_FILE, (table,)).fetchone()
    connection.execute(f"{how} {table}")
    return bool(connection.execute(_FILE, (table,)).fetchone() != before)


def _drop_index_statistics(connection: PostgresConnection) -> None:
    """Make the indexes of vectors anew that have statistics: those of an index go with it, and in no other way."""
    for index, definition in connection.execute(_COUNTED).fetchall():
        connection.execute("BEGIN")  # nobody finds it missing
        connection.execute(f"DROP INDEX {index}")
        connection.execute(definition)
        connection.execute(_UNCOUNTED.format(index))
        connection.execute("COMMIT")


def _drop_old_statistics(connection: PostgresConnection, table: str) -> None:
    """Drop what the planner still knows of values that are gone: ANALYZE lets it stand where it finds no row at all."""
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


def _statistics_left(connection: PostgresConnection) -> list[str]:
    """Have the catalog of statistics written anew; say so where that may not be."""
    try:
        if _anew(connection, "VACUUM FULL", "pg_catalog.pg_statistic"):
            return []
        reason = "only the database's owner can write it anew"
    except sqlite.DatabaseError as error:
        reason = str(error)
    return [f"earlier statistics may be left in the file of pg_catalog.pg_statistic: {reason}"]


def _bytes_of(db: Any, table: str) -> float:
    count = int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    share = min(100.0, 100.0 * _SAMPLED / max(count, 1))
    sample = f"SELECT coalesce(avg(pg_column_size(t)), 0) FROM {table} AS t TABLESAMPLE SYSTEM ({share:.6f})"
    return count * float(db.execute(sample).fetchone()[0])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_SETTINGS = """
    SELECT set_config('hnsw.ef_search', ?, FALSE), set_config('hnsw.iterative_scan', 'relaxed_order', FALSE)"""
_NEAREST = """
    SELECT number, vector::halfvec({dimension}) <=> CAST(? AS halfvec({dimension})) AS distance
    FROM vectors JOIN memories ON memories.key_hash = vectors.key_hash
    WHERE fingerprint = {fingerprint} AND scope_id = ? AND status = 'verified' AND kind = 'exemplar'
    ORDER BY vector::halfvec({dimension}) <=> CAST(? AS halfvec({dimension})) LIMIT ?"""
_POSTINGS = "ARRAY(SELECT rowid FROM memories_fts WHERE terms @> ARRAY[?]::text[] LIMIT ?)"
_HOLDING_ALL = """
    SELECT rowid FROM memories_fts WHERE terms @> ?::text[]
    AND rowid > (SELECT coalesce(max(number), 0) FROM memories) - ? LIMIT ?"""
_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(?)"
# The statistics of an index on vectors are of no use to anybody, and hold vectors.
_UNCOUNTED = "ALTER INDEX {} ALTER COLUMN 1 SET STATISTICS 0"
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
