"""Nothing is lost that was acknowledged: killed at random moments, and written by several processes at once."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import pytest
from builders import lexical_memory, teach

from benchmarks import acknowledged, durability, kills, soak
from benchmarks.acknowledged import Faults
from optillm_memory import HostError
from optillm_memory.store.sqlite.turnstile import Turnstile
from optillm_memory.store.threads import start_thread


def test_killed_at_any_moment_no_acknowledged_feedback_is_lost(tmp_path: Path) -> None:
    """After 40 `kill -9` while it starts, migrates, answers and closes all that was acknowledged is there, and once."""
    found = kills.run(tmp_path, 40, seed=7, tick=lambda: None)
    assert found.pop("acknowledged") > 0
    assert found == {"kills": 40, "lost": 0, "doubled": 0, "corrupt": 0, "differing": 0}


def test_processes_and_threads_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    """Three processes with two threads each lose and double nothing, and see what the others learn."""
    found = soak.run(tmp_path, processes=3, threads=2, seconds=3, tick=lambda: None)
    assert found["acknowledged"] > 0
    assert found["errors_by_name"] == {}
    assert [found[name] for name in ("lost", "doubled", "corrupt", "differing")] == [0, 0, 0, 0]
    assert 0 < found["seen_p50_ms"] <= found["seen_p99_ms"]
    assert found["write_p99_ms"] >= found["write_p50_ms"] > 0


def test_without_the_package_that_fails_disks_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `apsw` is missing, the bench says what to install, before it has measured anything."""
    for module in ("benchmarks.power", "benchmarks.faultdisk"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("benchmarks.power", raising=False)
    monkeypatch.setitem(sys.modules, "apsw", None)
    with pytest.raises(HostError, match="pip install apsw"):
        durability.run(
            kills=10**9, power_losses=1, processes=1, threads=1, seconds=0, seed=1, say=print, tick=lambda: None
        )


@pytest.mark.parametrize("suffixes", [("-wal",), ("-wal", "-shm")])
def test_processes_whose_wal_is_deleted_lose_nothing(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    """Files deleted under processes at work are made again by one of them; what comes meanwhile is at worst refused."""
    path = tmp_path / "soak.db"

    def delete() -> None:
        if path.with_name("soak.db-wal").exists():
            for suffix in suffixes:
                path.with_name(f"soak.db{suffix}").unlink(missing_ok=True)

    timers = [threading.Timer(seconds, delete) for seconds in (2.0, 3.5)]
    for timer in timers:
        timer.start()
    found = soak.run(tmp_path, processes=2, threads=2, seconds=3, tick=lambda: None)
    for timer in timers:
        timer.join(30)
    assert found["acknowledged"] > 0
    refusals = ("StoreError: cannot read", "StoreUnavailable: cannot write")
    assert all(name.startswith(refusals) for name in found["errors_by_name"])
    assert [found[name] for name in ("lost", "doubled", "corrupt", "differing")] == [0, 0, 0, 0]


def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """A file that lacks what it acknowledged, holds it twice, learned something else or is damaged does not pass."""
    with lexical_memory(tmp_path) as memory:
        said = {}
        for number in range(40):
            trace_id = acknowledged.request(memory, f"task {number} " * 40)
            said[acknowledged.send_feedback(memory, trace_id)] = trace_id
        twice = teach(memory, "another task", "an answer")
    path = tmp_path / "memory.db"
    assert acknowledged.check(path, said) == Faults()
    assert acknowledged.check(path, {**said, "never-given": twice.trace_id}) == Faults(lost=1)
    assert acknowledged.check(path, {**said, "on-no-trace": "nowhere"}) == Faults(lost=1)
    with lexical_memory(tmp_path) as memory:
        teach(memory, "another task", "an answer")
    assert acknowledged.check(path, said) == Faults(doubled=1)
    with lexical_memory(tmp_path) as memory:
        memory.store.write(lambda tx: tx.db.execute("DELETE FROM outcomes")).result(10)
    assert acknowledged.check(path, said) == Faults(doubled=1, differing=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * 8192 + whole[16384:])
    assert acknowledged.damage(path) == Faults(corrupt=1)
    assert acknowledged.check(path, said).lost == len(said)


def test_the_bench_reports_flat_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench durability` adds up what is lost and doubled over its parts, and leaves no file behind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = durability.run(
        kills=2, power_losses=2, processes=1, threads=1, seconds=0.5, seed=1, say=lambda _: None, tick=lambda: None
    )
    assert {"kills": 2, "power_losses": 2, "lost": 0, "doubled": 0, "corrupt": 0, "errors": 0}.items() <= found.items()
    assert found["acknowledged"] == sum(found[f"{part}_acknowledged"] for part in ("kills", "power", "soak"))
    assert list(tmp_path.iterdir()) == []


PASSES = """
import sys, time
from pathlib import Path
from optillm_memory.store.sqlite.turnstile import Turnstile
from optillm_memory.store.threads import start_thread
turnstile = Turnstile(Path(sys.argv[1]), start_thread)
for _ in range(int(sys.argv[2])):
    with turnstile.passing():
        print("in", flush=True)
        sys.stdin.readline()
"""


def passing(path: Path, times: int = 1) -> subprocess.Popen[str]:
    """Start a process that goes through a turnstile, says so, and stays until it is told to go on."""
    return subprocess.Popen(
        [sys.executable, "-c", PASSES, str(path), str(times)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def says_in(process: subprocess.Popen[str], timeout_s: float = 10) -> bool:
    """Whether a process says in time that it is inside."""
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], timeout_s)[0]) and process.stdout.readline() == "in\n"


def test_a_writer_waits_for_who_is_before_it_and_not_for_the_dead(tmp_path: Path) -> None:
    """While another process stands in the turnstile nothing is acknowledged; when it is killed, the writer goes on."""
    with lexical_memory(tmp_path) as memory:
        trace_id = acknowledged.request(memory, "a task")
        memory.settle()
        other = passing(tmp_path / "memory.db-turnstile")
        assert says_in(other)
        receipts = memory.submit_feedback({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"})
        with pytest.raises(FutureTimeoutError):
            receipts(0.3)
        assert acknowledged.request(memory, "another task")  # nobody who asks waits for it
        other.kill()
        other.communicate(timeout=30)
        assert receipts(15)[0].status == "applied"


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="tells that a process waits by Linux's list of locks")
def test_who_leaves_the_turnstile_does_not_pass_those_who_wait(tmp_path: Path) -> None:
    """A process that comes back at once finds the one that waited inside."""
    path, locks = tmp_path / "turnstile", Path("/proc/locks")
    greedy = passing(path, times=2)
    assert says_in(greedy)
    patient = passing(path)
    deadline = time.monotonic() + 30
    while f" {patient.pid} " not in "".join(x for x in locks.read_text().splitlines() if "->" in x):
        assert patient.poll() is None
        assert time.monotonic() < deadline
    assert greedy.stdin is not None
    greedy.stdin.write("on\n")
    greedy.stdin.flush()
    assert says_in(patient)
    patient.communicate("on\n")
    assert says_in(greedy)
    greedy.communicate("on\n")


def test_a_process_that_was_stopped_inside_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others open the file and write without their turn after a while, and leave the turnstile free behind them."""
    monkeypatch.setattr("optillm_memory.store.sqlite.turnstile.PATIENCE_S", 0.2)
    place = tmp_path / "memory.db-turnstile"
    stopped = passing(place)
    assert says_in(stopped)
    stopped.send_signal(signal.SIGSTOP)
    try:
        with lexical_memory(tmp_path) as memory:
            assert teach(memory, "a task", "an answer")
            assert teach(memory, "another task", "an answer")
            stopped.send_signal(signal.SIGCONT)
            stopped.communicate("on\n")
            assert teach(memory, "a third task", "an answer")
            another = passing(place)
            assert says_in(another)
            another.communicate("on\n")
    finally:
        stopped.kill()


def test_without_a_turnstile_writing_goes_on(tmp_path: Path) -> None:
    """Where its file cannot be made, SQLite's own lock has to do."""
    turnstile = Turnstile(tmp_path / "no such folder" / "turnstile", start_thread)
    with turnstile.passing():
        assert not (tmp_path / "no such folder").exists()
    (tmp_path / "memory.db-turnstile").mkdir()
    with lexical_memory(tmp_path) as memory:
        assert teach(memory, "a task", "an answer")
