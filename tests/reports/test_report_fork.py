"""Behind gunicorn with `preload_app` every worker got the dead threads and the connection of its parent: feedback 503.

Public report: https://github.com/benoitc/gunicorn/issues/1666 (what a parent starts before it forks does not live on
in its workers).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sqlite3
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

from optillm_memory.store.maintenance.verify import verify
from optillm_memory.testing.host import HostProcess, child_environment
from optillm_memory.testing.upstream import RecordingUpstream

KEY = "alice"
WORKERS, THREADS = 2, 8
REQUESTS = 200
STOP_S = 30.0  # gunicorn's own limit; stock optillm alone takes 8 to 13 s of it to take torch down on two busy cores
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
# What a parent may have done with memory before it forks: a request is answered, with feedback, so that everything that
# is opened late is open. The encoder, the writer and the calls within a deadline have threads and connections.
USED = """
from optillm_memory.host.runtime import runtime
opened = runtime().memory
assert opened is not None, runtime().fault
assert runtime().fail_open.call(lambda: 1) == (1, "")
opened.encoder.wait(20)
turn = opened.begin({"model": "m", "messages": [{"role": "user", "content": "Who owns the parent?"}]}, tenant="parent")
opened.finish(turn, {"choices": [{"message": {"role": "assistant", "content": "The child."}}]})
opened.settle()
opened.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}, view="parent")
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
        """Return the counts of the whole store, as the operator sees them."""
        secret = self.db.with_name(f"{self.db.stem}.operator-key").read_text().strip()
        response = client.get("/agent_memory/stats", headers={"X-Agent-Memory-Operator": secret})
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
        assert until(lambda: child.poll() is not None or workers(served) != {""}, 90), served.logs()
        assert child.poll() is None, served.logs()
        yield served
    finally:
        if child.poll() is None:
            served.child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(STOP_S)


def workers(served: Served) -> set[str]:
    """Return the two workers that answer now; none where there are not two."""
    with served.client() as client, contextlib.suppress(httpx.HTTPError):
        found = {client.get(served.base_url[:-2] + "health").headers[PID] for _ in range(20)}
        return found if len(found) == WORKERS else {""}
    return {""}


def everyone(work: Callable[[int], Any], count: int) -> list[Any]:
    """Do the work so many times, on eight threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(count)))


def assert_orderly(served: Served) -> None:
    """End it in time, with nothing raised anywhere, and the database whole."""
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


def assert_learned_from_each_other(served: Served) -> None:
    """Teach through each worker what the other must soon inject as well."""
    taught: dict[str, str] = {}
    with served.client() as client:
        for number in range(100):
            if len(taught) == WORKERS:
                break
            task = f"Who carries the pager in week {number} of the harbour rota?"
            asked = served.chat(client, task, namespace="rota")
            if (pid := asked.headers[PID]) not in taught:
                assert served.praise(client, asked.json()["id"]).status_code == 202
                taught[pid] = task
        assert len(taught) == WORKERS
        for teacher, task in taught.items():
            saw: dict[str, JSON] = {}

            def injected(task: str = task, saw: dict[str, JSON] = saw) -> bool:
                found = client.get("/agent_memory/memories", params={"query": task, "namespace": "rota"}).json()
                ids = {memory["memory_id"] for memory in found["data"] if memory["task"] == task}
                again = served.chat(client, task, namespace="rota")
                saw[again.headers[PID]] = again.json()["agent_memory"]
                given = [{item["memory_id"] for item in metadata["injected"]} for metadata in saw.values()]
                return len(saw) == WORKERS and bool(ids) and all(ids <= injected for injected in given)

            assert until(injected), (teacher, saw)


def load(served: Served, requests: int) -> None:
    """Send requests, each followed by its feedback over whichever worker; none is refused and none is lost."""

    def one(number: int) -> tuple[int, int, str, bool]:
        with served.client() as client:
            asked = served.chat(client, f"What is in drawer {number}?", namespace="load")
            if asked.status_code != 200:
                return asked.status_code, 0, asked.text, False
            told = served.praise(client, asked.json()["id"])
            same = told.headers[PID] == asked.headers[PID]
            return 200, told.status_code, told.json().get("status", told.text), same

    done = everyone(one, requests)
    assert {(asked, told) for asked, told, _, _ in done} == {(200, 202)}, done
    # The other worker may have its feedback on disk before the one that answered has its trace there: then it waits.
    assert {status for _, _, status, same in done if same} == {"applied"}
    assert {status for _, _, status, _ in done} <= {"applied", "pending"}
    assert sum(status == "applied" for _, _, status, _ in done) > requests / 2
    assert len(served.pids) == WORKERS
    with served.client() as client:
        assert until(lambda: served.stats(client)["traces_by_outcome"].get("success", 0) >= requests)


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "requests"), [pytest.param(["--preload"], REQUESTS, id="preload"), pytest.param([], 80, id="none")]
)
def test_two_workers_lose_nothing(
    upstream: RecordingUpstream, tmp_path: Path, arguments: list[str], requests: int
) -> None:
    """Two workers answer, take feedback, learn from each other, and end in order, with the app preloaded or not."""
    upstream.reply = lambda request: f"It is told here: {request['messages'][-1]['content']}"
    with gunicorn(tmp_path, upstream, *arguments) as served:
        load(served, requests)
        with served.client() as client:
            found = served.stats(client)
            assert (found["traces"], found["feedback"]) == (requests, requests)
            assert found["memories_by_status"] == {"verified": requests}
            assert (found["lost"], found["fault"], found["faults"]) == (0, "", {})
        assert_learned_from_each_other(served)
        assert_orderly(served)


@pytest.mark.host
@pytest.mark.long
def test_a_parent_that_has_used_memory(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """Workers of a parent with an open memory have one of their own, and so has who takes the place of a killed one.

    A client that keeps its connection has all feedback applied at once; a chunked one is read behind gunicorn too.
    """
    upstream.reply = lambda request: f"It is told here: {request['messages'][-1]['content']}"

    def one(number: int) -> list[str]:
        statuses = []
        with served.client(alive=True) as client:
            for turn in range(5):
                asked = served.chat(client, f"What is on shelf {number}, board {turn}?", namespace="load")
                said = f'{{"trace_id": "{asked.json()["id"]}", "metric": "success", "value": true, "source": "code"}}'
                told = client.post("/agent_memory/feedback", content=iter([said[:9].encode(), said[9:].encode()]))
                assert told.status_code == 202, told.text
                if told.headers[PID] == asked.headers[PID]:
                    statuses.append(told.json()["status"])
        return statuses

    with gunicorn(tmp_path, upstream, "--preload", also=USED) as served:
        statuses = list(itertools.chain.from_iterable(everyone(one, 10)))
        assert set(statuses) == {"applied"}
        assert len(statuses) >= 25
        killed = min(served.pids)
        os.kill(int(killed), signal.SIGKILL)
        assert until(lambda: not workers(served) & {killed, ""}, 60)
        served.pids.clear()
        load(served, 50)
        assert killed not in served.pids
        with served.client() as client:
            found = served.stats(client)
            assert (found["traces"], found["feedback"]) == (101, 101)
            assert found["traces_by_outcome"] == {"success": 101}
        assert_learned_from_each_other(served)
        assert served.stop() < STOP_S
    assert "Traceback" not in served.logs()
    assert failed(served.db) == []


# -- the fork itself, without a server -----------------------------------------------------------------

# A process with memory open and at work, that forks; each child must have a memory that works, and leave the parent's
# alone. `BUSY` says with what the parent's threads are at work meanwhile.
FORKING = """\
import faulthandler, os, signal, sys, threading, time
from optillm_memory.host import runtime as module
from optillm_memory.host.runtime import runtime

BUSY, CHILDREN = sys.argv[1].split("+"), int(sys.argv[2])

def work(who, number):
    memory = runtime().memory
    asked = {"model": "m", "messages": [{"role": "user", "content": f"Task {number} of {who}"}]}
    answer = {"role": "assistant", "content": f"Answer {number} of {who}"}
    turn = memory.begin(asked)
    memory.finish(turn, {"choices": [{"message": answer, "finish_reason": "stop"}]})
    said = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
    return memory.feedback(said)[0].as_dict()["status"]

def child(number):
    signal.alarm(30)
    assert runtime().memory is not None, runtime().fault
    assert work(f"child {number}", 1) == "applied"
    if "grandchild" in BUSY and os.fork() == 0:
        signal.alarm(20)
        assert work(f"grandchild {number}", 1) == "applied"
        sys.exit(0)
    if "grandchild" in BUSY:
        assert os.wait()[1] == 0
        assert work(f"child {number}", 2) == "applied"

faulthandler.register(signal.SIGALRM, chain=True)  # who hangs shows where, and ends
parents = runtime().memory
assert parents.encoder.wait(20) == "ready"
parents.settle()
ended, wrote = threading.Event(), [0]

def opens():
    with module._lock:
        ended.wait(60)

def writes():
    while not ended.is_set():
        wrote[0] += work("parent", wrote[0]) == "applied"

def reads():
    while not ended.is_set():
        parents.store.stats()

def recalls():
    while not ended.is_set():
        wrote.append(parents.begin({"model": "m", "messages": [{"role": "user", "content": f"Task {len(wrote)}"}]}))

threads = [threading.Thread(target=globals()[name], daemon=True) for name in BUSY if name in globals()]
[thread.start() for thread in threads]
pids = []
for number in range(CHILDREN):
    time.sleep(0.05)
    if (pid := os.fork()) == 0:
        child(number)
        sys.exit(0)  # as a worker of gunicorn ends: with all that is to be done at the exit
    pids.append(pid)
statuses = [os.waitpid(pid, 0)[1] for pid in pids]
ended.set()
[thread.join(60) for thread in threads]
assert work("parent", -1) == "applied"
assert runtime().memory is parents
print("CHILDREN", statuses)
print("WROTE", wrote[0] + 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    "busy",
    [
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("nothing", "grandchild", "opens", "reads", "recalls")),
        "writes",
        pytest.param("writes+reads+grandchild", marks=pytest.mark.long),
    ],
)
def test_a_child_has_a_memory_of_its_own(db: Path, tmp_path: Path, busy: str) -> None:
    """Whatever the parent's threads do at the moment of the fork, a child's memory works, and the parent's goes on."""
    env = child_environment(os.environ, db, QUIET)
    command = [sys.executable, "-c", FORKING, busy, "4"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "CHILDREN [0, 0, 0, 0]" in done.stdout, done.stdout + done.stderr[-3000:]
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    wrote = int(done.stdout.split("WROTE ")[1])
    assert failed(db) == []
    with contextlib.closing(sqlite3.connect(db)) as rows:
        by_all = wrote + 4 * (3 if "grandchild" in busy else 1)
        assert rows.execute("SELECT count(*) FROM traces").fetchone()[0] == by_all
        assert rows.execute("SELECT count(*) FROM feedback").fetchone()[0] == by_all
        assert rows.execute("SELECT count(*) FROM memories WHERE status = 'verified'").fetchone()[0] == by_all
