"""The table `memories_fts`: which memories of a scope share words with a query, above all rare ones."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from optillm_memory.conversation.parse import key_of
from optillm_memory.recall.ranking import coverage
from optillm_memory.recall.word_agreement import terms, words_looked_for
from optillm_memory.store.backend import Dialect
from optillm_memory.store.sqlite.connection import Connection, WritingConnection, marks

_WORDS_KEPT = 400
# Postings read of one word: beside a search by meaning, words only have to find what is rare; alone, everything.
_DEPTH_BESIDE, _DEPTH_ALONE = 64, 1_000
# Memories that contain every word of a query are looked for among the latest so many: where all its words are common,
# their postings are as long as the scope.
_LATEST = 200_000


def scoped(scope_id: int, word: str) -> str:
    """Return the term that stands for a scope's word in the full-text index: no query reads past its scope."""
    return f"s{scope_id}x{word}"


def scoped_words(scope_id: int, task: str) -> str:
    """Return the text under which a memory of a scope is found by its words."""
    return " ".join([scoped(scope_id, word) for word in terms(key_of(task), _WORDS_KEPT)])


def put(db: WritingConnection, number: int, scope_id: int, task: str) -> None:
    """Have a memory found by its words."""
    db.later("INSERT INTO memories_fts(rowid, words) VALUES (?, ?)", [(number, scoped_words(scope_id, task))])


def drop(db: Connection, number: int) -> None:
    """Have a memory found by its words no more."""
    db.execute("DELETE FROM memories_fts WHERE rowid = ?", (number,))


def lexical(
    db: Connection, dialect: Dialect, scope_id: int, query: Sequence[str], limit: int, *, alone: bool
) -> list[tuple[int, float]]:
    """Return (number, coverage) of memories that share words with the query, rare ones first (by IDF), best first.

    `alone` means without a search by meaning: then words that are common have to do, too.
    """
    depth = _DEPTH_ALONE if alone else _DEPTH_BESIDE
    postings = dialect.postings(db, scope_id, query, depth)
    # A word that is everywhere distinguishes nothing; where the query has no other, memories with all of them count.
    rare = {word: found for word, found in postings.items() if len(found) < depth}
    if not any(rare.values()):
        if not alone:
            return []
        together = dialect.holding_all(db, scope_id, query, depth, _LATEST)
        rare = dict.fromkeys(query, together) if together else dict(postings)
    total = 1 + max(map(len, postings.values()))
    weights = {word: math.log(1 + total / (1 + len(found))) for word, found in postings.items()}
    scores: defaultdict[int, float] = defaultdict(float)
    for word, numbers in rare.items():
        for number in numbers:
            scores[number] += weights[word]
    best = [number for number, _ in heapq.nsmallest(limit, scores.items(), key=lambda pair: (-pair[1], pair[0]))]
    texts: dict[int, Any] = dict(
        db.execute(f"SELECT number, task FROM memories WHERE number IN ({marks(best)})", best).fetchall()
    )
    found = list(zip(texts, coverage(query, texts.values(), weights, words_looked_for(query)), strict=True))
    return sorted(found, key=lambda pair: (-pair[1], len(texts[pair[0]]), pair[0]))
