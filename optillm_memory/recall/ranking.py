"""Ranking: dense and lexical results fused by reciprocal rank, held to a floor, cut, weighed by value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Plain fusion (k = 60, equal weights) cost 7 points of top-1 on short requests, where words mislead more than
# meaning does; with these the words only break ties of meaning, and still find what has no meaning to a model.
RRF_K = 10
LEXICAL_WEIGHT = 0.25
# A hit that follows a relevant one may lie a little lower itself, but not where scores have dropped off.
FOLLOWER_SLACK = 0.1
DROP_OFF = 0.6
LEXICAL_FLOOR = 0.5
_WORD = re.compile(r"\w+")
# The commonest English words carry no subject; other languages rely on document frequencies alone.
STOP_WORDS = frozenset(
    [
        "a",
        "about",
        "after",
        "all",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "get",
        "had",
        "has",
        "have",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "just",
        "me",
        "my",
        "no",
        "not",
        "of",
        "on",
        "or",
        "our",
        "please",
        "so",
        "some",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "up",
        "us",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A memory that a search found: its cosine (None without an encoder) and its share of matched query words."""

    number: int
    cosine: float | None
    lexical: float | None


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate with its relevance: fused ranks, scaled so that the best possible is 1."""

    candidate: Candidate
    relevance: float


def words(text: str, limit: int = 64) -> list[str]:
    """Return the distinct words of a text that can carry its subject, in order."""
    found = dict.fromkeys(w for w in _WORD.findall(text.lower()) if w not in STOP_WORDS)
    return list(found)[:limit]


def all_words(text: str) -> set[str]:
    """Return the words of a text."""
    return set(_WORD.findall(text.lower()))


def coverage(
    query: Sequence[str],
    texts: Iterable[str],
    weights: Mapping[str, float],
    of_text: Callable[[str], set[str]] = all_words,
) -> list[float]:
    """Return the share of the query's word weight that each text holds: 1 when it holds every word.

    `of_text` gives the words that a text holds.
    """
    asked = {word: weights.get(word, 1.0) for word in query}
    total = sum(asked.values()) or 1.0
    found = (of_text(text) for text in texts)
    return [sum([weight for word, weight in asked.items() if word in present]) / total for present in found]


def fuse(rankings: Iterable[tuple[Sequence[int], float]], k: int = RRF_K) -> dict[int, float]:
    """Weighted reciprocal rank fusion (Cormack, Clarke and Büttcher 2009, eq. 1), scaled to a best of 1."""
    scores: dict[int, float] = {}
    lists = [(ranking, weight) for ranking, weight in rankings if ranking]
    total = sum(weight for _, weight in lists)
    for ranking, weight in lists:
        for rank, number in enumerate(ranking, 1):
            scores[number] = scores.get(number, 0.0) + weight * (k + 1) / (k + rank) / total
    return scores


def rank(
    dense: Sequence[tuple[int, float]],
    lexical: Sequence[tuple[int, float]],
    cosines: Mapping[int, float],
    floor: float,
) -> list[Ranked]:
    """Fuse both rankings and keep what is relevant, best first; an unrelated request gets an empty list.

    `dense` holds (number, cosine) and `lexical` (number, coverage), best first; `cosines` the cosine of every
    lexical result that has a vector. With an encoder the cosine decides what is relevant: the best must reach
    `floor`. Without one, coverage does.
    """
    cosine_of = {**dict(dense), **cosines}
    coverage_of = dict(lexical)
    kept: list[Ranked] = []
    fused = fuse([([n for n, _ in dense], 1.0), ([n for n, _ in lexical], LEXICAL_WEIGHT)])
    best = max(cosine_of.values(), default=0.0)
    limit = max(floor - FOLLOWER_SLACK, DROP_OFF * best) if best >= floor else float("inf")
    for number, relevance in fused.items():
        cosine = cosine_of.get(number)
        covered = coverage_of.get(number)
        # What has no vector yet (the encoder came late) is judged by its words.
        relevant = cosine >= limit if cosine is not None else (covered or 0.0) >= LEXICAL_FLOOR
        if relevant:
            kept.append(Ranked(Candidate(number, cosine, covered), relevance))
    return sorted(kept, key=lambda r: (-r.relevance, r.candidate.number))
