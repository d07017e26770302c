"""The table `memories`, as recall reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from optillm_memory.conversation.episodes import root_of
from optillm_memory.learn.outcomes import confirming, stands_alone
from optillm_memory.recall.retriever import Change, Version
from optillm_memory.records import MemoryRecord, Scope
from optillm_memory.store.backend import Dialect, Pool, Seal, VectorSearch
from optillm_memory.store.sqlite.connection import Connection, marks
from optillm_memory.store.tables import meta, scopes, words
from optillm_memory.store.tables.feedback import standing_on
from optillm_memory.store.tables.traces import PENDING_S
from optillm_memory.store.tables.vectors import SEARCHED

# Rows of memories that are gone, and those that are not to be seen: forgotten, or never a memory.
NO_MEMORY, UNSEEN = "('withdrawn', 'forgotten', 'unfounded')", "('forgotten', 'unfounded')"
_CONTENT = "task, answer, frame, successes, failures, used_successes, used_failures, created_at, valid_until"
SELECT = (
    f"SELECT number, memory_id, kind, status, tenant, namespace, user_id, agent_id, {_CONTENT} "
    "FROM memories JOIN scopes ON scopes.id = scope_id"
)

HOLDS = "(valid_until IS NULL OR valid_until > ?)"  # at a moment


def memory_of(row: tuple[Any, ...]) -> MemoryRecord:
    """Return a row of `SELECT` as a memory."""
    memory_id, kind, status = row[1:4]
    return MemoryRecord(memory_id, kind, status, Scope(*row[4:8]), *row[8:])


def as_written(seal: Seal, db: Connection, found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return those of these rows, which begin with a memory's number, that nobody changed from outside."""
    numbers = [row[0] for row in found]
    good = seal.genuine_memories(db, f"number IN ({marks(numbers)})", numbers)
    return found if good is None else [row for row in found if row[0] in good]


@dataclass
class RecallReads:
    """What recall reads (`recall.retriever.Source`); every call is bound to one scope.

    `+scope_id` keeps SQLite's planner from walking the whole scope where a few rows are named.
    """

    readers: Pool
    dialect: Dialect
    search: VectorSearch
    seal: Seal
    clock: Callable[[], float]

    def revision(self, scope: Scope | None = None) -> Version:
        """Return what differs whenever any memory has changed, and for a scope also when it was forgotten."""
        return meta.version(self.readers, scope)

    def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
        """Return memories of the scope changed after a revision; a revision's changes come together."""
        with self.readers.borrow() as db:
            scope_id = scopes.known(db, scope)
            found = db.execute(
                f"SELECT number, CASE WHEN {SEARCHED} THEN vector END, revision "
                "FROM memories LEFT JOIN vectors ON vectors.key_hash = memories.key_hash AND fingerprint = ? "
                "WHERE scope_id = ? AND revision > ? AND revision <= coalesce((SELECT revision FROM memories "
                "WHERE scope_id = ? AND revision > ? ORDER BY revision LIMIT 1 OFFSET ?), 4611686018427387904) "
                "ORDER BY revision",
                (fingerprint, scope_id, since, scope_id, since, limit - 1),
            ).fetchall()
        return [Change(*row) for row in found]

    def nearest(
        self, scope: Scope, fingerprint: str, query: NDArray[Any], count: int
    ) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of the scope's nearest memories; None where recall searches the vectors itself."""
        return self.search.nearest(scope, fingerprint, query, count)

    def vectors(self, scope: Scope, fingerprint: str, numbers: Sequence[int]) -> Mapping[int, bytes]:
        """Return the vectors of those of the scope's memories with these numbers that are to be searched."""
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT number, vector FROM {_WITH_VECTOR} AND +scope_id = {scopes.KNOWN} "
                f"AND number IN ({marks(numbers)})",
                (fingerprint, *scopes.key(scope), *numbers),
            ).fetchall()
        return {int(number): bytes(vector) for number, vector in found}

    def sample(self, scope: Scope, fingerprint: str, limit: int) -> list[tuple[str, bytes]]:
        """Return (task, vector) of the latest memories of the scope that are searched by meaning."""
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT task, vector FROM {_WITH_VECTOR} AND scope_id = ? ORDER BY revision DESC LIMIT ?",
                (fingerprint, scopes.known(db, scope), limit),
            ).fetchall()
        return [(task, bytes(vector)) for task, vector in found]

    def lexical(self, scope: Scope, query: Sequence[str], limit: int, *, alone: bool) -> list[tuple[int, float]]:
        """Return (number, coverage) of memories that share words with the query, best first.

        `alone` means without a search by meaning: then words that are common have to do, too.
        """
        if not query:
            return []
        with self.readers.borrow() as db:
            return words.lexical(db, self.dialect, scopes.known(db, scope), query, limit, alone=alone)

    def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
        """Return the verified memories of the scope that have these numbers, and still hold."""
        wanted = list(numbers)
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT number, memory_id, kind, status, {_CONTENT} FROM memories WHERE +scope_id = {scopes.KNOWN} "
                f"AND status = 'verified' AND {HOLDS} AND number IN ({marks(wanted)})",
                (*scopes.key(scope), self.clock(), *wanted),
            ).fetchall()
            found = as_written(self.seal, db, found)
        return {
            number: MemoryRecord(name, kind, status, scope, *content) for number, name, kind, status, *content in found
        }

    def verified_at(self, scope: Scope, memory_ids: Sequence[str]) -> Mapping[str, Sequence[float]]:
        """Return when each memory was verified: the times of the traces, in Unix seconds."""
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT memory_id, traces.created_at FROM memories CROSS JOIN contributions USING (number) "
                f"CROSS JOIN traces USING (trace_id) WHERE memory_id IN ({marks(memory_ids)}) "
                "AND +memories.scope_id = ? AND role = 'evidence' AND success AND verified",
                (*memory_ids, scopes.known(db, scope)),
            ).fetchall()
        times: dict[str, list[float]] = {}
        for memory_id, at in found:
            times.setdefault(memory_id, []).append(float(at))
        return times

    def of_episode_alone(self, scope: Scope, memory_ids: Sequence[str], episode_id: str) -> set[str]:
        """Return those of the memories that rest on this episode, or the one it began with, and on no other."""
        own_ids = (episode_id, root_of(episode_id))
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT DISTINCT memory_id, number FROM traces CROSS JOIN contributions USING (trace_id) "
                f"CROSS JOIN memories USING (number) WHERE traces.scope_id = {scopes.KNOWN} AND episode_id IN (?, ?) "
                "AND role = 'evidence' AND success",
                (*scopes.key(scope), *own_ids),
            ).fetchall()
            own = {number: memory_id for memory_id, number in found if memory_id in set(memory_ids)}
            if not own:
                return set()
            shared = db.execute(
                f"SELECT DISTINCT number FROM contributions CROSS JOIN traces USING (trace_id) "
                f"WHERE number IN ({marks(own)}) AND role = 'evidence' AND success "
                f"AND NOT (scope_id = {scopes.KNOWN} AND episode_id IN (?, ?))",
                (*own, *scopes.key(scope), *own_ids),
            ).fetchall()
        return set(own.values()) - {own[row[0]] for row in shared}

    def standing_alone(self, scope: Scope, memory_ids: Sequence[str]) -> set[str]:
        """Return those of the memories that rest on the word of one reporter, or of nobody in particular."""
        reporters: dict[str, set[str]] = {memory_id: set() for memory_id in memory_ids}
        with self.readers.borrow() as db:
            scope_id = scopes.known(db, scope)
            found = [row for name in memory_ids for row in db.execute(_EVIDENCE, (name, scope_id)).fetchall()]
            since = min((row[-1] for row in found), default=0.0) - PENDING_S
            said = standing_on(db, scope, [row[1] for row in found], [row[2] for row in found], since)
        for memory_id, trace_id, episode_id, given, answer, _ in found:
            own = [f for f in said if (f.trace_id == trace_id if f.trace_id else f.episode_id == episode_id)]
            reporters[memory_id] |= confirming(own, given, answer)
        return {memory_id for memory_id, names in reporters.items() if stands_alone(names)}

    def read_ahead(self) -> Iterator[None]:
        """Read once in order, piece by piece, what recall reads at random."""
        return self.search.read_ahead()


# The latest traces that verify a memory: of one that was verified more often than that, others are not asked.
_EVIDENCE = """
    SELECT memory_id, traces.trace_id, episode_id, traces.answer, memories.answer, traces.created_at
    FROM memories CROSS JOIN contributions USING (number) CROSS JOIN traces USING (trace_id)
    WHERE memory_id = ? AND +memories.scope_id = ? AND role = 'evidence' AND success AND verified
    ORDER BY traces.created_at DESC LIMIT 10"""
_WITH_VECTOR = f"memories JOIN vectors ON vectors.key_hash = memories.key_hash AND fingerprint = ? WHERE {SEARCHED}"
