"""Load: many clients at once through a real optillm; nothing fails and nothing is lost."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hosting import MODEL, Host, authorization, served

from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = pytest.mark.host

CLIENTS = 32


@pytest.mark.parametrize("requests", [500, pytest.param(2_000, marks=pytest.mark.long)])
def test_thirty_two_clients(upstream: RecordingUpstream, tmp_path: Path, requests: int) -> None:
    """Requests of 32 clients with feedback for each: no error, and every trace and feedback is in the store."""
    with served(upstream, tmp_path / "memory.db") as host:
        ask(host, requests)


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
    stats = host.get("stats")
    assert (stats["traces"], stats["feedback"], stats["lost"], stats["fault"]) == (requests, requests, 0, "")
    assert stats["traces_by_outcome"] == {"success": requests * 9 // 10, "failure": requests // 10}
    assert sum(stats["traces_by_action"].values()) == len(host.upstream.requests) == requests
    assert stats["traces_by_action"]["inject"] > 0
    with contextlib.closing(sqlite3.connect(host.db)) as connection:
        told = set(connection.execute("SELECT trace_id, feedback_id FROM feedback JOIN traces USING (trace_id)"))
    assert told == {(trace_id, feedback_id) for trace_id, feedback_id, _ in done}
    assert set(stats["faults"]) <= {"deadline"}  # 32 clients on 2 cores: late recall is left out, as it should be
