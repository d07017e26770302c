"""What SQLite and PostgreSQL do differently. All other statements are written once, in SQL that both understand.

For another vector store, write a `VectorSearch`; for another database, all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from optillm_memory.records import Scope
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.sqlite.index_files import IndexFiles


class Pool(Protocol):
    """Connections that only read; any thread borrows one."""

    def borrow(self) -> AbstractContextManager[Connection]:
        """Lend a connection. Raises StoreError."""

    def close(self) -> None:
        """Close what is idle."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """The statements that each database needs in a form of its own."""

    salt: str  # reads the secret of the holdout
    memory_numbers: Callable[[Connection, int], Sequence[int]]  # so many numbers for new rows of `memories`
    # A vector's float32 numbers as its column takes them.
    vector: Callable[[bytes], Any]
    # For each word up to `depth` numbers of the scope's memories that contain it: (scope, words, depth).
    postings: Callable[[Connection, int, Sequence[str], int], Mapping[str, list[int]]]
    # Up to `depth` of the scope's memories that contain every word, among the `latest` numbers: (…, depth, latest).
    holding_all: Callable[[Connection, int, Sequence[str], int, int], list[int]]


class VectorSearch(Protocol):
    """How memories are found by their vectors."""

    def nearest(
        self, scope: Scope, fingerprint: str, query: NDArray[Any], count: int
    ) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of a scope's nearest memories; None where recall searches the vectors itself."""

    def index_files(self) -> IndexFiles | None:
        """Return where recall keeps the vectors of large scopes in files; None where it does not."""

    def read_ahead(self) -> Iterator[None]:
        """Read once in order, piece by piece, what recall reads at random."""


class Seal(Protocol):
    """Says of rows whether they are as they were written, and of a database what is wrong with it."""

    on: bool
    skipped: int  # rows that were not as they were written, and so were not used
    checked_at: float  # when all rows were last checked, in Unix seconds; 0: not yet

    @property
    def fault(self) -> str:
        """What shows that the database was changed from outside; empty where nothing does."""

    def check(self, pool: Any, rest: Callable[[], None] = ...) -> list[str]:
        """Compare every row with the seal; return what is wrong. `rest` is called now and then."""

    def genuine(self, db: Connection, table: str, condition: str, values: Sequence[Any]) -> set[Any] | None:
        """Return the keys of those rows of a table that are as they were written; None where there is no seal."""

    def genuine_memories(self, db: Connection, condition: str, values: Sequence[Any]) -> set[int] | None:
        """Return the numbers of those memories that are as they were written, as is the name of their scope."""


class NoSeal:
    """Stands in for the seal where there is none: every row is taken as it is."""

    on, skipped, checked_at, fault = False, 0, 0.0, ""

    def check(self, pool: Any, rest: Callable[[], None] = lambda: None) -> list[str]:  # noqa: ARG002
        """Return that nothing is wrong."""
        return []

    def genuine(self, db: Connection, table: str, condition: str, values: Sequence[Any]) -> set[Any] | None:  # noqa: ARG002
        """Return that there is no seal."""
        return None

    def genuine_memories(self, db: Connection, condition: str, values: Sequence[Any]) -> set[int] | None:  # noqa: ARG002
        """Return that there is no seal."""
        return None


class Location(Protocol):
    """The file or the server that holds everything."""

    @property
    def place(self) -> str:
        """Its name, without secrets."""

    def size_bytes(self) -> int:
        """Return how much space it takes."""

    def used_bytes(self, db: Connection, traces: int) -> int:
        """Return how many bytes of it are in use by so many traces and all that belongs to them."""

    def outdate_indexes(self, scopes: Iterable[Scope] | None) -> None:
        """Note that files of vectors hold forgotten ones of these scopes, None being all: `erase` removes them."""

    def copy_wal(self) -> None:
        """Copy what was written to where it stays, while others write and read; nothing where there is no WAL."""

    def erase(self, *, progress: Callable[[str], None]) -> list[str]:
        """Remove what was deleted from all files, while others read and write; return what prevented it."""

    def compact(self, *, progress: Callable[[str], None]) -> list[str]:
        """Rewrite everything without what was deleted, and give back its space; return what prevented it."""

    def set_aside(self, *, delete: bool) -> list[str]:
        """Delete the databases that were set aside as corrupt, or return what they may still contain."""
