"""Forgetting: traces are deleted with everything that was derived, copied or said of them; the rest is folded again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from optillm_memory.learn import fold
from optillm_memory.learn.attempts import inferred_id
from optillm_memory.learn.exemplars import exemplar_id
from optillm_memory.records import Scope, Trace
from optillm_memory.store.sqlite.connection import Connection, marks
from optillm_memory.store.tables import rows

NOTED_S = 7 * 86_400.0  # what is under way may hold a copy for as long
ASKED, ERASED = "forgetting", "erased"  # in `meta`: the last erasure that was asked for, and the last that was done
_REPLACEMENT = "(forgotten)"
_STEP = "scope_id = ? AND episode_id = ? AND step_id = ?"
_PLACE = "scope_id = ? AND episode_id = ? AND anchor = ? AND form = ?"
_MEMORY_ID = re.compile(r"(?:mem|fix)-[0-9a-f]+")
# What belongs to one trace alone.
_BY_TRACE = (
    "injections", "calls", "proposals", "labels", "decisions", "rewards", "outcomes", "contributions", "prefixes",
    "traces",
)  # fmt: skip
_BY_EPISODE = ("prefixes", "ledger")


class ForgetTables:
    """The part of a transaction that deletes."""

    _db: Connection
    _recent: dict[str, Trace]

    def _next(self, counter: str) -> int:
        raise NotImplementedError

    def _refresh_memory(self, memory_id: str, revision: int) -> None:
        raise NotImplementedError

    def forget_traces(self, trace_ids: Sequence[str], now: float, errors: dict[int, set[str]] | None = None) -> int:
        """Delete traces, and memories that rest on nothing else; return how many traces there were.

        What is left of their episodes, and of other episodes that share a fix with them, is folded again. `errors`
        takes up the error messages of their steps by scope number, for other insertions may quote them.
        """
        traces = [t for t in map(self._log.trace, dict.fromkeys(trace_ids)) if t is not None]
        episodes = list(dict.fromkeys((t.scope, t.episode_id) for t in traces))
        named = self._named_by(traces)
        fixes = self._fixes_of(episodes)
        closed = [key for key in episodes if self._log.closing_trace(*key) in {t.trace_id for t in traces}]
        steps = self._delete_steps([t.trace_id for t in traces], errors if errors is not None else {})
        self.forget_feedback(*_in("feedback_id", [inferred_id(*step) for step in steps]))
        self.forget_feedback(*_in("trace_id", [t.trace_id for t in traces]))
        for table in _BY_TRACE:
            self._delete(table, *_in("trace_id", [t.trace_id for t in traces]))
        for key in episodes:
            emptied = not self._log.episode_traces(*key)
            if emptied or key in closed:  # what was said of the whole spoke of its end: it fits no other trace
                self._delete_episode_feedback(*key)
            if emptied:
                for table in _BY_EPISODE:
                    self._delete(table, "scope_id = ? AND episode_id = ?", [self._log.scope_id(key[0]), key[1]])
        shared = self._episodes_with(fixes)
        self._delete("fixes", *_in("memory_id", fixes))  # defined again by those that still show them
        self._fold([*episodes, *(key for key in shared if key not in set(episodes))])
        revision = self._next("revision")
        for memory_id in named:
            self._refresh_memory(memory_id, revision)
        self._scrub([*named, *fixes], now)
        return len(traces)

    def forget_episodes(
        self, episodes: Sequence[tuple[int, str]], worth: int, before: float, most: int, now: float
    ) -> tuple[int, dict[int, set[str]]]:
        """Delete episodes that are worth so much at most and ended before a moment, until `most` traces are gone.

        Returns how many episodes went, and the error messages of their steps by scope number.
        """
        gone, errors = 0, dict[int, set[str]]()
        for key in episodes:  # one after another: each may make the next one's evidence the last of a memory
            found, last = self._db.execute(_WORTH, (*key,) * 9).fetchone()
            if most > 0 and last is not None and found <= worth and last < before:
                traces = self._db.execute("SELECT trace_id FROM traces WHERE scope_id = ? AND episode_id = ?", key)
                most -= self.forget_traces([row[0] for row in traces.fetchall()], now, errors)
                gone += 1
        return gone, errors

    def forget_feedback(self, condition: str, values: Sequence[Any]) -> int:
        """Delete feedback, with what retracts it; return how many there were."""
        found = self._db.execute(f"SELECT tenant, feedback_id FROM feedback WHERE {condition}", tuple(values))
        named = list(dict.fromkeys(found.fetchall()))
        for tenant, feedback_id in named:
            self._delete("feedback", "tenant = ? AND feedback_id = ?", [tenant, feedback_id])
        return len(named)

    def forget_copies(self, trace_ids: Sequence[str], now: float) -> int:
        """Take what was copied from forgotten memories out of these requests; return how many there were.

        They lose the insertion, the proposal, and the answer where it was reused.
        """
        self._delete("forgotten", "at < ?", [now - NOTED_S])
        chosen, values = _in("trace_id", trace_ids)
        episodes = []
        for trace in map(self._log.trace, trace_ids):
            if trace is None:
                continue
            episodes.append((trace.scope, trace.episode_id))
            self._withdraw_answer(trace)
        self._db.execute(f"UPDATE calls SET messages = '[]' WHERE {chosen} AND {_GONE_INSIDE}", values)
        proposed = self._db.execute(f"SELECT trace_id FROM proposals WHERE {chosen} AND {_GONE}", values).fetchall()
        for table in ("proposals", "labels"):
            self._delete(table, *_in("trace_id", [row[0] for row in proposed]))
        self._delete("injections", f"{chosen} AND {_GONE}", values)
        for key in dict.fromkeys(episodes):
            self._delete_placements(*key)
        self._fold(dict.fromkeys(episodes))
        return len(episodes)

    def forget_begins(self) -> int:
        """Note that something is forgotten that is still in files; return the number of its erasure."""
        sql = f"INSERT INTO meta VALUES ('{ASKED}', 1) ON CONFLICT (key) DO UPDATE SET value = meta.value + 1"
        return int(self._db.execute(f"{sql} RETURNING value").fetchone()[0])

    def forget_ends(self, erasure: int) -> None:
        """Note that nothing of what was forgotten up to an erasure is in any file."""
        sql = f"INSERT INTO meta VALUES ('{ERASED}', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        self._db.execute(f"{sql} WHERE meta.value < excluded.value", (erasure,))

    def drop_placements(self, scope_id: int, places: Sequence[tuple[str, str, str]]) -> None:
        """Delete insertions of a scope by their episode, anchor and form."""
        for place in places:
            self._delete("ledger", _PLACE, [scope_id, *place])

    def drop_empty_scopes(self) -> int:
        """Delete the names of scopes that nothing is left of; return how many there were."""
        return self._delete("scopes", EMPTY_SCOPE, ())

    def drop_rows(self, table: str, condition: str) -> int:
        """Delete rows that belong to nothing; return how many."""
        return self._delete(table, condition, ())

    # -- parts -------------------------------------------------------------------------------------

    @property
    def _log(self) -> fold.Log:
        return cast("fold.Log", self)

    def _delete(self, table: str, condition: str, values: Iterable[Any]) -> int:
        self._recent.clear()
        return int(self._db.execute(f"DELETE FROM {table} WHERE {condition}", tuple(values)).rowcount)

    def _named_by(self, traces: Sequence[Trace]) -> list[str]:
        """Return the ids of all exemplars that these traces have, or once had, anything to do with."""
        condition, values = _in("trace_id", [t.trace_id for t in traces])
        found = self._db.execute(
            f"SELECT DISTINCT memory_id FROM contributions JOIN memories USING (number) WHERE {condition}", values
        ).fetchall()
        named = {row[0] for row in found}
        for trace in traces:  # feedback that was retracted has left no trace but itself
            said = self._db.execute(
                "SELECT value FROM feedback WHERE metric = 'demonstration' AND (trace_id = ? OR episode_id = ?)",
                (trace.trace_id, trace.episode_id),
            ).fetchall()
            answers = [trace.answer, *(json.loads(row[0]) for row in said)]
            named |= {exemplar_id(trace.scope, trace.frame, trace.task, a) for a in answers if isinstance(a, str)}
        return sorted(named)

    def _fixes_of(self, episodes: Iterable[tuple[Scope, str]]) -> list[str]:
        found: dict[str, None] = {}
        for scope, episode_id in episodes:
            key = (self._log.scope_id(scope), episode_id)
            sql = "SELECT DISTINCT memory_id FROM fix_evidence WHERE scope_id = ? AND episode_id = ?"
            found |= {row[0]: None for row in self._db.execute(sql, key).fetchall()}
        return list(found)

    def _episodes_with(self, fixes: Sequence[str]) -> list[tuple[Scope, str]]:
        condition, values = _in("memory_id", fixes)
        found = self._db.execute(
            "SELECT DISTINCT tenant, namespace, user_id, agent_id, episode_id FROM fix_evidence "
            f"JOIN scopes ON scopes.id = scope_id WHERE {condition}",
            values,
        ).fetchall()
        return [(Scope(*row[:4]), row[4]) for row in found]

    def _delete_steps(self, trace_ids: Sequence[str], errors: dict[int, set[str]]) -> list[tuple[Scope, str, str]]:
        """Delete the steps that these traces asked for or brought; return them."""
        condition, values = _in("traces.trace_id", trace_ids)
        found = self._db.execute(f"{_STEPS} WHERE {condition}", values).fetchall()
        for *_, episode_id, step_id, scope_id in found:
            key = (scope_id, episode_id, step_id)
            said = self._db.execute(f"SELECT message FROM attempts WHERE {_STEP} AND verdict = 'failure'", key)
            errors.setdefault(scope_id, set()).update(row[0] for row in said.fetchall())
            for table in ("steps", "attempts"):
                self._delete(table, _STEP, key)
        return [(Scope(*row[:4]), row[4], row[5]) for row in found]

    def _delete_episode_feedback(self, scope: Scope, episode_id: str) -> None:
        scope_id = self._log.scope_id(scope)
        self.forget_feedback(_OF_EPISODE, [episode_id, scope_id, scope.tenant, scope_id])

    def _delete_placements(self, scope: Scope, episode_id: str) -> None:
        key = [self._log.scope_id(scope), episode_id]
        found = self._db.execute(
            "SELECT anchor, form, items FROM ledger WHERE scope_id = ? AND episode_id = ?", key
        ).fetchall()
        for anchor, form, items in found:
            if gone_of(self._db, _MEMORY_ID.findall(items)):
                self._delete("ledger", _PLACE, [*key, anchor, form])

    def _withdraw_answer(self, trace: Trace) -> None:
        """Empty an answer that was reused from a forgotten memory: it stays known that there was one."""
        sql = f"SELECT 1 FROM proposals WHERE trace_id = ? AND {_GONE}"
        if trace.action != "reuse" or not self._db.execute(sql, (trace.trace_id,)).fetchone():
            return
        messages = [
            {**m, "content": _REPLACEMENT} if m.get("content") == trace.answer else m
            for m in json.loads(trace.messages)
        ]
        self._recent.clear()
        self._db.execute(
            "UPDATE traces SET answer = ?, messages = ? WHERE trace_id = ?",
            (_REPLACEMENT, json.dumps(messages), trace.trace_id),
        )

    def _fold(self, episodes: Iterable[tuple[Scope, str]]) -> None:
        for scope, episode_id in episodes:
            fold.relearn(self._log, self._log.episode_traces(scope, episode_id))
            fold.weigh(self._log, scope, episode_id)  # also where no trace is left
            fold.relearn_steps(self._log, scope, episode_id)

    def _scrub(self, memory_ids: Sequence[str], now: float) -> None:
        """Empty the memories among these that nothing stands for any more, and note that they are gone.

        A row that others' traces still say something of keeps its id: should it be learned again, that counts.
        """
        condition, values = _in("memory_id", memory_ids)
        standing = self._db.execute(
            f"SELECT memory_id FROM memories WHERE {condition} "
            f"AND (kind = 'exemplar' AND status NOT IN {rows.NO_MEMORY} "
            "OR EXISTS (SELECT 1 FROM fixes WHERE fixes.memory_id = memories.memory_id))",
            values,
        ).fetchall()
        gone = sorted(set(memory_ids) - {row[0] for row in standing})
        condition, values = _in("memory_id", gone)
        self._db.executemany(
            "INSERT INTO forgotten VALUES (?, ?) ON CONFLICT (memory_id) DO UPDATE SET at = excluded.at",
            [(memory_id, now) for memory_id in gone],
        )
        self._db.execute(
            f"UPDATE memories SET memory_id = CASE WHEN {_SPOKEN_OF} THEN memory_id "
            f"ELSE 'forgotten-' || CAST(number AS TEXT) END, status = CASE WHEN {_SPOKEN_OF} THEN 'unfounded' "
            "ELSE 'forgotten' END, task = '', answer = '', frame = '', key_hash = '', successes = 0, failures = 0, "
            f"used_successes = 0, used_failures = 0, revision = ? WHERE {condition}",
            (self._next("revision"), *values),
        )


def gone_of(db: Connection, memory_ids: Iterable[str]) -> set[str]:
    """Return those of the memories that were forgotten and not learned again."""
    condition, values = _in("memory_id", list(memory_ids))
    return {row[0] for row in db.execute(f"SELECT memory_id FROM forgotten WHERE {condition} AND {_GONE}", values)}


def _in(column: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    return (f"{column} IN ({marks(values)})" if values else "1 = 0"), list(values)


# Feedback that came before any trace of its episode names no scope: another scope's episode may bear the same name.
_OF_EPISODE = """episode_id = ? AND (scope_id = ? OR (scope_id IS NULL AND tenant IN ('', ?) AND NOT EXISTS (
    SELECT 1 FROM traces WHERE traces.episode_id = feedback.episode_id AND traces.scope_id <> ?)))"""
_GONE = f"memory_id IN ({rows.FORGOTTEN})"
_GONE_INSIDE = f"trace_id IN (SELECT trace_id FROM injections WHERE {_GONE})"
COPIED = f"SELECT trace_id FROM injections WHERE {_GONE} UNION SELECT trace_id FROM proposals WHERE {_GONE}"
# What a trace asked for is in its own episode, as is what it brought.
STEPS_OF_TRACES = """traces JOIN scopes ON scopes.id = traces.scope_id JOIN steps ON steps.scope_id = traces.scope_id
    AND steps.episode_id = traces.episode_id AND (steps.trace_id = traces.trace_id OR made_by = traces.trace_id)"""
_STEPS = f"""
    SELECT DISTINCT tenant, namespace, user_id, agent_id, steps.episode_id, step_id, steps.scope_id
    FROM {STEPS_OF_TRACES}"""
_SPOKEN_OF = "EXISTS (SELECT 1 FROM contributions WHERE contributions.number = memories.number)"
EMPTY_SCOPE = f"""
    NOT EXISTS (SELECT 1 FROM traces WHERE traces.scope_id = scopes.id)
    AND NOT EXISTS (SELECT 1 FROM memories WHERE memories.scope_id = scopes.id
                    AND status NOT IN {rows.NO_MEMORY})
    AND id NOT IN (SELECT scope_id FROM feedback WHERE scope_id IS NOT NULL)"""
_STANDING = "status IN ('verified', 'quarantined', 'retired')"
_ENOUGH = 10  # successes without a failure: a memory stands on the latest as well
_HERE = "traces.scope_id = ? AND traces.episode_id = ?"
# What an episode is worth: 3 a memory rests on it, 2 it counts in the gate, the policy, the uplift or a memory's value,
# 1 its outcome is known, 0 nothing is known of it; and when it ended.
_WORTH = f"""
    SELECT CASE
        WHEN EXISTS (SELECT 1 FROM traces CROSS JOIN contributions USING (trace_id) JOIN memories USING (number)
            WHERE {_HERE} AND role = 'evidence' AND verified AND {_STANDING}
            AND NOT (failures = 0 AND successes > {_ENOUGH}))
        OR EXISTS (SELECT 1 FROM fix_evidence JOIN memories USING (memory_id)
            WHERE fix_evidence.scope_id = ? AND episode_id = ? AND role <> 'followed' AND {_STANDING})
        OR EXISTS (SELECT 1 FROM traces CROSS JOIN proposals USING (trace_id) JOIN labels USING (trace_id)
            JOIN memories USING (memory_id) WHERE {_HERE} AND NOT correct AND (served OR audit) AND {_STANDING})
        OR EXISTS (SELECT 1 FROM exposures JOIN memories USING (memory_id)
            WHERE exposures.scope_id = ? AND episode_id = ? AND status = 'retired') THEN 3
        WHEN EXISTS (SELECT 1 FROM traces CROSS JOIN contributions USING (trace_id) WHERE {_HERE})
        OR EXISTS (SELECT 1 FROM traces CROSS JOIN labels USING (trace_id) WHERE {_HERE} AND correct IS NOT NULL)
        OR EXISTS (SELECT 1 FROM traces CROSS JOIN rewards USING (trace_id) WHERE {_HERE} AND reward IS NOT NULL)
            THEN 2
        WHEN EXISTS (SELECT 1 FROM traces CROSS JOIN outcomes USING (trace_id) WHERE {_HERE}) THEN 1
        ELSE 0 END, (SELECT max(created_at) FROM traces WHERE {_HERE})"""
