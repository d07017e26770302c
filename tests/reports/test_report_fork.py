"""Behind gunicorn with `preload_app` every worker got the dead threads and the connection of its parent: feedback 503.

Public report: https://github.com/benoitc/gunicorn/issues/1666 (what a parent starts before it forks does not live on
in its workers).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosting import JSON, MODEL, QUIET, authorization, until

from optillm_memory.bench.process import HostProcess, child_environment
from optillm_memory.bench.upstream import RecordingUpstream
from optillm_memory.store.verify import verify

KEY = "alice"
WORKERS, THREADS = 2, 8
REQUESTS = 500
STOP_S = 15.0
PID = "X-Pid"
# The app as someone would serve it by gunicorn: what optillm's `main` does, but for `app.run`. No certificates are
# read for each request, which would take longer than all the rest of it.
WSGI = """\
import os, sys
import optillm.server as server
from optillm_memory.host.install import install
from pathlib import Path

server.server_config.update({
    "base_url": os.environ["TEST_UPSTREAM"], "host": "127.0.0.1", "approach": "auto", "model": "gpt-4o-mini", "n": 1,
    "optillm_api_key": "", "ssl_verify": False, "plugins_dir": os.environ["TEST_FOLDER"],
})
install(Path(os.environ["TEST_FOLDER"]))
server.load_plugins()
assert "agent_memory" in server.plugin_approaches
app = server.app

@app.after_request
def sign(response):
    response.headers["X-Pid"] = str(os.getpid())
    return response
"""
# What a parent may have done with memory before it forks; the encoder and the writer have threads and a connection.
OPENED = """
from optillm_memory.host.runtime import runtime
opened = runtime()
assert opened.memory is not None, opened.fault
assert opened.memory.encoder.wait(20) == "ready"
opened.memory.store.flush()
assert opened.fail_open.call(lambda: 1) == (1, "")
"""
# And with a request answered in it, with feedback, so that everything that is opened late is open.
USED = """
from optillm_memory.host.runtime import runtime
opened = runtime().memory
opened.encoder.wait(20)
turn = opened.begin({"model": "m", "messages": [{"role": "user", "content": "Who owns the parent?"}]}, tenant="parent")
opened.finish(turn, {"choices": [{"message": {"role": "assistant", "content": "The child."}}]})
opened.settle()
opened.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}, tenant="parent")
opened.recall("Who owns the parent?")
"""


@dataclass
class Served:
    """A gunicorn with its log and its database."""

    child: subprocess.Popen[bytes]
    port: int
    db: Path
    log: Path
    pids: set[str] = field(default_factory=set)

    @property
    def base_url(self) -> str:
        """Where an OpenAI client finds it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, *, alive: bool = False) -> httpx.Client:
        """Give a client; unless its connections live on, each request may be any worker's."""
        limits = httpx.Limits(max_keepalive_connections=1 if alive else 0)
        headers = authorization(KEY)
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=60, trust_env=False, limits=limits)

    def chat(self, client: httpx.Client, text: str, **memory: Any) -> httpx.Response:
        """Ask for one text; note which worker answered."""
        body: JSON = {"model": MODEL, "messages": [{"role": "user", "content": text}], "agent_memory": memory}
        response = client.post("/chat/completions", json=body)
        self.pids.add(response.headers.get(PID, ""))
        return response

    def praise(self, client: httpx.Client, trace_id: str) -> httpx.Response:
        """Say of a trace that code found it right."""
        said = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}
        return client.post("/agent_memory/feedback", json=said)

    def stats(self, client: httpx.Client) -> JSON:
        """Return the counts of the whole store."""
        response = client.get("/agent_memory/stats")
        assert response.status_code == 200, response.text
        found: JSON = response.json()
        return found

    def logs(self) -> str:
        """Return what gunicorn and its workers wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> float:
        """End it as a service manager does; return how long that took."""
        began = time.monotonic()
        self.child.send_signal(signal.SIGTERM)
        self.child.wait(STOP_S)
        return time.monotonic() - began


@contextlib.contextmanager
def gunicorn(folder: Path, upstream: RecordingUpstream, *arguments: str, also: str = "") -> Iterator[Served]:
    """Serve the app by gunicorn with two workers, `also` being the end of its module."""
    (folder / "serving.py").write_text(WSGI + also, encoding="utf-8")
    db, log, port = folder / "memory.db", folder / "gunicorn.log", HostProcess.free_port()
    given = {**QUIET, "TEST_UPSTREAM": upstream.base_url, "TEST_FOLDER": str(folder)}
    command = [
        *(sys.executable, "-m", "gunicorn", "serving:app", "--bind", f"127.0.0.1:{port}", "--chdir", str(folder)),
        *("--workers", str(WORKERS), "--worker-class", "gthread", "--threads", str(THREADS), "--timeout", "60"),
        *arguments,
    ]
    with log.open("ab") as sink:
        child = subprocess.Popen(
            command, env=child_environment(os.environ, db, given), stdout=sink, stderr=subprocess.STDOUT, cwd=folder
        )
    served = Served(child, port, db, log)
    try:
        assert until(lambda: child.poll() is not None or healthy(served), 90), served.logs()
        assert child.poll() is None, served.logs()
        yield served
    finally:
        if child.poll() is None:
            served.child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def healthy(served: Served) -> bool:
    """Whether both workers have answered."""
    with served.client() as client, contextlib.suppress(httpx.HTTPError):
        return len({client.get(served.base_url[:-2] + "health").headers[PID] for _ in range(20)}) == WORKERS
    return False


def everyone(work: Callable[[int], Any], count: int) -> list[Any]:
    """Do the work so many times, on eight threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(count)))


def assert_orderly(served: Served) -> None:
    """It ends within the time, with nothing raised anywhere, and the database is whole."""
    assert served.stop() < STOP_S
    assert served.child.returncode == 0
    log = served.logs()
    assert "Traceback" not in log, log[-5000:]
    assert "without memory" not in log, log[-5000:]
    assert not re.search(r"\[(ERROR|CRITICAL)\]|WORKER TIMEOUT|SIGKILL|SIGABRT|SIGSEGV", log), log[-5000:]
    assert failed(served.db) == []


def failed(db: Path) -> Sequence[str]:
    """Return what does not hold in the database."""
    return [f"{c.name}: {c.message}" for c in verify(db, deep=True) if c.level == "fail"]
