"""The reading side of the seal: rows that a request may use are checked by their tags, and now and then all rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from optillm_memory.errors import StoreError
from optillm_memory.store.sqlite.connection import Connection, Readers, marks
from optillm_memory.store.sqlite.seal import (
    TAG_AT,
    columns_in,
    differences,
    digest,
    fault_of,
    place_of,
    primary_key,
    state_of,
    tables_there,
)
from optillm_memory.store.sqlite.seal_files import SealFiles

# What settles it: what is derived is derived again, the log is restored or accepted.
SETTLE = "restore a backup, run: optillm-memory rebuild, or accept it with: optillm-memory seal --accept"
logger = logging.getLogger(__name__)


class SealReads:
    """Says of rows whether they are as they were written, and of the database what is wrong with it."""

    def __init__(self, files: SealFiles) -> None:
        """Keep where the key is; a database that has none is not sealed."""
        self.files = files
        self.on = False
        self.skipped = 0  # rows that were not as they were written, and so were not used
        self.checked_at = 0.0  # Unix seconds; 0: not yet
        self._key: bytes | None = None
        self._fault = ""

    @property
    def fault(self) -> str:
        """What shows that the database was changed from outside; empty where nothing does."""
        return self._fault

    def told(self, fault: str) -> None:
        """Hear from who writes, or who checks, what is wrong with the seal; it is logged when it changes."""
        self._key = self.files.key()
        self.on = self._key is not None or bool(fault)
        if fault and fault != self._fault:
            logger.error(
                "agent_memory: memory is silent, for the database was changed from outside (%s); %s", fault, SETTLE
            )
        self._fault = fault

    def look(self, pool: Readers) -> None:
        """See whether the database is sealed, and that the seal as such is whole; no row is looked at."""
        head = self.files.head()  # first: it is never ahead of what is read after it
        with pool.borrow() as db:
            state = state_of(db) if tables_there(db) else None
        if state is not None or self.files.exist():
            self.told(fault_of(self.files.key(), state, head))

    def check(self, pool: Readers, rest: Callable[[], None] = lambda: None) -> list[str]:
        """Compare every row with the seal, and act by what was found; return what is wrong.

        `rest` is called now and then. Raises StoreError where the file is opened anew meanwhile.
        """
        found = self.examine(pool, rest)
        if found is not None:
            self.told("; ".join(found))
            self.checked_at = time.time()
        return found or []

    def examine(self, pool: Readers, rest: Callable[[], None] = lambda: None) -> list[str] | None:
        """Compare every row with the seal; return what is wrong, None where there is no seal."""

        def breathe() -> None:
            rest()
            if pool.asked_back:
                raise StoreError("the database is being opened again")

        head, key = self.files.head(), self.files.key()
        with pool.borrow() as db:
            if not tables_there(db):
                return None
            db.execute("BEGIN")  # one state throughout
            state = state_of(db)
            if state is None and not self.files.exist():
                db.execute("COMMIT")
                return None
            found = [fault] if (fault := fault_of(key, state, head)) else []
            if state is not None and key is not None:
                found += differences(db, key, state, rest=breathe)
            db.execute("COMMIT")
        return found

    def genuine(self, db: Connection, table: str, condition: str, values: Sequence[Any]) -> set[Any] | None:
        """Return the keys of those rows of a table that are as they were written; None where there is no seal."""
        if not self.on:
            return None
        row = db.execute("SELECT columns FROM seal").fetchone()
        if row is None and not self._fault:
            return None  # nothing was written since it is to be sealed
        if row is None or self._key is None or table not in (columns := columns_in(row[0])):
            return set()
        names = columns[table]
        found = db.execute(f"SELECT {', '.join(names)} FROM {table} WHERE {condition}", tuple(values)).fetchall()
        own = [names.index(name) for name in primary_key(table)]
        keys = [tuple(row[place] for place in own) for row in found]
        places = [place_of(table, key) for key in keys]
        tags = dict(db.execute(f"SELECT place, tag FROM seals WHERE place IN ({marks(places)})", places).fetchall())
        good = {
            key if len(key) > 1 else key[0]
            for row, key, place in zip(found, keys, places, strict=True)
            if tags.get(place) == digest(self._key, table, row)[TAG_AT:]
        }
        self.skipped += len(found) - len(good)
        return good

    def genuine_memories(self, db: Connection, condition: str, values: Sequence[Any]) -> set[int] | None:
        """Return the numbers of those memories that are as they were written, as is the name of their scope."""
        numbers = self.genuine(db, "memories", condition, values)
        if not numbers:
            return numbers
        of = dict(db.execute(f"SELECT number, scope_id FROM memories WHERE number IN ({marks(numbers)})", [*numbers]))
        scopes = {*of.values()}
        known = self.genuine(db, "scopes", f"id IN ({marks(scopes)})", [*scopes])
        return {number for number in numbers if known is None or of[number] in known}
