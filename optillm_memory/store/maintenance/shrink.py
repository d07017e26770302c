"""Giving the disk back: what was deleted leaves the full-text index, the free pages and the journal, too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from optillm_memory.records import Scope
from optillm_memory.store.sqlite.connection import BUSY_TIMEOUT_S, Connection, DatabaseError, open_writer
from optillm_memory.store.sqlite.index_files import IndexFiles, folder_of

PATIENCE_S = 30.0
_MERGED = 500  # pages of the full-text index a step: nobody who writes waits long
_SETTLED = 2  # a step of merging that did nothing changes fewer rows


def set_aside_files(path: Path) -> list[Path]:
    """Return the earlier databases that were corrupt and are kept, with their journals."""
    return sorted(path.parent.glob(f"{path.name}.corrupt-*"))


def remove_indexes(path: Path, scopes: Iterable[Scope] | None) -> None:
    """Take away the vectors that lie beside the database for these scopes, None are all; who needs them makes them."""
    files = IndexFiles(folder_of(path))
    for scope in (None,) if scopes is None else scopes:
        files.forget(scope)


def shrink(path: Path, *, patience_s: float = PATIENCE_S, progress: Callable[[str], None] = lambda _: None) -> str:
    """Write the file anew without what was deleted, while others read and write; return what kept it from that.

    Empty when all is done. Until then earlier versions of a page may still hold deleted text.
    """
    with contextlib.closing(open_writer(path, mend=False)) as db:
        progress("merging the full-text index")
        _merge_words(db)
        progress("writing the file anew")
        deadline = time.monotonic() + patience_s
        if fault := _until(deadline, lambda: _vacuum(db)):
            return f"the file could not be written anew ({fault}); stop what writes to it and run forget again"
        progress("emptying the journal")
        if fault := _until(deadline + BUSY_TIMEOUT_S, lambda: _empty_journal(db)):
            return f"the journal still holds earlier pages ({fault}); it is emptied when that reader is done"
    return ""


def _until(deadline: float, attempt: Callable[[], str]) -> str:
    while True:
        try:
            fault = attempt()
        except DatabaseError as error:
            fault = str(error)
        if not fault or time.monotonic() > deadline:
            return fault
        time.sleep(0.1)


def _merge_words(db: Connection) -> None:
    """Bring the full-text index into one piece: words of deleted rows stay in the older pieces until then."""
    pages = -_MERGED
    changed = _SETTLED
    while changed >= _SETTLED:
        before = db.total_changes
        db.execute("INSERT INTO memories_fts(memories_fts, rank) VALUES ('merge', ?)", (pages,))
        changed, pages = db.total_changes - before, _MERGED


def _vacuum(db: Connection) -> str:
    db.execute("VACUUM")
    return ""


def _empty_journal(db: Connection) -> str:
    row = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return "another process is reading or writing" if row[0] else ""
