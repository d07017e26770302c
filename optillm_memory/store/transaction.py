"""The write side: the tables of one commit, each with what it needs of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import Injected, Placement, Trace
from optillm_memory.store.announced import Announced
from optillm_memory.store.backend import Dialect
from optillm_memory.store.sqlite.connection import WritingConnection
from optillm_memory.store.tables.calls import CallTable
from optillm_memory.store.tables.decisions import DecisionTable
from optillm_memory.store.tables.episodes import EpisodeTable
from optillm_memory.store.tables.exemplars import ExemplarTable
from optillm_memory.store.tables.exposures import ExposureTable
from optillm_memory.store.tables.feedback import FeedbackTable
from optillm_memory.store.tables.fixes import FixTable
from optillm_memory.store.tables.meta import Counters
from optillm_memory.store.tables.procedures import ProcedureTable
from optillm_memory.store.tables.proposals import ProposalTable
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.steps import StepTable
from optillm_memory.store.tables.traces import TraceTable
from optillm_memory.store.tables.vectors import VectorTable

_DERIVED = (
    *("memories", "memories_fts", "contributions", "outcomes", "attempts", "fixes", "fix_evidence", "exposures"),
    "rewards",
)


class Transaction:
    """The tables on the writing connection, for the operations of one commit."""

    def __init__(self, connection: Any, dialect: Dialect, normal: Callable[[str], str] = normal_answer) -> None:
        """Wrap the connection; the writer commits. `normal` gives the form in which answers are compared."""
        db: WritingConnection = connection
        self.db = db
        counters = self.counters = Counters(db)
        scopes = self.scopes = ScopeTable(db)
        traces = self.traces = TraceTable(db, scopes)
        exposures = self.exposures = ExposureTable(db, scopes)
        self.episodes = EpisodeTable(db)
        self.feedback = FeedbackTable(db, scopes, traces)
        self.steps = StepTable(db, scopes, traces)
        vectors = self.vectors = VectorTable(db, dialect)
        procedures = self.procedures = ProcedureTable(db, scopes, counters, traces, exposures, vectors)
        self.exemplars = ExemplarTable(db, scopes, counters, exposures, procedures, dialect)
        self.fixes = FixTable(db, scopes, counters, traces, exposures)
        self.proposals = ProposalTable(db, counters, traces, normal)
        self.decisions = DecisionTable(db, scopes, counters, traces)
        self.calls = CallTable(db)

    def read_ahead(self, announced: Iterable[Announced[Any]]) -> None:
        """Read at once what the operations of a commit say that they will ask for."""
        arrivals = [arrival for item in announced for arrival in item.arrivals]
        submissions = [submission for item in announced for submission in item.feedback]
        arriving = {arrival.trace_id for arrival in arrivals}
        named = (s.trace_id for s in submissions if s.trace_id and s.trace_id not in arriving)
        self.traces.read_ahead(arrivals, named)
        self.feedback.read_ahead(submissions)

    def add_trace(
        self,
        trace: Trace,
        *,
        prefixes: Sequence[str] = (),
        placements: Sequence[Placement] = (),
        injected: Sequence[Injected] = (),
        withheld: Sequence[Injected] = (),
    ) -> bool:
        """Append a trace with its prefixes, ledger entries and what was injected or withheld; False if it exists."""
        if not self.traces.add(trace):
            return False
        scope_id = self.scopes.number(trace.scope)
        self.episodes.add_prefixes(scope_id, trace, prefixes)
        if placements:
            self.episodes.add_placements(scope_id, trace.episode_id, placements)
        if injected or withheld:
            self.traces.add_injections(trace.trace_id, injected, withheld)
        return True

    def clear_derived(self) -> None:
        """Empty what is derived from the log, so that it can be folded again."""
        self.traces.touch(None)
        for table in _DERIVED:
            self.db.execute(f"DELETE FROM {table}")
        self.db.execute("UPDATE labels SET correct = NULL, revision = ?", (self.counters.revision(),))
        self.counters.renew_generation()
