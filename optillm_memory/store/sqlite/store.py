"""The store on SQLite: one writer, many readers, one file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optillm_memory.errors import StoreError, StoreUnavailable
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import Scope, ThreadStarter
from optillm_memory.store import fold
from optillm_memory.store.backend import Dialect
from optillm_memory.store.base import Store
from optillm_memory.store.sqlite.connection import (
    Connection,
    OperationalError,
    Readers,
    checkpoint,
    copy_wal,
    wal_bytes,
)
from optillm_memory.store.sqlite.erase import Eraser
from optillm_memory.store.sqlite.index_files import IndexFiles, folder_of
from optillm_memory.store.sqlite.reading import reading
from optillm_memory.store.sqlite.seal import state_of, tables_there
from optillm_memory.store.sqlite.seal_commit import CommitSeal
from optillm_memory.store.sqlite.seal_files import SealFiles
from optillm_memory.store.sqlite.seal_reads import SealReads
from optillm_memory.store.sqlite.writer import SqliteWriter
from optillm_memory.store.tables import words as word_index
from optillm_memory.store.threads import start_thread
from optillm_memory.store.transaction import Transaction
from optillm_memory.store.writer import ReadOnlyWriter

_COPIED_BYTES = 2 << 20  # a smaller WAL is left as it is
_WAIT_S = 60.0  # for the writer to come to a job


class SqliteStore(Store):
    """The store in one file."""

    _readers: Readers

    def __init__(
        self,
        path: Path,
        *,
        queue_size: int = 10_000,
        normal: Callable[[str], str] = normal_answer,
        read_only: bool = False,
        seal: bool = False,
        seal_folder: str = "",
        clock: Callable[[], float] = time.time,
        start: ThreadStarter = start_thread,
    ) -> None:
        """Open the file, making it where it is missing; `normal` gives the form in which answers are compared.

        With `seal` it is sealed from now on; one that was sealed before is so without it. `seal_folder` is where the
        key lies, empty for the default. `clock` tells in Unix seconds what holds no longer.

        Raises StoreTooNew. Opened `read_only`, it makes no file, migrates nothing and starts no thread; it raises
        NotFound where there is no file, and StoreError for one with the schema of an earlier release.
        """
        self.path = path
        self._paused = ExitStack()
        writer: SqliteWriter | ReadOnlyWriter
        readers = reading(path) if read_only else Readers(path)
        files = SealFiles.of(path, seal_folder)
        seal_reads = SealReads(files)
        self._commit_seal = CommitSeal(files, wanted=seal, told=seal_reads.told)
        if read_only:
            writer = ReadOnlyWriter(str(path))
        else:
            within = partial(Transaction, dialect=DIALECT, normal=normal)
            writer = SqliteWriter(
                path, queue_size=queue_size, within=within, alone=readers.away, sealing=self._commit_seal, start=start
            )
            readers.on_corruption, readers.on_change = writer.distrust, writer.look
        search = SearchBeside(path, readers, read_only=read_only)
        location = DatabaseFile(path, writer, readers)
        super().__init__(
            writer, readers, dialect=DIALECT, search=search, location=location, seal=seal_reads, clock=clock
        )
        with suppress(StoreError):  # what cannot be read now is told of where it is read
            seal_reads.look(readers)

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

    def rebuild(self, *, accept: bool = False) -> int:
        """Fold the whole log again; return how many traces it holds.

        Raises StoreError where the seal shows that the log was changed from outside, unless that is to be accepted.
        """

        def again(tx: Transaction) -> int:
            if not accept:
                self._commit_seal.refuse_broken(tx.db)
            traces = fold.rebuild(tx)
            self._commit_seal.derived_again(tx.db, accept=accept)
            return traces

        return self.write(again).result()

    def described_seal(self) -> dict[str, Any]:
        """Return whether the file is sealed, since when, by which commit, and where the key is."""
        files = self._commit_seal.files
        with self._readers.borrow() as db:
            state = state_of(db) if tables_there(db) else None
        if state is None:
            return {"sealed": False}
        notes = json.loads(state.notes)
        return {
            "sealed": True, "since": notes["since"], "found_then": notes["found"], "commit": state.number,
            "link": state.link.hex(), "key": str(files.key_path), "noted_outside": str(files.head_path),
        }  # fmt: skip

    def accept_seal(self, *, new_key: bool = False) -> None:
        """Seal everything as it is found, with a new key if asked for; what was wrong is settled. Raises StoreError."""
        self.write(lambda tx: self._commit_seal.accept(tx.db, new_key=new_key)).result()

    def remove_seal(self) -> None:
        """Take the seal off."""
        self.write(lambda tx: self._commit_seal.remove(tx.db)).result()


class DatabaseFile:
    """The file, with its WAL and the files of vectors beside it."""

    def __init__(self, path: Path, writer: SqliteWriter | ReadOnlyWriter, readers: Readers) -> None:
        self.path = path
        self._writer, self._readers = writer, readers
        self._lock = threading.Lock()
        self._outdated: set[Scope | None] = set()  # whose vectors in files hold forgotten ones; None: everybody's

    @property
    def place(self) -> str:
        """Where the memories lie."""
        return str(self.path)

    def size_bytes(self) -> int:
        """Return how much room the file and its WAL take."""
        files = (self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def used_bytes(self, db: Connection, traces: int) -> int:  # noqa: ARG002 - the pages tell
        """Return how many bytes of the file are in use."""
        pages, free, size = (
            int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def outdate_indexes(self, scopes: Iterable[Scope] | None) -> None:
        """Note that files of vectors hold forgotten ones of these scopes, None being all: `erase` removes them."""
        with self._lock:
            self._outdated.update((None,) if scopes is None else scopes)

    def copy_wal(self) -> None:
        """Copy what the WAL holds into the file, while others write and read; then cut it off, if nobody reads it."""
        if wal_bytes(self.path) > _COPIED_BYTES and isinstance(self._writer, SqliteWriter):
            with suppress(StoreError):  # the writer does it some time, and says what is wrong
                with self._readers.borrow():  # nobody opens the file anew meanwhile
                    copy_wal(self.path)
                self._writer.apart(partial(checkpoint, wait_s=0.0)).result(_WAIT_S)

    def erase(self, *, progress: Callable[[str], None]) -> list[str]:
        """Remove what was deleted from all files, while others read and write; return what prevented it."""
        with self._lock:
            outdated, self._outdated = self._outdated, set()
        for scope in outdated:
            IndexFiles(folder_of(self.path)).forget(scope)
        return [fault] if (fault := self._eraser(progress).erase()) else []

    def compact(self, *, progress: Callable[[str], None]) -> list[str]:
        """Write the file anew without what was deleted; return what prevented it."""
        return [fault] if (fault := self._eraser(progress).compact()) else []

    def _eraser(self, progress: Callable[[str], None]) -> Eraser:
        if isinstance(self._writer, ReadOnlyWriter):
            raise StoreUnavailable(f"{self.path} was opened read-only")
        return Eraser(self.path, self._writer, progress)

    def set_aside(self, *, delete: bool) -> list[str]:
        """Delete the databases that were set aside as corrupt, or say what they may hold."""
        aside = sorted(self.path.parent.glob(f"{self.path.name}.corrupt-*"))
        if delete:
            for path in aside:
                path.unlink(missing_ok=True)
        elif aside:
            return [f"{len(aside)} files set aside as corrupt may hold it, too: {', '.join(p.name for p in aside)}"]
        return []


@dataclass(frozen=True)
class SearchBeside:
    """Vectors are searched by recall itself, in memory and in files beside the database."""

    path: Path
    readers: Readers
    read_only: bool

    def nearest(self, scope: Scope, fingerprint: str, query: Any, count: int) -> list[tuple[int, float]] | None:
        """Return None: recall searches the vectors itself."""

    def index_files(self) -> IndexFiles:
        """Return where the vectors of large scopes lie."""
        return IndexFiles(folder_of(self.path), read_only=self.read_only)

    def read_ahead(self) -> Iterator[None]:
        """Read once in order, piece by piece, the pages that recall reads here and there."""
        for table, key, length in _READ_AHEAD:
            last: int | None = -1
            while last is not None:
                with self.readers.borrow() as db:  # each piece apart: a long look at the file keeps its WAL from ending
                    piece = (
                        f"SELECT {key} AS key, {length} AS length FROM {table} WHERE {key} > ? ORDER BY {key} LIMIT ?"
                    )
                    last, _ = db.execute(f"SELECT max(key), sum(length) FROM ({piece})", (last, _PIECE)).fetchone()
                yield


def _memory_numbers(db: Connection, count: int) -> range:
    start = int(db.execute("SELECT coalesce(max(number), 0) + 1 FROM memories").fetchone()[0])
    return range(start, start + count)


def _postings(db: Connection, scope_id: int, words: Sequence[str], depth: int) -> Mapping[str, list[int]]:
    # No bm25() and no vocabulary table: both walk every posting to count it; this stops when there are many.
    terms = json.dumps([_term(scope_id, word) for word in words])
    found = db.execute(_POSTINGS, (depth, terms)).fetchall()
    return {word: _numbers(row[0]) for word, row in zip(words, found, strict=True)}


def _holding_all(db: Connection, scope_id: int, words: Sequence[str], depth: int, latest: int) -> list[int]:
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
    return '"' + word_index.scoped(scope_id, word).replace('"', '""').replace("\x00", "") + '"'


DIALECT = Dialect(
    salt="SELECT value FROM meta WHERE key = 'salt'",
    memory_numbers=_memory_numbers,
    vector=bytes,
    postings=_postings,
    holding_all=_holding_all,
)
