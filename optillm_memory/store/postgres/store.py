"""The store on PostgreSQL, for many proxies at once: SQLite's statements, and a search of vectors in the database."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from optillm_memory.errors import StoreUnavailable
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import ThreadStarter
from optillm_memory.settings import without_password
from optillm_memory.store.backend import Dialect
from optillm_memory.store.base import Store
from optillm_memory.store.postgres.connection import PostgresConnection, PostgresReaders
from optillm_memory.store.postgres.schema import migrate, refuse_other_schema
from optillm_memory.store.postgres.search import HnswSearch
from optillm_memory.store.postgres.server import Server
from optillm_memory.store.postgres.values import Vector
from optillm_memory.store.sqlite.connection import DatabaseError
from optillm_memory.store.tables.words import scoped
from optillm_memory.store.threads import start_thread
from optillm_memory.store.transaction import Transaction
from optillm_memory.store.writer import ReadOnlyWriter, Writer

# An idle transaction of a writer blocks all proxies, so the server ends it after this time. A fold computes between its
# statements, so it is no less than anybody waits for a commit.
_IDLE_S = 120


class PostgresStore(Store):
    """Reads on any thread, writes through one; the fold of all proxies goes through one at a time."""

    def __init__(
        self,
        url: str,
        *,
        queue_size: int = 10_000,
        normal: Callable[[str], str] = normal_answer,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
        start: ThreadStarter = start_thread,
    ) -> None:
        """Connect and bring the schema up; `normal` gives the form in which answers are compared.

        `clock` tells in Unix seconds what holds no longer. Raises StoreTooNew, and StoreUnavailable without psycopg.
        Opened `read_only`, it migrates nothing, builds no index and starts no thread; it raises NotFound where there is
        no memory, and StoreError for an older schema.
        """
        readers = PostgresReaders(url)
        writer: Writer | ReadOnlyWriter
        if read_only:
            writer = ReadOnlyWriter(without_password(url))
            with readers.borrow() as db:
                refuse_other_schema(db, without_password(url))
        else:
            within = partial(Transaction, dialect=DIALECT, normal=normal)
            writer = PostgresWriter(url, queue_size=queue_size, within=within, start=start)
        search = HnswSearch(url, readers, None if read_only else start)
        super().__init__(writer, readers, dialect=DIALECT, search=search, location=Server(url, readers), clock=clock)


class PostgresWriter(Writer):
    """One connection and one thread that write; other proxies' writers wait for their turn in the database."""

    def __init__(self, url: str, *, queue_size: int, within: Callable[[Any], Any], start: ThreadStarter) -> None:
        """Connect and bring the schema up; where that fails for now, each later operation tries again."""
        self._url = url
        super().__init__(without_password(url), queue_size=queue_size, within=within, start=start)

    def _open(self) -> Any:
        try:
            connection = PostgresConnection(self._url)
        except DatabaseError as error:
            raise StoreUnavailable(f"cannot write {self.place}: {error}") from error
        try:
            migrate(connection, self.place)
            connection.try_set("idle_in_transaction_session_timeout", f"{_IDLE_S}s")
        except DatabaseError as error:
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


def _memory_numbers(db: Any, count: int) -> list[int]:
    return [int(row[0]) for row in db.execute(_NUMBERS, (count,)).fetchall()]


def _postings(db: Any, scope_id: int, words: Sequence[str], depth: int) -> Mapping[str, list[int]]:
    # Each word has its own part of the statement, planned for that word: a rare one is looked up in the index,
    # which gives all or nothing; of one that is everywhere the first rows of the table soon have enough.
    each = ", ".join([_POSTINGS] * len(words))
    values = [value for word in words for value in (scoped(scope_id, word), depth)]
    return dict(zip(words, db.execute(f"SELECT {each}", values, planned_anew=True).fetchone(), strict=True))


def _holding_all(db: Any, scope_id: int, words: Sequence[str], depth: int, latest: int) -> list[int]:
    terms = [scoped(scope_id, word) for word in words]
    return [int(row[0]) for row in db.execute(_HOLDING_ALL, (terms, latest, depth)).fetchall()]


_NUMBERS = "SELECT nextval(pg_get_serial_sequence('memories', 'number')) FROM generate_series(1, ?)"
_POSTINGS = "ARRAY(SELECT rowid FROM memories_fts WHERE terms @> ARRAY[?]::text[] LIMIT ?)"
_HOLDING_ALL = """
    SELECT rowid FROM memories_fts WHERE terms @> ?::text[]
    AND rowid > (SELECT coalesce(max(number), 0) FROM memories) - ? LIMIT ?"""


DIALECT = Dialect(
    salt="SELECT value FROM salt",
    memory_numbers=_memory_numbers,
    vector=Vector,
    postings=_postings,
    holding_all=_holding_all,
)
