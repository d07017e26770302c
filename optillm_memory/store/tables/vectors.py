"""Vectors as upkeep sees them: which memories have one, which vectors nothing uses."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path

from optillm_memory.store.sqlite.connection import Connection, Readers, marks
from optillm_memory.store.sqlite.reading import UntouchedReaders


class VectorTables:
    """The part of a transaction that deletes vectors."""

    _db: Connection

    def drop_vectors(self, keys: Sequence[str], after: int) -> int:
        """Delete vectors that nothing used when the last trace was number `after`, and nothing uses since."""
        done = self._db.execute(
            f"DELETE FROM vectors WHERE key_hash IN ({marks(keys)}) AND NOT EXISTS "
            "(SELECT 1 FROM traces WHERE seq > ? AND traces.key_hash = vectors.key_hash)",
            (*keys, after),
        )
        return int(done.rowcount)

    def prune_vectors(self, fingerprint: str, limit: int) -> int:
        """Delete up to `limit` vectors of other encoders than this; return how many."""
        found = self._db.execute(
            "SELECT key_hash, fingerprint FROM vectors WHERE fingerprint <> ? LIMIT ?", (fingerprint, limit)
        ).fetchall()
        self._db.executemany("DELETE FROM vectors WHERE key_hash = ? AND fingerprint = ?", found)
        return len(found)


class VectorReads:
    """The part of the store that counts vectors."""

    _readers: Readers

    def coverage(self) -> tuple[int, dict[str, int]]:
        """Return how many memories are searched by meaning, and how many of them have a vector of each encoder."""
        with self._readers.borrow() as db:
            return coverage_of(db)

    def numbers_of(self, keys: Collection[str], after: int, upto: int) -> list[int]:
        """Return which numbers after one and up to another are of memories with these key hashes."""
        if not keys:
            return []
        with self._readers.borrow() as db:
            sql = "SELECT number, key_hash FROM memories WHERE number > ? AND number <= ?"
            return [int(number) for number, key in db.execute(sql, (after, upto)) if key in keys]

    def unused_vectors(self) -> tuple[list[str], int]:
        """Return the key hashes whose vectors no trace and no memory uses, and the number of the last trace."""
        with self._readers.borrow() as db:
            last = db.execute("SELECT coalesce(max(seq), 0) FROM traces").fetchone()[0]
            found = db.execute(
                "SELECT key_hash FROM vectors EXCEPT SELECT key_hash FROM traces EXCEPT SELECT key_hash FROM memories"
            ).fetchall()
        return [str(row[0]) for row in found], int(last)


def coverage_in(path: Path) -> tuple[int, dict[str, int]]:
    """Return the coverage of a database file. Raises StoreError."""
    with contextlib.closing(UntouchedReaders(path)) as readers, readers.borrow() as db:
        return coverage_of(db)


def coverage_of(db: Connection) -> tuple[int, dict[str, int]]:
    """Return how many memories are searched by meaning, and how many of them have a vector of each encoder."""
    total = int(db.execute(f"SELECT count(*) FROM memories WHERE {SEARCHED}").fetchone()[0])
    found = db.execute(
        f"SELECT fingerprint, count(*) FROM memories JOIN vectors USING (key_hash) WHERE {SEARCHED} "
        "GROUP BY fingerprint ORDER BY fingerprint"
    ).fetchall()
    return total, {str(fingerprint): int(count) for fingerprint, count in found}


SEARCHED = "kind = 'exemplar' AND status = 'verified'"
