"""Suggestions: the corrected action for a failing one, from examples of failing actions and what worked instead.

Programs induced from the nearest examples vote. Each example distributes its weight over the programs that explain it,
by their simplicity and by their results on the other near examples (right, or applicable and wrong), as in the
posterior over programs of Liang, Jordan and Klein 2010, "Learning programs: a hierarchical Bayesian approach"; a
program's success on the example that it was induced from does not count. Votes for equal results are added. The share
of the votes becomes a confidence by logistic calibration (Platt 1999) that starts from fixed constants.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from optillm_memory.learn.affinity import Features, Rarity, repeats
from optillm_memory.learn.cases import Case, Vocabulary, balanced
from optillm_memory.learn.edits import Program, apply, cost, literals
from optillm_memory.learn.induce import induce

# The number of examples used, and the least vote, relative to the largest, of one that contributes programs.
_NEIGHBOURS, _LEAST, _VOTERS = 16, 0.02, 8
_REHEARSED = 8  # neighbours on which the programs of a new example are tried
_COMPARED, _POSTINGS, _READ = 64, 128, 1_500  # examples compared with a case, and entries of the index read
_CANDIDATES = 6
# The votes for no result at all, as exp(affinity).
_BACKGROUND = math.exp(3.0)
_COST, _OWN_WORD_COST, _RIGHT, _WRONG = 0.7, 0.5, 2.0, 1.5
_EVIDENCE_POWER, _EVIDENCE_FLOOR = 0.6, math.exp(-6.0)
_RIGHT_OFFSET, _WRONG_OFFSET = 0.11, 0.45
_ABSTAIN = 0.02  # the share of the votes below which there is no result
_UNRELATED = 2.75  # the affinity of the nearest example below which there is no result
_SUPPORT, _FEW = 0.05, 0.3
_USUAL = 200  # examples, the latest, whose weight is the usual one
_FEW_UNTIL = 30  # examples; with fewer, confidences are lowered
_FOREIGN_WORD = 0.4
_SIGNS = frozenset("/:.@")
_WORD = re.compile(r"\w{2,80}")
_PIECE = re.compile(r"\w{2,}")
# Keywords of queries where none can stand: `ORDER =`, `f(WHERE)`.
_MISPLACED = re.compile(
    r"\b(?:ORDER|GROUP)\s+(?!BY\b)|\(\s*(?:FROM|WHERE|GROUP|ORDER|HAVING|LIMIT)\b|\(\s*SELECT\s*[),]"
    r"|\b(?:FROM|WHERE|BY|SELECT|AND|OR|ON)\s*(?:$|\)|[=<>,]|(?:FROM|WHERE|GROUP|ORDER|HAVING|LIMIT|JOIN|ON|BY)\b)"
)
_DESTRUCTIVE = frozenset(
    ("-D", "-f", "-r", "-rf", "-fr", "-R", "--force", "--hard", "--delete", "-delete", "rm", "reset", "drop")
)
Floats = NDArray[np.float64]


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


# What decides whether a candidate is right, in this order; the weights start from a fit on public cases.
FEATURES = ("share", "right", "wrong", "cost", "foreign", "literal", "affinity", "support", "same", "constant")
WEIGHTS = (1.0, 0.0, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.6)
# The precision of the prior around the weights that a fit starts from.
_PRIOR = (44.0, 100.0, 100.0, 100.0, 44.0, 100.0, 100.0, 100.0, 100.0, 11.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible correction: its share of the votes, the supporting examples, nearest first, and its features."""

    made: str
    share: float
    support: tuple[int, ...]
    features: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Maps the features of a candidate to the probability that it is right: a logistic regression.

    `labels` counts those that it was fitted to.
    """

    weights: tuple[float, ...] = WEIGHTS
    labels: int = 0

    def __call__(self, features: Sequence[float]) -> float:
        """Return the probability that a candidate with these features is right."""
        score = sum(w * f for w, f in zip(self.weights, features, strict=True))
        return 1.0 / (1.0 + math.exp(-min(max(score, -30.0), 30.0)))

    def fitted(self, features: Sequence[Sequence[float]], right: Sequence[bool]) -> Calibrator:
        """Return a calibrator fitted to labels, with a Gaussian prior around this one (few labels change little).

        Newton's method; raises ValueError where the lengths differ.
        """
        if len(features) != len(right):
            raise ValueError(f"{len(features)} candidates but {len(right)} labels")
        design = np.array(features, dtype=np.float64).reshape(-1, len(self.weights))
        labels = np.array(right, dtype=np.float64)
        start = np.array(self.weights)
        precision = np.array(_PRIOR)
        at = start.copy()
        for _ in range(30):
            chance = 1.0 / (1.0 + np.exp(-np.clip(design @ at, -30, 30)))
            gradient = design.T @ (labels - chance) - precision * (at - start)
            step = np.linalg.solve((design.T * (chance * (1 - chance))) @ design + np.diag(precision), gradient)
            at += np.clip(step, -1, 1)
            if float(np.abs(step).max()) < 1e-6:  # noqa: PLR2004
                break
        at[0] = max(float(at[0]), 0.1)  # the more votes, the likelier
        return Calibrator(tuple(float(w) for w in at), self.labels + len(labels))


@dataclass
class _Gone:
    """A fix that is to count as never seen, the words known from it alone, and what depends on them, anew."""

    fix: str
    words: frozenset[str]
    cases: dict[int, Case] = field(default_factory=dict)
    induced: dict[int, list[int]] = field(default_factory=dict)


class FixBook:
    """Examples of corrected actions, and the suggestions from them for another failing action.

    What an example teaches is computed once, when it is first near to a case or when `learn` is called. A suggestion
    looks at a bounded number of examples, which an inverted index finds.
    """

    def __init__(self, examples: Iterable[Example] = (), *, calibrator: Calibrator = Calibrator()) -> None:
        """Take the examples, and the calibrator of confidences."""
        self.calibrator = calibrator
        self._examples: list[Example] = []
        self._vocabulary = Vocabulary()
        self._views: list[Features] = []
        self._index: dict[str, list[int]] = {}
        self._words, self._line = Rarity(), Rarity()
        self._cases: dict[int, Case] = {}
        # Programs by number: to compare and hash nested tuples takes long.
        self._numbers: dict[Program, int] = {}
        self._listed: list[Program] = []
        self._costs: list[float] = []
        self._outcomes: list[dict[int, bool | None]] = []
        self._induced: dict[int, list[int]] = {}
        self._own_word_counts: dict[tuple[int, int], int] = {}
        for example in examples:
            self.add(example)

    @property
    def examples(self) -> Sequence[Example]:
        """The examples; a suggestion's `support` counts from the first."""
        return self._examples

    def add(self, example: Example) -> int:
        """Add an example; return its index."""
        index = len(self._examples)
        self._examples.append(example)
        self._vocabulary.add(example.fix)
        view = Features(Case(example.action, example.output, self._vocabulary.without(example.fix)))
        self._views.append(view)
        self._words.add(view.words)
        self._line.add(view.line)
        for key in view.keys:
            self._index.setdefault(key, []).append(index)
        return index

    def weigh(self, index: int, weight: float) -> None:
        """Set the weight of an example's evidence."""
        self._examples[index] = replace(self._examples[index], weight=weight)

    def learn(self, index: int) -> None:
        """Work out what an example teaches, and how that does on its neighbours, before it is first needed."""
        programs = self._programs(index)
        near, _ = self._nearest(self._views[index], frozenset((index,)))
        for other in near[:_REHEARSED]:
            for program in programs:
                self._outcome(program, other)
            for program in self._programs(other):
                self._outcome(program, index)

    def suggest(
        self, action: str, output: str, *, min_confidence: float = 0.0, among: Collection[int] | None = None
    ) -> Suggestion | None:
        """Return the likeliest corrected action; None without a result of this confidence.

        `among` are the indices of the examples that may be used; all of them by default.
        """
        best = self.best(action, output, among=among)
        if best is None:
            return None
        suggestion = self.with_confidence(best)
        return suggestion if suggestion.confidence >= min_confidence else None

    def best(
        self, action: str, output: str, *, without: int | None = None, among: Collection[int] | None = None
    ) -> Candidate | None:
        """Return the likeliest candidate; `without` excludes one example, as if it had never been seen."""
        return best(self.candidates(action, output, without=without, among=among), self.calibrator)

    def with_confidence(self, found: Candidate) -> Suggestion:
        """Return a candidate as a suggestion with its confidence."""
        # A fix of half the weight is right half as often; with few examples the calibration is uncertain. A fitted
        # calibrator knows how often fixes of the usual weight are right.
        weight = max((self._examples[e].weight for e in found.support), default=1.0)
        count = len(self._examples)
        if self.calibrator.labels >= _FEW_UNTIL:
            weight = min(weight / (sum(e.weight for e in self._examples[-_USUAL:]) / min(count, _USUAL)), 1.0)
        trust = weight * (1.0 - _FEW / math.sqrt(count) if count < _FEW_UNTIL else 1.0)
        return Suggestion(found.made, self.calibrator(found.features) * trust, found.support)

    def nearest(self, action: str, output: str, *, without: int | None = None) -> int | None:
        """Return the index of the example that is nearest to a case; None for an empty book."""
        gone = frozenset(() if without is None else (without,))
        near, _ = self._nearest(Features(Case(action, output, self._vocabulary)), gone)
        return near[0] if near else None

    def rehearse(self, index: int) -> tuple[list[tuple[float, ...]], list[bool]]:
        """Predict an example from the others; return the features of the best candidate, and whether it was right."""
        example = self._examples[index]
        best = self.best(example.action, example.output, without=index)
        return ([best.features], [normal(best.made) == normal(example.fix)]) if best else ([], [])

    def candidates(
        self, action: str, output: str, *, without: int | None = None, among: Collection[int] | None = None
    ) -> list[Candidate]:
        """Return the results with the most votes, a few; none where no example is near."""
        if not self._examples or not action.strip():
            return []
        vocabulary, gone = self._vocabulary, None
        if without is not None:
            fix = self._examples[without].fix
            vocabulary, gone = vocabulary.without(fix), _Gone(fix, vocabulary.only_of(fix))
        case = Case(action, output, vocabulary)
        near, affinity = self._nearest(Features(case), frozenset(() if without is None else (without,)), among)
        if not near or affinity[0] < _UNRELATED:
            return []
        weights = np.array([self._examples[e].weight for e in near])
        votes = np.exp(affinity) * weights
        evidence = np.exp(_EVIDENCE_POWER * (affinity - affinity[0])) * weights + _EVIDENCE_FLOOR
        voters = [e for e, vote in zip(near, votes, strict=True) if vote >= _LEAST * votes.max()][:_VOTERS]
        # The programs of the nearest examples, and those that several others have in common.
        pool = list(dict.fromkeys(p for e in voters for p in self._programs(e, gone)))
        common = Counter(p for e in near[len(voters) :] for p in self._programs(e, gone))
        pool += [p for p, n in common.items() if n > 1 and p not in set(pool)]
        here = {p: _made(self._listed[p], case) for p in pool}
        pool = [p for p in pool if here[p] is not None]
        right, wrong = self._tallies(pool, near, gone)
        shares = self._shares(pool, here, near, votes, right @ evidence, wrong @ evidence, right)
        total = float(votes.sum()) + _BACKGROUND
        found = []
        for made, by in sorted(shares.items(), key=lambda item: (-float(item[1].sum()), item[0]))[:_CANDIDATES]:
            share = float(by.sum())
            if share < _ABSTAIN * total or _is_malformed(action, made):
                continue
            support = tuple(e for e, part in zip(near, by, strict=True) if part >= _SUPPORT * share)
            makers = [i for i, p in enumerate(pool) if here[p] == made]
            strongest = max(makers, key=lambda i: (right[i].sum() - wrong[i].sum(), -self._costs[pool[i]]))
            risk = max((risk_of(made, action, output, self._examples[e]) for e in support[:1]), default=0.0)
            nearest = near.index(support[0]) if support else 0
            features = (
                _log_odds(share / total),
                math.log1p(float(right[strongest].sum())),
                math.log1p(float(wrong[strongest].sum())),
                min(30.0, *(self._costs[pool[i]] for i in makers)) / 10.0,
                risk,
                float(all(self._listed[pool[i]][0] == "whole" for i in makers)),
                float(affinity[nearest] - affinity[0]),
                math.log1p(len(support)),
                float(bool(support) and normal(self._examples[support[0]].action) == normal(action)),
                1.0,
            )
            found.append(Candidate(made, share / total, support, features))
        return found

    def _nearest(
        self, view: Features, without: Collection[int], among: Collection[int] | None = None
    ) -> tuple[list[int], Floats]:
        indices = self._retrieved(view) if among is None else among
        words, line = self._words.weights, self._line.weights
        scored = [(-round(view.affinity(self._views[i], words, line), 9), i) for i in indices if i not in without]
        nearest = heapq.nsmallest(_NEIGHBOURS, scored)
        return [index for _, index in nearest], np.array([-score for score, _ in nearest])

    def _retrieved(self, view: Features) -> Iterable[int]:
        """Return the examples to compare with a case: those that share the rarest of its features."""
        count = len(self._examples)
        if count <= _COMPARED:
            return range(count)
        scores: dict[int, float] = {}
        lists = sorted((self._index[key] for key in view.keys if key in self._index), key=len)
        spent = 0
        for found in lists:
            weight = math.log(1 + count / len(found))
            for index in found[-_POSTINGS:]:
                scores[index] = scores.get(index, 0.0) + weight
            spent += min(len(found), _POSTINGS)
            if spent > _READ:
                break
        return heapq.nlargest(_COMPARED, scores, key=lambda i: (scores[i], i))

    def _case(self, index: int) -> Case:
        if index not in self._cases:
            example = self._examples[index]
            self._cases[index] = Case(example.action, example.output, self._vocabulary.without(example.fix))
        return self._cases[index]

    def _case_without(self, index: int, gone: _Gone) -> Case:
        if index not in gone.cases:
            example = self._examples[index]
            vocabulary = self._vocabulary.without(gone.fix, example.fix)
            gone.cases[index] = Case(example.action, example.output, vocabulary)
        return gone.cases[index]

    def _programs(self, index: int, gone: _Gone | None = None) -> list[int]:
        if index not in self._induced:
            self._induced[index] = self._numbered(induce(self._case(index), self._examples[index].fix))
        if gone is None or not self._case(index).depends_on(gone.words):
            return self._induced[index]
        if index not in gone.induced:
            found = induce(self._case_without(index, gone), self._examples[index].fix)
            gone.induced[index] = self._numbered(found)
        return gone.induced[index]

    def _numbered(self, programs: Iterable[Program]) -> list[int]:
        numbers = []
        for program in programs:
            number = self._numbers.setdefault(program, len(self._listed))
            if number == len(self._listed):
                self._listed.append(program)
                self._costs.append(cost(program))
                self._outcomes.append({})
            numbers.append(number)
        return numbers

    def _outcome(self, program: int, index: int, gone: _Gone | None = None) -> bool | None:
        known = self._outcomes[program]
        if index not in known:
            known[index] = self._is_right(program, self._case(index), index)
        if gone is None or not self._case(index).depends_on(gone.words):
            return known[index]
        return self._is_right(program, self._case_without(index, gone), index)

    def _is_right(self, program: int, case: Case, index: int) -> bool | None:
        made = _made(self._listed[program], case)
        return None if made is None else made == _form(self._examples[index].fix)

    def _tallies(self, pool: Sequence[int], near: Sequence[int], gone: _Gone | None) -> tuple[Floats, Floats]:
        """Return whether each program is right, and whether it is applicable and wrong, on each example."""
        results = [[self._outcome(p, e, gone) for e in near] for p in pool]
        shape = (len(pool), len(near))
        right = np.array([[r is True for r in row] for row in results], dtype=np.float64).reshape(shape)
        wrong = np.array([[r is False for r in row] for row in results], dtype=np.float64).reshape(shape)
        return right, wrong

    def _shares(
        self, pool: Sequence[int], here: Mapping[int, str | None], near: Sequence[int], votes: Floats,
        successes: Floats, failures: Floats, right: Floats,
    ) -> dict[str, Floats]:  # fmt: skip
        # The votes for each result, example by example. The evidence of an example for its own programs is no success.
        evidence = np.exp(_EVIDENCE_POWER * (np.log(np.maximum(votes, 1e-300)) - math.log(max(votes.max(), 1e-300))))
        base = np.array([-_COST * self._costs[p] for p in pool]) - _WRONG * np.log(failures + _WRONG_OFFSET)
        found: dict[str, Floats] = {}
        for column, example in enumerate(near):
            explain = np.flatnonzero(right[:, column]).tolist()
            if not explain:
                continue
            elsewhere = np.maximum(successes[explain] - evidence[column], 0.0)
            weight = base[explain] + _RIGHT * np.log(elsewhere + _RIGHT_OFFSET)
            weight -= _OWN_WORD_COST * np.array([self._own_words(example, pool[i]) for i in explain])
            weight = np.exp(weight - weight.max())
            weight *= votes[column] / weight.sum()
            for i, part in zip(explain, weight.tolist(), strict=True):
                made = here[pool[i]]
                if made is not None:
                    found.setdefault(made, np.zeros(len(near)))[column] += part
        return found

    def _own_words(self, index: int, program: int) -> int:
        """Return how many words of an example a program spells out: such a program is specific to that example."""
        key = index, program
        if key not in self._own_word_counts:
            case = self._case(index)
            spelled = " ".join(literals(self._listed[program]))
            words = case.rest_words.intersection(_PIECE.findall(spelled))
            # A piece of a path or an address with short names contains no such word.
            pieces = [w for w in spelled.split() if len(w) > 1 and _SIGNS.intersection(w) and w in case.rest]
            self._own_word_counts[key] = len(words) or len(pieces)
        return self._own_word_counts[key]


def best(candidates: Iterable[Candidate], calibrator: Calibrator) -> Candidate | None:
    """Return the likeliest of candidates."""
    return max(candidates, key=lambda c: (calibrator(c.features), -len(c.made), c.made), default=None)


def kind_of(action: str, output: str) -> str:
    """Return a name of the kind of a failure: its program and the error without what differs from case to case."""
    view = Features(Case(action, output))
    return f"{view.program} {' '.join(sorted(view.line))}"


def normal(action: str) -> str:
    """Return an action with each run of white space as one blank."""
    return " ".join(action.split())


def _made(program: Program, case: Case) -> str | None:
    made = apply(program, case)
    return None if made is None else _form(made)


def _form(action: str) -> str:
    # White space matters in several lines.
    return action.strip() if "\n" in action else normal(action)


def risk_of(made: str, action: str, output: str, example: Example) -> float:
    """Return what speaks against a result whatever its votes: 0 for nothing.

    It grows with the words of the example's own action (a file, a module, a value) that were carried over although this
    case does not have them, and where a deleting or forcing word comes from an example of another intent.
    """
    if normal(action) == normal(example.action):
        return 0.0
    here = f"{action}\n{output}"
    foreign = (set(_WORD.findall(example.action)) - set(_WORD.findall(here))).intersection(_WORD.findall(made))
    if foreign:
        return 1.0 + _FOREIGN_WORD * min(len(foreign), 6)
    destructive = [word for word in made.split() if word in _DESTRUCTIVE and word not in here.split()]
    return 0.7 if destructive and _intent(action) != _intent(example.action) else 0.0


def _intent(action: str) -> tuple[str, ...]:
    words = action.split()
    plain = [w for w in words if not w.startswith("-")]
    return (*plain[:2], *sorted(w for w in words if w.startswith("-")))


def _is_malformed(action: str, made: str) -> bool:
    # A result with an unclosed quotation or bracket, a doubled word or a misplaced keyword is worse than the action.
    if action.count("(") == action.count(")") and made.count("(") != made.count(")"):
        return True
    if balanced(action) and not balanced(made.replace("\\'", "").replace('\\"', "")):
        return True
    if repeats(made) and not repeats(action):
        return True
    return _MISPLACED.search(made) is not None and _MISPLACED.search(action) is None


def _log_odds(share: float) -> float:
    share = min(max(share, 0.001), 0.999)
    return math.log(share / (1.0 - share))
