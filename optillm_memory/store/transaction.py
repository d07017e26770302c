"""The write side: what is done to the log and to the derived tables inside one operation of the writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from optillm_memory.errors import InvalidField
from optillm_memory.learn.attempts import environment_of
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import Feedback, FeedbackStatus, Injected, Placement, Scope, Trace, Verdict
from optillm_memory.store.maintenance.forget import ForgetTables
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.tables import rows
from optillm_memory.store.tables.calls import CallTables
from optillm_memory.store.tables.decisions import DecisionTables
from optillm_memory.store.tables.exemplars import ExemplarTables
from optillm_memory.store.tables.exposures import ExposureTables
from optillm_memory.store.tables.proposals import ProposalTables
from optillm_memory.store.tables.steps import StepTables
from optillm_memory.store.tables.vectors import VectorTables

PENDING_S = 7 * 86_400.0
_SHARED_BY = 256  # changes that have one revision: whoever reads them takes all of it at once
# On a trace, and on its episode; without a scope where it came before any trace and the sender named none.
_SAID = f"""
    SELECT 1, {rows.FEEDBACK_COLUMNS} FROM feedback WHERE {rows.STANDING} AND trace_id = ? UNION ALL
    SELECT 0, {rows.FEEDBACK_COLUMNS} FROM feedback WHERE {rows.STANDING}
    AND (scope_id = ? OR scope_id IS NULL) AND episode_id = ?"""
# Whether anything is written of a trace and of its episode, but for what `add_trace` writes of a plain one.
_TOUCHED = """
    SELECT (SELECT count(*) FROM traces WHERE scope_id = ? AND episode_id = ?) > 1
        OR EXISTS (SELECT 1 FROM injections WHERE trace_id = ?) OR EXISTS (SELECT 1 FROM proposals WHERE trace_id = ?)
        OR EXISTS (SELECT 1 FROM decisions WHERE trace_id = ?) OR EXISTS (SELECT 1 FROM feedback WHERE trace_id = ?)
        OR EXISTS (SELECT 1 FROM feedback WHERE episode_id = ?)
        OR EXISTS (SELECT 1 FROM steps WHERE scope_id = ? AND episode_id = ?)"""
# The traces of an episode that a tenant may speak of; the empty tenant is the operator at the machine.
_OF_EPISODE = """
    SELECT trace_id FROM traces JOIN scopes ON scopes.id = scope_id
    WHERE ? IN ('', tenant) AND scope_id = coalesce(?, scope_id) AND episode_id = ?"""
_RECENT = 64  # traces at hand: what is written about them comes soon after them, or after what was read of them


class Transaction(
    ExposureTables, ExemplarTables, StepTables, ProposalTables, DecisionTables, CallTables, ForgetTables, VectorTables
):
    """The operations of one commit on the writing connection; satisfies `learn.fold.Log`."""

    def __init__(self, connection: Connection, normal: Callable[[str], str] = normal_answer) -> None:
        """Wrap the connection; the writer commits. `normal` gives the form in which answers are compared."""
        self._db = connection
        self.normal = normal
        self._scope_ids: dict[Scope, int] = {}
        self._latest: tuple[Scope, int] | None = None
        self._recent: dict[str, Trace] = {}
        self._untouched: dict[tuple[Scope, str], str] = {}  # episodes with one trace, of which nothing is said
        self._revision = self._sharing = 0

    # -- the log -----------------------------------------------------------------------------------

    def scope_id(self, scope: Scope) -> int:
        """Return the scope's number, made at first use."""
        if self._latest is not None and self._latest[0] is scope:
            return self._latest[1]
        if (known := self._scope_ids.get(scope)) is None:
            key = (scope.tenant, scope.namespace, scope.user_id, scope.agent_id)
            row = self._db.execute(rows.SCOPE_ID, key).fetchone() or self._db.execute(rows.INSERT_SCOPE, key).fetchone()
            known = self._scope_ids[scope] = int(row[0])
        self._latest = scope, known
        return known

    def add_trace(
        self,
        trace: Trace,
        *,
        prefixes: Sequence[str] = (),
        placements: Sequence[Placement] = (),
        injected: Sequence[Injected] = (),
        withheld: Sequence[Injected] = (),
    ) -> bool:
        """Append a trace with its prefixes, ledger entries and what was injected or withheld; False if there."""
        scope_id = self.scope_id(trace.scope)
        inserted = self._db.execute(
            rows.INSERT_TRACE, (*rows.trace_values(trace, scope_id), rows.key_hash(trace.task))
        ).rowcount
        if not inserted:
            return False
        self._remember(trace)
        self._untouched.pop((trace.scope, trace.episode_id), None)
        self._db.executemany(
            "INSERT INTO prefixes(scope_id, hash, episode_id, trace_id) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [(scope_id, prefix, trace.episode_id, trace.trace_id) for prefix in prefixes],
        )
        self._put_many(
            "INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (
                    scope_id, trace.episode_id, p.anchor, p.position, p.form, json.dumps(p.payload),
                    json.dumps([i.as_dict() for i in p.items]),
                )
                for p in placements
            ],
        )  # fmt: skip
        self._put_many(
            "INSERT INTO injections(trace_id, memory_id, kind, score, tokens, suggestion, withheld) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (trace.trace_id, i.memory_id, i.kind, i.score, i.tokens, i.suggestion, held)
                for held, items in ((0, injected), (1, withheld))
                for i in items
            ],
        )
        return True

    def _put_many(self, sql: str, values: Sequence[tuple[Any, ...]]) -> None:
        if values:  # often there is nothing to put
            self._db.executemany(sql, values)

    def add_feedback(
        self, tenant: str, scope_id: int | None, feedback: Feedback, received_at: float
    ) -> FeedbackStatus | None:
        """Append feedback; return `duplicate` or `retracted` where that settles it, None where it is new.

        Raises InvalidField where the id was used before for something else.
        """
        retracts = feedback.value is None
        if feedback.trace_id and not retracts:
            self._spoken_of(feedback.trace_id)
        else:  # of whatever
            self._untouched.clear()
        before = self._db.execute(
            "SELECT retracts, trace_id, episode_id, metric, value, source FROM feedback "
            "WHERE tenant = ? AND feedback_id = ?",
            (tenant, feedback.feedback_id),
        ).fetchall()
        for row in before:
            if bool(row[0]) != retracts:
                continue
            said = (
                feedback.trace_id,
                feedback.episode_id,
                feedback.metric,
                json.dumps(feedback.value),
                feedback.source,
            )
            if not retracts and tuple(row[1:]) != said:
                raise InvalidField(
                    "feedback.feedback_id",
                    f"{feedback.feedback_id!r} was used before with other content; retract it (value null) "
                    "and send a new id",
                )
            return "retracted" if retracts else "duplicate"
        self._db.execute(
            rows.INSERT_FEEDBACK,
            (
                tenant, feedback.feedback_id, int(retracts), scope_id, feedback.trace_id, feedback.episode_id,
                feedback.metric, json.dumps(feedback.value), feedback.source,
                json.dumps(feedback.evidence) if feedback.evidence else None, feedback.occurred_at, received_at,
            ),
        )  # fmt: skip
        return "retracted" if retracts or any(row[0] for row in before) else None

    def feedback_targets(self, tenant: str, scope_id: int | None, feedback: Feedback) -> list[str]:
        """Return the traces that a feedback speaks of; a retraction speaks of what it retracts."""
        speaking: list[tuple[Any, ...]] = [(feedback.trace_id, feedback.episode_id, scope_id)]
        if feedback.value is None:
            speaking = self._db.execute(
                "SELECT trace_id, episode_id, scope_id FROM feedback WHERE tenant = ? AND feedback_id = ?",
                (tenant, feedback.feedback_id),
            ).fetchall()
        targets: list[str] = []
        for trace_id, episode_id, within in speaking:
            if not trace_id:
                targets += [row[0] for row in self._db.execute(_OF_EPISODE, (tenant, within, episode_id)).fetchall()]
            elif (trace := self.trace(trace_id)) is not None and tenant in ("", trace.scope.tenant):
                targets.append(trace_id)
        return list(dict.fromkeys(targets))

    def tenant_of_feedback(self, feedback_id: str) -> str | None:
        """Return whose feedback this is, where only one tenant has such an id."""
        found = self._db.execute(
            "SELECT DISTINCT tenant FROM feedback WHERE feedback_id = ?", (feedback_id,)
        ).fetchall()
        return str(found[0][0]) if len(found) == 1 else None

    def episode_scopes(self, tenant: str, episode_id: str) -> list[int]:
        """Return the scopes of a tenant (all, for the operator) that have an episode of this name."""
        found = self._db.execute(
            "SELECT DISTINCT scope_id FROM traces JOIN scopes ON scopes.id = scope_id "
            "WHERE episode_id = ? AND (? = '' OR tenant = ?)",
            (episode_id, tenant, tenant),
        ).fetchall()
        return [int(row[0]) for row in found]

    # -- what the fold reads -----------------------------------------------------------------------

    def trace(self, trace_id: str) -> Trace | None:
        """Return a trace."""
        if (trace := self._recent.get(trace_id)) is not None:
            return trace
        row = self._db.execute(f"{rows.SELECT_TRACE} WHERE trace_id = ?", (trace_id,)).fetchone()
        return self._remember(rows.trace_of(row)) if row else None

    def _remember(self, trace: Trace) -> Trace:
        if len(self._recent) >= _RECENT:
            del self._recent[next(iter(self._recent))]
        self._recent[trace.trace_id] = trace
        return trace

    def keep_untouched(self, trace: Trace) -> bool:
        """Return whether nothing but a trace itself is written of it and of its episode; keep that for this commit."""
        of_episode = (self.scope_id(trace.scope), trace.episode_id)
        asked = (*of_episode, *(trace.trace_id,) * 4, trace.episode_id, *of_episode)
        touched = self._db.execute(_TOUCHED, asked).fetchone()[0]
        if not touched:
            self._untouched[trace.scope, trace.episode_id] = trace.trace_id
        return not touched

    def untouched(self, trace_id: str, received_at: float) -> Trace | None:
        """Return a trace that was kept as untouched, and still is, where feedback of such an age may speak of it.

        It is asked for once: then it is spoken of.
        """
        trace = self._recent.get(trace_id)
        if trace is None or self._untouched.pop((trace.scope, trace.episode_id), None) != trace_id:
            return None
        return trace if received_at >= trace.created_at - PENDING_S else None

    def _spoken_of(self, trace_id: str) -> None:
        """Take note that something is written of a trace: it is not untouched."""
        if (trace := self._recent.get(trace_id)) is not None:
            self._untouched.pop((trace.scope, trace.episode_id), None)

    def feedback_on(self, trace: Trace) -> tuple[list[Feedback], list[Feedback]]:
        """Return feedback on the trace and on its episode; what waited longer than 7 days for it has expired."""
        standing = (trace.scope.tenant, trace.created_at - PENDING_S)
        found = self._db.execute(
            _SAID, (*standing, trace.trace_id, *standing, self.scope_id(trace.scope), trace.episode_id)
        ).fetchall()
        own = [rows.feedback_of(row[1:]) for row in found if row[0]]
        return own, [rows.feedback_of(row[1:]) for row in found if not row[0]]

    def closing_trace(self, scope: Scope, episode_id: str) -> str | None:
        """Return the latest trace of the episode that has an answer in words."""
        row = self._db.execute(
            "SELECT trace_id FROM traces WHERE scope_id = ? AND episode_id = ? AND answer > '' "
            "ORDER BY created_at DESC, trace_id DESC LIMIT 1",
            (self.scope_id(scope), episode_id),
        ).fetchone()
        return str(row[0]) if row else None

    def episode_traces(self, scope: Scope, episode_id: str) -> list[str]:
        """Return the ids of an episode's traces, oldest first."""
        found = self._db.execute(
            "SELECT trace_id FROM traces WHERE scope_id = ? AND episode_id = ? ORDER BY created_at, trace_id",
            (self.scope_id(scope), episode_id),
        ).fetchall()
        return [str(row[0]) for row in found]

    def episode_verdict(self, scope: Scope, episode_id: str) -> Verdict:
        """Return the latest verified outcome among an episode's traces."""
        row = self._db.execute(
            "SELECT verdict FROM outcomes JOIN traces USING (trace_id) WHERE scope_id = ? AND episode_id = ? "
            "AND verified ORDER BY created_at DESC, trace_id DESC LIMIT 1",
            (self.scope_id(scope), episode_id),
        ).fetchone()
        return row[0] if row else "unknown"

    def environments(self, scope: Scope, episode_id: str) -> dict[str, str]:
        """Return the environment of each trace of an episode."""
        found = self._db.execute(
            "SELECT trace_id, tags FROM traces WHERE scope_id = ? AND episode_id = ?",
            (self.scope_id(scope), episode_id),
        )
        return {row[0]: environment_of(json.loads(row[1])) for row in found}

    def demonstrated(self, scope: Scope, episode_id: str) -> list[Trace]:
        """Return the traces of an episode that feedback, on them or on the episode, shows the right way of."""
        scope_id = self.scope_id(scope)
        found = self._db.execute(
            "SELECT traces.trace_id FROM traces CROSS JOIN feedback ON feedback.trace_id = traces.trace_id "
            "WHERE traces.scope_id = ? AND traces.episode_id = ? AND metric = 'demonstration'",
            (scope_id, episode_id),
        ).fetchall()
        if self._db.execute(
            "SELECT 1 FROM feedback WHERE episode_id = ? AND metric = 'demonstration' LIMIT 1", (episode_id,)
        ).fetchone():
            found += self._db.execute(
                "SELECT trace_id FROM traces WHERE scope_id = ? AND episode_id = ? "
                "ORDER BY created_at DESC, trace_id DESC LIMIT 1",
                (scope_id, episode_id),
            ).fetchall()
        shown = sorted({row[0] for row in found})
        return [trace for trace_id in shown if (trace := self.trace(trace_id)) is not None]

    def episodes(self) -> list[tuple[Scope, str]]:
        """Return every episode."""
        found = self._db.execute(
            "SELECT tenant, namespace, user_id, agent_id, episode_id FROM traces JOIN scopes ON scopes.id = scope_id "
            "GROUP BY tenant, namespace, user_id, agent_id, episode_id ORDER BY min(created_at)"
        ).fetchall()
        return [(Scope(*row[:4]), str(row[4])) for row in found]

    # -- what the fold writes ----------------------------------------------------------------------

    def weigh(self, scope: Scope, episode_id: str) -> None:
        """Bring up to date what an episode says of its memories' uplift, and whether they are retired."""
        scope_id = self.scope_id(scope)
        if touched := self.put_exposures(scope_id, episode_id):
            revision = self._next("revision")
            for memory_id in sorted(touched):
                if memory_id.startswith("fix-"):
                    self._refresh_fix(scope_id, memory_id, revision)
                else:
                    self._refresh_memory(memory_id, revision)

    # -- caches and upkeep -------------------------------------------------------------------------

    def put_vectors(self, vectors: Iterable[tuple[str, bytes]], fingerprint: str) -> None:
        """Keep vectors by key hash; a memory that had none becomes searchable with the next revision."""
        self._db.executemany(
            "INSERT INTO vectors(key_hash, fingerprint, vector) VALUES (?, ?, ?) "
            "ON CONFLICT (key_hash, fingerprint) DO NOTHING",
            [(key, fingerprint, self._as_stored(vector)) for key, vector in vectors],
        )

    def _as_stored(self, vector: bytes) -> Any:
        """Return a vector's float32 numbers in the form of its column."""
        return vector

    def touch(self, numbers: Iterable[int]) -> None:
        """Give memories a new revision, so that every process loads them again."""
        revision = self._next("revision")
        self._db.executemany("UPDATE memories SET revision = ? WHERE number = ?", [(revision, n) for n in numbers])

    def probe(self) -> None:
        """Write one value: whether writing works at all."""
        self._db.execute("INSERT INTO meta VALUES ('probe', 1) ON CONFLICT (key) DO UPDATE SET value = meta.value + 1")

    def clear_derived(self) -> list[str]:
        """Empty what is derived from the log; return all trace ids in order, to be folded again."""
        self._untouched.clear()
        for table in (
            "memories",
            "memories_fts",
            "contributions",
            "outcomes",
            "attempts",
            "fixes",
            "fix_evidence",
            "exposures",
            "rewards",
        ):
            self._db.execute(f"DELETE FROM {table}")
        self._db.execute("UPDATE labels SET correct = NULL, revision = ?", (self._next("revision"),))
        self._next("generation")
        return [row[0] for row in self._db.execute("SELECT trace_id FROM traces ORDER BY created_at, trace_id")]

    def drop_empty_scopes(self) -> int:
        """Delete the names of scopes that nothing is left of; return how many there were."""
        self._scope_ids.clear()
        self._latest = None
        return super().drop_empty_scopes()

    def _next(self, counter: str) -> int:
        """Return a counter's next value. Changes of one commit share revisions: they are seen together anyway."""
        if counter == "revision":
            self._sharing += 1
            if self._sharing % _SHARED_BY != 1:
                return self._revision
        row = self._db.execute("UPDATE meta SET value = value + 1 WHERE key = ? RETURNING value", (counter,)).fetchone()
        self._revision = int(row[0]) if counter == "revision" else self._revision
        return int(row[0])
