"""Fail open: the one place that keeps faults of memory from requests, and what stands in for memory there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from optillm_memory.errors import StoreUnavailable
from optillm_memory.host.failopen import FailOpen
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
        caller.join(60)
    assert 0 < slowest < 10  # what hangs would hang for good
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
        release.wait(60)

    for number in range(40):
        fail_open.call(partial(hang, number))
    release.set()
    assert fail_open.call(lambda: "again") == ("again", "")
    assert begun == list(range(32))


@pytest.mark.parametrize(
    ("name", "value"),
    [("HOLDOUT", "2"), ("REDACT", "x"), ("ANSWER_FORM", "no_such_module:form"), ("DB", "mysql://host/d")],
)
def test_a_wrong_value_turns_memory_off_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    """As a plugin of plain optillm, a wrong value keeps memory off and is named, and the host goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_DB", str(tmp_path / "memory.db"))
    monkeypatch.setenv(f"OPTILLM_AGENT_MEMORY_{name}", value)
    runtime = Runtime()
    assert runtime.memory is None
    assert f"OPTILLM_AGENT_MEMORY_{name}: " in runtime.fault
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_variable_leaves_memory_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A misspelled variable is no reason to serve without memory."""
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_DB", str(tmp_path / "memory.db"))
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "none")
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_HOLDUOT", "0")
    runtime = Runtime()
    assert runtime.memory is not None, runtime.fault
    runtime.memory.close()


def test_whatever_keeps_memory_from_opening_leaves_the_host_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw while memory is opened is named too, and not raised into the host."""

    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("optillm_memory.host.runtime.Memory", broken)
    runtime = Runtime()
    assert runtime.memory is None
    assert runtime.fault == "RuntimeError: unforeseen"


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


def test_serve_refuses_a_wrong_value(tmp_path: Path) -> None:
    """With a value that is not valid, `serve` ends at once and names the variable, before optillm is loaded."""
    for name, value in (("HOLDOUT", "2"), ("ANSWER_FORM", "no_such_module:form")):
        env = {**os.environ, "OPTILLM_AGENT_MEMORY_DB": "memory.db", f"OPTILLM_AGENT_MEMORY_{name}": value}
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "optillm_memory.cli", "serve", "--port", "1"],
            env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"Error: OPTILLM_AGENT_MEMORY_{name}: {value!r}".replace("'2'", "2.0") in done.stderr
        assert "optillm.server" not in done.stderr
    assert list(tmp_path.iterdir()) == []
