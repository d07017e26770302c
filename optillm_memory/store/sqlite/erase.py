"""Erasing from a database file and its WAL what was deleted in it, while others use it; and compacting the file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from optillm_memory.errors import StoreError
from optillm_memory.store.sqlite.connection import (
    WORDS_LEFT,
    Connection,
    DatabaseError,
    checkpoint,
    open_writer,
)
from optillm_memory.store.sqlite.library import words_are_secure
from optillm_memory.store.sqlite.pages import scrub
from optillm_memory.store.sqlite.writer import SqliteWriter

_PATIENCE_S = 30.0  # for readers of an earlier state, in all
_WAIT_S = 60.0  # for the writer to come to a job
_AGAIN_S = 0.1  # between attempts
_MERGED = 200  # pages of the full-text index a step: nobody who writes waits long
_SETTLED = 2  # a step of merging that did nothing changes fewer rows

T = TypeVar("T")


class Eraser:
    """Erases step by step, each between two commits of the writer."""

    def __init__(self, path: Path, writer: SqliteWriter, progress: Callable[[str], None]) -> None:
        """Keep what is erased from; readers of an earlier state are waited for from now on."""
        self._path, self._writer, self._progress = path, writer, progress
        self._deadline = time.monotonic() + _PATIENCE_S

    def erase(self) -> str:
        """Overwrite all that was deleted; return what kept it from that, empty when all is done."""
        try:
            self._merge_words()
            for _ in range(2):  # a page that was moved meanwhile, from ahead to behind, is met by the second round
                place: int | None = 0
                while place is not None:
                    self._progress("overwriting what was deleted")
                    place = self._patiently(partial(scrub, path=self._path, start=place))
            self._patiently(_cut_off)
        except (DatabaseError, StoreError) as error:
            return f"the file or its journal still holds earlier pages ({error}); it is tried again"
        return ""

    def compact(self) -> str:
        """Write the file anew without what was deleted; return what kept it from that, empty when all is done."""
        self._progress("writing the file anew")
        try:
            with contextlib.closing(open_writer(self._path, mend=False)) as own:
                self._until_deadline(lambda: own.execute("VACUUM"))
        except (DatabaseError, StoreError) as error:
            return f"the file could not be written anew ({error}); stop what writes to it and run it again"
        return self.erase()

    def _merge_words(self) -> None:
        """Bring the full-text index into one piece where words of deleted rows may be left in older pieces."""
        left = f"SELECT 1 FROM meta WHERE key = '{WORDS_LEFT}'"
        if words_are_secure() and not self._job(lambda db: db.execute(left).fetchone()):
            return
        self._progress("merging the full-text index")
        pages = -_MERGED
        while self._job(partial(_merged, pages=pages)) >= _SETTLED:
            pages = _MERGED
        self._job(lambda db: db.execute(f"DELETE FROM meta WHERE key = '{WORDS_LEFT}'") and None)

    def _job(self, job: Callable[[Connection], T]) -> T:
        return self._writer.apart(job).result(_WAIT_S)

    def _patiently(self, job: Callable[[Connection], T]) -> T:
        return self._until_deadline(lambda: self._job(job))

    def _until_deadline(self, attempt: Callable[[], T]) -> T:
        while True:
            try:
                return attempt()
            except (DatabaseError, StoreError):
                if time.monotonic() > self._deadline:
                    raise
            time.sleep(_AGAIN_S)


def _merged(db: Connection, *, pages: int) -> int:
    before = db.total_changes
    db.execute("INSERT INTO memories_fts(memories_fts, rank) VALUES ('merge', ?)", (pages,))
    return db.total_changes - before


def _cut_off(db: Connection) -> None:
    if not checkpoint(db, wait_s=0.02):
        raise StoreError("somebody reads an earlier state")
