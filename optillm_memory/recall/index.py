"""Exact vector search over one scope's memories, and the relevance floor calibrated on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# For all-MiniLM-L6-v2 and its like the nearest of 1,000 memories of other subjects stays below 0.45 for 98 %
# of requests; the upper end keeps a scope of one subject, where all pairs are alike, from shutting recall.
FLOOR_LOW, FLOOR_HIGH = 0.45, 0.55
_SAMPLE = 128
_SPREADS = 2.5


class VectorIndex:
    """Rows of unit vectors by memory number. Not thread-safe: its owner holds a lock while it changes.

    A search reads one consistent array even while rows are added, since arrays are replaced, never shrunk in place.
    """

    def __init__(self, dimension: int) -> None:
        """Start empty."""
        self._vectors: NDArray[np.float32] = np.zeros((64, dimension), dtype=np.float32)
        self._numbers: NDArray[np.int64] = np.zeros(64, dtype=np.int64)
        self._row_of: dict[int, int] = {}
        self._calibrated_at = 0
        self.floor = FLOOR_LOW

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
        scores = self._vectors[:size] @ query
        best = np.argpartition(scores, -count)[-count:] if size > count else np.arange(size)
        best = best[np.argsort(-scores[best], kind="stable")]
        return [(int(self._numbers[row]), float(scores[row])) for row in best]

    def cosines(self, query: NDArray[np.float32], numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""
        rows = {number: self._row_of[number] for number in numbers if number in self._row_of}
        if not rows:
            return {}
        scores = self._vectors[list(rows.values())] @ query
        return {number: float(score) for number, score in zip(rows, scores, strict=True)}

    def calibrate(self) -> None:
        """Set the floor from the scope's own pairs, each time the scope has doubled.

        Most pairs in a scope are unrelated; their median and median absolute deviation are blind to the few that
        are not. The floor is the median plus 2.5 spreads, within bounds.
        """
        size = len(self._row_of)
        if size < 8 or size < 2 * self._calibrated_at:  # noqa: PLR2004
            return
        self._calibrated_at = size
        rows = np.random.default_rng(0).permutation(size)[:_SAMPLE]
        sample = self._vectors[rows]
        pairs = (sample @ sample.T)[np.triu_indices(len(rows), 1)]
        middle = float(np.median(pairs))
        spread = 1.4826 * float(np.median(np.abs(pairs - middle)))
        self.floor = min(max(middle + _SPREADS * spread, FLOOR_LOW), FLOOR_HIGH)
