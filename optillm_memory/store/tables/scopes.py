"""The table `scopes`: every other table names a scope by its number."""

from __future__ import annotations

from optillm_memory.records import SCOPE_PARTS, Scope, Tenant, View
from optillm_memory.store.sqlite.connection import Connection

_NUMBER = "SELECT id FROM scopes WHERE tenant = ? AND namespace = ? AND user_id = ? AND agent_id = ?"
KNOWN = f"({_NUMBER})"  # a scope's number as part of a statement, of a `key`; NULL for one that was never written
_INSERT = "INSERT INTO scopes(tenant, namespace, user_id, agent_id) VALUES (?, ?, ?, ?) RETURNING id"


class ScopeTable:
    """The write half; remembers the numbers within a commit."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self._numbers: dict[Scope, int] = {}

    def number(self, scope: Scope) -> int:
        """Return the scope's number, assigned at first use."""
        if (number := self._numbers.get(scope)) is None:
            row = self._db.execute(_NUMBER, key(scope)).fetchone() or self._db.execute(_INSERT, key(scope)).fetchone()
            number = self._numbers[scope] = int(row[0])
        return number

    def clear_cache(self) -> None:
        """Read the numbers again: scopes were deleted."""
        self._numbers.clear()


def known(db: Connection, scope: Scope) -> int:
    """Return a scope's number; 0, which no scope has, for one that was never written."""
    row = db.execute(_NUMBER, key(scope)).fetchone()
    return int(row[0]) if row else 0


def seen(whose: View | Tenant) -> tuple[str, tuple[str, ...]]:
    """Return the condition on the table `scopes` that a view amounts to, and its values.

    It is the one filter of all that is listed, shown, reported, judged or deleted for a caller.
    """
    view = View.of(whose)
    named = {name: value for name in SCOPE_PARTS if (value := getattr(view, name)) is not None}
    return " AND ".join(f"scopes.{name} = ?" for name in named) or "1 = 1", tuple(named.values())


def key(scope: Scope) -> tuple[str, str, str, str]:
    """Return the values by which a scope is found."""
    return scope.tenant, scope.namespace, scope.user_id, scope.agent_id
