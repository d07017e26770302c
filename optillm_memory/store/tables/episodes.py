"""The tables `prefixes` and `ledger`: which episode a conversation belongs to, and what was injected in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from optillm_memory.conversation.episodes import Candidate, forks_of, root_of
from optillm_memory.inject.advice import FAILURE
from optillm_memory.records import Injected, Placement, Scope, Trace
from optillm_memory.store.backend import Pool, Seal
from optillm_memory.store.sqlite.connection import Connection, WritingConnection, marks
from optillm_memory.store.tables import scopes
from optillm_memory.store.tables.feedback import STANDING, standing
from optillm_memory.store.tables.memories import HOLDS

_BEGIN_ALIKE = 16  # conversations that begin alike; of more the latest are considered


@dataclass
class EpisodeTable:
    """The write half."""

    db: WritingConnection

    def add_prefixes(self, scope_id: int, trace: Trace, prefixes: Sequence[str]) -> None:
        """Append the prefixes with which a conversation goes on after a trace."""
        self.db.later(
            "INSERT INTO prefixes(scope_id, hash, episode_id, trace_id) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [(scope_id, prefix, trace.episode_id, trace.trace_id) for prefix in prefixes],
        )

    def add_placements(self, scope_id: int, episode_id: str, placements: Sequence[Placement]) -> None:
        """Append what was injected, so that later requests of the episode get it at the same place."""
        self.db.later(
            "INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (
                    scope_id, episode_id, p.anchor, p.position, p.form, json.dumps(p.payload),
                    json.dumps([i.as_dict() for i in p.items]),
                )
                for p in placements
            ],
        )  # fmt: skip


@dataclass
class EpisodeReads:
    """The read half, for finding the episode of a request."""

    readers: Pool
    seal: Seal
    clock: Callable[[], float]

    def episodes_of(self, scope: Scope, prefix: str) -> list[Candidate]:
        """Return the latest episodes that have a conversation prefix."""
        with self.readers.borrow() as db:
            scope_id = scopes.known(db, scope)
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
        with self.readers.borrow() as db:
            scope_id = scopes.known(db, scope)
            row = db.execute(
                f"SELECT episode_id, trace_id FROM steps WHERE scope_id = ? AND step_id IN ({marks(steps)}) "
                "ORDER BY trace_id DESC LIMIT 1",
                (scope_id, *steps),
            ).fetchone()
            return _candidate(db, scope, scope_id, "", *row) if row else None

    def ledger(self, scope: Scope, episode_id: str) -> list[Placement]:
        """Return what was injected in an episode before, in order."""
        with self.readers.borrow() as db:
            key = (scopes.known(db, scope), episode_id)
            found = db.execute(
                f"SELECT anchor, position, form, payload, items FROM ledger WHERE {_OF_EPISODE} ORDER BY position", key
            ).fetchall()
            if (good := self.seal.genuine(db, "ledger", _OF_EPISODE, key)) is not None:
                found = [row for row in found if (*key, row[0], row[2]) in good]
        return [
            Placement(anchor, position, form, json.loads(payload), tuple(Injected(**i) for i in json.loads(items)))
            for anchor, position, form, payload, items in found
        ]

    def unusable(self, scope: Scope, memory_ids: Iterable[str]) -> set[str]:
        """Return those of the memories of which no copy may be used (any more): forgotten, switched off, or in doubt.

        A fix may be unverified, which it says where it stands; that an action failed is no memory.
        """
        named = {memory_id for memory_id in memory_ids if not memory_id.startswith(FAILURE)}
        if not named:
            return named
        with self.readers.borrow() as db:
            usable = f"{_USABLE} AND {HOLDS}"
            sql = f"SELECT memory_id FROM memories WHERE +scope_id = ? AND memory_id IN ({marks(named)}) AND {usable}"
            found = db.execute(sql, (scopes.known(db, scope), *named, self.clock())).fetchall()
        return named - {row[0] for row in found}

    def still_usable(self, scope: Scope, placements: Sequence[Placement]) -> list[Placement]:
        """Return these placements without those that have something of a memory that may not be used any more."""
        gone = self.unusable(scope, (item.memory_id for placement in placements for item in placement.items))
        return [p for p in placements if not any(item.memory_id in gone for item in p.items)]


def _candidate(db: Connection, scope: Scope, scope_id: int, prefix: str, episode_id: str, trace_id: str) -> Candidate:
    asked = (scope_id, episode_id, *standing(scope, 0.0), episode_id, scope_id, trace_id)
    latest, closed = db.execute(_CANDIDATE, asked).fetchone()
    continued = db.execute(_CONTINUED, (scope_id, episode_id, prefix, trace_id)).fetchall() if prefix else []
    return Candidate(episode_id, float(latest), bool(closed), frozenset(row[0] for row in continued))


# What was superseded stays where it stands, for the provider's prompt cache.
_USABLE = "status IN ('verified', 'superseded', 'corroborated')"
# An episode's latest request, whether it has an outcome (its own, or this very answer was verified as right), and how
# it has gone on from a prefix.
_CANDIDATE = f"""
    SELECT coalesce((SELECT max(created_at) FROM traces WHERE scope_id = ? AND episode_id = ?), 0),
        EXISTS (SELECT 1 FROM feedback WHERE {STANDING} AND episode_id = ? AND (scope_id = ? OR scope_id IS NULL)
                AND metric <> 'comment')
        OR EXISTS (SELECT 1 FROM outcomes WHERE trace_id = ? AND verified AND verdict = 'success')"""
_OF_EPISODE = "scope_id = ? AND episode_id = ?"
_FORKS = """
    SELECT DISTINCT episode_id FROM traces WHERE scope_id = ? AND episode_id >= ? AND episode_id < ? AND continued = ?
    LIMIT ?"""
_CONTINUED = """
    SELECT DISTINCT continuation FROM traces WHERE scope_id = ? AND episode_id = ? AND continued = ?
    AND created_at >= coalesce((SELECT created_at FROM traces WHERE trace_id = ?), 0)"""
