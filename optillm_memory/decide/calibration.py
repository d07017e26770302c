"""Calibration: which thresholds of the score are proven to keep the error among hits below a limit.

**What is proven.** For labels that are independent and of which those at or above a threshold are wrong with one and
the same probability (exchangeable traffic), the probability is at most 5 %, from the start to the first retreat and
from each retreat to the next, that a threshold comes into force whose error among would-be hits is above the limit.

**By which test.** Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei 2021, "Learn then Test: Calibrating
predictive algorithms to achieve risk control"): each threshold of a grid has the null hypothesis that its error is
above the limit, and multiple testing keeps the chance of any false rejection to 5 %. Two things spend that chance:

- *Thresholds* are tested in sequence from strict to lax. The 5 % are shared between several starts: to begin at the
  strictest alone would stall, as the few labels at the top are noisy. A threshold is tested with its own share and
  with what those before it, once proven, hand on (the fallback procedure: Wiens and Dmitrienko 2005).

- *Looks.* A threshold is looked at again whenever its labels have grown by a twentieth. Its share is spent over the
  looks by a function of the number of errors that the limit lets expect, and the number of errors that passes is
  found exactly, by convolution of binomial distributions over the paths that have not passed yet (group-sequential
  spending: Lan and DeMets 1983; Jennison and Turnbull 2000).

**What it rests on.** Hits are labelled less often than misses (only audits and feedback tell). Where a threshold's
labels are not spread as its proposals are, scores are taken as strata, and labels count for as many as the stratified
estimate is worth (Korn and Graubard 1998); that part is an approximation.

**When traffic changes** it is not exchangeable. When recent labels say that the error is above the limit, the gate
retreats to the laxest threshold that was proven before and that they do not speak against; it is closed where there is
none. What is laxer has to be proven again by labels that come after the retreat. What stays rests on older labels.

While memory is small it errs more than it will, at the same score. So a score is discounted by the number of
proposals that came before it, and thresholds are thresholds of what remains: thus early labels are like later ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Thresholds, strictest first; the places in the grid where tests start, and their shares of the confidence.
GRID = tuple(round(0.54 - 0.02 * step, 2) for step in range(23))
_SHARES = {GRID.index(0.44): 0.2, GRID.index(0.36): 0.8}
_DISCOUNT, _HALVED_AFTER = 0.25, 300  # subtracted from a score at first, and the proposals after which half is
_FIRST_LOOK, _GROWTH, _LAST_LOOK = 10, 1.05, 20_000
# The spending function: 1 - 7 / (errors expected at the limit) of a share, at first nothing. Actions are rarer than
# answers and more seldom wrong: for them it begins earlier.
UNSPENT, UNSPENT_ON_ACTIONS = 7.0, 3.0
_STRATUM = 20  # labels that a stratum has at least, but for the laxest
_RECENT, _DOUBT = 100, 0.01  # labels of would-be hits that can cause a retreat, and its probability by chance

WRONG, RIGHT, UNKNOWN = 0, 1, 2


def _look_sizes() -> tuple[int, ...]:
    sizes = [_FIRST_LOOK]
    while sizes[-1] < _LAST_LOOK:
        sizes.append(math.ceil(sizes[-1] * _GROWTH))
    return tuple(sizes)


# Numbers of labels at which a threshold is looked at.
LOOKS = _look_sizes()


def discount(proposals: int) -> float:
    """Return what is subtracted from a score after this number of earlier proposals."""
    return _DISCOUNT * _HALVED_AFTER / (_HALVED_AFTER + proposals)


def cell_of(score: float) -> int:
    """Return the place in the grid of the strictest threshold that a discounted score reaches; its length if none."""
    return next((i for i, threshold in enumerate(GRID) if score >= threshold), len(GRID))


class Calibration:
    """A fold over (cell, verdict) of proposals, in order, for one limit of the error."""

    def __init__(self, limit: float, unspent: float = UNSPENT) -> None:
        """Start with nothing in force; `unspent` are the errors expected at the limit before confidence is spent."""
        self.limit = limit
        self._unspent = unspent
        self.closed = False
        self.recent: deque[tuple[int, int]] = deque(maxlen=4 * _RECENT)
        self._proven = [False] * len(GRID)
        self._laxest = -1
        self._sample = Sample()

    def add(self, cell: int, verdict: int) -> None:
        """Count one proposal, and its label if it has one."""
        for node in self._sample.add(cell, verdict):
            self._look(node)
        if verdict != UNKNOWN and cell < len(GRID):
            self.recent.append((cell, verdict))
            if verdict == WRONG and cell <= self._laxest and exceeds_limit(self.recent, self._laxest, self.limit):
                self._retreat()

    @property
    def threshold(self) -> float | None:
        """The laxest threshold in force, or None."""
        return GRID[self._laxest] if self._laxest >= 0 else None

    def labels(self, threshold: float) -> int:
        """Return how many labels there are at or above a threshold, since the last retreat."""
        return self._sample.labels[GRID.index(threshold)]

    def _look(self, node: int) -> None:
        """Test a threshold once those before it are proven, and then those after it by their past looks."""
        share = self._share(node)
        while node < len(GRID) and (share := share + _SHARES.get(node, 0.0)) > 0 and self._passes(node, share):
            self._proven[node] = True
            self._laxest = max(self._laxest, node)
            self.closed = False
            node += 1

    def _share(self, node: int) -> float:
        """Return the share of the confidence handed on by the thresholds before, all proven back to a start."""
        share = 0.0
        while node and self._proven[node - 1]:
            node -= 1
            share += _SHARES.get(node, 0.0)
        return share

    def _passes(self, node: int, share: float) -> bool:
        if self._proven[node]:
            return True
        allowed = boundary(self.limit, (1 - CONFIDENCE) * share, self._unspent).allowed
        return any(errors <= allowed(look) for look, errors in enumerate(self._sample.errors[node]))

    def _retreat(self) -> None:
        """Go back to the laxest threshold that recent labels do not speak against; the rest begins anew."""
        kept = [node for node in range(self._laxest) if self._proven[node]]
        while kept and exceeds_limit(self.recent, kept[-1], self.limit):
            kept.pop()
        self._laxest = kept[-1] if kept else -1
        self.closed = not kept
        self._proven = [node in kept for node in range(len(GRID))]
        self._sample = Sample()
        # The labels that speak against the laxer thresholds have had their effect.
        self.recent = deque((r for r in self.recent if r[0] <= self._laxest), maxlen=self.recent.maxlen)


class Sample:
    """The labels so far: for each threshold the number of errors, now and at each look."""

    def __init__(self) -> None:
        """Start empty."""
        self.labels = [0] * len(GRID)
        self.errors: list[list[float]] = [[] for _ in GRID]
        self._wrong = [0] * len(GRID)
        self._due: list[float] = [LOOKS[0]] * len(GRID)
        self._cells = [[0, 0, 0] for _ in GRID]  # proposals, labels, wrong ones

    def add(self, cell: int, verdict: int) -> list[int]:
        """Count one proposal; return the thresholds that are to be looked at."""
        if cell >= len(GRID):
            return []
        counts = self._cells[cell]
        counts[0] += 1
        if verdict == UNKNOWN:
            return []
        wrong = verdict == WRONG
        counts[1] += 1
        counts[2] += wrong
        for node in range(cell, len(GRID)):
            self.labels[node] += 1
            self._wrong[node] += wrong
        return [node for node in range(cell, len(GRID)) if self.labels[node] >= self._due[node] and self._look(node)]

    def _look(self, node: int) -> bool:
        """Note the errors at the looks that are due; return whether there were any."""
        wrong, worth = self._effective_counts(node)
        done, labels = self.errors[node], self.labels[node]
        before = len(done)
        while len(done) < len(LOOKS) and LOOKS[len(done)] <= worth:
            done.append(wrong * LOOKS[len(done)] / worth)
        following = LOOKS[len(done)] if len(done) < len(LOOKS) else math.inf
        # Where the effective number of labels is smaller than their number, the next look cannot be foreseen.
        self._due[node] = following if worth == labels else max(following, labels * _GROWTH)
        return len(done) > before

    def _effective_counts(self, node: int) -> tuple[float, float]:
        """Return (errors, labels) as if labels were distributed over the scores as proposals are."""
        cells = self._cells[: node + 1]
        if sum(proposals for proposals, _, _ in cells) == self.labels[node]:
            return self._wrong[node], self.labels[node]
        strata: list[list[int]] = [[0, 0, 0]]
        for cell in cells:
            if strata[-1][1] >= _STRATUM:
                strata.append([0, 0, 0])
            strata[-1] = [a + b for a, b in zip(strata[-1], cell, strict=True)]
        # The laxest may have fewer labels: to merge it with the one before would hide its errors among those of others.
        if strata[-1][1] == 0:  # nothing is known of them: taken for wrong
            strata[-1][1:] = [1, 1]
        total = sum(proposals for proposals, _, _ in strata)
        rate = sum(p / total * wrong / labels for p, labels, wrong in strata)
        # A stratum without errors has a variance all the same.
        near = [(p / total, labels, (wrong + 0.5) / (labels + 1)) for p, labels, wrong in strata]
        middle = sum(weight * p for weight, _, p in near)
        variance = sum(weight * weight * p * (1 - p) / labels for weight, labels, p in near)
        worth = min(middle * (1 - middle) / variance, float(self.labels[node]))
        return rate * worth, worth


def exceeds_limit(recent: Sequence[tuple[int, int]], node: int, limit: float) -> bool:
    """Whether the latest labels at or above a threshold have more errors than the limit explains."""
    hits = [verdict for cell, verdict in recent if cell <= node][-_RECENT:]
    wrong = hits.count(WRONG)
    return wrong > 0 and 1.0 - float(_binomial(len(hits), limit, wrong - 1).sum()) <= _DOUBT


class Boundary:
    """The errors allowed at each look, such that a rate at the limit ever passes with at most the given probability."""

    def __init__(self, limit: float, probability: float, unspent: float = UNSPENT) -> None:
        """Start before the first look."""
        self._limit, self._probability, self._unspent = limit, probability, unspent
        self._allowed: list[int] = []
        self._paths: NDArray[np.float64] = np.ones(1)  # by number of errors: not passed yet
        self._spent = 0.0

    def allowed(self, look: int) -> int:
        """Return the largest number of errors that passes; -1 where none does."""
        while len(self._allowed) <= look:
            self._extend()
        return self._allowed[look]

    def _extend(self) -> None:
        look = len(self._allowed)
        size = LOOKS[look]
        step = size - (LOOKS[look - 1] if look else 0)
        expected = size * self._limit
        # Paths with far more errors never come back: what is left out has a probability below 1e-12.
        most = math.ceil(expected + 8 * math.sqrt(expected) + 16)
        self._paths = np.convolve(self._paths, _binomial(step, self._limit, most))[: most + 1]
        budget = self._probability * max(0.0, 1.0 - self._unspent / expected)
        passing = self._spent + np.cumsum(self._paths)
        allowed = int(np.searchsorted(passing, budget, side="right")) - 1
        if allowed >= 0:
            self._spent = float(passing[allowed])
            self._paths[: allowed + 1] = 0.0
        self._allowed.append(allowed)


@lru_cache(maxsize=512)
def boundary(limit: float, probability: float, unspent: float = UNSPENT) -> Boundary:
    """Return the boundary for a limit of the error and a probability of passing at it."""
    return Boundary(limit, probability, unspent)


def _binomial(count: int, rate: float, most: int) -> NDArray[np.float64]:
    """Return the probabilities of 0 to `most` errors among `count` labels."""
    whole = math.lgamma(count + 1)
    logs = [
        whole - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * math.log(rate) + (count - k) * math.log1p(-rate)
        for k in range(min(count, most) + 1)
    ]
    found: NDArray[np.float64] = np.exp(np.array(logs))
    return found
