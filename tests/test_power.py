"""Power loss: what was acknowledged is there after it, and the harness that says so finds stores of which it is not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import apsw
import pytest

from benchmarks import faultdisk, power
from benchmarks.faultdisk import PowerFailure
from optillm_memory.store.writer import Writer


def test_no_acknowledged_feedback_is_lost_with_the_power(tmp_path: Path) -> None:
    """After 40 power losses, while it starts, migrates, answers and closes, all that was acknowledged is there."""
    found = power.run(tmp_path, 40, seed=3, tick=lambda: None)
    assert found.pop("acknowledged") > 50
    assert found == {"power_losses": 40, "lost": 0, "doubled": 0, "corrupt": 0, "differing": 0}


def test_a_disk_that_only_says_that_it_syncs_is_found_out(tmp_path: Path) -> None:
    """On a disk that drops what it said was safe, the harness reports what was lost."""
    found = power.run(tmp_path, 10, seed=3, tick=lambda: None, honest=False)
    assert found["lost"] > 0


@pytest.mark.parametrize(("level", "wal"), [("OFF", True), ("NORMAL", True), ("FULL", False)])
def test_a_store_that_syncs_too_little_is_found_out(
    tmp_path: Path, level: str, wal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a WAL less than FULL, with a rollback journal less than EXTRA, and the harness reports what was lost."""
    execute = faultdisk.Connection.execute

    def weaker(self: faultdisk.Connection, sql: str, values: Any = ()) -> faultdisk.Cursor:
        return execute(self, sql.replace("synchronous=EXTRA", f"synchronous={level}"), values)

    monkeypatch.setattr(faultdisk.Connection, "execute", weaker)
    monkeypatch.setattr(power, "_ROLLBACK", 0.0 if wal else 1.0)
    # Where the power goes is a matter of chance and of how busy the machine is: some tries, and one must tell.
    for seed in range(3, 23):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if power.run(folder, 40, seed=seed, tick=lambda: None)["lost"] > 0:
            return
    pytest.fail("nothing was lost in 800 power failures")


def test_a_writer_that_acknowledges_before_the_commit_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the outcome is told before the commit that holds it, the harness reports what was lost."""
    submit = Writer.submit

    def hasty(self: Writer, operation: Callable[[Any], Any]) -> Future[Any]:
        told: Future[Any] = Future()

        def run(connection: Any) -> None:
            told.set_result(operation(connection))

        def refused(done: Future[Any]) -> None:
            if done.exception() and not told.done():
                told.set_exception(done.exception())

        submit(self, run).add_done_callback(refused)
        return told

    monkeypatch.setattr(Writer, "submit", hasty)
    assert power.run(tmp_path, 8, seed=3, tick=lambda: None)["lost"] > 0


def left(tmp_path: Path, disk: PowerFailure, name: str) -> bytes | None:
    """Return what a file holds after the power failed; None where it is gone."""
    folder = tmp_path / "left"
    folder.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    disk.write_remaining(folder)
    return (folder / name).read_bytes() if (folder / name).exists() else None


@pytest.mark.parametrize(
    ("lot", "expected"),
    [(0.9, b"a" * 2048), (0.5, b"a" * 1024 + b"b" * 1024), (0.1, None)],
    ids=["dropped", "kept", "torn"],
)
def test_what_becomes_of_a_write(tmp_path: Path, lot: float, expected: bytes | None) -> None:
    """What was synced stays; a later write is dropped, kept, or comes through in some of its sectors only."""
    lots = iter([lot, 0.9, 0.1])
    disk = PowerFailure(10, lambda: next(lots))
    path = str(tmp_path / "file")
    disk.opened(path)
    disk.done("write", path, b"a" * 2048, 0)
    disk.done("sync", path)
    disk.done("write", path, b"b" * 1024, 1024)
    torn = b"a" * 1536 + b"b" * 512
    assert left(tmp_path, disk, "file") == (torn if expected is None else expected)
    disk.unregister()


@pytest.mark.parametrize("synced", [False, True])
def test_a_removed_file_may_come_back_until_its_folder_is_synced(tmp_path: Path, synced: bool) -> None:
    """A removal that was not synced may be undone by the failure; one that was stays."""
    disk = PowerFailure(10, lambda: 0.9)
    path = tmp_path / "file"
    path.write_bytes(b"there")
    disk.opened(str(path))
    disk.xDelete(str(path), synced)
    assert left(tmp_path, disk, "file") == (None if synced else b"there")
    disk.unregister()


def test_nothing_works_after_the_power_failed(tmp_path: Path) -> None:
    """From the failing operation on, reads and writes alike end in an error."""
    disk = PowerFailure(1, lambda: 0.9)
    disk.before("read", "file")
    disk.before("write", "file")
    for operation in ("write", "read", "open"):
        with pytest.raises(apsw.IOError, match="power"):
            disk.before(operation, "file")
    assert disk.failed
    disk.unregister()
