"""Vectors as 16-bit fixed point in two planes: the high bytes are searched, both together say the exact cosine."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Bytes = NDArray[np.int8]
_STEPS = 127 * 256  # of the largest component: the high byte stays within one byte when it is rounded
_ABREAST, _SHORT = 4, 96  # rows taken together where they have so many numbers at most
_PLAIN_BLOCK = 2_048  # where numpy has to turn bytes into floats first


class Codes(NamedTuple):
    """Rows of unit vectors: `(256 * high + low) * scale`. Cosines of these are right to five digits."""

    high: Bytes
    low: Bytes
    scale: NDArray[np.float32]

    def take(self, rows: Any) -> Codes:
        """Return some rows (an array or a list of them) as codes of their own."""
        return Codes(self.high[rows], self.low[rows], self.scale[rows])

    def vectors(self, rows: Any) -> Vectors:
        """Return the vectors of some rows (a slice or an array of them)."""
        whole: Vectors = np.multiply(self.high[rows], np.float32(256), dtype=np.float32)
        whole += self.low[rows]
        whole *= self.scale[rows][:, None]
        return whole

    def cosines(self, rows: NDArray[np.int64], query: Vectors) -> NDArray[np.float32]:
        """Return the exact cosines of some rows."""
        return np.asarray(np.vecdot(self.vectors(rows), query), dtype=np.float32)

    def equals(self, row: int, other: Codes, at: int) -> bool:
        """Whether a row is the same vector as a row of other codes."""
        return bool(
            self.scale[row] == other.scale[at]
            and np.array_equal(self.high[row], other.high[at])
            and np.array_equal(self.low[row], other.low[at])
        )


def encode(vectors: Vectors) -> Codes:
    """Return vectors in fixed point, each with a scale of its own; a zero vector stays zero."""
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    scale = np.maximum(largest / _STEPS, np.float32(1e-12)).astype(np.float32)
    whole = np.rint(vectors * (1 / scale)[:, None]).astype("<i2")
    low, rounded = whole.view(np.int8)[:, ::2], (whole + np.int16(128)).view(np.int8)[:, 1::2]
    return Codes(np.ascontiguousarray(rounded), np.ascontiguousarray(low), scale)


def empty(rows: int, dimension: int) -> Codes:
    """Return room for so many rows."""
    planes = [np.zeros((rows, dimension), dtype=np.int8) for _ in range(2)]
    return Codes(planes[0], planes[1], np.zeros(rows, dtype=np.float32))


def scores(high: Bytes, scale: NDArray[np.float32], query: Bytes) -> NDArray[np.float32]:
    """Return what orders rows nearly as their cosines do: the products of high bytes, each times its row's scale."""
    return np.asarray(products(high, query) * scale, dtype=np.float32)


def products(rows: Bytes, query: Bytes) -> NDArray[Any]:
    """Return the product of each row with a query, exactly."""
    if (kernels := _kernels()) is not None and len(rows):
        return _multiplied(kernels, rows, query)
    wide = query.astype(np.float32)
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _PLAIN_BLOCK):
        found[start : start + _PLAIN_BLOCK] = rows[start : start + _PLAIN_BLOCK].astype(np.float32) @ wide
    return found


def table(rows: Bytes, queries: Bytes) -> NDArray[Any]:
    """Return for each query its product with each row; all are reckoned at once, for the rows are what takes time."""
    if (kernels := _kernels()) is None or not len(rows):
        return np.stack([products(rows, query) for query in queries])
    return np.ascontiguousarray(np.asarray(kernels.dots_packed(rows, kernels.dots_pack(queries, "int8"))).T)


def _multiplied(kernels: Any, rows: Bytes, query: Bytes) -> NDArray[Any]:
    dimension, whole = len(query), len(rows) - len(rows) % _ABREAST
    if dimension > _SHORT or not whole or not rows.flags.c_contiguous:
        return np.asarray(kernels.dots_packed(rows, kernels.dots_pack(query[None], "int8")))[:, 0]
    # Short rows take longer to come to than to multiply: several are one row, and the query stands at each one's place.
    places = np.kron(np.eye(_ABREAST, dtype=np.int8), query)
    together = rows[:whole].reshape(-1, _ABREAST * dimension)
    found = np.asarray(kernels.dots_packed(together, kernels.dots_pack(places, "int8"))).reshape(-1)
    return np.concatenate([found, _multiplied(kernels, rows[whole:], query)]) if whole < len(rows) else found


@cache
def _kernels() -> Any:
    """Return numkong, or None where it has no wheel or does not reckon right on this machine."""
    try:
        kernels = importlib.import_module("numkong")
    except ImportError:
        logger.warning("agent_memory: numkong is not installed: recall among many memories takes longer")
        return None
    rows = np.arange(-120, 120, dtype=np.int8).reshape(3, 80)
    found = np.asarray(kernels.dots_packed(rows, kernels.dots_pack(rows[:1], "int8")))
    if not np.array_equal(found[:, 0], rows.astype(np.int64) @ rows[0].astype(np.int64)):
        logger.warning("agent_memory: numkong reckons wrong here and is not used")
        return None
    return kernels
