"""Two real optillm processes on one PostgreSQL: they learn from each other, and the death of one harms neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosting import QUIET, Host, served
from postgres import Server

from optillm_memory.bench.upstream import RecordingUpstream

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


def test_one_learns_from_the_other_within_a_second(hosts: list[Host], url: str) -> None:
    """Feedback that one server acknowledged is in what the other injects, at most a second later."""
    one, other = hosts
    for number in range(5):
        answered = one.chat(f"How do I raise the retry limit of uploader number {number}?")
        told(one, answered["id"])
        acknowledged = time.monotonic()
        while True:
            again = other.chat(f"How do I raise the retry limit of uploader number {number} please?")
            if again["agent_memory"]["action"] == "inject":
                break
            assert time.monotonic() - acknowledged < 1.0
        assert f"answer to How do I raise the retry limit of uploader number {number}?" in str(other.prompt)
    command = [sys.executable, "-m", "optillm_memory.cli", "stats", "--db", url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET}, check=True)
    assert json.loads(done.stdout)["feedback"] == 5


def test_the_other_goes_on_when_one_is_killed(hosts: list[Host]) -> None:
    """Killed in the middle of its work, a server leaves nothing that holds the other up or is half done."""
    one, other = hosts
    for number in range(10):
        told(one, one.chat(f"How do I restart service number {number}?")["id"])
    one.process.kill()
    answered = other.chat("How do I restart service number 3?")
    assert answered["agent_memory"]["action"] == "inject"
    told(other, answered["id"])
    assert other.route("GET", "stats").json()["feedback"] == 11
