"""The table `traces`, with `injections`: one row for each request, and what memory added or withheld."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from optillm_memory.learn.attempts import environment_of
from optillm_memory.records import Injected, Scope, Trace, Verdict, View
from optillm_memory.store.announced import Arrival, padded
from optillm_memory.store.sqlite.connection import WritingConnection, marks
from optillm_memory.store.tables.scopes import ScopeTable, seen
from optillm_memory.store.tables.vectors import key_hash

PENDING_S = 7 * 86_400.0  # feedback waits for its trace for so long
_CACHED = 64  # traces: what is written about one comes soon after it, or soon after it was read


class TraceTable:
    """The write half, and what the fold reads.

    Within a commit it remembers the latest traces, and which are *untouched*: alone in their episode, and nothing is
    written about them or it.
    """

    def __init__(self, db: WritingConnection, scopes: ScopeTable) -> None:
        self._db = db
        self._scopes = scopes
        self._cache: dict[str, Trace] = {}
        self._absent: set[str] = set()  # ids of traces that are not there
        self._blank: dict[str, str] = {}  # of these with their episodes those of which there is nothing else, either
        self._arrived = ""  # the latest trace, if it was one of those and still is untouched
        self._untouched: dict[str, Trace] = {}
        self._latest_of: dict[tuple[Scope, str], str] = {}  # by episode, of what was added in this commit or untouched

    def read_ahead(self, arrivals: Sequence[Arrival], named: Iterable[str]) -> None:
        """Read at once whether there is anything of some traces that will arrive, and of some that feedback names."""
        if arrivals:
            asked = padded(arrivals)
            values = [value for arrival in asked for value in arrival]
            absent = dict(self._db.execute(_ABSENT.format(", ".join(["(?, ?)"] * len(asked))), values).fetchall())
            self._absent = set(absent)
            self._blank = {a.trace_id: a.episode_id for a in arrivals if absent.get(a.trace_id)}
        if older := list(dict.fromkeys(named))[:_CACHED]:
            asked_ids = padded(older)
            for row in self._db.execute(_UNTOUCHED.format(marks(asked_ids)), asked_ids).fetchall():
                self._keep(self._remember(trace_of(row)))

    def add(self, trace: Trace) -> bool:
        """Append a trace; False if it exists."""
        scope_id = self._scopes.number(trace.scope)
        values = (*_values(trace, scope_id), key_hash(trace.task))
        if trace.trace_id in self._absent:
            self._absent.remove(trace.trace_id)
            self._db.later(_INSERT, [values])
        elif not self._db.execute(_INSERT, values).rowcount:
            return False
        self._remember(trace)
        before = self._latest_of.get((trace.scope, trace.episode_id))
        self._untouched.pop(before or "", None)
        self._latest_of[trace.scope, trace.episode_id] = trace.trace_id
        blank = self._blank.pop(trace.trace_id, None) == trace.episode_id and before is None
        self._arrived = trace.trace_id if blank else ""
        return True

    def add_injections(self, trace_id: str, injected: Sequence[Injected], withheld: Sequence[Injected]) -> None:
        """Append what was injected into a request, or withheld from it."""
        self.touch(trace_id)
        self._db.later(
            "INSERT INTO injections(trace_id, memory_id, kind, score, tokens, suggestion, withheld) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            [
                (trace_id, i.memory_id, i.kind, i.score, i.tokens, i.suggestion, held)
                for held, items in ((0, injected), (1, withheld))
                for i in items
            ],
        )

    def get(self, trace_id: str) -> Trace | None:
        """Return a trace."""
        if (trace := self._cache.get(trace_id)) is not None:
            return trace
        row = self._db.execute(f"{SELECT} WHERE trace_id = ?", (trace_id,)).fetchone()
        return self._remember(trace_of(row)) if row else None

    def ids(self) -> list[str]:
        """Return the ids of all traces, oldest first."""
        return [row[0] for row in self._db.execute("SELECT trace_id FROM traces ORDER BY created_at, trace_id")]

    def after(self, seq: int, upto: int, limit: int) -> list[tuple[int, str]]:
        """Return (number, id) of the next traces after a number, up to another."""
        sql = "SELECT seq, trace_id FROM traces WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
        return [(int(number), str(name)) for number, name in self._db.execute(sql, (seq, upto, limit)).fetchall()]

    # -- episodes ----------------------------------------------------------------------------------

    def episodes(self) -> list[tuple[Scope, str]]:
        """Return every episode."""
        found = self._db.execute(
            "SELECT tenant, namespace, user_id, agent_id, episode_id FROM traces JOIN scopes ON scopes.id = scope_id "
            "GROUP BY tenant, namespace, user_id, agent_id, episode_id ORDER BY min(created_at)"
        ).fetchall()
        return [(Scope(*row[:4]), str(row[4])) for row in found]

    def scopes_of(self, view: View, episode_id: str) -> list[int]:
        """Return the scopes of a view that have an episode of this name."""
        condition, values = seen(view)
        found = self._db.execute(
            f"SELECT DISTINCT scope_id FROM traces JOIN scopes ON scopes.id = scope_id WHERE episode_id = ? "
            f"AND {condition}",
            (episode_id, *values),
        ).fetchall()
        return [int(row[0]) for row in found]

    def of_episode(self, scope: Scope, episode_id: str) -> list[str]:
        """Return the ids of an episode's traces, oldest first."""
        sql = f"SELECT trace_id FROM traces WHERE {_OF_EPISODE} ORDER BY created_at, trace_id"
        return [str(row[0]) for row in self._db.execute(sql, self._key(scope, episode_id)).fetchall()]

    def latest(self, scope: Scope, episode_id: str) -> Trace | None:
        """Return the latest trace of an episode, one that did not fail where there is one."""
        order = "ORDER BY CASE WHEN error IS NULL THEN 0 ELSE 1 END, created_at DESC, trace_id DESC LIMIT 1"
        sql = f"SELECT trace_id FROM traces WHERE {_OF_EPISODE} {order}"
        row = self._db.execute(sql, self._key(scope, episode_id)).fetchone()
        return self.get(row[0]) if row else None

    def closing(self, scope: Scope, episode_id: str) -> str | None:
        """Return the latest trace of the episode that has an answer in words."""
        sql = f"SELECT trace_id FROM traces WHERE {_OF_EPISODE} AND answer > '' {_LATEST}"
        row = self._db.execute(sql, self._key(scope, episode_id)).fetchone()
        return str(row[0]) if row else None

    def verdict(self, scope: Scope, episode_id: str) -> Verdict:
        """Return the latest verified outcome among an episode's traces."""
        # The order of the join: by the episode's traces.
        sql = f"SELECT verdict FROM traces CROSS JOIN outcomes USING (trace_id) WHERE {_OF_EPISODE} AND verified"
        row = self._db.execute(f"{sql} {_LATEST}", self._key(scope, episode_id)).fetchone()
        return row[0] if row else "unknown"

    def environments(self, scope: Scope, episode_id: str) -> dict[str, str]:
        """Return the environment of each trace of an episode."""
        sql = f"SELECT trace_id, tags FROM traces WHERE {_OF_EPISODE}"
        found = self._db.execute(sql, self._key(scope, episode_id))
        return {row[0]: environment_of(json.loads(row[1])) for row in found}

    def demonstrated(self, scope: Scope, episode_id: str) -> list[Trace]:
        """Return the traces of an episode that a demonstration, on them or on the episode, belongs to."""
        key = self._key(scope, episode_id)
        found = self._db.execute(_DEMONSTRATED, (*key, *key, episode_id)).fetchall()
        return [trace for trace_id in sorted({row[0] for row in found}) if (trace := self.get(trace_id)) is not None]

    # -- untouched episodes ------------------------------------------------------------------------

    def keep_untouched(self, trace: Trace) -> bool:
        """Return whether a trace and its episode are untouched; remember that for this commit."""
        if self._arrived != trace.trace_id:
            key = self._key(trace.scope, trace.episode_id)
            asked = (*key, *(trace.trace_id,) * 4, trace.episode_id, *key)
            if self._db.execute(_TOUCHED, asked).fetchone()[0]:
                return False
        self._keep(trace)
        return True

    def _keep(self, trace: Trace) -> None:
        self._untouched[trace.trace_id] = trace
        self._latest_of[trace.scope, trace.episode_id] = trace.trace_id

    def is_untouched(self, trace: Trace) -> bool:
        """Whether a trace is known to be untouched."""
        return trace.trace_id in self._untouched

    def take_untouched(self, trace_id: str, received_at: float) -> Trace | None:
        """Return a trace that is still untouched, for feedback of this age; after that it no longer is."""
        trace = self._untouched.pop(trace_id, None)
        return trace if trace is not None and received_at >= trace.created_at - PENDING_S else None

    def touch(self, trace_id: str | None) -> None:
        """Note that something is written about a trace, None being any."""
        if trace_id is None:
            self._untouched.clear()
            self._blank.clear()
        else:
            self._untouched.pop(trace_id, None)
            self._blank.pop(trace_id, None)
        if trace_id in (None, self._arrived):
            self._arrived = ""

    def clear_cache(self) -> None:
        """Read the traces again: some were deleted or changed."""
        self._cache.clear()
        self.touch(None)

    def _remember(self, trace: Trace) -> Trace:
        if len(self._cache) >= _CACHED:
            del self._cache[next(iter(self._cache))]
        self._cache[trace.trace_id] = trace
        return trace

    def _key(self, scope: Scope, episode_id: str) -> tuple[int, str]:
        return self._scopes.number(scope), episode_id


def trace_of(row: tuple[Any, ...]) -> Trace:
    """Return a row of `SELECT` as a trace."""
    values = dict(zip(_NAMES, row[4:], strict=True))
    values["tags"] = json.loads(values["tags"])
    for flag in _FLAGS:
        values[flag] = bool(values[flag])
    return Trace(scope=Scope(*row[:4]), **values)


def _values(trace: Trace, scope_id: int) -> tuple[Any, ...]:
    """Return a trace's values in the order of `_INSERT`, without the key hash."""
    values = list(_VALUES(trace))
    values[_TAGS] = json.dumps(dict(trace.tags)) if trace.tags else "{}"
    return scope_id, *values


_NAMES = (
    *("trace_id", "episode_id", "created_at", "model", "approach", "action", "held_out", "propensity", "task"),
    *("frame", "messages", "answer", "finish_reason", "error", "skipped", "prompt_tokens", "completion_tokens"),
    *("latency_ms", "recall_ms", "tags", "extra_calls", "partition", "continued", "continuation", "one_shot"),
    *("end_user", "goal", "asker"),
)
_FLAGS = ("held_out", "one_shot")
_VALUES, _TAGS = attrgetter(*_NAMES), _NAMES.index("tags")
SELECT = (
    f"SELECT tenant, namespace, user_id, agent_id, {', '.join(_NAMES)} FROM traces JOIN scopes ON scopes.id = scope_id"
)
_INSERT = (
    f"INSERT INTO traces(scope_id, {', '.join(_NAMES)}, key_hash) "
    f"VALUES ({', '.join('?' * (len(_NAMES) + 2))}) ON CONFLICT(trace_id) DO NOTHING"
)
_OF_EPISODE = "scope_id = ? AND episode_id = ?"
_LATEST = "ORDER BY created_at DESC, trace_id DESC LIMIT 1"
# Of traces that are not there: whether nothing is there of their episode either, nor feedback that waits for them.
_ABSENT = """
    WITH asked(trace_id, episode_id) AS (VALUES {})
    SELECT trace_id, (SELECT 1 FROM traces WHERE traces.episode_id = asked.episode_id LIMIT 1) IS NULL
        AND (SELECT 1 FROM feedback WHERE feedback.trace_id = asked.trace_id LIMIT 1) IS NULL
        AND (SELECT 1 FROM feedback WHERE feedback.episode_id = asked.episode_id LIMIT 1) IS NULL
    FROM asked WHERE (SELECT 1 FROM traces WHERE traces.trace_id = asked.trace_id LIMIT 1) IS NULL"""
_DEMONSTRATED = f"""
    SELECT traces.trace_id FROM traces CROSS JOIN feedback ON feedback.trace_id = traces.trace_id
    WHERE traces.scope_id = ? AND traces.episode_id = ? AND metric = 'demonstration'
    UNION SELECT trace_id FROM (SELECT trace_id FROM traces WHERE {_OF_EPISODE} {_LATEST}) AS latest
    WHERE EXISTS (SELECT 1 FROM feedback WHERE episode_id = ? AND metric = 'demonstration')"""
# Whether anything is written about a trace and its episode, except what `add` writes of a plain one.
_TOUCHED = """
    SELECT (SELECT count(*) FROM traces WHERE scope_id = ? AND episode_id = ?) > 1
        OR EXISTS (SELECT 1 FROM injections WHERE trace_id = ?) OR EXISTS (SELECT 1 FROM proposals WHERE trace_id = ?)
        OR EXISTS (SELECT 1 FROM decisions WHERE trace_id = ?) OR EXISTS (SELECT 1 FROM feedback WHERE trace_id = ?)
        OR EXISTS (SELECT 1 FROM feedback WHERE episode_id = ?)
        OR EXISTS (SELECT 1 FROM steps WHERE scope_id = ? AND episode_id = ?)"""
# The same of traces that are there, of one-shot requests: what an earlier release recorded is not known so well.
_UNTOUCHED = f"""{SELECT} WHERE trace_id IN ({{}}) AND one_shot
    AND seq > coalesce((SELECT value FROM meta WHERE key = 'fold_upto'), 0)
    AND (SELECT count(*) FROM traces AS t WHERE t.scope_id = traces.scope_id AND t.episode_id = traces.episode_id) = 1
    AND (SELECT 1 FROM injections WHERE injections.trace_id = traces.trace_id LIMIT 1) IS NULL
    AND (SELECT 1 FROM proposals WHERE proposals.trace_id = traces.trace_id LIMIT 1) IS NULL
    AND (SELECT 1 FROM decisions WHERE decisions.trace_id = traces.trace_id LIMIT 1) IS NULL
    AND (SELECT 1 FROM feedback WHERE feedback.trace_id = traces.trace_id LIMIT 1) IS NULL
    AND (SELECT 1 FROM feedback WHERE feedback.episode_id = traces.episode_id LIMIT 1) IS NULL
    AND (SELECT 1 FROM steps WHERE steps.scope_id = traces.scope_id AND steps.episode_id = traces.episode_id LIMIT 1)
        IS NULL"""
