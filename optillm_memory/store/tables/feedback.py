"""The table `feedback`: appended once for each id, and retracted by another row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from optillm_memory.errors import InvalidField, NotAllowed
from optillm_memory.learn.outcomes import weighed
from optillm_memory.records import (
    EVERYTHING,
    NARROWING,
    TRUSTED,
    Feedback,
    FeedbackStatus,
    Scope,
    Trace,
    View,
)
from optillm_memory.store.announced import Submission, padded
from optillm_memory.store.sqlite.connection import Connection, WritingConnection, marks
from optillm_memory.store.tables.scopes import ScopeTable, known, seen
from optillm_memory.store.tables.traces import PENDING_S, TraceTable

_COLUMNS = (
    "feedback_id, retracts, trace_id, episode_id, metric, value, source, evidence, occurred_at, reporter, trust, "
    "valid_until"
)
# What a call that is narrowed to a user says has ids of that user's own: no other user can take or retract them.
OF_USER = "\x1f"


def _covers(table: str) -> str:
    """Return the condition that what a row of feedback was narrowed to covers a scope: (namespace, user, agent)."""
    return " AND ".join(f"coalesce({table}.within_{name}, ?) = ?" for name in NARROWING)


# A trace's own tenant and the operator (the empty tenant) may give feedback on it, if the call was not narrowed to
# others; so it is with what retracts it. What a reporter said under strict trust is taken back by that reporter, or by
# who is trusted. Retractions are counted, because PostgreSQL takes NOT EXISTS as a join, and reads all of them.
# `standing` gives the values.
STANDING = f"""NOT retracts AND tenant IN ('', ?) AND received_at >= ? AND {_covers("feedback")}
    AND reporter NOT IN (SELECT reporter FROM revoked) AND 0 = (
    SELECT count(*) FROM feedback AS r WHERE r.tenant = feedback.tenant
    AND r.feedback_id IN (feedback.feedback_id, feedback.feedback_id || ?, replace(feedback.feedback_id, ?, ''))
    AND r.retracts AND {_covers("r")} AND (feedback.trust = 'open' OR feedback.reporter = ''
        OR r.reporter IN (feedback.reporter, {", ".join(f"'{name}'" for name in sorted(TRUSTED))})))"""


def standing(scope: Scope, since: float) -> tuple[Any, ...]:
    """Return the values of `STANDING` for what is in a scope, and was not received before a moment."""
    covered = _covered(scope)
    return (scope.tenant, since, *covered, *(OF_USER + scope.user_id,) * 2, *covered)


def _covered(scope: Scope) -> tuple[str, ...]:
    """Return the values of `_covers`."""
    return tuple(value for name in NARROWING for value in (getattr(scope, name),) * 2)


def kept_id(feedback_id: str, view: View) -> str:
    """Return the id under which what a call says is kept."""
    return f"{feedback_id}{OF_USER}{view.user_id}" if view.user_id else feedback_id


# What bears an id, whoever said it.
_OF_ANY_USER = "(feedback_id = ? OR (feedback_id >= ? AND feedback_id < ?))"


def _ids(feedback_id: str) -> tuple[str, str, str]:
    return feedback_id, feedback_id + OF_USER, feedback_id + chr(ord(OF_USER) + 1)


# Feedback for a trace or an episode that is not there.
TARGETLESS = """NOT EXISTS (SELECT 1 FROM traces WHERE traces.trace_id = feedback.trace_id)
    AND NOT EXISTS (SELECT 1 FROM traces WHERE traces.episode_id = feedback.episode_id)"""


@dataclass
class FeedbackTable:
    """The write half, and what the fold reads."""

    db: WritingConnection
    scopes: ScopeTable
    traces: TraceTable
    _absent: set[tuple[str, str]] = field(default_factory=set)  # (tenant, id) of feedback that is not there

    def read_ahead(self, submissions: Iterable[Submission]) -> None:
        """Read at once which of some ids of feedback were used before."""
        asked: dict[str, list[str]] = {}
        for item in submissions:
            asked.setdefault(item.tenant, []).append(item.feedback_id)
        for tenant, names in asked.items():
            self._absent |= {(tenant, name) for name in set(names) - self.known(tenant, names)}

    def add(
        self, tenant: str, scope_id: int | None, feedback: Feedback, received_at: float, within: View = EVERYTHING
    ) -> FeedbackStatus | None:
        """Append feedback; return `duplicate` or `retracted` where that settles it, None where it is new.

        It counts on no trace that is not `within` the view (of any tenant) of the call that gave it. Raises
        InvalidField where the id was used before with other content, and NotAllowed where it retracts what another
        reporter said.
        """
        retracts = feedback.value is None
        self.traces.touch(None if retracts else feedback.trace_id or None)
        content = (
            feedback.trace_id, feedback.episode_id, feedback.metric, json.dumps(feedback.value), feedback.source,
            feedback.valid_until,
        )  # fmt: skip
        key = (tenant, kept_id(feedback.feedback_id, within))
        before = [] if key in self._absent else self.db.execute(_BEFORE, key).fetchall()
        self._absent.discard(key)
        if retracts and feedback.reporter not in TRUSTED:
            self._refuse_others(*key, feedback.reporter)
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
        values = (
            *key, int(retracts), scope_id, *content, evidence, feedback.occurred_at, received_at, feedback.reporter,
            feedback.trust, within.namespace, within.user_id, within.agent_id,
        )  # fmt: skip
        self.db.later(_INSERT, [values])
        return "retracted" if retracts or any(row[0] for row in before) else None

    def known(self, tenant: str, feedback_ids: Sequence[str]) -> set[str]:
        """Return those of the ids that feedback of a tenant, or its retraction, has."""
        asked = padded(feedback_ids)
        sql = f"SELECT feedback_id FROM feedback WHERE tenant = ? AND feedback_id IN ({marks(asked)})"
        return {row[0] for row in self.db.execute(sql, (tenant, *asked)).fetchall()}

    def _refuse_others(self, tenant: str, kept: str, reporter: str) -> None:
        """Refuse to retract what another reporter said under strict trust. Raises NotAllowed."""
        found = self.db.execute(
            "SELECT reporter FROM feedback WHERE tenant = ? AND feedback_id = ? AND NOT retracts "
            "AND trust = 'strict' AND reporter NOT IN ('', ?)",
            (tenant, kept, reporter),
        ).fetchone()
        if found is not None:
            raise NotAllowed("not_the_reporter", f"only {found[0]!r}, who reported it, or the operator may retract it")

    def targets(self, view: View, scope_id: int | None, feedback: Feedback) -> list[str]:
        """Return the traces of a view that feedback is on; a retraction is on those of what it retracts."""
        named: list[tuple[Any, ...]] = [(feedback.trace_id, feedback.episode_id, scope_id)]
        if feedback.value is None:
            named = self.db.execute(
                f"SELECT trace_id, episode_id, scope_id FROM feedback WHERE tenant = ? AND {_OF_ANY_USER}",
                (view.tenant or "", *_ids(feedback.feedback_id)),
            ).fetchall()
        condition, values = seen(view)
        targets: list[str] = []
        for trace_id, episode_id, of_scope in named:
            if not trace_id:
                found = self.db.execute(f"{_OF_EPISODE} AND {condition}", (of_scope, episode_id, *values)).fetchall()
                targets += [row[0] for row in found]
            elif (trace := self.traces.get(trace_id)) is not None and view.covers(trace.scope):
                targets.append(trace_id)
        return list(dict.fromkeys(targets))

    def tenant_of(self, feedback_id: str) -> str | None:
        """Return whose feedback this is, where only one tenant has such an id."""
        sql = f"SELECT DISTINCT tenant FROM feedback WHERE {_OF_ANY_USER}"
        found = self.db.execute(sql, _ids(feedback_id)).fetchall()
        return str(found[0][0]) if len(found) == 1 else None

    def on(self, trace: Trace) -> tuple[list[Feedback], list[Feedback]]:
        """Return feedback on the trace and on its episode, as it counts; what waited longer than 7 days has expired."""
        values = standing(trace.scope, trace.created_at - PENDING_S)
        of_episode = (self.scopes.number(trace.scope), trace.episode_id)
        found = self.db.execute(_ON, (*values, trace.trace_id, *values, *of_episode)).fetchall()
        said = list(zip(found, weighed([_feedback_of(row[1:]) for row in found], trace.askers), strict=True))
        own, shared = ([item for row, item in said if row[0] == is_own] for is_own in (1, 0))
        return own, shared

    def is_revoked(self, reporter: str) -> bool:
        """Whether a reporter was revoked."""
        return self.db.execute("SELECT 1 FROM revoked WHERE reporter = ?", (reporter,)).fetchone() is not None

    def revoke(self, reporter: str, at: float) -> list[str]:
        """Note that what a reporter said counts no more; return the traces that it was on."""
        self.traces.touch(None)
        self.db.execute("INSERT INTO revoked VALUES (?, ?) ON CONFLICT DO NOTHING", (reporter, at))
        found = self.db.execute(
            "SELECT trace_id FROM feedback WHERE reporter = ? AND trace_id IS NOT NULL UNION "
            "SELECT traces.trace_id FROM feedback JOIN traces USING (episode_id) WHERE reporter = ?",
            (reporter, reporter),
        ).fetchall()
        return sorted(row[0] for row in found)


def standing_on(
    db: Connection, scope: Scope, trace_ids: Sequence[str], episode_ids: Sequence[str], since: float
) -> list[Feedback]:
    """Return feedback in force on some traces and episodes of a scope, received since a moment."""
    values = standing(scope, since)
    found = db.execute(
        f"SELECT {_COLUMNS} FROM feedback WHERE {STANDING} AND trace_id IN ({marks(trace_ids)}) UNION ALL "
        f"SELECT {_COLUMNS} FROM feedback WHERE {STANDING} "
        f"AND (scope_id = ? OR scope_id IS NULL) AND episode_id IN ({marks(episode_ids)})",
        (*values, *trace_ids, *values, known(db, scope), *episode_ids),
    ).fetchall()
    return [_feedback_of(row) for row in found]


def reporters(db: Connection) -> list[tuple[str, int, float, bool]]:
    """Return (name, how much they said, when last, whether revoked) of all reporters, by name."""
    found = db.execute(
        "SELECT feedback.reporter, count(*), max(received_at), count(revoked.reporter) FROM feedback "
        "LEFT JOIN revoked ON revoked.reporter = feedback.reporter WHERE feedback.reporter <> '' "
        "GROUP BY feedback.reporter UNION SELECT reporter, 0, at, 1 FROM revoked "
        "WHERE reporter NOT IN (SELECT reporter FROM feedback)"
    ).fetchall()
    return sorted((str(name), int(count), float(last), bool(gone)) for name, count, last, gone in found)


def retracted(db: Connection, scope: Scope, feedback_ids: Sequence[str]) -> set[str]:
    """Return those of these ids that were retracted for what is in a scope."""
    names = {f"{name}{suffix}": name for name in feedback_ids for suffix in ("", OF_USER + scope.user_id)}
    found = db.execute(
        f"SELECT feedback_id FROM feedback WHERE tenant IN (?, '') AND retracts AND {_covers('feedback')} "
        f"AND feedback_id IN ({marks(names)})",
        (scope.tenant, *_covered(scope), *names),
    ).fetchall()
    return {names[row[0]] for row in found}


def drop_retractions(db: Connection, tenant: str, feedback_id: str) -> None:
    """Delete what retracts an id, where nothing that bears it is left."""
    family = _ids(feedback_id.partition(OF_USER)[0])
    db.execute(
        f"DELETE FROM feedback WHERE tenant = ? AND retracts AND {_OF_ANY_USER} AND 0 = (SELECT count(*) "
        f"FROM feedback WHERE tenant = ? AND NOT retracts AND {_OF_ANY_USER})",
        (tenant, *family, tenant, *family),
    )


def waiting_count(db: Connection, tenant: str | None) -> int:
    """Return how much feedback of a tenant, or of all for None, is for traces that are not there."""
    condition, values = (TARGETLESS, ()) if tenant is None else (f"tenant = ? AND {TARGETLESS}", (tenant,))
    return int(db.execute(f"SELECT count(*) FROM feedback WHERE {condition}", values).fetchone()[0])


def feedback_shown(db: Connection, trace: Trace, scope_id: int) -> list[Feedback]:
    """Return all feedback on a trace and on its episode, with what was retracted, oldest first."""
    found = db.execute(
        f"SELECT {_COLUMNS} FROM feedback WHERE (trace_id = ? OR (coalesce(scope_id, ?) = ? AND episode_id = ?)) "
        f"AND {_covers('feedback')} AND coalesce(tenant, '') IN ('', ?) ORDER BY occurred_at, feedback_id",
        (trace.trace_id, scope_id, scope_id, trace.episode_id, *_covered(trace.scope), trace.scope.tenant),
    ).fetchall()
    return [_feedback_of(row) for row in found]


def _feedback_of(row: tuple[Any, ...]) -> Feedback:
    feedback_id, retracts, trace_id, episode_id, metric, value, source, evidence, *rest = row
    return Feedback(
        feedback_id.partition(OF_USER)[0], metric, None if retracts else json.loads(value), source, trace_id,
        episode_id, json.loads(evidence) if evidence else None, *rest,
    )  # fmt: skip


_BEFORE = """
    SELECT retracts, trace_id, episode_id, metric, value, source, valid_until FROM feedback
    WHERE tenant = ? AND feedback_id = ?"""
_INSERT = (
    "INSERT INTO feedback(tenant, feedback_id, retracts, scope_id, trace_id, episode_id, metric, value, source, "
    "valid_until, evidence, occurred_at, received_at, reporter, trust, within_namespace, within_user_id, "
    "within_agent_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
# On a trace, and on its episode; without a scope where it came before any trace, and the sender named none.
_ON = f"""
    SELECT 1, {_COLUMNS} FROM feedback WHERE {STANDING} AND trace_id = ? UNION ALL
    SELECT 0, {_COLUMNS} FROM feedback WHERE {STANDING}
    AND (scope_id = ? OR scope_id IS NULL) AND episode_id = ?"""
_OF_EPISODE = """
    SELECT trace_id FROM traces JOIN scopes ON scopes.id = scope_id
    WHERE scope_id = coalesce(?, scope_id) AND episode_id = ?"""
