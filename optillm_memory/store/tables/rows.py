"""Rows and records: the column order of the log's tables, in one place."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from functools import lru_cache
from typing import Any

from optillm_memory.conversation.parse import key_of
from optillm_memory.recall.word_agreement import terms
from optillm_memory.records import Feedback, KnownFix, MemoryRecord, Scope, Trace

_WORDS_KEPT = 400
SCOPE_ID = "SELECT id FROM scopes WHERE tenant = ? AND namespace = ? AND user_id = ? AND agent_id = ?"
INSERT_SCOPE = "INSERT INTO scopes(tenant, namespace, user_id, agent_id) VALUES (?, ?, ?, ?) RETURNING id"

_TRACE_COLUMNS = (
    "trace_id, episode_id, created_at, model, approach, action, held_out, propensity, task, frame, messages, answer, "
    "finish_reason, error, skipped, prompt_tokens, completion_tokens, latency_ms, recall_ms, tags, extra_calls, "
    "partition, continued, continuation, one_shot"
)
SELECT_TRACE = (
    f"SELECT tenant, namespace, user_id, agent_id, {_TRACE_COLUMNS} FROM traces JOIN scopes ON scopes.id = scope_id"
)
INSERT_TRACE = (
    f"INSERT INTO traces(scope_id, {_TRACE_COLUMNS}, key_hash) "
    f"VALUES ({', '.join('?' * 27)}) ON CONFLICT(trace_id) DO NOTHING"
)

FEEDBACK_COLUMNS = "feedback_id, retracts, trace_id, episode_id, metric, value, source, evidence, occurred_at"
SELECT_FEEDBACK = f"SELECT {FEEDBACK_COLUMNS} FROM feedback"
# The trace's own tenant and the operator (the empty tenant) may speak of it. Retractions are counted, for PostgreSQL
# takes NOT EXISTS as a join, and reads all of them.
STANDING = """NOT retracts AND tenant IN ('', ?) AND received_at >= ? AND 0 = (
    SELECT count(*) FROM feedback AS r WHERE r.tenant = feedback.tenant AND r.feedback_id = feedback.feedback_id
    AND r.retracts)"""
INSERT_FEEDBACK = (
    "INSERT INTO feedback(tenant, feedback_id, retracts, scope_id, trace_id, episode_id, metric, value, source, "
    "evidence, occurred_at, received_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)

_MEMORY_VALUES = (
    "scope_id = ?, status = ?, task = ?, answer = ?, frame = ?, key_hash = ?, successes = ?, failures = ?, "
    "used_successes = ?, used_failures = ?, created_at = ?, revision = ?"
)
INSERT_MEMORY = (
    "INSERT INTO memories(memory_id, kind, scope_id, status, task, answer, frame, key_hash, successes, "
    "failures, used_successes, used_failures, created_at, revision) "
    "VALUES (?, 'exemplar', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
UPDATE_MEMORY = f"UPDATE memories SET {_MEMORY_VALUES} WHERE number = ?"
WITHDRAW = (
    "UPDATE memories SET status = CASE status WHEN 'unfounded' THEN status ELSE 'withdrawn' END, task = '', "
    "answer = '', frame = '', key_hash = '', revision = ? WHERE number = ?"
)
# Rows of memories that are gone, and of what is not to be told because it was forgotten, or never was a memory.
NO_MEMORY, UNSEEN = "('withdrawn', 'forgotten', 'unfounded')", "('forgotten', 'unfounded')"
# A memory's number, and whether its uplift was ever measured.
KNOWN = """
    SELECT (SELECT number FROM memories WHERE memory_id = ?), EXISTS (SELECT 1 FROM exposures WHERE memory_id = ?)"""
# The memories that a trace taught something of.
TAUGHT = "SELECT memory_id, number FROM contributions JOIN memories USING (number) WHERE trace_id = ?"
SELECT_MEMORY = (
    "SELECT number, memory_id, kind, status, tenant, namespace, user_id, agent_id, task, answer, frame, successes, "
    "failures, used_successes, used_failures, created_at FROM memories JOIN scopes ON scopes.id = scope_id"
)
# Verified right and wrong answers, any right answer, and verified outcomes of the requests it was injected in; what is
# known of the memory, and whether its uplift was ever measured.
TALLY = """
    SELECT count(*) FILTER (WHERE role = 'evidence' AND verified AND success),
           count(*) FILTER (WHERE role = 'evidence' AND verified AND NOT success),
           count(*) FILTER (WHERE role = 'evidence' AND success),
           count(*) FILTER (WHERE role = 'use' AND verified AND success),
           count(*) FILTER (WHERE role = 'use' AND verified AND NOT success),
           (SELECT status FROM memories WHERE number = ?), EXISTS (SELECT 1 FROM exposures WHERE memory_id = ?)
    FROM contributions WHERE number = ?"""
# What is said of fixes: verified and inferred successes and failures.
TALLIES_BY_FIX = """
    SELECT memory_id, environment, count(*) FILTER (WHERE verified AND success),
           count(*) FILTER (WHERE verified AND NOT success), count(*) FILTER (WHERE NOT verified AND success),
           count(*) FILTER (WHERE NOT verified AND NOT success) FROM fix_evidence WHERE TRUE"""
FIRST_EVIDENCE = """
    SELECT scope_id, task, frame, key_hash, created_at, contributions.answer
    FROM contributions JOIN traces USING (trace_id) WHERE number = ? AND role = 'evidence' AND success
    ORDER BY created_at, trace_id LIMIT 1"""

# Memories that were forgotten and not learned again.
FORGOTTEN = """
    SELECT memory_id FROM forgotten WHERE NOT EXISTS (
        SELECT 1 FROM memories WHERE memories.memory_id = forgotten.memory_id AND status <> 'unfounded')"""


@lru_cache(maxsize=64)
def key_hash(task: str) -> str:
    """Return the id under which the vector of a task's key is kept."""
    return hashlib.blake2b(key_of(task).encode("utf-8", "replace"), digest_size=16).hexdigest()


def known_scope(db: sqlite3.Connection, scope: Scope) -> int:
    """Return a scope's number; 0, which is none's, for a scope that was never written."""
    row = db.execute(SCOPE_ID, (scope.tenant, scope.namespace, scope.user_id, scope.agent_id)).fetchone()
    return int(row[0]) if row else 0


def scoped(scope_id: int, word: str) -> str:
    """Return the term that stands for a scope's word in the full-text index: no query reads past its scope."""
    return f"s{scope_id}x{word}"


def scoped_words(scope_id: int, task: str) -> str:
    """Return the text under which a memory of a scope is found by its words."""
    return " ".join([scoped(scope_id, word) for word in terms(key_of(task), _WORDS_KEPT)])


def trace_values(trace: Trace, scope_id: int) -> tuple[Any, ...]:
    """Return a trace's values in the order of INSERT_TRACE, less the key hash."""
    return (
        scope_id, trace.trace_id, trace.episode_id, trace.created_at, trace.model, trace.approach, trace.action,
        int(trace.held_out), trace.propensity, trace.task, trace.frame, trace.messages, trace.answer,
        trace.finish_reason, trace.error, trace.skipped, trace.prompt_tokens, trace.completion_tokens,
        trace.latency_ms, trace.recall_ms, json.dumps(dict(trace.tags)) if trace.tags else "{}", trace.extra_calls,
        trace.partition, trace.continued, trace.continuation, int(trace.one_shot),
    )  # fmt: skip


def trace_of(row: tuple[Any, ...]) -> Trace:
    """Read a row of SELECT_TRACE."""
    (
        trace_id, episode_id, created_at, model, approach, action, held_out, propensity, task, frame, messages,
        answer, finish_reason, error, skipped, prompt_tokens, completion_tokens, latency_ms, recall_ms, tags,
        extra_calls, partition, continued, continuation, one_shot,
    ) = row[4:]  # fmt: skip
    return Trace(
        trace_id=trace_id, scope=Scope(*row[:4]), episode_id=episode_id, created_at=created_at, model=model,
        approach=approach, action=action, held_out=bool(held_out), propensity=propensity, task=task, frame=frame,
        messages=messages, answer=answer, finish_reason=finish_reason, error=error, skipped=skipped,
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, latency_ms=latency_ms,
        recall_ms=recall_ms, tags=json.loads(tags), extra_calls=extra_calls, partition=partition,
        continued=continued, continuation=continuation, one_shot=bool(one_shot),
    )  # fmt: skip


def feedback_of(row: tuple[Any, ...]) -> Feedback:
    """Read a row of SELECT_FEEDBACK."""
    feedback_id, retracts, trace_id, episode_id, metric, value, source, evidence, occurred_at = row
    return Feedback(
        feedback_id, metric, None if retracts else json.loads(value), source, trace_id, episode_id,
        json.loads(evidence) if evidence else None, occurred_at,
    )  # fmt: skip


def memory_of(row: tuple[Any, ...]) -> MemoryRecord:
    """Read a row of SELECT_MEMORY."""
    memory_id, kind, status, tenant, namespace, user_id, agent_id, task, answer, frame = row[1:11]
    return MemoryRecord(
        memory_id, kind, status, Scope(tenant, namespace, user_id, agent_id), task, answer, frame, *row[11:]
    )


def fix_of(row: tuple[Any, ...]) -> KnownFix:
    """Read a row of `known_fixes` with its value."""
    memory_id, status, tool, field, action, output, signature, relation, text, value = row
    return KnownFix(memory_id, status, tool, field, action, output, signature, relation, text, value)
