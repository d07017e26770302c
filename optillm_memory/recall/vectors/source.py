"""What the indexes are made from: a table of memories that says what changed after a revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from optillm_memory.recall.vectors.quantization import Vectors
from optillm_memory.records import Scope


class Version(NamedTuple):
    """What a source holds of a scope: `revision` grows with each change."""

    generation: int  # another one when everything derived was made anew
    revision: int
    scope: int = 0  # the scope's number: another one when it was forgotten and is used again, 0 where it is empty

    @property
    def origin(self) -> tuple[int, int]:
        """Another value where nothing that was known of the scope holds any more."""
        return self.generation, self.scope


NEVER = Version(-1, -1)


@dataclass(frozen=True, slots=True)
class Change:
    """A memory that was added, changed or deleted: `vector` is None where it is not to be searched (yet)."""

    number: int
    vector: bytes | None
    revision: int


class Source(Protocol):
    """Where vectors are read; every call is bound to one scope."""

    def revision(self, scope: Scope) -> Version:
        """Return a version that is another one whenever any memory has changed."""

    def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
        """Return up to `limit` memories of the scope changed after a revision, oldest change first."""

    def nearest(self, scope: Scope, fingerprint: str, query: Vectors, count: int) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of the nearest memories, best first; None where the source has no index itself."""

    def vectors(self, scope: Scope, fingerprint: str, numbers: Sequence[int]) -> Mapping[int, bytes]:
        """Return the vectors of those of the scope's memories with these numbers that are to be searched."""

    def read_ahead(self) -> Iterator[None]:
        """Read sequentially, piece by piece, what is read in random order later on; nothing of it is returned."""
