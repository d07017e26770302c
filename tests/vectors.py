"""Vectors to search, and a source that holds them as the store does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from optillm_memory import MemoryRecord, Scope
from optillm_memory.background.worker import BackgroundWorker
from optillm_memory.recall.vectors.source import Change, Version

Vectors = NDArray[np.float32]
FINGERPRINT = "test-vectors"


def unit(vectors: NDArray[np.floating]) -> Vectors:
    """Return vectors brought to length 1."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-9), dtype=np.float32)


def clustered(count: int, dimension: int, *, seed: int = 0, spread: float = 0.5) -> Vectors:
    """Return vectors in many groups of uneven size, as texts of many subjects lie."""
    random = np.random.default_rng(seed)
    centres = unit(np.random.default_rng(7).normal(size=(max(2, count // 50), dimension)))
    chosen = np.minimum(random.exponential(len(centres) / 4, count).astype(int), len(centres) - 1)
    return unit(centres[chosen] + spread * unit(random.normal(size=(count, dimension))))


def workers() -> tuple[BackgroundWorker, BackgroundWorker]:
    """Return a loader and a writer for an index cache, which closes them."""
    return BackgroundWorker("test-loader"), BackgroundWorker("test-writer")


class TableSource:
    """What recall reads, held in memory: rows by number, each with its last change."""

    def __init__(self) -> None:
        """Start empty."""
        self.rows: dict[int, tuple[int, Vectors | None]] = {}
        self.generation, self.at, self.number = 0, 0, 1
        self.searches: bool = False  # as a database with an index of its own does
        self.pieces_read = 0

    def put(self, rows: Mapping[int, Vectors | None]) -> None:
        """Change some rows, each with a revision of its own."""
        for number, vector in rows.items():
            self.at += 1
            self.rows[number] = self.at, vector

    def revision(self, scope: Scope | None = None) -> Version:
        """Return the state of the one scope that there is."""
        return Version(self.generation, self.at, self.number)

    def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
        """Return what changed, oldest first."""
        found = sorted((revision, n) for n, (revision, _) in list(self.rows.items()) if revision > since)
        return [Change(n, self._blob(n, fingerprint), revision) for revision, n in found[:limit]]

    def _blob(self, number: int, fingerprint: str) -> bytes | None:
        vector = self.rows[number][1]
        return vector.tobytes() if vector is not None and fingerprint == FINGERPRINT else None

    def vectors(self, scope: Scope, fingerprint: str, numbers: Sequence[int]) -> Mapping[int, bytes]:
        """Return some rows' vectors."""
        found = {n: self._blob(n, fingerprint) for n in numbers if n in self.rows}
        return {n: blob for n, blob in found.items() if blob is not None}

    def nearest(self, scope: Scope, fingerprint: str, query: Vectors, count: int) -> list[tuple[int, float]] | None:
        """Search by itself, where that is switched on."""
        return self.exact(query, count) if self.searches else None

    def exact(self, query: Vectors, count: int) -> list[tuple[int, float]]:
        """Compare with every row."""
        found = [(n, float(vector @ query)) for n, (_, vector) in self.rows.items() if vector is not None]
        return sorted(found, key=lambda pair: -pair[1])[:count]

    def lexical(self, scope: Scope, query: Sequence[str], limit: int, *, alone: bool) -> list[tuple[int, float]]:
        """Find nothing by words."""
        return []

    def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
        """Return no memories: these tests look at numbers."""
        return {}

    def of_episode_alone(self, scope: Scope, memory_ids: Sequence[str], episode_id: str) -> set[str]:
        """Name none."""
        return set()

    def read_ahead(self) -> Iterator[None]:
        """Count the pieces that are asked for: there are three."""
        for _ in range(3):
            self.pieces_read += 1
            yield
