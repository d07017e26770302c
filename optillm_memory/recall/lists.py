"""What an inverted file is laid out by: centroids by k-means in two levels, who is nearest to which, directions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.codes import Bytes, Codes, Vectors, encode

_PER_ROOT, _ROWS = 16, 32  # lists = 16 * sqrt(rows), or one for 32 rows where that is more
_TRAINED_ON, _SAMPLE = 16, 262_144  # rows of each list that it is made from; of all at most
_ROUNDS, _REFINED = 6, 3
_GROUPS_SEEN = 8  # groups of centroids that are compared with a row
_ASSIGNED = 4_096  # rows whose centroids are looked for at once
_BLOCK = 256  # rows compared with some centroids at once: a few milliseconds of work
_MEASURED, _WITHIN = 4_096, 0.9999  # rows, and the share of their parts that fit into a byte
Rest = Callable[[], None]
Numbers = NDArray[np.int64]


def count_for(rows: int) -> int:
    """Return how many lists suit so many rows."""
    # Looking at so many centroids costs as much as looking at the rows in the lists that are near.
    return max(1, min(rows, max(round(_PER_ROOT * math.sqrt(rows)), rows // _ROWS)))


def sampled(rows: int) -> Numbers:
    """Return which of so many rows the lists are made from, in no order; the same each time."""
    return np.random.default_rng(0).permutation(rows)[: min(_TRAINED_ON * count_for(rows), _SAMPLE)]


def made(sample: Codes, count: int, rest: Rest) -> Vectors:
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


def _means(sample: Codes, members: Numbers, count: int, random: np.random.Generator, rest: Rest) -> Vectors:
    """Return up to so many unit vectors that lie in the middle of the members around them."""
    centroids = sample.vectors(members[random.permutation(len(members))[:count]])
    if len(members) <= count:
        return centroids
    for _ in range(_ROUNDS):
        _move(centroids, sample, members, _nearest(sample, members, centroids, rest), random, rest)
    return centroids


def _refined(sample: Codes, centroids: Vectors, random: np.random.Generator, rest: Rest) -> Vectors:
    """Let centroids settle across the borders of the groups that they were made in."""
    everyone = np.arange(len(sample.scale))
    for _ in range(_REFINED):
        assigner = Assigner(encode(centroids), rest)
        blocks = range(0, len(everyone), _ASSIGNED)
        labels = [assigner.nearest(sample.vectors(slice(start, start + _ASSIGNED))) for start in blocks]
        _move(centroids, sample, everyone, np.concatenate(labels), random, rest)
    return centroids


def _move(
    centroids: Vectors, sample: Codes, members: Numbers, labels: NDArray[np.int32], random: np.random.Generator,
    rest: Rest,
) -> None:  # fmt: skip
    """Put each centroid into the middle of the members that are nearest to it."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(len(centroids) + 1))
    for number in range(len(centroids)):
        around = order[edges[number] : edges[number + 1]]
        if len(around) == 0:  # a centroid that nothing is near to starts again somewhere else
            around = random.integers(len(members), size=1)
        middle = sample.vectors(members[around]).sum(axis=0)
        centroids[number] = middle / max(float(np.linalg.norm(middle)), 1e-9)
        rest()


def _nearest(sample: Codes, members: Numbers, centroids: Vectors, rest: Rest) -> NDArray[np.int32]:
    labels = np.empty(len(members), dtype=np.int32)
    for start in range(0, len(members), _BLOCK):
        block = sample.vectors(members[start : start + _BLOCK])
        labels[start : start + _BLOCK] = (block @ centroids.T).argmax(axis=1)
        rest()
    return labels


class Assigner:
    """Finds the centroid nearest to a row among those of the nearest groups: nearly always the nearest of all."""

    def __init__(self, centroids: Codes, rest: Rest) -> None:
        """Put the centroids into groups."""
        self._rest = rest
        everyone = np.arange(len(centroids.scale))
        random = np.random.default_rng(0)
        self._heads = _means(centroids, everyone, round(math.sqrt(len(everyone))), random, rest)
        group_of = _nearest(centroids, everyone, self._heads, rest)
        self._members = [np.flatnonzero(group_of == group).astype(np.int32) for group in range(len(self._heads))]
        self._centroids = [centroids.vectors(members) for members in self._members]

    def nearest(self, vectors: Vectors) -> NDArray[np.int32]:
        """Return the number of the centroid that each vector belongs to."""
        near = vectors @ self._heads.T
        seen = min(_GROUPS_SEEN, len(self._heads))
        chosen = np.argpartition(-near, seen - 1, axis=1)[:, :seen]
        best = np.full(len(vectors), -np.inf, dtype=np.float32)
        labels = np.zeros(len(vectors), dtype=np.int32)
        for group, (members, centroids) in enumerate(zip(self._members, self._centroids, strict=True)):
            rows = np.flatnonzero((chosen == group).any(axis=1))
            if len(rows) == 0 or len(members) == 0:
                continue
            cosines = vectors[rows] @ centroids.T
            at = cosines.argmax(axis=1)
            found = cosines[np.arange(len(rows)), at]
            better = found > best[rows]
            best[rows[better]], labels[rows[better]] = found[better], members[at[better]]
            self._rest()
        return labels
