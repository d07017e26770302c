"""Writing an inverted file: rows sorted into lists around centroids, calibrated, then committed in one step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors import ivf_calibration, kmeans, pca
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.recall.vectors.ivf_format import Draft, Header, Layout, checksum
from optillm_memory.recall.vectors.pca import COMPONENTS, PREFIX, Projections, Rest
from optillm_memory.recall.vectors.quantization import Codes, Vectors

_BLOCK = 4_096  # rows assigned to lists at once
_COPIED = 16_384  # rows copied at once
_RETRAIN = 1.5  # when the rows have become so many times those that the lists were trained on


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of the next file: those of the present file that are still valid, and those in memory."""

    ivf: IvfIndex | None
    kept: NDArray[np.int64]  # rows of the file
    numbers: NDArray[np.int64]  # of the rows in memory
    codes: Codes

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.kept) + len(self.numbers)

    def gather(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Codes]:
        """Return the numbers and codes of some rows, in their order; those of the file come first in the count."""
        if self.ivf is None:
            return self.numbers[rows], self.codes.take(rows)
        is_kept = rows < len(self.kept)
        in_file, in_memory = self.kept[rows[is_kept]], rows[~is_kept] - len(self.kept)

        def join(of_file: NDArray[Any], of_memory: NDArray[Any]) -> NDArray[Any]:
            joined = np.empty((len(rows), *of_memory.shape[1:]), dtype=of_memory.dtype)
            joined[is_kept], joined[~is_kept] = of_file[in_file], of_memory[in_memory]
            return joined

        old, new = self.ivf.codes, self.codes
        codes = Codes(join(old.high, new.high), join(old.low, new.low), join(old.scale, new.scale))
        return join(self.ivf.numbers, self.numbers), codes


def write(draft: Draft, rows: Rows, header: Header, rest: Rest, *, retrain: bool = False) -> Header:
    """Write the next file and commit it; `header` has the fields that say what it is of. Raises OSError.

    `retrain` has the lists trained on these rows alone: a centroid may be the very vector of a row that must be
    forgotten. `rest` is called between pieces of work, to let other threads have the processor.
    """
    count, dimension, ivf = rows.count, header.dimension, rows.ivf
    keeps_lists = False
    if ivf is not None and not retrain:
        keeps_lists = ivf.header.trained_on / _RETRAIN < count < ivf.header.trained_on * _RETRAIN
    if ivf is not None and keeps_lists:
        trained_on, centroids, components = ivf.header.trained_on, ivf.centroids, ivf.components
    else:
        trained_on, (centroids, components) = count, _train(rows, rest)
    labels = _labels(rows, centroids, components, keeps_lists, rest)
    order = np.argsort(labels, kind="stable")
    nlist = len(centroids.scale)
    starts = np.searchsorted(labels[order], np.arange(nlist + 1)).astype(np.int64)
    at = Layout.of(count, nlist, dimension)
    file, numbers, scale = draft.file, np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32)
    prefix = min(PREFIX, dimension)

    def put(place: int, values: NDArray[Any]) -> None:
        file.seek(place)
        file.write(np.ascontiguousarray(values).data)

    file.truncate(at.end)
    for start in range(0, count, _COPIED):
        some = slice(start, start + _COPIED)
        numbers[some], codes = rows.gather(order[some])
        scale[some] = codes.scale
        put(at.high + start * dimension, codes.high)
        put(at.low + start * dimension, codes.low)
        put(at.prefixes + start * prefix, pca.prefixes(codes, components[:, :prefix]))
        if ivf is not None:
            ivf.drop_pages()
        rest()
    by_number = np.argsort(numbers)
    for place, values in (
        (at.starts, starts), (at.centroids, centroids.high), (at.centroid_scale, centroids.scale),
        (at.components, components), (at.numbers, numbers), (at.by_number, numbers[by_number]),
        (at.row_of, by_number.astype(np.int32)), (at.scale, scale),
    ):  # fmt: skip
        put(place, values)
    written = replace(header, count=count, nlist=nlist, trained_on=trained_on, nprobe=nlist, candidates=count)
    _put_header(draft, written)
    return _finish(draft, at, rest)


def _train(rows: Rows, rest: Rest) -> tuple[Projections, Vectors]:
    """Return centroids, and the components that they and the rows are compared along."""
    components = pca.train(rows.gather(kmeans.sample_of(rows.count, pca.TRAINED_ON))[1], COMPONENTS, rest)
    chosen = kmeans.sample_of(rows.count, kmeans.TRAINED_ON)
    high = np.empty((len(chosen), components.shape[1]), dtype=np.int8)
    scale = np.empty(len(chosen), dtype=np.float32)
    for start in range(0, len(chosen), _BLOCK):
        some = slice(start, start + _BLOCK)
        high[some], scale[some] = Projections.of(_projected(rows, chosen[some], components))
        rest()
    centroids = kmeans.train(Projections(high, scale), kmeans.list_count(rows.count), rest)
    return Projections.of(centroids), components


def _projected(rows: Rows, chosen: NDArray[np.int64], components: Vectors) -> Vectors:
    found = rows.gather(chosen)[1].vectors(slice(None)) @ components
    if rows.ivf is not None:
        rows.ivf.drop_pages()
    return np.asarray(found, dtype=np.float32)


def _labels(
    rows: Rows, centroids: Projections, components: Vectors, keeps_lists: bool, rest: Rest
) -> NDArray[np.int32]:
    """Return the list of each row; where the lists are kept, rows of the present file stay in theirs."""
    labels = np.empty(rows.count, dtype=np.int32)
    first = 0
    if keeps_lists and rows.ivf is not None:
        first = len(rows.kept)
        labels[:first] = rows.ivf.list_of(rows.kept)
    if first == rows.count:
        return labels
    assigner = kmeans.Assigner(centroids.vectors(slice(None)), rest)
    for start in range(first, rows.count, _BLOCK):
        some = np.arange(start, min(start + _BLOCK, rows.count))
        labels[some] = assigner.nearest(_projected(rows, some, components))
        rest()
    return labels


def _finish(draft: Draft, at: Layout, rest: Rest) -> Header:
    """Calibrate what was written, add its checksums and commit it."""
    file = draft.file
    header = ivf_calibration.calibrate(IvfIndex(draft.mapped()), rest)
    file.seek(at.starts)
    head_checksum = zlib.crc32(file.read(at.numbers - at.starts))

    def blocks() -> Iterator[bytes]:
        while block := file.read(1 << 20):
            yield block
            rest()

    header = replace(header, head_checksum=head_checksum, checksum=checksum(blocks(), 0))
    _put_header(draft, header)
    draft.commit()
    return header


def _put_header(draft: Draft, header: Header) -> None:
    draft.file.seek(0)
    draft.file.write(header.to_bytes())
    draft.file.flush()
