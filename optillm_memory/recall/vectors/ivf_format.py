"""How an inverted file lies on disk: a header, then arrays one after another; and where such files are kept."""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import BinaryIO, NamedTuple, Protocol

from optillm_memory.recall.vectors.pca import COMPONENTS, PREFIX
from optillm_memory.records import Scope

FORMAT = 5
HEADER_BYTES = 4096
GROUP = 4  # rows whose prefixes are read together; a group may reach into the next list
_MAGIC = b"AMVECTOR"
_ALIGN = 64


class Draft(Protocol):
    """A file that is being written, which nobody else sees before it is committed."""

    @property
    def file(self) -> BinaryIO:
        """The open file."""

    def mapped(self) -> mmap.mmap:
        """Return what was written so far."""

    def commit(self) -> None:
        """Sync the file and replace the one before in one step. Raises OSError."""


class Files(Protocol):
    """Where the files of large scopes are kept."""

    def mapped(self, name: str) -> mmap.mmap | None:
        """Map a file; None where there is none."""

    def name(self, scope: Scope, fingerprint: str) -> str:
        """Return the name of a scope's file for one encoder."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def keep(self, content: mmap.mmap, start: int, end: int) -> Iterator[None]:
        """Lock a part of a mapped file in memory, as far as that is allowed, piece by piece."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """Read a file block by block, without mapping it. Raises OSError."""

    def draft(self, name: str) -> AbstractContextManager[Draft | None]:
        """Begin a file; None while another process writes it. What is not committed is removed. Raises OSError."""

    def remove(self, name: str) -> None:
        """Remove a file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds, and how it is to be searched."""

    fingerprint: str  # of the encoder
    dimension: int
    generation: int
    scope: int  # its number in the table
    revision: int  # every change up to it is in the file
    count: int
    nlist: int
    trained_on: int  # rows that there were when the lists were trained
    nprobe: int  # lists that a search looks into
    candidates: int  # rows in them that it looks at in full
    recall: float  # of the nearest ten, as measured on the file's own rows
    pair_median: float  # of the cosines of its pairs, and their spread
    pair_spread: float
    head_checksum: int = 0  # of what every search reads
    checksum: int = 0  # of everything from there on
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Return the first bytes of the file."""
        text = json.dumps(asdict(self)).encode()
        checked = _MAGIC + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
        return checked.ljust(HEADER_BYTES)

    @classmethod
    def of(cls, head: bytes) -> Header:
        """Read the first bytes of a file. Raises ValueError for anything but a header of this format."""
        size = int.from_bytes(head[12:16], "little")
        text = head[16 : 16 + size]
        if head[:8] != _MAGIC or size > HEADER_BYTES - 16 or zlib.crc32(text) != int.from_bytes(head[8:12], "little"):
            raise ValueError("not an index of vectors")
        fields = json.loads(text)
        if fields.get("format") != FORMAT:
            raise ValueError(f"an index of format {fields.get('format')}")
        return cls(**fields)


class Layout(NamedTuple):
    """Where each array begins in the file; `end` is the file's size."""

    starts: int
    centroids: int
    centroid_scale: int
    components: int
    numbers: int
    by_number: int
    row_of: int
    scale: int
    prefixes: int
    high: int
    low: int
    end: int

    @classmethod
    def of(cls, count: int, nlist: int, dimension: int) -> Layout:
        """Return the layout of a file of so many rows."""
        prefix, components = min(PREFIX, dimension), min(COMPONENTS, dimension)
        sizes = (
            8 * (nlist + 1), nlist * components, 4 * nlist, 4 * dimension * components, 8 * count, 8 * count, 4 * count,
            4 * count, -(-count // GROUP) * GROUP * prefix, count * dimension, count * dimension,
        )  # fmt: skip
        places = [HEADER_BYTES]
        for size in sizes:
            places.append(-(-(places[-1] + size) // _ALIGN) * _ALIGN)
        return cls(*places)


def checksum(blocks: Iterator[bytes], skipped: int) -> int:
    """Return the checksum of a file's bytes but for the first few."""
    value = 0
    for block in blocks:
        value = zlib.crc32(block[skipped:], value)
        skipped = max(0, skipped - len(block))
    return value
