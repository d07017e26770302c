"""What memory would answer, how sure it is, and what speaks against it: a proposal from verified neighbours.

Similarity alone is unsafe: a negation, a swapped number or another name barely moves a cosine. So a proposal needs
one of two kinds of support. **Thick**: at least three verified tasks, worded differently, with the same answer. They
also show what the answer does not depend on: where their numbers (names, negations) differ among themselves, another
number is no objection; where they are all alike, it is a veto. A word of scope or time is one only where there are
fewer than six of them; else it lowers the score. **Thin**: fewer than three; then the request must be the same
question word for word, but for fillers, plurals and the place of a phrase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from optillm_memory.conversation.language import ENGLISH, language_of
from optillm_memory.conversation.lexicon import LANGUAGES
from optillm_memory.decide.present import present_in_any
from optillm_memory.decide.wording import LONGEST, STRONG, Wording, difference, wording

NEAREST = 50
# A neighbour that is this much further away weighs e times less.
_REACH = 0.06
# What the parts of a score weigh; the whole is divided so that it stays below 1.
_MARGIN, _NOVELTY, _DOUBT, _WHOLE = 1.5, 0.2, 0.05, 2.5
_THICK, _MANY = 3, 6
_SETTLED = 5  # verified answers from which on a question that may be about the present has shown that it is not
# Exemplars named as what a proposal rests on; rotations tried.
_NAMED = 8
# What many tasks with one answer show to be told by the way.
_BY_THE_WAY = frozenset(["veto_scope", "time_dependent"])
# Two wordings that differ may be one question asked twice; three show that the answer does not hang on it.
_VARIANTS = 3
_KEPT = 8192  # texts whose forms are kept: the same neighbours come up again and again


class Neighbour(NamedTuple):  # made 50 times for each decision, which a frozen dataclass takes three times as long for
    """A verified exemplar near the request; `failed` where a verified failure came after its last verified success.

    `successes` counts how often its answer was verified.
    """

    memory_id: str
    text: str
    answer: str
    cosine: float
    value: float = 1.0
    failed: bool = False
    successes: int = 1


@dataclass(frozen=True, slots=True)
class Proposal:
    """The answer that memory would give, its score in [0, 1] with the parts of it, and what speaks against it.

    `memory_ids` are the exemplars that it rests on, nearest first; `key` is the form in which answers are compared.
    """

    answer: str
    key: str
    score: float
    exact: bool
    vetoes: tuple[str, ...]
    memory_ids: tuple[str, ...]
    agreement: float
    similarity: float
    margin: float


def propose(query: str, neighbours: Sequence[Neighbour], normal: Callable[[str], str]) -> Proposal | None:
    """Return what the verified neighbours (up to 50, in any order) would answer, or None where there are none.

    `normal` gives the form in which two answers are compared.

    The score is (agreement + 1.5 x margin - 0.2 x novelty - 0.05 x doubts) / 2.5. Agreement is the answer's share of
    all neighbours' weights, which fall exponentially with the distance from the nearest. Margin is the mean cosine of
    the three nearest with the answer (one that is missing counts as 0; of thin support it is 1) less the cosine of
    the nearest with another answer. Novelty is the share of the request's words that none of the
    answer's tasks has. Doubts are words of scope or time that these give no reason to expect.
    """
    nearest = _distinct(query, neighbours)
    if not nearest:
        return None
    keys = [normal(n.answer) for n in nearest]
    same = [i for i, n in enumerate(nearest) if n.text == query]  # to the letter: indentation, too, is a part of it
    key, agreement = _elect(nearest, keys)
    if same:
        key = keys[same[0]]
    supporters = [n for n, k in zip(nearest, keys, strict=True) if k == key]
    similarity = sum(n.cosine for n in supporters[:_THICK]) / _THICK
    rival = max((n.cosine for n, k in zip(nearest, keys, strict=True) if k != key), default=0.0)
    if not same:
        case = _examine(query, supporters, similarity)
        against = case.vetoes
    else:
        case = _Case([], similarity)
        # One text with two verified answers has none; one that has failed since may be asked, but not served.
        against = _not_lasting(query, [nearest[i] for i in same])
        alike = [i for i, n in enumerate(nearest) if _folded(n.text) == _folded(query) and _laid_out_as(n.text, query)]
        against += ["conflict"] if any(keys[i] != key for i in alike) else []
        against += ["failed"] if any(nearest[i].failed for i in alike) else []
    margin = case.similarity - max(rival, 0.0)
    score = (agreement + _MARGIN * margin - _NOVELTY * case.novelty - _DOUBT * case.doubts) / _WHOLE
    score = min(max(score, 0.0), 1.0)
    ids = tuple(n.memory_id for n in supporters[:_NAMED])
    return Proposal(
        supporters[0].answer, key, score, bool(same), tuple(against), ids, agreement, case.similarity, margin
    )


def _not_lasting(query: str, asked_before: Sequence[Neighbour]) -> list[str]:
    """Return what speaks against giving the answer to the very same text again, but for its answer.

    Where the words do not tell that the answer lasts, or the language is one that nobody has made lists for, it does
    once it was verified some times.
    """
    language = language_of(query)
    degree = present_in_any(query)
    if degree == "clock":
        return ["time_dependent"]
    if sum(n.successes for n in asked_before) >= _SETTLED:
        return []
    if degree == "state":
        return ["time_dependent"]
    return [] if language in LANGUAGES else ["veto_language"]


def _distinct(query: str, neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    """Return the nearest first, each text with one answer once: what was seen often is no further evidence."""
    ordered = sorted(neighbours, key=lambda n: (-n.cosine, n.memory_id))[:NEAREST]
    kept: dict[tuple[str, str], Neighbour] = {}
    for item in ordered:
        place = (_folded(item.text), item.answer)
        first = kept.setdefault(place, item)
        if first is not item:
            chosen = item if item.text == query else first
            kept[place] = chosen._replace(failed=item.failed or first.failed)
    return list(kept.values())


@lru_cache(maxsize=_KEPT)
def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _laid_out_as(one: str, other: str) -> bool:
    return one == other or wording(one[:LONGEST]).layout == wording(other[:LONGEST]).layout


def _elect(nearest: Sequence[Neighbour], keys: Sequence[str]) -> tuple[str, float]:
    top = nearest[0].cosine
    votes: dict[str, float] = {}
    for item, key in zip(nearest, keys, strict=True):
        votes[key] = votes.get(key, 0.0) + item.value * math.exp((item.cosine - top) / _REACH)
    best = max(votes, key=lambda k: votes[k])  # the nearest's, where two are level
    total = sum(votes.values())
    return best, votes[best] / total if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Case:
    """What the wording of the supporters says: vetoes, how similar they are, what share is new, how many doubts."""

    vetoes: list[str]
    similarity: float
    novelty: float = 0.0
    doubts: int = 0


def _examine(query: str, supporters: Sequence[Neighbour], similarity: float) -> _Case:
    readable = [n for n in supporters if len(n.text) <= LONGEST]
    if len(query) > LONGEST or not readable:
        return _Case(["too_long"], similarity, 1.0)
    language = language_of(query)
    if language not in LANGUAGES:  # what turns a question round is not known: only the very same text will do
        return _Case(["veto_language"], similarity, 1.0)
    asked = wording(query)
    known = [wording(n.text) for n in readable]
    # The same question is looked for among the nearest: it is one of them, if it is there.
    differences = [difference(asked, k) for k in known[:_NAMED]]
    found, few = "" in differences, len(supporters) < _THICK
    novelty = len(asked.tokens.difference(*(k.tokens for k in known))) / max(len(asked.tokens), 1)
    degree = present_in_any(query)
    reasons = ["time_dependent"] if degree == "clock" else []
    if few and found:
        similarity, novelty = 1.0, 0.0
        # In English the labels have shown what becomes of such questions.
        state = degree == "state" and language != ENGLISH and sum(n.successes for n in supporters) < _SETTLED
        reasons += ["time_dependent"] if asked.times or state else []
    elif few:
        reasons.append(differences[0])
    elif not found:
        reasons += _unseen(asked, known, language)
    reasons = list(dict.fromkeys(reasons))
    if len(supporters) < _MANY:
        return _Case(reasons, similarity, novelty)
    vetoes = [reason for reason in reasons if reason not in _BY_THE_WAY]
    return _Case(vetoes, similarity, novelty, len(reasons) - len(vetoes))


def _unseen(asked: Wording, known: Sequence[Wording], language: str) -> list[str]:
    """Vetoes of thick support: what the request has or lacks, though the supporters are alike in it."""
    universe = asked.names.union(*(k.names for k in known))
    aspects: dict[str, Callable[[Wording], frozenset[str]]] = {
        "veto_numbers": lambda w: w.numbers,
        "veto_names": lambda w: w.tokens & universe,
        "veto_negation": lambda w: w.negations,
        "veto_scope": lambda w: w.scopes & STRONG if language == ENGLISH else w.scopes,
        "veto_layout": lambda w: frozenset(["\n".join(w.layout)] if w.layout else ()),
        "time_dependent": lambda w: w.times,
    }
    vetoes = []
    for reason, aspect in aspects.items():
        has, seen = aspect(asked), {aspect(k) for k in known}
        new_or_lacking = has - frozenset().union(*seen) or frozenset.intersection(*seen) - has
        if new_or_lacking and len(seen) < _VARIANTS:
            vetoes.append(reason)
    return vetoes
