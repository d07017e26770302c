"""The tables `fixes` and `fix_evidence`: what repaired a failing action, and the evidence on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.learn.attempts import OUTPUT_LIMIT, environment_of, shortened
from optillm_memory.learn.dialect import LANGUAGE
from optillm_memory.learn.fixes import SUGGESTED, Fix, FixEvidence, fix_status, value_in, voices_of
from optillm_memory.records import KnownFix, PastAttempt, Scope
from optillm_memory.store.backend import Pool, Seal
from optillm_memory.store.sqlite.connection import Connection, marks, objects
from optillm_memory.store.tables import memories, scopes
from optillm_memory.store.tables.exposures import ExposureTable
from optillm_memory.store.tables.memories import HOLDS
from optillm_memory.store.tables.meta import Counters
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.traces import TraceTable


@dataclass
class FixTable:
    """The write half, and what the fold reads."""

    db: Connection
    scopes: ScopeTable
    counters: Counters
    traces: TraceTable
    exposures: ExposureTable

    def advice_given(self, scope: Scope, episode_id: str) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Return by trace the (memory id, suggested action) of the fixes that were injected in an episode."""
        given: dict[str, list[tuple[str, str]]] = {}
        for trace_id, memory_id, suggestion in self.db.execute(
            "SELECT trace_id, memory_id, suggestion FROM injections JOIN traces USING (trace_id) "
            "WHERE scope_id = ? AND episode_id = ? AND suggestion IS NOT NULL AND NOT withheld",
            (self.scopes.number(scope), episode_id),
        ):
            given.setdefault(trace_id, []).append((memory_id, suggestion))
        return given

    def put_evidence(self, scope: Scope, episode_id: str, evidence: Sequence[FixEvidence]) -> None:
        """Replace an episode's evidence on fixes, and bring every fix that it concerns up to date."""
        scope_id = self.scopes.number(scope)
        of_episode = "FROM fix_evidence WHERE scope_id = ? AND episode_id = ?"
        touched = {row[0] for row in self.db.execute(f"SELECT memory_id {of_episode}", (scope_id, episode_id))}
        if touched:
            self.db.execute(f"DELETE {of_episode}", (scope_id, episode_id))
        environments = self.traces.environments(scope, episode_id) if evidence else {}
        for item in evidence:
            if item.fix is not None:
                self._define(scope_id, item.memory_id, item.fix)
            self.db.execute(
                "INSERT INTO fix_evidence VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    item.memory_id, scope_id, episode_id, item.step_id, item.role, int(item.success),
                    int(item.verified), item.trace_id, environments.get(item.trace_id, "{}"),
                ),
            )  # fmt: skip
            touched.add(item.memory_id)
        if touched:
            revision = self.counters.revision()
            for memory_id in sorted(touched):
                self.refresh(scope_id, memory_id, revision)

    def refresh(self, scope_id: int, memory_id: str, revision: int) -> None:
        """Bring a fix's row in `memories` up to date with all evidence on it."""
        fix = self.db.execute("SELECT action, text FROM fixes WHERE memory_id = ?", (memory_id,)).fetchone()
        if fix is None:
            return  # followed before it was mined, as it can be while the log is read again
        found = self.db.execute(f"{_TALLIES} AND memory_id = ? GROUP BY memory_id, environment", (memory_id,))
        tallies = [tuple(int(n) for n in row[2:]) for row in found.fetchall()]
        # That it was followed is no origin: where no other evidence is left, it is gone, as after a rebuild.
        origin = self.db.execute(
            "SELECT 1 FROM fix_evidence WHERE memory_id = ? AND role <> 'followed' LIMIT 1", (memory_id,)
        ).fetchone()
        state = fix_status(tallies) if origin else "withdrawn"  # type: ignore[arg-type]
        if state == "candidate":
            state = fix_status(tallies, voices_of(self.db.execute(_FOUND_IN, (memory_id,)).fetchall()))  # type: ignore[arg-type]
        if not origin:
            self.db.execute("DELETE FROM fixes WHERE memory_id = ?", (memory_id,))
            fix = ("", "")
        if state in (*SUGGESTED, "candidate") and self.exposures.is_retired(memory_id):
            state = "retired"
        first = self.db.execute(
            "SELECT created_at FROM fix_evidence JOIN traces USING (trace_id) WHERE memory_id = ? "
            "ORDER BY created_at LIMIT 1",
            (memory_id,),
        ).fetchone()
        counts = [sum(t[i] for t in tallies) for i in range(4)]
        holds = self.db.execute(_HOLDS_UNTIL, (memory_id,)).fetchone()
        values = (*fix, state, *counts, first[0] if first else 0.0, revision, holds[0] if holds else None)
        known = self.db.execute("SELECT number FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
        if known is not None:
            self.db.execute(_UPDATE, (*values, known[0]))
        elif origin:
            self.db.execute(_INSERT, (memory_id, scope_id, *values))

    def _define(self, scope_id: int, memory_id: str, fix: Fix) -> None:
        self.db.execute(
            # Equal but for white space and the like: which one is kept must not depend on which came first.
            "INSERT INTO fixes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (memory_id) DO UPDATE SET "
            "action = CASE WHEN fixes.action < excluded.action THEN fixes.action ELSE excluded.action END, "
            "output = CASE WHEN fixes.output < excluded.output THEN fixes.output ELSE excluded.output END, "
            "text = CASE WHEN fixes.text < excluded.text THEN fixes.text ELSE excluded.text END",
            (
                memory_id, scope_id, fix.action.tool, fix.action.field, fix.action.text[:OUTPUT_LIMIT],
                shortened(fix.output), fix.signature, fix.relation, fix.text[:OUTPUT_LIMIT],
            ),
        )  # fmt: skip


@dataclass
class FixReads:
    """The read half, for advice; every call is bound to one scope."""

    readers: Pool
    seal: Seal
    clock: Callable[[], float]

    def known_fixes(
        self,
        scope: Scope,
        tool: str,
        signature: str,
        *,
        environment: str,
        episode_id: str,
        start: str = "",
        action: str = "",
        output: str = "",
        limit: int = 200,
    ) -> list[KnownFix]:
        """Return the fixes of a tool's failures that may be suggested, those of the same error first.

        Among these come first those of this very `action`, and of this very `output`. `start` is what the failing
        actions begin with. What rests on the asking episode alone is excluded.
        """
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT number, {', '.join(_KNOWN)} FROM fixes "
                "JOIN memories USING (memory_id) WHERE fixes.scope_id = ? AND tool = ? "
                f"AND substr(action, 1, length(?)) = ? AND status IN {SUGGESTED} AND {HOLDS} "
                "AND EXISTS (SELECT 1 FROM fix_evidence WHERE success "
                "AND fix_evidence.memory_id = fixes.memory_id AND episode_id <> ?) "
                "ORDER BY signature = ? DESC, action = ? DESC, output = ? DESC, revision DESC, memory_id LIMIT ?",
                (
                    scopes.known(db, scope), tool, start, start, self.clock(), episode_id, signature, action,
                    shortened(output), limit,
                ),
            ).fetchall()  # fmt: skip
            found = [row[1:] for row in memories.as_written(self.seal, db, found)]
            ids = [row[0] for row in found]
            if (good := self.seal.genuine(db, "fixes", f"memory_id IN ({marks(ids)})", ids)) is not None:
                found = [row for row in found if row[0] in good]
            tallies: dict[str, dict[str, tuple[int, int, int, int]]] = {}
            for memory_id, where, *counts in db.execute(
                f"{_TALLIES} AND memory_id IN ({marks(found)}) GROUP BY memory_id, environment",
                [row[0] for row in found],
            ):
                right, wrong, likely, unlikely = (int(c or 0) for c in counts)
                tallies.setdefault(memory_id, {})[where] = (right, wrong, likely, unlikely)
        return [
            KnownFix(**dict(zip(_KNOWN, row, strict=True)), value=value_in(environment, tallies.get(row[0], {})))
            for row in found
        ]

    def details(self, scope: Scope, memory_id: str) -> dict[str, Any]:
        """Return what a fix repairs and the evidence on it; only the evidence where it is withdrawn."""
        with self.readers.borrow() as db:
            key = (scopes.known(db, scope), memory_id)
            columns = "tool, field, signature, relation, output"
            found = objects(db, f"SELECT {columns} FROM fixes WHERE scope_id = ? AND memory_id = ?", key)
            evidence = objects(
                db,
                "SELECT episode_id, trace_id, step_id, role, success, verified, environment FROM fix_evidence "
                "WHERE scope_id = ? AND memory_id = ? ORDER BY trace_id, step_id, role",
                key,
            )
        return {**(found[0] if found else {}), "evidence": evidence}

    def worked(self, scope: Scope, action_key: str, *, environment: str, limit: int = 200) -> list[str]:
        """Return the texts of actions that worked and start with the same word as this one, latest first."""
        tool, field, text = action_key.split("\x1f")[:3]
        start = f"{tool}\x1f{field}\x1f{text.split(' ')[0]}"
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT action_key, tags FROM {_TRIED} AND action_key >= ? AND action_key < ? "
                "AND verdict = 'success' ORDER BY at DESC LIMIT ?",
                (scopes.known(db, scope), start, start + "\U0010ffff", limit),
            ).fetchall()
        return [key.split("\x1f")[2] for key, tags in found if environment_of(json.loads(tags)) == environment]

    def served(self, scope: Scope, memory_id: str, task: str) -> bool:
        """Whether a fix was found in an episode with this task."""
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT 1 FROM fix_evidence JOIN traces USING (trace_id) WHERE fix_evidence.scope_id = ? "
                "AND memory_id = ? AND success AND task = ? LIMIT 1",
                (scopes.known(db, scope), memory_id, task),
            ).fetchone()
        return found is not None

    def dialect(self, scope: Scope, tool: str) -> frozenset[str]:
        """Return the forms of message that are errors of a tool in this scope."""
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT DISTINCT signature FROM attempts WHERE scope_id = ? AND action_key >= ? AND action_key < ? "
                "AND basis = ?",
                (scopes.known(db, scope), f"{tool}\x1f", f"{tool}\x20", LANGUAGE),
            ).fetchall()
        return frozenset(row[0] for row in found)

    def is_constant(self, scope: Scope, tool: str, word: str) -> bool:
        """Whether a word stands in actions of three tasks or more that did not fail, and so belongs to none."""
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT count(DISTINCT episode_id), count(DISTINCT task) FROM (SELECT attempts.episode_id, task FROM "
                f"{_TRIED} AND action_key >= ? AND action_key < ? AND verdict <> 'failure' "
                "AND instr(action_key, ?) > 0 LIMIT ?)",
                (scopes.known(db, scope), f"{tool}\x1f", f"{tool}\x20", word, _SEEN),
            ).fetchone()
        return bool(min(found) >= _TASKS)

    def past_attempts(self, scope: Scope, action_key: str, *, environment: str, limit: int = 50) -> list[PastAttempt]:
        """Return the earlier tries of an action in one environment, latest first."""
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT attempts.episode_id, step_id, verdict, basis, message, output, at, signature, tags "
                f"FROM {_TRIED} AND action_key = ? ORDER BY at DESC LIMIT ?",
                (scopes.known(db, scope), action_key, limit),
            ).fetchall()
        return [PastAttempt(*row) for *row, tags in found if environment_of(json.loads(tags)) == environment]


_KNOWN = ("memory_id", "status", "tool", "field", "action", "output", "signature", "relation", "text")
_TASKS = 3  # of which a constant stands in the actions
_SEEN = 300  # actions with a word that are looked at
_TRIED = """
    attempts JOIN steps USING (scope_id, episode_id, step_id) JOIN traces USING (trace_id)
    WHERE attempts.scope_id = ?"""
# Evidence on fixes by environment: verified and inferred successes and failures.
_TALLIES = """
    SELECT memory_id, environment, count(*) FILTER (WHERE verified AND success),
           count(*) FILTER (WHERE verified AND NOT success), count(*) FILTER (WHERE NOT verified AND success),
           count(*) FILTER (WHERE NOT verified AND NOT success) FROM fix_evidence WHERE TRUE"""
_FOUND_IN = """
    SELECT DISTINCT fix_evidence.episode_id, end_user FROM fix_evidence JOIN traces USING (trace_id)
    WHERE memory_id = ? AND success AND role = 'mined'"""
_INSERT = """
    INSERT INTO memories(memory_id, kind, scope_id, task, answer, frame, key_hash, status, successes, failures,
    used_successes, used_failures, created_at, revision, valid_until)
    VALUES (?, 'fix', ?, ?, ?, '', '', ?, ?, ?, ?, ?, ?, ?, ?)"""
_UPDATE = """
    UPDATE memories SET task = ?, answer = ?, status = ?, successes = ?, failures = ?, used_successes = ?,
    used_failures = ?, created_at = ?, revision = ?, valid_until = ? WHERE number = ?"""
# What was last verified of an episode that it was found in says until when.
_HOLDS_UNTIL = """
    SELECT outcomes.valid_until FROM fix_evidence JOIN traces ON traces.scope_id = fix_evidence.scope_id
    AND traces.episode_id = fix_evidence.episode_id JOIN outcomes ON outcomes.trace_id = traces.trace_id
    WHERE memory_id = ? AND role <> 'followed' AND fix_evidence.success
    ORDER BY outcomes.verified DESC, created_at DESC, traces.trace_id DESC LIMIT 1"""
