"""The relevance floor: the cosine from which on two texts count as related, calibrated on pairs that are unrelated.

Most pairs of a scope's texts have nothing to do with each other, so the median and the spread of all pairs' cosines
describe unrelated texts; both are robust against the few pairs that are related (Hampel 1974: median absolute
deviation). Among more memories some unrelated one comes nearer by chance, so the floor is the expected maximum of that
many draws from a normal distribution, with a factor for its heavier tail.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# The cosines of unrelated short texts for all-MiniLM-L6-v2: (median, spread). An encoder brings its own.
UNRELATED = (0.06, 0.085)
SAMPLE = 128  # vectors that a scope's own pairs are measured on
# Cosines of unrelated texts have a heavier tail than a normal distribution; measured on five kinds of text.
_TAIL = 1.6
# In a scope of a single subject all pairs are alike: they may raise its floor by so much, or nothing would be recalled.
_MAX_RAISE = 0.05


def spread_of(vectors: NDArray[np.float32]) -> tuple[float, float]:
    """Return the median of all pairs' cosines and their spread (1.4826 times the median absolute deviation)."""
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    median = float(np.median(pairs))
    return median, 1.4826 * float(np.median(np.abs(pairs - median)))


def expected_maximum(unrelated: tuple[float, float], size: int) -> float:
    """Return how near the nearest of `size` unrelated texts comes."""
    median, spread = unrelated
    return median + _TAIL * spread * math.sqrt(2 * math.log(max(size, 2)))


def floor_of(unrelated: tuple[float, float], own: tuple[float, float], size: int) -> float:
    """Return the cosine that the nearest of `size` rows must reach to be related.

    `unrelated` is measured on unrelated texts in general, `own` on the pairs of the scope itself.
    """
    floor = expected_maximum(unrelated, size)
    return min(max(expected_maximum(own, size), floor), floor + _MAX_RAISE)
