"""The answer that memory proposes, its score, and the vetoes against it, from verified neighbours.

Similarity alone is unsafe: a negation, a swapped number or another name barely changes a cosine. So a proposal needs
one of two kinds of support. **Thick**: at least three verified tasks, worded differently, with the same answer. They
also show what the answer does not depend on: where their numbers (names, negations) differ among themselves, another
number is no objection; where they are all equal, it is a veto. A word of scope or time is a veto only where there are
fewer than six of them; else it lowers the score. **Thin**: fewer than three; then the request must be the same
question word for word, except for fillers, plurals and the place of a phrase.
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
# The cosine by which a neighbour is farther away than the nearest when it has 1/e of its weight.
_BANDWIDTH = 0.06
# Weights of the parts of a score, and the divisor that keeps it below 1.
_MARGIN, _NOVELTY, _DOUBT, _WHOLE = 1.5, 0.2, 0.05, 2.5
_THICK, _MANY = 3, 6
_SETTLED = 5  # verified answers that show that a question that may be about the present is not
# Exemplars named as the support of a proposal.
_NAMED = 8
# Vetoes that six or more tasks with one answer turn into doubts.
_WAIVED = frozenset(["veto_scope", "time_dependent"])
# Two different wordings may be one question asked twice; three show that the answer does not depend on the difference.
_VARIANTS = 3
_KEPT = 8192  # texts whose folded form is cached: the same neighbours come up again and again


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
    """The answer that memory proposes, its score in [0, 1] with its parts, and the vetoes against it.

    `memory_ids` are the supporting exemplars, nearest first; `key` is the form in which answers are compared.
    `encoder` is the fingerprint of the encoder of the cosines: scores of two encoders are not comparable.
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
    encoder: str = ""


def propose(query: str, neighbours: Sequence[Neighbour], normal: Callable[[str], str]) -> Proposal | None:
    """Return the answer that the verified neighbours (up to 50, in any order) support, or None without neighbours.

    `normal` gives the form in which two answers are compared.

    The score is (agreement + 1.5 x margin - 0.2 x novelty - 0.05 x doubts) / 2.5. Agreement is the answer's share of
    all neighbours' weights, which fall exponentially with the distance from the nearest. Margin is the mean cosine of
    the three nearest with the answer (one that is missing counts as 0; of thin support it is 1) less the cosine of
    the nearest with another answer. Novelty is the share of the request's words that none of the
    answer's tasks has. Doubts are words of scope or time that none of them has.
    """
    nearest = _distinct(query, neighbours)
    if not nearest:
        return None
    keys = [normal(n.answer) for n in nearest]
    same = [i for i, n in enumerate(nearest) if n.text == query]  # to the letter: indentation, too, is a part of it
    key, agreement = _vote(nearest, keys)
    if same:
        key = keys[same[0]]
    supporters = [n for n, k in zip(nearest, keys, strict=True) if k == key]
    similarity = sum(n.cosine for n in supporters[:_THICK]) / _THICK
    rival = max((n.cosine for n, k in zip(nearest, keys, strict=True) if k != key), default=0.0)
    if not same:
        wording_check = _check_wording(query, supporters, similarity)
        against = wording_check.vetoes
    else:
        wording_check = _WordingCheck([], similarity)
        # One text with two verified answers has none; an answer that has failed since is not served.
        against = _time_vetoes(query, [nearest[i] for i in same])
        alike = [i for i, n in enumerate(nearest) if _folded(n.text) == _folded(query) and _laid_out_as(n.text, query)]
        against += ["conflict"] if any(keys[i] != key for i in alike) else []
        against += ["failed"] if any(nearest[i].failed for i in alike) else []
    margin = wording_check.similarity - max(rival, 0.0)
    penalty = _NOVELTY * wording_check.novelty + _DOUBT * wording_check.doubts
    score = (agreement + _MARGIN * margin - penalty) / _WHOLE
    score = min(max(score, 0.0), 1.0)
    ids = tuple(n.memory_id for n in supporters[:_NAMED])
    return Proposal(
        supporters[0].answer, key, score, bool(same), tuple(against), ids, agreement, wording_check.similarity, margin
    )


def _time_vetoes(query: str, asked_before: Sequence[Neighbour]) -> list[str]:
    """Return the vetoes against answering the same text again that come from time and language.

    Where the words do not show that the answer lasts, or there are no word lists for the language, several
    verifications do.
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
    """Return the nearest first, each text with one answer once: repetitions are no further evidence."""
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


def _vote(nearest: Sequence[Neighbour], keys: Sequence[str]) -> tuple[str, float]:
    top = nearest[0].cosine
    votes: dict[str, float] = {}
    for item, key in zip(nearest, keys, strict=True):
        votes[key] = votes.get(key, 0.0) + item.value * math.exp((item.cosine - top) / _BANDWIDTH)
    best = max(votes, key=lambda k: votes[k])  # of equal votes the nearest's
    total = sum(votes.values())
    return best, votes[best] / total if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _WordingCheck:
    """The comparison of wordings: vetoes, similarity, the share of new words, the number of doubts."""

    vetoes: list[str]
    similarity: float
    novelty: float = 0.0
    doubts: int = 0


def _check_wording(query: str, supporters: Sequence[Neighbour], similarity: float) -> _WordingCheck:
    """Compare the request's words with those of the tasks that support the answer."""
    readable = [n for n in supporters if len(n.text) <= LONGEST]
    if len(query) > LONGEST or not readable:
        return _WordingCheck(["too_long"], similarity, 1.0)
    language = language_of(query)
    if language not in LANGUAGES:  # without its negations and scope words only the same text is safe
        return _WordingCheck(["veto_language"], similarity, 1.0)
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
        # In English the labels show how such questions turn out.
        state = degree == "state" and language != ENGLISH and sum(n.successes for n in supporters) < _SETTLED
        reasons += ["time_dependent"] if asked.times or state else []
    elif few:
        reasons.append(differences[0])
    elif not found:
        reasons += _unsupported(asked, known, language)
    reasons = list(dict.fromkeys(reasons))
    if len(supporters) < _MANY:
        return _WordingCheck(reasons, similarity, novelty)
    vetoes = [reason for reason in reasons if reason not in _WAIVED]
    return _WordingCheck(vetoes, similarity, novelty, len(reasons) - len(vetoes))


def _unsupported(asked: Wording, known: Sequence[Wording], language: str) -> list[str]:
    """Return the vetoes of thick support: what the request has or lacks, though the supporters agree in it."""
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
