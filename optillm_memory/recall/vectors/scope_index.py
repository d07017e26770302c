"""One scope's vectors: a file for the bulk of a large one, memory for what changed since, searched as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.vectors import quantization as codes
from optillm_memory.recall.vectors.flat import SAMPLE, VectorIndex, Wanted, floor_of, merged, spread_of
from optillm_memory.recall.vectors.ivf import Base, Header
from optillm_memory.recall.vectors.ivf_writer import Rows
from optillm_memory.recall.vectors.quantization import Codes

_CALIBRATED_FROM = 8
_MANY = 8_192  # rows in memory from which on they are searched while the file is
_beside = ThreadPoolExecutor(1, thread_name_prefix="agent-memory-search")


class Version(NamedTuple):
    """What a source holds of a scope: `revision` grows with each change."""

    generation: int  # another one when what is derived was made anew
    revision: int
    scope: int = 0  # the scope's number: another one when it was forgotten and is used again, 0 where nothing is of it

    @property
    def origin(self) -> tuple[int, int]:
        """What tells whether anything that was known of the scope still holds."""
        return self.generation, self.scope


NEVER = Version(-1, -1)


@dataclass(frozen=True, slots=True)
class Change:
    """A memory that came, went or changed: `vector` is None where it is not to be searched (yet)."""

    number: int
    vector: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done at once, and from where on a scope is large."""

    inline: int = 1_000  # changes that a request takes in by itself; more come behind it
    large: int = 32_768  # rows in memory, beyond which they are put in a file
    share: float = 1 / 32  # of a file's rows, that may have changed before it is written anew
    most: int = 131_072  # rows taken into memory before the next file, where all of a scope has to be read


class Batch(NamedTuple):
    """Changes, ready to be applied."""

    numbers: list[int]
    revisions: list[int]
    codes: Codes
    dropped: list[int]
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
            codes.encode(vectors.reshape(len(kept), dimension)),
            [c.number for c in changes if c.number not in present],
            max((c.revision for c in changes), default=since),
        )


class Index(Protocol):
    """What recall searches in one scope."""

    def search(self, query: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""

    def cosines(self, query: NDArray[np.float32], numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""

    def revision(self, number: int) -> int:
        """Return a revision that is another whenever the memory of this number is."""

    @property
    def floor(self) -> float:
        """The cosine that the nearest row must reach to be related."""


class ScopeIndex:
    """A base, rows in memory, and what of the base is out of date. Its owner holds a lock while it changes."""

    def __init__(
        self, dimension: int, unrelated: tuple[float, float], origin: tuple[int, int], base: Base | None = None
    ) -> None:
        """Start with what a file holds; `unrelated` is the median and spread of cosines of unrelated texts."""
        self.dimension, self.origin, self.base = dimension, origin, base
        self.since = base.header.revision if base else 0
        self.delta = VectorIndex(dimension, base.leading if base else None)
        self._unrelated = unrelated
        self._own = (base.header.middle, base.header.spread) if base else unrelated
        self._calibrated_at = 0
        self._gone: NDArray[np.bool_] | None = None
        self._gone_count = 0
        self._touched: dict[int, int] = {}  # rows of the base whose memory has changed, but not its vector

    def __len__(self) -> int:
        return len(self.delta) + (len(self.base) - self._gone_count if self.base else 0)

    @property
    def changed(self) -> int:
        """How many rows differ from what a file holds."""
        return len(self.delta) + self._gone_count + len(self._touched)

    def is_due(self, limits: Limits) -> bool:
        """Whether the file is to be written anew."""
        return self.changed >= max(limits.large, limits.share * len(self.base) if self.base else 0)

    def apply(self, batch: Batch) -> bool:
        """Take in changes, in the order of their revisions; return whether a row of the file went."""
        before = self._gone_count
        fresh = self._unknown_to_base(batch)
        if self.base is not None and batch.dropped:
            self._leave_out(self.base.rows_of(np.array(batch.dropped, dtype=np.int64)))
        for number in batch.dropped:
            self.delta.drop(number)
            self._touched.pop(number, None)
        if fresh:
            some = [batch.numbers[n] for n in fresh], [batch.revisions[n] for n in fresh]
            self.delta.put(*some, batch.codes.take(fresh))
        self.since = max(self.since, batch.since)
        self._calibrate()
        return self._gone_count > before

    def _unknown_to_base(self, batch: Batch) -> list[int]:
        """Return which of a batch's rows are to be kept in memory; the base's rows that they replace are left out."""
        if self.base is None or not batch.numbers:
            return list(range(len(batch.numbers)))
        rows = self.base.rows_of(np.array(batch.numbers, dtype=np.int64))
        fresh = []
        for at, row in enumerate(rows.tolist()):
            current = row >= 0 and not (self._gone is not None and self._gone[row])
            if current and self.base.codes.equals(row, batch.codes, at):
                self._touched[batch.numbers[at]] = batch.revisions[at]
            else:
                fresh.append(at)
        self._leave_out(rows[fresh])
        return fresh

    def _leave_out(self, rows: NDArray[np.int64]) -> None:
        assert self.base is not None
        rows = rows[rows >= 0]
        if len(rows):
            gone = self._gone if self._gone is not None else self.base.all_there()
            self._gone_count += int(np.count_nonzero(~gone[rows]))
            gone[rows] = True
            self._gone = gone

    def search(self, query: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""
        wanted = Wanted.of(query, count)
        if self.base is None:
            found = self.delta.search(wanted)
        else:
            changed = _beside.submit(self.delta.search, wanted) if len(self.delta) >= _MANY else None
            filed = self.base.search(wanted, self._gone, len(self.base) - self._gone_count)
            # Where the other thread has not come to it, it is as quickly done here.
            rest = self.delta.search(wanted) if changed is None or changed.cancel() else changed.result()
            found = merged([filed, rest], count)
        return list(zip(found.numbers.tolist(), found.cosines.tolist(), strict=True))

    def cosines(self, query: NDArray[np.float32], numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""
        found: dict[int, float] = {}
        if self.base is not None and numbers:
            rows = self.base.rows_of(np.array(numbers, dtype=np.int64))
            there = (rows >= 0) & (~self._gone[rows] if self._gone is not None else True)
            exact = self.base.codes.cosines(rows[there], query)
            found = dict(zip(np.array(numbers)[there].tolist(), exact.tolist(), strict=True))
        return {**found, **self.delta.cosines(query, numbers)}

    def revision(self, number: int) -> int:
        """Return the revision that a row came with; that of the file where it has not changed since."""
        if (found := self.delta.revision(number)) is not None:
            return found
        return self._touched.get(number, self.base.header.revision if self.base else 0)

    @property
    def floor(self) -> float:
        """The cosine that the nearest row must reach to be related: beyond the reach of unrelated texts."""
        return floor_of(self._unrelated, self._own, len(self))

    @property
    def spread(self) -> tuple[float, float]:
        """The median and spread of the scope's own pairs."""
        return self._own

    def _calibrate(self) -> None:
        """Measure the scope's own pairs, each time the scope has doubled: most of them are unrelated."""
        size = len(self.delta)
        if self.base is None and size >= _CALIBRATED_FROM and size >= 2 * self._calibrated_at:
            self._calibrated_at = size
            self._own = spread_of(self.delta.sample(SAMPLE))

    def rows(self) -> tuple[Rows, int]:
        """Return what the next file is made of, and the revision up to which it holds."""
        kept = np.zeros(0, dtype=np.int64)
        if self.base is not None:
            kept = np.arange(len(self.base)) if self._gone is None else np.flatnonzero(~self._gone)
        return Rows(self.base, kept, *self.delta.live()), self.since


def without(rows: Rows, numbers: Iterable[int]) -> Rows:
    """Return the rows less those of some numbers."""
    stale = np.unique(np.fromiter(numbers, dtype=np.int64))
    stays = ~np.isin(rows.numbers, stale)
    kept = rows.kept
    if rows.base is not None and len(stale):
        kept = np.setdiff1d(kept, rows.base.rows_of(stale), assume_unique=True)
    return Rows(rows.base, kept, rows.numbers[stays], rows.codes.take(stays))


def header_for(rows: Rows, fingerprint: str, origin: tuple[int, int], revision: int) -> Header:
    """Return the header of a file to be written; what is measured on it is filled in then."""
    return Header(
        fingerprint=fingerprint, dimension=rows.codes.high.shape[1], generation=origin[0], scope=origin[1],
        revision=revision, count=rows.count, lists=0, trained=0, probes=0, full=0, recall=0.0, middle=0.0, spread=0.0,
    )  # fmt: skip


def opened(content: object, fingerprint: str, dimension: int, version: Version) -> Base | None:
    """Return a file's rows where it is whole, of this encoder, and no newer than the table; else None."""
    try:
        base = Base(content)  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError):
        return None
    head = base.header
    if (head.fingerprint, head.dimension, head.generation, head.scope) != (fingerprint, dimension, *version.origin):
        return None
    return base if head.revision <= version.revision else None
