"""Scalar quantization: a vector as 16-bit integers with a scale of its own, stored in two planes of bytes.

The high bytes alone order rows nearly as their cosines do, and are what a search reads; high and low bytes together
give the exact cosine. Products of bytes are calculated by numkong where it is installed, else by numpy.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:  # here, and not at the first search: a child that is forked meanwhile would wait for that import for ever
    numkong: Any = importlib.import_module("numkong")
except ImportError:
    numkong = None

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Bytes = NDArray[np.int8]
_LARGEST = 127 * 256  # what a vector's largest component becomes: its high byte fits when it is rounded
_FOLDED, _SHORT = 4, 96  # rows that are multiplied as one, where a row has so few components
_NUMPY_BLOCK = 2_048  # rows that numpy converts to floats at once


class Codes(NamedTuple):
    """Quantized unit vectors: `(256 * high + low) * scale`. Their cosines are right to five digits."""

    high: Bytes
    low: Bytes
    scale: NDArray[np.float32]

    def take(self, rows: Any) -> Codes:
        """Return a copy of some rows (an array or a list of row numbers)."""
        return Codes(self.high[rows], self.low[rows], self.scale[rows])

    def vectors(self, rows: Any) -> Vectors:
        """Return the vectors of some rows (a slice or an array of row numbers)."""
        decoded: Vectors = np.multiply(self.high[rows], np.float32(256), dtype=np.float32)
        decoded += self.low[rows]
        decoded *= self.scale[rows][:, None]
        return decoded

    def cosines(self, rows: NDArray[np.int64], query: Vectors) -> NDArray[np.float32]:
        """Return the exact cosines of some rows."""
        return np.asarray(np.vecdot(self.vectors(rows), query), dtype=np.float32)

    def equals(self, row: int, other: Codes, other_row: int) -> bool:
        """Whether a row is the same vector as a row of other codes."""
        return bool(
            self.scale[row] == other.scale[other_row]
            and np.array_equal(self.high[row], other.high[other_row])
            and np.array_equal(self.low[row], other.low[other_row])
        )


def encode(vectors: Vectors) -> Codes:
    """Quantize vectors; a zero vector stays zero."""
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    scale = np.maximum(largest / _LARGEST, np.float32(1e-12)).astype(np.float32)
    whole = np.rint(vectors * (1 / scale)[:, None]).astype("<i2")
    low, rounded = whole.view(np.int8)[:, ::2], (whole + np.int16(128)).view(np.int8)[:, 1::2]
    return Codes(np.ascontiguousarray(rounded), np.ascontiguousarray(low), scale)


def encode_query(query: Vectors) -> Bytes:
    """Quantize one vector to the bytes that rows are compared with; its scale does not change their order."""
    largest = max(float(np.abs(query).max(initial=0.0)), 1e-12)
    return np.asarray(np.rint(query * np.float32(127 / largest)), dtype=np.int8)


def allocate(rows: int, dimension: int) -> Codes:
    """Return codes for so many rows, all zero."""
    planes = [np.zeros((rows, dimension), dtype=np.int8) for _ in range(2)]
    return Codes(planes[0], planes[1], np.zeros(rows, dtype=np.float32))


def approximate_scores(high: Bytes, scale: NDArray[np.float32], query: Bytes) -> NDArray[np.float32]:
    """Return scores that order rows nearly as their cosines do: the products of high bytes, times each row's scale."""
    return np.asarray(dot_products(high, query) * scale, dtype=np.float32)


def dot_products(rows: Bytes, query: Bytes) -> NDArray[Any]:
    """Return the product of each row with a query, exactly."""
    if (kernels := _kernels()) is not None and len(rows):
        return _with_kernels(kernels, rows, query)
    floats = query.astype(np.float32)
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _NUMPY_BLOCK):
        found[start : start + _NUMPY_BLOCK] = rows[start : start + _NUMPY_BLOCK].astype(np.float32) @ floats
    return found


def dot_products_of_many(rows: Bytes, queries: Bytes) -> NDArray[Any]:
    """Return for each query its product with each row: the rows are read once for all of them."""
    if (kernels := _kernels()) is None or not len(rows):
        return np.stack([dot_products(rows, query) for query in queries])
    return np.ascontiguousarray(np.asarray(kernels.dots_packed(rows, kernels.dots_pack(queries, "int8"))).T)


def _with_kernels(kernels: Any, rows: Bytes, query: Bytes) -> NDArray[Any]:
    dimension, whole = len(query), len(rows) - len(rows) % _FOLDED
    if dimension > _SHORT or not whole or not rows.flags.c_contiguous:
        # For a single query this is twice as fast as a packed product where there is AVX2 only, and never slower.
        return np.asarray(kernels.cdist(query[None], rows, metric="dot")).reshape(-1)
    # The kernel takes longer to begin a short row than to multiply it: several rows are read as one, and multiplied
    # with as many queries, each of which is the query at the place of one of the rows and zero elsewhere.
    placed = np.zeros((_FOLDED, _FOLDED, dimension), dtype=np.int8)
    placed[np.arange(_FOLDED), np.arange(_FOLDED)] = query
    folded = rows[:whole].reshape(-1, _FOLDED * dimension)
    packed = kernels.dots_pack(placed.reshape(_FOLDED, -1), "int8")
    found = np.asarray(kernels.dots_packed(folded, packed)).reshape(-1)
    return np.concatenate([found, _with_kernels(kernels, rows[whole:], query)]) if whole < len(rows) else found


@cache
def _kernels() -> Any:
    """Return numkong, or None where it has no wheel or does not calculate right on this machine."""
    if (kernels := numkong) is None:
        logger.warning("agent_memory: numkong is not installed: recall among many memories takes longer")
        return None
    rows = np.arange(-120, 120, dtype=np.int8).reshape(3, 80)
    exact = rows.astype(np.int64) @ rows.T.astype(np.int64)
    packed, single = kernels.dots_packed(rows, kernels.dots_pack(rows, "int8")), kernels.cdist(rows, rows, metric="dot")
    if not (np.array_equal(np.asarray(packed), exact) and np.array_equal(np.asarray(single), exact)):
        logger.warning("agent_memory: numkong calculates wrong results on this machine and is not used")
        return None
    return kernels
