"""Copying a store from SQLite to PostgreSQL and back: everything goes, nothing changes, or nothing happens at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import mend
from builders import SCOPE, ask, body, hashing_memory
from click.testing import CliRunner
from postgres import Server

from optillm_memory import InvalidField, Memory, NotFound, Settings, StoreError
from optillm_memory.cli import main
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import copying
from optillm_memory.store.maintenance.copying import copy
from optillm_memory.store.opening import open_store
from optillm_memory.store.postgres.connection import PostgresConnection
from optillm_memory.store.postgres.schema import TABLES
from optillm_memory.store.sqlite.connection import connect
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.testing.host import HostProcess


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Give a file with something in every kind of table."""
    with hashing_memory(tmp_path) as memory:
        for number in range(5):
            turn = ask(memory, f"restart server number {number}", f"answer {number} \x00 \ue000 é")
            memory.feedback({"trace_id": turn.trace_id, "metric": "success", "value": number != 2, "source": "code"})
        mend(memory)
        ask(memory, {**body("restart server number 9"), "agent_memory": {"reuse": {"max_error": 0.1}}})
        memory.settle()
    return str(tmp_path / "memory.db")


@contextlib.contextmanager
def opened(place: str) -> Iterator[Store]:
    """Open a store for a moment."""
    store = open_store(place, queue_size=100, normal=normal_answer)
    try:
        yield store
    finally:
        store.close()


def contents(path: str) -> dict[str, list[Any]]:
    """Return all rows of a file, in order."""
    with contextlib.closing(connect(Path(path), read_only=True)) as db:
        return {
            table: sorted(map(repr, db.execute(f"SELECT * FROM {table}").fetchall()))
            for table in TABLES
        }  # fmt: skip


def test_there_and_back_nothing_changes(file: str, postgres: Server, tmp_path: Path) -> None:
    """Every row of every table is the same after a journey through PostgreSQL, secret and counters included."""
    before, server, back = contents(file), postgres.fresh(), str(tmp_path / "back.db")
    shown: list[tuple[str, int, int]] = []
    rows = copy(file, server, lambda *step: shown.append(step))
    assert rows["traces"] >= 6
    assert {table for table, _, _ in shown} == set(TABLES) - {"meta"}
    with opened(file) as here, opened(server) as there:
        assert here.derived() == there.derived()
        assert here.salt() == there.salt()
        assert here.recall.revision() == there.recall.revision()
    assert copy(server, back) == rows
    assert contents(back) == before


def test_a_copy_is_used_as_the_first_was(file: str, postgres: Server) -> None:
    """What was known is recalled from the server, and new records do not clash with the copied ones."""
    server = postgres.fresh()
    copy(file, server)
    with Memory(Settings(db=server, encoder="none", holdout=0.0)) as memory:
        assert memory.begin(body("restart server number 1")).action == "inject"
        turn = ask(memory, "restart server number 77", "a new answer")
        memory.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"})
        assert memory.recall("restart server number 77", scope=SCOPE)


def test_a_target_that_holds_anything_is_refused(file: str, postgres: Server, tmp_path: Path) -> None:
    """Nothing is mixed into another store, and a source that is not there is named."""
    server = postgres.fresh()
    copy(file, server)
    for source, target in ((file, server), (server, file)):
        with pytest.raises(StoreError, match="not empty"):
            copy(source, target)
    with pytest.raises(NotFound, match="nowhere"):
        copy(str(tmp_path / "nowhere.db"), server)


def test_a_source_that_is_away_leaves_nothing_behind(postgres: Server, tmp_path: Path) -> None:
    """The source's fault is told in one line that names it, without a password, and no file is made for the target."""
    away = f"postgresql://user:hidden@127.0.0.1:{HostProcess.free_port()}/memory"
    done = CliRunner().invoke(main, ["copy", away, str(tmp_path / "new.db")])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "user@127.0.0.1" in done.output
    assert "hidden" not in done.output
    with pytest.raises(StoreError, match="the source postgresql://"):
        copy(away, postgres.url("nowhere"))
    with pytest.raises(InvalidField, match="target: nonsense:/"):
        copy(postgres.fresh(), f"nonsense:/{tmp_path}/x")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_goes_away_is_told_in_one_line(
    file: str, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the databases raise in the middle of it comes up as our own error, which names the source."""

    def gone(_self: Any, _sql: str) -> Iterator[Any]:
        raise sqlite3.OperationalError("server closed the connection")

    server = postgres.fresh()
    copy(file, server)
    monkeypatch.setattr(PostgresConnection, "stream", gone)
    with pytest.raises(StoreError, match=r"postgresql://.* could not be copied: server closed"):
        copy(server, str(tmp_path / "new.db"))
    monkeypatch.undo()
    assert copy(server, str(tmp_path / "new.db"))["traces"] >= 6


def test_a_source_is_only_read(file: str, tmp_path: Path) -> None:
    """Copying changes no byte of the source and makes no file beside it; an earlier schema is named, not migrated."""
    source = Path(file)
    before, files = source.read_bytes(), set(source.parent.iterdir())
    assert copy(file, str(tmp_path / "copy.db"))["traces"] >= 6
    made = {tmp_path / f"copy.db{suffix}" for suffix in ("", "-wal", "-shm", "-turnstile")}
    assert set(source.parent.iterdir()) - made == files
    assert source.read_bytes() == before
    with contextlib.closing(connect(source)) as db:
        db.execute("DELETE FROM _sqlite_migrations WHERE name >= 'm007'")
    before = source.read_bytes()
    with pytest.raises(StoreError, match="optillm-memory migrate"):
        copy(file, str(tmp_path / "other.db"))
    assert source.read_bytes() == before
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("broken", ["header", "pages", "end"])
def test_a_source_that_is_broken_is_refused_and_left_alone(file: str, tmp_path: Path, broken: str) -> None:
    """Whatever is wrong with a file, it is named, nothing takes its place, and the copy is as empty as before."""
    source, target = Path(file), tmp_path / "copy.db"
    held = bytearray(source.read_bytes())
    assert len(held) > 100_000
    if broken == "header":
        held[:100] = b"x" * 100
    elif broken == "pages":
        for start in range(4_096 * 3, len(held), 4_096):
            held[start : start + 64] = b"\xff" * 64
    else:
        del held[len(held) // 2 :]
    source.write_bytes(held)
    with pytest.raises(StoreError, match=r"memory\.db"):
        copy(file, str(target))
    assert source.read_bytes() == held
    assert not list(tmp_path.glob("*corrupt*"))
    if target.exists():
        with opened(str(target)) as store:
            assert store.stats()["traces"] == 0


def test_interrupted_it_leaves_the_target_empty(file: str, postgres: Server) -> None:
    """A copy that stops half way can be run again."""
    server = postgres.fresh()

    def stop(table: str, _done: int, _total: int) -> None:
        if table == "memories":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(file, server, stop)
    with opened(server) as store:
        assert store.stats()["traces"] == 0
    assert copy(file, server)["traces"] >= 6


def test_a_copy_that_is_not_equal_is_found(file: str, postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that arrives changed is noticed by the check."""
    put = copying._ServerSide.put

    def spoiled(self: Any, table: str, columns: Any, rows: Any) -> None:
        place = list(columns).index("answer") if table == "traces" else None
        put(self, table, columns, [(*r[:place], "other", *r[place + 1 :]) if place is not None else r for r in rows])

    monkeypatch.setattr(copying._ServerSide, "put", spoiled)
    with pytest.raises(StoreError, match="traces is not equal"):
        copy(file, postgres.fresh())


def test_the_command_tells_what_was_copied(file: str, postgres: Server) -> None:
    """`optillm-memory copy` prints the rows of each table."""
    result = CliRunner().invoke(main, ["copy", file, postgres.fresh(), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["traces"] >= 6
