"""The lists of an inverted file: each row in the list of its nearest centroid, similar rows in few lists."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import Vectors, clustered, unit

from optillm_memory.recall.vectors import kmeans
from optillm_memory.recall.vectors.kmeans import Assigner
from optillm_memory.recall.vectors.pca import Projections


def rest() -> None:
    """Give way to nobody."""


def scattered(count: int, dimension: int) -> Vectors:
    """Return vectors without any structure."""
    return unit(np.random.default_rng(3).normal(size=(count, dimension)))


@pytest.mark.parametrize("make", [clustered, scattered])
def test_a_row_is_put_into_the_list_nearest_to_it(make: object) -> None:
    """Not all centroids are looked at, and yet the nearest is nearly always found; what is missed is near as well."""
    assert callable(make)
    centroids, vectors = make(6_400, 48), make(2_000, 48)
    found = Assigner(centroids, rest).nearest(vectors)
    cosines = vectors @ centroids.T
    assert np.mean(found == cosines.argmax(axis=1)) >= 0.95
    assert np.mean(cosines.max(axis=1) - cosines[np.arange(len(found)), found]) < 0.01


def test_rows_of_one_subject_lie_in_few_lists() -> None:
    """With about as many lists as subjects a row's nearest neighbours are in the few lists nearest to it."""
    vectors = clustered(6_000, 64)
    centroids = kmeans.train(Projections.of(vectors), 240, rest)
    labels = Assigner(centroids, rest).nearest(vectors)
    hits = 0
    for query in vectors[:100]:
        near = np.argsort(-(centroids @ query))[:12]
        hits += int(np.isin(labels[np.argsort(-(vectors @ query))[:10]], near).sum())
    assert hits >= 900
    assert np.bincount(labels, minlength=len(centroids)).max() < 600  # no list has swallowed the others


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 9), (50, 40), (64, 64)])
def test_there_may_be_hardly_more_rows_than_lists(rows: int, count: int) -> None:
    """Every row has a list, however few there are, also where all rows are the same."""
    for vectors in (clustered(rows, 16), np.repeat(clustered(1, 16), rows, axis=0)):
        centroids = kmeans.train(Projections.of(vectors), count, rest)
        assert 1 <= len(centroids) <= max(rows, count)
        labels = Assigner(centroids, rest).nearest(vectors)
        assert labels.min() >= 0
        assert labels.max() < len(centroids)
        assert np.isfinite(centroids).all()


def test_parts_are_near_to_what_they_are_made_of() -> None:
    """A byte for each part is enough to tell which list a row belongs to."""
    vectors = clustered(500, 48)
    kept = Projections.of(vectors)
    assert np.abs(kept.vectors(slice(None)) - vectors).max() < 0.005
    assert np.array_equal(kept.vectors(np.array([3, 7])), kept.vectors(slice(None))[[3, 7]])
    assert (unit(kept.vectors(slice(None))) * vectors).sum(axis=1).min() > 0.9999
