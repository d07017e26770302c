"""Recall in one scope: words and meaning searched, fused, weighed; only what is relevant comes back."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.index import UNRELATED, VectorIndex
from optillm_memory.recall.rank import rank, words
from optillm_memory.records import Hit, MemoryRecord, Scope

BREADTH, LEXICAL_BREADTH = 50, 20
# Another system prompt, tool set or response format: the answer may not suit, so the same frame goes first.
OTHER_FRAME = 0.8
_INLINE_ROWS = 5_000
_OWN = 3  # hits that may turn out to rest on the episode itself
_SCOPES_KEPT = 256


@dataclass(frozen=True, slots=True)
class Change:
    """A memory that came, went or changed: `vector` is None where it is not to be searched (yet)."""

    number: int
    vector: bytes | None
    revision: int


class Source(Protocol):
    """What recall reads; every call is bound to one scope."""

    def revision(self) -> tuple[int, int]:
        """Return (generation, revision): what changes whenever any memory does."""

    def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
        """Return up to `limit` memories of the scope changed after a revision, oldest change first."""

    def lexical(self, scope: Scope, query: Sequence[str], limit: int, *, alone: bool) -> list[tuple[int, float]]:
        """Return (number, coverage) of memories that share words of the query, best first.

        `alone` says that no search by meaning goes beside this.
        """

    def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
        """Return the verified memories of the scope that have these numbers."""

    def of_episode_alone(self, scope: Scope, memory_ids: Sequence[str], episode_id: str) -> set[str]:
        """Return those of the memories that rest on this episode and on no other."""


class _Corpus:
    """One scope's vectors, brought up to date before each search."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.index: VectorIndex | None = None
        self.version = (-1, -1)
        self.since = 0
        self.fingerprint = ""
        self.loading = False
        self.revisions: dict[int, int] = {}  # by memory number: what was read before is old


class Recaller:
    """Searches one scope at a time; keeps the vectors of recently used scopes."""

    def __init__(self, source: Source) -> None:
        """Start with nothing loaded; a scope is loaded at its first recall."""
        self._source = source
        self._corpora: OrderedDict[Scope, _Corpus] = OrderedDict()
        self._lock = threading.Lock()

    def recall(
        self,
        scope: Scope,
        key: str,
        vector: Callable[[], NDArray[np.float32] | None],
        *,
        fingerprint: str = "",
        unrelated: tuple[float, float] = UNRELATED,
        episode_id: str = "",
        frame: str = "",
        limit: int = 10,
    ) -> list[Hit]:
        """Return up to `limit` relevant hits, best first.

        `vector` fetches the key's vector, and is called when words have been looked up: the encoder works meanwhile.
        Where it gives None, recall is lexical.
        An episode's own traces are left out, so that an answer is never its own evidence.
        """
        lexical = self._source.lexical(scope, words(key), LEXICAL_BREADTH, alone=not fingerprint)
        dense: list[tuple[int, float]] = []
        cosines: dict[int, float] = {}
        floor = 0.0
        if (query := vector()) is not None:
            index = self._index(scope, fingerprint, len(query), unrelated, self._source.revision())
            floor = index.floor
            dense = index.search(query, BREADTH)
            cosines = index.cosines(query, [n for n, _ in lexical])
        ranked = rank(dense, lexical, cosines, floor)[: 2 * limit + _OWN]
        if not ranked:
            return []
        found = self._source.memories(scope, [r.candidate.number for r in ranked])
        hits = []
        for item in ranked:
            memory = found.get(item.candidate.number)
            if memory is not None:
                weight = memory.value * (1.0 if memory.frame == frame or not frame else OTHER_FRAME)
                hits.append(Hit(memory, item.relevance * weight, item.candidate.cosine, item.candidate.lexical))
        hits = sorted(hits, key=lambda h: (-h.score, h.memory.memory_id))[: limit + _OWN]
        if episode_id and hits:
            own = self._source.of_episode_alone(scope, [h.memory.memory_id for h in hits], episode_id)
            hits = [h for h in hits if h.memory.memory_id not in own]
        return hits[:limit]

    def near(
        self,
        scope: Scope,
        query: NDArray[np.float32],
        version: tuple[int, int],
        *,
        fingerprint: str,
        unrelated: tuple[float, float],
        count: int,
    ) -> list[tuple[int, float, int]]:
        """Return (number, cosine, revision) of the scope's nearest memories, best first, whatever their relevance.

        `version` is the source's (generation, revision) as the caller just read it.
        """
        corpus = self._corpus(scope)
        index = self._index(scope, fingerprint, len(query), unrelated, version)
        revisions = corpus.revisions
        return [(number, cosine, revisions.get(number, 0)) for number, cosine in index.search(query, count)]

    def _corpus(self, scope: Scope) -> _Corpus:
        with self._lock:
            corpus = self._corpora.setdefault(scope, _Corpus())
            self._corpora.move_to_end(scope)
            while len(self._corpora) > _SCOPES_KEPT:
                self._corpora.popitem(last=False)
            return corpus

    def _index(
        self,
        scope: Scope,
        fingerprint: str,
        dimension: int,
        unrelated: tuple[float, float],
        version: tuple[int, int],
    ) -> VectorIndex:
        """Return the scope's index with what the source held at a version."""
        corpus = self._corpus(scope)
        with corpus.lock:
            if corpus.index is None or corpus.fingerprint != fingerprint or corpus.version[0] != version[0]:
                corpus.index, corpus.since, corpus.fingerprint = VectorIndex(dimension, unrelated), 0, fingerprint
                corpus.version, corpus.revisions = (version[0], -1), {}
            if corpus.version != version and not corpus.loading:
                if self._load(scope, corpus):
                    corpus.version = version
                else:  # too many for one request: the rest comes in the background
                    corpus.loading = True
                    threading.Thread(target=self._load_all, args=(scope, corpus), daemon=True).start()
            return corpus.index

    def _load(self, scope: Scope, corpus: _Corpus) -> bool:
        index = corpus.index
        assert index is not None
        changes = self._source.changes(scope, corpus.since, corpus.fingerprint, _INLINE_ROWS)
        for change in changes:
            corpus.revisions[change.number] = change.revision
            if change.vector is None:
                index.drop(change.number)
            else:
                index.put(change.number, np.frombuffer(change.vector, dtype=np.float32))
            corpus.since = max(corpus.since, change.revision)
        index.calibrate()
        return len(changes) < _INLINE_ROWS

    def _load_all(self, scope: Scope, corpus: _Corpus) -> None:
        try:
            complete = False
            while not complete:
                with corpus.lock:
                    complete = self._load(scope, corpus)
        finally:
            corpus.loading = False
