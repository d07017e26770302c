"""Load: many clients at once through a real optillm; nothing fails and nothing is lost."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hosting import JSON, MODEL, Host, authorization, served

from optillm_memory.testing.upstream import RecordingUpstream, Reply

pytestmark = pytest.mark.host

CLIENTS = 32


@pytest.mark.parametrize("requests", [500, pytest.param(2_000, marks=pytest.mark.long)])
def test_thirty_two_clients(upstream: RecordingUpstream, tmp_path: Path, requests: int) -> None:
    """Requests of 32 clients with feedback for each: no error, and every trace and feedback is in the store."""
    with served(upstream, tmp_path / "memory.db") as host:
        ask(host, requests)


@pytest.mark.long
def test_many_clients_of_a_slow_upstream(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """128 clients for three minutes, half of them streaming: no error, no trace lost, no growth."""
    upstream.reply = lambda request: (
        Reply("word " * 20, chunk_delay_s=0.1) if request.get("stream") else Reply("an answer", delay_s=2.0)
    )
    sizes: list[int] = []
    with served(upstream, tmp_path / "memory.db") as host:
        for seconds in (60.0, 120.0):
            asked = sum(of_many(host, 128, seconds))
            host.settle()
            sizes.append(resident(host))
            upstream.clear()
        stats = host.get("stats", key=None)
    assert asked > 0
    assert (stats["lost"], stats["fault"]) == (0, "")
    assert stats["traces"] == sum(stats["traces_by_action"].values()) > asked
    assert sizes[1] <= 1.1 * sizes[0]


def of_many(host: Host, clients: int, seconds: float) -> list[int]:
    """Let so many clients ask one request after another; return how many each of them had answered, whole."""
    until = time.monotonic() + seconds

    def one(number: int) -> int:
        done = 0
        body: JSON = {"model": MODEL, "stream": bool(number % 2)}
        with httpx.Client(timeout=120, trust_env=False, headers=authorization(f"tenant-{number % 4}")) as http:
            while time.monotonic() < until:
                body["messages"] = [{"role": "user", "content": f"task {number % 125} of day {done}"}]
                answered = http.post(f"{host.process.base_url}/chat/completions", json=body)
                assert answered.status_code == 200, answered.text
                assert "[DONE]" in answered.text or not body["stream"]
                done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, range(clients)))


def resident(host: Host) -> int:
    """Return the host's memory in kB."""
    status = Path(f"/proc/{host.process.pid}/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmRSS:")[2].split()[0])


def ask(host: Host, requests: int) -> None:
    """Send so many requests, and look for what became of them."""
    host.upstream.reply = lambda request: f"answer to {request['messages'][-1]['content'].split()[1]}"
    local = threading.local()
    clients: list[httpx.Client] = []

    def one(number: int) -> tuple[str, str, str]:
        http: httpx.Client | None = getattr(local, "http", None)
        if http is None:
            headers = authorization(f"tenant-{number % 4}")
            http = local.http = httpx.Client(timeout=120, trust_env=False, headers=headers)
            clients.append(http)
        body = {"model": MODEL, "messages": [{"role": "user", "content": f"task {number % 125} of the day"}]}
        answered = http.post(f"{host.process.base_url}/chat/completions", json=body)
        assert answered.status_code == 200, answered.text
        completion = answered.json()
        assert completion["choices"][0]["message"]["content"] == f"answer to {number % 125}"
        item = {"trace_id": completion["id"], "metric": "success", "value": number % 10 > 0, "source": "code"}
        told = http.post(f"{host.process.base_url}/agent_memory/feedback", json=item)
        assert told.status_code == 202, told.text
        receipt = told.json()
        return completion["id"], receipt["feedback_id"], receipt["status"]

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = list(pool.map(one, range(requests)))
    finally:
        for client in clients:
            client.close()
    assert len({trace_id for trace_id, _, _ in done}) == len({feedback_id for _, feedback_id, _ in done}) == requests
    assert Counter(status for _, _, status in done) == {"applied": requests}
    host.settle()
    stats = host.get("stats", key=None)
    assert (stats["traces"], stats["feedback"], stats["lost"], stats["fault"]) == (requests, requests, 0, "")
    assert stats["traces_by_outcome"] == {"success": requests * 9 // 10, "failure": requests // 10}
    assert sum(stats["traces_by_action"].values()) == len(host.upstream.requests) == requests
    assert stats["traces_by_action"]["inject"] > 0
    with contextlib.closing(sqlite3.connect(host.db)) as connection:
        told = set(connection.execute("SELECT trace_id, feedback_id FROM feedback JOIN traces USING (trace_id)"))
    assert told == {(trace_id, feedback_id) for trace_id, feedback_id, _ in done}
    assert set(stats["faults"]) <= {"deadline"}  # 32 clients on 2 cores: late recall is left out, as it should be
