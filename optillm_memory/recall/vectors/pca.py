"""Principal components: the directions in which vectors differ most, so that a few of them tell rows apart.

The first 48 components of a row (its prefix) decide whether the row is looked at in full, the first 128 which list it
belongs to. Sentence vectors of 384 numbers spread over far fewer directions, so little is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors.quantization import Bytes, Codes, Vectors, encode

PREFIX, COMPONENTS = 48, 128  # components that rows, and lists, are first compared by
TRAINED_ON = 65_536  # rows that components are computed from, at most
_BLOCK = 256  # rows taken at once: a few milliseconds of work
_SCALED_ON, _WITHIN = 4_096, 0.9999  # rows, and the share of their prefixes' numbers that must fit into a byte
Rest = Callable[[], None]  # called between pieces of work, to let other threads have the processor


class PcaPrefix(NamedTuple):
    """How rows of a scope are looked at first."""

    components: Vectors  # one a column
    candidates: int  # how many rows, the nearest by their prefixes, are then looked at in full; 0 for all


class Projections(NamedTuple):
    """Rows along some components, in one byte a number: near enough to sort them into lists."""

    high: Bytes
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: Vectors) -> Projections:
        """Quantize rows that are given along the components."""
        codes = encode(vectors)
        return cls(codes.high, codes.scale)

    def vectors(self, rows: slice | NDArray[np.int64]) -> Vectors:
        """Return some rows."""
        return np.asarray(self.high[rows] * (256 * self.scale[rows])[:, None], dtype=np.float32)


def train(sample: Codes, count: int, rest: Rest) -> Vectors:
    """Return the first `count` principal components, one a column.

    They are scaled so that the numbers of a prefix, rounded, fit into a byte but for a few, which are cut off.
    """
    dimension = sample.high.shape[1]
    moments = np.zeros((dimension, dimension), dtype=np.float64)
    for start in range(0, len(sample.scale), _BLOCK):
        block = sample.vectors(slice(start, start + _BLOCK))
        moments += block.T @ block
        rest()
    _, found = np.linalg.eigh(moments)  # in ascending order of variance
    components = np.asarray(found[:, ::-1][:, :count], dtype=np.float32)
    prefixes = np.abs(sample.vectors(slice(_SCALED_ON)) @ components[:, :PREFIX])
    return np.asarray(components * np.float32(127 / max(float(np.quantile(prefixes, _WITHIN)), 1e-9)))


def prefixes(rows: Codes, components: Vectors) -> Bytes:
    """Return rows along some components, in one byte a number and without a scale."""
    if not components.shape[1]:
        return np.zeros((len(rows.scale), 0), dtype=np.int8)
    return np.asarray(np.clip(np.rint(rows.vectors(slice(None)) @ components), -127, 127), dtype=np.int8)
