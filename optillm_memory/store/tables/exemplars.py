"""The tables `outcomes` and `contributions`, and the exemplars in `memories` that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.learn import exemplars
from optillm_memory.learn.conflicts import superseded, words_of
from optillm_memory.learn.exemplars import Learned
from optillm_memory.records import Trace
from optillm_memory.store.backend import Dialect
from optillm_memory.store.sqlite.connection import Connection, marks
from optillm_memory.store.tables import words
from optillm_memory.store.tables.exposures import ExposureTable
from optillm_memory.store.tables.meta import Counters
from optillm_memory.store.tables.procedures import OF_PROCEDURES, PREFIX, ProcedureTable
from optillm_memory.store.tables.scopes import ScopeTable
from optillm_memory.store.tables.vectors import key_hash


@dataclass(frozen=True, slots=True)
class _Contribution:
    """A trace's evidence on a memory: by an answer of its own (`evidence`), or by what became of its `use`."""

    memory_id: str
    role: str
    success: bool
    verified: bool
    answer: str | None


@dataclass
class ExemplarTable:
    """The write half.

    A contribution has its memory's number, not its id: ids are hashes, and each would change another page of the
    table. So every memory that there is evidence on has a row; it is `unfounded` while no evidence is a success.
    """

    db: Connection
    scopes: ScopeTable
    counters: Counters
    exposures: ExposureTable
    procedures: ProcedureTable
    dialect: Dialect

    def put(self, trace: Trace, learned: Learned, *, untouched: bool = False) -> None:
        """Replace what this trace taught before, and bring every memory it concerns up to date.

        An `untouched` trace taught nothing before, and nothing was injected into it.
        """
        before = [] if untouched else self.db.execute(_TAUGHT, (trace.trace_id,)).fetchall()
        if before:
            self.db.execute(_UNTEACH, (trace.trace_id,))
        touched: dict[str, int] = {memory_id: int(number) for memory_id, number in before}
        by_memory: dict[str, list[_Contribution]] = {}
        for item in self._contributions(trace, learned, untouched=untouched):
            by_memory.setdefault(item.memory_id, []).append(item)
        if not (touched or by_memory):
            return
        revision = self.counters.revision()
        fresh: dict[str, int] = {}
        for memory_id in by_memory.keys() - touched.keys():
            number, exposed = self._known(memory_id)
            if number is not None:
                touched[memory_id] = number
            else:
                fresh[memory_id] = self._put_fresh(trace, by_memory[memory_id], revision, exposed=exposed)
        self.db.executemany(
            "INSERT INTO contributions(number, trace_id, role, success, verified, answer) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (number, trace.trace_id, item.role, int(item.success), int(item.verified), item.answer)
                for memory_id, number in (*touched.items(), *fresh.items())
                for item in by_memory.get(memory_id, ())
            ],
        )
        tasks = {self._task_of(number) for number in touched.values()}
        for memory_id, number in sorted(touched.items()):
            self._refresh(number, memory_id, revision)
        tasks |= {self._task_of(number) for number in touched.values()}
        if fresh:
            tasks.add((key_hash(trace.task), self.scopes.number(trace.scope), trace.frame))
        for task in sorted(tasks):
            self._settle(task, revision)

    def refresh(self, memory_id: str, revision: int) -> None:
        """Bring a memory up to date with all evidence on it."""
        number, _ = self._known(memory_id)
        if number is not None:
            tasks = {self._task_of(number)}
            self._refresh(number, memory_id, revision)
            for task in sorted(tasks | {self._task_of(number)}):
                self._settle(task, revision)

    def touch(self, numbers: Iterable[int]) -> None:
        """Give memories a new revision, so that every process loads them again."""
        revision = self.counters.revision()
        self.db.executemany("UPDATE memories SET revision = ? WHERE number = ?", [(revision, n) for n in numbers])

    def _contributions(self, trace: Trace, learned: Learned, *, untouched: bool) -> list[_Contribution]:
        """Keep a trace's outcome; return its evidence on memories."""
        result = learned.outcome
        found = [_Contribution(e.memory_id, "evidence", e.success, e.verified, e.answer) for e in learned.evidence]
        if result.verdict == "unknown":
            self.db.execute("DELETE FROM outcomes WHERE trace_id = ?", (trace.trace_id,))
            return found
        self.db.execute(
            "INSERT INTO outcomes VALUES (?, ?, ?) ON CONFLICT (trace_id) DO UPDATE SET "
            "verdict = excluded.verdict, verified = excluded.verified",
            (trace.trace_id, result.verdict, int(result.verified)),
        )
        if untouched:
            return found
        used = self.db.execute(
            "SELECT memory_id FROM injections WHERE trace_id = ? AND kind = 'exemplar' AND NOT withheld",
            (trace.trace_id,),
        ).fetchall()
        success = result.verdict == "success"
        return found + [_Contribution(row[0], "use", success, result.verified, None) for row in used]

    def _refresh(self, number: int, memory_id: str, revision: int) -> None:
        if memory_id.startswith(PREFIX):
            self.procedures.refresh(memory_id)
            return
        right, wrong, any_right, used_right, used_wrong, before, exposed = self.db.execute(
            _TALLY, (number, memory_id, number)
        ).fetchone()
        first = self.db.execute(_FIRST_EVIDENCE, (number,)).fetchone()
        if first is None:  # no evidence (any more) that it is right
            self.db.execute(_WITHDRAW, (revision, number))
            words.drop(self.db, number)
            return
        scope_id, task, frame, task_key, created_at, answer = first
        state = self._status(memory_id, right, wrong, any_right, exposed=bool(exposed))
        self.db.execute(
            _UPDATE,
            (
                scope_id, state, task, answer, frame, task_key, right, wrong, used_right, used_wrong, created_at,
                revision, number,
            ),
        )  # fmt: skip
        if state == "verified" and before != "verified":
            words.put(self.db, number, scope_id, task)
        elif state != "verified" and before == "verified":
            words.drop(self.db, number)

    def _task_of(self, number: int) -> tuple[str, int, str]:
        """Return what the memories of the same task have in common: key hash, scope and frame."""
        key, scope_id, frame = self.db.execute(_TASK_OF, (number,)).fetchone()
        return str(key), int(scope_id), str(frame)

    def _settle(self, task: tuple[str, int, str], revision: int) -> None:
        """Bring up to date which of the verified answers to a task later ones supersede."""
        found = self.db.execute(_SAME_TASK, task).fetchall() if task[0] else []
        if len(found) < 2 and all(status == "verified" for _, _, status, _ in found):  # noqa: PLR2004
            return
        verified: dict[int, list[float]] = {row[0]: [] for row in found}
        for number, at in self.db.execute(f"{_VERIFIED_AT} AND number IN ({marks(found)})", [row[0] for row in found]):
            verified[number].append(float(at))
        alike: dict[str, dict[str, list[float]]] = {}
        for number, memory_id, _, text in found:
            alike.setdefault(words_of(text), {})[memory_id] = verified[number]
        gone = {memory_id for times in alike.values() for memory_id in superseded(times)}
        for number, memory_id, before, text in found:
            state = "superseded" if memory_id in gone else "verified"
            if state != before:
                self.db.execute(
                    "UPDATE memories SET status = ?, revision = ? WHERE number = ?", (state, revision, number)
                )
                if state == "verified":
                    words.put(self.db, number, task[1], text)
                else:
                    words.drop(self.db, number)

    def _put_fresh(self, trace: Trace, items: Sequence[_Contribution], revision: int, *, exposed: bool) -> int:
        """Insert a memory that there was no evidence on before this trace; return its number."""
        memory_id = items[0].memory_id
        evidence = [item for item in items if item.role == "evidence"]
        scope_id, right = self.scopes.number(trace.scope), sum(item.verified and item.success for item in evidence)
        answer = next((item.answer for item in evidence if item.success), None)
        if answer is None:
            return self._insert((memory_id, scope_id, "unfounded", *("",) * 4, *(0,) * 6))
        wrong = sum(item.verified and not item.success for item in evidence)
        used = [item.success for item in items if item.role == "use" and item.verified]
        state = self._status(memory_id, right, wrong, 1, exposed=exposed)
        number = self._insert(
            (
                memory_id, scope_id, state, trace.task, answer, trace.frame, key_hash(trace.task), right,
                wrong, sum(used), len(used) - sum(used), trace.created_at, revision,
            ),
        )  # fmt: skip
        if state == "verified":
            words.put(self.db, number, scope_id, trace.task)
        return number

    def _insert(self, values: tuple[Any, ...]) -> int:
        return self.dialect.insert_memory(self.db, _INSERT, values)

    def _status(self, memory_id: str, right: int, wrong: int, any_right: int, *, exposed: bool) -> str:
        state = exemplars.status(right, wrong, any_right)
        return "retired" if state == "verified" and exposed and self.exposures.is_retired(memory_id) else state

    def _known(self, memory_id: str) -> tuple[int | None, bool]:
        """Return a memory's number, None where there is no evidence on it, and whether its uplift was measured."""
        number, exposed = self.db.execute(_KNOWN, (memory_id, memory_id)).fetchone()
        return number, bool(exposed)


_INSERT = (
    "INSERT INTO memories(memory_id, kind, scope_id, status, task, answer, frame, key_hash, successes, "
    "failures, used_successes, used_failures, created_at, revision) "
    "VALUES (?, 'exemplar', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_UPDATE = """
    UPDATE memories SET scope_id = ?, status = ?, task = ?, answer = ?, frame = ?, key_hash = ?, successes = ?,
    failures = ?, used_successes = ?, used_failures = ?, created_at = ?, revision = ? WHERE number = ?"""
_WITHDRAW = """
    UPDATE memories SET status = CASE status WHEN 'unfounded' THEN status ELSE 'withdrawn' END, task = '',
    answer = '', frame = '', key_hash = '', revision = ? WHERE number = ?"""
# A memory's number, and whether its uplift was ever measured.
_KNOWN = """
    SELECT (SELECT number FROM memories WHERE memory_id = ?), EXISTS (SELECT 1 FROM exposures WHERE memory_id = ?)"""
_TAUGHT = f"""
    SELECT memory_id, number FROM contributions JOIN memories USING (number)
    WHERE trace_id = ? AND role NOT IN {OF_PROCEDURES}"""
_UNTEACH = f"DELETE FROM contributions WHERE trace_id = ? AND role NOT IN {OF_PROCEDURES}"
# What answers the same task, and when each answer was verified.
_TASK_OF = "SELECT key_hash, scope_id, frame FROM memories WHERE number = ?"
_SAME_TASK = """
    SELECT number, memory_id, status, task FROM memories WHERE key_hash = ? AND scope_id = ? AND frame = ?
    AND key_hash <> '' AND kind = 'exemplar' AND status IN ('verified', 'superseded')"""
_VERIFIED_AT = """
    SELECT number, created_at FROM contributions JOIN traces USING (trace_id)
    WHERE role = 'evidence' AND success AND verified"""
# Verified right and wrong answers, any right answer, and verified outcomes of the requests it was injected into; its
# status, and whether its uplift was ever measured.
_TALLY = """
    SELECT count(*) FILTER (WHERE role = 'evidence' AND verified AND success),
           count(*) FILTER (WHERE role = 'evidence' AND verified AND NOT success),
           count(*) FILTER (WHERE role = 'evidence' AND success),
           count(*) FILTER (WHERE role = 'use' AND verified AND success),
           count(*) FILTER (WHERE role = 'use' AND verified AND NOT success),
           (SELECT status FROM memories WHERE number = ?), EXISTS (SELECT 1 FROM exposures WHERE memory_id = ?)
    FROM contributions WHERE number = ?"""
_FIRST_EVIDENCE = """
    SELECT scope_id, task, frame, key_hash, created_at, contributions.answer
    FROM contributions JOIN traces USING (trace_id) WHERE number = ? AND role = 'evidence' AND success
    ORDER BY created_at, trace_id LIMIT 1"""
