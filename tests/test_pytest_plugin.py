"""Pytest as a reporter: what is sent, what is never claimed, and that no fault reaches the user's tests."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hosting import KEY, Host

from optillm_memory.adapters import pytest_plugin, pytest_report
from optillm_memory.settings import CLIENT_VARIABLES, ENV_PREFIX

TRACE = "chatcmpl-" + "0" * 32
PASSING = "def test_good(): pass\n"
FAILING = "def test_bad(): assert 1 == 2, 'they differ'\n"
RECEIPT = json.dumps({"feedback_id": "f", "status": "applied"}).encode()
Handle = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Receiver:
    """A server that records what it is sent and answers as told."""

    url: str
    posts: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    handle: Handle = lambda request: answer(request, 202, RECEIPT)

    @property
    def only(self) -> dict[str, Any]:
        """The one feedback that came."""
        (post,) = self.posts
        return post

    @property
    def output(self) -> str:
        """The output in the evidence of the one feedback that came."""
        return str(self.only["evidence"]["output"])


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """Answer a request."""
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Run a server that answers with a receipt until told otherwise."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.paths.append(self.path)
            received.headers.append(dict(self.headers))
            received.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            received.handle(self)

        def do_GET(self) -> None:  # a redirect that was followed
            received.paths.append(self.path)
            answer(self, 202, RECEIPT)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Receiver(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield received
    server.shutdown()
    server.server_close()


def run(
    where: Path,
    source: str,
    *arguments: str,
    conftest: str = "",
    load: str = "agent_memory",
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run pytest on a file with this source; a keyword is the variable OPTILLM_AGENT_MEMORY_<keyword>.

    Of the installed plugins one is loaded, by its entry point, which saves each run a second; or `all`, or none.
    """
    (where / "test_it.py").write_text(source, encoding="utf-8")
    (where / "conftest.py").write_text(conftest, encoding="utf-8")
    plugins = [load, "xdist" if "-n" in arguments else ""] if load != "all" else []
    addopts = " ".join(f"-p {name}" for name in plugins if name)
    (where / "pytest.ini").write_text(f"[pytest]\naddopts = {addopts}\n", encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPTILLM_", "PYTEST_", "NO_PROXY", "no_proxy"))}
    env["http_proxy"] = "http://127.0.0.1:1"  # a proxy that must not be asked for what is on this machine
    if load != "all":
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    env |= {ENV_PREFIX + name: value for name, value in variables.items()}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(
        command, cwd=where, env=env, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what the plugin said in the summary."""
    return [line for line in done.stdout.splitlines() if line.startswith("agent memory: ")]


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that the plugin said in the summary."""
    (line,) = lines_of(done)
    return line


# -- what is sent --------------------------------------------------------------------------------------


def test_success_by_the_command_line(receiver: Receiver, tmp_path: Path) -> None:
    """Given by options, a passing session is one `code` success with its command, exit status and counts."""
    given = ["--agent-memory-url", f"{receiver.url}/v1/", f"--agent-memory-trace={TRACE}"]
    done = run(
        tmp_path, PASSING, *given, "--agent-memory-namespace", "ns", "-k", "good or bad", "test_it.py", load="all"
    )
    assert done.returncode == 0
    assert line_of(done) == f"agent memory: success reported on {TRACE}: applied"
    sent = dict(receiver.only)
    assert sent.pop("feedback_id").startswith("pytest-")
    command = "pytest -k 'good or bad' test_it.py"
    assert sent == {
        "trace_id": TRACE,
        "metric": "success",
        "value": True,
        "source": "code",
        "evidence": {"command": command, "exit_code": 0, "output": "1 passed, exit status 0"},
    }
    assert receiver.paths == ["/v1/agent_memory/feedback"]
    assert receiver.headers[0]["X-Agent-Memory-Namespace"] == "ns"
    assert "Authorization" not in receiver.headers[0]


def test_success_by_the_environment(receiver: Receiver, tmp_path: Path) -> None:
    """Given by variables, the report goes out with the key as its bearer, on the episode, into the namespace."""
    given = {"URL": receiver.url, "EPISODE": "ep-1", "NAMESPACE": "ns", "KEY": "secret-key\n"}
    done = run(tmp_path, PASSING, "-q", **given)
    assert line_of(done) == "agent memory: success reported on ep-1: applied"
    assert receiver.only["episode_id"] == "ep-1"
    assert "trace_id" not in receiver.only
    assert receiver.headers[0]["Authorization"] == "Bearer secret-key"
    assert receiver.headers[0]["X-Agent-Memory-Namespace"] == "ns"


def test_the_command_line_outranks_the_environment(receiver: Receiver, tmp_path: Path) -> None:
    """An episode on the command line is reported on, whatever trace the environment holds; each session has its id."""
    given = {"URL": receiver.url, "TRACE": TRACE}
    run(tmp_path, PASSING, "--agent-memory-episode=ep-2", **given)
    run(tmp_path, PASSING, **given)
    assert [(p.get("episode_id"), p.get("trace_id")) for p in receiver.posts] == [("ep-2", None), (None, TRACE)]
    assert len({p["feedback_id"] for p in receiver.posts}) == 2


def test_failures_are_the_evidence(receiver: Receiver, tmp_path: Path) -> None:
    """A failing session names each failure with its place and message, and neither skips nor expected failures."""
    source = (
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert [1] == [2], 'they differ'\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('no disk')\n"
        "def test_setup(broken): pass\n"
        "def test_no_fixture(missing): pass\n"
        "@pytest.mark.xfail\n"
        "def test_expected(): assert 0, 'expected'\n"
        "def test_skipped(): pytest.skip('skipped for a reason')\n"
    )
    (tmp_path / "test_broken.py").write_text("import module_that_is_not_there\n")
    given = {"URL": receiver.url, "TRACE": TRACE}
    done = run(tmp_path, source, "--continue-on-collection-errors", **given)
    assert done.returncode == 1
    assert line_of(done) == f"agent memory: failure reported on {TRACE}: applied"
    assert (receiver.only["value"], receiver.only["evidence"]["exit_code"]) == (False, 1)
    counts, *rest = receiver.output.split("\n")
    assert counts == "1 failed, 3 errors, 1 passed, 1 skipped, 1 xfailed, exit status 1"
    text = "\n".join(rest)
    assert "FAILED test_it.py::test_bad\n  test_it.py:3: AssertionError: they differ\n  assert [1] == [2]" in text
    assert "ERROR test_it.py::test_setup\n  test_it.py:5: ValueError: no disk" in text
    assert "ERROR test_it.py::test_no_fixture\n  fixture 'missing' not found" in text
    assert "ERROR test_broken.py\n  ModuleNotFoundError: No module named 'module_that_is_not_there'" in text
    assert text.count("FAILED") + text.count("ERROR") == 4
    assert str(tmp_path) not in text


def test_evidence_is_bounded(receiver: Receiver, tmp_path: Path) -> None:
    """Many long failures, in any script, come as at most 20 of 500 characters, 8 kB in all, the rest counted."""
    source = (
        "import pytest\n@pytest.mark.parametrize('n', range(30))\ndef test_bad(n): assert 0, SIGN * 3000 + '\\udc80'\n"
    )
    given = {"URL": receiver.url, "TRACE": TRACE}
    for sign, most in (("ж", 8), ("x" * 100 + "\n", 15)):
        receiver.posts.clear()
        run(tmp_path, f"SIGN = {sign!r}\n{source}", "-k", "x" * 5000 + " or bad", **given)
        assert len(receiver.output.encode()) <= 8_000
        assert len(receiver.only["evidence"]["command"]) <= 2_000
        shown = receiver.output.split("\nFAILED ")[1:]
        assert most // 2 < len(shown) <= 20
        assert receiver.output.startswith("30 failed, exit status 1\n")
        assert receiver.output.endswith(f"\n... and {30 - len(shown)} more")
        assert max(map(len, shown)) <= 500 + len("\n... and 20 more")
    receiver.posts.clear()
    run(tmp_path, f"SIGN = ''\n{source}", **given)
    assert receiver.output.count("\nFAILED ") == 20
    assert receiver.output.endswith("\n... and 10 more")


def test_the_key_is_in_no_text(receiver: Receiver, tmp_path: Path) -> None:
    """A key that a test, an argument or the server repeats is neither sent in the body nor shown."""
    key = "top-secret-key"
    source = f"def test_bad(): assert 0, 'told {key}'\n"
    receiver.handle = lambda request: answer(request, 400, f'{{"error": {{"message": "no {key}"}}}}'.encode())
    done = run(tmp_path, source, "-k", f"bad or {key}", "--tb=no", URL=receiver.url, TRACE=TRACE, KEY=key)
    assert receiver.headers[0]["Authorization"] == f"Bearer {key}"
    assert key not in json.dumps(receiver.only)
    assert "told [OPTILLM_AGENT_MEMORY_KEY]" in receiver.output
    assert "no [OPTILLM_AGENT_MEMORY_KEY]" in line_of(done)


def test_the_variables_are_known_to_the_server() -> None:
    """Every variable of the plugin is one that the server's settings let pass."""
    names = {*map(str.upper, pytest_plugin.OPTIONS), "KEY", "REPORTER_KEY"}
    assert {ENV_PREFIX + name for name in names} == CLIENT_VARIABLES
    assert pytest_plugin.ENV_PREFIX == ENV_PREFIX
    assert not pytest_plugin.REPORTS.startswith(ENV_PREFIX)


# -- what is claimed -----------------------------------------------------------------------------------

SKIP = "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n"
XFAIL = "import pytest\n@pytest.mark.xfail(strict={})\ndef test_a(): assert {}\n"
TEARDOWN = "import pytest\n@pytest.fixture\ndef f():\n    yield\n    assert 0\ndef test_a(f): pass\n"
STOP = "import pytest\ndef test_bad(): assert 0\ndef test_stop(): {}\n"
WARN = "import warnings\ndef test_a(): warnings.warn('old')\n"


@pytest.mark.parametrize(
    ("source", "arguments", "status", "value"),
    [
        pytest.param(PASSING + FAILING, ["-x"], 1, False, id="one of two"),
        pytest.param(PASSING + XFAIL.format(False, 0) + SKIP.replace("_a", "_b"), [], 0, True, id="with xfail, skip"),
        pytest.param(XFAIL.format(True, 1), [], 1, False, id="strict xpass"),
        pytest.param(TEARDOWN, [], 1, False, id="teardown"),
        pytest.param("1 / 0\n", [], 2, False, id="collection"),
        pytest.param(FAILING + PASSING, ["--stepwise"], 2, False, id="stepwise"),
        pytest.param(FAILING * 3 + PASSING, ["-n", "2", "--maxfail=1"], 2, False, id="xdist maxfail"),
        pytest.param("import os\ndef test_a(): os._exit(3)\n", ["-n", "1"], 1, False, id="xdist crash"),
        pytest.param("1 / 0\n", ["-n", "2"], 1, False, id="xdist collection"),
        pytest.param(SKIP, [], 0, "no test ran", id="all skipped"),
        pytest.param(PASSING, ["-k", "nothing"], 5, "no test ran", id="none selected"),
        pytest.param(PASSING, ["--setup-plan"], 0, "no test ran", id="setup plan"),
        pytest.param(PASSING, ["--fixtures"], 0, "no test ran", id="fixtures"),
        pytest.param(PASSING, ["--collect-only"], 0, "--collect-only", id="collect only"),
        pytest.param("1 / 0\n", ["--collect-only"], 2, "--collect-only", id="collect only with an error"),
        pytest.param(XFAIL.format(False, 0), [], 0, "no test passed and none failed", id="all xfailed"),
        pytest.param(XFAIL.format(False, 1), [], 0, "no test passed and none failed", id="all xpassed"),
        pytest.param(STOP.format("raise KeyboardInterrupt"), [], 2, "interrupted", id="ctrl-c"),
        pytest.param(STOP.format("raise KeyboardInterrupt"), ["-n", "1"], 2, "interrupted", id="xdist ctrl-c"),
        pytest.param(STOP.format("pytest.exit('enough', 0)"), [], 0, "interrupted", id="exit"),
        pytest.param(PASSING, ["not_there.py"], 4, "could not run", id="usage"),
        pytest.param(WARN, ["--max-warnings=0"], 6, "exit status is not 0", id="warnings"),
    ],
)
def test_what_is_claimed(
    receiver: Receiver, tmp_path: Path, source: str, arguments: list[str], status: int, value: bool | str
) -> None:
    """Success takes exit status 0 and a passed test, failure a failed one; the rest claims nothing and says so."""
    done = run(tmp_path, source, *arguments, URL=receiver.url, TRACE=TRACE)
    assert done.returncode == status, done.stdout + done.stderr
    if isinstance(value, str):
        assert receiver.posts == []
        assert line_of(done).startswith("agent memory: nothing reported: ")
        assert value in line_of(done)
    else:
        assert receiver.only["value"] is value
        assert receiver.only["evidence"]["exit_code"] == status
        assert line_of(done).endswith(": applied")


def test_an_internal_error_claims_nothing(receiver: Receiver, tmp_path: Path) -> None:
    """Where pytest itself breaks after a failing test, nothing is sent."""
    conftest = "def pytest_runtest_logfinish(): raise SystemError('pytest breaks')\n"
    done = run(tmp_path, FAILING, conftest=conftest, URL=receiver.url, TRACE=TRACE)
    assert done.returncode == 3
    assert receiver.posts == []


# -- how pytest may be run -----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["-p", "no:terminal"], ["-qq"], ["-n", "2", "-p", "no:terminal"]], ids=" ".join)
def test_a_quiet_pytest_reports_too(receiver: Receiver, tmp_path: Path, arguments: list[str]) -> None:
    """Little or no output changes nothing in the report."""
    done = run(tmp_path, PASSING, *arguments, URL=receiver.url, TRACE=TRACE)
    assert (done.returncode, receiver.only["value"], done.stderr) == (0, True, "")
    assert ("agent memory: " in done.stdout) == ("no:terminal" not in arguments)


def test_workers_leave_it_to_the_controller(receiver: Receiver, tmp_path: Path) -> None:
    """Under xdist the session is reported once, with the tests of all workers."""
    source = "import pytest\n@pytest.mark.parametrize('n', range(8))\ndef test_it(n): assert n not in (3, 5)\n"
    given = [f"--agent-memory-url={receiver.url}", f"--agent-memory-trace={TRACE}"]
    elsewhere = (
        f"import os\nos.environ.pop({pytest_plugin.REPORTS!r}, 0)\n"  # workers on another machine inherit nothing
    )
    done = run(tmp_path, source, "-n", "2", *given, conftest=elsewhere)
    assert done.returncode == 1
    assert len(lines_of(done)) == 1
    assert receiver.output.startswith("2 failed, 6 passed, exit status 1\n")
    assert sorted(line for line in receiver.output.split("\n") if line.startswith("FAILED")) == [
        "FAILED test_it.py::test_it[3]",
        "FAILED test_it.py::test_it[5]",
    ]


INNER = """
import os, subprocess, sys
import pytest

def inner(**changes):
    env = {**os.environ, **changes}
    command = [sys.executable, "-m", "pytest", "inner.py"]
    return subprocess.run(command, env=env, capture_output=True, text=True)

def test_same():
    done = inner()
    assert done.returncode == 1
    assert "agent memory" not in done.stdout

def test_in_process():
    assert pytest.main(["inner.py"]) == 1

def test_other():
    assert "failure reported on other" in inner(OPTILLM_AGENT_MEMORY_EPISODE="other").stdout
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pytest_inside_pytest(receiver: Receiver, tmp_path: Path, workers: str) -> None:
    """A pytest that inherits what the one around it reports on says nothing of it; on an episode of its own it does."""
    (tmp_path / "inner.py").write_text(FAILING)
    done = run(tmp_path, INNER, "-n", workers, URL=receiver.url, EPISODE="ep-3")
    assert done.returncode == 0, done.stdout
    assert [(p["episode_id"], p["value"]) for p in receiver.posts] == [("other", False), ("ep-3", True)]
    assert line_of(done) == "agent memory: success reported on ep-3: applied"


def test_one_process_after_another(receiver: Receiver, tmp_path: Path) -> None:
    """Two sessions in one process both report, and leave the environment as it was."""
    (tmp_path / "test_it.py").write_text(PASSING)
    code = "import os, pytest; before = dict(os.environ); pytest.main(['-q']); pytest.main(['-q'])\n"
    code += "os.environ.pop('PYTEST_VERSION', 0); assert dict(os.environ) == before"
    given = {f"{ENV_PREFIX}URL": receiver.url, f"{ENV_PREFIX}EPISODE": "ep-4"}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPTILLM_", "PYTEST_"))} | given
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True)
    assert [p["value"] for p in receiver.posts] == [True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_reports_nothing(receiver: Receiver, tmp_path: Path) -> None:
    """A test that forks makes two sessions end, of which one reports."""
    run(tmp_path, "import os\ndef test_fork(): os.fork()\n", URL=receiver.url, TRACE=TRACE)
    assert receiver.only["value"] is True


# -- what goes wrong -----------------------------------------------------------------------------------


LOADED = ["optillm_memory", "optillm_memory.adapters", "optillm_memory.adapters.pytest_plugin"]


def test_the_plugin_imports_nothing_that_pytest_has_not() -> None:
    """Beside itself and its packages, which are empty, the entry point adds no module to a session."""
    code = "import pytest, sys; before = set(sys.modules); import optillm_memory.adapters.pytest_plugin as p; "
    code += "assert callable(p.pytest_configure); print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == LOADED


def test_off_is_nothing(receiver: Receiver, tmp_path: Path) -> None:
    """Without a server and a trace no part of it is in the session, and it can be switched off by its name."""
    source = (
        "import sys\n"
        "def test_it(request):\n"
        "    assert not request.config.pluginmanager.has_plugin('agent_memory_reporter')\n"
        "    assert [name for name in sys.modules if name.startswith('optillm_memory')] == LOADED\n"
        f"LOADED = {LOADED!r}\n"
    )
    for arguments, given in (
        ([], {"KEY": "k", "NAMESPACE": "ns"}),
        ([], {"URL": " ", "TRACE": ""}),
        (["-p", "no:agent_memory"], {"URL": receiver.url, "TRACE": TRACE}),
    ):
        text = source if "no:agent_memory" not in arguments else f"{source}LOADED = []\n"
        done = run(tmp_path, text, *arguments, load="all", **given)
        assert done.returncode == 0, done.stdout
        assert "agent memory" not in done.stdout
    assert receiver.posts == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"URL": "http://127.0.0.1:9"}, "--agent-memory-trace (or OPTILLM_AGENT_MEMORY_TRACE)"),
        ({"TRACE": TRACE}, "--agent-memory-url (or OPTILLM_AGENT_MEMORY_URL)"),
        ({"EPISODE": "e"}, "--agent-memory-url (or OPTILLM_AGENT_MEMORY_URL)"),
        ({"URL": "http://127.0.0.1:9", "TRACE": TRACE, "EPISODE": "e"}, "not both"),
        ({"URL": "http://127.0.0.1:9", "TRACE": "ep-7"}, "'ep-7' is not a trace id"),
        ({"URL": "127.0.0.1:9", "TRACE": TRACE}, "is not the URL of a server"),
        ({"URL": "file:///etc/hosts", "TRACE": TRACE}, "is not the URL of a server"),
        ({"URL": "http://[::1", "TRACE": TRACE}, "is not the URL of a server"),
        ({"URL": "http://ann:hidden@127.0.0.1:9", "TRACE": TRACE}, "OPTILLM_AGENT_MEMORY_KEY"),
        ({"URL": "http://127.0.0.1:9", "TRACE": TRACE, "KEY": "hidden\nX: y"}, "OPTILLM_AGENT_MEMORY_KEY contains"),
        ({"URL": "http://127.0.0.1:9", "TRACE": TRACE, "NAMESPACE": "naïve"}, "--agent-memory-namespace"),
    ],
)
def test_what_is_given_wrong_is_named(given: dict[str, str], said: str) -> None:
    """What is missing or cannot be used is named with the way to give it, before anything is sent."""
    lowered = {name.lower(): value for name, value in given.items() if name != "KEY"}

    def check() -> None:
        pytest_report.target(lowered)
        pytest_report.feedback_endpoint(lowered)
        pytest_report.headers(lowered, given.get("KEY", ""))

    with pytest.raises(pytest_report.NotReported) as caught:
        check()
    assert said in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://h:8000", "http://h:8000"), ("http://h:8000/", "http://h:8000"), ("http://h/v1", "http://h"),
        ("https://h/v1/", "https://h"), ("http://[::1]:8000/v1", "http://[::1]:8000"), ("http://h/a/v1", "http://h/a"),
    ],
)  # fmt: skip
def test_the_url_with_and_without_v1(url: str, endpoint: str) -> None:
    """The server's URL may end in /v1, as an OpenAI client's does, or not."""
    assert pytest_report.feedback_endpoint({"url": url}) == f"{endpoint}/v1/agent_memory/feedback"


def hang(_request: BaseHTTPRequestHandler) -> None:
    """Answer nothing for longer than anyone waits."""
    time.sleep(8)


def drip(request: BaseHTTPRequestHandler) -> None:
    """Answer a byte at a time, so that no single read takes long."""
    request.send_response(202)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(100):
            request.wfile.write(b" ")
            request.wfile.flush()
            time.sleep(0.1)


def not_http(request: BaseHTTPRequestHandler) -> None:
    """Answer in another protocol."""
    request.wfile.write(b"220 ready\r\n")


ERROR = b'{"error": {"message": "feedback.trace_id: \\u001b[31mno\\nsuch", "type": "invalid_request_error"}}'
FAULTS: Mapping[str, tuple[Handle | None, str]] = {
    "absent": (None, "cannot be reached"),
    "500": (lambda r: answer(r, 500, b"<html>"), "the server answered 500; see its log"),
    "400": (lambda r: answer(r, 400, ERROR), "the server answered 400; feedback.trace_id: [31mno such"),
    "401": (lambda r: answer(r, 401, b'{"error": "Bad key"}'), "401; Bad key; is OPTILLM_AGENT_MEMORY_KEY"),
    "404": (lambda r: answer(r, 404, b""), "404; is it an optillm with agent memory?"),
    "302": (lambda r: answer(r, 302, b"", Location="/elsewhere"), "302; it redirects"),
    "hanging": (hang, "did not answer within 5 seconds"),
    "dripping": (drip, "did not answer within 5 seconds"),
    "garbage": (lambda r: answer(r, 202, b"\xff\xfe"), "is not a receipt"),
    "list": (lambda r: answer(r, 202, b"[]"), "is not a receipt"),
    "not http": (not_http, "cannot be reached"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_reaches_the_tests(receiver: Receiver, tmp_path: Path, fault: str) -> None:
    """With any fault of the server, exit status and output are those without the plugin, but for its one line."""
    handle, said = FAULTS[fault]
    if handle is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            receiver.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    else:
        receiver.handle = handle
    arguments = ["-W", "error", "-q", "-rA"]
    for source in (PASSING,) if fault in ("hanging", "dripping") else (PASSING, PASSING + FAILING):
        began = time.monotonic()
        done = run(tmp_path, source, *arguments, URL=receiver.url, TRACE=TRACE, KEY="secret-key")
        plain = run(tmp_path, source, *arguments, load="")
        assert time.monotonic() - began < 30
        assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)
        assert line_of(done).startswith("agent memory: nothing reported: ")
        assert said in line_of(done)
        assert "secret-key" not in done.stdout
        timed = {line for line in (*done.stdout.splitlines(), *plain.stdout.splitlines()) if " in " in line}
        kept = [line for line in done.stdout.splitlines() if line not in (line_of(done), *timed)]
        assert kept == [line for line in plain.stdout.splitlines() if line not in timed]
    assert "/elsewhere" not in receiver.paths


@pytest.mark.parametrize("handle", [hang, drip])
def test_the_time_is_bounded_in_all(receiver: Receiver, handle: Handle) -> None:
    """A server that hangs or drips is left after the time given, however it spreads its bytes."""
    receiver.handle = handle
    began = time.monotonic()
    with pytest.raises(pytest_report.NotReported, match=r"did not answer within 0\.5 seconds"):
        pytest_report.post(f"{receiver.url}/v1/agent_memory/feedback", {}, {}, timeout_s=0.5)
    assert time.monotonic() - began < 6  # the server goes on for 8 s and more


@pytest.mark.parametrize("part", ["post", "message"])
def test_a_bug_of_ours_reaches_no_test(receiver: Receiver, tmp_path: Path, part: str) -> None:
    """Where the plugin itself breaks, it says so in its line, claims nothing, and the exit status stays."""
    conftest = f"import optillm_memory.adapters.pytest_report as p\ndef broken(*_): 1 / 0\np.{part} = broken\n"
    done = run(tmp_path, FAILING, conftest=conftest, URL=receiver.url, TRACE=TRACE)
    assert done.returncode == 1
    assert line_of(done) == "agent memory: nothing reported: ZeroDivisionError: division by zero"
    assert receiver.posts == []


def test_a_trace_that_is_not_known_is_said(receiver: Receiver, tmp_path: Path) -> None:
    """A receipt that waits for its trace is shown as such, with what may be the reason."""
    receiver.handle = lambda request: answer(request, 202, b'{"status": "pending"}')
    done = run(tmp_path, PASSING, URL=receiver.url, TRACE=TRACE)
    assert f"success reported on {TRACE}: pending (this server has not seen it under this key" in line_of(done)


# -- the real server -----------------------------------------------------------------------------------


@pytest.mark.host
def test_the_loop_closes_through_pytest(host: Host, namespace: dict[str, str], tmp_path: Path) -> None:
    """An answer whose tests pass is verified and recalled; one whose tests fail is not, and the evidence is kept."""
    task, other = "Write a function that adds two numbers.", "Write a function that reverses a text."
    host.upstream.reply = lambda _request: "def add(a, b): return a + b"
    right, wrong = (host.chat(t, memory=namespace)["id"] for t in (task, other))
    given = {"URL": host.process.base_url, "KEY": KEY, "NAMESPACE": namespace["namespace"]}
    good = run(tmp_path, PASSING, TRACE=right, **given)
    bad = run(tmp_path, FAILING, TRACE=wrong.removeprefix("chatcmpl-"), **given)
    assert (good.returncode, bad.returncode) == (0, 1)
    assert line_of(good) == f"agent memory: success reported on {right}: applied"
    assert line_of(bad).endswith(": applied")
    assert host.get(f"traces/{right}")["outcome"] == {"verdict": "success", "verified": True}
    failed = host.get(f"traces/{wrong}")
    assert failed["outcome"]["verdict"] == "failure"
    assert "test_it.py:1: AssertionError: they differ" in json.dumps(failed["feedback"])
    assert host.chat(task, memory=namespace)["agent_memory"]["action"] == "inject"
    known = host.get("memories", query=other, namespace=namespace["namespace"])["data"]
    assert [memory["task"] for memory in known] == [task]
