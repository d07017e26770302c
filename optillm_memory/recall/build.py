"""Writing the file of a large scope: rows sorted into lists around centroids, judged, then put in place."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall import codes
from optillm_memory.recall.ann import Base, Draft, Header, Places, Rest, checksum
from optillm_memory.recall.codes import Codes

_LISTS_PER_ROOT = 4  # lists = 4 * sqrt(rows)
_TRAINED_ON = 32  # rows of each list
_ROUNDS = 6
_BLOCK = 128  # rows compared with every centroid at once: a few milliseconds of work
_COPIED = 16_384  # rows copied at once
_RETRAIN = 2  # when the rows have become so many times those that the lists were made for


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


def nearest_centroids(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the centroid nearest to each vector."""
    return np.asarray((vectors @ centroids.T).argmax(axis=1), dtype=np.int32)


def trained(rows: Rows, lists: int, rest: Rest) -> Codes:
    """Return centroids for so many lists: spherical k-means over a sample, seeded."""
    random = np.random.default_rng(0)
    drawn = random.permutation(rows.count)[: lists * _TRAINED_ON]
    sample = rows.gather(drawn)[1]  # in no order: any of them are a sample again
    centroids = sample.vectors(slice(lists))
    for _ in range(_ROUNDS):
        labels = np.empty(len(drawn), dtype=np.int32)
        for start in range(0, len(drawn), _BLOCK):
            block = sample.vectors(slice(start, start + _BLOCK))
            labels[start : start + _BLOCK] = nearest_centroids(block, centroids)
            rest()
        order = np.argsort(labels, kind="stable")
        edges = np.searchsorted(labels[order], np.arange(lists + 1))
        for number in range(lists):
            members = order[edges[number] : edges[number + 1]]
            if len(members) == 0:  # a centroid that nothing is near to starts again somewhere else
                members = random.integers(len(drawn), size=1)
            middle = sample.vectors(members).sum(axis=0)
            centroids[number] = middle / max(float(np.linalg.norm(middle)), 1e-9)
            rest()
    return codes.encode(centroids)


def _labels(rows: Rows, centroids: Codes, known: bool, rest: Rest) -> NDArray[np.int32]:
    """Return the list of each row; `known`: those of the base stay where they are."""
    labels = np.empty(rows.count, dtype=np.int32)
    first = 0
    if known and rows.base is not None:
        first = len(rows.kept)
        labels[:first] = rows.base.list_of(rows.kept)
    middles = centroids.vectors(slice(None))
    for start in range(first, rows.count, _BLOCK):
        block = rows.gather(np.arange(start, min(start + _BLOCK, rows.count)))[1]
        labels[start : start + _BLOCK] = nearest_centroids(block.vectors(slice(None)), middles)
        rest()
    return labels


def write(draft: Draft, rows: Rows, header: Header, rest: Rest) -> Header:
    """Write the next file and commit it; `header` has the fields that tell what it is of. Raises OSError.

    `rest` is called between pieces of work, to let others have the processor.
    """
    count, dimension = rows.count, header.dimension
    base = rows.base
    sorted_before = base is not None and base.header.trained / _RETRAIN < count < base.header.trained * _RETRAIN
    if base is not None and sorted_before:
        lists, made_for, centroids = base.header.lists, base.header.trained, base.centroids
    else:
        lists, made_for = max(1, min(count, round(_LISTS_PER_ROOT * math.sqrt(count)))), count
        centroids = trained(rows, lists, rest)
    labels = _labels(rows, centroids, sorted_before, rest)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(lists + 1)).astype(np.int64)
    at = Places.of(count, lists, dimension)
    file, numbers, scale = draft.file, np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)

    def put(place: int, values: NDArray[Any]) -> None:
        file.seek(place)
        file.write(np.ascontiguousarray(values).data)

    file.truncate(at.end)
    for start in range(0, count, _COPIED):
        found, planes = rows.gather(order[start : start + _COPIED])
        numbers[start : start + _COPIED], scale[start : start + _COPIED] = found, planes.scale
        put(at.high + start * dimension, planes.high)
        put(at.low + start * dimension, planes.low)
        if base is not None:
            base.let_go()
        rest()
    by_number = np.argsort(numbers)
    for place, values in (
        (at.starts, starts), (at.centroid_scale, centroids.scale), (at.centroid_high, centroids.high),
        (at.centroid_low, centroids.low), (at.numbers, numbers), (at.by_number, numbers[by_number]),
        (at.row_of, by_number.astype(np.int32)), (at.scale, scale),
    ):  # fmt: skip
        put(place, values)
    header = replace(header, count=count, lists=lists, trained=made_for, probes=lists)
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
