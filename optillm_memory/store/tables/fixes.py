"""Fixes and the attempts behind them, as the adviser reads them."""

from __future__ import annotations

import json
from typing import Any

from optillm_memory.learn.attempts import environment_of
from optillm_memory.learn.fixes import value_in
from optillm_memory.records import KnownFix, PastAttempt, Scope
from optillm_memory.store.sqlite.connection import Readers, marks, objects
from optillm_memory.store.tables import rows


class FixReads:
    """The part of the store that reads fixes; every call is bound to one scope."""

    _readers: Readers

    def known_fixes(
        self,
        scope: Scope,
        tool: str,
        signature: str,
        *,
        environment: str,
        episode_id: str,
        start: str = "",
        limit: int = 200,
    ) -> list[KnownFix]:
        """Return the fixes of a tool's failures that may be suggested, those of the same error first.

        `start` is what the failing actions begin with. What rests on the asking episode alone is left out.
        """
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            found = db.execute(
                "SELECT memory_id, status, tool, field, action, output, signature, relation, text FROM fixes "
                "JOIN memories USING (memory_id) WHERE fixes.scope_id = ? AND tool = ? "
                "AND substr(action, 1, length(?)) = ? AND status IN ('verified', 'candidate') "
                "AND EXISTS (SELECT 1 FROM fix_evidence WHERE success "
                "AND fix_evidence.memory_id = fixes.memory_id AND episode_id <> ?) "
                "ORDER BY signature = ? DESC, revision DESC, memory_id LIMIT ?",
                (scope_id, tool, start, start, episode_id, signature, limit),
            ).fetchall()
            tallies: dict[str, dict[str, tuple[int, int, int, int]]] = {}
            for memory_id, where, *counts in db.execute(
                f"{rows.TALLIES_BY_FIX} AND memory_id IN ({marks(found)}) GROUP BY memory_id, environment",
                [row[0] for row in found],
            ):
                right, wrong, likely, unlikely = (int(c or 0) for c in counts)
                tallies.setdefault(memory_id, {})[where] = (right, wrong, likely, unlikely)
        return [rows.fix_of((*row, value_in(environment, tallies.get(row[0], {})))) for row in found]

    def fix_details(self, scope: Scope, memory_id: str) -> dict[str, Any]:
        """Return what a fix of a scope mends and what says so; of one that is withdrawn only the latter."""
        with self._readers.borrow() as db:
            key = (rows.known_scope(db, scope), memory_id)
            found = objects(
                db,
                "SELECT tool, field, signature, relation, output FROM fixes WHERE scope_id = ? AND memory_id = ?",
                key,
            )
            shown: dict[str, Any] = found[0] if found else {}
            shown["evidence"] = objects(
                db,
                "SELECT episode_id, trace_id, step_id, role, success, verified, environment FROM fix_evidence "
                "WHERE scope_id = ? AND memory_id = ? ORDER BY trace_id, step_id, role",
                key,
            )
        return shown

    def worked(self, scope: Scope, action_key: str, *, environment: str, limit: int = 200) -> list[str]:
        """Return the texts of actions that worked and start with the same word as this one, latest first."""
        tool, field, text = action_key.split("\x1f")[:3]
        start = f"{tool}\x1f{field}\x1f{text.split(' ')[0]}"
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT action_key, tags FROM attempts JOIN steps USING (scope_id, episode_id, step_id) "
                "JOIN traces USING (trace_id) WHERE attempts.scope_id = ? AND action_key >= ? AND action_key < ? "
                "AND verdict = 'success' ORDER BY at DESC LIMIT ?",
                (rows.known_scope(db, scope), start, start + "\U0010ffff", limit),
            ).fetchall()
        return [key.split("\x1f")[2] for key, tags in found if environment_of(json.loads(tags)) == environment]

    def past_attempts(self, scope: Scope, action_key: str, *, environment: str, limit: int = 50) -> list[PastAttempt]:
        """Return the earlier tries of an action in one environment, latest first."""
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT attempts.episode_id, step_id, verdict, basis, message, output, at, signature, tags "
                "FROM attempts JOIN steps USING (scope_id, episode_id, step_id) JOIN traces USING (trace_id) "
                "WHERE attempts.scope_id = ? AND action_key = ? ORDER BY at DESC LIMIT ?",
                (rows.known_scope(db, scope), action_key, limit),
            ).fetchall()
        return [
            PastAttempt(episode_id, step_id, verdict, basis, message, output, at, signature)
            for episode_id, step_id, verdict, basis, message, output, at, signature, tags in found
            if environment_of(json.loads(tags)) == environment
        ]
