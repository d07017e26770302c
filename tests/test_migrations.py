"""Every released schema comes up to the newest with all its rows, also when killed midway; a newer one is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import body, response, settings
from sqlite_utils import Database

from optillm_memory import Memory, Settings, StoreTooNew
from optillm_memory.store import fold
from optillm_memory.store.maintenance.verify import verify
from optillm_memory.store.sqlite import connection as store_connection
from optillm_memory.store.sqlite.connection import Connection, open_writer
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.migrations import migrations
from optillm_memory.store.sqlite.store import SqliteStore

SCHEMAS = sorted(Path(__file__).parent.joinpath("schemas").glob("m*.sql"))
LATEST = [m.name for m in migrations.pending(Database(memory=True))]
LOG = {
    "traces": "trace_id, task, messages, answer, tags",
    "feedback": "tenant, feedback_id, retracts, trace_id, metric, value",
    "prefixes": "scope_id, hash, episode_id",
    "ledger": "episode_id, anchor, payload",
    "injections": "trace_id, memory_id",
    "steps": "episode_id, call_id, arguments, observation",
}


def made(schema: Path, path: Path) -> Path:
    """Make a database as the release of that time left it."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(schema.read_text())
        db.execute("PRAGMA journal_mode=WAL")
    return path


def rows(db: Connection, names: dict[str, str]) -> dict[str, list[Any]]:
    """Return the rows of some tables, in order."""
    return {t: sorted(db.execute(f"SELECT {columns} FROM {t}").fetchall(), key=repr) for t, columns in names.items()}


def schema_of(path: Path) -> list[Any]:
    """Return a database's schema: tables with their columns, and indexes."""
    with closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT type, name FROM sqlite_master ORDER BY type, name").fetchall()
        return [(*row, db.execute(f"PRAGMA table_xinfo({row[1]})").fetchall()) for row in found]


def test_every_release_has_its_fixture() -> None:
    """There is a database of the time of every migration but the newest, which any test makes."""
    assert [s.stem for s in SCHEMAS] == [name[:4] for name in LATEST[:-1]]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.stem)
def test_a_released_schema_comes_up_to_date(schema: Path, tmp_path: Path) -> None:
    """An older database is brought up with all that was logged, is like a new one, and derives what it held."""
    path = made(schema, tmp_path / "memory.db")
    with closing(sqlite3.connect(path)) as db:
        before = rows(db, LOG)
        verified = set(db.execute("SELECT memory_id, task, answer FROM memories WHERE status = 'verified'").fetchall())
        vectors = set(db.execute("SELECT key_hash, fingerprint, vector FROM vectors").fetchall())
    open_writer(path).close()
    with closing(sqlite3.connect(path)) as db:
        assert rows(db, LOG) == before
        now = set(db.execute("SELECT memory_id, task, answer FROM memories WHERE status = 'verified'").fetchall())
        assert now == verified
        assert set(db.execute("SELECT key_hash, fingerprint, vector FROM vectors").fetchall()) == vectors
    open_writer(tmp_path / "new.db").close()
    assert schema_of(path) == schema_of(tmp_path / "new.db")
    with Memory(settings(tmp_path)) as memory:
        known = {h.memory.memory_id: h.memory.answer for h in memory.recall("restart the nginx server")}
        assert set(known.values()) & {"systemctl restart nginx", "sudo systemctl restart nginx"}
        turn = memory.begin(body("show the disk usage"))
        assert turn.action == "inject"
        memory.finish(turn, response("df -h"))
        memory.settle()
        memory.store.write(fold.rebuild).result(30)
        assert {h.memory.memory_id for h in memory.recall("restart the nginx server")} == set(known)
    assert [c.message for c in verify(path, deep=True) if c.level == "fail"] == []


KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from optillm_memory.store.sqlite import connection, migrations  # here, and not in each child

class Killing(connection.WritingConnection):
    left = 0
    def execute(self, *arguments):
        Killing.left -= 1
        if Killing.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*arguments)

connection.WritingConnection = Killing
old, folder = Path(sys.argv[1]), Path(sys.argv[2])
status = 1
while status:
    path = folder / f"{Killing.left}.db"
    shutil.copy(old, path)
    if not (child := os.fork()):
        connection.open_writer(path).close()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    Killing.left += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that forks itself is killed")
def test_a_migration_killed_at_any_statement_is_whole_or_undone(tmp_path: Path) -> None:
    """Killed with -9 before each statement of the way from the oldest schema, the next start brings it up in full."""
    open_writer(tmp_path / "new.db").close()
    newest = schema_of(tmp_path / "new.db")
    made(SCHEMAS[0], tmp_path / "old.db")
    old = schema_of(tmp_path / "old.db")
    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        before = rows(db, LOG)
    folder = tmp_path / "killed"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "old.db"), str(folder)], check=True, timeout=300)
    found = sorted(folder.glob("*.db"), key=lambda path: int(path.stem))
    states = [schema_of(path) for path in found]
    assert states[-1] == newest
    assert all(state in (old, newest) for state in states)
    assert sum(state == old for state in states) > 40
    different = {path.read_bytes(): path for path in found}  # with what was in the WAL, now that they were opened
    assert len(different) > 1
    for path in different.values():
        open_writer(path).close()
        assert schema_of(path) == newest
        with closing(sqlite3.connect(path)) as db:
            assert rows(db, LOG) == before
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_requests_go_on_with_a_newer_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a database of a later release memory is off, says why, and every request is made without it."""
    from optillm_memory.host import runtime as host

    path = tmp_path / "memory.db"
    SqliteStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE _sqlite_migrations SET name = 'm999_later' WHERE name = ?", (LATEST[-1],))
        db.commit()
    with pytest.raises(StoreTooNew, match="written by a newer optillm-memory"):
        Memory(Settings(db=str(path), encoder="none"))
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_DB", str(path))
    monkeypatch.setattr(host, "_runtime", None)
    opened = host.runtime()
    assert opened.memory is None
    assert "written by a newer optillm-memory" in opened.fault
    assert opened.fail_open.call(lambda: 1) == (1, "")


def test_opening_a_file_of_this_release_needs_no_library_of_migrations(tmp_path: Path) -> None:
    """The migrations are numbered without a gap: the last and their count tell, which saves a start half a second."""
    assert [int(name[1:4]) for name in LATEST] == list(range(1, len(LATEST) + 1))
    assert LATEST[-1] == store_connection.LATEST
    path = tmp_path / "memory.db"
    open_writer(path).close()
    code = f"""
import sys
import time
from optillm_memory.store.sqlite.connection import open_writer
from pathlib import Path
open_writer(Path({str(path)!r})).close()
print([name for name in ("sqlite_utils", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_what_an_earlier_release_recorded_is_folded_in_the_background(tmp_path: Path) -> None:
    """A solved dialogue that was recorded before procedures were learned has one soon after the start."""
    path = made(SCHEMAS[-1], tmp_path / "memory.db")
    with Memory(settings(tmp_path)) as memory:
        deadline = time.monotonic() + 60
        while not memory.store.stats()["memories_by_kind"].get("procedure") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert memory.store.stats()["memories_by_kind"]["procedure"] == 1
        memory.settle()
        while memory.store.write(lambda tx: fold.fold_older(tx, 8)).result(30):
            pass
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
    assert [c.message for c in verify(path, deep=True) if c.level == "fail"] == []
