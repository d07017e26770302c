"""The store on SQLite: one writer, many readers, one file."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import Scope, ThreadStarter
from optillm_memory.store.base import Store
from optillm_memory.store.sqlite.connection import Connection, OperationalError, Readers
from optillm_memory.store.sqlite.erase import PATIENCE_S, Eraser
from optillm_memory.store.sqlite.index_files import IndexFiles, folder_of
from optillm_memory.store.sqlite.reading import reading
from optillm_memory.store.sqlite.writer import SqliteWriter
from optillm_memory.store.tables import rows
from optillm_memory.store.transaction import Transaction
from optillm_memory.store.writer import ReadOnlyWriter, start_thread


class SqliteStore(Store):
    """The store in one file."""

    def __init__(
        self,
        path: Path,
        *,
        queue_size: int = 10_000,
        normal: Callable[[str], str] = normal_answer,
        read_only: bool = False,
        start: ThreadStarter = start_thread,
    ) -> None:
        """Open the file, making it where it is missing; `normal` gives the form in which answers are compared.

        Raises StoreTooNew. Opened `read_only`, it makes no file, migrates nothing and starts no thread; it raises
        NotFound where there is no file, and StoreError for one with the schema of an earlier release.
        """
        self.path = path
        self._read_only = read_only
        self._paused = ExitStack()
        self._lock = threading.Lock()
        self._outdated: set[Scope | None] = set()  # whose vectors in files hold forgotten ones; None: everybody's
        if read_only:
            super().__init__(ReadOnlyWriter(str(path)), reading(path))
            return
        readers = Readers(path)
        within = partial(Transaction, normal=normal)
        self._writing = SqliteWriter(path, queue_size=queue_size, within=within, alone=readers.away, start=start)
        readers.on_corruption, readers.on_change = self._writing.distrust, self._writing.look
        super().__init__(self._writing, readers)

    def pause(self, timeout_s: float) -> bool:
        """Start nothing until `resume`, and read nothing; return whether no commit is under way any more."""
        if not super().pause(timeout_s):
            return False
        with suppress(OperationalError):  # one that reads on may fail a child, a commit surely would
            self._paused.enter_context(self._readers.away())
        return True

    def resume(self) -> None:
        """Go on after a `pause` that succeeded."""
        self._paused.close()
        super().resume()

    @property
    def place(self) -> str:
        """Where the memories lie."""
        return str(self.path)

    def size_bytes(self) -> int:
        """Return how much room the file and its WAL take."""
        files = (self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def nearest(self, scope: Scope, fingerprint: str, query: Any, count: int) -> list[tuple[int, float]] | None:
        """Return None: the vectors of large scopes are searched beside this database, not in it."""

    def outdate_indexes(self, scopes: Iterable[Scope] | None) -> None:
        """Note that files of vectors beside the database hold forgotten ones of these scopes, None being all."""
        with self._lock:
            self._outdated.update((None,) if scopes is None else scopes)

    def erase(self, *, progress: Callable[[str], None], patience_s: float = PATIENCE_S) -> list[str]:
        """Take what was deleted out of all files, while others read and write; return what kept it from that."""
        with self._lock:
            outdated, self._outdated = self._outdated, set()
        for scope in outdated:
            self.index_files().forget(scope)
        eraser = Eraser(self.path, self._writing, progress, patience_s)
        return [fault] if (fault := eraser.erase()) else []

    def compact(self, *, progress: Callable[[str], None], patience_s: float = PATIENCE_S) -> list[str]:
        """Write the file anew without what was deleted; return what kept it from that."""
        eraser = Eraser(self.path, self._writing, progress, patience_s)
        return [fault] if (fault := eraser.compact()) else []

    def set_aside(self, *, delete: bool) -> list[str]:
        """Delete the databases that were set aside as corrupt, or say what they may hold."""
        aside = sorted(self.path.parent.glob(f"{self.path.name}.corrupt-*"))
        if delete:
            for path in aside:
                path.unlink(missing_ok=True)
        elif aside:
            return [f"{len(aside)} files set aside as corrupt may hold it, too: {', '.join(p.name for p in aside)}"]
        return []

    def read_ahead(self) -> Iterator[None]:
        """Read once in order, piece by piece, the pages that recall reads here and there."""
        for table, key, length in _READ_AHEAD:
            last: int | None = -1
            while last is not None:
                with (
                    self._readers.borrow() as db
                ):  # each piece apart: a long look at the file keeps its WAL from ending
                    piece = (
                        f"SELECT {key} AS key, {length} AS length FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT ?"
                    )
                    last, _ = db.execute(f"SELECT max(key), sum(length) FROM ({piece})", (last, _PIECE)).fetchone()
                yield

    def index_files(self) -> IndexFiles:
        """Return where the vectors of large scopes lie."""
        return IndexFiles(folder_of(self.path), read_only=self._read_only)

    def _postings(self, db: Connection, scope_id: int, words: Sequence[str], depth: int) -> Mapping[str, list[int]]:
        """Return for each word up to `depth` numbers of the scope's memories that hold it."""
        # No bm25() and no vocabulary table: both walk every posting to count it; this stops when there are many.
        terms = json.dumps([_term(scope_id, word) for word in words])
        found = db.execute(_POSTINGS, (depth, terms)).fetchall()
        return {word: _numbers(row[0]) for word, row in zip(words, found, strict=True)}

    def _holding_all(self, db: Connection, scope_id: int, words: Sequence[str], depth: int, latest: int) -> list[int]:
        """Return up to `depth` of the scope's memories that hold every word, among the `latest` numbers."""
        every = " AND ".join(_term(scope_id, word) for word in words)
        return _numbers(db.execute(_HOLDING_ALL, (every, latest, depth)).fetchone()[0])


_PIECE = 2_000  # rows
_READ_AHEAD = (("memories_fts_data", "id", "length(block)"), ("memories", "number", "length(task) + length(answer)"))
_POSTINGS = """
    SELECT (SELECT group_concat(rowid) FROM (
        SELECT rowid FROM memories_fts WHERE memories_fts MATCH terms.value LIMIT ?)) FROM json_each(?) AS terms"""
_HOLDING_ALL = """
    SELECT group_concat(rowid) FROM (SELECT rowid FROM memories_fts WHERE memories_fts MATCH ?
    AND rowid > (SELECT coalesce(max(number), 0) FROM memories) - ? LIMIT ?)"""


def _numbers(joined: str | None) -> list[int]:
    return [int(number) for number in joined.split(",")] if joined else []


def _term(scope_id: int, word: str) -> str:
    return '"' + rows.scoped(scope_id, word).replace('"', '""').replace("\x00", "") + '"'
