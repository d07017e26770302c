"""Recall by words: which memories of a scope share words with a query; the rare ones tell, the common ones do not."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.recall.ranking import all_words, coverage
from optillm_memory.recall.word_agreement import terms
from optillm_memory.records import Scope
from optillm_memory.store.sqlite.connection import Connection, Readers, marks
from optillm_memory.store.tables import rows

# Postings read of one word: beside meaning, words are there for what is rare; alone, they have to do it all.
_DEPTH_BESIDE, _DEPTH_ALONE = 64, 1_000
# What holds every word of a query is looked for among the latest so many memories: where all its words are common,
# their postings are as long as the scope.
_LATEST = 200_000


class WordReads:
    """The part of a store that looks words up; a database brings `_postings` and `_holding_all`."""

    _readers: Readers

    def _postings(self, db: Connection, scope_id: int, words: Sequence[str], depth: int) -> Mapping[str, list[int]]:
        """Return for each word up to `depth` numbers of the scope's memories that hold it."""
        raise NotImplementedError

    def _holding_all(self, db: Connection, scope_id: int, words: Sequence[str], depth: int, latest: int) -> list[int]:
        """Return up to `depth` of the scope's memories that hold every word, among the `latest` numbers."""
        raise NotImplementedError

    def lexical(self, scope: Scope, query: Sequence[str], limit: int, *, alone: bool) -> list[tuple[int, float]]:
        """Return (number, coverage) of memories that share words of the query, rare ones first (by IDF), best first.

        `alone` says that no search by meaning goes beside this: then words that are common have to do, too.
        """
        if not query:
            return []
        depth = _DEPTH_ALONE if alone else _DEPTH_BESIDE
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            postings = self._postings(db, scope_id, query, depth)
            # A word that is everywhere tells nothing; where the query has no other, what holds all of them does.
            telling = {word: found for word, found in postings.items() if len(found) < depth}
            if not any(telling.values()):
                if not alone:
                    return []
                together = self._holding_all(db, scope_id, query, depth, _LATEST)
                telling = dict.fromkeys(query, together) if together else dict(postings)
            total = 1 + max(map(len, postings.values()))
            weights = {word: math.log(1 + total / (1 + len(found))) for word, found in postings.items()}
            scores: defaultdict[int, float] = defaultdict(float)
            for word, numbers in telling.items():
                for number in numbers:
                    scores[number] += weights[word]
            best = [number for number, _ in heapq.nsmallest(limit, scores.items(), key=_best_first)]
            texts: dict[int, Any] = dict(
                db.execute(f"SELECT number, task FROM memories WHERE number IN ({marks(best)})", best).fetchall()
            )
        found = list(zip(texts, coverage(query, texts.values(), weights, _held), strict=True))
        return sorted(found, key=lambda pair: (-pair[1], len(texts[pair[0]]), pair[0]))


def _held(text: str) -> set[str]:
    return {*all_words(text), *terms(text)}


def _best_first(scored: tuple[int, float]) -> tuple[float, int]:
    return -scored[1], scored[0]
