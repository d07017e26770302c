"""Keeping the seal of a file at each commit: triggers on the writing connection alone tell it of the rows.

So no statement that writes has to know of it, and what another program writes is not sealed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optillm_memory.errors import StoreError
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.sqlite.seal import (
    CHANGED,
    DERIVED,
    LOG,
    NO_KEY,
    NUMBERED,
    TAG_AT,
    State,
    Sums,
    columns_in,
    differences,
    digest,
    encode,
    fault_of,
    link_of,
    named_place,
    place_in_sql,
    state_of,
)
from optillm_memory.store.sqlite.seal_files import Head, SealFiles
from optillm_memory.store.writer import Sealing

logger = logging.getLogger(__name__)

_PUT_STATE = """
    INSERT INTO seal(id, number, link_before, sums, notes, columns, link) VALUES (1, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET number = excluded.number, link_before = excluded.link_before, sums = excluded.sums,
    notes = excluded.notes, columns = excluded.columns, link = excluded.link"""
_PUT_TAG = "ON CONFLICT (place) DO UPDATE SET tag = excluded.tag"


class CommitSeal(Sealing):
    """Keeps the seal of a file at each commit of its writer: the triggers tell it of the rows."""

    def __init__(self, files: SealFiles, *, wanted: bool, told: Callable[[str], None]) -> None:
        """Seal the file where it is `wanted`, or sealed already; `told` hears what is wrong with the seal."""
        self.files = files
        self._wanted = wanted
        self._told = told
        self._key: bytes | None = None
        self._attached: Connection | None = None
        self._columns: dict[str, list[str]] = {}
        self._state: State | None = None
        self._next: tuple[State, Sums] | None = None
        self._kept = Sums()  # as committed
        self._sums = Sums()  # with what was written since
        self._touched = False

    # -- a commit ----------------------------------------------------------------------------------

    def begin(self, db: Connection) -> None:
        """Read the seal as it stands, in the transaction that will change it."""
        self._next, self._touched = None, False
        state = state_of(db)
        if self._attached is not db and not self._attach(db, state):
            return
        if state is None or state != self._state:
            self._load(db, state)
        self._sums = self._kept.copy()

    def mark(self) -> Sums:
        """Return what `undo` needs to go back to here."""
        return self._sums.copy()

    def undo(self, mark: Sums) -> None:
        """Go back: what was written since was rolled back."""
        self._sums = mark

    def end(self, db: Connection) -> None:
        """Write the link that ends the commit, if it changes anything that is sealed."""
        if self._attached is not db or not self._touched or self._state is None or self._key is None:
            return
        before = self._state
        sums = self._sums.masked(self._key, self._columns)
        state = before._replace(number=before.number + 1, link_before=before.link, sums=sums, link=b"")
        self._put(db, state)

    def committed(self) -> None:
        """Take note that the commit is on disk; note it outside the file, unless something is wrong with the seal."""
        if self._next is None:
            return
        (self._state, self._kept), self._next = self._next, None
        if json.loads(self._state.notes)["broken"]:
            return
        try:
            self.files.put_head(Head(self._state.number, self._state.link))
        except OSError as error:
            logger.error("agent_memory: the seal's latest commit could not be noted: %s", error)

    def _put(self, db: Connection, state: State) -> None:
        assert self._key is not None
        state = state._replace(link=link_of(self._key, state))
        db.execute(_PUT_STATE, state)
        self._next = (state, self._sums.copy())
        self._state = state  # of this transaction; `begin` compares it with what is there

    # -- beginning ---------------------------------------------------------------------------------

    def _attach(self, db: Connection, state: State | None) -> bool:
        """Make the triggers; return whether the file is sealed."""
        self._state = None
        if state is None and not self._wanted and not self.files.exist():
            return False
        self._key = self.files.key()
        if self._key is None and state is None and self.files.head() is None:
            try:
                self._key = self.files.make_key()
            except OSError as error:
                self._told(f"the key of the seal cannot be made: {error}")
                return False
        if self._key is None:
            self._told(NO_KEY)
            return False
        self._columns = {table: _columns(db, table) for table in (*LOG, *DERIVED)}
        _make_functions(db, self._add, self._take)
        for table, columns in self._columns.items():
            for statement in _triggers(table, columns):
                db.execute(statement)
        self._attached = db
        return True

    def _add(self, table: str, *values: Any) -> bytes:
        assert self._key is not None
        found = digest(self._key, table, values)
        self._sums.add(table, found)
        self._touched = True
        return found[TAG_AT:]

    def _take(self, table: str, *values: Any) -> None:
        assert self._key is not None
        self._sums.add(table, digest(self._key, table, values), -1)
        self._touched = True

    def _load(self, db: Connection, state: State | None) -> None:
        """Take over a state that is not the one this process wrote; seal what is not sealed yet as it is found."""
        assert self._key is not None
        head = self.files.head()
        fault = fault_of(self._key, state, head)
        if state is None or fault == CHANGED:
            number = max(head.number if head else 0, state.number if state else 0)
            self._sums = self._kept = Sums()
            self._state = State(number, b"", b"", self._notes("", db), "{}", b"")
            self._reseal(db, self._columns, fault)
        elif columns_in(state.columns) != self._columns:  # a migration: what was sealed is checked by its old columns
            self._state, self._sums = state, Sums()
            fault = fault or "; ".join(differences(db, self._key, state))
            self._reseal(db, self._columns, fault)
        else:
            self._state = state
            self._kept = Sums.unmasked(self._key, state.sums, self._columns)
            if fault and not json.loads(state.notes)["broken"]:
                self._touched = True  # it must not look well again once further commits have come
                self._state = state._replace(notes=self._notes(fault, db, state.notes))
        if fault or state is None:  # else what a look at all rows has found stands
            self._told(fault)

    def _notes(self, fault: str, db: Connection, before: str = "") -> str:
        if before:
            return encode({**json.loads(before), "broken": fault})
        counted = ("traces", "feedback")
        counts = {name: int(db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]) for name in counted}
        return encode({"since": time.time(), "found": counts, "broken": fault})

    def _reseal(self, db: Connection, tables: Sequence[str] | Mapping[str, Any], fault: str) -> None:
        """Seal the rows of tables as they are found."""
        assert self._key is not None
        assert self._state is not None
        for table in tables:
            self._sums.total.pop(table, None)
            self._sums.count.pop(table, None)
            if table in NUMBERED:
                db.execute("DELETE FROM seals WHERE place > 0 AND place % 8 = ?", (NUMBERED[table][0],))
            place = place_in_sql(table, table)
            columns = ", ".join(self._columns[table])
            if place:
                db.execute(
                    f"INSERT INTO seals(place, tag) SELECT {place}, seal_in('{table}', {columns}) "
                    f"FROM {table} WHERE TRUE {_PUT_TAG}"
                )
            else:
                db.execute(f"SELECT count(seal_in('{table}', {columns})) FROM {table}").fetchone()
        self._kept = self._sums.copy()
        self._state = self._state._replace(
            notes=self._notes(fault, db, self._state.notes), columns=encode(self._columns)
        )
        self._touched = True

    # -- what an operator asks for, within a commit ------------------------------------------------

    def refuse_broken(self, db: Connection) -> None:
        """Raise StoreError where the log is not what was written: it must not become the truth by a rebuild."""
        if self._attached is not db or self._key is None or self._state is None:
            return
        state = self._state._replace(sums=self._sums.masked(self._key, self._columns))
        if found := differences(db, self._key, state, LOG):
            raise StoreError(
                f"the log was changed from outside ({'; '.join(found)[:500]}); restore a backup, or look at it and "
                "run: optillm-memory rebuild --accept-changes"
            )

    def derived_again(self, db: Connection, *, accept: bool) -> None:
        """Seal what was just derived from the log, and with `accept` all the rest as it is found."""
        if self._attached is not db or self._state is None:
            return
        if accept:
            self.accept(db)
        else:
            self._reseal(db, DERIVED, str(json.loads(self._state.notes)["broken"]))

    def accept(self, db: Connection, *, new_key: bool = False) -> None:
        """Seal everything as it is found; what was wrong with the seal is settled. Raises StoreError."""
        if self._attached is not db:
            self._wanted = True
            if state_of(db) is not None and self.files.key() is None:
                db.execute("DELETE FROM seal")
                self.files.remove()
            if not self._attach(db, None):
                raise StoreError(f"the key of the seal cannot be made in {self.files.key_path.parent}")
        if new_key:
            self._key = self.files.replace_key()
        head, state = self.files.head(), state_of(db)
        number = max(head.number if head else 0, state.number if state else 0)
        self._sums = Sums()
        self._state = State(number, b"", b"", self._notes("", db), "{}", state.link if state else b"")
        self._reseal(db, self._columns, "")
        self._told("")

    def remove(self, db: Connection) -> None:
        """Take the seal off: the tables, the triggers, the key and what was noted outside."""
        for table in self._columns:
            for when in ("in", "at", "out"):
                db.execute(f"DROP TRIGGER IF EXISTS temp.seal_{when}_{table}")
        db.execute("DELETE FROM seals")
        db.execute("DELETE FROM seal")
        self.files.remove()
        self._attached, self._wanted, self._state = None, False, None
        self._told("")


def _columns(db: Connection, table: str) -> list[str]:
    return [str(row[1]) for row in db.execute(f"PRAGMA main.table_info({table})").fetchall()]


def _make_functions(db: Connection, add: Callable[..., bytes], take: Callable[..., None]) -> None:
    db.create_function("seal_in", -1, add)
    db.create_function("seal_out", -1, take)
    db.create_function("seal_place", -1, lambda table, *values: named_place(table, values))


def _triggers(table: str, columns: Sequence[str]) -> Iterator[str]:
    """Yield the statements that make the triggers of a table on this connection alone."""
    new, old = (", ".join(f"{row}.{name}" for name in columns) for row in ("new", "old"))
    into, gone = f"seal_in('{table}', {new})", f"SELECT seal_out('{table}', {old});"
    if place := place_in_sql(table, "new"):
        put = f"INSERT INTO seals(place, tag) VALUES ({place}, {into}) {_PUT_TAG};"
        drop = f"DELETE FROM seals WHERE place = {place_in_sql(table, 'old')};"
    else:
        put, drop = f"SELECT {into};", ""
    for when, event, body in (("in", "INSERT", put), ("at", "UPDATE", gone + put), ("out", "DELETE", gone + drop)):
        yield f"DROP TRIGGER IF EXISTS temp.seal_{when}_{table}"
        yield f"CREATE TEMP TRIGGER seal_{when}_{table} AFTER {event} ON main.{table} BEGIN {body} END"
