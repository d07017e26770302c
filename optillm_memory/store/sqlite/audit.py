"""What a file holds, read on a connection of its own: for those who check from outside what a store promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from optillm_memory.store.sqlite.connection import DatabaseError, connect


def integrity(path: Path) -> str:
    """Return what SQLite's own check of the whole file finds: `ok` where nothing is wrong."""
    try:
        connection = connect(path)
        try:
            return str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
        finally:
            connection.close()
    except DatabaseError as error:
        return str(error)


def feedback_in(path: Path) -> Counter[tuple[str, str]]:
    """Return how often each feedback is in a file on a trace that is there too: (feedback id, trace id)."""
    connection = connect(path, read_only=True)
    try:
        return Counter(connection.execute("SELECT feedback_id, trace_id FROM feedback JOIN traces USING (trace_id)"))
    finally:
        connection.close()
