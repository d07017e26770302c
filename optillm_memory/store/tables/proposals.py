"""The tables `proposals` and `labels`: what memory would have answered, and whether that was right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optillm_memory.decide.actions import NextAction, action_partition
from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.gate import Decision, Label
from optillm_memory.decide.gate_updater import Change
from optillm_memory.learn.exemplars import Learned
from optillm_memory.learn.labels import label
from optillm_memory.recall.retriever import Version
from optillm_memory.records import Exemplar, Scope, Trace
from optillm_memory.store.backend import Pool, Seal
from optillm_memory.store.sqlite.connection import Connection, marks
from optillm_memory.store.tables import memories, meta, scopes
from optillm_memory.store.tables.meta import Counters
from optillm_memory.store.tables.procedures import PREFIX
from optillm_memory.store.tables.traces import TraceTable
from optillm_memory.store.tables.vectors import SEARCHED

_AUDITED = "audit"


@dataclass
class ProposalTable:
    """The write half, and what the fold reads. `normal` gives the form in which answers are compared."""

    db: Connection
    counters: Counters
    traces: TraceTable
    normal: Callable[[str], str]

    def add(self, trace: Trace, scope_id: int, proposal: Proposal, decision: Decision) -> None:
        """Append what memory would have answered to a trace, and what the gate decided."""
        self.traces.touch(trace.trace_id)
        if proposal.memory_ids[0].startswith(PREFIX):
            if (
                not decision.serve
                and self.db.execute(
                    _PROPOSED_BEFORE, (scope_id, trace.episode_id, proposal.answer, trace.trace_id)
                ).fetchone()
            ):
                return  # the same action again, as long as the agent does not take it: one label is enough
            trace = replace(trace, partition=action_partition(trace.frame, NextAction.of_text(proposal.answer).tool))
        parts = {name: getattr(proposal, name) for name in ("agreement", "similarity", "margin", "encoder")}
        self.db.execute(
            "INSERT INTO proposals VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                trace.trace_id, scope_id, trace.partition, proposal.answer, json.dumps(proposal.memory_ids),
                proposal.memory_ids[0], proposal.score, int(proposal.exact), json.dumps(proposal.vetoes),
                int(decision.serve), int(decision.reason == _AUDITED), decision.reason,
                json.dumps({**parts, "threshold": decision.threshold, "pooled": decision.pooled}),
            ),
        )  # fmt: skip
        self.db.execute(
            "INSERT INTO labels VALUES (?, ?, NULL, ?) ON CONFLICT DO NOTHING",
            (trace.trace_id, scope_id, self.counters.revision()),
        )

    def actions_of(self, scope_id: int, episode_id: str) -> list[tuple[str, NextAction, bool, bool | None]]:
        """Return (trace id, action, served, label) of the actions that memory proposed in an episode."""
        found = self.db.execute(_ACTIONS, (scope_id, episode_id)).fetchall()
        return [
            (trace_id, NextAction.of_text(answer), bool(served), None if correct is None else bool(correct))
            for trace_id, answer, served, correct in found
        ]

    def put_action_label(self, trace_id: str, correct: bool | None) -> None:
        """Bring the label of an action up to date; one that was served and wrong counts against its procedure."""
        revision = self.counters.revision()
        self.db.execute("UPDATE labels SET correct = ?, revision = ? WHERE trace_id = ?", (correct, revision, trace_id))
        self.db.execute(
            "UPDATE memories SET revision = ? WHERE memory_id = (SELECT memory_id FROM proposals "
            "WHERE trace_id = ? AND (served OR audit))",
            (revision, trace_id),
        )

    def put_label(self, trace: Trace, learned: Learned) -> None:
        """Bring the label of a trace's proposal up to date, and the memory that a hit rested on."""
        row = self.db.execute(
            "SELECT answer, memory_id, served OR audit, correct FROM proposals JOIN labels USING (trace_id) "
            "WHERE trace_id = ?",
            (trace.trace_id,),
        ).fetchone()
        if row is None or row[1].startswith(PREFIX):  # an action's label is found with its episode
            return
        proposed, memory_id, hit, before = row
        correct = label(trace, learned, proposed, self.normal)
        if correct == (None if before is None else bool(before)):
            return
        revision = self.counters.revision()
        self.db.execute(
            "UPDATE labels SET correct = ?, revision = ? WHERE trace_id = ?", (correct, revision, trace.trace_id)
        )
        if hit:  # a hit that was wrong puts its memory in quarantine
            self.db.execute("UPDATE memories SET revision = ? WHERE memory_id = ?", (revision, memory_id))


# Whether an action was proposed earlier in its episode.
_PROPOSED_BEFORE = """
    SELECT 1 FROM traces CROSS JOIN proposals USING (trace_id) WHERE traces.scope_id = ? AND episode_id = ?
    AND proposals.answer = ? AND trace_id < ? LIMIT 1"""
_ACTIONS = f"""
    SELECT trace_id, proposals.answer, served, correct FROM traces CROSS JOIN proposals USING (trace_id)
    JOIN labels USING (trace_id) WHERE traces.scope_id = ? AND episode_id = ? AND memory_id LIKE '{PREFIX}%'"""


@dataclass
class ProposalReads:
    """The read half, for the gate; every call is bound to one scope."""

    readers: Pool
    seal: Seal
    clock: Callable[[], float]

    def revision(self, scope: Scope) -> Version:
        """Return what differs whenever any memory or label has changed."""
        return meta.version(self.readers, scope)

    def exemplars(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, Exemplar]:
        """Return the exemplars of the scope that have these numbers, as the gate sees them; also superseded ones."""
        wanted = list(numbers)
        with self.readers.borrow() as db:
            found = db.execute(
                f"{memories.SELECT} WHERE +scope_id = ? AND {SEARCHED} AND number IN ({marks(wanted)})",
                (scopes.known(db, scope), *wanted),
            ).fetchall()
            found = memories.as_written(self.seal, db, found)
            asked, ids = [row[0] for row in found], [row[1] for row in found]
            numbered, named = f"number IN ({marks(asked)})", f"memory_id IN ({marks(ids)})"
            origins: dict[int, list[tuple[str, str, str]]] = {}
            right: dict[int, str] = {}
            for number, partition, first, last, latest in db.execute(
                "SELECT number, partition, min(episode_id), max(episode_id), max(trace_id) FROM contributions "
                f"CROSS JOIN traces USING (trace_id) WHERE {numbered} AND role = 'evidence' AND success AND verified "
                "GROUP BY number, partition",
                asked,
            ):
                origins.setdefault(number, []).append((partition, first, last))
                right[number] = max(right.get(number, ""), latest)
            wrong = dict(
                db.execute(
                    f"SELECT number, max(trace_id) FROM contributions WHERE {numbered} AND role = 'evidence' "
                    "AND NOT success AND verified GROUP BY number",
                    asked,
                )
            )
            misled = dict(
                db.execute(
                    f"SELECT memory_id, max(trace_id) FROM proposals JOIN labels USING (trace_id) WHERE {named} "
                    "AND NOT correct AND (served OR audit) GROUP BY memory_id",
                    ids,
                )
            )
        return {
            row[0]: Exemplar(
                memories.memory_of(row),
                tuple(origins.get(row[0], ())),
                failed=wrong.get(row[0], "") > right.get(row[0], ""),
                quarantined=misled.get(row[1], "") > right.get(row[0], ""),
            )
            for row in found
        }

    def gate_changes(self, scope: Scope, since: int) -> tuple[int, list[Change]]:
        """Return (revision, changes) of the proposals that came, or whose label changed, after a revision, in order.

        Exact repeats and vetoed proposals are no labels.
        """
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT trace_id, score, correct, partition, served, parts, labels.revision FROM labels JOIN proposals "
                "USING (trace_id) WHERE labels.scope_id = ? AND labels.revision > ? AND NOT exact AND vetoes = '[]' "
                "ORDER BY trace_id",
                (scopes.known(db, scope), since),
            ).fetchall()
        changed = [
            Change(
                trace_id,
                Label(score, None if correct is None else bool(correct), partition),
                bool(served),
                json.loads(parts).get("encoder", ""),
            )
            for trace_id, score, correct, partition, served, parts, _ in found
        ]
        return max((row[-1] for row in found), default=since), changed


def proposal_of(db: Connection, trace_id: str) -> dict[str, Any] | None:
    """Return what memory would have answered to a trace, what the gate decided, and how that turned out."""
    row = db.execute(
        "SELECT answer, memory_ids, score, exact, vetoes, served, reason, parts, correct FROM proposals "
        "JOIN labels USING (trace_id) WHERE trace_id = ?",
        (trace_id,),
    ).fetchone()
    if row is None:
        return None
    answer, memory_ids, score, exact, vetoes, served, reason, parts, correct = row
    return {
        "answer": answer, "memory_ids": json.loads(memory_ids), "score": score, "exact": bool(exact),
        "vetoes": json.loads(vetoes), "served": bool(served), "reason": reason, **json.loads(parts),
        "correct": None if correct is None else bool(correct),
    }  # fmt: skip
