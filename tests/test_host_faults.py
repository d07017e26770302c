"""Faults: whatever goes wrong in memory, the user's request fares as without it, and nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosting import KEY, LEAN, MODEL, QUIET, Host, authorization, running, served, until
from sqlite_utils import Database

from optillm_memory.memory import Memory
from optillm_memory.store.sqlite.library import wal_is_safe
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = pytest.mark.host

TASK = "Which file holds the retry limit of the nightly uploader?"
ANSWER = "It is in uploader.toml."
DEADLINE_S = 0.3
SLACK_S = 5.0  # for a busy machine; a request that waited for the fault would be 10 s late
SERVED = {"role": "assistant", "content": f"echo: {TASK}"}


def timed_chat(host: Host, memory: dict[str, Any] | None = None, model: str = MODEL) -> tuple[dict[str, Any], float]:
    """Ask; return the answered body and the seconds that it took."""
    started = time.perf_counter()
    answered = host.chat(TASK, memory=memory, model=model)
    return answered, time.perf_counter() - started


def host_time(host: Host) -> float:
    """Return how long the host takes for a request without memory."""
    return max(timed_chat(host, model="m")[1] for _ in range(3))


def reasons(answered: dict[str, Any]) -> list[str]:
    """Return why something was left out of a request."""
    return [item["reason"] for item in answered["agent_memory"]["skipped"]]


def success(trace_id: str) -> dict[str, Any]:
    """Return feedback that a trace went well, under an id of its own."""
    return {"trace_id": trace_id, "metric": "success", "value": True, "source": "code", "feedback_id": f"f-{trace_id}"}


@contextlib.contextmanager
def unreadable(db: Path) -> Iterator[None]:
    """Hold every read lock of a WAL database: whoever reads it hangs for 10 seconds."""
    with db.with_name(f"{db.name}-shm").open("r+b") as shared:
        fcntl.lockf(shared, fcntl.LOCK_EX, 5, 123)  # WAL_READ_LOCK(0) to (4), https://sqlite.org/walformat.html
        yield


@contextlib.contextmanager
def unwritable(db: Path) -> Iterator[None]:
    """Hold the write lock from another connection."""
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def full_disk(pid: int) -> Iterator[None]:
    """Let a process write no file beyond its first bytes, as a full disk would."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_a_memory_that_hangs_delays_nobody_beyond_the_deadline(host: Host, namespace: dict[str, str]) -> None:
    """While the database hangs, requests are answered by the deadline without memory, which is named and counted."""
    if not wal_is_safe():
        pytest.skip("without a write-ahead log there is no shared memory to lock")
    host.teach(TASK, ANSWER, memory=namespace)
    usual = host_time(host)
    faults = host.get("stats", key=None)["faults"].get("deadline", 0)
    with unreadable(host.db):
        for memory in (namespace, {**namespace, "feedback": [success("chatcmpl-hangs")]}):
            answered, seconds = timed_chat(host, memory)
            message = answered["choices"][0]["message"]
            assert {name: message[name] for name in SERVED} == SERVED
            assert answered["agent_memory"]["action"] == "plain"
            assert reasons(answered) == ["deadline"]
            assert seconds < usual + DEADLINE_S + SLACK_S
        assert host.prompt == [{"role": "user", "content": TASK}]
    assert until(lambda: host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject", 30)
    assert host.get("stats", key=None)["faults"]["deadline"] >= faults + 2


def test_a_database_that_cannot_be_written_now(host: Host, namespace: dict[str, str]) -> None:
    """While another holds the write lock, requests are served with memory and feedback is refused, not acknowledged."""
    host.teach(TASK, ANSWER, memory=namespace)
    usual = host_time(host)
    with unwritable(host.db):
        answered, seconds = timed_chat(host, namespace)
        assert answered["agent_memory"]["action"] == "inject"
        assert seconds < usual + SLACK_S
        told = success(answered["id"])
        along, seconds = timed_chat(host, {**namespace, "feedback": [{**told, "feedback_id": "along"}]})
        assert seconds < usual + DEADLINE_S + SLACK_S
        assert along["agent_memory"]["feedback"] == []
        refused = host.route("POST", "feedback", json=told)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "server_error"
    host.tell(told)  # again with its id, as the refusal asks
    assert host.get(f"traces/{answered['id']}")["outcome"]["verdict"] == "success"
    assert host.route("GET", "ready").status_code == 200


def test_a_full_disk(host: Host, namespace: dict[str, str]) -> None:
    """On a full disk chat is served and feedback refused with 503; once there is room nothing acknowledged is lost."""
    trace_id = host.teach(TASK, ANSWER, memory=namespace)
    other = host.chat("Another task.", memory=namespace)["id"]
    host.settle()
    before = host.get("stats", key=None)
    pid = host.process.pid
    assert pid is not None
    with full_disk(pid):
        for _ in range(3):
            answered = host.chat(TASK, memory=namespace)
            assert answered["choices"][0]["message"]["role"] == "assistant"
        refused = host.route("POST", "feedback", json=success(other))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "memory_unavailable"
        assert host.route("GET", "ready").status_code == 503
    assert until(lambda: host.route("GET", "ready").status_code == 200)
    assert host.tell(success(other))["status"] == "applied"
    assert host.get(f"traces/{trace_id}")["outcome"]["verdict"] == "success"
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"
    host.settle()
    after = host.get("stats", key=None)
    missing = before["traces"] + 4 - after["traces"]
    assert 0 <= missing <= after["lost"] - before["lost"]  # what could not be written in time was counted
    assert not list(host.db.parent.glob("*.corrupt-*"))


def test_a_prompt_of_ten_megabytes(host: Host, namespace: dict[str, str]) -> None:
    """A 10 MB prompt reaches the upstream whole, without recall, and is stored shortened."""
    text = "begin " + "lorem ipsum " * 870_000 + " end"
    assert len(text) > 10_000_000
    answered = host.chat(text, memory=namespace)
    assert reasons(answered) == ["too_large"]
    assert host.prompt == [{"role": "user", "content": text}]
    host.settle()
    trace = host.get(f"traces/{answered['id']}")
    assert trace["task"].startswith("begin ")
    assert trace["task"].endswith(" end")
    assert "characters left out" in trace["task"]
    assert len(json.dumps(trace)) < 200_000


@pytest.mark.parametrize("text", ["a\\ud800b", "\\udfff", "a\\u0000b", "\\u0000", "\\ud83d\\ude00", "\\ufffe"])
def test_text_that_is_hard_to_carry(host: Host, namespace: dict[str, str], text: str) -> None:
    """Lone surrogates and NUL bytes in any place fare exactly as without memory, and what was served is recorded."""
    template = (
        '{"model": "%s", "messages": [{"role": "system", "content": "s %s"}, {"role": "user", "content": "u %s"}, '
        '{"role": "assistant", "content": null, "tool_calls": [{"id": "%s", "type": "function", "function": '
        '{"name": "%s", "arguments": "%s"}}]}, {"role": "tool", "tool_call_id": "%s", "content": "%s"}, '
        '{"role": "user", "content": "%s"}]%s}'
    )
    field = ', "agent_memory": ' + json.dumps(namespace)
    expected = host.without_memory(template % ("m", *[text] * 8, ""))
    found = host.post(template % (MODEL, *[text] * 8, field))
    assert found.status_code == expected.status_code == 200
    assert found.json()["choices"] == expected.json()["choices"]
    assert host.sent[0] == host.sent[1]
    host.settle()
    trace_id = found.headers["X-Agent-Memory-Trace-Id"]
    assert host.get(f"traces/{trace_id}")["trace_id"] == trace_id
    assert host.tell(success(trace_id))["status"] == "applied"
    assert host.chat(TASK, memory=namespace)["choices"][0]["message"]["content"] == SERVED["content"]


def test_hard_text_in_feedback(host: Host, namespace: dict[str, str]) -> None:
    """A demonstration and evidence with lone surrogates and NUL bytes are kept; what is not whole is not shown."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    content = (
        '{"trace_id": "%s", "metric": "demonstration", "value": "a\\ud800\\u0000b", "source": "code", '
        '"evidence": {"command": "\\udc00", "exit_code": 1, "output": "\\u0000"}}'
    )
    as_json = {"Content-Type": "application/json"}
    response = host.route("POST", "feedback", content=content % trace_id, headers=as_json)
    assert (response.status_code, response.json()["status"]) == (202, "applied")
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"namespaze": "x"}, "agent_memory.namespaze"),
        ({"mode": "on"}, "agent_memory.mode"),
        ({"namespace": 7}, "agent_memory.namespace"),
        ({"namespace": "\ud800"}, "agent_memory.namespace"),
        ({"max_items": -1}, "agent_memory.max_items"),
        ({"approach": "nonesuch"}, "agent_memory.approach"),
        ({"reuse": {"max_error": 2}}, "agent_memory.reuse"),
        ({"tags": {"a": 1}}, "agent_memory.tags.a"),
        ({"feedback": [{"metric": "success"}]}, "agent_memory.feedback[0].trace_id"),
        ([], "agent_memory"),
        ("off", "agent_memory"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_refused_by_name(host: Host, field: Any, param: str, *, stream: bool) -> None:
    """An unknown key or a wrong value in `agent_memory` is 400 with its name, and no upstream call is made."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "stream": stream, "agent_memory": field}
    response = host.post(body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert host.sent == []


def test_corrupt_while_running(host: Host, namespace: dict[str, str]) -> None:
    """A database that is overwritten under a running server is set aside; requests go on, and so does learning."""
    host.teach(TASK, ANSWER, memory=namespace)
    for suffix in ("", "-wal"):
        path = host.db.with_name(host.db.name + suffix)
        path.write_bytes(os.urandom(path.stat().st_size))

    def learns_again() -> bool:
        answered = host.chat(TASK, memory=namespace)
        assert answered["choices"][0]["message"]["role"] == "assistant"
        told = host.route("POST", "feedback", json=success(answered["id"]))
        assert told.status_code in (202, 503)
        return told.status_code == 202 and host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"

    assert until(learns_again, 30)
    (aside,) = [p for p in host.db.parent.glob("*.corrupt-*") if not p.name.endswith(("-wal", "-shm"))]
    assert aside.stat().st_size > 0
    assert "corrupt" in host.process.logs()
    assert host.get("stats", key=None)["traces"] > 0


def test_corrupt_at_start(upstream: RecordingUpstream, db: Path) -> None:
    """A file that is no database is renamed aside and reported, and a fresh one serves with its rights closed."""
    db.write_bytes(b"this is no database " * 1000)
    with served(upstream, db) as host:
        host.teach(TASK, ANSWER)
        assert host.chat(TASK)["agent_memory"]["action"] == "inject"
        (aside,) = db.parent.glob("memory.db.corrupt-*")
        assert aside.read_bytes() == b"this is no database " * 1000
        assert aside.name in host.process.logs()
        assert db.stat().st_mode & 0o777 == 0o600


def test_a_database_of_a_newer_release(upstream: RecordingUpstream, db: Path) -> None:
    """A newer schema is refused and left as it is; requests are served as plain and say why."""
    with contextlib.closing(sqlite3.connect(db)) as connection:
        Database(connection).table("_sqlite_migrations").insert_all(
            {"id": i, "migration_set": "optillm_memory", "name": name, "applied_at": "2030-01-01"}
            for i, name in enumerate(("m001_log_and_memories", "m999_from_the_future"))
        )
        connection.commit()
    before = db.read_bytes()
    with served(upstream, db) as host:
        answered = host.chat(TASK)
        assert answered["choices"][0]["message"]["content"] == SERVED["content"]
        assert (answered["agent_memory"]["action"], reasons(answered)) == ("plain", ["memory_unavailable"])
        refused = host.route("POST", "feedback", json=success(answered["id"]))
        assert refused.status_code == 503
        assert "m999_from_the_future" not in refused.text
        told = host.route("POST", "feedback", key=None, json=success(answered["id"]))
        assert "m999_from_the_future" in told.json()["error"]["message"]
        assert "newer optillm-memory" in host.process.logs()
    assert db.read_bytes() == before


ROUTES = [
    ("POST", "feedback"),
    ("GET", "traces"),
    ("GET", "traces/x"),
    ("GET", "traces/x/why"),
    ("GET", "uplift"),
    ("GET", "policy"),
    ("GET", "memories"),
    ("GET", "memories?query=x"),
    ("GET", "memories/x"),
    ("GET", "stats"),
    ("POST", "rebuild"),
    ("GET", "ready"),
    ("GET", "no-such-route"),
]


def test_no_place_for_a_database_and_the_hosts_key(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """Where no database can be made all is served without memory until there is room; the host's key covers it all."""
    (tmp_path / "file").write_text("in the way")
    with served(upstream, tmp_path / "file" / "memory.db", "--optillm-api-key", KEY, log=tmp_path / "host.log") as host:
        for key in ("", "wrong"):
            for method, path in ROUTES:
                assert host.route(method, path, key=key).status_code == 401, (method, path, key)
            assert host.post({"model": MODEL, "messages": []}, key=key).status_code == 401
        answered = host.chat(TASK)
        assert answered["choices"][0]["message"]["content"] == SERVED["content"]
        assert (answered["agent_memory"]["action"], len(reasons(answered))) == ("plain", 1)
        refused = host.route("POST", "feedback", json=success(answered["id"]))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "memory_unavailable")
        assert host.route("GET", "stats").status_code == 503
        assert str(tmp_path) not in host.route("GET", "stats").text
        (tmp_path / "file").unlink()
        assert until(lambda: host.route("GET", "ready").status_code == 200)
        host.teach(TASK, ANSWER)
        assert host.chat(TASK)["agent_memory"]["action"] == "inject"
        assert host.get("stats")["traces"] > 0
        assert host.http.get(f"{host.process.base_url}/agent_memory/stats").status_code == 401
        assert authorization(KEY)["Authorization"].endswith(KEY)


# Root may write anything: without CAP_DAC_OVERRIDE its own files' rights hold for it too.
WITHOUT_OVERRIDE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_read_only_database(upstream: RecordingUpstream, db: Path) -> None:
    """A database file that may not be written is left alone; requests are served and feedback is not acknowledged."""
    with Memory.open(db, encoder="none") as memory:
        turn = memory.begin({"model": "m", "messages": [{"role": "user", "content": "kept"}]})
        memory.finish(turn, {"choices": [{"message": {"role": "assistant", "content": "yes"}}]})
    db.chmod(0o400)
    before = db.read_bytes()
    process = HostProcess.serve(upstream.base_url, db=db, env={**QUIET, **LEAN})
    process.argv = [sys.executable, "-c", WITHOUT_OVERRIDE, *process.argv]
    with running(process, upstream, db) as host:
        answered = host.chat(TASK)
        assert answered["choices"][0]["message"]["content"] == SERVED["content"]
        assert answered["agent_memory"]["action"] == "plain"
        assert host.route("POST", "feedback", json=success(answered["id"])).status_code == 503
        assert host.route("GET", "ready").status_code == 503
        assert "Permission denied" in host.process.logs()
    assert db.read_bytes() == before
    assert db.stat().st_mode & 0o777 == 0o400
