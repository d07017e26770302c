"""The tables `steps` and `attempts`: an episode's actions, and what their observations tell."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.conversation.actions import Action, action_of, normal_action
from optillm_memory.conversation.episodes import forks_of, root_of
from optillm_memory.conversation.observation import NEARBY, Reading, Result, nearby, read
from optillm_memory.conversation.provenance import Answer, Told, action_identity, actions_in_answer, makers_of
from optillm_memory.conversation.wrapping import unwrap
from optillm_memory.learn.attempts import Attempt, inferred_id, message_of, nature_of, shortened
from optillm_memory.learn.dialect import LANGUAGE, Reply, form_of, is_error
from optillm_memory.records import Scope, Step, Trace
from optillm_memory.store.sqlite.connection import Connection, marks, objects
from optillm_memory.store.tables.feedback import retracted
from optillm_memory.store.tables.procedures import sent
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.traces import TraceTable

STEPS_MOST = 400  # of one episode: what lies further back has been learned from


@dataclass
class StepTable:
    """The write half, and what the fold reads."""

    db: Connection
    scopes: ScopeTable
    traces: TraceTable

    def add(self, scope_id: int, episode_id: str, trace_id: str, steps: Sequence[Step]) -> list[Step]:
        """Store each step once; return those whose observation is new.

        A later request may carry a shortened observation: the first one is kept.
        """
        fresh, unmade = [], False
        if steps:
            self.traces.touch(trace_id)
        for step in steps:
            key = (scope_id, episode_id, step.step_id)
            known = self.db.execute(f"SELECT observation IS NOT NULL FROM steps WHERE {_STEP}", key).fetchone()
            if known is None:
                # Another episode may hold the same conversation: what became of it there is not this one's.
                maker = self.db.execute(_MAKER, (scope_id, step.made, episode_id)).fetchone()
                unmade = unmade or maker is None
                self.db.execute(
                    "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*key, step.parent_id, step.call_id, step.ordinal, step.tool, step.arguments, step.observation,
                     trace_id, maker[0] if maker else None, step.made),
                )  # fmt: skip
            elif not known[0] and step.observation is not None:
                self.db.execute(
                    f"UPDATE steps SET observation = ?, trace_id = ? WHERE {_STEP}", (step.observation, trace_id, *key)
                )
            if step.observation is not None and (known is None or not known[0]):
                fresh.append(step)
        if unmade:
            self._find_makers(scope_id, episode_id)
        return fresh

    def made_late(self, scope_id: int, trace: Trace) -> list[Step]:
        """Return the steps that a trace turns out to have asked for, where it is written after those that followed it.

        Which process writes first must not matter.
        """
        key = (scope_id, trace.episode_id)
        if not self.db.execute(_LATER, (*key, trace.created_at, trace.created_at, trace.trace_id)).fetchone():
            return []
        before = self.db.execute(f"SELECT step_id, parent_id {_UNMADE}", key).fetchall()
        if not before:
            return []
        self._find_makers(*key)
        unmade = {row[0] for row in self.db.execute(f"SELECT step_id {_UNMADE}", key).fetchall()}
        return [Step("", 0, "", "", "", step_id, parent) for step_id, parent in before if step_id not in unmade]

    def _find_makers(self, scope_id: int, episode_id: str) -> None:
        """Find the traces whose answers asked for an episode's steps, also where the client has changed its history."""
        answers = answers_of(self.db, scope_id, [episode_id])
        found = self.db.execute(_TOLD, (scope_id, episode_id)).fetchall()
        told = [Told(row[0], action_identity(row[1], row[2]), (row[3], row[4]), row[5] or "") for row in found]
        makers = makers_of(told, answers)
        self.db.executemany(
            f"UPDATE steps SET made_by = ? WHERE {_STEP}",
            [
                (makers.get(step_id), scope_id, episode_id, step_id)
                for step_id, *_, made_by in found
                if makers.get(step_id) != made_by
            ],
        )

    def disown(self, scope: Scope, episode_id: str, suggestion: str) -> None:
        """Let nothing be learned from the steps of an episode that followed a suggestion which was forgotten since."""
        key = (self.scopes.number(scope), episode_id)
        for step_id, tool, arguments in self.db.execute(
            "SELECT step_id, tool, arguments FROM steps WHERE scope_id = ? AND episode_id = ?", key
        ).fetchall():
            if normal_action(action_of(tool, arguments).text) == normal_action(suggestion):
                self.db.execute(f"UPDATE steps SET made_by = NULL, made = '' WHERE {_STEP}", (*key, step_id))
                self.db.execute(f"DELETE FROM attempts WHERE {_STEP}", (*key, step_id))

    def answers(self, scope: Scope, episode_id: str) -> list[Answer]:
        """Return what the answers of an episode, and of those that share its conversation, asked for; oldest first."""
        root, key = root_of(episode_id), self.scopes.number(scope)
        forks = self.db.execute(_FORKS, (key, *forks_of(episode_id))).fetchall()
        return answers_of(self.db, key, [root, *(row[0] for row in forks)])

    def known(self, scope_id: int, episode_id: str) -> list[tuple[str, str, bool]]:
        """Return (step id, prefix that ends with the answer that made it, observed) of an episode's steps, in order."""
        found = self.db.execute(
            "SELECT step_id, made, observation IS NOT NULL FROM steps WHERE scope_id = ? AND episode_id = ? "
            "ORDER BY ordinal, step_id",
            (scope_id, episode_id),
        )
        return [(step_id, made, bool(observed)) for step_id, made, observed in found]

    def acted(self, scope: Scope, episode_id: str) -> bool:
        """Whether an episode has steps, a demonstration, or evidence on fixes."""
        key = (self.scopes.number(scope), episode_id)
        return bool(self.db.execute(_ACTED, (*key, *key, *key, episode_id)).fetchone()[0])

    def interpret(self, scope: Scope, episode_id: str) -> list[str]:
        """Bring up to date what an episode's observations tell; return the ids of the steps that were read.

        Each is read once, or again where results of its tool that tell the harness's frame came only later. Where the
        feedback `inferred-<step id>-…` was retracted, it counts as unknown.
        """
        key = (self.scopes.number(scope), episode_id)
        by_tool: dict[str, list[tuple[str, bool]]] = {}
        for step_id, tool, is_read in self.db.execute(
            f"SELECT steps.step_id, tool, verdict IS NOT NULL FROM {_OBSERVED} "
            "ORDER BY created_at, ordinal, steps.step_id",
            key,
        ).fetchall():
            by_tool.setdefault(tool, []).append((step_id, bool(is_read)))
        read_now: list[str] = []
        for tool, steps in by_tool.items():
            if not all(is_read for _, is_read in steps):
                read_now += self._read(key, tool, steps)
        found = self.db.execute(
            "SELECT step_id FROM attempts WHERE scope_id = ? AND episode_id = ? AND verdict <> 'unknown' "
            "ORDER BY at DESC LIMIT ?",
            (*key, STEPS_MOST),
        ).fetchall()
        names = {inferred_id(scope, episode_id, row[0]): row[0] for row in found}
        if names:
            for name in retracted(self.db, scope, list(names)):
                self.db.execute(f"UPDATE attempts SET verdict = 'unknown' WHERE {_STEP}", (*key, names[name]))
        return read_now

    def _read(self, key: tuple[int, str], tool: str, steps: Sequence[tuple[str, bool]]) -> list[str]:
        """Read those of a tool's steps, in order, that are not read, and those whose neighbours these are."""
        first = next(place for place, (_, is_read) in enumerate(steps) if not is_read)
        start = max(0, first - 2 * NEARBY)
        rows = {
            step_id: (Result(arguments, observation), at)
            for step_id, arguments, observation, at in self.db.execute(
                f"SELECT step_id, arguments, observation, created_at FROM steps JOIN traces USING (trace_id) WHERE "
                f"steps.scope_id = ? AND steps.episode_id = ? AND step_id IN ({marks(steps[start:])})",
                (*key, *(step_id for step_id, _ in steps[start:])),
            ).fetchall()
        }
        results = [rows[step_id][0] for step_id, _ in steps[start:]]
        found = []
        for place, (step_id, is_read) in enumerate(steps[start:]):
            if is_read and start and place < NEARBY:
                continue  # what is new is too far away
            others = nearby(results, place, tool)
            farthest = start + place + len(others) - min(place, NEARBY)
            if is_read and (farthest < first or not unwrap(results[place].observation).codes):
                continue
            self.db.execute(f"DELETE FROM attempts WHERE {_STEP}", (*key, step_id))
            self._interpret((*key, step_id), tool, *rows[step_id], others)
            found.append(step_id)
        return found

    def attempts(self, scope: Scope, episode_id: str) -> list[Attempt]:
        """Return the interpreted steps of an episode with what their observations tell, in order."""
        found = self.db.execute(
            "SELECT steps.step_id, parent_id, made_by, tool, arguments, output, verdict, "
            f"basis, signature, message, at, made_by FROM {_OBSERVED} AND verdict IS NOT NULL "
            "ORDER BY created_at DESC, ordinal DESC, steps.step_id LIMIT ?",
            (self.scopes.number(scope), episode_id, STEPS_MOST),
        ).fetchall()[::-1]
        return [
            Attempt(step_id, parent, trace_id, action_of(tool, arguments), *rest)
            for step_id, parent, trace_id, tool, arguments, *rest in found
        ]

    def learn_dialect(self, scope: Scope, episode_id: str, step_ids: Collection[str] | None) -> list[str]:
        """Decide anew which forms of message of these steps (of all, for None) are errors; return affected episodes.

        The decision depends on what the log holds of a tool's results, not on earlier decisions.
        """
        scope_id = self.scopes.number(scope)
        found = self.db.execute(
            "SELECT DISTINCT tool, signature FROM attempts JOIN steps USING (scope_id, episode_id, step_id) "
            "WHERE scope_id = ? AND episode_id = ? AND basis IN (?, ?)"
            + ("" if step_ids is None else f" AND step_id IN ({marks(step_ids)})"),
            (scope_id, episode_id, _FORM, LANGUAGE, *(step_ids or ())),
        ).fetchall()
        affected: dict[str, None] = {}
        for tool, form in found:
            of_form = (scope_id, f"{tool}\x1f", f"{tool}\x20", form)
            new = (LANGUAGE, "failure") if is_error(form, self._replies(of_form)) else (_FORM, "unknown")
            for row in self.db.execute(
                f"SELECT DISTINCT episode_id FROM attempts WHERE {_OF_FORM} AND basis <> ?", (*of_form, new[0])
            ).fetchall():
                affected[row[0]] = None
            self.db.execute(
                f"UPDATE attempts SET basis = ?, verdict = ? WHERE {_OF_FORM} AND basis IN (?, ?) AND basis <> ?",
                (*new, *of_form, _FORM, LANGUAGE, new[0]),
            )
        return list(affected)

    def _replies(self, of_form: tuple[int, str, str, str]) -> list[Reply]:
        """Return the latest results of a form, and the latest others of the tool, with the calls that followed."""
        scope_id, low, high, form = of_form
        found: list[Reply] = []
        for same in ("=", "<>"):
            for episode, key, own, after, after_form, failed in self.db.execute(
                "SELECT a.episode_id, a.action_key, CASE WHEN a.basis IN (?, ?) THEN a.signature ELSE '' END, "
                "b.action_key, CASE WHEN b.basis IN (?, ?) THEN b.signature ELSE '' END, "
                "b.verdict = 'failure' AND b.basis <> ? FROM attempts AS a LEFT JOIN steps AS s ON s.scope_id = "
                "a.scope_id AND s.episode_id = a.episode_id AND s.parent_id = a.step_id LEFT JOIN attempts AS b ON "
                "b.scope_id = s.scope_id AND b.episode_id = s.episode_id AND b.step_id = s.step_id "
                f"WHERE a.scope_id = ? AND a.action_key >= ? AND a.action_key < ? AND a.signature {same} ? "
                "AND (a.basis IN (?, ?) OR a.verdict <> 'failure') ORDER BY a.at DESC, a.episode_id, a.step_id LIMIT ?",
                (_FORM, LANGUAGE, _FORM, LANGUAGE, LANGUAGE, scope_id, low, high, form, _FORM, LANGUAGE, _REPLIES),
            ).fetchall():
                following = _action_of(after) if after is not None else None
                found.append(Reply(episode, _action_of(key), own, following, after_form or "", bool(failed)))
        return found

    def _interpret(
        self, key: tuple[int, str, str], tool: str, result: Result, at: float, others: Sequence[Result]
    ) -> None:
        arguments, observation = result
        reading = read(observation, others, tool=tool, arguments=arguments)
        signature = reading.signature.key if reading.signature else ""
        told = (reading.verdict, nature_of(reading, observation), signature, message_of(reading, observation))
        if reading.verdict == "unknown" and (form := form_of(observation)) is not None:
            # It may turn out to be an error in this tool's dialect.
            told = ("unknown", _FORM, form.key, message_of(Reading("failure", signature=form), observation))
        self.db.execute(
            "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, action_of(tool, arguments).key, *told, shortened(observation), at),
        )


def answers_of(db: Connection, scope_id: int, episode_ids: Collection[str]) -> list[Answer]:
    """Return what the recorded answers of episodes asked for, oldest first."""
    found = db.execute(
        "SELECT created_at, trace_id, messages FROM traces WHERE scope_id = ? "
        f"AND episode_id IN ({marks(episode_ids)}) AND finish_reason IS NOT NULL ORDER BY created_at, trace_id",
        (scope_id, *episode_ids),
    ).fetchall()
    messages = [(at, trace_id, json.loads(text)) for at, trace_id, text in found]
    return [Answer((float(at), trace_id), actions_in_answer(sent(said[-1]))) for at, trace_id, said in messages if said]


def steps_of(db: Connection, scope_id: int, episode_id: str) -> list[dict[str, Any]]:
    """Return an episode's steps with what their observations tell, in order."""
    return objects(
        db,
        "SELECT step_id, parent_id, call_id, ordinal, tool, arguments, observation, made_by, verdict, basis, "
        "signature FROM steps LEFT JOIN attempts USING (scope_id, episode_id, step_id) "
        "WHERE scope_id = ? AND episode_id = ? ORDER BY ordinal",
        (scope_id, episode_id),
    )


def _action_of(key: str) -> Action:
    tool, field, text, *rest = key.split("\x1f")
    return Action(tool, field, text, rest[0] if rest else "")


_FORM = "form"  # the basis of a verdict that is unknown: the form of the message is kept
_REPLIES = 200
_OF_FORM = "scope_id = ? AND action_key >= ? AND action_key < ? AND signature = ?"
_STEP = "scope_id = ? AND episode_id = ? AND step_id = ?"
# The trace whose answer ended a prefix in this episode.
_MAKER = """
    SELECT trace_id FROM prefixes WHERE scope_id = ? AND hash = ? AND episode_id = ? AND trace_id <> ''
    ORDER BY trace_id DESC LIMIT 1"""
_TOLD = """
    SELECT step_id, tool, arguments, created_at, steps.trace_id, (
        SELECT max(p.trace_id) FROM prefixes AS p WHERE p.scope_id = steps.scope_id AND p.hash = steps.made
        AND p.episode_id = steps.episode_id AND p.trace_id <> ''), made_by
    FROM steps JOIN traces USING (trace_id)
    WHERE steps.scope_id = ? AND steps.episode_id = ? AND observation IS NOT NULL"""
_FORKS = "SELECT DISTINCT episode_id FROM traces WHERE scope_id = ? AND episode_id >= ? AND episode_id < ?"
_UNMADE = "FROM steps WHERE scope_id = ? AND episode_id = ? AND made_by IS NULL"
_LATER = """
    SELECT 1 FROM traces WHERE scope_id = ? AND episode_id = ? AND created_at >= ? AND (created_at > ? OR trace_id > ?)
    LIMIT 1"""
# What no answer asked for is a client's word: it stays in the log, and nothing is learned from it.
_OBSERVED = """
    steps JOIN traces USING (trace_id) LEFT JOIN attempts ON attempts.scope_id = steps.scope_id
    AND attempts.episode_id = steps.episode_id AND attempts.step_id = steps.step_id
    WHERE steps.scope_id = ? AND steps.episode_id = ? AND observation IS NOT NULL AND made_by IS NOT NULL"""
_ACTED = """
    SELECT EXISTS (SELECT 1 FROM steps WHERE scope_id = ? AND episode_id = ?)
        OR EXISTS (SELECT 1 FROM fix_evidence WHERE scope_id = ? AND episode_id = ?)
        OR EXISTS (SELECT 1 FROM traces CROSS JOIN feedback ON feedback.trace_id = traces.trace_id
                   WHERE traces.scope_id = ? AND traces.episode_id = ? AND metric = 'demonstration')
        OR EXISTS (SELECT 1 FROM feedback WHERE episode_id = ? AND metric = 'demonstration')"""
