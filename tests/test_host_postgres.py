"""Two real optillm processes on one PostgreSQL: they learn from each other, and the death of one harms neither."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosting import QUIET, Host, served, until
from postgres import Server

from benchmarks import acknowledged
from optillm_memory.store.maintenance.copying import copy
from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = pytest.mark.host


@pytest.fixture
def url(postgres: Server) -> str:
    """Give the URL of an empty database."""
    return postgres.fresh()


@pytest.fixture
def hosts(upstream: RecordingUpstream, url: str, tmp_path: Path) -> Iterator[list[Host]]:
    """Start two servers on the database."""
    env = {**QUIET, "OPTILLM_AGENT_MEMORY_DB": url}
    upstream.reply = lambda request: f"answer to {request['messages'][-1]['content']}"
    with served(upstream, tmp_path / "a.db", env=env) as one, served(upstream, tmp_path / "b.db", env=env) as other:
        yield [one, other]
    assert not (tmp_path / "a.db").exists()


def told(host: Host, trace_id: str) -> None:
    """Say that an answer was right."""
    host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"})


def test_one_learns_from_the_other_at_once(hosts: list[Host], url: str) -> None:
    """Feedback that one server acknowledged is in what the other injects, a moment later at most."""
    one, other = hosts
    for number in range(5):
        answered = one.chat(f"How do I raise the retry limit of uploader number {number}?")
        told(one, answered["id"])
        told_at = time.monotonic()
        while True:
            again = other.chat(f"How do I raise the retry limit of uploader number {number} please?")
            if again["agent_memory"]["action"] == "inject":
                break
            assert time.monotonic() - told_at < 10.0
        assert f"answer to How do I raise the retry limit of uploader number {number}?" in str(other.prompt)
    command = [sys.executable, "-m", "optillm_memory.cli", "stats", "--db", url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET}, check=True, timeout=60)
    assert json.loads(done.stdout)["feedback"] == 5


def test_the_other_goes_on_when_one_is_killed(hosts: list[Host], url: str, tmp_path: Path) -> None:
    """Killed while feedback comes in, a server holds the other up in nothing; what it acknowledged is there once."""
    one, other = hosts
    tasks = [f"How do I restart service number {number}?" for number in range(60)]
    feedback = {f"fb-{number}": one.chat(task)["id"] for number, task in enumerate(tasks)}
    said: dict[str, str] = {}
    broken: list[type[Exception]] = []

    def post(names: list[str]) -> None:
        """Tell a server how its answers were, again and again as a client that tries again does, until it is gone."""
        for name in itertools.cycle(names):
            try:
                one.tell(verdict(name, feedback[name]))
            except httpx.TransportError as error:
                broken.append(type(error))
                return
            said[name] = feedback[name]

    threads = [threading.Thread(target=post, args=([*feedback][first::3],)) for first in range(3)]
    for thread in threads:
        thread.start()
    assert until(lambda: len(said) >= 20)
    one.process.kill()
    killed = time.monotonic()
    for thread in threads:
        thread.join(60)
    assert len(broken) == len(threads)  # each of them was at it
    assert other.chat(tasks[int(next(iter(said))[3:])])["agent_memory"]["action"] == "inject"
    statuses = {name: other.tell(verdict(name, trace_id))["status"] for name, trace_id in feedback.items()}
    assert time.monotonic() - killed < 30
    assert {statuses[name] for name in said} == {"duplicate"}
    assert set(statuses.values()) <= {"duplicate", "applied"}
    assert other.route("GET", "stats", key=None).json()["feedback"] == len(feedback)
    copied = tmp_path / "copied" / "memory.db"
    copy(url, str(copied))
    assert acknowledged.check(copied, feedback) == acknowledged.Faults()
    with acknowledged.opened(copied) as memory:
        learned = {record.task: record.successes for record in memory.store.list_memories(None, limit=1_000)}
    assert learned == dict.fromkeys(tasks, 1)


def verdict(feedback_id: str, trace_id: str) -> dict[str, Any]:
    """Return the feedback that an answer was right, under an id that stays the same when it is posted again."""
    return {
        "feedback_id": feedback_id, "trace_id": trace_id, "metric": "success", "value": True, "source": "code",
    }  # fmt: skip
