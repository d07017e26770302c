"""Feedback on a trace that nothing else is known of: what is not asked of the log then changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agents import DONE, ERROR, RIGHT, WRONG, call, calling, results
from builders import NOW, SCOPE, feedback, trace

from optillm_memory.conversation.parse import parse
from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.gate import Decision
from optillm_memory.decide.policy import Choice
from optillm_memory.learn.exemplars import exemplar_id
from optillm_memory.records import Arm, Feedback, Injected, Trace
from optillm_memory.store import fold
from optillm_memory.store.announced import Announced, Submission
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables.traces import PENDING_S
from optillm_memory.store.transaction import Transaction

Event = Callable[[Transaction], Any]
TABLES = ("memories", "contributions", "outcomes", "exposures", "fix_evidence", "labels", "rewards", "memories_fts")
PLAIN = trace("list the files", "ls", trace_id="t1", propensity=0.9)
FURTHER = trace("show free space", "df", trace_id="t2", propensity=0.9, created_at=NOW + 1)
KNOWN = trace("list files", "ls", trace_id="t0", episode_id="before")
USED = (Injected(exemplar_id(SCOPE, KNOWN.frame, KNOWN.task, "ls"), "exemplar", 1.0, 1),)
PROPOSAL = Proposal("rm", "rm", 0.9, exact=False, vetoes=(), memory_ids=("mem-1",), agreement=1, similarity=1, margin=1)


def arrives(made: Trace, injected: Sequence[Injected] = (), also: Callable[[Transaction], Any] | None = None) -> Event:
    """Return the arrival of a trace, with what else is written of it."""

    def arrive(tx: Transaction) -> None:
        tx.add_trace(made, injected=injected)
        observed = also(tx) if also else ()
        fold.trace_arrived(tx, made)
        fold.steps_arrived(tx, made, observed or (), received_at=NOW)

    return arrive


def said(item: Feedback, *, by: str = "local", at: float = NOW) -> Event:
    """Return the arrival of feedback; what is refused is so whenever it comes."""

    def arrive(tx: Transaction) -> None:
        fold.feedback_arrived(tx, by, None, item, received_at=at)

    return arrive


def propose(tx: Transaction) -> None:
    """Write what memory would have answered to the plain trace."""
    tx.proposals.add(PLAIN, tx.scopes.number(SCOPE), PROPOSAL, Decision(serve=False, reason="audit"))


def proposed(tx: Transaction) -> None:
    """Arrive: what memory would have answered to the plain trace, later than that."""
    propose(tx)
    fold.proposal_arrived(tx, PLAIN)


def choose(tx: Transaction) -> None:
    """Write that an arm was chosen for the plain trace."""
    choice = Choice(Arm("quick", "none", "m", 1.0), 0.5, {"quick": 0.5}, 0, "better", 0.0)
    tx.decisions.add(PLAIN, tx.scopes.number(SCOPE), choice, 20)


def act(tx: Transaction) -> Any:
    """Write that an agent tried something before its first request, and then what worked."""
    tried, meant = calling(call(WRONG, "call_1")), calling(call(RIGHT, "call_2"))
    shown = [{"role": "user", "content": PLAIN.task}, tried, *results(tried, ERROR), meant, *results(meant, DONE)]
    return tx.steps.add(tx.scopes.number(SCOPE), PLAIN.episode_id, PLAIN.trace_id, parse({"messages": shown}).steps)


GOOD, BAD = feedback(feedback_id="a"), feedback(value=False, feedback_id="b", occurred_at=NOW + 1)
SHOWN = feedback("df -h", feedback_id="c", metric="demonstration", source="human")
OF_ALL = feedback(value=False, feedback_id="d", trace_id=None, episode_id="ep-1")
TRIED = replace(SHOWN, evidence={"command": "ls", "exit_code": 1, "output": "ls: not found"})
CASES: dict[str, list[Event]] = {
    "the usual case": [arrives(PLAIN), said(GOOD)],
    "no exemplar": [arrives(replace(PLAIN, task="")), said(GOOD)],
    "the operator's": [arrives(PLAIN), said(GOOD, by="")],
    "another tenant's": [arrives(PLAIN), said(GOOD, by="other")],
    "an answer that was reused": [arrives(replace(PLAIN, action="reuse")), said(GOOD)],
    "an opinion": [arrives(PLAIN), said(replace(GOOD, source="llm")), said(BAD)],
    "one after another": [arrives(PLAIN), said(GOOD), said(BAD)],
    "the same again": [arrives(PLAIN), said(GOOD), said(GOOD)],
    "taken back": [arrives(PLAIN), said(GOOD), said(replace(GOOD, value=None))],
    "taken back before": [arrives(PLAIN), said(replace(GOOD, value=None)), said(GOOD)],
    "taken back before the trace": [said(replace(GOOD, value=None)), arrives(PLAIN), said(GOOD)],
    "a right answer": [arrives(PLAIN), said(SHOWN)],
    "a right command": [arrives(PLAIN), said(TRIED)],
    "taken back by its id alone": [said(replace(GOOD, value=None, trace_id=None)), arrives(PLAIN), said(GOOD)],
    "said before": [said(BAD), arrives(PLAIN), said(GOOD)],
    "said of the episode before": [said(OF_ALL), arrives(PLAIN), said(GOOD)],
    "said of the episode by a better judge": [said(OF_ALL), arrives(PLAIN), said(replace(GOOD, source="llm"))],
    "said of the episode": [arrives(PLAIN), said(OF_ALL), said(GOOD)],
    "said of the episode afterwards": [arrives(PLAIN), said(GOOD), said(OF_ALL)],
    "of both": [arrives(PLAIN), said(replace(OF_ALL, trace_id="t1")), said(GOOD)],
    "too early": [arrives(PLAIN), said(GOOD, at=NOW - PENDING_S - 1)],
    "what was injected": [arrives(KNOWN), said(replace(GOOD, trace_id="t0")), arrives(PLAIN, USED), said(BAD)],
    "a further request": [arrives(PLAIN), arrives(FURTHER, USED), said(GOOD)],
    "an earlier request": [arrives(PLAIN, USED), arrives(FURTHER), said(replace(GOOD, trace_id="t2"))],
    "an answer that was proposed": [arrives(PLAIN), proposed, said(GOOD)],
    "an answer that was proposed with it": [arrives(PLAIN, also=propose), said(GOOD)],
    "an arm": [arrives(PLAIN, also=choose), said(GOOD)],
    "an agent's steps": [arrives(PLAIN, also=act), said(GOOD)],
    "an answer that is proposed": [arrives(PLAIN), said(GOOD), proposed],
    "two at once": [arrives(PLAIN), arrives(replace(FURTHER, episode_id="ep-2")), said(GOOD),
                    said(replace(BAD, trace_id="t2"))],
    "the same task": [arrives(PLAIN), said(GOOD), arrives(replace(PLAIN, trace_id="t3", episode_id="ep-3")),
                      said(replace(BAD, trace_id="t3"))],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_commit_teaches_what_many_do(tmp_path: Path, name: str) -> None:
    """Traces and feedback that share a commit leave the tables as they are when each has its own, and as a rebuild."""
    events = CASES[name]
    together, apart = SqliteStore(tmp_path / "one.db"), SqliteStore(tmp_path / "many.db")
    try:
        together.write(lambda tx: [event(tx) for event in events]).result(10)
        for event in events:
            apart.write(event).result(10)
        assert tables(together) == tables(apart)
        before = together.derived()
        together.write(fold.rebuild).result(10)
        assert together.derived() == before
        apart.write(fold.rebuild).result(10)
        assert apart.derived() == before
    finally:
        together.close()
        apart.close()


def tables(store: SqliteStore) -> dict[str, list[Any]]:
    """Return what is derived, less revisions: a commit has one."""
    with store._readers.borrow() as db:
        found = {}
        for table in TABLES:
            cursor = db.execute(f"SELECT * FROM {table}")
            kept = [i for i, column in enumerate(cursor.description) if column[0] != "revision"]
            found[table] = sorted(([row[i] for i in kept] for row in cursor), key=repr)
        return found


def test_what_one_commit_knows_the_next_asks_for(tmp_path: Path) -> None:
    """Feedback on a trace of an earlier commit is folded with all that is said of it by then."""
    store = SqliteStore(tmp_path / "memory.db")
    try:
        store.write(lambda tx: [event(tx) for event in (arrives(PLAIN), said(GOOD))]).result(10)
        store.write(said(BAD)).result(10)
        found = tables(store)
        assert [row[2] for row in found["outcomes"]] == [1]
        assert [row[1] for row in found["outcomes"]] == ["failure"]
        assert len(found["contributions"]) == 1
    finally:
        store.close()


def _run(events: Sequence[Event], tx: Transaction) -> list[Any]:
    return [event(tx) for event in events]


@pytest.mark.parametrize("commits", [1, 2])
def test_the_usual_case_asks_the_log_little(tmp_path: Path, commits: int) -> None:
    """What is known to be empty is not asked for, also in a later commit: earlier lessons, injections, labels."""
    asked: list[str] = []
    store = SqliteStore(tmp_path / "memory.db")
    try:
        writer: Any = store._writer
        writer._connection.set_trace_callback(asked.append)
        events = CASES["the usual case"]
        for part in [events] if commits == 1 else [[event] for event in events]:
            told = [Submission("", "unused", PLAIN.trace_id)]  # as whoever submits feedback announces it
            store.write(Announced(partial(_run, part), feedback=told)).result(10)
        writer._connection.set_trace_callback(None)
    finally:
        store.close()
    plain = [" ".join(sql.split()) for sql in asked]
    asks = "FROM contributions|memory_id FROM injections|JOIN labels|metric = 'demonstration'"
    assert not [sql for sql in plain if re.search(asks, sql)]
    assert [sql for sql in plain if sql.startswith("INSERT INTO contributions")]
