"""The table `exposures`: what became of episodes with a memory, and of those that went without it on purpose."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optillm_memory.learn.offpolicy import LoggedEpisode
from optillm_memory.learn.uplift import Episode, standing, tabulated
from optillm_memory.records import Scope, Tenant, View
from optillm_memory.store.backend import Pool
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.sqlite.reading import UntouchedReaders
from optillm_memory.store.tables.scopes import ScopeTable, seen

_VERDICTS = {"success": True, "failure": False}


@dataclass
class ExposureTable:
    """The write half, and what the fold reads."""

    db: Connection
    scopes: ScopeTable

    def concerned(self, scope: Scope, episode_id: str) -> tuple[bool, bool]:
        """Return whether an episode has, or had, evidence on memories, and whether an arm was chosen for it."""
        found, before, chosen = self.db.execute(_CONCERNED, (self.scopes.number(scope), episode_id) * 2).fetchone()
        return bool(found or before), bool(chosen)

    def put(self, scope_id: int, episode_id: str) -> set[str]:
        """Replace an episode's evidence on the memories that it was eligible for; return those that it changes."""
        key = (scope_id, episode_id)
        before = self.db.execute(
            "SELECT memory_id, created_at, held_out, share, success FROM exposures "
            "WHERE scope_id = ? AND episode_id = ?",
            key,
        ).fetchall()
        now = [
            (memory_id, e.created_at, int(e.held_out), e.share, int(e.success))
            for e in episodes_of(self.db, "traces.scope_id = ? AND episode_id = ?", key)
            if e.success is not None and 0 < e.share < 1
            for memory_id in sorted({memory_id for memory_id, _ in e.memories})
        ]
        if sorted(before) == sorted(now):
            return set()
        self.db.execute("DELETE FROM exposures WHERE scope_id = ? AND episode_id = ?", key)
        self.db.executemany(
            "INSERT INTO exposures(scope_id, episode_id, memory_id, created_at, held_out, share, success) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*key, *row) for row in now],
        )
        return {row[0] for row in (*before, *now)}

    def is_retired(self, memory_id: str, since: float = 0.0) -> bool:
        """Whether a memory's measured uplift shows that it harms; `since` is when it was last approved."""
        found = self.db.execute(
            "SELECT share, held_out, success, count(*) FROM exposures WHERE memory_id = ? AND created_at >= ? "
            "GROUP BY share, held_out, success",
            (memory_id, since),
        ).fetchall()
        return standing(tabulated(found)) == "retire"


@dataclass
class ExposureReads:
    """The read half, for the report of uplift."""

    readers: Pool

    def episodes(self, view: View | Tenant) -> list[Episode]:
        """Return the episodes of a view, the oldest first."""
        with self.readers.borrow() as db:
            return episodes_of(db, *seen(view))


def read_decisions(path: Path, tenant: str | None) -> list[LoggedEpisode]:
    """Return a tenant's episodes in a database file in which the policy chose an arm, the oldest first.

    An episode has one outcome, so it is one row, with its first choice; tokens and milliseconds are those of all its
    requests.
    """
    with contextlib.closing(UntouchedReaders(path)) as readers, readers.borrow() as db:
        found = db.execute(_DECISIONS, (tenant, tenant)).fetchall()
    return [
        LoggedEpisode(
            arm, propensity, json.loads(probabilities) or {arm: propensity},
            None if verdict is None else float(_VERDICTS[verdict]), tokens, latency_ms, switched=arms > 1,
        )
        for arm, propensity, probabilities, verdict, tokens, latency_ms, arms in found
    ]  # fmt: skip


def episodes_of(db: Connection, where: str, values: Sequence[Any]) -> list[Episode]:
    """Return the episodes of the traces that a condition names, the oldest first."""
    traces: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for row in db.execute(_TRACES.format(where), values):
        traces.setdefault(row[:5], []).append(row[5:])
    used: dict[str, list[tuple[str, str, bool]]] = {}
    for trace_id, memory_id, kind, reuse in db.execute(_USED.format(where), (*values, *values)):
        used.setdefault(trace_id, []).append((memory_id, kind, bool(reuse)))
    return [_episode(key, rows, used) for key, rows in traces.items()]


def _episode(
    key: tuple[Any, ...], traces: Sequence[tuple[Any, ...]], used: dict[str, list[tuple[str, str, bool]]]
) -> Episode:
    # The trace where memory first had something to offer decides; without one, the first that was randomised.
    first = next((t for t in traces if t[0] in used), None)
    decisive = first or next((t for t in traces if t[3] < 1), traces[0])
    trace_id, _, held_out, propensity, _, arm, _ = decisive
    verdicts = [_VERDICTS[t[6]] for t in traces if t[6] is not None]
    return Episode(
        scope=Scope(*key[:4]),
        episode_id=key[4],
        created_at=traces[0][1],
        task_key=traces[0][4],
        arm=arm,
        held_out=bool(held_out),
        share=propensity if held_out else 1 - propensity,
        success=verdicts[-1] if verdicts else None,
        memories=_used_first(used.get(trace_id, [])),
    )


def _used_first(used: Iterable[tuple[str, str, bool]]) -> tuple[tuple[str, str], ...]:
    """Return what memory had to offer in one trace: where its answer was, or would have been, reused, that alone."""
    found = sorted(used)
    reused = [item for item in found if item[2]]
    return tuple((memory_id, kind) for memory_id, kind, _ in reused or found)


_TRACES = """
    SELECT tenant, namespace, user_id, agent_id, episode_id, traces.trace_id, created_at, held_out, traces.propensity,
           CASE WHEN task > '' THEN key_hash ELSE '' END, coalesce(arm, approach || '@' || model),
           CASE WHEN verified THEN verdict END
    FROM traces JOIN scopes ON scopes.id = traces.scope_id LEFT JOIN outcomes ON outcomes.trace_id = traces.trace_id
    LEFT JOIN decisions ON decisions.trace_id = traces.trace_id
    WHERE ({}) ORDER BY created_at, traces.trace_id"""
_CONCERNED = """
    SELECT count(*) FILTER (WHERE EXISTS (SELECT 1 FROM injections WHERE injections.trace_id = traces.trace_id)
        OR EXISTS (SELECT 1 FROM proposals WHERE proposals.trace_id = traces.trace_id)),
        EXISTS (SELECT 1 FROM exposures WHERE scope_id = ? AND episode_id = ?),
        count(*) FILTER (WHERE EXISTS (SELECT 1 FROM decisions WHERE decisions.trace_id = traces.trace_id))
    FROM traces WHERE scope_id = ? AND episode_id = ?"""
# What was injected or withheld; and whose answer was reused, or would have been but for the holdout.
_USED = """
    SELECT traces.trace_id, memory_id, kind, 0 FROM traces JOIN scopes ON scopes.id = traces.scope_id
    JOIN injections ON injections.trace_id = traces.trace_id WHERE ({0})
    UNION SELECT traces.trace_id, memory_id, CASE WHEN memory_id LIKE 'proc-%' THEN 'procedure' ELSE 'exemplar' END, 1
    FROM traces JOIN scopes ON scopes.id = traces.scope_id
    JOIN proposals ON proposals.trace_id = traces.trace_id WHERE ({0}) AND (served OR reason = 'holdout')"""
_DECISIONS = """
    WITH chosen AS (
        SELECT arm, decisions.propensity AS propensity, probabilities, traces.scope_id AS scope_id, episode_id,
               created_at, traces.trace_id AS trace_id, row_number() OVER (
                   PARTITION BY traces.scope_id, episode_id ORDER BY created_at, traces.trace_id) AS nth
        FROM decisions JOIN traces ON traces.trace_id = decisions.trace_id JOIN scopes ON scopes.id = traces.scope_id
        WHERE (CAST(? AS TEXT) IS NULL OR tenant = ?)),
    episodes AS (
        SELECT scope_id, episode_id, sum(prompt_tokens + completion_tokens) AS tokens, sum(latency_ms) AS latency_ms
        FROM traces GROUP BY scope_id, episode_id),
    arms AS (SELECT scope_id, episode_id, count(DISTINCT arm) AS arms FROM chosen GROUP BY scope_id, episode_id)
    SELECT arm, propensity, probabilities, (
               SELECT verdict FROM outcomes JOIN traces USING (trace_id) WHERE traces.scope_id = chosen.scope_id
               AND traces.episode_id = chosen.episode_id AND verified
               ORDER BY traces.created_at DESC, trace_id DESC LIMIT 1),
           tokens, latency_ms, arms
    FROM chosen JOIN episodes USING (scope_id, episode_id) JOIN arms USING (scope_id, episode_id)
    WHERE nth = 1 ORDER BY created_at, trace_id"""
