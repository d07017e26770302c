"""Candidates: which episodes a conversation may go on with, as far as the log tells."""

from __future__ import annotations

from collections.abc import Sequence

from optillm_memory.conversation.episodes import Candidate, forks_of, root_of
from optillm_memory.records import Scope
from optillm_memory.store.sqlite.connection import Connection, Readers, marks
from optillm_memory.store.tables import rows

_BEGIN_ALIKE = 16  # conversations that begin alike and may be meant; of more the latest
# An episode's latest request, whether it has an outcome (its own, or this very answer was verified as right), and how
# it has gone on from a prefix.
_CANDIDATE = f"""
    SELECT coalesce((SELECT max(created_at) FROM traces WHERE scope_id = ? AND episode_id = ?), 0),
        EXISTS (SELECT 1 FROM feedback WHERE {rows.STANDING} AND episode_id = ? AND (scope_id = ? OR scope_id IS NULL)
                AND metric <> 'comment')
        OR EXISTS (SELECT 1 FROM outcomes WHERE trace_id = ? AND verified AND verdict = 'success')"""
_FORKS = """
    SELECT DISTINCT episode_id FROM traces WHERE scope_id = ? AND episode_id >= ? AND episode_id < ? AND continued = ?
    LIMIT ?"""
_CONTINUED = """
    SELECT DISTINCT continuation FROM traces WHERE scope_id = ? AND episode_id = ? AND continued = ?
    AND created_at >= coalesce((SELECT created_at FROM traces WHERE trace_id = ?), 0)"""


class CandidateReads:
    """The part of the store that finds episodes by what their conversations hold."""

    _readers: Readers

    def episodes_of(self, scope: Scope, prefix: str) -> list[Candidate]:
        """Return the latest episodes that have a conversation prefix."""
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            found = db.execute(
                "SELECT episode_id, trace_id FROM prefixes WHERE scope_id = ? AND hash = ? "
                "ORDER BY trace_id DESC LIMIT ?",
                (scope_id, prefix, _BEGIN_ALIKE),
            ).fetchall()
            latest: dict[str, str] = dict(reversed(found))
            for root in {root_of(name) for name in latest}:  # what began as one of these has the prefix from it
                forks = db.execute(_FORKS, (scope_id, *forks_of(root), prefix, _BEGIN_ALIKE)).fetchall()
                latest = {fork[0]: "" for fork in forks} | latest
            return [_candidate(db, scope, scope_id, prefix, *item) for item in latest.items()]

    def episode_with_step(self, scope: Scope, steps: Sequence[str]) -> Candidate | None:
        """Return the latest episode that has one of these steps."""
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            row = db.execute(
                f"SELECT episode_id, trace_id FROM steps WHERE scope_id = ? AND step_id IN ({marks(steps)}) "
                "ORDER BY trace_id DESC LIMIT 1",
                (scope_id, *steps),
            ).fetchone()
            return _candidate(db, scope, scope_id, "", *row) if row else None


def _candidate(db: Connection, scope: Scope, scope_id: int, prefix: str, episode_id: str, trace_id: str) -> Candidate:
    asked = (scope_id, episode_id, scope.tenant, 0.0, episode_id, scope_id, trace_id)
    latest, closed = db.execute(_CANDIDATE, asked).fetchone()
    gone_on = db.execute(_CONTINUED, (scope_id, episode_id, prefix, trace_id)).fetchall() if prefix else []
    return Candidate(episode_id, float(latest), bool(closed), frozenset(row[0] for row in gone_on))
