"""What traces teach, and the memories that follow from it: the part of a transaction that keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.learn import exemplars
from optillm_memory.learn.exemplars import Learned
from optillm_memory.records import Scope, Trace
from optillm_memory.store.sqlite.connection import Connection
from optillm_memory.store.tables import rows


@dataclass(frozen=True, slots=True)
class _Said:
    """What a trace says of a memory: with an answer of its own (`evidence`), or by what came of its `use`."""

    memory_id: str
    role: str
    success: bool
    verified: bool
    answer: str | None


class ExemplarTables:
    """Keeps outcomes, what traces contribute to exemplars, and the exemplars.

    A contribution bears its memory's number and not its id: ids are hashes, and each would change another page of the
    table. So all that anything is said of has a row; it is `unfounded` while nothing has said that it is right.
    """

    _db: Connection

    def put_learned(self, trace: Trace, learned: Learned, *, untouched: bool = False) -> None:
        """Replace what this trace taught before, and bring every memory it touches up to date.

        Of an `untouched` one nothing was taught before, and nothing was injected.
        """
        before = [] if untouched else self._db.execute(rows.TAUGHT, (trace.trace_id,)).fetchall()
        if before:
            self._db.execute("DELETE FROM contributions WHERE trace_id = ?", (trace.trace_id,))
        touched: dict[str, int] = {memory_id: int(number) for memory_id, number in before}
        by_memory: dict[str, list[_Said]] = {}
        for said in self._what_it_says(trace, learned, untouched=untouched):
            by_memory.setdefault(said.memory_id, []).append(said)
        if not (touched or by_memory):
            return
        revision = self._next("revision")
        fresh: dict[str, int] = {}
        for memory_id in by_memory.keys() - touched.keys():
            number, exposed = self._known(memory_id)
            if number is not None:
                touched[memory_id] = number
            else:
                fresh[memory_id] = self._put_fresh(trace, by_memory[memory_id], revision, exposed=exposed)
        self._db.executemany(
            "INSERT INTO contributions(number, trace_id, role, success, verified, answer) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (number, trace.trace_id, said.role, int(said.success), int(said.verified), said.answer)
                for memory_id, number in (*touched.items(), *fresh.items())
                for said in by_memory.get(memory_id, ())
            ],
        )
        for memory_id, number in sorted(touched.items()):
            self._refresh(number, memory_id, revision)

    def _what_it_says(self, trace: Trace, learned: Learned, *, untouched: bool) -> list[_Said]:
        """Keep a trace's outcome; return what the trace says of which memories."""
        result = learned.outcome
        said = [_Said(e.memory_id, "evidence", e.success, e.verified, e.answer) for e in learned.evidence]
        if result.verdict == "unknown":
            self._db.execute("DELETE FROM outcomes WHERE trace_id = ?", (trace.trace_id,))
            return said
        self._db.execute(
            "INSERT INTO outcomes VALUES (?, ?, ?) ON CONFLICT (trace_id) DO UPDATE SET "
            "verdict = excluded.verdict, verified = excluded.verified",
            (trace.trace_id, result.verdict, int(result.verified)),
        )
        if untouched:
            return said
        used = self._db.execute(
            "SELECT memory_id FROM injections WHERE trace_id = ? AND kind = 'exemplar' AND NOT withheld",
            (trace.trace_id,),
        ).fetchall()
        return said + [_Said(row[0], "use", result.verdict == "success", result.verified, None) for row in used]

    def _refresh_memory(self, memory_id: str, revision: int) -> None:
        """Bring a memory up to date with all that is said of it."""
        number, _ = self._known(memory_id)
        if number is not None:
            self._refresh(number, memory_id, revision)

    def _refresh(self, number: int, memory_id: str, revision: int) -> None:
        right, wrong, any_right, used_right, used_wrong, before, exposed = self._db.execute(
            rows.TALLY, (number, memory_id, number)
        ).fetchone()
        first = self._db.execute(rows.FIRST_EVIDENCE, (number,)).fetchone()
        if first is None:  # nothing (any more) says that it is right
            self._db.execute(rows.WITHDRAW, (revision, number))
            self._db.execute("DELETE FROM memories_fts WHERE rowid = ?", (number,))
            return
        scope_id, task, frame, task_key, created_at, answer = first
        state = self._status(memory_id, right, wrong, any_right, exposed=bool(exposed))
        self._db.execute(
            rows.UPDATE_MEMORY,
            (
                scope_id, state, task, answer, frame, task_key, right, wrong, used_right, used_wrong, created_at,
                revision, number,
            ),
        )  # fmt: skip
        if state == "verified" and before != "verified":
            self._put_words(number, scope_id, task)
        elif state != "verified" and before == "verified":
            self._db.execute("DELETE FROM memories_fts WHERE rowid = ?", (number,))

    def _put_fresh(self, trace: Trace, items: Sequence[_Said], revision: int, *, exposed: bool) -> int:
        """Make the row of a memory that nothing was said of before this trace; return its number."""
        memory_id = items[0].memory_id
        evidence = [said for said in items if said.role == "evidence"]
        scope_id, right = self.scope_id(trace.scope), sum(said.verified and said.success for said in evidence)
        answer = next((said.answer for said in evidence if said.success), None)
        if answer is None:
            return self._insert((memory_id, scope_id, "unfounded", *("",) * 4, *(0,) * 6))
        wrong = sum(said.verified and not said.success for said in evidence)
        used = [said.success for said in items if said.role == "use" and said.verified]
        state = self._status(memory_id, right, wrong, 1, exposed=exposed)
        number = self._insert(
            (
                memory_id, scope_id, state, trace.task, answer, trace.frame, rows.key_hash(trace.task), right,
                wrong, sum(used), len(used) - sum(used), trace.created_at, revision,
            ),
        )  # fmt: skip
        if state == "verified":
            self._put_words(number, scope_id, trace.task)
        return number

    def _status(self, memory_id: str, right: int, wrong: int, any_right: int, *, exposed: bool) -> str:
        state = exemplars.status(right, wrong, any_right)
        return "retired" if state == "verified" and exposed and self.is_retired(memory_id) else state

    def _put_words(self, number: int, scope_id: int, task: str) -> None:
        self._db.execute(
            "INSERT INTO memories_fts(rowid, words) VALUES (?, ?)", (number, rows.scoped_words(scope_id, task))
        )

    def _known(self, memory_id: str) -> tuple[int | None, bool]:
        """Return a memory's number, None where nothing was ever said of it, and whether its uplift was measured."""
        number, exposed = self._db.execute(rows.KNOWN, (memory_id, memory_id)).fetchone()
        return number, bool(exposed)

    def _insert(self, values: tuple[Any, ...]) -> int:
        """Make the row of a memory; return its number."""
        # RETURNING would have SQLite make a table for it: eight times the time of the row itself.
        return int(self._db.execute(rows.INSERT_MEMORY, values).lastrowid or 0)

    def scope_id(self, scope: Scope) -> int:
        """Return the scope's number."""
        raise NotImplementedError

    def is_retired(self, memory_id: str, since: float = 0.0) -> bool:
        """Whether what is known of a memory's uplift says that it harms."""
        raise NotImplementedError

    def _next(self, counter: str) -> int:
        raise NotImplementedError
