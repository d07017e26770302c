"""The indexes of recently used scopes: opened, brought up to date and written to files, in the background."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from optillm_memory.recall.vectors import ivf_writer
from optillm_memory.recall.vectors.database_index import DatabaseIndex
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.recall.vectors.ivf_format import Files
from optillm_memory.recall.vectors.quantization import Vectors
from optillm_memory.recall.vectors.scope_index import Batch, Limits, ScopeIndex, header_for, open_ivf, without
from optillm_memory.recall.vectors.source import NEVER, Source, Version
from optillm_memory.records import Scope

logger = logging.getLogger(__name__)

_MAX_SCOPES = 256
_MAX_ROWS = 500_000  # in memory, of all scopes; the least recently used go first
_LOCK_WAIT_S = 0.004  # a request waits so long for changes that another one is applying
_PIECES, _INLINE_S = 8, 0.25  # in which a request applies changes, and after which it applies no more
_RETRY_S = 60.0  # after a file could not be written
_COMPARED = 64  # rows compared with the table when a file was opened


class Worker(Protocol):
    """A background thread that does one thing after another."""

    @property
    def busy(self) -> bool:
        """Whether anything is being done, or waits to be."""

    def do(self, work: Callable[[], None]) -> None:
        """Have something done after what waits."""

    def rest(self) -> None:
        """Let other threads have the processor; raises where the worker is being closed."""

    def close(self) -> None:
        """End what is being done, and the thread."""


class Index(Protocol):
    """What recall searches in one scope."""

    def search(self, vector: Vectors, count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""

    def cosines(self, query: Vectors, numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""

    def revision(self, number: int) -> int:
        """Return a revision that is another whenever the memory of this number is."""

    @property
    def floor(self) -> float:
        """The cosine that the nearest row must reach to be related."""


@dataclass(frozen=True, slots=True)
class IndexKey:
    """Whose vectors are searched, and of which encoder."""

    scope: Scope
    fingerprint: str
    dimension: int
    unrelated: tuple[float, float]


class _CachedScope:
    """One scope's index, for the encoder that was used last."""

    def __init__(self, key: IndexKey) -> None:
        self.key = key
        self.lock = threading.Lock()
        self.index: ScopeIndex | DatabaseIndex | None = None
        self.version = NEVER
        self.loading = False  # the remaining changes are applied in the background
        self.writing = False
        self.not_before = 0.0  # when a file may be written again


class IndexCache:
    """Keeps the indexes of recently used scopes up to date."""

    def __init__(self, source: Source, files: Files | None, limits: Limits, loader: Worker, writer: Worker) -> None:
        """Start empty. `files` None keeps large scopes in memory.

        `loader` applies changes in the background, `writer` writes and checks files; both are closed with the cache.
        """
        self._source, self._files, self._limits = source, files, limits
        self._scopes: OrderedDict[Scope, _CachedScope] = OrderedDict()
        self._lock = threading.Lock()
        self._loader, self._writer = loader, writer
        self._read_ahead = False

    def close(self) -> None:
        """End the background work and drop all indexes."""
        self._writer.close()
        self._loader.close()
        with self._lock:
            self._scopes.clear()

    @property
    def busy(self) -> bool:
        """Whether anything is being loaded, written or checked in the background."""
        return self._loader.busy or self._writer.busy

    def index(self, key: IndexKey, version: Version) -> Index | None:
        """Return a scope's index with what the source held at a version, as far as that can be had at once.

        What another request is applying, and what is too much for one request, is missing from it a little longer.
        """
        cached = self._cached(key)
        index = cached.index
        valid = index is not None and _is_valid(index, version)
        if valid and isinstance(index, DatabaseIndex):
            index.current = version.revision
        if valid and (cached.version == version or cached.loading or isinstance(index, DatabaseIndex)):
            return index
        if not cached.lock.acquire(timeout=_LOCK_WAIT_S):
            return index if valid else None
        try:
            index = cached.index
            if index is None or not _is_valid(index, version):
                index = cached.index = self._opened(key, version.origin)
                cached.version = NEVER
                if index.ivf is not None:
                    self._writer.do(lambda: self._check(cached, index))
            if cached.version != version and not cached.loading and isinstance(index, ScopeIndex):
                self._bring_up(cached, index, version)
            return cached.index
        finally:
            cached.lock.release()

    def _bring_up(self, cached: _CachedScope, index: ScopeIndex, version: Version) -> None:
        """Apply what has changed; the caller holds the lock."""
        until = time.monotonic() + _INLINE_S
        piece = max(1, self._limits.inline // _PIECES)
        for _ in range(_PIECES):
            if self._apply(cached, index, piece):
                cached.version = version
                if index.needs_rewrite(self._limits):
                    self._rewrite_soon(cached)
                return
            if time.monotonic() > until:
                break
        self._load_soon(cached)  # too much for one request, or a slow disk

    def _cached(self, key: IndexKey) -> _CachedScope:
        with self._lock:
            cached = self._scopes.get(key.scope)
            if cached is None or cached.key != key:
                cached = self._scopes[key.scope] = _CachedScope(key)
                self._trim()
            self._scopes.move_to_end(key.scope)
            return cached

    def _trim(self) -> None:
        rows = 0
        for kept, scope in enumerate(reversed(list(self._scopes)), 1):
            index = self._scopes[scope].index
            rows += len(index.flat) if isinstance(index, ScopeIndex) else 0
            if kept > 1 and (kept > _MAX_SCOPES or rows > _MAX_ROWS):
                del self._scopes[scope]

    # -- opening ---------------------------------------------------------------------------------------

    def _name(self, key: IndexKey) -> str:
        assert self._files is not None
        return self._files.name(key.scope, key.fingerprint)

    def _file(self, key: IndexKey) -> IvfIndex | None:
        if self._files is None or (content := self._files.mapped(self._name(key))) is None:
            return None
        # The version is read after the file, which another process may have written just now.
        ivf = open_ivf(content, key.fingerprint, key.dimension, self._source.revision(key.scope))
        if ivf is None:
            logger.warning("agent_memory: the vectors on file are damaged or out of date; they are collected again")
            self._remove(key)
        return ivf

    def _remove(self, key: IndexKey) -> None:
        assert self._files is not None
        with contextlib.suppress(OSError):  # it is replaced when the next is written
            self._files.remove(self._name(key))

    def _opened(self, key: IndexKey, origin: tuple[int, int]) -> ScopeIndex:
        ivf = self._file(key)
        if ivf is not None and (ivf.header.generation, ivf.header.scope) != origin:
            ivf = None  # the table was made anew this very moment: the next request sees it
        return ScopeIndex(key.dimension, key.unrelated, origin, ivf)

    def _check(self, cached: _CachedScope, index: ScopeIndex) -> None:
        """Compare a file that was opened with the table and with its own checksum; in doubt start over without it."""
        ivf, files, key = index.ivf, self._files, cached.key
        assert ivf is not None
        assert files is not None
        if not (self._agrees_with_table(key, ivf) and ivf.is_intact(self._resting(files, self._name(key)))):
            logger.warning("agent_memory: the vectors on file are not those of the table; they are collected again")
            self._remove(key)
            self._replace(cached, index, ScopeIndex(key.dimension, key.unrelated, index.origin))
            return
        self._lock_in_memory(ivf)
        self._read_table_ahead(self._writer)

    def _agrees_with_table(self, key: IndexKey, ivf: IvfIndex) -> bool:
        """Whether some rows of the table, as old as the file, lie in it as they are."""
        for part in range(8):
            since = ivf.header.revision * part // 8
            changes = self._source.changes(key.scope, since, key.fingerprint, _COMPARED // 8)
            batch = Batch.of([c for c in changes if c.revision <= ivf.header.revision], since, key.dimension)
            rows = ivf.rows_of(np.array(batch.numbers, dtype=np.int64))
            if any(row < 0 or not ivf.codes.equals(row, batch.codes, at) for at, row in enumerate(rows.tolist())):
                return False
            if np.any(ivf.rows_of(np.array(batch.removed, dtype=np.int64)) >= 0):
                return False
        return True

    def _resting(self, files: Files, name: str) -> Iterator[bytes]:
        for block in files.blocks(name):
            yield block
            self._writer.rest()

    def _lock_in_memory(self, ivf: IvfIndex) -> None:
        assert self._files is not None
        for _ in ivf.lock_in_memory(self._files):
            self._writer.rest()

    def _read_table_ahead(self, worker: Worker) -> None:
        """Read a large table that was not in use: random reads of it would wait for the disk, page by page."""
        if not self._read_ahead:
            self._read_ahead = True
            for _ in self._source.read_ahead():
                worker.rest()

    # -- applying changes ------------------------------------------------------------------------------

    def _apply(self, cached: _CachedScope, index: ScopeIndex, limit: int) -> bool:
        """Apply up to `limit` changes (those of a revision come together); return whether that was all."""
        changes = self._source.changes(cached.key.scope, index.since, cached.key.fingerprint, limit)
        deleted = index.apply(Batch.of(changes, index.since, index.dimension))
        if deleted and self._files is not None and not self._files.exists(self._name(cached.key)):
            self._rewrite_soon(cached)  # the file was removed, because it held what had to be forgotten
        return len(changes) < limit

    def _load_soon(self, cached: _CachedScope) -> None:
        """Have the remaining changes applied in the background."""
        cached.loading = True
        try:
            self._loader.do(lambda: self._load(cached))
        except BaseException:  # no thread can be started: the next request tries again
            cached.loading = False
            raise

    def _load(self, cached: _CachedScope) -> None:
        """Apply all remaining changes, in pieces; where they become too much for memory, a file is written first."""
        waits = False
        try:
            index, complete = cached.index, False
            while not complete:
                index = cached.index
                if not isinstance(index, ScopeIndex):
                    return
                if len(index) >= self._limits.flat_rows:
                    self._read_table_ahead(self._loader)
                if len(index.flat) >= self._limits.loaded_rows and self._rewrite_soon(cached):
                    waits = True  # it goes on when the file is written, and until then no request applies more
                    return
                since, key = index.since, cached.key
                changes = self._source.changes(key.scope, since, key.fingerprint, self._limits.inline)
                batch = Batch.of(changes, since, index.dimension)
                with cached.lock:
                    if cached.index is index and index.since == since:
                        index.apply(batch)
                        complete = len(changes) < self._limits.inline
                self._loader.rest()
            if isinstance(index, ScopeIndex) and index.needs_rewrite(self._limits):
                self._rewrite_soon(cached)
        finally:
            cached.loading = waits

    # -- writing files ---------------------------------------------------------------------------------

    def _rewrite_soon(self, cached: _CachedScope) -> bool:
        """Have the scope's file written in the background, unless that failed a moment ago."""
        if not cached.writing and time.monotonic() >= cached.not_before:
            cached.writing = True
            try:
                self._writer.do(lambda: self._rewrite(cached))
            except BaseException:
                cached.writing = False
                raise
        return cached.writing

    def _rewrite(self, cached: _CachedScope) -> None:
        """Write the scope's next file, continue with what is in it, and load the remaining changes."""
        done = False
        try:
            index = cached.index
            if isinstance(index, ScopeIndex):
                done = self._delegated(cached, index) or self._written(cached, index)
        finally:
            cached.writing = False
            if not done:
                cached.not_before = time.monotonic() + _RETRY_S
            self._load_soon(cached)

    def _delegated(self, cached: _CachedScope, index: ScopeIndex) -> bool:
        """Let the source search the scope where it can."""
        key = cached.key
        query = np.eye(1, key.dimension, dtype=np.float32)[0]
        if not self._source.nearest(key.scope, key.fingerprint, query, 1):
            return False  # it has no index, or not yet
        self._replace(cached, index, DatabaseIndex(self._source, key.scope, key.fingerprint, index.origin, index.floor))
        return True

    def _written(self, cached: _CachedScope, index: ScopeIndex) -> bool:
        if self._files is None:
            return False
        key, name = cached.key, self._name(cached.key)
        with self._files.draft(name) as draft:
            if draft is None:
                return False  # another process writes it
            newer = self._file(key)
            if newer is None or newer.header.revision <= (index.ivf.header.revision if index.ivf else 0):
                with cached.lock:
                    rows, since = index.rows()
                # The draft exists already: whoever forgets a memory from now on removes the draft too.
                rows = without(rows, self._changed_since(key, since))
                if self._source.revision(key.scope).origin != index.origin:
                    return False  # the scope was forgotten as a whole: the table says nothing of each row
                if rows.count == 0:
                    self._remove(key)
                else:
                    header = header_for(rows, key.fingerprint, index.origin, since)
                    retrain = not self._files.exists(name)
                    ivf_writer.write(draft, rows, header, self._writer.rest, retrain=retrain)
        fresh = self._opened(key, index.origin)
        self._catch_up(cached, index, fresh)
        if fresh.ivf is not None:
            self._lock_in_memory(fresh.ivf)
        return True

    def _catch_up(self, cached: _CachedScope, index: ScopeIndex, fresh: ScopeIndex) -> None:
        """Bring a fresh index to where the present one is, and put it in its place."""
        while fresh.since < index.since and len(fresh.flat) < self._limits.loaded_rows:
            if self._apply(cached, fresh, self._limits.inline):
                break
            self._writer.rest()
        self._replace(cached, index, fresh)

    def _replace(self, cached: _CachedScope, index: ScopeIndex, fresh: ScopeIndex | DatabaseIndex) -> None:
        with cached.lock:
            if cached.index is index:
                cached.index, cached.version = fresh, NEVER

    def _changed_since(self, key: IndexKey, since: int) -> set[int]:
        """Return the memories that changed after a revision; no vectors are read."""
        found: set[int] = set()
        while True:
            changes = self._source.changes(key.scope, since, "", self._limits.inline)
            found.update(change.number for change in changes)
            if len(changes) < self._limits.inline:
                return found
            since = max(change.revision for change in changes)
            self._writer.rest()


def _is_valid(index: ScopeIndex | DatabaseIndex, version: Version) -> bool:
    """Whether what an index was made from still holds."""
    ivf = index.ivf if isinstance(index, ScopeIndex) else None
    return index.origin == version.origin and not (ivf is not None and ivf.is_truncated())
