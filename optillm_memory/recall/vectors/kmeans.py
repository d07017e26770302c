"""What an inverted file is laid out by: directions, centroids by k-means in two levels, who is nearest to which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors.quantization import Bytes, Codes, Vectors, encode

_PER_ROOT, _ROWS = 16, 48  # lists = 16 * sqrt(rows), or one for 48 rows where that is more
_TRAINED_ON, _MEASURED_ON = 1_048_576, 65_536  # rows that lists are made from, and directions, at most
_ROUNDS, _REFINED = 6, 3
_GROUPS_SEEN = 32  # groups of centroids that are compared with a row
_ASSIGNED = 4_096  # rows whose centroids are looked for at once
_BLOCK = 256  # rows compared with some centroids at once: a few milliseconds of work
_MEASURED, _WITHIN = 4_096, 0.9999  # rows, and the share of their parts that fit into a byte
Rest = Callable[[], None]
Numbers = NDArray[np.int64]


class Parts(NamedTuple):
    """Rows as they lie along some directions, to one byte for each: near enough to sort them into lists."""

    high: Bytes
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: Vectors) -> Parts:
        """Return rows to one byte for each of their parts."""
        found = encode(vectors)
        return cls(found.high, found.scale)

    def vectors(self, rows: slice | Numbers) -> Vectors:
        """Return some rows."""
        return np.asarray(self.high[rows] * (256 * self.scale[rows])[:, None], dtype=np.float32)


def count_for(rows: int) -> int:
    """Return how many lists suit so many rows."""
    # Looking at so many centroids costs as much as looking at the rows in the lists that are near.
    return max(1, min(rows, max(round(_PER_ROOT * math.sqrt(rows)), rows // _ROWS)))


def sampled(rows: int, most: int = _TRAINED_ON) -> Numbers:
    """Return which of so many rows the lists are made from, in their order; the same each time."""
    return np.arange(rows) if rows <= most else np.sort(np.random.default_rng(0).permutation(rows)[:most])


def measured(rows: int) -> Numbers:
    """Return which of so many rows the directions are made from."""
    return sampled(rows, _MEASURED_ON)


def made(sample: Parts, count: int, rest: Rest) -> Vectors:
    """Return about so many centroids: spherical k-means into a few groups, and in each group into its share."""
    random = np.random.default_rng(0)
    everyone = np.arange(len(sample.scale))
    heads = _means(sample, everyone, round(math.sqrt(count)), random, rest)
    labels = _nearest(sample, everyone, heads, rest)
    parts = []
    for group in range(len(heads)):
        members = np.flatnonzero(labels == group)
        if len(members):
            share = max(1, round(count * len(members) / len(everyone)))
            parts.append(_means(sample, members, share, random, rest))
    return _refined(sample, np.concatenate(parts), random, rest)


def directions(sample: Codes, count: int, measured: int, rest: Rest) -> Vectors:
    """Return the directions in which the rows differ most, one a column: the leading principal components.

    They are so long that a row's parts along the first `measured` fit into a byte, but for a few that are cut off.
    """
    dimension = sample.high.shape[1]
    moments = np.zeros((dimension, dimension), dtype=np.float64)
    for start in range(0, len(sample.scale), _BLOCK):
        block = sample.vectors(slice(start, start + _BLOCK))
        moments += block.T @ block
        rest()
    _, found = np.linalg.eigh(moments)  # in the order of their weight, the least first
    leading = np.asarray(found[:, ::-1][:, :count], dtype=np.float32)
    parts = np.abs(sample.vectors(slice(_MEASURED)) @ leading[:, :measured])
    return np.asarray(leading * np.float32(127 / max(float(np.quantile(parts, _WITHIN)), 1e-9)))


def leading(rows: Codes, towards: Vectors) -> Bytes:
    """Return the parts of rows along directions."""
    if not towards.shape[1]:
        return np.zeros((len(rows.scale), 0), dtype=np.int8)
    return np.asarray(np.clip(np.rint(rows.vectors(slice(None)) @ towards), -127, 127), dtype=np.int8)


def _means(sample: Parts, members: Numbers, count: int, random: np.random.Generator, rest: Rest) -> Vectors:
    """Return up to so many unit vectors that lie in the middle of the members around them."""
    centroids = _unit(sample.vectors(members[random.permutation(len(members))[:count]]))
    if len(members) <= count:
        return centroids
    for _ in range(_ROUNDS):
        _move(centroids, sample, members, _nearest(sample, members, centroids, rest), random, rest)
    return centroids


def _refined(sample: Parts, centroids: Vectors, random: np.random.Generator, rest: Rest) -> Vectors:
    """Let centroids settle across the borders of the groups that they were made in."""
    everyone = np.arange(len(sample.scale))
    for _ in range(_REFINED):
        assigner = Assigner(centroids, rest)
        blocks = range(0, len(everyone), _ASSIGNED)
        labels = [assigner.nearest(sample.vectors(slice(start, start + _ASSIGNED))) for start in blocks]
        _move(centroids, sample, everyone, np.concatenate(labels), random, rest)
    return centroids


def _move(
    centroids: Vectors, sample: Parts, members: Numbers, labels: NDArray[np.int32], random: np.random.Generator,
    rest: Rest,
) -> None:  # fmt: skip
    """Put each centroid into the middle of the members that are nearest to it."""
    order = np.argsort(labels, kind="stable")
    sums = np.zeros_like(centroids)
    for start in range(0, len(order), _ASSIGNED):
        some = order[start : start + _ASSIGNED]
        whose = labels[some]
        first = np.flatnonzero(np.diff(whose, prepend=-1))  # where the next one's members begin
        sums[whose[first]] += np.add.reduceat(sample.vectors(members[some]), first, axis=0)
        rest()
    lonely = np.flatnonzero(np.bincount(labels, minlength=len(centroids)) == 0)
    # A centroid that nothing is near to starts again somewhere else.
    sums[lonely] = sample.vectors(members[random.integers(len(members), size=len(lonely))])
    centroids[:] = _unit(sums)


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-9)))


def _nearest(sample: Parts, members: Numbers, centroids: Vectors, rest: Rest) -> NDArray[np.int32]:
    labels = np.empty(len(members), dtype=np.int32)
    for start in range(0, len(members), _BLOCK):
        block = sample.vectors(members[start : start + _BLOCK])
        labels[start : start + _BLOCK] = (block @ centroids.T).argmax(axis=1)
        rest()
    return labels


class Assigner:
    """Finds the centroid nearest to a row among those of the nearest groups: nearly always the nearest of all."""

    def __init__(self, centroids: Vectors, rest: Rest) -> None:
        """Put the centroids into groups."""
        self._rest = rest
        sample = Parts.of(centroids)
        everyone = np.arange(len(centroids))
        random = np.random.default_rng(0)
        self._heads = _means(sample, everyone, round(math.sqrt(len(everyone))), random, rest)
        group_of = _nearest(sample, everyone, self._heads, rest)
        self._members = [np.flatnonzero(group_of == group).astype(np.int32) for group in range(len(self._heads))]
        self._centroids = [centroids[members] for members in self._members]

    def nearest(self, vectors: Vectors) -> NDArray[np.int32]:
        """Return the number of the centroid that each vector belongs to."""
        near = vectors @ self._heads.T
        seen = min(_GROUPS_SEEN, len(self._heads))
        chosen = np.zeros(near.shape, dtype=np.bool_)
        np.put_along_axis(chosen, np.argpartition(-near, seen - 1, axis=1)[:, :seen], values=True, axis=1)
        best = np.full(len(vectors), -np.inf, dtype=np.float32)
        labels = np.zeros(len(vectors), dtype=np.int32)
        for group, (members, centroids) in enumerate(zip(self._members, self._centroids, strict=True)):
            rows = np.flatnonzero(chosen[:, group])
            if len(rows) == 0 or len(members) == 0:
                continue
            cosines = vectors[rows] @ centroids.T
            at = cosines.argmax(axis=1)
            found = cosines[np.arange(len(rows)), at]
            better = found > best[rows]
            best[rows[better]], labels[rows[better]] = found[better], members[at[better]]
            self._rest()
        return labels
