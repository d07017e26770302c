"""A disk that fails on demand, under the real store: APSW's file layer, with the interface of our own connections.

`on(disk)` makes every connection that the store opens use it. Needs the package `apsw`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import apsw

from optillm_memory.store.deferred import Deferring
from optillm_memory.store.sqlite import connection as store_connection
from optillm_memory.store.sqlite import library
from optillm_memory.store.sqlite.connection import DatabaseError, IntegrityError, OperationalError

_numbers = itertools.count()


class Disk(apsw.VFS):
    """Passes everything to the system's disk; `before` is called before each operation, and may raise an error.

    Operations are `read`, `write`, `truncate`, `sync`, `delete` and `open`.
    """

    def __init__(self, before: Callable[[str, str], None] = lambda _operation, _name: None) -> None:
        """Register under a unique name; `before` gets the operation and the file's name."""
        self.name = f"faultdisk-{next(_numbers)}"
        self.before = before
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - the layer's name
        """Open a file."""
        return File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        """Remove a file."""
        self.before("delete", filename)
        super().xDelete(filename, syncdir)

    def excepthook(self, *_: object) -> bool:
        """Print nothing: the caller gets the error."""
        return True

    def opened(self, path: str) -> None:
        """Record that a file is about to be opened."""

    def done(self, operation: str, path: str, *what: Any) -> None:
        """Record an operation on a file."""


class File(apsw.VFSFile):
    """A file on such a disk."""

    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        """Open it."""
        self._disk = disk
        self._path = str(name.filename() if isinstance(name, apsw.URIFilename) else name or "")
        disk.before("open", self._path)
        disk.opened(self._path)
        # SQLite syncs the folder with the first sync of a journal, so that the file is found after a restart.
        self._syncs_folder = bool(flags[0] & (apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL))
        super().__init__("", name, flags)

    def excepthook(self, *_: object) -> bool:
        """Print nothing, like the disk."""
        return True

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        """Read."""
        self._disk.before("read", self._path)
        return super().xRead(amount, offset)

    def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802
        """Write."""
        self._disk.before("write", self._path)
        super().xWrite(data, offset)
        self._disk.done("write", self._path, bytes(data), offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        """Truncate to a size."""
        self._disk.before("truncate", self._path)
        super().xTruncate(newsize)
        self._disk.done("truncate", self._path, newsize)

    def xSync(self, flags: int) -> None:  # noqa: ARG002, N802
        """Sync the file."""
        self._disk.before("sync", self._path)
        self._disk.done("sync", self._path)
        if self._syncs_folder:
            self._disk.done("sync folder", self._path)
            self._syncs_folder = False


class Cursor:
    """The result of a statement, with the interface of the standard library's cursor."""

    def __init__(self, rows: list[tuple[Any, ...]], description: Any, rowcount: int, lastrowid: int) -> None:
        """Keep all rows: none may be read after the next statement has begun."""
        self._rows = iter(rows)
        self.description = description
        self.rowcount = rowcount
        self.lastrowid = lastrowid

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._rows

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row."""
        return next(self._rows, None)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the remaining rows."""
        return list(self._rows)


class Connection(Deferring):
    """An APSW connection with those methods of the standard library's that the store uses."""

    def __init__(self, uri: str, disk: Disk, timeout_s: float, statements: int) -> None:
        """Open a database file on a disk."""
        super().__init__()
        flags = apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        with _as_ours():
            self._db = apsw.Connection(uri, flags=flags, vfs=disk.name, statementcachesize=statements)
            self._db.set_busy_timeout(int(timeout_s * 1000))

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return bool(self._db.in_transaction)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Cursor:
        """Run a statement to its end, after what was deferred."""
        self.write_deferred()
        return self._run(lambda cursor: cursor.execute(sql, tuple(values)))

    def executemany(self, sql: str, values: Iterable[Sequence[Any]]) -> Cursor:
        """Run a statement for each row of values, after what was deferred."""
        self.write_deferred()
        return self._run(lambda cursor: cursor.executemany(sql, [tuple(row) for row in values]))

    def _run(self, work: Callable[[apsw.Cursor], Iterable[Any]]) -> Cursor:
        described: list[Any] = []

        def describe(cursor: apsw.Cursor, _sql: str, _values: Any) -> bool:
            described[:] = cursor.get_description()  # not available after all rows are read
            return True

        cursor = self._db.cursor()
        cursor.exec_trace = describe
        with _as_ours():
            rows = list(work(cursor))
        return Cursor(rows, described, self._db.changes(), self._db.last_insert_rowid())

    def close(self) -> None:
        """Close it; errors are ignored, as by the standard library."""
        with contextlib.suppress(apsw.Error):
            self._db.close()


@contextlib.contextmanager
def _as_ours() -> Iterator[None]:
    """Raise APSW's errors as the classes that the store handles."""
    try:
        yield
    except apsw.ConstraintError as error:
        raise IntegrityError(str(error)) from error
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise DatabaseError(str(error)) from error
    except apsw.Error as error:
        raise OperationalError(str(error)) from error


class _Library:
    """Replaces the module `sqlite3` where the store opens its connections."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(_OURS, name)

    def connect(self, database: str, *, timeout: float, cached_statements: int = 128, **_: Any) -> Connection:
        """Open a connection through the disk."""
        return Connection(database, self._disk, timeout, cached_statements)


_OURS = library.sqlite3


@contextlib.contextmanager
def on(disk: Disk) -> Iterator[None]:
    """Make every connection that the store opens in the body use a disk."""
    with mock.patch.object(store_connection, "sqlite3", _Library(disk)):
        yield


class PowerFailure(Disk):
    """A disk whose power fails after so many operations: each write that was not synced is kept, dropped or torn."""

    SECTOR = 512

    def __init__(self, after: int, chance: Callable[[], float], *, honest: bool = True) -> None:
        """`chance` returns numbers in [0, 1); a disk that is not `honest` only pretends to sync."""
        self._remaining = after
        self._chance = chance
        self._honest = honest
        self._lock = threading.RLock()
        self._synced: dict[str, bytearray | None] = {}
        self._pending: dict[str, list[tuple[Any, ...]]] = {}
        self.failed = False
        super().__init__(self._count)

    def _count(self, operation: str, _path: str) -> None:
        with self._lock:
            if operation in ("write", "truncate", "sync", "delete"):
                self._remaining -= 1
                self.failed = self.failed or self._remaining < 0
            if self.failed:
                raise apsw.IOError("the power has failed")

    def opened(self, path: str) -> None:
        """Count the present content as synced."""
        with self._lock:
            if path and path not in self._synced:
                file = Path(path)
                self._synced[path] = bytearray(file.read_bytes()) if file.exists() else None
                self._pending[path] = []

    def done(self, operation: str, path: str, *what: Any) -> None:
        """Keep the operations on a file until it is synced."""
        with self._lock:
            if not path:
                return  # a temporary file, which a restart does not use
            if not operation.startswith("sync"):
                self._pending[path].append((operation, *what))
            elif not self._honest:
                return
            elif operation == "sync":
                self._synced[path] = self._after(path, lambda change: change)
                self._pending[path] = []
            else:
                self._sync_folder()

    def _sync_folder(self) -> None:
        """Make removals final; later changes of the same files are still uncertain."""
        for path, changes in self._pending.items():
            if ("delete",) in changes:
                last = len(changes) - changes[::-1].index(("delete",))
                self._synced[path], self._pending[path] = None, changes[last:]

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        """Remove a file; it may be back after the power loss if its folder was not synced."""
        super().xDelete(filename, syncdir)
        with self._lock:
            self._pending.setdefault(filename, []).append(("delete",))
            if syncdir and self._honest:
                self._sync_folder()

    def write_remaining(self, folder: Path) -> None:
        """Write what a restart finds to another folder. The index of the WAL is in memory, and lost."""
        with self._lock:
            for path in self._pending:
                remaining = self._after(path, self._fate)
                if remaining is not None:
                    (folder / Path(path).name).write_bytes(remaining)

    def _fate(self, change: tuple[Any, ...]) -> tuple[Any, ...] | None:
        draw = self._chance()
        if change[0] == "write" and draw < 1 / 3:
            return self._torn(*change[1:])
        return change if draw < 2 / 3 else None

    def _torn(self, data: bytes, offset: int) -> tuple[Any, ...]:
        """Return a write of which each sector was written or not."""
        sectors = []
        start = 0
        while start < len(data):
            end = min(len(data), start + self.SECTOR - (offset + start) % self.SECTOR)
            if self._chance() < 0.5:
                sectors.append((data[start:end], offset + start))
            start = end
        return ("sectors", sectors)

    def _after(self, path: str, fate: Callable[[tuple[Any, ...]], tuple[Any, ...] | None]) -> bytearray | None:
        content = self._synced.get(path)
        content = None if content is None else bytearray(content)
        for change in filter(None, map(fate, self._pending[path])):
            operation, what = change[0], change[1:]
            if operation == "delete":
                content = None
                continue
            content = bytearray() if content is None else content
            if operation == "truncate":
                del content[what[0] :]
                content.extend(bytes(what[0] - len(content)))
            for data, offset in [what] if operation == "write" else what[0] if operation == "sectors" else []:
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
        return content
