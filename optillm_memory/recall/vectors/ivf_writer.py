"""Writing the file of a large scope: rows sorted into lists around centroids, judged, then put in place."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors import kmeans as lists
from optillm_memory.recall.vectors.ivf import LEAD, WIDE, Base, Draft, Header, Places, Rest, checksum
from optillm_memory.recall.vectors.kmeans import Parts
from optillm_memory.recall.vectors.quantization import Codes, Vectors

_BLOCK = 4_096  # rows put into lists at once
_COPIED = 16_384  # rows copied at once
_RETRAIN = 1.5  # when the rows have become so many times those that the lists were made for


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of the next file: those of the last that are still right, and those in memory."""

    base: Base | None
    kept: NDArray[np.int64]  # rows of the base
    numbers: NDArray[np.int64]  # of the rows in memory
    codes: Codes

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.kept) + len(self.numbers)

    def gather(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Codes]:
        """Return the numbers and codes of some rows, in their order; those of the base come first in the count."""
        if self.base is None:
            return self.numbers[rows], self.codes.take(rows)
        old = rows < len(self.kept)
        there, here = self.kept[rows[old]], rows[~old] - len(self.kept)

        def both(from_base: NDArray[Any], from_memory: NDArray[Any]) -> NDArray[Any]:
            made = np.empty((len(rows), *from_memory.shape[1:]), dtype=from_memory.dtype)
            made[old], made[~old] = from_base[there], from_memory[here]
            return made

        ours, theirs = self.codes, self.base.codes
        found = Codes(both(theirs.high, ours.high), both(theirs.low, ours.low), both(theirs.scale, ours.scale))
        return both(self.base.numbers, self.numbers), found


def _parts(rows: Rows, chosen: NDArray[np.int64], directions: Vectors, rest: Rest) -> Parts:
    """Return some rows as they lie along directions."""
    high = np.empty((len(chosen), directions.shape[1]), dtype=np.int8)
    scale = np.empty(len(chosen), dtype=np.float32)
    for start in range(0, len(chosen), _BLOCK):
        some = slice(start, start + _BLOCK)
        high[some], scale[some] = Parts.of(_along(rows, chosen[some], directions))
        rest()
    return Parts(high, scale)


def _along(rows: Rows, chosen: NDArray[np.int64], directions: Vectors) -> Vectors:
    found = rows.gather(chosen)[1].vectors(slice(None)) @ directions
    if rows.base is not None:
        rows.base.let_go()
    return np.asarray(found, dtype=np.float32)


def _labels(rows: Rows, centroids: Parts, directions: Vectors, known: bool, rest: Rest) -> NDArray[np.int32]:
    """Return the list of each row; `known`: those of the base stay where they are."""
    labels = np.empty(rows.count, dtype=np.int32)
    first = 0
    if known and rows.base is not None:
        first = len(rows.kept)
        labels[:first] = rows.base.list_of(rows.kept)
    if first == rows.count:
        return labels
    assigner = lists.Assigner(centroids.vectors(slice(None)), rest)
    for start in range(first, rows.count, _BLOCK):
        some = np.arange(start, min(start + _BLOCK, rows.count))
        labels[some] = assigner.nearest(_along(rows, some, directions))
        rest()
    return labels


def write(draft: Draft, rows: Rows, header: Header, rest: Rest, *, anew: bool = False) -> Header:
    """Write the next file and commit it; `header` has the fields that tell what it is of. Raises OSError.

    `anew` has the lists made from these rows alone: a centroid may be the very vector of a row that must be forgotten.
    `rest` is called between pieces of work, to let others have the processor.
    """
    count, dimension = rows.count, header.dimension
    base = rows.base
    sorted_before = False
    if base is not None and not anew:
        sorted_before = base.header.trained / _RETRAIN < count < base.header.trained * _RETRAIN
    if base is not None and sorted_before:
        made_for, centroids, directions = base.header.trained, base.centroids, base.directions
    else:
        directions = lists.directions(rows.gather(lists.measured(count))[1], WIDE, LEAD, rest)
        sample = _parts(rows, lists.sampled(count), directions, rest)
        made_for, centroids = count, Parts.of(lists.made(sample, lists.count_for(count), rest))
        del sample
    labels = _labels(rows, centroids, directions, sorted_before, rest)
    order = np.argsort(labels, kind="stable")
    number_of_lists = len(centroids.scale)
    starts = np.searchsorted(labels[order], np.arange(number_of_lists + 1)).astype(np.int64)
    at = Places.of(count, number_of_lists, dimension)
    file, numbers, scale = draft.file, np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)
    lead = min(LEAD, dimension)

    def put(place: int, values: NDArray[Any]) -> None:
        file.seek(place)
        file.write(np.ascontiguousarray(values).data)

    file.truncate(at.end)
    for start in range(0, count, _COPIED):
        found, planes = rows.gather(order[start : start + _COPIED])
        numbers[start : start + _COPIED], scale[start : start + _COPIED] = found, planes.scale
        put(at.high + start * dimension, planes.high)
        put(at.low + start * dimension, planes.low)
        put(at.lead + start * lead, lists.leading(planes, directions[:, :lead]))
        if base is not None:
            base.let_go()
        rest()
    by_number = np.argsort(numbers)
    for place, values in (
        (at.starts, starts), (at.centroids, centroids.high), (at.centroid_scale, centroids.scale),
        (at.directions, directions), (at.numbers, numbers), (at.by_number, numbers[by_number]),
        (at.row_of, by_number.astype(np.int32)), (at.scale, scale),
    ):  # fmt: skip
        put(place, values)
    header = replace(header, count=count, lists=number_of_lists, trained=made_for, probes=number_of_lists, full=count)
    file.seek(0)
    file.write(header.to_bytes())
    file.flush()
    return _finished(draft, header, at, rest)


def _finished(draft: Draft, header: Header, at: Places, rest: Rest) -> Header:
    """Judge what was written, note its checksums and commit it."""
    file = draft.file
    header = Base(draft.mapped()).calibrated(rest)
    file.seek(at.starts)
    small = zlib.crc32(file.read(at.numbers - at.starts))

    def blocks() -> Iterator[bytes]:
        while block := file.read(1 << 20):
            yield block
            rest()

    header = replace(header, small=small, large=checksum(blocks(), 0))
    file.seek(0)
    file.write(header.to_bytes())
    file.flush()
    draft.commit()
    return header
