"""The index of one scope: an inverted file for the bulk of a large one, a flat index for what changed since.

Both are searched as one. The file never changes; rows that were replaced or deleted since are masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.relevance_floor import SAMPLE, floor_of, spread_of
from optillm_memory.recall.vectors.flat import FlatIndex, Query, merge
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.recall.vectors.ivf_format import Header
from optillm_memory.recall.vectors.ivf_writer import Rows
from optillm_memory.recall.vectors.quantization import Codes, Vectors, encode
from optillm_memory.recall.vectors.source import Change, Version

_CALIBRATED_FROM = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done at once, and from where on a scope is large."""

    inline: int = 1_000  # changes that a request applies itself; more are applied in the background
    flat_rows: int = 32_768  # rows in memory, beyond which they are written to a file
    rewrite_share: float = 1 / 32  # of a file's rows that may have changed before it is written again
    loaded_rows: int = 131_072  # rows read into memory before the next file, where a whole scope has to be read


class Batch(NamedTuple):
    """Changes, ready to be applied."""

    numbers: list[int]
    revisions: list[int]
    codes: Codes
    removed: list[int]
    since: int

    @classmethod
    def of(cls, changes: Sequence[Change], since: int, dimension: int) -> Batch:
        """Prepare changes read after a revision."""
        size = 4 * dimension
        kept = [(c.number, c.revision, c.vector) for c in changes if c.vector is not None and len(c.vector) == size]
        vectors = np.frombuffer(b"".join([vector for *_, vector in kept]), dtype=np.float32)
        present = {number for number, *_ in kept}
        return cls(
            [number for number, *_ in kept],
            [revision for _, revision, _ in kept],
            encode(vectors.reshape(len(kept), dimension)),
            [c.number for c in changes if c.number not in present],
            max((c.revision for c in changes), default=since),
        )


class ScopeIndex:
    """An inverted file, a flat index, and which rows of the file are out of date. Its owner locks it for changes."""

    def __init__(
        self, dimension: int, unrelated: tuple[float, float], origin: tuple[int, int], ivf: IvfIndex | None = None
    ) -> None:
        """Start with what a file holds; `unrelated` is the median and spread of cosines of unrelated texts."""
        self.dimension, self.origin, self.ivf = dimension, origin, ivf
        self.since = ivf.header.revision if ivf else 0
        self.flat = FlatIndex(dimension, ivf.prefix if ivf else None)
        self._unrelated = unrelated
        self._own = (ivf.header.pair_median, ivf.header.pair_spread) if ivf else unrelated
        self._calibrated_at = 0
        self._deleted: NDArray[np.bool_] | None = None  # rows of the file
        self._deleted_count = 0
        self._revised: dict[int, int] = {}  # memories whose row in the file is valid, though they changed

    def __len__(self) -> int:
        return len(self.flat) + (len(self.ivf) - self._deleted_count if self.ivf else 0)

    @property
    def changed(self) -> int:
        """How many rows differ from what a file holds."""
        return len(self.flat) + self._deleted_count + len(self._revised)

    def needs_rewrite(self, limits: Limits) -> bool:
        """Whether the file is to be written again."""
        return self.changed >= max(limits.flat_rows, limits.rewrite_share * len(self.ivf) if self.ivf else 0)

    def apply(self, batch: Batch) -> bool:
        """Apply changes, in the order of their revisions; return whether a row of the file was deleted."""
        before = self._deleted_count
        fresh = self._unknown_to_file(batch)
        if self.ivf is not None and batch.removed:
            self._delete(self.ivf.rows_of(np.array(batch.removed, dtype=np.int64)))
        for number in batch.removed:
            self.flat.remove(number)
            self._revised.pop(number, None)
        if fresh:
            numbers, revisions = [batch.numbers[n] for n in fresh], [batch.revisions[n] for n in fresh]
            self.flat.add(numbers, revisions, batch.codes.take(fresh))
        self.since = max(self.since, batch.since)
        self._calibrate()
        return self._deleted_count > before

    def _unknown_to_file(self, batch: Batch) -> list[int]:
        """Return which of a batch's rows go into memory; the rows of the file that they replace are deleted."""
        if self.ivf is None or not batch.numbers:
            return list(range(len(batch.numbers)))
        rows = self.ivf.rows_of(np.array(batch.numbers, dtype=np.int64))
        fresh = []
        for at, row in enumerate(rows.tolist()):
            valid = row >= 0 and not (self._deleted is not None and self._deleted[row])
            if valid and self.ivf.codes.equals(row, batch.codes, at):
                self._revised[batch.numbers[at]] = batch.revisions[at]
            else:
                fresh.append(at)
        self._delete(rows[fresh])
        return fresh

    def _delete(self, rows: NDArray[np.int64]) -> None:
        assert self.ivf is not None
        rows = rows[rows >= 0]
        if len(rows):
            deleted = self._deleted if self._deleted is not None else self.ivf.no_deletions()
            self._deleted_count += int(np.count_nonzero(~deleted[rows]))
            deleted[rows] = True
            self._deleted = deleted

    def search(self, vector: Vectors, count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""
        query = Query.of(vector, count)
        found = self.flat.search(query)
        if self.ivf is not None:
            in_file = self.ivf.search(query, self._deleted, len(self.ivf) - self._deleted_count)
            found = merge([in_file, found], count)
        return list(zip(found.numbers.tolist(), found.cosines.tolist(), strict=True))

    def cosines(self, query: Vectors, numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""
        found: dict[int, float] = {}
        if self.ivf is not None and numbers:
            rows = self.ivf.rows_of(np.array(numbers, dtype=np.int64))
            valid = (rows >= 0) & (~self._deleted[rows] if self._deleted is not None else True)
            exact = self.ivf.codes.cosines(rows[valid], query)
            found = dict(zip(np.array(numbers)[valid].tolist(), exact.tolist(), strict=True))
        return {**found, **self.flat.cosines(query, numbers)}

    def revision(self, number: int) -> int:
        """Return the revision that a row came with; that of the file where it has not changed since."""
        if (found := self.flat.revision(number)) is not None:
            return found
        return self._revised.get(number, self.ivf.header.revision if self.ivf else 0)

    @property
    def floor(self) -> float:
        """The cosine that the nearest row must reach to be related."""
        return floor_of(self._unrelated, self._own, len(self))

    def _calibrate(self) -> None:
        """Measure the scope's own pairs, each time the scope has doubled: most of them are unrelated."""
        size = len(self.flat)
        if self.ivf is None and size >= _CALIBRATED_FROM and size >= 2 * self._calibrated_at:
            self._calibrated_at = size
            self._own = spread_of(self.flat.sample(SAMPLE))

    def rows(self) -> tuple[Rows, int]:
        """Return what the next file is made of, and the revision up to which it holds."""
        kept = np.zeros(0, dtype=np.int64)
        if self.ivf is not None:
            kept = np.arange(len(self.ivf)) if self._deleted is None else np.flatnonzero(~self._deleted)
        return Rows(self.ivf, kept, *self.flat.live()), self.since


def without(rows: Rows, numbers: Iterable[int]) -> Rows:
    """Return the rows less those of some numbers."""
    stale = np.unique(np.fromiter(numbers, dtype=np.int64))
    stays = ~np.isin(rows.numbers, stale)
    kept = rows.kept
    if rows.ivf is not None and len(stale):
        kept = np.setdiff1d(kept, rows.ivf.rows_of(stale), assume_unique=True)
    return Rows(rows.ivf, kept, rows.numbers[stays], rows.codes.take(stays))


def header_for(rows: Rows, fingerprint: str, origin: tuple[int, int], revision: int) -> Header:
    """Return the header of a file to be written; what is measured on it is filled in later."""
    return Header(
        fingerprint=fingerprint, dimension=rows.codes.high.shape[1], generation=origin[0], scope=origin[1],
        revision=revision, count=rows.count, nlist=0, trained_on=0, nprobe=0, candidates=0, recall=0.0, pair_median=0.0,
        pair_spread=0.0,
    )  # fmt: skip


def open_ivf(content: object, fingerprint: str, dimension: int, version: Version) -> IvfIndex | None:
    """Open a file where it is whole, of this encoder, and no newer than the table; else return None."""
    try:
        index = IvfIndex(content)  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError):
        return None
    head = index.header
    if (head.fingerprint, head.dimension, head.generation, head.scope) != (fingerprint, dimension, *version.origin):
        return None
    return index if head.revision <= version.revision else None
