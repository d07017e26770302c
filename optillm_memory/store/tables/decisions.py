"""Decisions: the arms that the policy chose, and what became of the episodes they were chosen for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from optillm_memory.decide.policy import Choice, LoggedChoice, Situation
from optillm_memory.decide.policy_updater import Row
from optillm_memory.records import Scope, Trace
from optillm_memory.store.sqlite.connection import Connection, Readers
from optillm_memory.store.tables import rows

_REWARDS = {"success": 1.0, "failure": 0.0}


class DecisionTables:
    """The part of a transaction that has to do with the policy's choices."""

    _db: Connection

    def _next(self, counter: str) -> int:
        raise NotImplementedError

    def scope_id(self, scope: Scope) -> int:
        """Return the scope's number."""
        raise NotImplementedError

    def add_decision(self, trace: Trace, scope_id: int, choice: Choice, length: int) -> None:
        """Append the choice that an episode began with."""
        self._db.execute(
            "INSERT INTO decisions(trace_id, scope_id, arm, propensity, reason, cluster, probabilities, stake, length) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                trace.trace_id, scope_id, choice.arm.name, choice.propensity, choice.reason, choice.cluster,
                json.dumps(choice.probabilities), choice.stake, length,
            ),
        )  # fmt: skip

    def credit(self, scope: Scope, episode_id: str) -> None:
        """Bring up to date what the arm that an episode was given earned, and what the episode took in all."""
        key = (self.scope_id(scope), episode_id)
        decided = self._db.execute(_DECIDED, key).fetchone()
        if decided is None:
            return
        trace_id, before = decided[0], tuple(decided[1:])
        row = self._db.execute(_VERDICT, key).fetchone()
        tokens, latency_ms = self._db.execute(_TAKEN, key).fetchone()
        now = (_REWARDS[row[0]] if row else None, tokens, latency_ms)
        if before != now:
            self._db.execute(
                "INSERT INTO rewards VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (trace_id) DO UPDATE SET "
                "reward = excluded.reward, tokens = excluded.tokens, latency_ms = excluded.latency_ms, "
                "revision = excluded.revision",
                (trace_id, key[0], *now, self._next("revision")),
            )


class DecisionReads:
    """The part of the store that reads the policy's choices; every call is bound to one scope."""

    _readers: Readers

    def choices(self, scope: Scope, since: int, fingerprint: str) -> tuple[int, list[Row]]:
        """Return (revision, rows) of the choices that came, or of which more is known, after a revision, in order.

        A row has the vector of its request where this encoder has seen it.
        """
        with self._readers.borrow() as db:
            found = db.execute(_CHOICES, (fingerprint, rows.known_scope(db, scope), since)).fetchall()
        changed = [
            Row(
                trace_id,
                LoggedChoice(arm, json.loads(probabilities), Situation(_vector(vector), length), stake),
                reward,
                tokens,
                latency_ms,
            )
            for trace_id, arm, probabilities, length, stake, vector, reward, tokens, latency_ms, _ in found
        ]
        return max((row[-1] for row in found), default=since), changed

    def arm_of(self, scope: Scope, episode_id: str) -> str | None:
        """Return the name of the arm that an episode was given."""
        with self._readers.borrow() as db:
            row = db.execute(
                "SELECT arm FROM traces CROSS JOIN decisions USING (trace_id) WHERE traces.scope_id = ? "
                "AND episode_id = ? ORDER BY created_at, trace_id LIMIT 1",
                (rows.known_scope(db, scope), episode_id),
            ).fetchone()
        return row[0] if row else None

    def task_of(self, scope: Scope, trace_id: str) -> str:
        """Return the task of a trace."""
        with self._readers.borrow() as db:
            row = db.execute(
                "SELECT task FROM traces WHERE scope_id = ? AND trace_id = ?", (rows.known_scope(db, scope), trace_id)
            ).fetchone()
        return row[0] if row else ""


def decision_of(db: Connection, trace_id: str) -> dict[str, Any] | None:
    """Return the arm that was chosen for a trace, how likely it was and why, and what came of it."""
    row = db.execute(
        "SELECT arm, propensity, reason, cluster, probabilities, reward, tokens, rewards.latency_ms FROM decisions "
        "LEFT JOIN rewards USING (trace_id) WHERE trace_id = ?",
        (trace_id,),
    ).fetchone()
    if row is None:
        return None
    names = ("arm", "propensity", "reason", "cluster", "probabilities", "reward", "tokens", "latency_ms")
    return {**dict(zip(names, row, strict=True)), "probabilities": json.loads(row[4])}


def _vector(blob: bytes | None) -> Any:
    return None if blob is None else np.frombuffer(blob, dtype=np.float32)


_DECIDED = """
    SELECT decisions.trace_id, reward, tokens, rewards.latency_ms FROM traces
    CROSS JOIN decisions ON decisions.trace_id = traces.trace_id
    LEFT JOIN rewards ON rewards.trace_id = decisions.trace_id
    WHERE traces.scope_id = ? AND episode_id = ? ORDER BY created_at, decisions.trace_id LIMIT 1"""
_VERDICT = """
    SELECT verdict FROM traces CROSS JOIN outcomes USING (trace_id) WHERE scope_id = ? AND episode_id = ? AND verified
    ORDER BY created_at DESC, trace_id DESC LIMIT 1"""
_TAKEN = """
    SELECT sum(prompt_tokens + completion_tokens), sum(latency_ms) FROM traces
    WHERE scope_id = ? AND episode_id = ?"""
_CHOICES = """
    SELECT trace_id, arm, probabilities, length, stake, vector, reward, tokens, rewards.latency_ms, rewards.revision
    FROM rewards CROSS JOIN decisions USING (trace_id) CROSS JOIN traces USING (trace_id)
    LEFT JOIN vectors ON vectors.key_hash = traces.key_hash AND vectors.fingerprint = ?
    WHERE rewards.scope_id = ? AND rewards.revision > ? ORDER BY trace_id"""
