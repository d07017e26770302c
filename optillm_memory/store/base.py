"""The store: the log and what is derived from it, read by scope, written through one thread.

Statements are in the SQL that SQLite and PostgreSQL have in common, less what `postgres_connection` translates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from optillm_memory.conversation.episodes import root_of
from optillm_memory.conversation.parse import key_of
from optillm_memory.recall.retriever import Change, Version
from optillm_memory.records import Injected, MemoryRecord, Placement, Scope, Trace
from optillm_memory.store.maintenance.selection import ForgetReads
from optillm_memory.store.sqlite.connection import Connection, marks, objects
from optillm_memory.store.sqlite.index_files import IndexFiles
from optillm_memory.store.tables import rows
from optillm_memory.store.tables.calls import model_calls
from optillm_memory.store.tables.decisions import DecisionReads, decision_of
from optillm_memory.store.tables.episodes import CandidateReads
from optillm_memory.store.tables.exposures import EpisodeReads
from optillm_memory.store.tables.fixes import FixReads
from optillm_memory.store.tables.proposals import ProposalReads, proposal_of
from optillm_memory.store.tables.vectors import VectorReads
from optillm_memory.store.tables.words import WordReads
from optillm_memory.store.transaction import Transaction
from optillm_memory.store.writer import ReadOnlyWriter, Writer

T = TypeVar("T")


class Store(EpisodeReads, CandidateReads, WordReads, ProposalReads, DecisionReads, FixReads, ForgetReads, VectorReads):
    """Reads on any thread, writes through one; satisfies `recall.recaller.Source`. A database brings the rest."""

    def __init__(self, writer: Writer | ReadOnlyWriter, readers: Any) -> None:
        """Join the two sides; the writer gives its operations a `Transaction`."""
        self._writer = writer
        self._readers = readers

    # -- what a database brings --------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Where the memories lie, as it may be shown."""
        raise NotImplementedError

    def size_bytes(self) -> int:
        """Return how much room all of it takes."""
        raise NotImplementedError

    def nearest(self, scope: Scope, fingerprint: str, query: Any, count: int) -> list[tuple[int, float]] | None:
        """Return (number, cosine) of the scope's nearest memories; None where vectors are not searched in here."""
        raise NotImplementedError

    def erase(self, *, progress: Callable[[str], None]) -> list[str]:
        """Take what was deleted out of all files, while others read and write; return what kept it from that."""
        raise NotImplementedError

    def compact(self, *, progress: Callable[[str], None]) -> list[str]:
        """Write everything anew without what was deleted, and give the disk space back; return what kept it from that.

        Nobody else writes meanwhile: this is for whoever operates it.
        """
        raise NotImplementedError

    def outdate_indexes(self, scopes: Iterable[Scope] | None) -> None:
        """Note that files of vectors beside the database hold forgotten ones of these scopes, None being all."""

    def set_aside(self, *, delete: bool) -> list[str]:  # noqa: ARG002
        """Delete the databases that were set aside as corrupt, or say what they may hold; a server has none."""
        return []

    def read_ahead(self) -> Iterator[None]:
        """Read once in order, piece by piece, what recall reads here and there; a server sees to that itself."""
        yield from ()

    def index_files(self) -> IndexFiles | None:
        """Return where the vectors of large scopes lie, if in files."""
        return None

    # -- writing -----------------------------------------------------------------------------------

    def write(self, operation: Callable[[Transaction], T]) -> Future[T]:
        """Run an operation in the next commit; the future is set once it is on disk."""
        return self._writer.submit(operation)

    def post(self, operation: Callable[[Transaction], Any]) -> None:
        """Run an operation behind the caller, who does not wait for it."""
        self._writer.post(operation)

    def flush(self) -> None:
        """Wait until everything queued before is on disk."""
        self._writer.flush()

    def pause(self, timeout_s: float) -> bool:
        """Start no commit until `resume`; return whether none is under way any more."""
        return self._writer.pause(timeout_s)

    def resume(self) -> None:
        """Go on after a `pause` that succeeded."""
        self._writer.resume()

    def close(self) -> None:
        """Write what is queued and close."""
        self._readers.close()  # before the last that writes: it leaves no WAL behind
        self._writer.close()
        self._readers.close()

    @property
    def lost(self) -> int:
        """Records that could not be written."""
        return self._writer.lost

    @property
    def fault(self) -> str:
        """What keeps the store from writing now; empty when all is well."""
        return self._writer.fault

    # -- recall: every call is bound to one scope --------------------------------------------------
    # `+scope_id` keeps the planner from walking the whole scope where a few rows are named.

    def revision(self, scope: Scope | None = None) -> Version:
        """Return what is another one whenever any memory has changed, and of a scope also when it was forgotten."""
        with self._readers.borrow() as db:
            counters = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('generation', 'revision')"))
            # Read last: a scope that was forgotten meanwhile must not come with the revision of its end.
            number = rows.known_scope(db, scope) if scope is not None else 0
        return Version(int(counters["generation"]), int(counters["revision"]), number)

    def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
        """Return memories of the scope changed after a revision; a revision's changes come together."""
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            found = db.execute(
                "SELECT number, CASE WHEN status = 'verified' AND kind = 'exemplar' THEN vector END, revision "
                "FROM memories LEFT JOIN vectors ON vectors.key_hash = memories.key_hash AND fingerprint = ? "
                "WHERE scope_id = ? AND revision > ? AND revision <= coalesce((SELECT revision FROM memories "
                "WHERE scope_id = ? AND revision > ? ORDER BY revision LIMIT 1 OFFSET ?), 4611686018427387904) "
                "ORDER BY revision",
                (fingerprint, scope_id, since, scope_id, since, limit - 1),
            ).fetchall()
        return [Change(*row) for row in found]

    def vectors(self, scope: Scope, fingerprint: str, numbers: Sequence[int]) -> Mapping[int, bytes]:
        """Return the vectors of those of the scope's memories with these numbers that are to be searched."""
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT number, vector FROM memories JOIN vectors ON vectors.key_hash = memories.key_hash "
                f"AND fingerprint = ? WHERE +scope_id = ? AND number IN ({marks(numbers)}) "
                "AND status = 'verified' AND kind = 'exemplar'",
                (fingerprint, rows.known_scope(db, scope), *numbers),
            ).fetchall()
        return {int(number): bytes(vector) for number, vector in found}

    def sample(self, scope: Scope, fingerprint: str, limit: int) -> list[tuple[str, bytes]]:
        """Return (task, vector) of the latest memories of the scope that are searched by meaning."""
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT task, vector FROM memories JOIN vectors ON vectors.key_hash = memories.key_hash "
                "AND fingerprint = ? WHERE scope_id = ? AND status = 'verified' AND kind = 'exemplar' "
                "ORDER BY revision DESC LIMIT ?",
                (fingerprint, rows.known_scope(db, scope), limit),
            ).fetchall()
        return [(task, bytes(vector)) for task, vector in found]

    def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
        """Return the verified memories of the scope that have these numbers."""
        wanted = list(numbers)
        with self._readers.borrow() as db:
            found = db.execute(
                f"{rows.SELECT_MEMORY} WHERE +scope_id = ? AND status = 'verified' AND number IN ({marks(wanted)})",
                (rows.known_scope(db, scope), *wanted),
            ).fetchall()
        return {row[0]: rows.memory_of(row) for row in found}

    def last_verified(self, scope: Scope, memory_ids: Sequence[str]) -> Mapping[str, float]:
        """Return when each memory was verified last: the time of the trace, in Unix seconds."""
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT memory_id, max(traces.created_at) FROM memories CROSS JOIN contributions USING (number) "
                f"CROSS JOIN traces USING (trace_id) WHERE memory_id IN ({marks(memory_ids)}) "
                "AND +memories.scope_id = ? AND role = 'evidence' AND success AND verified GROUP BY memory_id",
                (*memory_ids, rows.known_scope(db, scope)),
            ).fetchall()
        return {memory_id: float(at) for memory_id, at in found}

    def of_episode_alone(self, scope: Scope, memory_ids: Sequence[str], episode_id: str) -> set[str]:
        """Return those of the memories that rest on this episode, or the one it began with, and on no other."""
        own_ids = (episode_id, root_of(episode_id))
        with self._readers.borrow() as db:
            scope_id = rows.known_scope(db, scope)
            found = db.execute(
                "SELECT DISTINCT memory_id, number FROM traces CROSS JOIN contributions USING (trace_id) "
                "CROSS JOIN memories USING (number) WHERE traces.scope_id = ? AND episode_id IN (?, ?) "
                "AND role = 'evidence' AND success",
                (scope_id, *own_ids),
            ).fetchall()
            own = {number: memory_id for memory_id, number in found if memory_id in set(memory_ids)}
            if not own:
                return set()
            shared = db.execute(
                f"SELECT DISTINCT number FROM contributions CROSS JOIN traces USING (trace_id) "
                f"WHERE number IN ({marks(own)}) AND role = 'evidence' AND success "
                "AND NOT (scope_id = ? AND episode_id IN (?, ?))",
                (*own, scope_id, *own_ids),
            ).fetchall()
        return set(own.values()) - {own[row[0]] for row in shared}

    # -- a request's episode -----------------------------------------------------------------------

    def salt(self) -> bytes:
        """Return the database's secret for the holdout."""
        with self._readers.borrow() as db:
            return bytes(db.execute("SELECT value FROM meta WHERE key = 'salt'").fetchone()[0])

    def ledger(self, scope: Scope, episode_id: str) -> list[Placement]:
        """Return what was injected in an episode before, in order."""
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT anchor, position, form, payload, items FROM ledger "
                "WHERE scope_id = ? AND episode_id = ? ORDER BY position",
                (rows.known_scope(db, scope), episode_id),
            ).fetchall()
        return [
            Placement(anchor, position, form, json.loads(payload), tuple(Injected(**i) for i in json.loads(items)))
            for anchor, position, form, payload, items in found
        ]

    # -- looking at it -----------------------------------------------------------------------------

    def trace(self, trace_id: str, tenant: str | None) -> dict[str, Any] | None:
        """Return a trace with its steps, injections and feedback; `tenant` None is the operator."""
        with self._readers.borrow() as db:
            row = db.execute(
                f"{rows.SELECT_TRACE} WHERE trace_id = ? AND (CAST(? AS TEXT) IS NULL OR tenant = ?)",
                (trace_id, tenant, tenant),
            ).fetchone()
            if row is None:
                return None
            trace = rows.trace_of(row)
            shown = self._described(db, trace)
            scope_id = rows.known_scope(db, trace.scope)
            shown["messages"] = json.loads(trace.messages)
            shown["steps"] = objects(
                db,
                "SELECT step_id, parent_id, call_id, ordinal, tool, arguments, observation, made_by, verdict, basis, "
                "signature FROM steps LEFT JOIN attempts USING (scope_id, episode_id, step_id) "
                "WHERE scope_id = ? AND episode_id = ? ORDER BY ordinal",
                (scope_id, trace.episode_id),
            )
            feedback = db.execute(
                f"{rows.SELECT_FEEDBACK} WHERE (trace_id = ? OR (coalesce(scope_id, ?) = ? AND episode_id = ?)) "
                "AND coalesce(tenant, '') IN ('', ?) ORDER BY occurred_at, feedback_id",
                (trace_id, scope_id, scope_id, trace.episode_id, trace.scope.tenant),
            ).fetchall()
            shown["proposal"] = proposal_of(db, trace_id)
            shown["policy"] = decision_of(db, trace_id)
            shown["calls"] = model_calls(db, trace_id)
            shown["feedback"] = [asdict(rows.feedback_of(f)) for f in feedback]
        return shown

    def traces(self, tenant: str | None, *, limit: int = 50, text: str = "") -> list[dict[str, Any]]:
        """Return the latest traces, newest first, whose task or answer holds a text."""
        like = f"%{text.replace('%', '').replace('_', '')}%"
        with self._readers.borrow() as db:
            found = db.execute(
                f"{rows.SELECT_TRACE} WHERE (CAST(? AS TEXT) IS NULL OR tenant = ?) "
                "AND (lower(task) LIKE lower(?) OR lower(answer) LIKE lower(?)) "
                "ORDER BY created_at DESC, trace_id DESC LIMIT ?",
                (tenant, tenant, like, like, limit),
            ).fetchall()
            return [self._described(db, rows.trace_of(row)) for row in found]

    def list_memories(self, tenant: str | None, *, limit: int = 50, memory_id: str | None = None) -> list[MemoryRecord]:
        """Return a tenant's memories of every status, newest first; `tenant` None is the operator."""
        with self._readers.borrow() as db:
            found = db.execute(
                f"{rows.SELECT_MEMORY} WHERE (CAST(? AS TEXT) IS NULL OR tenant = ?) "
                "AND (CAST(? AS TEXT) IS NULL OR memory_id = ?) "
                f"AND status NOT IN {rows.UNSEEN} ORDER BY created_at DESC, memory_id LIMIT ?",
                (tenant, tenant, memory_id, memory_id, limit),
            ).fetchall()
        return [rows.memory_of(row) for row in found]

    def tenants(self, namespace: str) -> list[str]:
        """Return the tenants that have a namespace of this name."""
        with self._readers.borrow() as db:
            found = db.execute("SELECT DISTINCT tenant FROM scopes WHERE namespace = ?", (namespace,)).fetchall()
        return sorted(row[0] for row in found)

    def stats(self) -> dict[str, Any]:
        """Return counts of the whole store: no text of anyone's."""
        with self._readers.borrow() as db:
            counts = {
                name: int(db.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
                for name in ("traces", "steps", "feedback", "scopes")
            }
            actions = dict(db.execute("SELECT action, count(*) FROM traces GROUP BY action"))
            kinds = dict(
                db.execute(f"SELECT kind, count(*) FROM memories WHERE status NOT IN {rows.NO_MEMORY} GROUP BY kind")
            )
            extra = int(db.execute("SELECT coalesce(sum(extra_calls), 0) FROM traces").fetchone()[0])
            outcomes = dict(db.execute("SELECT verdict, count(*) FROM outcomes GROUP BY verdict"))
            statuses = dict(
                db.execute(f"SELECT status, count(*) FROM memories WHERE status NOT IN {rows.UNSEEN} GROUP BY status")
            )
        return {
            **counts, "memories": sum(statuses.values()), "memories_by_status": statuses, "memories_by_kind": kinds,
            "extra_llm_calls": extra,
            "traces_by_action": actions, "traces_by_outcome": outcomes,
            "bytes": self.size_bytes(), "lost": self.lost, "fault": self.fault,
        }  # fmt: skip

    def derived(self) -> list[tuple[Any, ...]]:
        """Return the derived state in a form to compare: what `rebuild` must bring back."""
        with self._readers.borrow() as db:
            memories = db.execute(
                "SELECT memory_id, scope_id, status, task, answer, frame, successes, failures, "
                "used_successes, used_failures, created_at FROM memories "
                f"WHERE status NOT IN {rows.NO_MEMORY} ORDER BY memory_id"
            ).fetchall()
            outcomes = db.execute("SELECT * FROM outcomes ORDER BY trace_id").fetchall()
            fixes = db.execute("SELECT * FROM fix_evidence ORDER BY memory_id, episode_id, step_id, role").fetchall()
            labels = db.execute("SELECT trace_id, correct FROM labels ORDER BY trace_id").fetchall()
            rewards = db.execute(
                "SELECT trace_id, reward, tokens, latency_ms FROM rewards ORDER BY trace_id"
            ).fetchall()
        return [*memories, *outcomes, *fixes, *labels, *rewards]

    def last_number(self) -> int:
        """Return the number of the memory that was made last, 0 where there is none."""
        with self._readers.borrow() as db:
            return int(db.execute("SELECT coalesce(max(number), 0) FROM memories").fetchone()[0])

    def without_vectors(self, fingerprint: str, after: int, limit: int) -> tuple[list[tuple[int, str, str]], int]:
        """Return (number, key, key hash) of memories that this encoder has not seen: upkeep, not recall.

        Looks through a stretch of the numbers after the given one; returns how far it came, too.
        """
        upto = max(min(after + _STRETCH, self.last_number()), after)
        with self._readers.borrow() as db:
            found = db.execute(
                "SELECT number, task, key_hash FROM memories WHERE number > ? AND number <= ? AND kind = 'exemplar' "
                "AND key_hash <> '' AND NOT EXISTS "
                "(SELECT 1 FROM vectors WHERE vectors.key_hash = memories.key_hash AND fingerprint = ?) "
                "ORDER BY number LIMIT ?",
                (after, upto, fingerprint, limit),
            ).fetchall()
        missing = [(int(number), key_of(task), key) for number, task, key in found]
        return missing, missing[-1][0] if len(missing) == limit else upto

    def _described(self, db: Connection, trace: Trace) -> dict[str, Any]:
        shown = asdict(trace)
        verdict = db.execute("SELECT verdict, verified FROM outcomes WHERE trace_id = ?", (trace.trace_id,)).fetchone()
        shown["outcome"] = {"verdict": verdict[0] if verdict else "unknown", "verified": bool(verdict and verdict[1])}
        shown["skipped"] = json.loads(trace.skipped)
        for name, withheld in (("injected", 0), ("withheld", 1)):
            shown[name] = objects(
                db,
                "SELECT memory_id, kind, score, tokens, suggestion FROM injections WHERE trace_id = ? AND withheld = ?",
                (trace.trace_id, withheld),
            )
        del shown["messages"]
        return shown


# Numbers looked through in one statement: some milliseconds, and no reader holds on to an old state for long.
_STRETCH = 2_000
