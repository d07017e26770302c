"""Spherical k-means in two levels (Dhillon and Modha 2001): the centroids of an inverted file's lists.

Some thousand centroids are trained as a few groups of groups, which takes the square root of the comparisons, and then
refined across the borders of the groups. `Assigner` finds a row's list by the same shortcut.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors.pca import Projections, Rest
from optillm_memory.recall.vectors.quantization import Vectors

TRAINED_ON = 1_048_576  # rows that centroids are trained on, at most
_PER_ROOT, _ROWS_A_LIST = 16, 48  # lists = 16 * sqrt(rows), or rows / 48 where that is more
_ROUNDS, _REFINING_ROUNDS = 6, 3
_GROUPS_PROBED = 32  # groups of centroids that a row is compared with
_ASSIGNED_BLOCK = 4_096  # rows assigned at once
_BLOCK = 256  # rows compared with some centroids at once: a few milliseconds of work
Rows = NDArray[np.int64]


def list_count(rows: int) -> int:
    """Return how many lists suit so many rows."""
    # To compare a query with so many centroids costs as much as to compare it with the rows of the lists probed.
    return max(1, min(rows, max(round(_PER_ROOT * math.sqrt(rows)), rows // _ROWS_A_LIST)))


def sample_of(rows: int, most: int) -> Rows:
    """Return up to `most` of so many row numbers in ascending order; the same ones each time."""
    return np.arange(rows) if rows <= most else np.sort(np.random.default_rng(0).permutation(rows)[:most])


def train(sample: Projections, count: int, rest: Rest) -> Vectors:
    """Return about `count` centroids."""
    random = np.random.default_rng(0)
    everyone = np.arange(len(sample.scale))
    heads = _lloyd(sample, everyone, round(math.sqrt(count)), random, rest)
    labels = _assign(sample, everyone, heads, rest)
    centroids = []
    for group in range(len(heads)):
        members = np.flatnonzero(labels == group)
        if len(members):
            share = max(1, round(count * len(members) / len(everyone)))
            centroids.append(_lloyd(sample, members, share, random, rest))
    return _refined(sample, np.concatenate(centroids), random, rest)


def _lloyd(sample: Projections, members: Rows, count: int, random: np.random.Generator, rest: Rest) -> Vectors:
    """Return up to `count` centroids of some rows, by Lloyd's algorithm."""
    centroids = _unit(sample.vectors(members[random.permutation(len(members))[:count]]))
    if len(members) <= count:
        return centroids
    for _ in range(_ROUNDS):
        _update(centroids, sample, members, _assign(sample, members, centroids, rest), random, rest)
    return centroids


def _refined(sample: Projections, centroids: Vectors, random: np.random.Generator, rest: Rest) -> Vectors:
    """Let rows move to centroids of other groups for a few rounds."""
    everyone = np.arange(len(sample.scale))
    for _ in range(_REFINING_ROUNDS):
        assigner = Assigner(centroids, rest)
        blocks = range(0, len(everyone), _ASSIGNED_BLOCK)
        labels = [assigner.nearest(sample.vectors(slice(start, start + _ASSIGNED_BLOCK))) for start in blocks]
        _update(centroids, sample, everyone, np.concatenate(labels), random, rest)
    return centroids


def _update(
    centroids: Vectors, sample: Projections, members: Rows, labels: NDArray[np.int32], random: np.random.Generator,
    rest: Rest,
) -> None:  # fmt: skip
    """Move each centroid to the mean of the members assigned to it."""
    order = np.argsort(labels, kind="stable")
    sums = np.zeros_like(centroids)
    for start in range(0, len(order), _ASSIGNED_BLOCK):
        some = order[start : start + _ASSIGNED_BLOCK]
        assigned = labels[some]
        first = np.flatnonzero(np.diff(assigned, prepend=-1))  # where the members of the next centroid begin
        sums[assigned[first]] += np.add.reduceat(sample.vectors(members[some]), first, axis=0)
        rest()
    empty = np.flatnonzero(np.bincount(labels, minlength=len(centroids)) == 0)
    # A centroid without members starts again at a random row.
    sums[empty] = sample.vectors(members[random.integers(len(members), size=len(empty))])
    centroids[:] = _unit(sums)


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-9)))


def _assign(sample: Projections, members: Rows, centroids: Vectors, rest: Rest) -> NDArray[np.int32]:
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
        sample = Projections.of(centroids)
        everyone = np.arange(len(centroids))
        random = np.random.default_rng(0)
        self._heads = _lloyd(sample, everyone, round(math.sqrt(len(everyone))), random, rest)
        group_of = _assign(sample, everyone, self._heads, rest)
        self._members = [np.flatnonzero(group_of == group).astype(np.int32) for group in range(len(self._heads))]
        self._centroids = [centroids[members] for members in self._members]

    def nearest(self, vectors: Vectors) -> NDArray[np.int32]:
        """Return the number of the centroid that each vector is assigned to."""
        near = vectors @ self._heads.T
        probed = min(_GROUPS_PROBED, len(self._heads))
        chosen = np.zeros(near.shape, dtype=np.bool_)
        np.put_along_axis(chosen, np.argpartition(-near, probed - 1, axis=1)[:, :probed], values=True, axis=1)
        best = np.full(len(vectors), -np.inf, dtype=np.float32)
        labels = np.zeros(len(vectors), dtype=np.int32)
        for group, (members, centroids) in enumerate(zip(self._members, self._centroids, strict=True)):
            rows = np.flatnonzero(chosen[:, group])
            if len(rows) == 0 or len(members) == 0:
                continue
            cosines = vectors[rows] @ centroids.T
            nearest = cosines.argmax(axis=1)
            found = cosines[np.arange(len(rows)), nearest]
            better = found > best[rows]
            best[rows[better]], labels[rows[better]] = found[better], members[nearest[better]]
            self._rest()
        return labels
