"""Deleting rows: traces with all that was derived and copied from them and their feedback; the rest is folded again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from optillm_memory.learn.attempts import inferred_id
from optillm_memory.learn.exemplars import exemplar_id
from optillm_memory.records import Scope, Trace
from optillm_memory.store import fold
from optillm_memory.store.sqlite.connection import marks
from optillm_memory.store.tables.feedback import TARGETLESS, drop_retractions
from optillm_memory.store.tables.forgotten import GONE, gone_of
from optillm_memory.store.tables.memories import NO_MEMORY
from optillm_memory.store.tables.procedures import procedure_id
from optillm_memory.store.transaction import Transaction

NOTED_S = 7 * 86_400.0  # what is under way may hold a copy for as long
ASKED, ERASED = "forgetting", "erased"  # in `meta`: the last erasure that was asked for, and the last that was done
_REPLACEMENT = "(forgotten)"
_EPISODE = "scope_id = ? AND episode_id = ?"
_STEP = f"{_EPISODE} AND step_id = ?"
_PLACE = "scope_id = ? AND episode_id = ? AND anchor = ? AND form = ?"
_MEMORY_ID = re.compile(r"(?:mem|fix|proc)-[0-9a-f]+")
# What belongs to one trace alone.
_BY_TRACE = (
    "injections", "calls", "proposals", "labels", "decisions", "rewards", "outcomes", "contributions", "prefixes",
    "traces",
)  # fmt: skip
# What belongs to an episode; a prefix has gone with its trace, unless an earlier schema noted it without one.
_IN_EPISODE = "scope_id = ? AND episode_id = ?"
_BY_EPISODE = {"ledger": _IN_EPISODE, "lines": _IN_EPISODE, "prefixes": f"trace_id = '' AND {_IN_EPISODE}"}


def delete_traces(
    tx: Transaction, trace_ids: Sequence[str], now: float, errors: dict[int, set[str]] | None = None
) -> int:
    """Delete traces, and memories that rest on nothing else; return how many traces there were.

    What is left of their episodes, and of other episodes that share a fix with them, is folded again. `errors` takes up
    the error messages of their steps by scope number: insertions elsewhere may quote them.
    """
    traces = [t for t in map(tx.traces.get, dict.fromkeys(trace_ids)) if t is not None]
    episodes = list(dict.fromkeys((t.scope, t.episode_id) for t in traces))
    named = _named_by(tx, traces)
    fixes = _fixes_of(tx, episodes)
    closed = [key for key in episodes if tx.traces.closing(*key) in {t.trace_id for t in traces}]
    steps = _delete_steps(tx, [t.trace_id for t in traces], errors if errors is not None else {})
    named += sorted({procedure_id(scope, episode_id) for scope, episode_id, _ in steps})
    _delete_inferred(tx, steps)
    delete_feedback(tx, *_in("trace_id", [t.trace_id for t in traces]))
    for table in _BY_TRACE:
        _delete(tx, table, *_in("trace_id", [t.trace_id for t in traces]))
    for key in episodes:
        emptied = not tx.traces.of_episode(*key)
        if emptied or key in closed:  # feedback on the whole was on its last trace: it fits no other
            _delete_episode_feedback(tx, *key)
        if emptied:
            for table, condition in _BY_EPISODE.items():
                _delete(tx, table, condition, [tx.scopes.number(key[0]), key[1]])
    shared = _episodes_with(tx, fixes)
    _delete(tx, "fixes", *_in("memory_id", fixes))  # defined again by those that still show them
    _fold(tx, [*episodes, *(key for key in shared if key not in set(episodes))])
    revision = tx.counters.revision()
    for memory_id in named:
        tx.exemplars.refresh(memory_id, revision)
    _scrub(tx, [*named, *fixes], now)
    return len(traces)


def delete_episodes(
    tx: Transaction, episodes: Sequence[tuple[int, str]], worth: int, before: float, most: int, now: float
) -> tuple[int, dict[int, set[str]]]:
    """Delete episodes that are worth so much at most and ended before a moment, until `most` traces are gone.

    Returns how many episodes went, and the error messages of their steps by scope number.
    """
    gone, errors = 0, dict[int, set[str]]()
    for key in episodes:  # one after another: each may make the next one's evidence the last of a memory
        found, last = tx.db.execute(_WORTH, (*key,) * 9).fetchone()
        if most > 0 and last is not None and found <= worth and last < before:
            traces = tx.db.execute("SELECT trace_id FROM traces WHERE scope_id = ? AND episode_id = ?", key)
            most -= delete_traces(tx, [row[0] for row in traces.fetchall()], now, errors)
            gone += 1
    return gone, errors


def delete_feedback(tx: Transaction, condition: str, values: Sequence[Any]) -> int:
    """Delete feedback, with what retracts it; return how many there were."""
    found = tx.db.execute(f"SELECT tenant, feedback_id FROM feedback WHERE {condition}", tuple(values))
    named = list(dict.fromkeys(found.fetchall()))
    for tenant, feedback_id in named:
        _delete(tx, "feedback", "tenant = ? AND feedback_id = ?", [tenant, feedback_id])
        drop_retractions(tx.db, tenant, feedback_id)
    return len(named)


def delete_waiting(tx: Transaction, numbers: Sequence[int]) -> int:
    """Delete those of these rows of feedback that still wait for their trace or episode; return how many there were."""
    condition, values = _in("seq", numbers)
    return delete_feedback(tx, f"{condition} AND {TARGETLESS}", values)


def drop_old_notes(tx: Transaction, now: float) -> None:
    """Delete the notes of what was forgotten so long ago that nothing under way can hold a copy."""
    _delete(tx, "forgotten", "at < ?", [now - NOTED_S])


def withdraw_copies(tx: Transaction, trace_ids: Sequence[str]) -> int:
    """Take what was copied from forgotten memories out of these requests; return how many there were.

    They lose the insertion, the proposal, and the answer where it was reused.
    """
    episodes = []
    for trace in map(tx.traces.get, trace_ids):
        if trace is None:
            continue
        episodes.append((trace.scope, trace.episode_id))
        _withdraw_answer(tx, trace)
    chosen, values = _in("trace_id", trace_ids)
    tx.db.execute(f"UPDATE calls SET messages = '[]' WHERE {chosen} AND {_GONE_INSIDE}", values)
    proposed = tx.db.execute(f"SELECT trace_id FROM proposals WHERE {chosen} AND {GONE}", values).fetchall()
    for table in ("proposals", "labels"):
        _delete(tx, table, *_in("trace_id", [row[0] for row in proposed]))
    for trace_id, suggestion in tx.db.execute(
        f"SELECT trace_id, suggestion FROM injections WHERE {chosen} AND {GONE} AND suggestion IS NOT NULL", values
    ).fetchall():
        if (told := tx.traces.get(trace_id)) is not None:
            tx.steps.disown(told.scope, told.episode_id, suggestion)
    _delete(tx, "injections", f"{chosen} AND {GONE}", values)
    for key in dict.fromkeys(episodes):
        _delete_placements(tx, *key)
    _fold(tx, dict.fromkeys(episodes))
    return len(episodes)


def begin(tx: Transaction) -> int:
    """Note that something is forgotten that is still in files; return the number of its erasure."""
    sql = f"INSERT INTO meta VALUES ('{ASKED}', 1) ON CONFLICT (key) DO UPDATE SET value = meta.value + 1"
    return int(tx.db.execute(f"{sql} RETURNING value").fetchone()[0])


def end(tx: Transaction, erasure: int) -> None:
    """Note that nothing of what was forgotten up to an erasure is in any file."""
    sql = f"INSERT INTO meta VALUES ('{ERASED}', ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
    tx.db.execute(f"{sql} WHERE meta.value < excluded.value", (erasure,))


def delete_placements(tx: Transaction, places: Sequence[tuple[str, str, str]], *, scope_id: int) -> int:
    """Delete insertions of a scope by their episode, anchor and form; return how many."""
    return sum(_delete(tx, "ledger", _PLACE, [scope_id, *place]) for place in places)


def delete_scopes(tx: Transaction, numbers: Sequence[int], latest: int) -> int:
    """Delete the names of these scopes if there is still nothing of them; return how many.

    They had no feedback up to a row of it, the latest that was looked at.
    """
    tx.scopes.clear_cache()
    condition, values = _in("id", numbers)
    return _delete(tx, "scopes", f"{condition} AND {EMPTY_SCOPE}", [*values, latest])


def delete_rows(tx: Transaction, table: str, condition: str) -> int:
    """Delete rows that belong to nothing; return how many."""
    return _delete(tx, table, condition, ())


# -- parts -------------------------------------------------------------------------------------


def _delete(tx: Transaction, table: str, condition: str, values: Iterable[Any]) -> int:
    tx.traces.clear_cache()
    return int(tx.db.execute(f"DELETE FROM {table} WHERE {condition}", tuple(values)).rowcount)


def _named_by(tx: Transaction, traces: Sequence[Trace]) -> list[str]:
    """Return the ids of all exemplars and procedures that these traces have, or once had, anything to do with."""
    condition, values = _in("trace_id", [t.trace_id for t in traces])
    found = tx.db.execute(
        f"SELECT DISTINCT memory_id FROM contributions JOIN memories USING (number) WHERE {condition}", values
    ).fetchall()
    named = {row[0] for row in found}
    procedures, values = _in("memory_id", sorted({procedure_id(t.scope, t.episode_id) for t in traces}))
    named |= {row[0] for row in tx.db.execute(f"SELECT memory_id FROM memories WHERE {procedures}", values)}
    for trace in traces:  # feedback that was retracted has left no trace but itself
        demonstrations = tx.db.execute(
            "SELECT value FROM feedback WHERE metric = 'demonstration' AND (trace_id = ? OR episode_id = ?)",
            (trace.trace_id, trace.episode_id),
        ).fetchall()
        answers = [trace.answer, *(json.loads(row[0]) for row in demonstrations)]
        named |= {exemplar_id(trace.scope, trace.frame, trace.task, a) for a in answers if isinstance(a, str)}
    return sorted(named)


def _fixes_of(tx: Transaction, episodes: Iterable[tuple[Scope, str]]) -> list[str]:
    found: dict[str, None] = {}
    for scope, episode_id in episodes:
        key = (tx.scopes.number(scope), episode_id)
        sql = "SELECT DISTINCT memory_id FROM fix_evidence WHERE scope_id = ? AND episode_id = ?"
        found |= {row[0]: None for row in tx.db.execute(sql, key).fetchall()}
    return list(found)


def _episodes_with(tx: Transaction, fixes: Sequence[str]) -> list[tuple[Scope, str]]:
    condition, values = _in("memory_id", fixes)
    found = tx.db.execute(
        "SELECT DISTINCT tenant, namespace, user_id, agent_id, episode_id FROM fix_evidence "
        f"JOIN scopes ON scopes.id = scope_id WHERE {condition}",
        values,
    ).fetchall()
    return [(Scope(*row[:4]), row[4]) for row in found]


def _delete_steps(
    tx: Transaction, trace_ids: Sequence[str], errors: dict[int, set[str]]
) -> list[tuple[Scope, str, str]]:
    """Delete the steps that these traces asked for or brought; return them."""
    condition, values = _in("traces.trace_id", trace_ids)
    found = tx.db.execute(f"{_STEPS} WHERE {condition}", values).fetchall()
    for *_, episode_id, step_id, scope_id in found:
        key = (scope_id, episode_id, step_id)
        failed = tx.db.execute(f"SELECT message FROM attempts WHERE {_STEP} AND verdict = 'failure'", key)
        errors.setdefault(scope_id, set()).update(row[0] for row in failed.fetchall())
        for table in ("steps", "attempts"):
            _delete(tx, table, _STEP, key)
    for scope_id, episode_id in {(row[6], row[4]) for row in found}:
        # What the others told was read beside these.
        _delete(tx, "attempts", _EPISODE, (scope_id, episode_id))
    return [(Scope(*row[:4]), row[4], row[5]) for row in found]


def _delete_inferred(tx: Transaction, steps: Sequence[tuple[Scope, str, str]]) -> None:
    """Delete the feedback that was inferred from these steps, with what retracts it."""
    condition, ids = _in("feedback_id", [inferred_id(*step) for step in steps])
    of_tenants, tenants = _in("tenant", ["", *{scope.tenant for scope, _, _ in steps}])
    delete_feedback(tx, f"{of_tenants} AND {condition}", [*tenants, *ids])


def _delete_episode_feedback(tx: Transaction, scope: Scope, episode_id: str) -> None:
    scope_id = tx.scopes.number(scope)
    delete_feedback(tx, _OF_EPISODE, [episode_id, scope_id, scope.tenant, scope_id])


def _delete_placements(tx: Transaction, scope: Scope, episode_id: str) -> None:
    key = [tx.scopes.number(scope), episode_id]
    found = tx.db.execute(
        "SELECT anchor, form, items FROM ledger WHERE scope_id = ? AND episode_id = ?", key
    ).fetchall()
    for anchor, form, items in found:
        if gone_of(tx.db, _MEMORY_ID.findall(items)):
            _delete(tx, "ledger", _PLACE, [*key, anchor, form])


def _withdraw_answer(tx: Transaction, trace: Trace) -> None:
    """Empty an answer, or an action's arguments, reused from a forgotten memory: it stays known that there was one."""
    sql = f"SELECT 1 FROM proposals WHERE trace_id = ? AND {GONE}"
    if trace.action != "reuse" or not tx.db.execute(sql, (trace.trace_id,)).fetchone():
        return
    *messages, last = json.loads(trace.messages)
    if calls := last.get("tool_calls"):
        last = {**last, "tool_calls": [{**call, "arguments": "{}"} for call in calls]}
        tx.db.execute("UPDATE steps SET arguments = '{}' WHERE made_by = ?", (trace.trace_id,))
    else:
        last = {**last, "content": _REPLACEMENT}
    tx.traces.clear_cache()
    tx.db.execute(
        "UPDATE traces SET answer = ?, messages = ? WHERE trace_id = ?",
        (trace.answer and _REPLACEMENT, json.dumps([*messages, last]), trace.trace_id),
    )


def _fold(tx: Transaction, episodes: Iterable[tuple[Scope, str]]) -> None:
    for scope, episode_id in episodes:
        fold.relearn(tx, tx.traces.of_episode(scope, episode_id))
        fold.weigh(tx, scope, episode_id)  # also where no trace is left
        fold.relearn_steps(tx, scope, episode_id)


def _scrub(tx: Transaction, memory_ids: Sequence[str], now: float) -> None:
    """Empty the memories among these that no evidence is left for, and note that they are gone.

    A row that others' traces still say something of keeps its id: should it be learned again, that counts.
    """
    condition, values = _in("memory_id", memory_ids)
    standing = tx.db.execute(
        f"SELECT memory_id FROM memories WHERE {condition} "
        f"AND (kind IN ('exemplar', 'procedure') AND status NOT IN {NO_MEMORY} "
        "OR EXISTS (SELECT 1 FROM fixes WHERE fixes.memory_id = memories.memory_id))",
        values,
    ).fetchall()
    gone = sorted(set(memory_ids) - {row[0] for row in standing})
    condition, values = _in("memory_id", gone)
    tx.db.executemany(
        "INSERT INTO forgotten VALUES (?, ?) ON CONFLICT (memory_id) DO UPDATE SET at = excluded.at",
        [(memory_id, now) for memory_id in gone],
    )
    tx.db.execute(
        f"UPDATE memories SET memory_id = CASE WHEN {_SPOKEN_OF} THEN memory_id "
        f"ELSE 'forgotten-' || CAST(number AS TEXT) END, status = CASE WHEN {_SPOKEN_OF} THEN 'unfounded' "
        "ELSE 'forgotten' END, task = '', answer = '', frame = '', key_hash = '', successes = 0, failures = 0, "
        f"used_successes = 0, used_failures = 0, revision = ? WHERE {condition}",
        (tx.counters.revision(), *values),
    )


def _in(column: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    return (f"{column} IN ({marks(values)})" if values else "1 = 0"), list(values)


# Feedback that came before any trace of its episode names no scope: another scope's episode may bear the same name.
_OF_EPISODE = """episode_id = ? AND (scope_id = ? OR (scope_id IS NULL AND tenant IN ('', ?) AND NOT EXISTS (
    SELECT 1 FROM traces WHERE traces.episode_id = feedback.episode_id AND traces.scope_id <> ?)))"""
_GONE_INSIDE = f"EXISTS (SELECT 1 FROM injections WHERE injections.trace_id = calls.trace_id AND {GONE})"
COPIED = f"SELECT trace_id FROM injections WHERE {GONE} UNION SELECT trace_id FROM proposals WHERE {GONE}"
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
                    AND status NOT IN {NO_MEMORY})
    AND NOT EXISTS (SELECT 1 FROM feedback WHERE seq > ? AND feedback.scope_id = scopes.id)"""
_STANDING = "status IN ('verified', 'superseded', 'quarantined', 'retired')"
_ENOUGH = 10  # successes without a failure: a memory then rests on the latest alone
_HERE = "traces.scope_id = ? AND traces.episode_id = ?"
# What an episode is worth: 3 a memory rests on it, 2 it counts in the gate, the policy, the uplift or a memory's value,
# 1 its outcome is known, 0 nothing is known of it; and when it ended.
_WORTH = f"""
    SELECT CASE
        WHEN EXISTS (SELECT 1 FROM traces CROSS JOIN contributions USING (trace_id) JOIN memories USING (number)
            WHERE {_HERE} AND role IN ('evidence', 'solved') AND verified AND {_STANDING}
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
