"""Suggestions: the corrected action for a failing one, from examples of failing actions and what worked instead.

Programs induced from the nearest examples vote. Each example distributes its weight over the programs that explain it,
by their simplicity and by their results on the other near examples (right, or applicable and wrong), as in the
posterior over programs of Liang, Jordan and Klein 2010, "Learning programs: a hierarchical Bayesian approach"; a
program's success on the example that it was induced from does not count. Votes for equal results are added. The share
of the votes becomes a confidence by logistic calibration (Platt 1999) that starts from fixed constants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optillm_memory.learn.affinity import Features, rarity, repeats
from optillm_memory.learn.cases import Case, Vocabulary, balanced
from optillm_memory.learn.edits import Program, apply, cost, literals
from optillm_memory.learn.induce import induce

# The number of examples used, and the least vote, relative to the largest, of one that contributes programs.
_NEIGHBOURS, _LEAST = 24, 0.02
# The votes for no result at all, as exp(affinity).
_BACKGROUND = math.exp(3.0)
_COST, _OWN_WORD_COST, _RIGHT, _WRONG = 0.7, 1.0, 2.0, 1.5
_EVIDENCE_POWER, _EVIDENCE_FLOOR = 0.6, math.exp(-6.0)
_RIGHT_OFFSET, _WRONG_OFFSET = 0.11, 0.45
_ABSTAIN = 0.02  # the share of the votes below which there is no result
_UNRELATED = 2.75  # the affinity of the nearest example below which there is no result
_SUPPORT, _FEW = 0.05, 0.3
_FEW_UNTIL = 30  # examples; with fewer, confidences are lowered
_SIGNS = frozenset("/:.@")
_WORD = re.compile(r"\w{2,80}")
_DESTRUCTIVE = frozenset(
    ("-D", "-f", "-r", "-rf", "-fr", "-R", "--force", "--hard", "--delete", "-delete", "rm", "reset", "drop")
)
Floats = NDArray[np.float64]
Best = tuple[str, float, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Example:
    """A failing action, its output, and the action that worked; `weight` in (0, 1] is the strength of its evidence.

    Raises ValueError for a weight outside of (0, 1].
    """

    action: str
    output: str
    fix: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be in (0, 1], but is {self.weight}")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A corrected action, the probability that it is right, and the supporting examples, nearest first."""

    action: str
    confidence: float
    support: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Maps a share of the votes to a probability: logistic in the log odds of the share, increasing."""

    slope: float = 1.0
    offset: float = 0.6

    def __call__(self, share: float) -> float:
        """Return the probability that a result with this share of the votes is right."""
        return 1.0 / (1.0 + math.exp(-(self.slope * _log_odds(share) + self.offset)))

    def fitted(self, shares: Sequence[float], right: Sequence[bool]) -> Calibrator:
        """Return a calibrator fitted to labels, with a Gaussian prior around this one (few labels change little).

        Newton's method on two parameters; raises ValueError where the lengths differ.
        """
        if len(shares) != len(right):
            raise ValueError(f"{len(shares)} shares but {len(right)} labels")
        design = np.array([[_log_odds(s), 1.0] for s in shares], dtype=np.float64).reshape(-1, 2)
        labels = np.array(right, dtype=np.float64)
        start = np.array([self.slope, self.offset])
        precision = np.diag([1 / 0.15**2, 1 / 0.3**2])
        at = start.copy()
        for _ in range(30):
            chance = 1.0 / (1.0 + np.exp(-np.clip(design @ at, -30, 30)))
            gradient = design.T @ (labels - chance) - precision @ (at - start)
            step = np.linalg.solve((design.T * (chance * (1 - chance))) @ design + precision, gradient)
            at += np.clip(step, -1, 1)
            if float(np.abs(step).max()) < 1e-6:  # noqa: PLR2004
                break
        return Calibrator(max(float(at[0]), 0.1), float(at[1]))


class FixBook:
    """Examples of corrected actions, and the suggestions from them for another failing action.

    Nothing is computed before the first suggestion; programs are induced only for the nearest examples, and cached.
    """

    def __init__(self, examples: Iterable[Example], *, calibrator: Calibrator = Calibrator()) -> None:
        """Take the examples, and the calibrator of confidences."""
        self._examples = list(examples)
        self.calibrator = calibrator
        self._clear()

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples; a suggestion's `support` counts from the first."""
        return tuple(self._examples)

    def add(self, example: Example) -> None:
        """Add an example; everything is computed again when it is next needed."""
        self._examples.append(example)
        self._clear()

    def suggest(self, action: str, output: str, *, min_confidence: float = 0.0) -> Suggestion | None:
        """Return the likeliest corrected action; None without a result of this confidence."""
        if not self._examples or not action.strip():
            return None
        found = self.best(action, output)
        suggestion = None if found is None else self.with_confidence(found, action, output)
        return suggestion if suggestion and suggestion.confidence >= min_confidence else None

    def with_confidence(self, found: Best, action: str, output: str) -> Suggestion:
        """Return a result of `best` as a suggestion with its confidence."""
        made, share, support = found
        care = risk_factor(made, action, output, self._examples[support[0]]) if support else 1.0
        return Suggestion(made, self.calibrator(share) * self._trust(support) * care, support)

    def _trust(self, support: Sequence[int]) -> float:
        # A fix of half the weight is right half as often; with few examples the calibration is uncertain.
        weight = max((self._examples[e].weight for e in support), default=1.0)
        count = len(self._examples)
        return weight * (1.0 - _FEW / math.sqrt(count) if count < _FEW_UNTIL else 1.0)

    def nearest(self, action: str, output: str) -> int | None:
        """Return the index of the example that is nearest to a case; None for an empty book."""
        near, _ = self._nearest(Features(Case(action, output, self._vocabulary)), None)
        return near[0] if near else None

    def cross_validate(self, most: int) -> tuple[list[float], list[bool]]:
        """Predict examples from all the others; return the shares of the votes, and whether each result was right.

        At most `most` examples, evenly spaced, are used.
        """
        shares: list[float] = []
        right: list[bool] = []
        count = len(self._examples)
        for index in (i * count // min(most, count) for i in range(min(most, count))):
            example = self._examples[index]
            found = self.best(example.action, example.output, without=index)
            if found is not None:
                shares.append(found[1])
                right.append(normal(found[0]) == normal(example.fix))
        return shares, right

    def best(
        self, action: str, output: str, *, without: int | None = None
    ) -> tuple[str, float, tuple[int, ...]] | None:
        """Return (result with the most votes, its share, the supporting examples), or None.

        `without` excludes one example, as if it had never been seen.
        """
        vocabulary = self._vocabulary
        if without is not None:
            vocabulary = vocabulary.without(self._examples[without].fix)
        case = Case(action, output, vocabulary)
        near, affinity = self._nearest(Features(case), without)
        if not near or affinity[0] < _UNRELATED:
            return None
        weights = np.array([self._examples[e].weight for e in near])
        votes = np.exp(affinity) * weights
        evidence = np.exp(_EVIDENCE_POWER * (affinity - affinity[0])) * weights + _EVIDENCE_FLOOR
        voters = [e for e, vote in zip(near, votes, strict=True) if vote >= _LEAST * votes.max()]
        here, results = self._results(case, near, voters)
        shares = _shares(results, here, votes, evidence, [self._own_words(e) for e in near])
        total = float(votes.sum()) + _BACKGROUND
        fit = [(made, by) for made, by in shares.items() if not _is_malformed(action, made)]
        if not fit:
            return None
        made, by = max(fit, key=lambda item: (float(item[1].sum()), -len(item[0]), item[0]))
        share = float(by.sum())
        if share < _ABSTAIN * total:
            return None
        return made, share / total, tuple(e for e, part in zip(near, by, strict=True) if part >= _SUPPORT * share)

    def _clear(self) -> None:
        self._cases: dict[int, Case] = {}
        self._views: dict[int, Features] = {}
        self._induced: dict[int, list[Program]] = {}
        self._made: dict[int, dict[Program, str | None]] = {}
        self._own_word_counts: dict[int, dict[Program, int]] = {}
        self._idf: tuple[dict[str, float], dict[str, float]] | None = None
        self._vocabulary = Vocabulary(example.fix for example in self._examples)

    def _case(self, index: int) -> Case:
        if index not in self._cases:
            example = self._examples[index]
            self._cases[index] = Case(example.action, example.output, self._vocabulary.without(example.fix))
        return self._cases[index]

    def _nearest(self, view: Features, without: int | None) -> tuple[list[int], Floats]:
        if not self._views:
            self._views = {index: Features(self._case(index)) for index in range(len(self._examples))}
        if self._idf is None:
            self._idf = rarity(v.words for v in self._views.values()), rarity(v.line for v in self._views.values())
        words, line = self._idf
        scored = [(-view.affinity(v, words, line), index) for index, v in self._views.items() if index != without]
        nearest = sorted(scored)[:_NEIGHBOURS]
        return [index for _, index in nearest], np.array([-score for score, _ in nearest])

    def _programs(self, index: int) -> list[Program]:
        if index not in self._induced:
            self._induced[index] = induce(self._case(index), self._examples[index].fix)
        return self._induced[index]

    def _own_words(self, index: int) -> _OwnWordCount:
        return _OwnWordCount(self._case(index), self._own_word_counts.setdefault(index, {}))

    def _results(
        self, case: Case, near: Sequence[int], voters: Sequence[int]
    ) -> tuple[dict[Program, str | None], dict[Program, list[bool | None]]]:
        # The result of each program here, and on each near example: right, wrong, or None where it does not apply.
        pool = sorted({p for e in voters for p in self._programs(e)}, key=lambda p: (cost(p), repr(p)))
        here: dict[Program, str | None] = {}
        results: dict[Program, list[bool | None]] = {}
        wanted = [_form(self._examples[e].fix) for e in near]
        # Equivalent programs are counted separately: many derivations of one result are evidence for it.
        for program in pool:
            made = [self._outcome(program, e) for e in near]
            here[program] = _made(program, case)
            results[program] = [None if m is None else m == w for m, w in zip(made, wanted, strict=True)]
        return here, results

    def _outcome(self, program: Program, index: int) -> str | None:
        made = self._made.setdefault(index, {})
        if program not in made:
            made[program] = _made(program, self._case(index))
        return made[program]


def normal(action: str) -> str:
    """Return an action with each run of white space as one blank."""
    return " ".join(action.split())


def _shares(
    results: Mapping[Program, Sequence[bool | None]],
    here: Mapping[Program, str | None],
    votes: Floats,
    evidence: Floats,
    own_words: Sequence[_OwnWordCount],
) -> dict[str, Floats]:
    # The votes for each result, example by example.
    programs = list(results)
    right = np.array([[r is True for r in results[p]] for p in programs]).reshape(len(programs), len(votes))
    wrong = np.array([[r is False for r in results[p]] for p in programs]).reshape(len(programs), len(votes))
    against = _WRONG * np.log(wrong @ evidence + _WRONG_OFFSET)
    simple = np.array([-_COST * cost(p) for p in programs])
    successes = right @ evidence
    found: dict[str, Floats] = {}
    for e in range(len(votes)):
        explain = np.flatnonzero(right[:, e])
        if not len(explain):
            continue
        elsewhere = np.maximum(successes[explain] - evidence[e], 0.0)
        weight = simple[explain] - against[explain] + _RIGHT * np.log(elsewhere + _RIGHT_OFFSET)
        weight -= _OWN_WORD_COST * np.array([own_words[e](programs[p]) for p in explain])
        weight = np.exp(weight - weight.max())
        weight *= votes[e] / weight.sum()
        for p, part in zip(explain.tolist(), weight.tolist(), strict=True):
            made = here[programs[p]]
            if made is not None:
                found.setdefault(made, np.zeros(len(votes)))[e] += part
    return found


def _made(program: Program, case: Case) -> str | None:
    made = apply(program, case)
    return None if made is None else _form(made)


def _form(action: str) -> str:
    # White space matters in several lines.
    return action.strip() if "\n" in action else normal(action)


def risk_factor(made: str, action: str, output: str, example: Example) -> float:
    """Return a factor in (0, 1] for the confidence, for the damage that a wrong suggestion would do.

    It is below 1 where a word of the example's own action (a file, a module, a value) that this case does not have was
    carried over, and where a deleting or forcing word comes from an example of another intent.
    """
    if normal(action) == normal(example.action):
        return 1.0
    here = f"{action}\n{output}"
    foreign = set(_WORD.findall(example.action)) - set(_WORD.findall(here))
    if foreign.intersection(_WORD.findall(made)):
        return 0.3
    destructive = [word for word in made.split() if word in _DESTRUCTIVE and word not in here.split()]
    return 0.5 if destructive and _intent(action) != _intent(example.action) else 1.0


def _intent(action: str) -> tuple[str, ...]:
    words = action.split()
    plain = [w for w in words if not w.startswith("-")]
    return (*plain[:2], *sorted(w for w in words if w.startswith("-")))


def _is_malformed(action: str, made: str) -> bool:
    # A result with an unclosed quotation or a doubled word is worse than the action.
    if balanced(action) and not balanced(made.replace("\\'", "").replace('\\"', "")):
        return True
    return repeats(made) and not repeats(action)


class _OwnWordCount:
    """Counts the words of an example among the literals of a program: such a program is specific to that example."""

    def __init__(self, case: Case, kept: dict[Program, int]) -> None:
        self._case, self._kept = case, kept

    def __call__(self, program: Program) -> int:
        if program not in self._kept:
            spelled = " ".join(literals(program))
            rest = " ".join(self._case.tokens[self._case.head + 1 :])
            words = set(re.findall(r"\w{2,}", rest)).intersection(re.findall(r"\w{2,}", spelled))
            # A piece of a path or an address with short names contains no such word.
            pieces = [w for w in spelled.split() if len(w) > 1 and _SIGNS.intersection(w) and w in rest]
            self._kept[program] = len(words) or len(pieces)
        return self._kept[program]


def _log_odds(share: float) -> float:
    share = min(max(share, 0.001), 0.999)
    return math.log(share / (1.0 - share))
