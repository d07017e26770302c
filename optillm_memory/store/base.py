"""The store: the log and what is derived from it, read by scope, written through one thread.

Statements are written once, in SQL that SQLite and PostgreSQL have in common (`postgres.connection` translates the
rest); `backend` names what they do differently. A table's statements are in `tables/`, deleting in
`maintenance/forget.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from optillm_memory.records import EVERYTHING, MemoryRecord, Scope, Tenant, Trace, View
from optillm_memory.store import fold
from optillm_memory.store.backend import Dialect, Location, NoSeal, Pool, Seal, VectorSearch
from optillm_memory.store.maintenance.selection import ForgettingReads
from optillm_memory.store.sqlite.connection import Connection, objects
from optillm_memory.store.sqlite.index_files import IndexFiles
from optillm_memory.store.tables import memories, scopes, traces
from optillm_memory.store.tables.calls import calls_of
from optillm_memory.store.tables.decisions import DecisionReads, decision_of
from optillm_memory.store.tables.episodes import EpisodeReads
from optillm_memory.store.tables.exposures import ExposureReads
from optillm_memory.store.tables.feedback import feedback_shown, reporters, waiting_count
from optillm_memory.store.tables.fixes import FixReads
from optillm_memory.store.tables.memories import RecallReads
from optillm_memory.store.tables.procedures import ProcedureReads
from optillm_memory.store.tables.proposals import ProposalReads, proposal_of
from optillm_memory.store.tables.steps import steps_of
from optillm_memory.store.tables.vectors import VectorReads
from optillm_memory.store.transaction import Transaction
from optillm_memory.store.writer import ReadOnlyWriter, Writer

T = TypeVar("T")


class Store:
    """Reads on any thread, writes through one.

    What a part of a request reads is an attribute of its own (`recall`, `episodes`, `fixes`, …); writing gets a
    `Transaction`; the calls of the store itself concern all tables.
    """

    def __init__(
        self,
        writer: Writer | ReadOnlyWriter,
        readers: Pool,
        *,
        dialect: Dialect,
        search: VectorSearch,
        location: Location,
        seal: Seal | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Join the two sides; the writer gives its operations a `Transaction`.

        `clock` tells in Unix seconds what holds no longer.
        """
        self._writer = writer
        self._readers = readers
        seal = self.seal = seal or NoSeal()
        self._dialect, self._search, self._location = dialect, search, location
        self.recall = RecallReads(readers, dialect, search, seal, clock)
        self.episodes = EpisodeReads(readers, seal, clock)
        self.fixes = FixReads(readers, seal, clock)
        self.procedures = ProcedureReads(readers, seal, clock)
        self.proposals = ProposalReads(readers, seal, clock)
        self.decisions = DecisionReads(readers)
        self.exposures = ExposureReads(readers)
        self.vectors = VectorReads(readers)
        self.forgetting = ForgettingReads(readers)

    # -- writing -----------------------------------------------------------------------------------

    def write(self, operation: Callable[[Transaction], T]) -> Future[T]:
        """Run an operation in the next commit; the future is set once it is on disk."""
        return self._writer.submit(operation)

    def post(self, operation: Callable[[Transaction], Any]) -> None:
        """Run an operation in the background; the caller does not wait for it."""
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
        self._readers.close()  # before the writer: the last connection to close removes the WAL
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

    # -- where it lives ----------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """The file or the server, without secrets."""
        return self._location.place

    def size_bytes(self) -> int:
        """Return how much space all of it takes."""
        return self._location.size_bytes()

    def held(self) -> dict[str, int]:
        """Return how many traces there are, and how many bytes are in use."""
        with self._readers.borrow() as db:
            count = int(db.execute("SELECT count(*) FROM traces").fetchone()[0])
            return {"traces": count, "bytes": self._location.used_bytes(db, count)}

    def check_seal(self, rest: Callable[[], None] = lambda: None) -> list[str]:
        """Compare every row with the seal; return what is wrong. `rest` is called now and then."""
        return self.seal.check(self._readers, rest)

    def rebuild(self, *, accept: bool = False) -> int:  # noqa: ARG002 - only a file is sealed
        """Fold the whole log again; return how many traces it holds.

        Raises StoreError where the seal shows that the log was changed from outside, unless that is to be accepted.
        """
        return self._writer.submit(fold.rebuild).result()

    def outdate_indexes(self, scopes: Iterable[Scope] | None) -> None:
        """Note that files of vectors hold forgotten ones of these scopes, None being all: `erase` removes them."""
        self._location.outdate_indexes(scopes)

    def copy_wal(self) -> None:
        """Do what the writer would do now and then while others wait: copy what it wrote to where it stays."""
        self._location.copy_wal()

    def erase(self, *, progress: Callable[[str], None]) -> list[str]:
        """Remove what was deleted from all files, while others read and write; return what prevented it."""
        return self._location.erase(progress=progress)

    def compact(self, *, progress: Callable[[str], None]) -> list[str]:
        """Rewrite everything without what was deleted, and give back its space; return what prevented it.

        Others wait to write meanwhile: this is for whoever operates it.
        """
        return self._location.compact(progress=progress)

    def set_aside(self, *, delete: bool) -> list[str]:
        """Delete the databases that were set aside as corrupt, or return what they may still contain."""
        return self._location.set_aside(delete=delete)

    def index_files(self) -> IndexFiles | None:
        """Return where recall keeps the vectors of large scopes in files; None where it does not."""
        return self._search.index_files()

    # -- looking at it -----------------------------------------------------------------------------

    def salt(self) -> bytes:
        """Return the database's secret for the holdout."""
        with self._readers.borrow() as db:
            return bytes(db.execute(self._dialect.salt).fetchone()[0])

    def trace(self, trace_id: str, view: View | Tenant) -> dict[str, Any] | None:
        """Return a trace with its steps, injections and feedback; None where a view has none of this id."""
        condition, values = scopes.seen(view)
        with self._readers.borrow() as db:
            row = db.execute(f"{traces.SELECT} WHERE trace_id = ? AND {condition}", (trace_id, *values))
            if (found := row.fetchone()) is None:
                return None
            trace = traces.trace_of(found)
            scope_id = scopes.known(db, trace.scope)
            return {
                **_described(db, trace),
                "messages": json.loads(trace.messages),
                "steps": steps_of(db, scope_id, trace.episode_id),
                "proposal": proposal_of(db, trace_id),
                "policy": decision_of(db, trace_id),
                "calls": calls_of(db, trace_id),
                "feedback": [asdict(item) for item in feedback_shown(db, trace, scope_id)],
            }

    def traces(self, view: View | Tenant, *, limit: int = 50, text: str = "") -> list[dict[str, Any]]:
        """Return the latest traces of a view, newest first, whose task or answer contains a text."""
        like = f"%{text.replace('%', '').replace('_', '')}%"
        condition, values = scopes.seen(view)
        with self._readers.borrow() as db:
            found = db.execute(
                f"{traces.SELECT} WHERE {condition} AND (lower(task) LIKE lower(?) OR lower(answer) LIKE lower(?)) "
                "ORDER BY created_at DESC, trace_id DESC LIMIT ?",
                (*values, like, like, limit),
            ).fetchall()
            return [_described(db, traces.trace_of(row)) for row in found]

    def list_memories(
        self, view: View | Tenant, *, limit: int = 50, memory_id: str | None = None
    ) -> list[MemoryRecord]:
        """Return the memories of a view, of every status, newest first."""
        condition, values = scopes.seen(view)
        with self._readers.borrow() as db:
            found = db.execute(
                f"{memories.SELECT} WHERE {condition} AND (CAST(? AS TEXT) IS NULL OR memory_id = ?) "
                f"AND status NOT IN {memories.UNSEEN} ORDER BY created_at DESC, memory_id LIMIT ?",
                (*values, memory_id, memory_id, limit),
            ).fetchall()
        return [memories.memory_of(row) for row in found]

    def waiting_feedback(self, tenant: str | None) -> int:
        """Return how much feedback of a tenant, or of all for None, is for traces that are not there."""
        with self._readers.borrow() as db:
            return waiting_count(db, tenant)

    def tenants(self, namespace: str) -> list[str]:
        """Return the tenants that have a namespace of this name."""
        with self._readers.borrow() as db:
            found = db.execute("SELECT DISTINCT tenant FROM scopes WHERE namespace = ?", (namespace,)).fetchall()
        return sorted(row[0] for row in found)

    def reporters(self) -> list[tuple[str, int, float, bool]]:
        """Return (name, how much they said, when last, whether revoked) of all reporters, by name."""
        with self._readers.borrow() as db:
            return reporters(db)

    def has_tenant(self, tenant: str) -> bool:
        """Whether anything was ever recorded for a tenant."""
        with self._readers.borrow() as db:
            return db.execute("SELECT 1 FROM scopes WHERE tenant = ? LIMIT 1", (tenant,)).fetchone() is not None

    def stats(self, view: View | Tenant = EVERYTHING) -> dict[str, Any]:
        """Return counts of what a view has, and no text; of everything also the store's size and what ails it."""
        view = View.of(view)
        condition, values = scopes.seen(view)
        within = f"scope_id IN (SELECT id FROM scopes WHERE {condition})"
        of_traces = f"trace_id IN (SELECT trace_id FROM traces WHERE {within})"
        if view == EVERYTHING:
            within = of_traces = "1 = 1"
        with self._readers.borrow() as db:

            def by(column: str, table: str, condition: str) -> dict[str, int]:
                sql = f"SELECT {column}, count(*) FROM {table} WHERE {condition} GROUP BY {column}"
                return dict(db.execute(sql, values).fetchall())

            def count(what: str, table: str, condition: str) -> int:
                return int(db.execute(f"SELECT {what} FROM {table} WHERE {condition}", values).fetchone()[0])

            kinds = by("kind", "memories", f"status NOT IN {memories.NO_MEMORY} AND {within}")
            statuses = by("status", "memories", f"status NOT IN {memories.UNSEEN} AND {within}")
            counts = {
                "traces": count("count(*)", "traces", within),
                "steps": count("count(*)", "steps", within),
                "feedback": count("count(*)", "feedback", "1 = 1" if view == EVERYTHING else of_traces),
                "scopes": count("count(*)", "scopes", condition),
            }
            extra = count("coalesce(sum(extra_calls), 0)", "traces", within)
            actions, outcomes = by("action", "traces", within), by("verdict", "outcomes", of_traces)
        of_all: dict[str, Any] = {}
        if view == EVERYTHING:
            of_all = {"bytes": self.size_bytes(), "lost": self.lost, "fault": self.fault}
            of_all |= {"seal_fault": self.seal.fault, "forged_rows_skipped": self.seal.skipped}
        return {
            **counts, "memories": sum(statuses.values()), "memories_by_status": statuses, "memories_by_kind": kinds,
            "extra_llm_calls": extra,
            "traces_by_action": actions, "traces_by_outcome": outcomes, **of_all,
        }  # fmt: skip

    def derived(self) -> list[tuple[Any, ...]]:
        """Return the derived state in a form to compare: what `rebuild` must bring back."""
        with self._readers.borrow() as db:
            return [row for sql in _DERIVED for row in db.execute(sql).fetchall()]


def _described(db: Connection, trace: Trace) -> dict[str, Any]:
    verdict = db.execute("SELECT verdict, verified FROM outcomes WHERE trace_id = ?", (trace.trace_id,)).fetchone()
    described = {
        **asdict(trace),
        "skipped": json.loads(trace.skipped),
        "outcome": {"verdict": verdict[0] if verdict else "unknown", "verified": bool(verdict and verdict[1])},
    }
    for name, withheld in (("injected", 0), ("withheld", 1)):
        described[name] = objects(
            db,
            "SELECT memory_id, kind, score, tokens, suggestion FROM injections WHERE trace_id = ? AND withheld = ?",
            (trace.trace_id, withheld),
        )
    del described["messages"]
    return described


_DERIVED = (
    (
        "SELECT memory_id, scope_id, status, task, answer, frame, successes, failures, used_successes, used_failures, "
        f"created_at, valid_until FROM memories WHERE status NOT IN {memories.NO_MEMORY} ORDER BY memory_id"
    ),
    "SELECT * FROM outcomes ORDER BY trace_id",
    "SELECT * FROM fix_evidence ORDER BY memory_id, episode_id, step_id, role",
    "SELECT trace_id, correct FROM labels ORDER BY trace_id",
    "SELECT trace_id, reward, tokens, latency_ms FROM rewards ORDER BY trace_id",
)
