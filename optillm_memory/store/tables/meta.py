"""The table `meta`: the counters by which readers notice a change, and the write probe."""

from __future__ import annotations

from optillm_memory.recall.retriever import Version
from optillm_memory.records import Scope
from optillm_memory.store.backend import Pool
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.tables import scopes

_SHARED_BY = 256  # changes with one revision, which are always read together


class Counters:
    """The write half: the revisions of one commit, and the generation."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self._revision = self._uses = 0

    def revision(self) -> int:
        """Return the revision of a change. Changes of one commit share revisions: they become visible together."""
        if self._uses % _SHARED_BY == 0:
            self._revision = self._next("revision")
        self._uses += 1
        return self._revision

    def renew_generation(self) -> None:
        """Start another generation: whatever was read of the derived tables before no longer holds."""
        self._next("generation")

    def probe(self) -> None:
        """Write one value: whether writing works at all."""
        self._db.execute("INSERT INTO meta VALUES ('probe', 1) ON CONFLICT (key) DO UPDATE SET value = meta.value + 1")

    def value(self, name: str) -> int:
        """Return a number that is kept here, 0 where it is not."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def put(self, name: str, value: int) -> None:
        """Keep a number."""
        sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        self._db.execute(sql, (name, value))

    def _next(self, counter: str) -> int:
        row = self._db.execute("UPDATE meta SET value = value + 1 WHERE key = ? RETURNING value", (counter,)).fetchone()
        return int(row[0])


def version(readers: Pool, scope: Scope | None = None) -> Version:
    """Return what differs whenever any memory or label has changed, and for a scope also when it was forgotten."""
    # In one statement: a scope that is forgotten meanwhile must not come with the revision of its end.
    with readers.borrow() as db:
        found = db.execute(_VERSION, scopes.key(scope) if scope is not None else _NO_SCOPE).fetchone()
    generation, revision, number = map(int, found)
    return Version(generation, revision, number)


_NO_SCOPE = (None,) * 4
_VERSION = f"""
    SELECT (SELECT value FROM meta WHERE key = 'generation'), (SELECT value FROM meta WHERE key = 'revision'),
    coalesce({scopes.KNOWN}, 0)"""
