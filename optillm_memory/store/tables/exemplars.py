"""The tables `outcomes` and `contributions`, and the exemplars in `memories` that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from optillm_memory.learn import exemplars
from optillm_memory.learn.conflicts import superseded, words_of
from optillm_memory.learn.exemplars import Learned
from optillm_memory.records import Outcome, Trace
from optillm_memory.store.announced import padded
from optillm_memory.store.backend import Dialect
from optillm_memory.store.sqlite.connection import WritingConnection, marks
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

    db: WritingConnection
    scopes: ScopeTable
    counters: Counters
    exposures: ExposureTable
    procedures: ProcedureTable
    dialect: Dialect
    _waiting: list[tuple[Trace, Learned]] = field(default_factory=list)

    def put(self, trace: Trace, learned: Learned) -> None:
        """Replace what this trace taught before, and bring every memory it concerns up to date."""
        before = self.db.execute(_TAUGHT, (trace.trace_id,)).fetchall()
        if before:
            self.db.execute(_UNTEACH, (trace.trace_id,))
        self._put_outcome(trace, learned.outcome)
        items = [*_evidence(learned), *self._uses(trace, learned.outcome)]
        touched = {memory_id: int(number) for memory_id, number in before}
        self._teach(trace, items, touched, learned.outcome.valid_until)

    def put_untouched(self, trace: Trace, learned: Learned) -> None:
        """Keep what a trace taught that taught nothing before, and that nothing was injected into.

        Before anything else is asked of the database it is written, together with what others taught.
        """
        if not self._waiting:
            self.db.first(self._put_waiting)
        self._waiting.append((trace, learned))

    def _put_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        found = [(trace, list(_evidence(learned)), key_hash(trace.task)) for trace, learned in waiting]
        known = self._known_of({i.memory_id for _, items, _ in found for i in items}, {key for _, _, key in found})
        fresh: list[tuple[Trace, list[_Contribution], float | None]] = []
        rest: list[tuple[Trace, list[_Contribution], float | None]] = []
        for (trace, items, key), (_, learned) in zip(found, waiting, strict=True):
            if learned.outcome.verdict != "unknown":
                self._put_outcome(trace, learned.outcome)
            names = {key, *(item.memory_id for item in items)}
            if items:  # another answer to its task may supersede it, or be superseded
                (rest if names & known else fresh).append((trace, items, learned.outcome.valid_until))
                known |= names
        count = sum(len(items) for _, items, _ in fresh)
        numbers = iter(self.dialect.memory_numbers(self.db, count))
        for trace, items, holds in fresh:
            revision = self.counters.revision()
            for memory_id, own in _by_memory(items).items():
                number = next(numbers)
                self._put_fresh(trace, number, own, revision, holds, exposed=False)
                self._contribute(trace, {memory_id: number}, {memory_id: own})
        for trace, items, holds in rest:
            self._teach(trace, items, {}, holds)

    def _known_of(self, memory_ids: Collection[str], keys: Collection[str]) -> set[str]:
        """Return those of some ids and key hashes that any memory has, or any measure of uplift."""
        if not memory_ids:
            return set()
        names, hashes = padded(list(memory_ids)), padded(list(keys))
        sql = _KNOWN_OF.format(marks(names), marks(names), marks(hashes))
        return {row[0] for row in self.db.execute(sql, (*names, *names, *hashes)).fetchall()}

    def _teach(
        self, trace: Trace, items: Iterable[_Contribution], touched: dict[str, int], holds: float | None
    ) -> None:
        """Write a trace's evidence on memories; bring them up to date, and those by number that it had evidence on."""
        by_memory = _by_memory(items)
        if not (touched or by_memory):
            return
        revision = self.counters.revision()
        fresh: dict[str, int] = {}
        for memory_id in [name for name in by_memory if name not in touched]:
            number, exposed = self._known(memory_id)
            if number is None:
                (number,) = self.dialect.memory_numbers(self.db, 1)
                self._put_fresh(trace, number, by_memory[memory_id], revision, holds, exposed=exposed)
                fresh[memory_id] = number
            else:
                touched[memory_id] = number
        self._contribute(trace, {**touched, **fresh}, by_memory)
        tasks = {self._task_of(number) for number in touched.values()}
        for memory_id, number in sorted(touched.items()):
            self._refresh(number, memory_id, revision)
        tasks |= {self._task_of(number) for number in touched.values()}
        if fresh:
            tasks.add((key_hash(trace.task), self.scopes.number(trace.scope), trace.frame))
        for task in sorted(tasks):
            self._settle(task, revision)

    def _contribute(
        self, trace: Trace, numbers: Mapping[str, int], items: Mapping[str, Sequence[_Contribution]]
    ) -> None:
        self.db.later(
            "INSERT INTO contributions(number, trace_id, role, success, verified, answer) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (number, trace.trace_id, item.role, int(item.success), int(item.verified), item.answer)
                for memory_id, number in numbers.items()
                for item in items.get(memory_id, ())
            ],
        )

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

    def _put_outcome(self, trace: Trace, outcome: Outcome) -> None:
        if outcome.verdict == "unknown":
            self.db.execute("DELETE FROM outcomes WHERE trace_id = ?", (trace.trace_id,))
        else:
            self.db.later(_PUT_OUTCOME, [(trace.trace_id, outcome.verdict, int(outcome.verified), outcome.valid_until)])

    def _uses(self, trace: Trace, outcome: Outcome) -> list[_Contribution]:
        """Return a trace's evidence on what was injected into it."""
        if outcome.verdict == "unknown":
            return []
        used = self.db.execute(_USED, (trace.trace_id,)).fetchall()
        return [_Contribution(row[0], "use", outcome.verdict == "success", outcome.verified, None) for row in used]

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
        holds = self.db.execute(_HOLDS_UNTIL, (number,)).fetchone()
        self.db.execute(
            _UPDATE,
            (
                scope_id, state, task, answer, frame, task_key, right, wrong, used_right, used_wrong, created_at,
                revision, holds[0], number,
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

    def _put_fresh(
        self,
        trace: Trace,
        number: int,
        items: Sequence[_Contribution],
        revision: int,
        holds: float | None,
        *,
        exposed: bool,
    ) -> None:
        """Insert a memory that there was no evidence on before this trace."""
        memory_id = items[0].memory_id
        evidence = [item for item in items if item.role == "evidence"]
        scope_id, right = self.scopes.number(trace.scope), sum(item.verified and item.success for item in evidence)
        answer = next((item.answer for item in evidence if item.success), None)
        if answer is None:
            self.db.later(_INSERT, [(number, memory_id, scope_id, "unfounded", *("",) * 4, *(0,) * 6, None)])
            return
        wrong = sum(item.verified and not item.success for item in evidence)
        used = [item.success for item in items if item.role == "use" and item.verified]
        state = self._status(memory_id, right, wrong, 1, exposed=exposed)
        values = (
            number, memory_id, scope_id, state, trace.task, answer, trace.frame, key_hash(trace.task), right, wrong,
            sum(used), len(used) - sum(used), trace.created_at, revision, holds,
        )  # fmt: skip
        self.db.later(_INSERT, [values])
        if state == "verified":
            words.put(self.db, number, scope_id, trace.task)

    def _status(self, memory_id: str, right: int, wrong: int, any_right: int, *, exposed: bool) -> str:
        state = exemplars.status(right, wrong, any_right)
        return "retired" if state == "verified" and exposed and self.exposures.is_retired(memory_id) else state

    def _known(self, memory_id: str) -> tuple[int | None, bool]:
        """Return a memory's number, None where there is no evidence on it, and whether its uplift was measured."""
        number, exposed = self.db.execute(_KNOWN, (memory_id, memory_id)).fetchone()
        return number, bool(exposed)


def _evidence(learned: Learned) -> Iterator[_Contribution]:
    for item in learned.evidence:
        yield _Contribution(item.memory_id, "evidence", item.success, item.verified, item.answer)


def _by_memory(items: Iterable[_Contribution]) -> dict[str, list[_Contribution]]:
    found: dict[str, list[_Contribution]] = {}
    for item in items:
        found.setdefault(item.memory_id, []).append(item)
    return found


_PUT_OUTCOME = """
    INSERT INTO outcomes VALUES (?, ?, ?, ?) ON CONFLICT (trace_id) DO UPDATE
    SET verdict = excluded.verdict, verified = excluded.verified, valid_until = excluded.valid_until"""
_USED = "SELECT memory_id FROM injections WHERE trace_id = ? AND kind = 'exemplar' AND NOT withheld"
_INSERT = (
    "INSERT INTO memories(number, memory_id, kind, scope_id, status, task, answer, frame, key_hash, successes, "
    "failures, used_successes, used_failures, created_at, revision, valid_until) "
    "VALUES (?, ?, 'exemplar', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_UPDATE = """
    UPDATE memories SET scope_id = ?, status = ?, task = ?, answer = ?, frame = ?, key_hash = ?, successes = ?,
    failures = ?, used_successes = ?, used_failures = ?, created_at = ?, revision = ?, valid_until = ?
    WHERE number = ?"""
# The latest of the best evidence that it is right says until when.
_HOLDS_UNTIL = """
    SELECT outcomes.valid_until FROM contributions JOIN traces USING (trace_id) LEFT JOIN outcomes USING (trace_id)
    WHERE number = ? AND role = 'evidence' AND success
    ORDER BY contributions.verified DESC, created_at DESC, trace_id DESC LIMIT 1"""
_WITHDRAW = """
    UPDATE memories SET status = CASE status WHEN 'unfounded' THEN status ELSE 'withdrawn' END, task = '',
    answer = '', frame = '', key_hash = '', revision = ? WHERE number = ?"""
# A memory's number, and whether its uplift was ever measured.
_KNOWN = """
    SELECT (SELECT number FROM memories WHERE memory_id = ?), EXISTS (SELECT 1 FROM exposures WHERE memory_id = ?)"""
_KNOWN_OF = """
    SELECT memory_id FROM memories WHERE memory_id IN ({}) UNION SELECT memory_id FROM exposures WHERE memory_id IN ({})
    UNION SELECT key_hash FROM memories WHERE key_hash IN ({}) AND key_hash <> ''"""
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
