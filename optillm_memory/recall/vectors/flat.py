"""Exact vector search over rows in memory, and the relevance floor calibrated on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors import kmeans as lists
from optillm_memory.recall.vectors import quantization as codes
from optillm_memory.recall.vectors.quantization import Bytes, Codes, Vectors

# How the cosines of unrelated short texts lie for all-MiniLM-L6-v2: (median, spread). An encoder brings its own.
UNRELATED = (0.06, 0.085)
# Cosines of unrelated texts have a heavier tail than a normal distribution; measured on five kinds of text.
_TAIL = 1.6
# A scope of one subject is alike in all its pairs: they may lift its floor by this much, not shut recall.
_LIFT = 0.05
SAMPLE = 128
# So many times the wanted rows are looked at exactly: the high bytes alone order rows nearly, not quite, right.
_WIDER, _AT_LEAST = 2, 100
_SAMPLED, _GENEROUS = 64, 1.3  # of the highest, in a sample that tells where they begin; and how much lower
OUT = -math.inf  # the score of a row that is not to be found
FULL_OF_WANTED = 20  # so many times the wanted rows are looked at in full in any case
_MANY = 8_192  # rows from which on they are looked at in a few directions first, where these are known


def spread_of(vectors: NDArray[np.float32]) -> tuple[float, float]:
    """Return the median of all pairs' cosines and their spread (1.4826 times the median absolute deviation).

    Both are blind to the few pairs that are alike in meaning.
    """
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    middle = float(np.median(pairs))
    return middle, 1.4826 * float(np.median(np.abs(pairs - middle)))


def reach(unrelated: tuple[float, float], size: int) -> float:
    """Return how near the nearest of `size` unrelated texts comes: the extreme value of so many normal draws."""
    middle, spread = unrelated
    return middle + _TAIL * spread * math.sqrt(2 * math.log(max(size, 2)))


def floor_of(unrelated: tuple[float, float], own: tuple[float, float], size: int) -> float:
    """Return the cosine that the nearest of `size` rows must reach to be related: beyond that of unrelated texts."""
    low = reach(unrelated, size)
    return min(max(reach(own, size), low), low + _LIFT)


class Near(NamedTuple):
    """Rows that were found: their numbers and cosines, best first."""

    numbers: NDArray[np.int64]
    cosines: NDArray[np.float32]


NOTHING = Near(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))


def highest(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the places of the `count` highest scores, in no order, without sorting all of them."""
    step = count // _SAMPLED
    if step > 1:
        sample = scores[::step]
        most = min(len(sample), math.ceil(_GENEROUS * len(sample) * count / len(scores)))
        found = np.flatnonzero(scores >= np.partition(sample, -most)[-most])
        if len(found) >= count:
            return np.asarray(found[np.argpartition(scores[found], -count)[-count:]])
    return np.asarray(np.argpartition(scores, -count)[-count:])


class Wanted(NamedTuple):
    """A query in both precisions, and how many rows it wants."""

    query: NDArray[np.float32]
    high: NDArray[np.int8]
    most: int

    @classmethod
    def of(cls, query: NDArray[np.float32], count: int) -> Wanted:
        """Return a query ready to be compared."""
        return cls(query, codes.encode(query[None]).high[0], count)

    def shortlist(self, rough: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the rows to look at exactly, given nearly right scores of all."""
        wider = max(_WIDER * self.most, _AT_LEAST)
        rows = highest(rough, wider) if len(rough) > wider else np.arange(len(rough))
        return rows[rough[rows] > OUT]

    def best(self, found: Codes, numbers: NDArray[np.int64], rows: NDArray[np.int64]) -> Near:
        """Return the best of some rows by their exact cosines."""
        exact = found.cosines(rows, self.query)
        order = np.argsort(-exact, kind="stable")[: self.most]
        return Near(numbers[rows[order]], exact[order])


def merged(found: Iterable[Near], count: int) -> Near:
    """Return the best of several findings."""
    parts = list(found)
    numbers, cosines = np.concatenate([p.numbers for p in parts]), np.concatenate([p.cosines for p in parts])
    order = np.argsort(-cosines, kind="stable")[:count]
    return Near(numbers[order], cosines[order])


class Leading(NamedTuple):
    """The directions in which the rows of a scope differ most, one a column, and how many rows to look at in full."""

    directions: Vectors
    full: int


class _Rows(NamedTuple):
    """What a search reads: `used` rows of arrays that only grow; a row that is not live is passed over."""

    codes: Codes
    lead: Bytes  # their parts along the leading directions
    numbers: NDArray[np.int64]
    revisions: NDArray[np.int64]
    live: NDArray[np.bool_]
    row_of: dict[int, int]
    used: int


def _room(size: int, dimension: int, lead: int) -> _Rows:
    return _Rows(
        codes.empty(size, dimension),
        np.zeros((size, lead), dtype=np.int8),
        np.zeros(size, dtype=np.int64),
        np.zeros(size, dtype=np.int64),
        np.zeros(size, dtype=np.bool_),
        {},
        0,
    )


class VectorIndex:
    """Rows of unit vectors by memory number. Its owner holds a lock while it changes; a search needs none.

    Rows are only added; one that is replaced or dropped is marked, and left out when the arrays are laid out anew.
    """

    def __init__(self, dimension: int, leading: Leading | None = None) -> None:
        """Start empty; `leading` is what is known of the scope's rows."""
        self._leading = leading or Leading(np.zeros((dimension, 0), dtype=np.float32), 0)
        self._rows = _room(64, dimension, self._leading.directions.shape[1])

    def __len__(self) -> int:
        return len(self._rows.row_of)

    def put(self, numbers: Sequence[int], revisions: Sequence[int], found: Codes) -> None:
        """Add or replace rows; no number twice."""
        self._make_room(len(numbers))
        rows, start = self._rows, self._rows.used
        end = start + len(numbers)
        rows.codes.high[start:end], rows.codes.low[start:end], rows.codes.scale[start:end] = found
        rows.lead[start:end] = lists.leading(found, self._leading.directions)
        rows.numbers[start:end], rows.revisions[start:end] = numbers, revisions
        rows.live[start:end] = True
        for row, number in enumerate(numbers, start):
            if (before := rows.row_of.get(number)) is not None:
                rows.live[before] = False
            rows.row_of[number] = row
        self._rows = rows._replace(used=end)

    def drop(self, number: int) -> None:
        """Take one row out."""
        if (row := self._rows.row_of.pop(number, None)) is not None:
            self._rows.live[row] = False

    def search(self, wanted: Wanted) -> Near:
        """Return the nearest rows, best first."""
        rows = self._rows
        if rows.used == 0 or wanted.most <= 0:
            return NOTHING
        if rows.used > _MANY and self._leading.full:
            found = self._promising(rows, wanted)
            rough = codes.scores(rows.codes.high.take(found, axis=0), rows.codes.scale[found], wanted.high)
            rough[~rows.live[found]] = OUT
            return wanted.best(rows.codes, rows.numbers, found[wanted.shortlist(rough)])
        rough = codes.scores(rows.codes.high[: rows.used], rows.codes.scale[: rows.used], wanted.high)
        rough[~rows.live[: rows.used]] = OUT
        return wanted.best(rows.codes, rows.numbers, wanted.shortlist(rough))

    def _promising(self, rows: _Rows, wanted: Wanted) -> NDArray[np.int64]:
        """Return the rows that are nearest to the query along the leading directions."""
        towards = codes.encode((wanted.query @ self._leading.directions)[None]).high[0]
        found = np.where(rows.live[: rows.used], codes.products(rows.lead[: rows.used], towards), OUT)
        return highest(found, min(max(self._leading.full, FULL_OF_WANTED * wanted.most), rows.used))

    def cosines(self, query: NDArray[np.float32], numbers: Sequence[int]) -> dict[int, float]:
        """Return the exact cosine of each number that has a row."""
        rows = self._rows
        there = {number: row for number in numbers if (row := rows.row_of.get(number)) is not None}
        if not there:
            return {}
        exact = rows.codes.cosines(np.fromiter(there.values(), dtype=np.int64), query)
        return dict(zip(there, exact.tolist(), strict=True))

    def revision(self, number: int) -> int | None:
        """Return the revision that a number's row came with."""
        rows = self._rows
        row = rows.row_of.get(number)
        return None if row is None else int(rows.revisions[row])

    def live(self) -> tuple[NDArray[np.int64], Codes]:
        """Return the numbers and codes of all rows, in arrays of their own."""
        rows = self._rows
        kept = np.flatnonzero(rows.live[: rows.used])
        return rows.numbers[kept], rows.codes.take(kept)

    def sample(self, count: int) -> NDArray[np.float32]:
        """Return the vectors of a few rows, drawn by a fixed seed."""
        kept = np.flatnonzero(self._rows.live[: self._rows.used])
        return self._rows.codes.vectors(np.random.default_rng(0).permutation(kept)[:count])

    def _make_room(self, more: int) -> None:
        rows, needed = self._rows, self._rows.used + more
        if needed <= len(rows.numbers):
            return
        kept = np.flatnonzero(rows.live[: rows.used])
        size = max(64, 2 * (len(kept) + more))
        fresh = _room(size, *self._leading.directions.shape)
        arrays: list[tuple[Any, Any]] = list(zip(fresh.codes, rows.codes, strict=True))
        for array, values in (*arrays, *zip(fresh[1:5], rows[1:5], strict=True)):
            array[: len(kept)] = values[kept]
        row_of = {number: row for row, number in enumerate(rows.numbers[kept].tolist())}
        self._rows = fresh._replace(row_of=row_of, used=len(kept))
