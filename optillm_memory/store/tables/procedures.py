"""Procedures in the table `memories`, one for each solved episode, and the table `lines`: what an agent's users wrote.

A procedure's `answer` is JSON: the texts that the user wrote, and the steps. What several of them agree on is found out
when one is needed, so that nothing here depends on the order in which they came.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from optillm_memory.conversation.goal import KEY_LENGTH
from optillm_memory.learn.procedures.mine import Procedure, ProcedureStep
from optillm_memory.records import Message, Scope, Trace, Verdict
from optillm_memory.store.backend import Pool, Seal
from optillm_memory.store.sqlite.connection import Connection, marks
from optillm_memory.store.tables import memories, scopes
from optillm_memory.store.tables.exposures import ExposureTable
from optillm_memory.store.tables.meta import Counters
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.traces import TraceTable
from optillm_memory.store.tables.vectors import VectorTable

PREFIX = "proc-"
OF_PROCEDURES = "('solved', 'followed')"  # roles of contributions: each belongs to an episode, not to a trace
_TITLE = 500  # characters of what the user wrote that are shown in lists
_LINES_MOST = 2_000  # conversations of an agent that are read at once, the latest


def procedure_id(scope: Scope, episode_id: str) -> str:
    """Return the memory id of the procedure of an episode."""
    parts = (scope.tenant, scope.namespace, scope.user_id, scope.agent_id, episode_id)
    text = "\x1f".join(parts)
    return PREFIX + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


@dataclass
class ProcedureTable:
    """The write half, and what the fold reads."""

    db: Connection
    scopes: ScopeTable
    counters: Counters
    traces: TraceTable
    exposures: ExposureTable
    vectors: VectorTable

    def add_lines(self, scope_id: int, trace: Trace, keys: Sequence[str]) -> None:
        """Append the lines (by key) that the user of an episode wrote, each once."""
        row = self.db.execute(_LINES_OF, (scope_id, trace.episode_id)).fetchone()
        known = keys_in(row[1]) if row else set()
        fresh = "".join(key for key in dict.fromkeys(keys) if key not in known)
        if row is None:
            self.db.execute(_ADD_LINES, (scope_id, trace.episode_id, trace.frame, fresh))
        elif fresh:  # at the end again: whoever has read up to here reads it once more
            self.db.execute(_ADD_LINES, (scope_id, trace.episode_id, trace.frame, row[1] + fresh))
            self.db.execute("DELETE FROM lines WHERE seq = ?", (row[0],))

    def conversation(self, scope: Scope, episode_id: str) -> tuple[list[Trace], list[Message]]:
        """Return the latest branch of an episode: its traces, oldest first, and its messages in OpenAI's form."""
        traces = [t for t in map(self.traces.get, self.traces.of_episode(scope, episode_id)) if t is not None]
        if not traces:
            return [], []
        found = self.db.execute(_PREFIXES, (self.scopes.number(scope), episode_id)).fetchall()
        made = {prefix: trace_id for prefix, trace_id in found if trace_id}
        by_id = {t.trace_id: t for t in traces}
        # A request that failed at the end, or whose client gave up, is no branch of its own.
        chain = [next((t for t in reversed(traces) if t.error is None), traces[-1])]
        while (before := by_id.pop(made.get(chain[-1].continued, ""), None)) is not None:
            chain.append(before)
            if not before.continued:
                break
        chain.reverse()
        return chain, [sent(message) for trace in chain for message in json.loads(trace.messages)]

    def put(
        self, scope: Scope, episode_id: str, procedure: Procedure | None, first: Trace | None, ending: str = ""
    ) -> None:
        """Replace what an episode's solution taught; None where it is no solution (any more).

        `first` is the trace that the episode began with. With an `ending`, which says what shows that it was solved, it
        is a candidate; without one it is verified.
        """
        memory_id = procedure_id(scope, episode_id)
        known = self.db.execute("SELECT number, status FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
        if procedure is None or first is None:
            if known is not None and known[1] not in ("withdrawn", "unfounded", "forgotten"):
                self.db.execute("DELETE FROM contributions WHERE number = ? AND role = 'solved'", (known[0],))
                self.db.execute(_WITHDRAW, (self.counters.revision(), known[0]))
            return
        steps = [step.as_json() for step in procedure.steps]
        content = {"texts": procedure.texts, "steps": steps, "episode": episode_id, "user": first.end_user}
        content |= {"ending": ending} if ending else {}
        values = (
            "\n".join(procedure.texts)[:_TITLE], _as_text(content), first.frame, first.created_at,
            self.counters.revision(), *(("candidate", 0) if ending else ("verified", 1)),
        )  # fmt: skip
        if known is None:
            self.db.execute(_INSERT, (memory_id, self.scopes.number(scope), *values))
        else:
            self.db.execute(_UPDATE, (self.scopes.number(scope), *values, known[0]))
        number = self._number(memory_id)
        self.db.execute("DELETE FROM contributions WHERE number = ? AND role = 'solved'", (number,))
        self.db.execute(_CONTRIBUTE, (number, first.trace_id, "solved", 1))
        self.db.execute(_HOLDS_UNTIL, (*(self.scopes.number(scope), episode_id), number))
        self.refresh(memory_id)

    def credit(self, scope: Scope, episode_id: str, verdict: Verdict) -> None:
        """Bring up to date what an episode's outcome says of the procedures that stood in its prompts."""
        key = (self.scopes.number(scope), episode_id)
        given = self.db.execute(_GIVEN, key).fetchall()
        before = self.db.execute(_FOLLOWED, key).fetchall()
        success = {"success": 1, "failure": 0}.get(verdict)
        now = [] if success is None else [(memory_id, trace_id, success) for memory_id, trace_id in given]
        if sorted(now) == sorted((m, t, int(s)) for m, t, s in before):
            return
        for _, trace_id, _ in before:
            self.db.execute("DELETE FROM contributions WHERE trace_id = ? AND role = 'followed'", (trace_id,))
        revision = self.counters.revision()
        for memory_id, trace_id, good in now:
            self.db.execute(_UNFOUNDED, (memory_id, key[0], revision))
            self.db.execute(_CONTRIBUTE, (self._number(memory_id), trace_id, "followed", good))
        for memory_id in sorted({m for m, *_ in (*before, *now)}):
            self.refresh(memory_id)

    def _number(self, memory_id: str) -> int:
        return int(self.db.execute("SELECT number FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()[0])

    def put_vectors(self, vectors: Sequence[tuple[str, str, bytes]], fingerprint: str) -> None:
        """Keep the vectors of goals, as (memory id, key hash, vector)."""
        self.vectors.put([(key, vector) for _, key, vector in vectors], fingerprint)
        self.db.executemany(
            "UPDATE memories SET key_hash = ? WHERE memory_id = ? AND status = 'verified'",
            [(key, memory_id) for memory_id, key, _ in vectors],
        )

    def refresh(self, memory_id: str) -> None:
        """Bring up to date how the requests went that a procedure was injected into, and whether it is retired."""
        row = self.db.execute(_TALLY, (memory_id,)).fetchone()
        if row is None:
            return
        number, status, used_right, used_wrong = row
        if status in ("verified", "retired"):
            status = "retired" if self.exposures.is_retired(memory_id) else "verified"
        self.db.execute(_REFRESH, (status, used_right, used_wrong, self.counters.revision(), number))


class StoredProcedure(NamedTuple):
    """A procedure as it is read: whether it may be offered (`stands`), and how episodes that had it went.

    `number` is that of its row, which stays when it is forgotten and loses its id.
    """

    number: int
    memory_id: str
    stands: bool
    frame: str
    episode_id: str
    user: str
    texts: tuple[str, ...]
    steps: tuple[ProcedureStep, ...]
    used_successes: int
    used_failures: int
    at: float
    misled: float  # when an action that was served from it was last found wrong; 0: never
    key_hash: str  # of the goal whose vector is kept; empty where none is
    valid_until: float | None = None

    def holds(self, now: float) -> bool:
        """Whether what it says still holds at a moment, in Unix seconds."""
        return self.valid_until is None or self.valid_until > now


@dataclass
class ProcedureReads:
    """The read half; every call is bound to one scope."""

    readers: Pool
    seal: Seal
    clock: Callable[[], float]

    def changed(self, scope: Scope, since: int) -> list[StoredProcedure]:
        """Return the procedures of a scope that have changed after a revision."""
        with self.readers.borrow() as db:
            found = db.execute(_CHANGED, (scopes.known(db, scope), since)).fetchall()
            good = {row[0] for row in memories.as_written(self.seal, db, found)}
        # One that was changed from outside is told of, too: it takes the place of what was read of it earlier.
        return [_stored(row) if row[0] in good else _stored(row)._replace(stands=False) for row in found]

    def vectors(self, fingerprint: str, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the vectors of goals that are kept, by key hash."""
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT key_hash, vector FROM vectors WHERE fingerprint = ? AND key_hash IN ({marks(keys)})",
                (fingerprint, *keys),
            ).fetchall()
        return {str(key): bytes(vector) for key, vector in found}

    def lines(self, scope: Scope, frame: str, since: int) -> list[tuple[int, str, str]]:
        """Return (place, episode id, keys) of what the users of an agent wrote after a place, oldest first."""
        with self.readers.borrow() as db:
            found = db.execute(_LINES_AFTER, (scopes.known(db, scope), frame, since, _LINES_MOST)).fetchall()
        return [(int(seq), str(episode), str(keys)) for seq, episode, keys in reversed(found)]


def keys_in(keys: str) -> set[str]:
    """Return the line keys in a row of the table `lines`."""
    return {keys[i : i + KEY_LENGTH] for i in range(0, len(keys), KEY_LENGTH)}


def _stored(row: tuple[Any, ...]) -> StoredProcedure:
    number, memory_id, status, frame, answer, used_right, used_wrong, at, misled, key_hash, valid_until = row
    content: Mapping[str, Any] = json.loads(answer) if answer else {}
    return StoredProcedure(
        int(number), memory_id, status == "verified" and bool(content), frame,
        content.get("episode", ""), content.get("user", ""),
        tuple(content.get("texts", ())), tuple(map(ProcedureStep.of_json, content.get("steps", ()))),
        int(used_right), int(used_wrong), float(at), float(misled), key_hash, valid_until,
    )  # fmt: skip


def _as_text(content: Mapping[str, Any]) -> str:
    """Return a content as it may be stored: JSON may hold halves of characters."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace").decode()


def sent(message: Message) -> Message:
    """Return a recorded message in the form in which it was sent."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    made = [
        {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls
    ]
    return {**message, "tool_calls": made}


_LINES_OF = "SELECT seq, keys FROM lines WHERE scope_id = ? AND episode_id = ?"
_ADD_LINES = "INSERT INTO lines(scope_id, episode_id, frame, keys) VALUES (?, ?, ?, ?)"
_LINES_AFTER = """
    SELECT seq, episode_id, keys FROM lines WHERE scope_id = ? AND frame = ? AND seq > ? ORDER BY seq DESC LIMIT ?"""
_PREFIXES = """
    SELECT hash, trace_id FROM traces CROSS JOIN prefixes USING (trace_id)
    WHERE traces.scope_id = ? AND traces.episode_id = ?"""
_CHANGED = """
    SELECT number, memory_id, status, frame, answer, used_successes, used_failures, created_at,
        coalesce((SELECT max(traces.created_at) FROM proposals JOIN labels USING (trace_id) JOIN traces USING (trace_id)
            WHERE proposals.memory_id = memories.memory_id AND NOT correct AND (served OR audit)), 0),
        key_hash, valid_until
    FROM memories
    WHERE scope_id = ? AND revision > ? AND kind = 'procedure' ORDER BY created_at, memory_id"""
_TALLY = """
    SELECT number, status,
        (SELECT count(*) FROM contributions
            WHERE contributions.number = memories.number AND role = 'followed' AND success),
        (SELECT count(*) FROM contributions
            WHERE contributions.number = memories.number AND role = 'followed' AND NOT success)
    FROM memories WHERE memory_id = ?"""
_INSERT = """
    INSERT INTO memories(memory_id, scope_id, task, answer, frame, created_at, revision, status, successes, kind,
    key_hash, failures, used_successes, used_failures) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'procedure', '', 0, 0, 0)"""
_UPDATE = """
    UPDATE memories SET scope_id = ?, task = ?, answer = ?, frame = ?, created_at = ?, revision = ?,
    status = ?, successes = ?, kind = 'procedure', key_hash = '', failures = 0 WHERE number = ?"""
_WITHDRAW = """
    UPDATE memories SET status = 'withdrawn', task = '', answer = '', successes = 0, revision = ? WHERE number = ?"""
# What was last verified of its episode says until when.
_HOLDS_UNTIL = """
    UPDATE memories SET valid_until = (SELECT outcomes.valid_until FROM traces CROSS JOIN outcomes USING (trace_id)
        WHERE traces.scope_id = ? AND traces.episode_id = ?
        ORDER BY verified DESC, created_at DESC, trace_id DESC LIMIT 1)
    WHERE number = ?"""
# Of the episode that solved it, by its first trace; of the episodes that had it, by the trace where they first did.
_CONTRIBUTE = """
    INSERT INTO contributions(number, trace_id, role, success, verified, answer) VALUES (?, ?, ?, ?, TRUE, NULL)"""
_GIVEN = """
    SELECT memory_id, min(traces.trace_id) FROM traces CROSS JOIN injections USING (trace_id)
    WHERE scope_id = ? AND episode_id = ? AND kind = 'procedure' AND NOT withheld GROUP BY memory_id"""
_FOLLOWED = """
    SELECT memory_id, traces.trace_id, success FROM traces CROSS JOIN contributions USING (trace_id)
    JOIN memories USING (number) WHERE traces.scope_id = ? AND episode_id = ? AND role = 'followed'"""
# What there is evidence on has a row; it is `unfounded` while it is not solved (yet).
_UNFOUNDED = """
    INSERT INTO memories(memory_id, scope_id, task, answer, frame, created_at, revision, kind, status, key_hash,
    successes, failures, used_successes, used_failures) VALUES (?, ?, '', '', '', 0, ?, 'procedure', 'unfounded', '',
    0, 0, 0, 0) ON CONFLICT DO NOTHING"""
_REFRESH = "UPDATE memories SET status = ?, used_successes = ?, used_failures = ?, revision = ? WHERE number = ?"
