"""The at-rest edits of agent-memory-integrity (agmi) 0.6.3 on a sealed database: none is taken for genuine.

The suite seeds a store through its own API, edits the file with SQL, opens the store again and asks what it finds. Here
it edits what recall reads (`memories`) and the log that everything else follows from (`traces`).
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest

from optillm_memory import Memory, Scope

pytest.importorskip("agmi", reason="needs: pip install agent-memory-integrity==0.6.3")
from agmi.adapters.base import MemoryAdapter, Record
from agmi.check import run

OWNER, OTHER = "alice", "bob"


class SealedMemory(MemoryAdapter):  # type: ignore[misc]
    """Our memory as the suite sees it: the rows of one table of one user, in order of their numbers."""

    supports_replay = supports_metadata = supports_snapshot = True
    table: ClassVar[str]
    number: ClassVar[str]
    named: ClassVar[str]  # the column that is a row's name, besides its number
    content: ClassVar[tuple[str, ...]] = ("task", "answer")
    sealed: ClassVar[bool] = True

    def setup(self) -> None:
        """Open a new database, with its key in another folder."""
        self._folder = Path(tempfile.mkdtemp(prefix="sealed-"))
        self._path = self._folder / "data" / "memory.db"
        self._said = 0
        self._memory = self._opened()

    def teardown(self) -> None:
        """Close and delete it."""
        self._memory.close()
        shutil.rmtree(self._folder)

    def _opened(self) -> Memory:
        folder = str(self._folder / "keys")
        return Memory.open(self._path, encoder="none", holdout=0.0, seal=self.sealed, seal_folder=folder)

    def _say(self, user: str, count: int) -> None:
        for _ in range(count):
            self._said += 1
            request = {"messages": [{"role": "user", "content": f"Which word has {user} chosen for {self._said}?"}]}
            turn = self._memory.begin({"model": "m", **request, "agent_memory": {"user_id": user, "mode": "write"}})
            message = {"role": "assistant", "content": f"{user}-word-{self._said}"}
            self._memory.finish(turn, {"id": turn.trace_id, "choices": [{"finish_reason": "stop", "message": message}]})
            self._memory.settle()
            success = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
            self._memory.feedback(success)

    def seed(self, n: int) -> None:
        """Have verified answers of the first user."""
        self._say(OWNER, n)

    def seed_other(self, n: int) -> None:
        """Have verified answers of another user."""
        self._say(OTHER, n)

    def append_genuine(self) -> None:
        """Have one more."""
        self._memory = self._opened()
        self._say(OWNER, 1)

    # -- the file, behind our back -----------------------------------------------------------------

    def _rows(self, user: str) -> list[Record]:
        with closing(sqlite3.connect(self._path)) as db:
            db.row_factory = sqlite3.Row
            found = db.execute(
                f"SELECT {self.table}.*, user_id FROM {self.table} JOIN scopes ON scopes.id = scope_id "
                f"WHERE user_id = ? ORDER BY {self.number}",
                (user,),
            ).fetchall()
        return [Record(place, dict(row)) for place, row in enumerate(found)]

    def read_all_raw(self) -> list[Record]:
        """Return the rows of the first user."""
        return self._rows(OWNER)

    def read_other_raw(self) -> list[Record]:
        """Return the rows of the other user."""
        return self._rows(OTHER)

    def _sql(self, sql: str, values: tuple[Any, ...]) -> None:
        with closing(sqlite3.connect(self._path)) as db, db:
            db.execute(sql, values)

    def _put(self, place: int, values: dict[str, Any]) -> None:
        number = self.read_all_raw()[place].fields[self.number]
        columns = ", ".join(f"{name} = ?" for name in values)
        self._sql(f"UPDATE {self.table} SET {columns} WHERE {self.number} = ?", (*values.values(), number))

    def write_raw(self, record: Record) -> None:
        """Change the content of a row, or insert one after the last."""
        if record.seq < len(self.read_all_raw()):
            self._put(record.seq, {name: record.fields[name] for name in self.content})
            return
        values = {name: value for name, value in record.fields.items() if name != "user_id"}
        marks = ", ".join("?" * len(values))
        self._sql(f"INSERT INTO {self.table}({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    def delete_raw(self, seq: int) -> None:
        """Delete a row."""
        number = self.read_all_raw()[seq].fields[self.number]
        self._sql(f"DELETE FROM {self.table} WHERE {self.number} = ?", (number,))

    def mutate_payload(self, record: Record) -> Record:
        """Change what an answer says."""
        record.fields["answer"] = "attackers-word"
        return record

    def forge_record(self, template: Record) -> Record:
        """Return a row like the last, with a number and a name of its own."""
        forged = dict(template.fields)
        forged[self.number] += 1_000
        forged[self.named] += "f"
        return self.mutate_payload(Record(template.seq + 1, forged))

    def replay_onto(self, victim_seq: int, donor: Record) -> None:
        """Put the content of a genuine row in the place of another's."""
        self._put(victim_seq, {name: donor.fields[name] for name in self.content})

    def read_meta(self, seq: int) -> dict[str, Any]:
        """Return when a row was made."""
        return {"created_at": self.read_all_raw()[seq].fields["created_at"]}

    def write_meta(self, seq: int, meta: dict[str, Any]) -> None:
        """Make a row older than it is."""
        self._put(seq, {"created_at": meta["created_at"] - 1e6})

    def identity_of(self, record: Record) -> str:
        """Return a row's number."""
        return str(record.fields[self.number])

    def payload_of(self, record: Record) -> str:
        """Return a row's content."""
        return repr([record.fields[name] for name in self.content])

    def owner_of(self, record: Record) -> str:
        """Return whose a row is."""
        return str(record.fields["user_id"])

    def snapshot_store(self) -> object:
        """Copy the folder of the database: the key and the latest commit are noted elsewhere."""
        self._memory.close()
        return self._copy_store(self._path.parent)

    def restore_store(self, token: object) -> None:
        """Put the copy in its place."""
        self._memory.close()
        self._restore_store(str(token), self._path.parent)

    # -- what we say of it -------------------------------------------------------------------------

    def reload(self) -> None:
        """Open the database again, as after a restart."""
        self._memory.close()
        self._memory = self._opened()

    def verify(self) -> bool:
        """Whether the check that runs at every start finds nothing, and memory goes on answering from the file."""
        found = self._memory.check_seal()
        self.verify_detail = "; ".join(found)
        scope = Scope("local", user_id=OWNER)
        return not found and bool(self._memory.recall(f"Which word has {OWNER} chosen for 1?", scope=scope))


class Memories(SealedMemory):
    """What recall reads."""

    name, table, number, named = "optillm-memory: memories", "memories", "number", "memory_id"


class Traces(SealedMemory):
    """The log."""

    name, table, number, named = "optillm-memory: traces", "traces", "seq", "trace_id"


class Unsealed(Memories):
    """The same without a seal."""

    name, sealed = "optillm-memory: memories, no seal", False


@pytest.mark.parametrize("adapter", [Memories, Traces])
def test_no_edit_of_a_sealed_database_is_taken_for_genuine(adapter: type[SealedMemory]) -> None:
    """Of T1 to T9 on memories and on the log every one lands, is evaluated, and is refused."""
    verdicts = {row["edit"]: (row["verdict"], row["detail"]) for row in run(adapter())}
    assert len(verdicts) == 9
    assert {name: found for name, found in verdicts.items() if found[0] not in ("REJECTED", "REPORTED")} == {}


def test_without_a_seal_they_are_accepted() -> None:
    """The adapter is one through which edits do land: without the seal all nine are accepted."""
    assert {row["verdict"] for row in run(Unsealed())} == {"ACCEPTED"}
