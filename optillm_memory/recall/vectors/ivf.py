"""Search in an inverted file (IVF, Jegou, Douze and Schmid 2011): rows in lists around centroids, in one mapped file.

A search compares the query with all centroids, probes the `nprobe` nearest lists, compares the PCA prefixes of their
rows, then the high bytes of the best of them, and at last exact cosines. How many lists and how many rows is measured
when the file is written (`ivf_calibration`). The file never changes: rows that were deleted since are masked by the
search, and the next file is without them. Where vectors have no neighbourhoods, more lists are probed, up to all of
them: slower, never wrong.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors.flat import EXCLUDED, NONE, Neighbours, Query, top_k
from optillm_memory.recall.vectors.ivf_format import GROUP, HEADER_BYTES, Files, Header, Layout, checksum
from optillm_memory.recall.vectors.pca import COMPONENTS, PREFIX, PcaPrefix, Projections
from optillm_memory.recall.vectors.quantization import (
    Bytes,
    Codes,
    Vectors,
    approximate_scores,
    dot_products,
    encode_query,
)


class IvfIndex:
    """An inverted file, mapped."""

    def __init__(self, content: mmap.mmap) -> None:
        """Open a file's content. Raises ValueError where it is not whole; `is_intact` checks the rest."""
        self._content = content
        self.header = head = Header.of(content[:HEADER_BYTES])
        count, nlist, dimension = head.count, head.nlist, head.dimension
        self._layout = at = Layout.of(count, nlist, dimension)
        if len(content) != at.end or min(count, nlist, dimension) < 1:
            raise ValueError("an index that was truncated")
        # What a search reads in random order is a tenth of the file. It is copied to memory now, in one sequential
        # read: where the page cache lost it, a search would wait for the disk a thousand times.
        _prefetch(content, at.starts, at.high)
        if head.head_checksum and zlib.crc32(content[at.starts : at.numbers]) != head.head_checksum:
            raise ValueError("an index that is damaged")

        def array(kind: type, place: int, *shape: int) -> Any:
            return np.frombuffer(content, dtype=kind, count=math.prod(shape), offset=place).reshape(shape)

        def read(kind: type, place: int, *shape: int) -> Any:
            return array(kind, place, *shape).copy()

        self.starts: NDArray[np.int64] = read(np.int64, at.starts, nlist + 1)
        prefix, components = min(PREFIX, dimension), min(COMPONENTS, dimension)
        self.centroids = Projections(
            read(np.int8, at.centroids, nlist, components), read(np.float32, at.centroid_scale, nlist)
        )
        self.codes = Codes(
            array(np.int8, at.high, count, dimension),
            array(np.int8, at.low, count, dimension),
            read(np.float32, at.scale, count),
        )
        self.components: Vectors = read(np.float32, at.components, dimension, components)
        self._groups: Bytes = read(np.int8, at.prefixes, -(-count // GROUP), GROUP * prefix)
        self.numbers: NDArray[np.int64] = read(np.int64, at.numbers, count)
        self._by_number: NDArray[np.int64] = read(np.int64, at.by_number, count)
        self._row_of: NDArray[np.int32] = read(np.int32, at.row_of, count)

    def __len__(self) -> int:
        return self.header.count

    @property
    def prefix(self) -> PcaPrefix:
        """How rows like those of this file are looked at first."""
        return PcaPrefix(self.components[:, :PREFIX], self.header.candidates)

    @property
    def prefixes(self) -> Bytes:
        """The rows' PCA prefixes; the last group is filled up with rows that are none."""
        return self._groups.reshape(len(self._groups) * GROUP, -1)

    def list_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the list that each row lies in."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def rows_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each number, -1 where it has none."""
        at = np.minimum(np.searchsorted(self._by_number, numbers), len(self) - 1)
        return np.where(self._by_number[at] == numbers, self._row_of[at].astype(np.int64), -1)

    def no_deletions(self) -> NDArray[np.bool_]:
        """Return a mask of deleted rows for `search`: none yet but those that only fill up the last group."""
        return np.arange(len(self._groups) * GROUP) >= len(self)

    def search(self, query: Query, deleted: NDArray[np.bool_] | None = None, live: int = 0) -> Neighbours:
        """Return the nearest rows in the lists nearest to the query, less the deleted ones (see `no_deletions`).

        `live` is how many are not deleted: the fewer of the rows, the more lists are probed.
        """
        if query.k <= 0:
            return NONE
        nprobe = self.header.nprobe * len(self) // max(live, 1) if deleted is not None else self.header.nprobe
        projected = query.vector @ self.components
        groups = self._groups_of(top_k(self.nearness(projected), min(nprobe, self.header.nlist)))
        rows = self._candidates(groups, projected, query.candidates(self.header.candidates), deleted)
        approximate = approximate_scores(self.codes.high.take(rows, axis=0), self.codes.scale[rows], query.high)
        return query.nearest(self.codes, self.numbers, rows[query.shortlist(approximate)])

    def nearness(self, projected: Vectors) -> NDArray[np.float32]:
        """Return scores that order the lists by how near they are to a query along the components."""
        return approximate_scores(self.centroids.high, self.centroids.scale, encode_query(projected))

    def _groups_of(self, lists: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the groups of rows that some lists lie in, in their order in the file."""
        lists = np.sort(lists)
        first, end = self.starts[lists] // GROUP, -(-self.starts[lists + 1] // GROUP)
        first[1:] = np.maximum(first[1:], end[:-1])  # the last group of one list may be the first of the next
        sizes = np.maximum(end - first, 0)
        begins = first - (np.cumsum(sizes) - sizes)
        return np.asarray(np.arange(sizes.sum()) + np.repeat(begins, sizes))

    def _candidates(
        self, groups: NDArray[np.int64], projected: Vectors, count: int, deleted: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """Return up to `count` rows of some groups, the nearest to the query by their prefixes."""
        positions = np.arange(GROUP * len(groups))
        if len(positions) > count:
            # Copied together first: one call of the kernel is faster than many, and releases the interpreter once.
            prefixes = self._groups.take(groups, axis=0).reshape(len(positions), -1)
            scores = dot_products(prefixes, encode_query(projected[: prefixes.shape[1]]))
            if deleted is not None:
                scores = np.where(deleted.reshape(-1, GROUP).take(groups, axis=0).reshape(-1), EXCLUDED, scores)
            positions = top_k(scores, count)
        rows: NDArray[np.int64] = groups[positions // GROUP] * GROUP + positions % GROUP
        rows = rows[rows < len(self)]
        return rows if deleted is None else rows[~deleted[rows]]

    def is_truncated(self) -> bool:
        """Whether somebody has shortened the file since: to read beyond its end would end the process."""
        return self._content.size() < self._layout.end

    def is_intact(self, blocks: Iterator[bytes]) -> bool:
        """Whether the file's bytes (from its beginning) are those that were written, or already those of another."""
        first = next(blocks, b"")
        if first[:HEADER_BYTES] != self._content[:HEADER_BYTES]:
            return True
        return checksum(chain([first], blocks), self._layout.numbers) == self.header.checksum

    def lock_in_memory(self, files: Files) -> Iterator[None]:
        """Keep the rows in memory, piece by piece."""
        return files.keep(self._content, self._layout.high, self._layout.end)

    def drop_pages(self) -> None:
        """Release the pages that were read; they come back when they are searched. What is locked stays."""
        if hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):
                self._content.madvise(mmap.MADV_DONTNEED)


def _prefetch(content: mmap.mmap, start: int, end: int) -> None:
    """Have a part of a file read sequentially."""
    if hasattr(mmap, "MADV_WILLNEED"):
        content.madvise(mmap.MADV_WILLNEED, start - start % mmap.PAGESIZE, end - start + start % mmap.PAGESIZE)
