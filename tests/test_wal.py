"""The WAL stays within its bound in bytes, whatever the size of what is written, and whoever reads meanwhile."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import SCOPE, trace

from optillm_memory.store.sqlite.connection import WAL_BYTES
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.store import SqliteStore

LARGE = "x" * 400_000  # one commit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """Open a file of the test's own."""
    with contextlib.closing(SqliteStore(tmp_path / "memory.db")) as opened:
        yield opened


def wal(store: SqliteStore) -> int:
    """Return the size of the WAL."""
    return store.path.with_name("memory.db-wal").stat().st_size


def grown(store: SqliteStore, number: int) -> int:
    """Write one large trace; return the WAL's size when that is on disk and tidied up after."""
    store.write(lambda tx: tx.add_trace(trace(f"{number} {LARGE}"))).result(20)
    store.flush()  # the next operation begins when the last has been tidied up after
    return wal(store)


def test_the_wal_stays_within_its_bound(store: SqliteStore) -> None:
    """During a busy run, with readers coming and going, it has little more than the bound."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            store.recall.revision(SCOPE)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        sizes = []
        for number in range(3 * WAL_BYTES // len(LARGE)):
            sizes.append(grown(store, number))
            time.sleep(0.001)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert max(sizes) > len(LARGE)
    # Readers that are met while they read are waited for a little, and a moment later for longer.
    assert max(sizes) < 1.5 * WAL_BYTES
    assert store.size_bytes() > 2 * WAL_BYTES


def test_without_readers_one_commit_is_all_that_exceeds_it(store: SqliteStore) -> None:
    """Every time the bound is passed, by whatever a commit writes, the WAL begins anew."""
    before = grown(store, 0)
    for number in range(1, 2 * WAL_BYTES // len(LARGE)):
        after = grown(store, number)
        assert after <= WAL_BYTES
        before = max(before, after)
    assert before > WAL_BYTES // 2


def test_a_reader_that_holds_the_wal_back_is_logged_once(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside one that reads an old state it must grow: that is said once, writing goes on, and afterwards it is cut."""
    monkeypatch.setattr("optillm_memory.store.sqlite.writer.WAL_BYTES", 400_000)
    monkeypatch.setattr("optillm_memory.store.sqlite.writer._HELD_BYTES", 800_000)
    monkeypatch.setattr("optillm_memory.store.sqlite.writer._REST", 0.0)
    grown(store, 0)
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM traces").fetchone()
        with caplog.at_level(logging.WARNING):
            sizes = [grown(store, number) for number in range(1, 6)]
        assert sizes[-1] > 1_600_000
        assert caplog.text.count("read the same state for long") == 1
        reader.execute("COMMIT")
    assert grown(store, 7) == 0
