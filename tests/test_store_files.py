"""The file under the store: its rights, journal and schema, and what happens when it is broken, gone or full."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import SCOPE, trace

from optillm_memory import Memory, Settings, StoreTooNew, StoreUnavailable
from optillm_memory.store.sqlite.connection import open_writer
from optillm_memory.store.sqlite.library import sqlite3, sqlite_version, wal_is_safe
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.transaction import Transaction


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file that is not there yet, in a directory that is not there either."""
    return tmp_path / "new" / "memory.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    """Give an open store with one trace."""
    opened = SqliteStore(path)
    add(opened)
    yield opened
    opened.close()


def add(store: SqliteStore, text: str = "list the files") -> bool:
    """Write one trace and wait until it is on disk."""
    return store.write(lambda tx: tx.add_trace(trace(text))).result(15)


def ask_file(path: Path, sql: str) -> Any:
    """Return the first value that a query of the file gives, on a connection of its own."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchone()[0]
    finally:
        connection.close()


def asides(path: Path) -> list[Path]:
    """Return what was renamed aside, without journals."""
    return [p for p in path.parent.glob("*.corrupt-*") if not p.name.endswith(("-wal", "-shm"))]


# -- rights, journal, schema -----------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_are_for_their_owner_alone(path: Path, umask: int) -> None:
    """The database and its journal files are created 0600, whatever the umask."""
    before = os.umask(umask)
    try:
        store = SqliteStore(path)
        add(store)
    finally:
        os.umask(before)
    files = list(path.parent.iterdir())
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in files}
    store.close()
    assert set(modes.values()) == {0o600}, modes
    assert path.name in modes
    if wal_is_safe():
        assert f"{path.name}-wal" in modes


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ("3.7.0", False), ("3.40.1", False), ("3.44.5", False), ("3.44.6", True), ("3.44.9", True), ("3.45.0", False),
        ("3.50.6", False), ("3.50.7", True), ("3.50.12", True), ("3.51.0", False), ("3.51.2", False), ("3.51.3", True),
        ("3.52.0", True), ("3.53.4", True), ("4.0.0", True),
    ],
)  # fmt: skip
def test_wal_is_used_where_the_library_is_mended(version: str, safe: bool) -> None:
    """The WAL-reset bug is mended in 3.51.3 and later, and in 3.50.7 and 3.44.6 of their lines."""
    assert wal_is_safe(version) is safe


@pytest.mark.parametrize("safe", [True, False])
def test_journal_follows_the_library(path: Path, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an affected library there is a rollback journal, also for a file that was in WAL; every commit is synced."""
    SqliteStore(path).close()
    monkeypatch.setattr("optillm_memory.store.sqlite.connection.wal_is_safe", lambda: safe)
    connection = open_writer(path)
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == ("wal" if safe else "delete")
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 3
    connection.close()
    assert sqlite_version() == sqlite3.sqlite_version


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    """A file that a later release wrote is neither opened nor changed, and the error says what to do."""
    SqliteStore(path).close()
    connection = sqlite3.connect(path)
    table = "_sqlite_migrations"
    columns = [r[1] for r in connection.execute(f"PRAGMA table_info({table})")]
    row = dict(zip(columns, connection.execute(f"SELECT * FROM {table}").fetchone(), strict=True))
    row["name"] = "m002_from_the_future"
    row.pop("id", None)
    connection.execute(f"INSERT INTO {table}({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match="upgrade"):
        Memory(Settings(db=str(path), encoder="none"))
    assert path.read_bytes() == before
    assert asides(path) == []


def test_a_new_file_that_another_process_is_writing_is_waited_for(path: Path) -> None:
    """A journal's mode cannot change while another writes: opening waits for that, and does not fail."""
    path.parent.mkdir()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE unrelated(x)")
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    store = SqliteStore(path)
    assert store.fault == ""
    assert add(store)
    store.close()
    release.join(30)
    other.close()


OPEN_AT_ONCE = """
import sys, time, pathlib
from builders import trace
from optillm_memory.store.sqlite.store import SqliteStore
print("ready", flush=True)
sys.stdin.readline()
for path in sys.argv[1:]:
    store = SqliteStore(pathlib.Path(path))
    assert store.write(lambda tx: tx.add_trace(trace())).result(20), store.fault
    store.close()
print("done", flush=True)
"""


def spawn(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python process that can import what the tests import."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_processes_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    """Several processes that start on the same new file make one schema between them, and all can write."""
    paths = [tmp_path / f"{n}.db" for n in range(8)]
    children = [spawn(OPEN_AT_ONCE, *map(str, paths)) for _ in range(3)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert outputs == ["done\n"] * 3
    for path in paths:
        assert ask_file(path, "SELECT count(*) FROM traces") == 3
        assert ask_file(path, "PRAGMA integrity_check") == "ok"
        assert ask_file(path, "SELECT count(*) FROM meta WHERE key = 'salt'") == 1
        assert asides(path) == []


# -- broken, gone, full ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no database at all " * 99, "middle", "cut"])
def test_a_corrupt_file_is_kept_aside_and_a_fresh_one_started(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage, an overwritten middle and a cut file are renamed, reported by name, and replaced by an empty one."""
    store = SqliteStore(path)
    for number in range(60):
        add(store, f"task {number} " * 50)
    store.close()
    whole = path.read_bytes()
    broken = {
        "middle": whole[:4096] + b"\xff" * (len(whole) - 8192) + whole[-4096:],
        "cut": whole[: len(whole) // 2 // 4096 * 4096],
    }.get(damage, damage.encode())
    path.write_bytes(broken)
    with caplog.at_level(logging.ERROR):
        again = SqliteStore(path)
    assert add(again)
    assert again.stats()["traces"] == 1
    again.close()
    (aside,) = asides(path)
    assert aside.read_bytes() == broken
    assert aside.name in caplog.text


def test_a_file_that_breaks_while_in_use_is_mended(store: SqliteStore, path: Path) -> None:
    """Damage that comes while the store is open is found by a reader, the file is kept, and writing goes on."""
    for number in range(60):
        add(store, f"task {number} " * 50)
    store.write(lambda tx: tx.db.execute("PRAGMA cache_size=1")).result(10)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    deadline = time.monotonic() + 20
    while not asides(path) and time.monotonic() < deadline:
        for look in (store.stats, lambda: add(store)):
            try:
                look()
            except Exception:  # noqa: BLE001 - what a broken file does to the single call is not the point
                continue
    assert asides(path)
    assert add(store)
    assert store.fault == ""
    assert store.recall.lexical(SCOPE, ["files"], 5, alone=False) == []
    assert ask_file(path, "PRAGMA integrity_check") == "ok"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_taken_away_is_made_again(
    store: SqliteStore, path: Path, tmp_path: Path, replaced: bool
) -> None:
    """When the file is removed, or another put in its place, what is acknowledged after that is in what is there."""
    for name in path.parent.iterdir():
        name.unlink()
    if replaced:
        other = SqliteStore(tmp_path / "other.db")
        add(other, "from the other file")
        other.close()
        (tmp_path / "other.db").rename(path)
    assert add(store, "after")
    assert store.stats()["traces"] == 1 + replaced
    assert ask_file(path, "SELECT count(*) FROM traces WHERE task = 'after'") == 1


def test_a_place_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    """Where the file cannot be made nothing is acknowledged; once it can be, writing works without a restart."""
    blocker = tmp_path / "folder"
    blocker.write_text("a file where the folder should be")
    store = SqliteStore(blocker / "memory.db")
    assert store.fault
    with pytest.raises(StoreUnavailable, match="cannot write"):
        add(store)
    blocker.unlink()
    time.sleep(1.1)
    assert add(store)
    assert store.fault == ""
    store.close()


def test_a_full_database_refuses_and_recovers(store: SqliteStore) -> None:
    """SQLITE_FULL acknowledges nothing and keeps what was there; with room again the same store goes on."""

    def limit(tx: Transaction, pages: int) -> int:
        return int(tx.db.execute(f"PRAGMA max_page_count={pages}").fetchone()[0])

    store.write(lambda tx: limit(tx, 1)).result(10)  # SQLite keeps it at the pages in use
    with pytest.raises(StoreUnavailable, match="full"):
        store.write(lambda tx: [tx.add_trace(trace("x" * 20_000)) for _ in range(20)]).result(10)
    assert "full" in store.fault
    assert store.stats()["traces"] == 1
    assert store.lost == 0
    store.write(lambda tx: limit(tx, 1_000_000)).result(10)
    assert add(store, "x" * 20_000)
    assert store.fault == ""
    assert ask_file(store.path, "PRAGMA integrity_check") == "ok"


DISK_FULL = """
import pathlib, resource, signal, sys
from builders import trace
from optillm_memory import StoreUnavailable
from optillm_memory.store.sqlite.store import SqliteStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = SqliteStore(pathlib.Path(sys.argv[1]))
written, (soft, hard) = 0, resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
try:
    for written in range(1_000):
        store.write(lambda tx: tx.add_trace(trace("x" * 20_000))).result(20)
    print("never full")
except StoreUnavailable as error:
    print(f"refused: {error}")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.write(lambda tx: tx.add_trace(trace("x" * 20_000))).result(20)
store.close()
print(written + 1)
"""


def test_a_full_disk_loses_nothing_acknowledged(path: Path) -> None:
    """In a process whose files may not grow, writes are refused in time, and every one that was taken is there."""
    child = spawn(DISK_FULL, str(path))
    refused, written = child.communicate(timeout=60)[0].splitlines()
    assert refused.startswith("refused: cannot write")
    assert int(written) > 5
    assert ask_file(path, "SELECT count(*) FROM traces") == int(written)
    assert ask_file(path, "PRAGMA integrity_check") == "ok"
