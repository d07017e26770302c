"""Exact vector search over one scope's memories, and the relevance floor calibrated on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# How the cosines of unrelated short texts lie for all-MiniLM-L6-v2: (median, spread). An encoder brings its own.
UNRELATED = (0.06, 0.085)
# Cosines of unrelated texts have a heavier tail than a normal distribution; measured on five kinds of text.
_TAIL = 1.6
# A scope of one subject is alike in all its pairs: they may lift its floor by this much, not shut recall.
_LIFT = 0.05
_SAMPLE = 128


def spread_of(vectors: NDArray[np.float32]) -> tuple[float, float]:
    """Return the median of all pairs' cosines and their spread (1.4826 times the median absolute deviation).

    Both are blind to the few pairs that are alike in meaning.
    """
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    middle = float(np.median(pairs))
    return middle, 1.4826 * float(np.median(np.abs(pairs - middle)))


def reach(unrelated: tuple[float, float], size: int) -> float:
    """Return how near the nearest of `size` unrelated texts comes: the extreme value of so many normal draws."""
    middle, spread = unrelated
    return middle + _TAIL * spread * math.sqrt(2 * math.log(max(size, 2)))


class VectorIndex:
    """Rows of unit vectors by memory number. Not thread-safe: its owner holds a lock while it changes.

    A search reads one consistent array even while rows are added, since arrays are replaced, never shrunk in place.
    """

    def __init__(self, dimension: int, unrelated: tuple[float, float] = UNRELATED) -> None:
        """Start empty; `unrelated` is the median and spread of this encoder's cosines of unrelated texts."""
        self._unrelated = unrelated
        self._own = unrelated
        self._vectors: NDArray[np.float32] = np.zeros((64, dimension), dtype=np.float32)
        self._numbers: NDArray[np.int64] = np.zeros(64, dtype=np.int64)
        self._row_of: dict[int, int] = {}
        self._calibrated_at = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def put(self, number: int, vector: NDArray[np.float32]) -> None:
        """Add or replace one row."""
        row = self._row_of.get(number)
        if row is None:
            row = len(self._row_of)
            if row == len(self._numbers):
                self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
                self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
            self._row_of[number] = row
        self._vectors[row] = vector
        self._numbers[row] = number

    def drop(self, number: int) -> None:
        """Take one row out; the last row moves into its place."""
        row = self._row_of.pop(number, None)
        last = len(self._row_of)
        if row is None or row == last:
            return
        moved = int(self._numbers[last])
        self._vectors[row], self._numbers[row] = self._vectors[last], moved
        self._row_of[moved] = row

    def search(self, query: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""
        size = len(self._row_of)
        if size == 0 or count <= 0:
            return []
        # Not `@`: its threads wait for each other, and for the encoder's, on a busy machine; this is as fast alone.
        scores = np.vecdot(self._vectors[:size], query)
        best = np.argpartition(scores, -count)[-count:] if size > count else np.arange(size)
        best = best[np.argsort(-scores[best], kind="stable")]
        return list(zip(self._numbers[best].tolist(), scores[best].tolist(), strict=True))

    def cosines(self, query: NDArray[np.float32], numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""
        # One look-up each: another thread may be taking rows out.
        rows = {number: row for number in numbers if (row := self._row_of.get(number)) is not None}
        if not rows:
            return {}
        scores = self._vectors[list(rows.values())] @ query
        return {number: float(score) for number, score in zip(rows, scores, strict=True)}

    @property
    def floor(self) -> float:
        """The cosine that the nearest row must reach to be related: beyond the reach of unrelated texts."""
        size = len(self._row_of)
        low = reach(self._unrelated, size)
        return min(max(reach(self._own, size), low), low + _LIFT)

    def calibrate(self) -> None:
        """Measure the scope's own pairs, each time the scope has doubled: most of them are unrelated."""
        size = len(self._row_of)
        if size < 8 or size < 2 * self._calibrated_at:  # noqa: PLR2004
            return
        self._calibrated_at = size
        rows = np.random.default_rng(0).permutation(size)[:_SAMPLE]
        self._own = spread_of(self._vectors[rows])
