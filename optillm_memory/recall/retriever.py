"""Recall in one scope: words and vectors are searched, fused and weighted; only relevant memories are returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.conversation.language import ENGLISH, language_of
from optillm_memory.recall import language_floors
from optillm_memory.recall.language_floors import LanguageFloors
from optillm_memory.recall.ranking import Candidate, Ranked, fuse, rank
from optillm_memory.recall.relevance_floor import UNRELATED
from optillm_memory.recall.vectors import source as vector_source
from optillm_memory.recall.vectors.cache import Index, IndexCache, IndexKey, Worker
from optillm_memory.recall.vectors.ivf_format import Files
from optillm_memory.recall.vectors.scope_index import Limits
from optillm_memory.recall.vectors.source import NEVER, Change, Version
from optillm_memory.recall.word_agreement import agreements, shares_words, terms
from optillm_memory.records import Hit, MemoryRecord, Scope

__all__ = ["NEVER", "Change", "Retriever", "Source", "Version"]

BREADTH, LEXICAL_BREADTH, _TERMS = 50, 20, 64
# Another system prompt, tool set or response format: the answer may not suit, so the same frame goes first.
OTHER_FRAME = 0.8
# A cosine so little above the floor is no proof by itself: then the words have to agree, too.
_UNSURE = 0.1
_OWN = 3  # hits that may turn out to have the episode itself as their only evidence


class Source(vector_source.Source, language_floors.Source, Protocol):
    """What recall reads; every call is bound to one scope."""

    def lexical(self, scope: Scope, query: Sequence[str], limit: int, *, alone: bool) -> list[tuple[int, float]]:
        """Return (number, coverage) of memories that share words of the query, best first.

        `alone` means that vectors are not searched beside this.
        """

    def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
        """Return the verified memories of the scope that have these numbers."""

    def of_episode_alone(self, scope: Scope, memory_ids: Sequence[str], episode_id: str) -> set[str]:
        """Return those of the memories whose only evidence is this episode."""


class Retriever:
    """Searches one scope at a time; the indexes of recently used scopes are kept."""

    def __init__(
        self, source: Source, loader: Worker, writer: Worker, files: Files | None = None, limits: Limits | None = None
    ) -> None:
        """Start with nothing loaded; a scope is opened at its first recall.

        `loader` and `writer` do the background work (see `IndexCache`); `files` hold the vectors of large scopes.
        """
        self._source = source
        self._indexes = IndexCache(source, files, limits or Limits(), loader, writer)
        self._floors = LanguageFloors(source)
        self._dimensions: dict[str, int] = {}  # of the vectors of each encoder that was used

    def close(self) -> None:
        """End the background work."""
        self._indexes.close()

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

        `vector` waits for the key's vector, and is called when words have been looked up and the scope is up to date:
        the encoder works meanwhile. Where it returns None, recall is lexical.
        An episode's own traces are left out, so that an answer is never its own evidence.
        """
        lexical = self._source.lexical(scope, terms(key, _TERMS), LEXICAL_BREADTH, alone=not fingerprint)
        dense: list[tuple[int, float]] = []
        cosines: dict[int, float] = {}
        floor = 0.0
        dimension = self._dimensions.get(fingerprint, 0)
        # After the words: what they found is in the index too.
        index = self._index(IndexKey(scope, fingerprint, dimension, unrelated)) if dimension else None
        if (query := vector()) is not None:
            if len(query) != dimension:
                self._dimensions[fingerprint] = len(query)
                index = self._index(IndexKey(scope, fingerprint, len(query), unrelated))
            if index is not None:
                floor = index.floor
                dense = index.search(query, BREADTH)
                cosines = index.cosines(query, [n for n, _ in lexical])
        language = language_of(key)
        if language != ENGLISH:
            known = self._floors.floor(scope, language, fingerprint, self._source.revision(scope).revision, unrelated)
            if known is None or not dense:
                return self._by_words(scope, key, dense, lexical, cosines, episode_id, frame, limit)
            floor = max(floor, known)
        ranked = rank(dense, lexical, cosines, floor)[: 2 * limit + _OWN]
        if not ranked:
            return []
        found = self._source.memories(scope, [r.candidate.number for r in ranked])
        if not _is_sure(key, ranked, found, floor):
            return []
        return self._hits(scope, ranked, found, episode_id, frame, limit)

    def _by_words(
        self,
        scope: Scope,
        key: str,
        dense: Sequence[tuple[int, float]],
        lexical: Sequence[tuple[int, float]],
        cosines: Mapping[int, float],
        episode_id: str,
        frame: str,
        limit: int,
    ) -> list[Hit]:
        """Return what agrees with a query by its words: the encoder is absent, or does not know the language."""
        cosine_of = {**dict(dense), **cosines}
        coverage_of = dict(lexical)
        found = self._source.memories(scope, dict.fromkeys((*coverage_of, *cosine_of)))
        agreed = dict(zip(found, agreements(key, [memory.task for memory in found.values()]), strict=True))
        best = sorted((n for n, a in agreed.items() if a.holds), key=lambda n: (-agreed[n].likeness, n))
        relevance = fuse([(best, 1.0)])
        ranked = [Ranked(Candidate(n, cosine_of.get(n), coverage_of.get(n)), relevance[n]) for n in best]
        return self._hits(scope, ranked, found, episode_id, frame, limit)

    def _hits(
        self,
        scope: Scope,
        ranked: Sequence[Ranked],
        found: Mapping[int, MemoryRecord],
        episode_id: str,
        frame: str,
        limit: int,
    ) -> list[Hit]:
        """Return the hits, weighted by value, without those whose only evidence is the episode itself."""
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

    def related(
        self,
        scope: Scope,
        key: str,
        query: NDArray[np.float32] | None,
        texts: Sequence[str],
        vectors: Sequence[NDArray[np.float32] | None],
        *,
        fingerprint: str,
        unrelated: tuple[float, float],
    ) -> list[float | None]:
        """Return how much each of some texts has to do with a query by what recall goes by in the scope; None: nothing.

        `vectors` are those of the texts, as far as they are known.
        """
        agreed = agreements(key, texts)
        floor = None
        if query is not None and (index := self._index(IndexKey(scope, fingerprint, len(query), unrelated))):
            floor = index.floor
            if (language := language_of(key)) != ENGLISH:
                revision = self._source.revision(scope).revision
                known = self._floors.floor(scope, language, fingerprint, revision, unrelated)
                floor = None if known is None else max(floor, known)
        found: list[float | None] = []
        for words, vector in zip(agreed, vectors, strict=True):
            if query is None or vector is None or floor is None:
                found.append(words.likeness if words.holds else None)
                continue
            cosine = float(query @ vector)
            sure = cosine >= floor + _UNSURE or (cosine >= floor and words.shared > 0)
            found.append(cosine if sure else None)
        return found

    def _index(self, key: IndexKey) -> Index | None:
        return self._indexes.index(key, self._source.revision(key.scope))

    @property
    def busy(self) -> bool:
        """Whether vectors are being loaded, written or checked in the background."""
        return self._indexes.busy

    def near(
        self,
        scope: Scope,
        query: NDArray[np.float32],
        version: Version,
        *,
        fingerprint: str,
        unrelated: tuple[float, float],
        count: int,
    ) -> list[tuple[int, float, int]]:
        """Return (number, cosine, revision) of the scope's nearest memories, best first, whatever their relevance.

        `version` is the source's for this scope, as the caller just read it.
        """
        index = self._indexes.index(IndexKey(scope, fingerprint, len(query), unrelated), version)
        if index is None:
            return []
        return [(number, cosine, index.revision(number)) for number, cosine in index.search(query, count)]


def _is_sure(key: str, ranked: Sequence[Ranked], found: Mapping[int, MemoryRecord], floor: float) -> bool:
    """Whether the nearest is near beyond doubt, or one that is near enough shares the query's words."""
    near = [r.candidate for r in ranked if r.candidate.cosine is not None and r.candidate.cosine >= floor]
    if not near or max(c.cosine or 0.0 for c in near) >= floor + _UNSURE:
        return True
    return shares_words(key, (found[c.number].task for c in near if c.number in found))
