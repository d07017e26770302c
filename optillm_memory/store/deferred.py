"""Rows that a commit writes together: to insert one takes no statement of its own, and whatever is executed sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Deferring:
    """A connection on which the inserts of one statement are gathered until anything else is executed.

    They are written in the order of their statements' first rows; a statement's rows may not update each other.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Start with nothing deferred; the arguments are those of the connection."""
        super().__init__(*arguments, **options)
        self._deferred: dict[str, list[Sequence[Any]]] = {}
        self._first: list[Callable[[], None]] = []

    def later(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run an insert for each row before the next statement that is executed, or with the commit."""
        if rows := list(rows):
            self._deferred.setdefault(sql, []).extend(rows)

    def first(self, work: Callable[[], None]) -> None:
        """Have some work, which may execute statements itself, done before the next statement that is executed."""
        self._first.append(work)

    def write_deferred(self) -> None:
        """Write what was deferred."""
        while self._first:
            self._first.pop(0)()
        if self._deferred:
            deferred, self._deferred = self._deferred, {}
            for sql, rows in deferred.items():
                self._insert(sql, rows)

    def drop_deferred(self) -> None:
        """Forget what was deferred: its transaction is undone."""
        self._deferred.clear()
        self._first.clear()

    def _insert(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self.executemany(sql, rows)  # type: ignore[attr-defined] # of the connection
