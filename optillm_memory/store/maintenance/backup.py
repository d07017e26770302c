"""A consistent copy of a database file, made while others write to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optillm_memory.errors import StoreError
from optillm_memory.store.sqlite.connection import DatabaseError
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.reading import UntouchedReaders

_PAGES = 1_000  # a step; what others write in between is copied, too
_PAUSE_S = 0.005
Progress = Callable[[int, int], None]


def backup(source: Path, target: Path, *, progress: Progress = lambda _done, _total: None) -> Path:
    """Copy a database file (0600) and check the copy; return its path. Raises StoreError.

    What was written before the last step is in the copy. `progress` is told (pages done, pages in all).
    """
    if not source.is_file():
        raise StoreError(f"there is no database {source}")
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # nobody else's from here on
    except OSError as error:
        raise StoreError(f"cannot make {target}: {error.strerror}; name a file that is not there yet") from error
    try:
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        _copied(source, unfinished, progress)
        _check(unfinished)
        _sync(unfinished)
        unfinished.replace(target)
        _sync(target.parent)
    except BaseException as error:
        for path in (unfinished, unfinished.with_name(unfinished.name + "-journal"), target):
            path.unlink(missing_ok=True)
        if isinstance(error, (DatabaseError, OSError)):
            raise StoreError(f"the copy could not be made: {error}") from error
        raise
    return target


def counts_of(path: Path) -> dict[str, int]:
    """Return how many rows the tables of a database file hold that nothing else holds."""
    with contextlib.closing(UntouchedReaders(path)) as readers, readers.borrow() as db:
        return {
            name: int(db.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
            for name in ("traces", "steps", "feedback", "memories")
        }


def _copied(source: Path, target: Path, progress: Progress) -> None:
    try:
        _copy(source, target, progress)
    except StoreError:  # somebody has opened the file meanwhile; from now on it is read beside those who write
        _copy(source, target, progress)


def _copy(source: Path, target: Path, progress: Progress) -> None:
    def told(_status: int, remaining: int, total: int) -> None:
        progress(total - remaining, total)

    with (
        contextlib.closing(UntouchedReaders(source)) as readers,
        readers.borrow() as db,
        contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy,
    ):
        # One state throughout: without it each commit of another process starts the copy again from the beginning.
        db.execute("BEGIN")
        db.execute("SELECT 1 FROM meta LIMIT 1").fetchone()
        db.backup(copy, pages=_PAGES, progress=told, sleep=_PAUSE_S)
        db.execute("COMMIT")
        copy.execute("PRAGMA journal_mode=DELETE").fetchone()  # the copy is one file


def _check(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy:
        found: Any = copy.execute("PRAGMA quick_check(1)").fetchone()
        if found != ("ok",):
            raise StoreError(f"the copy is not whole: {found[0]}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # not every system syncs folders
            raise
    finally:
        os.close(descriptor)
