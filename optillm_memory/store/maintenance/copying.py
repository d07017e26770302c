"""Copying a whole store from one database to another: SQLite to PostgreSQL and back, checked row by row."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optillm_memory.errors import NotFound, StoreError
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.settings import expanded, is_url, refuse_unknown_scheme, without_password
from optillm_memory.store.opening import open_store
from optillm_memory.store.postgres.connection import PostgresConnection
from optillm_memory.store.postgres.schema import TABLES, refuse_other_schema
from optillm_memory.store.postgres.values import Vector
from optillm_memory.store.sqlite.connection import DatabaseError, connect
from optillm_memory.store.sqlite.reading import reading

Progress = Callable[[str, int, int], None]
_BATCH = 1_000
# Made by the database itself, or kept elsewhere: the secret has a table of its own on PostgreSQL.
_ELSEWHERE = {"meta"}
_GENERATED = {"terms"}
_COUNTERS = ("revision", "generation")


def copy(source: str, target: str, progress: Progress = lambda *_: None) -> dict[str, int]:
    """Copy a store into an empty one, and check it; return how many rows each table has.

    It is one transaction: interrupted, the target is as empty as before. The source is only read. Raises NotFound
    where there is no source, InvalidField for the URL of another kind of database, StoreError where the source cannot
    be read or has the schema of an earlier release, the target holds anything or the copy is not equal.
    """
    for name, db in (("source", source), ("target", target)):
        refuse_unknown_scheme(db, name)
    if not is_url(source) and not expanded(source).is_file():
        raise NotFound(f"there is no database {source}")
    try:
        with _reading(source) as old:  # before anything is made in the target's place
            _refuse_full(target)
            with _writing(target) as new:
                said = _all_copied(old, new, progress)
    except DatabaseError as error:
        raise StoreError(f"the source {_place(source)} could not be copied: {error}; nothing was kept") from error
    return {table: rows for table, (rows, _) in said.items()}


def _all_copied(old: _Side, new: _Side, progress: Progress) -> dict[str, tuple[int, int]]:
    said = {table: _copied(old, new, table, progress) for table in TABLES if table not in _ELSEWHERE}
    new.put_meta(old.meta())
    for table, (rows, digest) in said.items():
        found = _digest(new.rows(table, new.columns(table)), lambda _: None)
        if found != (rows, digest):
            raise StoreError(f"the copy of {table} is not equal ({found[0]} of {rows} rows); nothing was kept")
    return said


def _place(db: str) -> str:
    return without_password(db) if is_url(db) else db


def _refuse_full(target: str) -> None:
    with contextlib.closing(open_store(target, queue_size=1, normal=normal_answer)) as store:
        if store.fault:
            raise StoreError(store.fault)
        held = {name: store.stats()[name] for name in ("traces", "feedback", "memories")}
    if any(held.values()):
        raise StoreError(f"the target is not empty ({held['traces']} traces): name a new file, or an empty database")


def _copied(old: _Side, new: _Side, table: str, progress: Progress) -> tuple[int, int]:
    columns, total = old.columns(table), old.count(table)
    new.empty(table)
    batch: list[tuple[Any, ...]] = []
    done = 0

    def take(row: tuple[Any, ...]) -> None:
        nonlocal done
        batch.append(row)
        if len(batch) == _BATCH:
            new.put(table, columns, batch)
            done += len(batch)
            batch.clear()
            progress(table, done, total)

    found = _digest(old.rows(table, columns), take)
    new.put(table, columns, batch)
    progress(table, total, total)
    return found


def _digest(rows: Iterator[tuple[Any, ...]], each: Callable[[tuple[Any, ...]], None]) -> tuple[int, int]:
    """Return how many rows there are, and a digest that does not depend on their order."""
    count, total = 0, 0
    for row in rows:
        plain = tuple(int(v) if isinstance(v, bool) else bytes(v) if isinstance(v, memoryview) else v for v in row)
        told = hashlib.blake2b(repr(plain).encode("utf-8", "replace"), digest_size=8).digest()
        total = (total + int.from_bytes(told, "big")) % (1 << 64)
        count += 1
        each(plain)
    return count, total


class _Side:
    """One end of a copy, on SQLite."""

    def __init__(self, db: Any) -> None:
        self._db = db

    def columns(self, table: str) -> list[str]:
        if table == "memories_fts":
            return ["rowid", "words"]
        found = self._db.execute(f"SELECT * FROM {table} LIMIT 0").description
        return sorted(column[0] for column in found if column[0] not in _GENERATED)

    def count(self, table: str) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def rows(self, table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        yield from self._db.execute(f"SELECT {', '.join(columns)} FROM {table}")

    def empty(self, table: str) -> None:
        self._db.execute(f"DELETE FROM {table}")

    def put(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(columns))
        self._db.executemany(f"INSERT INTO {table}({', '.join(columns)}) VALUES ({marks})", rows)

    def meta(self) -> dict[str, Any]:
        found = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        return {name: found[name] for name in ("salt", *_COUNTERS)}

    def put_meta(self, values: dict[str, Any]) -> None:
        self._db.executemany("UPDATE meta SET value = ? WHERE key = ?", [(v, k) for k, v in values.items()])


class _ServerSide(_Side):
    """One end of a copy, on PostgreSQL."""

    def rows(self, table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        yield from self._db.stream(f"SELECT {', '.join(columns)} FROM {table}")

    def put(self, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
        if table == "vectors":
            place = list(columns).index("vector")
            rows = [(*row[:place], Vector(row[place]), *row[place + 1 :]) for row in rows]
        super().put(table, columns, rows)
        for key in {"id", "seq", "number"} & set(columns):  # what comes later is numbered after what is there
            self._db.execute(
                f"SELECT setval(pg_get_serial_sequence('{table}', '{key}'), "
                f"coalesce((SELECT max({key}) FROM {table}), 0) + 1, FALSE)"
            )

    def meta(self) -> dict[str, Any]:
        found = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        salt = bytes(self._db.execute("SELECT value FROM salt").fetchone()[0])
        return {"salt": salt, **{name: found[name] for name in _COUNTERS}}

    def put_meta(self, values: dict[str, Any]) -> None:
        self._db.execute("UPDATE salt SET value = ?", (values["salt"],))
        super().put_meta({name: values[name] for name in _COUNTERS})


@contextlib.contextmanager
def _reading(db: str) -> Iterator[_Side]:
    """Give a side whose state stays the same while it is read."""
    if is_url(db):
        with contextlib.closing(PostgresConnection(db, read_only=True)) as server:
            refuse_other_schema(server, without_password(db))
            server.execute("SET statement_timeout = 0")
            server.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            yield _ServerSide(server)
    else:
        with contextlib.closing(reading(expanded(db))) as readers, readers.borrow() as file:
            file.execute("BEGIN")
            yield _Side(file)
            file.execute("COMMIT")


@contextlib.contextmanager
def _writing(db: str) -> Iterator[_Side]:
    """Give a side that takes all of it or nothing."""
    connection: Any = PostgresConnection(db) if is_url(db) else connect(expanded(db))
    with contextlib.closing(connection):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield (_ServerSide if is_url(db) else _Side)(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
