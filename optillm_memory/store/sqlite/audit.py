"""What a file holds, read on a connection of its own: for those who check from outside what a store promised."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

from optillm_memory.errors import StoreError
from optillm_memory.store.sqlite.reading import UntouchedReaders


def integrity(path: Path) -> str:
    """Return what SQLite's own check of the whole file finds: `ok` where nothing is wrong."""
    try:
        with contextlib.closing(UntouchedReaders(path)) as readers, readers.borrow() as db:
            return str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except StoreError as error:
        return str(error)


def feedback_in(path: Path) -> Counter[tuple[str, str]]:
    """Return how often each feedback is in a file on a trace that is there too: (feedback id, trace id)."""
    with contextlib.closing(UntouchedReaders(path)) as readers, readers.borrow() as db:
        return Counter(db.execute("SELECT feedback_id, trace_id FROM feedback JOIN traces USING (trace_id)"))
