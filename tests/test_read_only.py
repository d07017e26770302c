"""A store that is opened read-only changes nothing: no file is made, no schema brought up, no thread started."""

from __future__ import annotations

import shutil
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import psycopg
import pytest
from builders import SCOPE, lexical_memory, teach, trace
from click.testing import CliRunner
from postgres import Server

from optillm_memory import NotFound, StoreError, StoreTooNew, StoreTooOld, StoreUnavailable
from optillm_memory.cli import main
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance.backup import backup
from optillm_memory.store.maintenance.verify import verify
from optillm_memory.store.opening import open_store
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.store import SqliteStore

SCHEMAS = Path(__file__).parent / "schemas"


def read_only(place: str | Path) -> Store:
    """Open a store to look at."""

    def refused(name: str, _work: object) -> threading.Thread:
        raise AssertionError(f"the thread {name} is started")

    return open_store(str(place), queue_size=1, normal=normal_answer, read_only=True, start=refused)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file with its content and the time of its last change."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file that holds a memory and that nobody has open."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "list the files", "ls")
    return tmp_path / "memory.db"


def test_looking_leaves_every_file_as_it_was(path: Path) -> None:
    """All kinds of reading, a check of everything and a backup elsewhere change no byte and make no file."""
    before = state(path.parent)
    with closing(read_only(path)) as store:
        assert store.stats()["traces"] == 1
        assert store.recall.lexical(SCOPE, ["files"], 5, alone=True)
        assert [m.answer for m in store.list_memories(None)] == ["ls"]
        assert store.recall.revision(SCOPE).generation
        assert store.fault == ""
    assert {check.level for check in verify(path)} == {"ok"}
    backup(path, path.parent.parent / f"{path.parent.name}-copy.db")
    assert state(path.parent) == before


def test_writing_is_refused(path: Path) -> None:
    """Whatever would be written is refused by name, and what nobody waits for is dropped."""
    before = state(path.parent)
    with closing(read_only(path)) as store:
        with pytest.raises(StoreUnavailable, match="read-only"):
            store.write(lambda tx: tx.add_trace(trace()))
        store.post(lambda tx: tx.add_trace(trace()))
        store.flush()
        assert store.pause(1)
        store.resume()
        files = store.index_files()
        assert files is not None
        with files.draft("a name") as draft:
            assert draft is None
    assert state(path.parent) == before


def test_a_write_that_was_broken_off_is_named(path: Path, tmp_path: Path) -> None:
    """To undo it the file must be written: that is said, with the command that does so, and nothing is changed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN")
        rows = [(f"{n} " * 100,) for n in range(500)]
        db.executemany("INSERT INTO scopes(tenant, namespace, user_id, agent_id) VALUES (?, '', '', '')", rows)
        broken = tmp_path / "broken" / "memory.db"
        broken.parent.mkdir()
        for suffix in ("", "-journal"):
            shutil.copy(f"{path}{suffix}", f"{broken}{suffix}")
    before = state(broken.parent)
    with pytest.raises(StoreError, match=r"memory\.db-journal holds .* optillm-memory migrate"):
        read_only(broken)
    assert state(broken.parent) == before
    assert CliRunner().invoke(main, ["migrate", "--db", str(broken)]).exit_code == 0
    with closing(read_only(broken)) as store:
        assert store.stats()["scopes"] == 1


def test_what_is_missing_is_not_made(tmp_path: Path) -> None:
    """A mistyped name is named, and no file, no folder is there afterwards."""
    with pytest.raises(NotFound, match="typo"):
        read_only(tmp_path / "typo" / "memory.db")
    (tmp_path / "empty.db").touch()
    with pytest.raises(StoreError, match="not a database of"):
        read_only(tmp_path / "empty.db")
    assert [p.name for p in tmp_path.iterdir()] == ["empty.db"]


@pytest.mark.parametrize("schema", ["m006", "m010"])
def test_an_earlier_schema_is_named_and_left_alone(schema: str, tmp_path: Path) -> None:
    """A file of an earlier release is not brought up to date by looking: the command that does so is named."""
    path = tmp_path / "memory.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript((SCHEMAS / f"{schema}.sql").read_text())
    before = state(tmp_path)
    with pytest.raises(StoreTooOld, match="optillm-memory migrate"):
        read_only(path)
    assert state(tmp_path) == before


def test_a_later_schema_is_refused(path: Path) -> None:
    """A file of a later release is not read: nobody knows what its columns mean."""
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "UPDATE _sqlite_migrations SET name = 'm999_later' WHERE name = (SELECT max(name) FROM _sqlite_migrations)"
        )
        db.commit()
    with pytest.raises(StoreTooNew, match="m999_later"):
        read_only(path)


def test_what_others_write_meanwhile_is_seen(path: Path) -> None:
    """Beside a process that writes, the latest commits are read, from its WAL, also when it began later."""
    with closing(read_only(path)) as store:
        assert store.stats()["traces"] == 1
        with closing(SqliteStore(path)) as other:
            other.write(lambda tx: tx.add_trace(trace())).result(10)
            assert store.stats()["traces"] == 2
            with closing(read_only(path)) as late:
                assert late.stats()["traces"] == 2
        assert store.stats()["traces"] == 2


def test_a_file_that_is_written_while_it_is_read_is_noticed(path: Path) -> None:
    """What was read of a file that somebody opened in the middle of it is not taken for true."""
    with closing(read_only(path)) as store:

        def read_on() -> None:
            with store._readers.borrow() as db:
                db.execute("SELECT count(*) FROM traces").fetchone()
                with closing(SqliteStore(path)) as other:
                    other.write(lambda tx: tx.add_trace(trace())).result(10)

        with pytest.raises(StoreError, match="while it was read"):
            read_on()
        assert store.stats()["traces"] == 2
    done: list[int] = []

    def write_once(_done: int, _total: int) -> None:
        if not done:
            done.append(1)
            with closing(SqliteStore(path)) as other:
                other.write(lambda tx: tx.add_trace(trace())).result(10)

    copy = backup(path, path.with_name("copy.db"), progress=write_once)
    with closing(read_only(copy)) as store:
        assert store.stats()["traces"] == 3


def test_a_server_is_only_looked_at(postgres: Server) -> None:
    """On PostgreSQL nothing is made or brought up either; writing is refused, and no index is built."""
    url = postgres.fresh()
    with pytest.raises(NotFound, match="no memory"):
        read_only(url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT to_regnamespace('agent_memory')").fetchone() == (None,)
    with closing(open_store(url, queue_size=10, normal=normal_answer)) as store:
        store.write(lambda tx: tx.add_trace(trace())).result(10)
    with closing(read_only(url)) as store:
        assert store.stats()["traces"] == 1
        assert store.recall.nearest(SCOPE, "f", np.ones(4, dtype=np.float32), 3) == []
        with pytest.raises(StoreUnavailable, match="read-only"):
            store.write(lambda tx: tx.counters.probe())
    with psycopg.connect(url) as connection:
        newest = "name = (SELECT max(name) FROM agent_memory.migrations)"
        deleted = connection.execute(f"DELETE FROM agent_memory.migrations WHERE {newest} RETURNING name").fetchone()
    with pytest.raises(StoreTooOld, match="optillm-memory migrate"):
        read_only(url)
    with psycopg.connect(url) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM agent_memory.migrations").fetchall()]
    assert deleted is not None
    assert deleted[0] not in names


def test_migrate_brings_the_schema_up(tmp_path: Path) -> None:
    """The command that the refusal names does what it promises: afterwards the file is read."""
    path = tmp_path / "memory.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript((SCHEMAS / "m006.sql").read_text())
    done = CliRunner().invoke(main, ["migrate", "--db", str(path)])
    assert done.exit_code == 0, done.output
    with closing(read_only(path)) as store:
        assert store.stats()["traces"] == 9
    missing = CliRunner().invoke(main, ["migrate", "--db", str(tmp_path / "typo.db")])
    assert missing.exit_code == 1
    assert not (tmp_path / "typo.db").exists()
