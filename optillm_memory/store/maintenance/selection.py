"""What is to be forgotten or kept: naming it, counting it, finding it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from optillm_memory.errors import InvalidField
from optillm_memory.records import NARROWING, Scope, View
from optillm_memory.store.backend import Pool
from optillm_memory.store.maintenance.forget import (
    ASKED,
    COPIED,
    EMPTY_SCOPE,
    ERASED,
    STEPS_OF_TRACES,
)
from optillm_memory.store.tables.feedback import TARGETLESS
from optillm_memory.store.tables.scopes import seen


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be forgotten: what all that is named here have in common. `tenant` None is the operator."""

    trace_id: str | None = None
    episode_id: str | None = None
    memory_id: str | None = None
    namespace: str | None = None
    user_id: str | None = None
    agent_id: str | None = None
    before: float | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        """Refuse to forget everything because nothing was named."""
        if all(getattr(self, item.name) is None for item in fields(self) if item.name != "tenant"):
            raise InvalidField("forget", "name a trace, an episode, a memory, a namespace, a user, an agent or an age")

    def traces(self) -> tuple[str, list[Any]]:
        """Return the condition on `traces JOIN scopes`, and its values."""
        parts: list[tuple[str, Any]] = [
            ("traces.trace_id = ?", self.trace_id),
            ("traces.episode_id = ?", self.episode_id),
            ("created_at < ?", self.before),
            (_RESTS_ON.get((self.memory_id or "").partition("-")[0], _RESTS_ON["mem"]), self.memory_id),
        ]
        return _joined(parts, seen(self.view))

    def waiting(self) -> tuple[str, list[Any]] | None:
        """Return the condition on feedback that waits for what never came; None where it cannot be meant."""
        if self.memory_id is not None:
            return None
        parts: list[tuple[str, Any]] = [
            ("feedback.trace_id = ?", self.trace_id),
            ("feedback.episode_id = ?", self.episode_id),
            ("received_at < ?", self.before),
        ]
        if self.namespace is self.user_id is self.agent_id is None:
            parts.append(("feedback.tenant = ?", self.tenant))
            condition, values = _joined(parts)
        else:
            within, named = seen(self.view)
            # On an episode it has a scope; on a trace, what the call that gave it was narrowed to.
            narrowed = {name: value for name in NARROWING if (value := getattr(self, name)) is not None}
            own = " AND ".join(["scope_id IS NULL", *(f"within_{name} = ?" for name in narrowed)])
            own, of_tenant = (own, ()) if self.tenant is None else (f"{own} AND feedback.tenant = ?", (self.tenant,))
            chosen = f"(scope_id IN (SELECT id FROM scopes WHERE {within}) OR ({own}))"
            condition, values = _joined(parts, (chosen, (*named, *narrowed.values(), *of_tenant)))
        return f"{condition} AND {TARGETLESS}", values

    @property
    def view(self) -> View:
        """What of all that is named here may be chosen."""
        return View(self.tenant, self.namespace, self.user_id, self.agent_id)


def _joined(parts: Sequence[tuple[str, Any]], also: tuple[str, Sequence[Any]] = ("1 = 1", ())) -> tuple[str, list[Any]]:
    named = [(text, value) for text, value in parts if value is not None]
    return " AND ".join([*(text for text, _ in named), also[0]]), [*(value for _, value in named), *also[1]]


@dataclass
class ForgettingReads:
    """The read half of forgetting: what is to be forgotten, and what was."""

    readers: Pool

    def episodes_before(
        self, before: float, after: tuple[float, int, str] | None, limit: int
    ) -> list[tuple[float, int, str]]:
        """Return (end, scope number, episode) of episodes that ended before a moment, oldest first, from a place on."""
        with self.readers.borrow() as db:
            found = db.execute(_ENDED, (before, *(after or (0.0, 0, "")), limit)).fetchall()
        return [(float(end), int(scope_id), str(episode_id)) for end, scope_id, episode_id in found]

    def erasures(self) -> tuple[int, int]:
        """Return the numbers of the last erasure that was asked for, and of the last that was done."""
        with self.readers.borrow() as db:
            found = dict(db.execute(f"SELECT key, value FROM meta WHERE key IN ('{ASKED}', '{ERASED}')").fetchall())
        return int(found.get(ASKED, 0)), int(found.get(ERASED, 0))

    def is_unfinished(self) -> bool:
        """Whether something was forgotten that may still be in a file."""
        asked, erased = self.erasures()
        return asked > erased

    def has_copies(self) -> bool:
        """Whether requests that were under way may have copied what was forgotten meanwhile."""
        with self.readers.borrow() as db:
            return db.execute("SELECT 1 FROM forgotten LIMIT 1").fetchone() is not None

    def copied(self) -> list[str]:
        """Return the traces that hold what was copied from memories that were forgotten."""
        with self.readers.borrow() as db:
            return [str(row[0]) for row in db.execute(COPIED).fetchall()]

    def empty_scopes(self) -> tuple[list[int], int]:
        """Return the numbers of scopes that nothing is left of, and that of the latest feedback, looked at before."""
        with self.readers.borrow() as db:
            latest = int(db.execute("SELECT coalesce(max(seq), 0) FROM feedback").fetchone()[0])
            held = f"{EMPTY_SCOPE} AND id NOT IN (SELECT scope_id FROM feedback WHERE scope_id IS NOT NULL)"
            found = db.execute(f"SELECT id FROM scopes WHERE {held}", (latest,)).fetchall()
        return [int(row[0]) for row in found], latest

    def waiting(self, selection: Selection) -> list[int]:
        """Return the numbers of the rows of feedback of a selection that wait for what never came."""
        if (waiting := selection.waiting()) is None:
            return []
        with self.readers.borrow() as db:
            found = db.execute(f"SELECT seq FROM feedback WHERE {waiting[0]}", waiting[1]).fetchall()
        return [int(row[0]) for row in found]

    def errors_of(self, selection: Selection) -> dict[int, set[str]]:
        """Return by scope number the error messages of the steps that a selection's traces asked for or brought."""
        condition, values = selection.traces()
        errors: dict[int, set[str]] = {}
        with self.readers.borrow() as db:
            found = db.execute(
                f"SELECT DISTINCT steps.scope_id, message FROM {STEPS_OF_TRACES} JOIN attempts "
                "ON attempts.scope_id = steps.scope_id AND attempts.episode_id = steps.episode_id "
                f"AND attempts.step_id = steps.step_id WHERE {condition} AND verdict = 'failure'",
                values,
            ).fetchall()
        for scope_id, message in found:
            errors.setdefault(int(scope_id), set()).add(message)
        return errors

    def warnings_of(self, scope_id: int, messages: Iterable[str]) -> list[tuple[str, str, str]]:
        """Return (episode, anchor, form) of the insertions of a scope that warn of failures with these errors."""
        quoted = [json.dumps(m.partition("\n")[0][:_QUOTED])[1:-1] for m in messages if len(m) >= _TELLING]
        if not quoted:
            return []
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT episode_id, anchor, form, payload FROM ledger WHERE scope_id = ? AND items NOT LIKE '%\"mem-%'",
                (scope_id,),
            ).fetchall()
        return [(row[0], row[1], row[2]) for row in found if any(text in row[3] for text in quoted)]

    def chosen(self, selection: Selection, limit: int) -> list[list[str]]:
        """Return up to `limit` traces of a selection, those of an episode together."""
        condition, values = selection.traces()
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT scope_id, traces.episode_id, traces.trace_id FROM traces "
                f"JOIN scopes ON scopes.id = scope_id WHERE {condition} ORDER BY scope_id, traces.episode_id LIMIT ?",
                (*values, limit),
            ).fetchall()
        return [[str(row[2]) for row in rows] for _, rows in groupby(found, key=lambda row: row[:2])]

    def chosen_counts(self, selection: Selection) -> dict[str, int]:
        """Return how much a selection names: traces, episodes, scopes, and feedback that waits."""
        condition, values = selection.traces()
        waiting = selection.waiting()
        with self.readers.borrow() as db:
            traces, episodes, scopes = db.execute(
                "SELECT coalesce(sum(traces), 0), count(*), count(DISTINCT scope_id) FROM ("
                "SELECT scope_id, count(*) AS traces FROM traces JOIN scopes ON scopes.id = scope_id "
                f"WHERE {condition} GROUP BY scope_id, traces.episode_id) AS episodes",
                values,
            ).fetchone()
            pending = db.execute(f"SELECT count(*) FROM feedback WHERE {waiting[0]}", waiting[1]) if waiting else None
            return {
                "traces": int(traces),
                "episodes": int(episodes),
                "scopes": int(scopes),
                "pending_feedback": int(pending.fetchone()[0]) if pending else 0,
            }

    def chosen_scopes(self, selection: Selection) -> list[Scope]:
        """Return the scopes that a selection's traces are in."""
        condition, values = selection.traces()
        with self.readers.borrow() as db:
            found = db.execute(
                "SELECT DISTINCT tenant, namespace, user_id, agent_id FROM traces "
                f"JOIN scopes ON scopes.id = scope_id WHERE {condition}",
                values,
            ).fetchall()
        return [Scope(*row) for row in found]


_TELLING, _QUOTED = 8, 60  # characters of an error that tell it from others
# The traces that a memory rests on, by the kind of its id.
_RESTS_ON = {
    "mem": """traces.trace_id IN (SELECT trace_id FROM contributions JOIN memories USING (number)
        WHERE memory_id = ? AND role = 'evidence')""",
    "fix": """EXISTS (SELECT 1 FROM fix_evidence WHERE memory_id = ? AND role <> 'followed'
        AND fix_evidence.scope_id = traces.scope_id AND fix_evidence.episode_id = traces.episode_id)""",
    "proc": """EXISTS (SELECT 1 FROM memories JOIN contributions USING (number)
        JOIN traces AS own ON own.trace_id = contributions.trace_id WHERE memory_id = ? AND role = 'solved'
        AND own.scope_id = traces.scope_id AND own.episode_id = traces.episode_id)""",
}
_ENDED = """
    SELECT ended, scope_id, episode_id FROM (
        SELECT max(created_at) AS ended, scope_id, episode_id FROM traces GROUP BY scope_id, episode_id) AS episodes
    WHERE ended < ? AND (ended, scope_id, episode_id) > (?, ?, ?) ORDER BY ended, scope_id, episode_id LIMIT ?"""
