"""The index of a scope in a database that searches vectors itself, as PostgreSQL with pgvector does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optillm_memory.recall.vectors.quantization import Vectors
from optillm_memory.recall.vectors.source import Source
from optillm_memory.records import Scope


class DatabaseIndex:
    """A large scope that its source searches."""

    def __init__(self, source: Source, scope: Scope, fingerprint: str, origin: tuple[int, int], floor: float) -> None:
        """`floor` is the cosine that the nearest row must reach, as it was when the scope became large."""
        self._source, self._scope, self._fingerprint = source, scope, fingerprint
        self.origin, self.floor = origin, floor
        self.current = 0  # the source's revision as it was last read

    def search(self, vector: Vectors, count: int) -> list[tuple[int, float]]:
        """Return (number, cosine) of the nearest rows, best first."""
        return self._source.nearest(self._scope, self._fingerprint, vector, count) or []

    def cosines(self, query: Vectors, numbers: Sequence[int]) -> dict[int, float]:
        """Return the cosine of each number that has a row."""
        found = self._source.vectors(self._scope, self._fingerprint, numbers) if numbers else {}
        return {number: float(np.frombuffer(vector, dtype=np.float32) @ query) for number, vector in found.items()}

    def revision(self, number: int) -> int:  # noqa: ARG002
        """Return the source's revision: any change may be this memory's."""
        return self.current
