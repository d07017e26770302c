"""Online clustering of tasks: the reward of an arm depends on the kind of task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOWHERE = -1  # the cluster of a request without a vector
LIMIT = 64  # clusters at most
_GROWTH = 2.0  # clusters at most, divided by the root of the number of requests
_WIDTH = 0.06  # the cosine by which a cluster is farther than the nearest when it has 1/e of its weight
_SAME = 0.999  # the cosine from which a request repeats another and starts no cluster


class Clusters:
    """Sequential k-means (MacQueen 1967) on unit vectors, where an unusual request starts a cluster.

    A fold over the requests' vectors in their order; rewards have no influence.
    """

    def __init__(self) -> None:
        """Start with no cluster."""
        self._requests = 0
        self._nearness = 0.0
        self._sums: NDArray[np.float64] | None = None
        self._units: NDArray[np.float64] | None = None
        self.count = 0

    def nearness(self, vector: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the cosine to each cluster."""
        if self._units is None:
            return np.zeros(0)
        return np.asarray(self._units[: self.count] @ vector, dtype=np.float64)

    def assign(self, nearness: NDArray[np.float64]) -> int:
        """Return the cluster for these cosines; it is `count` where the request starts a new one."""
        if self.count == 0:
            return 0
        nearest = int(nearness.argmax())
        room = self.count < min(LIMIT, max(1, int(_GROWTH * self._requests**0.5)))
        unusual = nearness[nearest] <= min(_SAME, self._nearness / self._requests)
        return self.count if room and unusual else nearest

    def add(self, vector: NDArray[np.float32]) -> int:
        """Add the next request; return its cluster."""
        if self._sums is None or self._units is None:
            self._sums = np.zeros((LIMIT, len(vector)))
            self._units = np.zeros((LIMIT, len(vector)))
        nearness = self.nearness(vector)
        cluster = self.assign(nearness)
        self._requests += 1
        if cluster < self.count:
            self._nearness += float(nearness[cluster])
        self.count = max(self.count, cluster + 1)
        self._sums[cluster] += vector
        self._units[cluster] = self._sums[cluster] / max(1e-12, float(np.linalg.norm(self._sums[cluster])))
        return cluster

    def centre(self, cluster: int) -> NDArray[np.float32]:
        """Return a cluster's centroid, at unit length."""
        assert self._units is not None
        return np.asarray(self._units[cluster], dtype=np.float32)


def weights(nearness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much the evidence of each cluster counts for a request: 1 for the nearest, little for far ones."""
    return np.asarray(np.exp((nearness - nearness.max(initial=-1.0)) / _WIDTH), dtype=np.float64)
