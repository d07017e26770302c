"""The search of vectors on PostgreSQL: an HNSW index (pgvector) for each encoder, built in the background."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.records import Scope, ThreadStarter
from optillm_memory.store.postgres.connection import PostgresConnection, PostgresReaders
from optillm_memory.store.postgres.values import Vector
from optillm_memory.store.sqlite.connection import DatabaseError
from optillm_memory.store.tables import scopes
from optillm_memory.store.tables.vectors import SEARCHED

logger = logging.getLogger(__name__)
_SEARCHED = 100  # candidates that the index keeps while it searches (pgvector's hnsw.ef_search)
# Held while an index of vectors is built and while the vectors are rewritten. It is only tried, never waited for inside
# a statement: that would hold a snapshot, and an index that is built concurrently waits for all other snapshots.
BUILDERS_LOCK = 0x6F70746D656E
_LOOK_AGAIN_S = 10.0  # while another proxy builds, or after a failure


class HnswSearch:
    """Searches the vectors of one encoder at a time; has their index built where there is none."""

    def __init__(self, url: str, readers: PostgresReaders, start: ThreadStarter | None) -> None:
        """Start with no index known; `start` starts the thread that builds one, None builds none."""
        self._url = url
        self._readers = readers
        self._start = start
        self._indexed: set[str] = set()  # encoders whose vectors have their index
        self._look_at: dict[str, float] = {}  # when to look again whether those of others have
        self._lock = threading.Lock()

    def nearest(
        self, scope: Scope, fingerprint: str, query: NDArray[np.float32], count: int
    ) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of the scope's nearest memories through HNSW; nothing while its index is built."""
        if not self._index_is_there(fingerprint, len(query)):
            return []
        sql = _NEAREST.format(
            dimension=len(query), fingerprint=_quoted(fingerprint), scope=scopes.KNOWN, searched=SEARCHED
        )
        vector = Vector(query.astype(np.float32).tobytes())
        with self._readers.borrow() as db:
            db.use({"hnsw.ef_search": str(max(_SEARCHED, 2 * count)), "hnsw.iterative_scan": "relaxed_order"})
            found = db.execute(sql, (vector, *scopes.key(scope), vector, count)).fetchall()
        best = sorted(((int(number), 1.0 - float(distance)) for number, distance in found), key=lambda pair: -pair[1])
        return best[:count]

    def index_files(self) -> None:
        """Return None: the vectors are in the database."""

    def read_ahead(self) -> Iterator[None]:
        """Do nothing: the server sees to that itself."""
        yield from ()

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
            elif self._start is not None and self._look_at.get(fingerprint) != math.inf:
                self._start("agent-memory-hnsw", partial(self._build_index, fingerprint, dimension))
                self._look_at[fingerprint] = math.inf  # the thread, which waits for the lock at the end, builds it
        return there

    def _build_index(self, fingerprint: str, dimension: int) -> None:
        there = False
        try:
            with closing(PostgresConnection(self._url)) as connection:
                there = _indexed(connection, fingerprint, dimension)
        except DatabaseError as error:
            logger.error("agent_memory: the index of vectors could not be built: %s", error)
        finally:
            with self._lock:
                if there:
                    self._indexed.add(fingerprint)
                self._look_at[fingerprint] = time.monotonic() + _LOOK_AGAIN_S


def _indexed(connection: PostgresConnection, fingerprint: str, dimension: int) -> bool:
    """Whether the vectors of an encoder have their index now; builds it, unless another proxy does."""
    name = _index_name(fingerprint)
    if _is_valid(connection, name):
        return True
    if not may_build(connection):
        return False
    if not _is_valid(connection, name):  # else another has finished meanwhile
        connection.execute(f"DROP INDEX IF EXISTS {name}")  # what one left who was stopped while it built
        connection.execute(
            f"CREATE INDEX CONCURRENTLY {name} ON vectors USING hnsw ((vector::halfvec({dimension})) "
            f"halfvec_cosine_ops) WHERE fingerprint = {_quoted(fingerprint)}"
        )
        connection.execute(UNCOUNTED.format(name))
    return True


def _index_name(fingerprint: str) -> str:
    return "vectors_" + hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()


def may_build(connection: PostgresConnection) -> bool:
    """Take the builders' lock, until the connection is closed, unless somebody else has it."""
    return bool(connection.execute("SELECT pg_try_advisory_lock(?)", (BUILDERS_LOCK,)).fetchone()[0])


def _is_valid(connection: Any, name: str) -> bool:
    found = connection.execute(_VALID, (name,)).fetchone()
    return found is not None and bool(found[0])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


_NEAREST = """
    SELECT number, vector::halfvec({dimension}) <=> CAST(CAST(? AS vector) AS halfvec({dimension})) AS distance
    FROM vectors JOIN memories ON memories.key_hash = vectors.key_hash
    WHERE fingerprint = {fingerprint} AND scope_id = {scope} AND {searched}
    ORDER BY vector::halfvec({dimension}) <=> CAST(CAST(? AS vector) AS halfvec({dimension})) LIMIT ?"""
_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(?)"
# The statistics of an index on vectors are of no use to anybody, and hold vectors.
UNCOUNTED = "ALTER INDEX {} ALTER COLUMN 1 SET STATISTICS 0"
