"""Fail open: the one place that keeps faults of memory from requests, and what stands in for memory there."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from optillm_memory.errors import HostError, StoreUnavailable
from optillm_memory.host.failopen import FailOpen
from optillm_memory.host.install import CONTENT, install, plugin_path, uninstall
from optillm_memory.host.runtime import Runtime


def test_work_that_is_done_in_time() -> None:
    """A result comes back without a fault."""
    assert FailOpen(5).call(lambda: 7) == (7, "")


def test_faults_are_named_and_counted() -> None:
    """Whatever is raised comes back as the name of the fault, and is counted by it."""
    fail_open = FailOpen(5)

    def fails() -> None:
        raise StoreUnavailable("gone")

    assert fail_open.call(fails) == (None, "StoreUnavailable")
    assert fail_open.quietly(fails) == "StoreUnavailable"
    assert fail_open.quietly(lambda: None) == ""
    assert fail_open.call(lambda: next(iter(()))) == (None, "StopIteration")
    assert fail_open.faults == {"StoreUnavailable": 2, "StopIteration": 1}


def test_a_hundred_calls_that_hang() -> None:
    """However much hangs, each call is back at its deadline, no more than 32 threads hang, and all is well after."""
    fail_open, release = FailOpen(0.2), threading.Event()
    before = threading.active_count()
    slowest = 0.0

    def call() -> None:
        nonlocal slowest
        started = time.perf_counter()
        assert fail_open.call(release.wait) == (None, "deadline")
        slowest = max(slowest, time.perf_counter() - started)

    callers = [threading.Thread(target=call) for _ in range(100)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert slowest < 1
    assert fail_open.faults == {"deadline": 100}
    assert threading.active_count() - before <= 32
    release.set()
    assert fail_open.call(lambda: "again") == ("again", "")


def test_work_past_its_deadline_is_not_begun() -> None:
    """What waited in the queue beyond its deadline is dropped, so that hung calls leave no backlog."""
    fail_open, release = FailOpen(0.1), threading.Event()
    begun: list[int] = []

    def hang(number: int) -> None:
        begun.append(number)
        release.wait()

    for number in range(40):
        fail_open.call(partial(hang, number))
    release.set()
    assert fail_open.call(lambda: "again") == ("again", "")
    assert begun == list(range(32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPTILLM_AGENT_MEMORY_HOLDOUT", "2"),
        ("OPTILLM_AGENT_MEMORY_HOLDUOT", "0"),
        ("OPTILLM_AGENT_MEMORY_REDACT", "x"),
    ],
)
def test_a_bad_setting_turns_memory_off_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    """A mistyped or misnamed setting keeps memory off and is named, while the host goes on."""
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_DB", str(tmp_path / "memory.db"))
    monkeypatch.setenv(name, value)
    runtime = Runtime()
    assert runtime.memory is None
    assert name in runtime.fault
    assert not (tmp_path / "memory.db").exists()


def test_install_is_idempotent_and_uninstall_clean(tmp_path: Path) -> None:
    """Installing twice leaves one file, and uninstalling leaves nothing."""
    path = install(tmp_path)
    changed_at = path.stat().st_mtime_ns
    assert install(tmp_path) == path == plugin_path(tmp_path)
    assert path.stat().st_mtime_ns == changed_at
    assert path.read_text() == CONTENT
    assert uninstall(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not uninstall(tmp_path)


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    """A plugin file that we did not write is neither overwritten nor removed, and its neighbours stay."""
    path = plugin_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("SLUG = 'mine'\n")
    for action in (install, uninstall):
        with pytest.raises(HostError, match="not written by optillm-memory"):
            action(tmp_path)
    assert path.read_text() == "SLUG = 'mine'\n"
    path.unlink()
    neighbour = path.with_name("other_plugin.py")
    neighbour.write_text("")
    install(tmp_path)
    assert uninstall(tmp_path)
    assert neighbour.exists()


@pytest.mark.host
def test_serve_refuses_to_start_without_the_plugin() -> None:
    """Where the plugin cannot be imported, `serve` says so and ends: memory is never off in silence."""
    code = (
        "import sys; sys.modules['optillm_memory.host.exchange'] = None; sys.argv = ['optillm-memory', 'serve']; "
        "from optillm_memory.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the plugin cannot be imported" in done.stderr
