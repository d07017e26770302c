"""Evidence on memory itself: the episodes with and without it, what each memory was exposed to, and the arms chosen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from optillm_memory.learn.offpolicy import Logged
from optillm_memory.learn.uplift import Episode, standing, tabulated
from optillm_memory.records import Scope
from optillm_memory.store.sqlite.connection import Connection, Readers
from optillm_memory.store.sqlite.reading import UntouchedReaders

_BY_TENANT = "CAST(? AS TEXT) IS NULL OR tenant = ?"
_VERDICTS = {"success": True, "failure": False}


def read_decisions(path: Path, tenant: str | None) -> list[Logged]:
    """Return a tenant's episodes in a database file in which the policy chose an arm, the oldest first.

    An episode has one outcome, so it is one row, with its first choice; tokens and milliseconds are those of all its
    requests.
    """
    with contextlib.closing(UntouchedReaders(path)) as readers, readers.borrow() as db:
        found = db.execute(_DECISIONS, (tenant, tenant)).fetchall()
    return [
        Logged(
            arm, propensity, json.loads(probabilities) or {arm: propensity},
            None if verdict is None else float(_VERDICTS[verdict]), tokens, latency_ms, switched=arms > 1,
        )
        for arm, propensity, probabilities, verdict, tokens, latency_ms, arms in found
    ]  # fmt: skip


class EpisodeReads:
    """The part of the store that reads what its episodes came to."""

    _readers: Readers

    def episodes(self, tenant: str | None) -> list[Episode]:
        """Return a tenant's episodes, the oldest first; `tenant` None is the operator."""
        with self._readers.borrow() as db:
            return episodes_of(db, _BY_TENANT, (tenant, tenant))


class ExposureTables:
    """The part of a transaction that has to do with the exposures of memories."""

    _db: Connection

    def scope_id(self, scope: Scope) -> int:
        """Return the scope's number."""
        raise NotImplementedError

    def concerned(self, scope: Scope, episode_id: str) -> tuple[bool, bool]:
        """Return whether an episode says anything of memories, or did, and whether an arm was chosen for it."""
        said, weighed, chosen = self._db.execute(_CONCERNED, (self.scope_id(scope), episode_id) * 2).fetchone()
        return bool(said or weighed), bool(chosen)

    def put_exposures(self, scope_id: int, episode_id: str) -> set[str]:
        """Bring up to date what an episode says of the memories it was eligible for; return those it touches."""
        key = (scope_id, episode_id)
        before = self._db.execute(
            "SELECT memory_id, created_at, held_out, share, success FROM exposures "
            "WHERE scope_id = ? AND episode_id = ?",
            key,
        ).fetchall()
        now = [
            (memory_id, e.created_at, int(e.held_out), e.share, int(e.success))
            for e in episodes_of(self._db, "traces.scope_id = ? AND episode_id = ?", key)
            if e.success is not None and 0 < e.share < 1
            for memory_id in sorted({memory_id for memory_id, _ in e.memories})
        ]
        if sorted(before) == sorted(now):
            return set()
        self._db.execute("DELETE FROM exposures WHERE scope_id = ? AND episode_id = ?", key)
        self._db.executemany(
            "INSERT INTO exposures(scope_id, episode_id, memory_id, created_at, held_out, share, success) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*key, *row) for row in now],
        )
        return {row[0] for row in (*before, *now)}

    def is_retired(self, memory_id: str, since: float = 0.0) -> bool:
        """Whether what is known of a memory's uplift says that it harms; `since` is when it was last approved."""
        found = self._db.execute(
            "SELECT share, held_out, success, count(*) FROM exposures WHERE memory_id = ? AND created_at >= ? "
            "GROUP BY share, held_out, success",
            (memory_id, since),
        ).fetchall()
        return standing(tabulated(found)) == "retire"


def episodes_of(db: Connection, where: str, values: Sequence[Any]) -> list[Episode]:
    """Return the episodes of the traces that a condition names, the oldest first."""
    traces: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for row in db.execute(_TRACES.format(where), values):
        traces.setdefault(row[:5], []).append(row[5:])
    said: dict[str, list[tuple[str, str, bool]]] = {}
    for trace_id, memory_id, kind, reuse in db.execute(_SAID.format(where), (*values, *values)):
        said.setdefault(trace_id, []).append((memory_id, kind, bool(reuse)))
    return [_episode(key, rows, said) for key, rows in traces.items()]


def _episode(
    key: tuple[Any, ...], traces: Sequence[tuple[Any, ...]], said: dict[str, list[tuple[str, str, bool]]]
) -> Episode:
    # The trace where memory first had something to say decides; without one, the first that was randomised.
    speaking = next((t for t in traces if t[0] in said), None)
    decisive = speaking or next((t for t in traces if t[3] < 1), traces[0])
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
        memories=_first_said(said.get(trace_id, [])),
    )


def _first_said(said: Iterable[tuple[str, str, bool]]) -> tuple[tuple[str, str], ...]:
    """Return what memory had to say in one trace: where its answer was, or would have been, reused, that alone."""
    found = sorted(said)
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
_SAID = """
    SELECT traces.trace_id, memory_id, kind, 0 FROM traces JOIN scopes ON scopes.id = traces.scope_id
    JOIN injections ON injections.trace_id = traces.trace_id WHERE ({0})
    UNION SELECT traces.trace_id, memory_id, 'exemplar', 1 FROM traces JOIN scopes ON scopes.id = traces.scope_id
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
