"""The table `feedback`: appended once for each id, and retracted by another row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from optillm_memory.errors import InvalidField
from optillm_memory.records import Feedback, FeedbackStatus, Trace
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.traces import PENDING_S, TraceTable

_COLUMNS = "feedback_id, retracts, trace_id, episode_id, metric, value, source, evidence, occurred_at"
# A trace's own tenant and the operator (the empty tenant) may give feedback on it. Retractions are counted, because
# PostgreSQL takes NOT EXISTS as a join, and reads all of them.
STANDING = """NOT retracts AND tenant IN ('', ?) AND received_at >= ? AND 0 = (
    SELECT count(*) FROM feedback AS r WHERE r.tenant = feedback.tenant AND r.feedback_id = feedback.feedback_id
    AND r.retracts)"""


@dataclass
class FeedbackTable:
    """The write half, and what the fold reads."""

    db: Connection
    scopes: ScopeTable
    traces: TraceTable

    def add(self, tenant: str, scope_id: int | None, feedback: Feedback, received_at: float) -> FeedbackStatus | None:
        """Append feedback; return `duplicate` or `retracted` where that settles it, None where it is new.

        Raises InvalidField where the id was used before with other content.
        """
        retracts = feedback.value is None
        self.traces.touch(None if retracts else feedback.trace_id or None)
        content = (feedback.trace_id, feedback.episode_id, feedback.metric, json.dumps(feedback.value), feedback.source)
        before = self.db.execute(
            "SELECT retracts, trace_id, episode_id, metric, value, source FROM feedback "
            "WHERE tenant = ? AND feedback_id = ?",
            (tenant, feedback.feedback_id),
        ).fetchall()
        for was_retracted, *earlier in before:
            if bool(was_retracted) != retracts:
                continue
            if not retracts and tuple(earlier) != content:
                raise InvalidField(
                    "feedback.feedback_id",
                    f"{feedback.feedback_id!r} was used before with other content; retract it (value null) "
                    "and send a new id",
                )
            return "retracted" if retracts else "duplicate"
        evidence = json.dumps(feedback.evidence) if feedback.evidence else None
        self.db.execute(
            "INSERT INTO feedback(tenant, feedback_id, retracts, scope_id, trace_id, episode_id, metric, value, "
            "source, evidence, occurred_at, received_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                tenant, feedback.feedback_id, int(retracts), scope_id, *content, evidence, feedback.occurred_at,
                received_at,
            ),
        )  # fmt: skip
        return "retracted" if retracts or any(row[0] for row in before) else None

    def targets(self, tenant: str, scope_id: int | None, feedback: Feedback) -> list[str]:
        """Return the traces that feedback is on; a retraction is on those of what it retracts."""
        named: list[tuple[Any, ...]] = [(feedback.trace_id, feedback.episode_id, scope_id)]
        if feedback.value is None:
            named = self.db.execute(
                "SELECT trace_id, episode_id, scope_id FROM feedback WHERE tenant = ? AND feedback_id = ?",
                (tenant, feedback.feedback_id),
            ).fetchall()
        targets: list[str] = []
        for trace_id, episode_id, within in named:
            if not trace_id:
                targets += [row[0] for row in self.db.execute(_OF_EPISODE, (tenant, within, episode_id)).fetchall()]
            elif (trace := self.traces.get(trace_id)) is not None and tenant in ("", trace.scope.tenant):
                targets.append(trace_id)
        return list(dict.fromkeys(targets))

    def tenant_of(self, feedback_id: str) -> str | None:
        """Return whose feedback this is, where only one tenant has such an id."""
        found = self.db.execute("SELECT DISTINCT tenant FROM feedback WHERE feedback_id = ?", (feedback_id,)).fetchall()
        return str(found[0][0]) if len(found) == 1 else None

    def on(self, trace: Trace) -> tuple[list[Feedback], list[Feedback]]:
        """Return feedback on the trace and on its episode; what waited for it longer than 7 days has expired."""
        standing = (trace.scope.tenant, trace.created_at - PENDING_S)
        of_episode = (self.scopes.number(trace.scope), trace.episode_id)
        found = self.db.execute(_ON, (*standing, trace.trace_id, *standing, *of_episode)).fetchall()
        own, shared = ([_feedback_of(row[1:]) for row in found if row[0] == is_own] for is_own in (1, 0))
        return own, shared


def feedback_shown(db: Connection, trace: Trace, scope_id: int) -> list[Feedback]:
    """Return all feedback on a trace and on its episode, with what was retracted, oldest first."""
    found = db.execute(
        f"SELECT {_COLUMNS} FROM feedback WHERE (trace_id = ? OR (coalesce(scope_id, ?) = ? AND episode_id = ?)) "
        "AND coalesce(tenant, '') IN ('', ?) ORDER BY occurred_at, feedback_id",
        (trace.trace_id, scope_id, scope_id, trace.episode_id, trace.scope.tenant),
    ).fetchall()
    return [_feedback_of(row) for row in found]


def _feedback_of(row: tuple[Any, ...]) -> Feedback:
    feedback_id, retracts, trace_id, episode_id, metric, value, source, evidence, occurred_at = row
    return Feedback(
        feedback_id, metric, None if retracts else json.loads(value), source, trace_id, episode_id,
        json.loads(evidence) if evidence else None, occurred_at,
    )  # fmt: skip


# On a trace, and on its episode; without a scope where it came before any trace, and the sender named none.
_ON = f"""
    SELECT 1, {_COLUMNS} FROM feedback WHERE {STANDING} AND trace_id = ? UNION ALL
    SELECT 0, {_COLUMNS} FROM feedback WHERE {STANDING}
    AND (scope_id = ? OR scope_id IS NULL) AND episode_id = ?"""
# The traces of an episode that a tenant may give feedback on; the empty tenant is the operator.
_OF_EPISODE = """
    SELECT trace_id FROM traces JOIN scopes ON scopes.id = scope_id
    WHERE ? IN ('', tenant) AND scope_id = coalesce(?, scope_id) AND episode_id = ?"""
