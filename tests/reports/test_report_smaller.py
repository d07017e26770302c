"""Memory answered with a login page, refused chunked feedback, blamed tests for a gate, and fell over without a home.

Public reports: https://github.com/martymcenroe/AssemblyZero/issues/1938 (a coverage gate read as failed tests) and
https://github.com/NousResearch/hermes-agent/pull/49263 (no home directory).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from builders import assistant, body, lexical_memory, response
from hosting import JSON, KEY, LEAN, MODEL, QUIET, Host, authorization, on_lane
from test_pytest_plugin import FAILING, PASSING, line_of, run

from optillm_memory import Memory, Turn
from optillm_memory.testing.host import HostProcess, child_environment
from optillm_memory.testing.upstream import RecordingUpstream, Reply, tool_call

TASK = "Which valve feeds the north greenhouse?"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in to go on.</body></html>"
MEBIBYTE = 1_000_000
AS_JSON = {"Content-Type": "application/json"}
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]


# -- a page instead of a completion ------------------------------------------------------------------


@dataclass
class Wall:
    """An upstream that answers whatever is asked with one body, and lists the models it is given."""

    base_url: str = ""
    body: bytes = PAGE
    kind: str = "text/html; charset=utf-8"
    models: list[str] = field(default_factory=lambda: ["m"])
    asked: int = 0


@contextlib.contextmanager
def walled() -> Iterator[Wall]:
    """Run such an upstream."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            wall.asked += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(wall.kind, wall.body)

        def do_GET(self) -> None:
            data = [{"id": name, "object": "model", "created": 7, "owned_by": "someone"} for name in wall.models]
            self.answer("application/json", json.dumps({"object": "list", "data": data}).encode())

        def answer(self, kind: str, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    wall = Wall(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield wall
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Walled:
    """A host in front of such an upstream."""

    wall: Wall
    process: HostProcess
    http: httpx.Client

    def post(self, **fields: Any) -> httpx.Response:
        """Ask for the task."""
        asked = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], **fields}
        return self.http.post(f"{self.process.base_url}/chat/completions", json=asked, headers=authorization(KEY))

    def get(self, path: str) -> JSON:
        """Return what one of our routes answers."""
        answered = self.http.get(f"{self.process.base_url}/agent_memory/{path}", headers=authorization(KEY))
        assert answered.status_code == 200, answered.text
        found: JSON = answered.json()
        return found

    def models(self) -> list[JSON]:
        """Return the models that are listed."""
        answered = self.http.get(f"{self.process.base_url}/models", headers=authorization(KEY))
        assert answered.status_code == 200, answered.text
        listed = answered.json()
        assert listed["object"] == "list"
        found: list[JSON] = listed["data"]
        return found


@pytest.fixture(scope="module")
def module_walled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walled]:
    """Start a host in front of an upstream that answers with a page; on the direct lane a page stays a page."""
    db = tmp_path_factory.mktemp("wall") / "memory.db"
    with walled() as wall, httpx.Client(timeout=60, trust_env=False) as http:
        process = HostProcess.serve(wall.base_url, db=db, env={**QUIET, **LEAN, **on_lane("host")})
        with process:
            yield Walled(wall, process, http)


@pytest.fixture
def behind(module_walled: Walled) -> Walled:
    """Give the host, its upstream as it was at first."""
    fresh = Wall(module_walled.wall.base_url)
    vars(module_walled.wall).update(vars(fresh))
    return module_walled


WAYS: Mapping[str, JSON] = {
    "plain": {},
    "stream": {"stream": True},
    "two choices": {"n": 2},
    "tools": {"tools": TOOLS},
    "reuse": {"agent_memory": {"reuse": {"max_error": 0.05}}},
    "wrapped": {"agent_memory": {"approach": "re2"}},
    "before another": {"model": "agent_memory&re2-m"},
    "after another": {"model": "re2&agent_memory-m"},
    "off": {"agent_memory": {"mode": "off"}},
}


@pytest.mark.host
@pytest.mark.parametrize("way", WAYS)
def test_a_page_is_no_completion(behind: Walled, way: str) -> None:
    """A login page that comes with status 200 is an error for the client, in every way to ask, and teaches nothing."""
    before = behind.get("stats")["memories"]
    answered = behind.post(**WAYS[way])
    assert answered.status_code >= 400, answered.text
    assert behind.wall.asked >= 1
    assert "error" in answered.json()
    assert "choices" not in answered.json()
    trace_id = answered.headers.get("X-Agent-Memory-Trace-Id", "chatcmpl-" + "0" * 32)  # none where re2 came first
    said = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}
    url = f"{behind.process.base_url}/agent_memory/feedback"
    assert behind.http.post(url, json=said, headers=authorization(KEY)).status_code == 202
    if way not in ("off", "after another"):
        trace = behind.get(f"traces/{trace_id}")
        assert trace["error"]
        assert not trace["answer"]
    assert behind.get("stats")["memories"] == before
    assert "Sign in" not in json.dumps(behind.get("memories"))


@pytest.mark.host
def test_the_real_client_is_told_of_a_page(behind: Walled) -> None:
    """The openai package raises for a page, streamed or not, as for any error of a server."""
    with openai.OpenAI(base_url=behind.process.base_url, api_key=KEY, max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="no completion"):
                client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": TASK}], stream=stream)


@pytest.mark.host
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("text/html", b""),
        ("text/html", b"User: hello\nAssistant: <html>a page that speaks in tags</html>"),
        ("text/plain", b"upstream connect error or disconnect/reset before headers"),
        ("application/xhtml+xml", PAGE),
        ("application/json", PAGE),
        ("application/json", b'"Please sign in"'),
        ("application/json", b"[]"),
        ("application/json", b"null"),
    ],
)
def test_other_bodies_that_are_no_completion(behind: Walled, kind: str, data: bytes) -> None:
    """Whatever else comes with status 200 and is no completion is an error too, never an answer."""
    behind.wall.kind, behind.wall.body = kind, data
    answered = behind.post()
    assert answered.status_code >= 400, answered.text
    assert "choices" not in answered.json()
    assert behind.get("traces?limit=1")["data"][0]["answer"] in (None, "")


# -- the list of models ------------------------------------------------------------------------------


@pytest.mark.host
def test_each_model_is_listed_with_memory_once(behind: Walled) -> None:
    """Beside each model stands `agent_memory-<model>`, once, however often it is asked, and it can be asked for."""
    behind.wall.models = ["m", "gpt-4o-mini", "org/model:7b", "agent_memory-m", "agent_memory-other", "m-agent_memory"]
    for _ in range(3):
        ids = [model["id"] for model in behind.models()]
        assert ids[:6] == behind.wall.models
        assert len(ids) == len(set(ids))
        plain = [name for name in behind.wall.models if not name.startswith("agent_memory-")]
        assert set(ids) == {*behind.wall.models, *(f"agent_memory-{name}" for name in plain)}
    assert all(model["object"] == "model" and model["created"] == 7 for model in behind.models())
    with openai.OpenAI(base_url=behind.process.base_url, api_key=KEY, max_retries=0) as client:
        assert "agent_memory-org/model:7b" in [model.id for model in client.models.list()]


@pytest.mark.host
def test_a_list_without_models_stays_empty(behind: Walled) -> None:
    """Where the upstream lists nothing, nothing is listed."""
    behind.wall.models = []
    assert behind.models() == []


@pytest.mark.host
def test_a_listed_model_can_be_asked(host: Host, namespace: dict[str, str]) -> None:
    """A model as it is listed goes upstream under its own name."""
    listed = host.http.get(f"{host.process.base_url}/models", headers=authorization(KEY)).json()["data"]
    with_memory = [model["id"] for model in listed if model["id"].startswith("agent_memory-")]
    assert len(with_memory) == len(listed) / 2
    host.chat(TASK, model=with_memory[0], memory=namespace)
    assert f"agent_memory-{host.sent[-1]['model']}" == with_memory[0]


# -- chunked bodies ----------------------------------------------------------------------------------


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Give the data piece by piece, which makes httpx send it chunked."""
    yield from (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.host
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_chunked_feedback_is_taken(host: Host, namespace: dict[str, str], size: int) -> None:
    """Feedback whose length is not told beforehand is applied, in pieces of any size, one or several at once."""
    ids = [host.chat(f"{TASK} {number}", memory=namespace)["id"] for number in range(2)]
    said = [{"trace_id": i, "metric": "success", "value": True, "source": "code"} for i in ids]
    for payload in (said[0], [said[1]]):
        told = host.route(
            "POST",
            "feedback",
            content=in_pieces(json.dumps(payload).encode(), size),
            headers=AS_JSON,
        )
        assert "Content-Length" not in told.request.headers
        assert told.status_code == 202, told.text
        receipts = told.json() if isinstance(payload, list) else [told.json()]
        assert [receipt["status"] for receipt in receipts] == ["applied"]


@pytest.mark.host
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_large_feedback_is_refused_with_413(host: Host, namespace: dict[str, str], chunked: bool) -> None:
    """A body over 1,000,000 bytes is 413 and changes nothing, one of exactly as many is 202; whole or in chunks."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    said = {"trace_id": trace_id, "metric": "comment", "value": "", "source": "human"}
    room = MEBIBYTE - len(json.dumps(said))
    for length, status in ((room + 1, 413), (3 * MEBIBYTE, 413), (room, 202)):
        data = json.dumps({**said, "value": "x" * length}).encode()
        told = host.route("POST", "feedback", content=in_pieces(data, 65_536) if chunked else data, headers=AS_JSON)
        assert told.status_code == status, (length, told.text)
        host.settle()
        assert len(host.get(f"traces/{trace_id}")["feedback"]) == (status == 202)
    assert told.json()["status"] == "applied"


@pytest.mark.host
def test_padded_feedback_is_refused_with_413(host: Host, namespace: dict[str, str]) -> None:
    """A chunked body is not cut off unseen: with white space behind it beyond the limit it is too large as well."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    said = json.dumps({"trace_id": trace_id, "metric": "comment", "value": "thanks", "source": "human"})
    pieces = in_pieces(said.encode() + b" " * 3 * MEBIBYTE, 65_536)
    told = host.route("POST", "feedback", content=pieces, headers=AS_JSON)
    assert told.status_code == 413, told.text


@pytest.mark.host
@pytest.mark.parametrize("data", [b"", b"{", b"null", b"\xff\xfe"])
def test_chunked_nonsense_is_refused_with_400(host: Host, data: bytes) -> None:
    """A chunked body that is no JSON is the client's fault, as a whole one is."""
    told = host.route("POST", "feedback", content=in_pieces(data, 3), headers=AS_JSON)
    assert told.status_code == 400, told.text
    assert "feedback" in told.json()["error"]["message"]


@pytest.mark.host
def test_a_chunked_request_is_answered(host: Host, namespace: dict[str, str]) -> None:
    """A chat request that comes in chunks is answered with memory as any other."""
    host.teach(TASK, "The blue one.", memory=namespace)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "agent_memory": namespace}
    url = f"{host.process.base_url}/chat/completions"
    headers = {"Content-Type": "application/json", **authorization(KEY)}
    answered = host.http.post(url, content=in_pieces(json.dumps(asked).encode(), 9), headers=headers)
    assert answered.status_code == 200, answered.text
    assert answered.json()["agent_memory"]["action"] == "inject"


# -- gates beside the tests ----------------------------------------------------------------------------

GATED = "def uncovered():\n    return 1\n\n\n"
OWN_GATE = "def pytest_sessionfinish(session):\n    session.exitstatus = 1\n"
COVERAGE = ["--cov=.", "--cov-fail-under=100"]


@pytest.mark.host
@pytest.mark.parametrize(
    ("source", "arguments", "conftest", "success"),
    [
        pytest.param(GATED + PASSING, COVERAGE, "", True, id="coverage"),
        pytest.param(GATED + PASSING, [*COVERAGE, "-n", "2"], "", True, id="coverage with xdist"),
        pytest.param(PASSING, [], OWN_GATE, True, id="a gate of the project's own"),
        pytest.param(GATED + PASSING + FAILING, COVERAGE, "", False, id="coverage and a failure"),
        pytest.param(GATED + PASSING + "def test_it(no_such): pass\n", COVERAGE, "", False, id="coverage and an error"),
    ],
)
def test_a_gate_is_no_failed_test(
    host: Host,
    namespace: dict[str, str],
    tmp_path: Path,
    source: str,
    arguments: list[str],
    conftest: str,
    success: bool,
) -> None:
    """With all tests passed a session that a gate fails is a success, and its exit code stands in the evidence."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    given = {"URL": host.process.base_url, "KEY": KEY, "NAMESPACE": namespace["namespace"], "TRACE": trace_id}
    done = run(tmp_path, source, *arguments, conftest=conftest, load="all", **given)
    assert done.returncode == 1, done.stdout + done.stderr
    word = "success" if success else "failure"
    assert line_of(done) == f"agent memory: {word} reported on {trace_id}: applied"
    trace = host.get(f"traces/{trace_id}")
    assert trace["outcome"] == {"verdict": word, "verified": True}
    (told,) = trace["feedback"]
    assert told["value"] is success
    assert told["evidence"]["exit_code"] == 1
    assert "1 passed" in told["evidence"]["output"]


@pytest.mark.host
@pytest.mark.parametrize("source", ["import pytest\n@pytest.mark.skip\ndef test_a(): pass\n", "x = 1\n"])
def test_a_gate_without_a_test_says_nothing(host: Host, namespace: dict[str, str], tmp_path: Path, source: str) -> None:
    """Where no test ran, a failed gate is neither success nor failure."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    given = {"URL": host.process.base_url, "KEY": KEY, "NAMESPACE": namespace["namespace"], "TRACE": trace_id}
    done = run(tmp_path, GATED + source, *COVERAGE, load="all", **given)
    assert done.returncode != 0
    assert "nothing reported" in line_of(done)
    host.settle()
    assert host.get(f"traces/{trace_id}")["feedback"] == []


# -- no home directory ---------------------------------------------------------------------------------

# The real user id becomes one that nobody knows, where that may be done; else nobody is known. Root stays the
# effective one, so that the interpreter can be read.
HOMELESS = """\
import os, pwd, sys
os.environ.pop("HOME", None)
if os.geteuid() == 0:
    os.setreuid(54321, 0)
else:
    def unknown(*_):
        raise KeyError
    pwd.getpwuid = unknown
assert os.path.expanduser("~") == "~"
"""
# optillm's own command asks for the home directory and ends; who serves the app in another way gets so far.
SERVING = """
from pathlib import Path
import optillm.server as server
from optillm_memory.host.install import install
folder, upstream, port = sys.argv[1:]
server.server_config.update({
    "base_url": upstream, "host": "127.0.0.1", "approach": "auto", "model": "m", "n": 1, "optillm_api_key": "",
    "plugins_dir": folder,
})
install(Path(folder))
server.load_plugins()
assert "agent_memory" in server.plugin_approaches
server.app.run(host="127.0.0.1", port=int(port))
"""
IMPORTING = """
import optillm_memory, optillm_memory.memory, optillm_memory.adapters.pytest_plugin, optillm_memory.cli
from optillm_memory.host.runtime import runtime
from optillm_memory.settings import Settings
Settings.from_env()
print("MEMORY", runtime().memory is not None, runtime().fault)
"""
DB = "OPTILLM_AGENT_MEMORY_DB"


def environment(folder: Path, db: str | None) -> dict[str, str]:
    """Return the environment of a process without a home; None leaves the database where it is by default."""
    env = child_environment(os.environ, folder / "unused.db", QUIET)
    env.pop("HOME", None)
    env.pop(DB)
    return env if db is None else {**env, DB: db}


@pytest.mark.parametrize("db", [None, "~/memory.db", "~nobody_of_that_name/memory.db"])
def test_without_a_home_memory_is_off_and_says_why(tmp_path: Path, db: str | None) -> None:
    """With HOME unset and an unknown user, all can be imported, and the fault names the setting that mends it."""
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS + IMPORTING],
        env=environment(tmp_path, db), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MEMORY False" in done.stdout
    assert DB in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # no folder that is called ~


def test_without_a_home_a_full_path_is_enough(tmp_path: Path) -> None:
    """With HOME unset and an unknown user, memory is on where the setting gives a full path."""
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS + IMPORTING],
        env=environment(tmp_path, str(tmp_path / "memory.db")), cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MEMORY True" in done.stdout
    assert (tmp_path / "memory.db").stat().st_size > 0


@pytest.mark.host
def test_without_a_home_the_host_serves(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """With HOME unset and an unknown user, requests are answered without memory, and the routes name the setting."""
    upstream.reply = lambda _request: "Blue."
    port = HostProcess.free_port()
    process = HostProcess(
        [sys.executable, "-c", HOMELESS + SERVING, str(tmp_path), upstream.base_url, str(port)],
        environment(tmp_path, None), tmp_path, port, tmp_path / "log",
    )  # fmt: skip
    with process, httpx.Client(timeout=60, trust_env=False, headers=authorization(KEY)) as http:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "user": "ann"}
        for fields in ({}, {"stream": True}, {"agent_memory": {"reuse": {"max_error": 0.05}}}):
            answered = http.post(f"{process.base_url}/chat/completions", json={**asked, **fields})
            assert answered.status_code == 200, answered.text
            assert "Blue." in answered.text
        refused = http.get(f"{process.base_url}/agent_memory/stats")
        assert refused.status_code == 503
        assert DB not in refused.text  # it is for the log: a caller needs no paths
        assert http.get(f"{process.base_url}/models").status_code == 200
    assert DB in process.logs()


# -- "All done." ---------------------------------------------------------------------------------------

JOB = "Rotate the signing keys of the release bot."
DONE = "All done."
CALLED = {"role": "assistant", "content": None, "tool_calls": [tool_call("run", {"command": "rotate"})]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rotated 3 keys"}
AGENT: Mapping[str, tuple[list[JSON], JSON]] = {
    "tools": ([CALLED, RESULT], {"tools": TOOLS}),
    "tools, none offered at the end": ([CALLED, RESULT], {}),
    "functions": (
        [
            {"role": "assistant", "content": None, "function_call": {"name": "run", "arguments": "{}"}},
            {"role": "function", "name": "run", "content": "rotated 3 keys"},
        ],
        {"functions": [{"name": "run", "parameters": {"type": "object", "properties": {}}}]},
    ),
    "in words": (
        [assistant("```bash\nrotate\n```"), {"role": "user", "content": "Observation:\nrotated 3 keys\nExit code: 0"}],
        {},
    ),
    "tools that were not called": ([], {"tools": TOOLS}),
    "a chat": ([assistant("Which keys?"), {"role": "user", "content": "All of them."}], {}),
}


def episode(memory: Memory, way: str, episode_id: str) -> Turn:
    """Take an agent through its episode, to its closing words."""
    steps, fields = AGENT[way]
    asked: list[JSON] = [{"role": "user", "content": JOB}]
    said = {**fields, "agent_memory": {"episode_id": episode_id}}
    for answer, result in zip(steps[::2], steps[1::2], strict=True):
        turn = memory.begin(body(*asked, **said))
        memory.finish(turn, response(answer))
        asked += [answer, result]
    turn = memory.begin(body(*asked, **said))
    memory.finish(turn, response(DONE))
    memory.store.flush()
    return turn


def of_episode(episode_id: str, **fields: Any) -> JSON:
    """Return verified feedback on an episode."""
    return {"episode_id": episode_id, "metric": "success", "value": True, "source": "code", **fields}


def exemplars(memory: Memory) -> list[tuple[str, str, str]]:
    """Return task, answer and status of what may be injected."""
    known = [m for m in memory.store.list_memories(None, limit=100) if m.kind == "exemplar" and m.status != "withdrawn"]
    return [(m.task, m.answer, m.status) for m in known]


@pytest.mark.parametrize("way", AGENT)
def test_closing_words_of_an_agent_are_no_answer(tmp_path: Path, way: str) -> None:
    """What an agent says at the end of an episode that did well is no exemplar, before a rebuild and after it."""
    with lexical_memory(tmp_path) as memory:
        turn = episode(memory, way, "ep-1")
        assert memory.feedback(of_episode("ep-1"))[0].status == "applied"
        assert memory.trace(turn.trace_id)["outcome"] == {"verdict": "success", "verified": True}
        assert exemplars(memory) == []
        again = memory.begin(body(JOB, tools=TOOLS))
        assert (again.action, again.injected) == ("plain", ())
        memory.rebuild()
        assert exemplars(memory) == []


@pytest.mark.parametrize("way", AGENT)
def test_feedback_on_the_trace_itself_makes_an_exemplar(tmp_path: Path, way: str) -> None:
    """The same words are an exemplar where the very trace was said to be right, whatever came of its episode first."""
    with lexical_memory(tmp_path) as memory:
        turn = episode(memory, way, "ep-1")
        memory.feedback(of_episode("ep-1"))
        said = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
        assert memory.feedback(said)[0].status == "applied"
        task = "All of them." if way == "a chat" else JOB
        assert exemplars(memory) == [(task, DONE, "verified")]
        memory.rebuild()
        assert exemplars(memory) == [(task, DONE, "verified")]


def test_a_one_shot_request_of_a_good_episode_is_an_exemplar(tmp_path: Path) -> None:
    """The same words in answer to a single request without tools are an exemplar, and are injected."""
    with lexical_memory(tmp_path) as memory:
        request = body({"role": "system", "content": "Be brief."}, JOB, agent_memory={"episode_id": "ep-1"})
        memory.finish(memory.begin(request), response(DONE))
        memory.store.flush()
        memory.feedback(of_episode("ep-1"))
        assert exemplars(memory) == [(JOB, DONE, "verified")]
        again = memory.begin(body({"role": "system", "content": "Be brief."}, JOB))
        assert again.action == "inject"


def test_a_verified_failure_of_an_episode_blames_no_words(tmp_path: Path) -> None:
    """An episode that failed says nothing of its closing words, which another trace has as its right answer."""
    with lexical_memory(tmp_path) as memory:
        memory.finish(memory.begin(body(JOB)), response(DONE))
        memory.store.flush()
        first = memory.store.traces(None, limit=1)[0]["trace_id"]
        memory.feedback({"trace_id": first, "metric": "success", "value": True, "source": "code"})
        assert exemplars(memory) == [(JOB, DONE, "verified")]
        episode(memory, "tools, none offered at the end", "ep-2")
        memory.feedback(of_episode("ep-2", value=False))
        assert exemplars(memory) == [(JOB, DONE, "verified")]


def test_a_demonstration_for_an_episode_is_not_the_agents_answer(tmp_path: Path) -> None:
    """A demonstration given for a whole episode of an agent makes no exemplar, one given for a trace does."""
    with lexical_memory(tmp_path) as memory:
        turn = episode(memory, "tools", "ep-1")
        memory.feedback(of_episode("ep-1", metric="demonstration", value="Keys rotated: a, b, c.", source="human"))
        assert exemplars(memory) == []
        said = {"trace_id": turn.trace_id, "metric": "demonstration", "value": "Keys: a, b, c.", "source": "human"}
        memory.feedback(said)
        assert (JOB, "Keys: a, b, c.", "verified") in exemplars(memory)


@pytest.mark.host
def test_closing_words_are_injected_nowhere(host: Host, namespace: dict[str, str]) -> None:
    """After a good episode of an agent no other request is given its "All done.", by the real host."""
    memory = {**namespace, "episode_id": "ep-1"}
    asked: list[JSON] = [{"role": "user", "content": JOB}]
    host.upstream.reply = lambda _request: Reply(content=None, tool_calls=[tool_call("run", {"command": "rotate"})])
    host.chat(asked, memory=memory, tools=TOOLS)
    host.upstream.reply = lambda _request: DONE
    closing = host.chat([*asked, CALLED, RESULT], memory=memory, tools=TOOLS)
    said = of_episode("ep-1")
    told = host.route("POST", "feedback", json=said, headers={"X-Agent-Memory-Namespace": namespace["namespace"]})
    assert told.json()["status"] == "applied"
    assert host.get(f"traces/{closing['id']}")["outcome"] == {"verdict": "success", "verified": True}
    host.upstream.clear()
    for fields in ({"tools": TOOLS}, {}, {"model": "agent_memory&re2-m"}):
        answered = host.chat(JOB, memory=namespace, **fields)
        assert {item["kind"] for item in answered["agent_memory"]["injected"]} <= {"procedure"}
    assert DONE not in json.dumps(host.sent)
    # The same answer to a one-shot request is one.
    host.teach(JOB, DONE, memory={**namespace, "user_id": "ann"})
    assert host.chat(JOB, memory={**namespace, "user_id": "ann"})["agent_memory"]["action"] == "inject"
