"""Flat search: a query is compared with every row in memory. Also what all searches share: queries and the top k.

A search narrows down in steps, each of them slower and more exact than the one before: the products of PCA prefixes
(of many rows, where components are known), of high bytes, and the cosines of both planes of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors import pca, quantization
from optillm_memory.recall.vectors.pca import PcaPrefix
from optillm_memory.recall.vectors.quantization import Bytes, Codes, Vectors, encode_query

EXCLUDED = -math.inf  # the score of a row that must not be found
CANDIDATES_PER_NEIGHBOUR = 20  # so many times the neighbours asked for are looked at in full in any case
# So many times the neighbours asked for get exact cosines: high bytes order rows nearly right, not quite.
_RERANKED, _RERANKED_LEAST = 2, 100
_SAMPLED, _GENEROUS = 64, 1.3  # of the top k, in a sample that estimates the k-th score; and how much lower to begin
_PREFIXED_FROM = 8_192  # rows from which on prefixes are compared first


class Neighbours(NamedTuple):
    """Rows that were found: their memories' numbers and cosines, best first."""

    numbers: NDArray[np.int64]
    cosines: NDArray[np.float32]


NONE = Neighbours(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


def top_k(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the positions of the `count` highest scores, in no order, without partitioning all of them."""
    step = count // _SAMPLED
    if step > 1:
        sample = scores[::step]
        most = min(len(sample), math.ceil(_GENEROUS * len(sample) * count / len(scores)))
        found = np.flatnonzero(scores >= np.partition(sample, -most)[-most])
        if len(found) >= count:
            return np.asarray(found[np.argpartition(scores[found], -count)[-count:]])
    return np.asarray(np.argpartition(scores, -count)[-count:])


class Query(NamedTuple):
    """A vector, the same in bytes, and how many neighbours are asked for."""

    vector: Vectors
    high: Bytes
    k: int

    @classmethod
    def of(cls, vector: Vectors, k: int) -> Query:
        """Return a query ready to be compared."""
        return cls(vector, encode_query(vector), k)

    def candidates(self, least: int) -> int:
        """Return how many rows to look at in full: what rows were found to need, and enough for this query."""
        return max(least, CANDIDATES_PER_NEIGHBOUR * self.k)

    def shortlist(self, approximate: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the rows that need exact cosines, by their approximate scores."""
        reranked = max(_RERANKED * self.k, _RERANKED_LEAST)
        rows = top_k(approximate, reranked) if len(approximate) > reranked else np.arange(len(approximate))
        return rows[approximate[rows] > EXCLUDED]

    def nearest(self, codes: Codes, numbers: NDArray[np.int64], rows: NDArray[np.int64]) -> Neighbours:
        """Return the nearest of some rows by their exact cosines."""
        exact = codes.cosines(rows, self.vector)
        order = np.argsort(-exact, kind="stable")[: self.k]
        return Neighbours(numbers[rows[order]], exact[order])


def merge(found: Iterable[Neighbours], count: int) -> Neighbours:
    """Return the nearest of several searches' neighbours."""
    parts = list(found)
    numbers, cosines = np.concatenate([p.numbers for p in parts]), np.concatenate([p.cosines for p in parts])
    order = np.argsort(-cosines, kind="stable")[:count]
    return Neighbours(numbers[order], cosines[order])


class _Rows(NamedTuple):
    """What a search reads: `used` rows of arrays that only grow; a row that is not live is passed over."""

    codes: Codes
    prefixes: Bytes
    numbers: NDArray[np.int64]
    revisions: NDArray[np.int64]
    live: NDArray[np.bool_]
    row_of: dict[int, int]
    used: int

    @classmethod
    def allocate(cls, size: int, dimension: int, prefix: int) -> _Rows:
        numbers, revisions = (np.zeros(size, dtype=np.int64) for _ in range(2))
        prefixes, live = np.zeros((size, prefix), dtype=np.int8), np.zeros(size, dtype=np.bool_)
        return cls(quantization.allocate(size, dimension), prefixes, numbers, revisions, live, {}, 0)


class FlatIndex:
    """Rows in memory by their memories' numbers. Its owner holds a lock while it changes; a search needs none.

    Rows are only added; one that is replaced or removed is marked, and dropped when the arrays are allocated anew.
    """

    def __init__(self, dimension: int, prefix: PcaPrefix | None = None) -> None:
        """Start empty; `prefix` is known where an inverted file of the scope is there."""
        self._prefix = prefix or PcaPrefix(np.zeros((dimension, 0), dtype=np.float32), 0)
        self._rows = _Rows.allocate(64, dimension, self._prefix.components.shape[1])

    def __len__(self) -> int:
        return len(self._rows.row_of)

    def add(self, numbers: Sequence[int], revisions: Sequence[int], codes: Codes) -> None:
        """Add or replace rows; no number twice."""
        self._make_room(len(numbers))
        rows, start = self._rows, self._rows.used
        end = start + len(numbers)
        rows.codes.high[start:end], rows.codes.low[start:end], rows.codes.scale[start:end] = codes
        rows.prefixes[start:end] = pca.prefixes(codes, self._prefix.components)
        rows.numbers[start:end], rows.revisions[start:end] = numbers, revisions
        rows.live[start:end] = True
        for row, number in enumerate(numbers, start):
            if (before := rows.row_of.get(number)) is not None:
                rows.live[before] = False
            rows.row_of[number] = row
        self._rows = rows._replace(used=end)

    def remove(self, number: int) -> None:
        """Remove a row, if there is one."""
        if (row := self._rows.row_of.pop(number, None)) is not None:
            self._rows.live[row] = False

    def search(self, query: Query) -> Neighbours:
        """Return the nearest rows, best first."""
        rows = self._rows
        if rows.used == 0 or query.k <= 0:
            return NONE
        high, scale, live = rows.codes.high[: rows.used], rows.codes.scale[: rows.used], rows.live[: rows.used]
        chosen: NDArray[np.int64] | None = None
        if rows.used > _PREFIXED_FROM and self._prefix.candidates:
            chosen = self._candidates(rows, query)
            high, scale, live = high.take(chosen, axis=0), scale[chosen], live[chosen]
        approximate = quantization.approximate_scores(high, scale, query.high)
        approximate[~live] = EXCLUDED
        found = query.shortlist(approximate)
        return query.nearest(rows.codes, rows.numbers, found if chosen is None else chosen[found])

    def _candidates(self, rows: _Rows, query: Query) -> NDArray[np.int64]:
        """Return the rows whose prefixes are nearest to the query's."""
        prefix = encode_query(query.vector @ self._prefix.components)
        products = quantization.dot_products(rows.prefixes[: rows.used], prefix)
        scores = np.where(rows.live[: rows.used], products, EXCLUDED)
        return top_k(scores, min(query.candidates(self._prefix.candidates), rows.used))

    def cosines(self, query: Vectors, numbers: Sequence[int]) -> dict[int, float]:
        """Return the exact cosine of each number that has a row."""
        rows = self._rows
        present = {number: row for number in numbers if (row := rows.row_of.get(number)) is not None}
        if not present:
            return {}
        exact = rows.codes.cosines(np.fromiter(present.values(), dtype=np.int64), query)
        return dict(zip(present, exact.tolist(), strict=True))

    def revision(self, number: int) -> int | None:
        """Return the revision that a number's row came with."""
        rows = self._rows
        row = rows.row_of.get(number)
        return None if row is None else int(rows.revisions[row])

    def live(self) -> tuple[NDArray[np.int64], Codes]:
        """Return copies of the numbers and codes of all rows."""
        rows = self._rows
        kept = np.flatnonzero(rows.live[: rows.used])
        return rows.numbers[kept], rows.codes.take(kept)

    def sample(self, count: int) -> Vectors:
        """Return the vectors of up to `count` rows, chosen by a fixed seed."""
        kept = np.flatnonzero(self._rows.live[: self._rows.used])
        return self._rows.codes.vectors(np.random.default_rng(0).permutation(kept)[:count])

    def _make_room(self, more: int) -> None:
        rows, needed = self._rows, self._rows.used + more
        if needed <= len(rows.numbers):
            return
        kept = np.flatnonzero(rows.live[: rows.used])
        fresh = _Rows.allocate(max(64, 2 * (len(kept) + more)), *self._prefix.components.shape)
        arrays: list[tuple[Any, Any]] = list(zip(fresh.codes, rows.codes, strict=True))
        for array, values in (*arrays, *zip(fresh[1:5], rows[1:5], strict=True)):
            array[: len(kept)] = values[kept]
        row_of = {number: row for row, number in enumerate(rows.numbers[kept].tolist())}
        self._rows = fresh._replace(row_of=row_of, used=len(kept))
