"""Steps and what is learned from them: the write side of steps, attempts, fixes and their evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from optillm_memory.conversation.actions import action_of
from optillm_memory.conversation.observation import read
from optillm_memory.learn.attempts import OUTPUT_LIMIT, Attempt, inferred_id, message_of, nature_of, shortened
from optillm_memory.learn.fixes import Fix, FixEvidence, fix_status
from optillm_memory.records import Scope, Step
from optillm_memory.store.sqlite.connection import Connection

STEPS_MOST = 400  # of one episode: what lies further back has been learned from


class StepTables:
    """The part of a transaction that has to do with steps."""

    _db: Connection

    def scope_id(self, scope: Scope) -> int:
        """Return the scope's number."""
        raise NotImplementedError

    def add_steps(self, scope_id: int, episode_id: str, trace_id: str, steps: Sequence[Step]) -> list[Step]:
        """Store each step once; return those whose observation is new.

        A later request may show an observation shortened: the first that was seen stays.
        """
        fresh = []
        for step in steps:
            key = (scope_id, episode_id, step.step_id)
            known = self._db.execute(
                "SELECT observation IS NOT NULL FROM steps WHERE scope_id = ? AND episode_id = ? AND step_id = ?", key
            ).fetchone()
            if known is None:
                maker = self._maker(scope_id, episode_id, step.made)
                self._db.execute(
                    "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (*key, step.parent_id, step.call_id, step.ordinal, step.tool, step.arguments, step.observation,
                     trace_id, maker, step.made),
                )  # fmt: skip
            elif not known[0] and step.observation is not None:
                self._db.execute(
                    "UPDATE steps SET observation = ?, trace_id = ? "
                    "WHERE scope_id = ? AND episode_id = ? AND step_id = ?",
                    (step.observation, trace_id, *key),
                )
            if step.observation is not None and (known is None or not known[0]):
                fresh.append(step)
        return fresh

    def known_steps(self, scope_id: int, episode_id: str) -> list[tuple[str, str, bool]]:
        """Return (step id, prefix that ends with the answer that made it, observed) of an episode's steps, in order."""
        found = self._db.execute(
            "SELECT step_id, made, observation IS NOT NULL FROM steps WHERE scope_id = ? AND episode_id = ? "
            "ORDER BY ordinal, step_id",
            (scope_id, episode_id),
        )
        return [(step_id, made, bool(observed)) for step_id, made, observed in found]

    def acted(self, scope: Scope, episode_id: str) -> bool:
        """Whether an episode has steps, or a demonstration, or anything that it says of fixes."""
        key = (self.scope_id(scope), episode_id)
        return bool(self._db.execute(_ACTED, (*key, *key, *key, episode_id)).fetchone()[0])

    def attempts(self, scope: Scope, episode_id: str) -> list[Attempt]:
        """Return the observed steps of an episode with what their observations say, in order.

        What an observation says is read once and kept; feedback `inferred-<step id>-…` that was retracted makes
        it unknown.
        """
        key = (self.scope_id(scope), episode_id)
        unread = self._db.execute(
            f"SELECT steps.step_id, tool, arguments, observation, created_at FROM {_OBSERVED} AND verdict IS NULL", key
        ).fetchall()
        for row in unread:
            self._read(key, *row)
        found = self._db.execute(
            "SELECT steps.step_id, parent_id, coalesce(made_by, steps.trace_id), tool, arguments, output, verdict, "
            f"basis, signature, message, at, coalesce(made_by, '') FROM {_OBSERVED} "
            "ORDER BY created_at DESC, ordinal DESC, steps.step_id LIMIT ?",
            (*key, STEPS_MOST),
        ).fetchall()[::-1]
        if not found:
            return []
        names = {inferred_id(scope, episode_id, row[0]): row[0] for row in found}
        retracted = {
            names[row[0]]
            for row in self._db.execute(
                f"SELECT feedback_id FROM feedback WHERE tenant IN (?, '') AND retracts "
                f"AND feedback_id IN ({', '.join('?' * len(names))})",
                (scope.tenant, *names),
            )
        }
        attempts = []
        for step_id, parent, trace_id, tool, arguments, output, verdict, *said in found:
            if step_id in retracted and verdict != "unknown":
                verdict = "unknown"  # noqa: PLW2901
                self._db.execute(
                    "UPDATE attempts SET verdict = 'unknown' WHERE scope_id = ? AND episode_id = ? AND step_id = ?",
                    (*key, step_id),
                )
            action = action_of(tool, arguments)
            attempts.append(Attempt(step_id, parent, trace_id, action, output, verdict, *said))
        return attempts

    def _read(self, key: tuple[int, str], step_id: str, tool: str, arguments: str, observation: str, at: float) -> None:
        reading = read(observation, tool=tool, arguments=arguments)
        signature = reading.signature.key if reading.signature else ""
        said = (reading.verdict, nature_of(reading, observation), signature, message_of(reading, observation))
        self._db.execute(
            "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, step_id, action_of(tool, arguments).key, *said, shortened(observation), at),
        )

    def advice_given(self, scope: Scope, episode_id: str) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Return by trace the (memory id, suggested action) of the fixes that were injected in an episode."""
        given: dict[str, list[tuple[str, str]]] = {}
        for trace_id, memory_id, suggestion in self._db.execute(
            "SELECT trace_id, memory_id, suggestion FROM injections JOIN traces USING (trace_id) "
            "WHERE scope_id = ? AND episode_id = ? AND suggestion IS NOT NULL AND NOT withheld",
            (self.scope_id(scope), episode_id),
        ):
            given.setdefault(trace_id, []).append((memory_id, suggestion))
        return given

    def put_fix_evidence(
        self, scope: Scope, episode_id: str, evidence: Iterable[FixEvidence], environments: Mapping[str, str]
    ) -> None:
        """Replace what an episode says of fixes, and bring every fix that it touches up to date.

        `environments` holds the environment of each trace (its tags as JSON).
        """
        scope_id = self.scope_id(scope)
        touched = {
            row[0]
            for row in self._db.execute(
                "SELECT memory_id FROM fix_evidence WHERE scope_id = ? AND episode_id = ?", (scope_id, episode_id)
            )
        }
        if touched:
            self._db.execute("DELETE FROM fix_evidence WHERE scope_id = ? AND episode_id = ?", (scope_id, episode_id))
        for item in evidence:
            if item.fix is not None:
                self._define(scope_id, item.memory_id, item.fix)
            self._db.execute(
                "INSERT INTO fix_evidence VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    item.memory_id, scope_id, episode_id, item.step_id, item.role, int(item.success),
                    int(item.verified), item.trace_id, environments.get(item.trace_id, "{}"),
                ),
            )  # fmt: skip
            touched.add(item.memory_id)
        if touched:
            revision = self._next("revision")
            for memory_id in sorted(touched):
                self._refresh_fix(scope_id, memory_id, revision)

    def _define(self, scope_id: int, memory_id: str, fix: Fix) -> None:
        self._db.execute(
            # Equal but for white space and the like: which one is kept must not depend on which came first.
            "INSERT INTO fixes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (memory_id) DO UPDATE SET "
            "action = CASE WHEN fixes.action < excluded.action THEN fixes.action ELSE excluded.action END, "
            "output = CASE WHEN fixes.output < excluded.output THEN fixes.output ELSE excluded.output END, "
            "text = CASE WHEN fixes.text < excluded.text THEN fixes.text ELSE excluded.text END",
            (
                memory_id, scope_id, fix.action.tool, fix.action.field, fix.action.text[:OUTPUT_LIMIT],
                shortened(fix.output), fix.signature, fix.relation, fix.text[:OUTPUT_LIMIT],
            ),
        )  # fmt: skip

    def _refresh_fix(self, scope_id: int, memory_id: str, revision: int) -> None:
        fix = self._db.execute("SELECT action, text FROM fixes WHERE memory_id = ?", (memory_id,)).fetchone()
        if fix is None:
            return  # followed before it was mined, as it can be while the log is read again
        rows = self._db.execute(_TALLIES, (memory_id,)).fetchall()
        tallies = [tuple(int(n) for n in row[1:5]) for row in rows]
        # That it was followed is no origin: where nothing shows it any more, it is gone, as after a rebuild.
        shows = self._db.execute(
            "SELECT 1 FROM fix_evidence WHERE memory_id = ? AND role <> 'followed' LIMIT 1", (memory_id,)
        ).fetchone()
        state = fix_status(tallies) if shows else "withdrawn"  # type: ignore[arg-type]
        if not shows:
            self._db.execute("DELETE FROM fixes WHERE memory_id = ?", (memory_id,))
        if state in ("verified", "candidate") and self.is_retired(memory_id):
            state = "retired"
        right, wrong, likely, unlikely = (sum(t[i] for t in tallies) for i in range(4))
        first = self._db.execute(
            "SELECT created_at FROM fix_evidence JOIN traces USING (trace_id) WHERE memory_id = ? "
            "ORDER BY created_at LIMIT 1",
            (memory_id,),
        ).fetchone()
        values = (state, right, wrong, likely, unlikely, first[0] if first else 0.0, revision)
        known = self._db.execute("SELECT number FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
        if known is None:
            self._db.execute(_INSERT_FIX, (memory_id, scope_id, *fix, *values))
        else:
            self._db.execute(_UPDATE_FIX, (*(fix if shows else ("", "")), *values, known[0]))

    def _maker(self, scope_id: int, episode_id: str, made: str) -> str | None:
        # The same conversation may have been held in another episode: what became of it is not this one's.
        row = self._db.execute(
            "SELECT trace_id FROM prefixes WHERE scope_id = ? AND hash = ? AND episode_id = ? AND trace_id <> '' "
            "ORDER BY trace_id DESC LIMIT 1",
            (scope_id, made, episode_id),
        ).fetchone()
        return row[0] if row else None

    def is_retired(self, memory_id: str, since: float = 0.0) -> bool:
        """Whether what is known of a memory's uplift says that it harms."""
        raise NotImplementedError

    def _next(self, counter: str) -> int:
        raise NotImplementedError


_OBSERVED = """
    steps JOIN traces USING (trace_id) LEFT JOIN attempts ON attempts.scope_id = steps.scope_id
    AND attempts.episode_id = steps.episode_id AND attempts.step_id = steps.step_id
    WHERE steps.scope_id = ? AND steps.episode_id = ? AND observation IS NOT NULL"""
_ACTED = """
    SELECT EXISTS (SELECT 1 FROM steps WHERE scope_id = ? AND episode_id = ?)
        OR EXISTS (SELECT 1 FROM fix_evidence WHERE scope_id = ? AND episode_id = ?)
        OR EXISTS (SELECT 1 FROM traces CROSS JOIN feedback ON feedback.trace_id = traces.trace_id
                   WHERE traces.scope_id = ? AND traces.episode_id = ? AND metric = 'demonstration')
        OR EXISTS (SELECT 1 FROM feedback WHERE episode_id = ? AND metric = 'demonstration')"""
_TALLIES = """
    SELECT environment, count(*) FILTER (WHERE verified AND success),
           count(*) FILTER (WHERE verified AND NOT success), count(*) FILTER (WHERE NOT verified AND success),
           count(*) FILTER (WHERE NOT verified AND NOT success)
    FROM fix_evidence WHERE memory_id = ? GROUP BY environment"""
_INSERT_FIX = """
    INSERT INTO memories(memory_id, kind, scope_id, task, answer, frame, key_hash, status, successes, failures,
    used_successes, used_failures, created_at, revision) VALUES (?, 'fix', ?, ?, ?, '', '', ?, ?, ?, ?, ?, ?, ?)"""
_UPDATE_FIX = """
    UPDATE memories SET task = ?, answer = ?, status = ?, successes = ?, failures = ?, used_successes = ?,
    used_failures = ?, created_at = ?, revision = ? WHERE number = ?"""
