"""The table `vectors`: one vector for each task and encoder, by the hash of the task's key."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from optillm_memory.conversation.parse import key_of
from optillm_memory.records import EVERYTHING, Tenant, View
from optillm_memory.store.backend import Dialect, Pool
from optillm_memory.store.sqlite.connection import Connection, WritingConnection, marks
from optillm_memory.store.tables.scopes import seen

# Recall leaves out what is superseded; to the gate it is a neighbour that disagrees.
SEARCHED = "kind = 'exemplar' AND status IN ('verified', 'superseded')"
# Numbers examined in one statement: some milliseconds, so that no reader holds on to an old state for long.
_STRETCH = 2_000


@lru_cache(maxsize=64)
def key_hash(task: str) -> str:
    """Return the id under which the vector of a task's key is kept."""
    return hashlib.blake2b(key_of(task).encode("utf-8", "replace"), digest_size=16).hexdigest()


@dataclass
class VectorTable:
    """The write half."""

    db: WritingConnection
    dialect: Dialect

    def put(self, vectors: Iterable[tuple[str, bytes]], fingerprint: str) -> None:
        """Keep vectors by key hash; a memory that had none becomes searchable with its next revision."""
        self.db.later(
            "INSERT INTO vectors(key_hash, fingerprint, vector) VALUES (?, ?, ?) "
            "ON CONFLICT (key_hash, fingerprint) DO NOTHING",
            [(key, fingerprint, self.dialect.vector(vector)) for key, vector in vectors],
        )

    def drop(self, keys: Sequence[str], after: int) -> int:
        """Delete vectors that nothing used when the last trace was number `after`, and nothing has used since."""
        done = self.db.execute(
            f"DELETE FROM vectors WHERE key_hash IN ({marks(keys)}) AND NOT EXISTS "
            "(SELECT 1 FROM traces WHERE seq > ? AND traces.key_hash = vectors.key_hash)",
            (*keys, after),
        )
        return int(done.rowcount)

    def prune(self, fingerprint: str, limit: int) -> int:
        """Delete up to `limit` vectors of other encoders than this; return how many."""
        found = self.db.execute(
            "SELECT key_hash, fingerprint FROM vectors WHERE fingerprint <> ? LIMIT ?", (fingerprint, limit)
        ).fetchall()
        self.db.executemany("DELETE FROM vectors WHERE key_hash = ? AND fingerprint = ?", found)
        return len(found)

    def rename(self, keys: Sequence[str], former: Collection[str], fingerprint: str) -> set[str]:
        """Give vectors with a former fingerprint of an encoder its present one; return the key hashes that had any."""
        renamed: set[str] = set()
        for name in former:
            found = self.db.execute(
                f"UPDATE vectors SET fingerprint = ? WHERE key_hash IN ({marks(keys)}) AND fingerprint = ? AND NOT "
                "EXISTS (SELECT 1 FROM vectors AS own WHERE own.key_hash = vectors.key_hash AND own.fingerprint = ?) "
                "RETURNING key_hash",
                (fingerprint, *keys, name, fingerprint),
            )
            renamed |= {str(row[0]) for row in found.fetchall()}
        return renamed


@dataclass
class VectorReads:
    """The read half, for maintenance: which memories have a vector, which vectors nothing uses."""

    readers: Pool

    def coverage(self, view: View | Tenant = EVERYTHING) -> tuple[int, dict[str, int]]:
        """Return how many memories are searched by meaning, and how many of them have a vector of each encoder."""
        with self.readers.borrow() as db:
            return coverage_of(db, view)

    def last_number(self) -> int:
        """Return the number of the latest memory, 0 where there is none."""
        with self.readers.borrow() as db:
            return int(db.execute("SELECT coalesce(max(number), 0) FROM memories").fetchone()[0])

    def missing(self, fingerprint: str, after: int, limit: int) -> tuple[list[tuple[int, str, str]], int]:
        """Return (number, key, key hash) of memories without a vector of this encoder, and the last number examined.

        Examines a stretch of the numbers after `after`.
        """
        upto = max(min(after + _STRETCH, self.last_number()), after)
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT number, task, key_hash FROM memories WHERE number > ? AND number <= ? AND kind = 'exemplar' "
                "AND key_hash <> '' AND NOT EXISTS "
                "(SELECT 1 FROM vectors WHERE vectors.key_hash = memories.key_hash AND fingerprint = ?) "
                "ORDER BY number LIMIT ?",
                (after, upto, fingerprint, limit),
            ).fetchall()
        missing = [(int(number), key_of(task), key) for number, task, key in found]
        return missing, missing[-1][0] if len(missing) == limit else upto

    def numbers_of(self, keys: Collection[str], after: int, upto: int) -> list[int]:
        """Return which numbers after one and up to another are of memories with these key hashes."""
        if not keys:
            return []
        with self.readers.borrow() as db:
            sql = "SELECT number, key_hash FROM memories WHERE number > ? AND number <= ?"
            return [int(number) for number, key in db.execute(sql, (after, upto)) if key in keys]

    def unused(self) -> tuple[list[str], int]:
        """Return the key hashes whose vectors no trace and no memory uses, and the number of the last trace."""
        with self.readers.borrow() as db:
            last = db.execute("SELECT coalesce(max(seq), 0) FROM traces").fetchone()[0]
            found = db.execute(
                "SELECT key_hash FROM vectors EXCEPT SELECT key_hash FROM traces EXCEPT SELECT key_hash FROM memories"
            ).fetchall()
        return [str(row[0]) for row in found], int(last)


def coverage_of(db: Connection, view: View | Tenant = EVERYTHING) -> tuple[int, dict[str, int]]:
    """Return how many memories are searched by meaning, and how many of them have a vector of each encoder."""
    chosen, values = SEARCHED, tuple[str, ...]()
    if View.of(view) != EVERYTHING:
        condition, values = seen(view)
        chosen = f"{SEARCHED} AND scope_id IN (SELECT id FROM scopes WHERE {condition})"
    total = int(db.execute(f"SELECT count(*) FROM memories WHERE {chosen}", values).fetchone()[0])
    found = db.execute(
        f"SELECT fingerprint, count(*) FROM memories JOIN vectors USING (key_hash) WHERE {chosen} "
        "GROUP BY fingerprint ORDER BY fingerprint",
        values,
    ).fetchall()
    return total, {str(fingerprint): int(count) for fingerprint, count in found}
