"""The scopes whose vectors are at hand: opened, brought up to date and written to files, never while one waits."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.background.worker import BackgroundWorker
from optillm_memory.recall.vectors import ivf_writer as build
from optillm_memory.recall.vectors.flat import floor_of
from optillm_memory.recall.vectors.ivf import Base, Files
from optillm_memory.recall.vectors.scope_index import (
    NEVER,
    Batch,
    Change,
    Index,
    Limits,
    ScopeIndex,
    Version,
    header_for,
    opened,
    without,
)
from optillm_memory.records import MemoryRecord, Scope

logger = logging.getLogger(__name__)

_SCOPES_KEPT = 256
_ROWS_KEPT = 500_000  # in memory, of all scopes; the least recently used go first
_PATIENCE_S = 0.004  # a request waits so long for changes that another is taking in
_PIECES, _WAITED_S = 8, 0.25  # in which a request takes changes in, and after which it takes in no more
_AGAIN_S = 60.0  # after a file could not be written
_TOLD = 64  # rows compared with the table when a file is opened


class Source(Protocol):
    """What recall reads; every call is bound to one scope."""

    def revision(self, scope: Scope) -> Version:
        """Return what is another one whenever any memory has changed."""

    def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
        """Return up to `limit` memories of the scope changed after a revision, oldest change first."""

    def nearest(
        self, scope: Scope, fingerprint: str, query: NDArray[np.float32], count: int
    ) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of the nearest memories, best first; None where the source has no index itself."""

    def vectors(self, scope: Scope, fingerprint: str, numbers: Sequence[int]) -> Mapping[int, bytes]:
        """Return the vectors of those of the scope's memories with these numbers that are to be searched."""

    def lexical(self, scope: Scope, query: Sequence[str], limit: int, *, alone: bool) -> list[tuple[int, float]]:
        """Return (number, coverage) of memories that share words of the query, best first.

        `alone` says that no search by meaning goes beside this.
        """

    def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
        """Return the verified memories of the scope that have these numbers."""

    def of_episode_alone(self, scope: Scope, memory_ids: Sequence[str], episode_id: str) -> set[str]:
        """Return those of the memories that rest on this episode and on no other."""

    def read_ahead(self) -> Iterator[None]:
        """Read once in order, piece by piece, what is read here and there later on; nothing of it is returned."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose vectors are asked for, and of which encoder."""

    scope: Scope
    fingerprint: str
    dimension: int
    unrelated: tuple[float, float]


class Elsewhere:
    """A large scope that the source searches itself."""

    def __init__(
        self, source: Source, asked: Asked, origin: tuple[int, int], own: tuple[float, float], size: int
    ) -> None:
        """`own` is the spread of the scope's own pairs, `size` how many rows it has at least."""
        self._source, self._asked, self.origin = source, asked, origin
        self.floor = floor_of(asked.unrelated, own, size)
        self.current = 0  # the source's revision as it was last read

    def search(self, query: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""
        return self._source.nearest(self._asked.scope, self._asked.fingerprint, query, count) or []

    def cosines(self, query: NDArray[np.float32], numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""
        found = self._source.vectors(self._asked.scope, self._asked.fingerprint, numbers) if numbers else {}
        return {number: float(np.frombuffer(vector, dtype=np.float32) @ query) for number, vector in found.items()}

    def revision(self, number: int) -> int:  # noqa: ARG002
        """Return the source's revision: any change may be this memory's."""
        return self.current


class _Corpus:
    """One scope, for the encoder that asked last."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.lock = threading.Lock()
        self.index: ScopeIndex | Elsewhere | None = None
        self.version = NEVER
        self.loading = False  # all that is left to take in is taken in behind
        self.building = False
        self.not_before = 0.0


class IndexCache:
    """Keeps recently used scopes searchable and up to date."""

    def __init__(self, source: Source, files: Files | None, limits: Limits) -> None:
        """Start with nothing; `files` None keeps large scopes in memory."""
        self._source, self._files, self._limits = source, files, limits
        self._corpora: OrderedDict[Scope, _Corpus] = OrderedDict()
        self._lock = threading.Lock()
        self._loader = BackgroundWorker("agent-memory-loader")
        self._builder = BackgroundWorker("agent-memory-builder")
        self._read_ahead = False

    def close(self) -> None:
        """End what is done behind; let go of everything."""
        self._builder.close()
        self._loader.close()
        with self._lock:
            self._corpora.clear()

    @property
    def busy(self) -> bool:
        """Whether anything is being taken in, written or examined behind."""
        return self._loader.busy or self._builder.busy

    def index(self, asked: Asked, version: Version) -> Index | None:
        """Return a scope's index with what the source held at a version, as far as that can be had at once.

        What another request is taking in, and what is too much for one request, is missing from it a little longer.
        """
        corpus = self._corpus(asked)
        index = corpus.index
        fits = index is not None and _holds(index, version)
        if fits and isinstance(index, Elsewhere):
            index.current = version.revision
        if fits and (corpus.version == version or corpus.loading or isinstance(index, Elsewhere)):
            return index
        if not corpus.lock.acquire(timeout=_PATIENCE_S):
            return index if fits else None
        try:
            index = corpus.index
            if index is None or not _holds(index, version):
                index = corpus.index = self._opened(asked, version.origin)
                corpus.version = NEVER
                if index.base is not None:
                    self._builder.do(lambda: self._examine(corpus, index))
            if corpus.version != version and not corpus.loading and isinstance(index, ScopeIndex):
                self._bring_up(corpus, index, version)
            return corpus.index
        finally:
            corpus.lock.release()

    def _bring_up(self, corpus: _Corpus, index: ScopeIndex, version: Version) -> None:
        """Take in what has changed; the caller holds the lock."""
        until = time.monotonic() + _WAITED_S
        piece = max(1, self._limits.inline // _PIECES)
        for _ in range(_PIECES):
            if self._read(corpus, index, piece):
                corpus.version = version
                if index.is_due(self._limits):
                    self._build_behind(corpus)
                return
            if time.monotonic() > until:
                break
        corpus.loading = True  # too much for one request, or a slow disk: the rest comes behind it
        self._loader.do(lambda: self._load_all(corpus))

    def _corpus(self, asked: Asked) -> _Corpus:
        with self._lock:
            corpus = self._corpora.get(asked.scope)
            if corpus is None or corpus.asked != asked:
                corpus = self._corpora[asked.scope] = _Corpus(asked)
                self._trim()
            self._corpora.move_to_end(asked.scope)
            return corpus

    def _trim(self) -> None:
        rows = 0
        for kept, scope in enumerate(reversed(list(self._corpora)), 1):
            index = self._corpora[scope].index
            rows += len(index.delta) if isinstance(index, ScopeIndex) else 0
            if kept > 1 and (kept > _SCOPES_KEPT or rows > _ROWS_KEPT):
                del self._corpora[scope]

    def _name(self, asked: Asked) -> str:
        assert self._files is not None
        return self._files.name(asked.scope, asked.fingerprint)

    def _file(self, asked: Asked) -> Base | None:
        if self._files is None or (content := self._files.mapped(self._name(asked))) is None:
            return None
        # The version is read after the file, which another process may have written just now.
        base = opened(content, asked.fingerprint, asked.dimension, self._source.revision(asked.scope))
        if base is None:
            logger.warning("agent_memory: the vectors on file are damaged or out of date; they are collected again")
            self._remove(asked)
        return base

    def _remove(self, asked: Asked) -> None:
        assert self._files is not None
        with contextlib.suppress(OSError):  # it is replaced when the next is written
            self._files.remove(self._name(asked))

    def _opened(self, asked: Asked, origin: tuple[int, int]) -> ScopeIndex:
        base = self._file(asked)
        if base is not None and (base.header.generation, base.header.scope) != origin:
            base = None  # the table was made anew this very moment: the next request sees it
        return ScopeIndex(asked.dimension, asked.unrelated, origin, base)

    def _read(self, corpus: _Corpus, index: ScopeIndex, limit: int) -> bool:
        """Take in up to `limit` changes (a revision's come together); return whether that was all."""
        changes = self._source.changes(corpus.asked.scope, index.since, corpus.asked.fingerprint, limit)
        lost = index.apply(Batch.of(changes, index.since, index.dimension))
        if lost and self._files is not None and not self._files.exists(self._name(corpus.asked)):
            self._build_behind(corpus)  # the file was taken away, for it held what had to be forgotten
        return len(changes) < limit

    def _load_all(self, corpus: _Corpus) -> None:
        """Take in all that is left, in pieces; where it becomes too much for memory a file is written first."""
        waits = False
        try:
            index, complete = corpus.index, False
            while not complete:
                index = corpus.index
                if not isinstance(index, ScopeIndex):
                    return
                if len(index) >= self._limits.large:
                    self._ahead(self._loader)
                if len(index.delta) >= self._limits.most and self._build_behind(corpus):
                    waits = True  # it goes on when the file is written, and until then no request takes in more
                    return
                since = index.since
                changes = self._source.changes(corpus.asked.scope, since, corpus.asked.fingerprint, self._limits.inline)
                batch = Batch.of(changes, since, index.dimension)
                with corpus.lock:
                    if corpus.index is index and index.since == since:
                        index.apply(batch)
                        complete = len(changes) < self._limits.inline
                self._loader.rest()
            if isinstance(index, ScopeIndex) and index.is_due(self._limits):
                self._build_behind(corpus)
        finally:
            corpus.loading = waits

    def _build_behind(self, corpus: _Corpus) -> bool:
        """Have the scope's file written, unless that could not be done a moment ago."""
        if not corpus.building and time.monotonic() >= corpus.not_before:
            corpus.building = True
            self._builder.do(lambda: self._build(corpus))
        return corpus.building

    def _build(self, corpus: _Corpus) -> None:
        """Write the scope's next file, go on with what is in it, and take in the rest."""
        written = False
        try:
            index = corpus.index
            if isinstance(index, ScopeIndex):
                written = self._delegated(corpus, index) or self._written(corpus, index)
        finally:
            corpus.building = False
            if not written:
                corpus.not_before = time.monotonic() + _AGAIN_S
            corpus.loading = True
            self._loader.do(lambda: self._load_all(corpus))

    def _delegated(self, corpus: _Corpus, index: ScopeIndex) -> bool:
        """Let the source search the scope where it can."""
        asked = corpus.asked
        query = np.eye(1, asked.dimension, dtype=np.float32)[0]
        if not self._source.nearest(asked.scope, asked.fingerprint, query, 1):
            return False  # it has no index, or not yet
        self._swap(corpus, index, Elsewhere(self._source, asked, index.origin, index.spread, len(index)))
        return True

    def _written(self, corpus: _Corpus, index: ScopeIndex) -> bool:
        if self._files is None:
            return False
        asked, name = corpus.asked, self._name(corpus.asked)
        with self._files.draft(name) as draft:
            if draft is None:
                return False  # another process is at it
            newer = self._file(asked)
            if newer is None or newer.header.revision <= (index.base.header.revision if index.base else 0):
                with corpus.lock:
                    rows, since = index.rows()
                # The draft is there already: whoever forgets a memory from now on takes the draft away too.
                rows = without(rows, self._changed_since(asked, since))
                if self._source.revision(asked.scope).origin != index.origin:
                    return False  # forgotten as a whole: nobody will say so of each row
                if rows.count == 0:
                    self._remove(asked)
                else:
                    header = header_for(rows, asked.fingerprint, index.origin, since)
                    build.write(draft, rows, header, self._builder.rest, anew=not self._files.exists(name))
        fresh = self._opened(asked, index.origin)
        taken_in = self._taken_in(corpus, index, fresh)
        if fresh.base is not None:
            self._have_stay(fresh.base)
        return taken_in

    def _taken_in(self, corpus: _Corpus, index: ScopeIndex, fresh: ScopeIndex) -> bool:
        """Bring a fresh index to where the present one is, and put it in its place."""
        while fresh.since < index.since and len(fresh.delta) < self._limits.most:
            if self._read(corpus, fresh, self._limits.inline):
                break
            self._builder.rest()
        self._swap(corpus, index, fresh)
        return True

    def _swap(self, corpus: _Corpus, index: ScopeIndex, fresh: ScopeIndex | Elsewhere) -> None:
        with corpus.lock:
            if corpus.index is index:
                corpus.index, corpus.version = fresh, NEVER

    def _changed_since(self, asked: Asked, since: int) -> set[int]:
        """Return the memories that changed after a revision; no vectors are read."""
        found: set[int] = set()
        while True:
            changes = self._source.changes(asked.scope, since, "", self._limits.inline)
            found.update(change.number for change in changes)
            if len(changes) < self._limits.inline:
                return found
            since = max(change.revision for change in changes)
            self._builder.rest()

    def _examine(self, corpus: _Corpus, index: ScopeIndex) -> None:
        """Compare a file that was opened with the table and with its own checksum; in doubt start over without it."""
        base, files, asked = index.base, self._files, corpus.asked
        assert base is not None
        assert files is not None
        if not (self._tells_the_table(asked, base) and base.is_whole(self._resting(files, self._name(asked)))):
            logger.warning("agent_memory: the vectors on file are not those of the table; they are collected again")
            self._remove(asked)
            self._swap(corpus, index, ScopeIndex(asked.dimension, asked.unrelated, index.origin))
            return
        self._have_stay(base)
        self._ahead(self._builder)

    def _ahead(self, behind: BackgroundWorker) -> None:
        """Read a large memory that was asleep: who reads it here and there would wait for the disk, page by page."""
        if not self._read_ahead:
            self._read_ahead = True
            for _ in self._source.read_ahead():
                behind.rest()

    def _have_stay(self, base: Base) -> None:
        assert self._files is not None
        for _ in base.stay(self._files):
            self._builder.rest()

    def _resting(self, files: Files, name: str) -> Iterator[bytes]:
        for block in files.blocks(name):
            yield block
            self._builder.rest()

    def _tells_the_table(self, asked: Asked, base: Base) -> bool:
        """Whether some rows of the table, as old as the file, lie in it as they are."""
        for part in range(8):
            since = base.header.revision * part // 8
            changes = self._source.changes(asked.scope, since, asked.fingerprint, _TOLD // 8)
            batch = Batch.of([c for c in changes if c.revision <= base.header.revision], since, asked.dimension)
            rows = base.rows_of(np.array(batch.numbers, dtype=np.int64))
            if any(row < 0 or not base.codes.equals(row, batch.codes, at) for at, row in enumerate(rows.tolist())):
                return False
            if np.any(base.rows_of(np.array(batch.dropped, dtype=np.int64)) >= 0):
                return False
        return True


def _holds(index: ScopeIndex | Elsewhere, version: Version) -> bool:
    """Whether an index is still of what it was made from."""
    base = index.base if isinstance(index, ScopeIndex) else None
    return index.origin == version.origin and not (base is not None and base.is_cut_off())
