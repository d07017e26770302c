"""The tables `decisions` and `rewards`: the arms that the policy chose, and what became of their episodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from optillm_memory.decide.policy import Choice, LoggedChoice, Situation
from optillm_memory.decide.policy_updater import Row
from optillm_memory.recall.retriever import Version
from optillm_memory.records import Scope, Trace
from optillm_memory.store.backend import Pool
from optillm_memory.store.sqlite.connection import Connection, objects
from optillm_memory.store.tables import meta, scopes
from optillm_memory.store.tables.meta import Counters
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.traces import TraceTable

_REWARDS = {"success": 1.0, "failure": 0.0}


@dataclass
class DecisionTable:
    """The write half, and what the fold reads."""

    db: Connection
    scopes: ScopeTable
    counters: Counters
    traces: TraceTable

    def add(self, trace: Trace, scope_id: int, choice: Choice, length: int) -> None:
        """Append the choice that an episode began with."""
        self.traces.touch(trace.trace_id)
        self.db.execute(
            "INSERT INTO decisions(trace_id, scope_id, arm, propensity, reason, cluster, probabilities, stake, length) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                trace.trace_id, scope_id, choice.arm.name, choice.propensity, choice.reason, choice.cluster,
                json.dumps(choice.probabilities), choice.stake, length,
            ),
        )  # fmt: skip

    def credit(self, scope: Scope, episode_id: str) -> None:
        """Bring up to date what the arm of an episode earned, and what the episode took in all."""
        key = (self.scopes.number(scope), episode_id)
        decided = self.db.execute(_DECIDED, key).fetchone()
        if decided is None:
            return
        trace_id, *before = decided
        now = [_REWARDS.get(self.traces.verdict(scope, episode_id)), *self.db.execute(_TAKEN, key).fetchone()]
        if before != now:
            self.db.execute(
                "INSERT INTO rewards VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (trace_id) DO UPDATE SET "
                "reward = excluded.reward, tokens = excluded.tokens, latency_ms = excluded.latency_ms, "
                "revision = excluded.revision",
                (trace_id, key[0], *now, self.counters.revision()),
            )


@dataclass
class DecisionReads:
    """The read half, for the policy; every call is bound to one scope."""

    readers: Pool

    def revision(self, scope: Scope) -> Version:
        """Return what has another origin when nothing that was read before holds any more."""
        return meta.version(self.readers, scope)

    def choices(self, scope: Scope, since: int, fingerprint: str) -> tuple[int, list[Row]]:
        """Return (revision, rows) of the choices that came, or of which more is known, after a revision, in order.

        A row has the vector of its request where this encoder has encoded it.
        """
        with self.readers.borrow() as db:
            found = db.execute(_CHOICES, (fingerprint, scopes.known(db, scope), since)).fetchall()
        changed = []
        for trace_id, arm, probabilities, length, stake, vector, *reward, _ in found:
            situation = Situation(None if vector is None else np.frombuffer(vector, dtype=np.float32), length)
            changed.append(Row(trace_id, LoggedChoice(arm, json.loads(probabilities), situation, stake), *reward))
        return max((row[-1] for row in found), default=since), changed

    def arm_of(self, scope: Scope, episode_id: str) -> str | None:
        """Return the name of the arm that was chosen for an episode."""
        with self.readers.borrow() as db:
            row = db.execute(
                "SELECT arm FROM traces CROSS JOIN decisions USING (trace_id) WHERE traces.scope_id = ? "
                "AND episode_id = ? ORDER BY created_at, trace_id LIMIT 1",
                (scopes.known(db, scope), episode_id),
            ).fetchone()
        return row[0] if row else None

    def task_of(self, scope: Scope, trace_id: str) -> str:
        """Return the task of a trace."""
        with self.readers.borrow() as db:
            key = (scopes.known(db, scope), trace_id)
            row = db.execute("SELECT task FROM traces WHERE scope_id = ? AND trace_id = ?", key).fetchone()
        return row[0] if row else ""


def decision_of(db: Connection, trace_id: str) -> dict[str, Any] | None:
    """Return the arm that was chosen for a trace, how likely it was and why, and what came of it."""
    found = objects(
        db,
        "SELECT arm, propensity, reason, cluster, probabilities, reward, tokens, rewards.latency_ms FROM decisions "
        "LEFT JOIN rewards USING (trace_id) WHERE trace_id = ?",
        (trace_id,),
    )
    return {**found[0], "probabilities": json.loads(found[0]["probabilities"])} if found else None


_DECIDED = """
    SELECT decisions.trace_id, reward, tokens, rewards.latency_ms FROM traces
    CROSS JOIN decisions ON decisions.trace_id = traces.trace_id
    LEFT JOIN rewards ON rewards.trace_id = decisions.trace_id
    WHERE traces.scope_id = ? AND episode_id = ? ORDER BY created_at, decisions.trace_id LIMIT 1"""
_TAKEN = """
    SELECT sum(prompt_tokens + completion_tokens), sum(latency_ms) FROM traces
    WHERE scope_id = ? AND episode_id = ?"""
_CHOICES = """
    SELECT trace_id, arm, probabilities, length, stake, vector, reward, tokens, rewards.latency_ms, rewards.revision
    FROM rewards CROSS JOIN decisions USING (trace_id) CROSS JOIN traces USING (trace_id)
    LEFT JOIN vectors ON vectors.key_hash = traces.key_hash AND vectors.fingerprint = ?
    WHERE rewards.scope_id = ? AND rewards.revision > ? ORDER BY trace_id"""
