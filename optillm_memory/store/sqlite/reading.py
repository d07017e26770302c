"""Reading a database file without touching it: no file is made beside it, nothing in it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from optillm_memory.errors import NotFound, StoreError, StoreTooOld
from optillm_memory.store.sqlite.connection import (
    Connection,
    DatabaseError,
    Identity,
    Readers,
    connect,
    identity,
    is_current,
    refuse_newer,
)
from optillm_memory.store.sqlite.library import wal_is_safe

_OLDEST_READ = 11  # the migration whose tables this release can read; what came later changed no column


def reading(path: Path) -> UntouchedReaders:
    """Return the readers of a file whose schema this release can read.

    Raises NotFound where there is no file, StoreTooNew, StoreTooOld, and StoreError for another kind of file.
    """
    readers = UntouchedReaders(path)
    with readers.borrow() as db:
        _refuse_other_schema(db, path)
    return readers


class UntouchedReaders(Readers):
    """Lends connections that leave no file behind.

    To open a file that nobody else has open makes SQLite create a WAL and its index, which stay. So it is read as one
    that cannot change; that nobody changed it is checked afterwards.
    """

    def __init__(self, path: Path, size: int = 16) -> None:
        """Keep the path. Raises NotFound where there is no file."""
        if not path.is_file():
            raise NotFound(f"there is no database {path}")
        super().__init__(path, size)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Connection]:
        """Lend a connection. Raises StoreError where the file is broken, or was written while it was read."""
        before = _state(self._path)
        if before is None:  # somebody has it open, or left a journal: what that holds is read, too
            try:
                with super().borrow() as db:
                    yield db
            except StoreError as error:
                journal = self._path.with_name(f"{self._path.name}-journal")
                if "readonly" not in str(error) or not journal.exists():
                    raise
                raise StoreError(
                    f"cannot read {self._path}: a write was broken off, and what {journal.name} holds of it must be "
                    "undone first; run: optillm-memory migrate"
                ) from error
            return
        try:
            with contextlib.closing(connect(self._path, read_only=True, immutable=True)) as db:
                yield db
        except DatabaseError as error:
            self._refuse_changed(before)
            raise StoreError(f"cannot read {self._path}: {error}") from error
        self._refuse_changed(before)

    def _refuse_changed(self, before: _State) -> None:
        if _state(self._path) != before:
            raise StoreError(f"{self._path} was written while it was read; try again")


_State = tuple[Identity, int, int]


def _state(path: Path) -> _State | None:
    """Return what tells a file that nobody has open from the same file later on; None where a journal is there."""
    present = identity(path)
    journals = (path.with_name(f"{path.name}{suffix}") for suffix in ("-wal", "-journal"))
    try:
        status = path.stat()
    except OSError:
        return None
    if not wal_is_safe() or any(journal.exists() for journal in journals):
        return None
    return present, status.st_size, status.st_mtime_ns


def _refuse_other_schema(db: Connection, path: Path) -> None:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone():
        raise StoreError(f"{path} is not a database of optillm-memory")
    if is_current(db):
        return
    refuse_newer(db, path)
    found = db.execute("SELECT max(name) FROM _sqlite_migrations WHERE migration_set = 'optillm_memory'").fetchone()
    if found[0] is None or int(found[0][1:4]) < _OLDEST_READ:
        raise StoreTooOld(
            f"{path} has the schema of an earlier release and was opened read-only; "
            "bring it up to date with: optillm-memory migrate"
        )
