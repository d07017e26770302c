"""Pytest as a reporter: the session's result becomes `code` feedback on a trace or an episode.

Loaded by pytest through its entry point into other people's test sessions: it imports pytest and the standard
library alone, does nothing unless told where to report and on what, and whatever goes wrong becomes one line in
pytest's summary, never another exit status.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import shlex
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ENV_PREFIX = "OPTILLM_AGENT_MEMORY_"
KEY_VARIABLE = f"{ENV_PREFIX}KEY"  # no option: command lines can be seen by others
OPTION_PREFIX = "--agent-memory-"
OPTIONS = {
    "url": "report the session's result to the optillm with agent memory at this URL",
    "trace": "the trace that the session tests: the `id` of the response",
    "episode": "instead of a trace, the episode that the session tests",
    "namespace": "the namespace that the trace or episode is in",
}
# Set while a session reports, so that a pytest inside its tests, which inherits the rest, does not report as well.
REPORTS = "PYTEST_AGENT_MEMORY_REPORTS"
TIMEOUT_S = 5.0
FAILURES = 20  # shown in the evidence at most
FAILURE_CHARS = 500
COMMAND_CHARS = 2_000
OUTPUT_BYTES = 8_000
LINE_CHARS = 400
REPLY_BYTES = 100_000
SHORTEST_SECRET = 8  # characters of a key that is looked for in texts; a shorter one is a part of other words


class NotReported(Exception):
    """Nothing was reported, for a reason that the user is told."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; each has a variable of the same name."""
    group = parser.getgroup("agent-memory", "agent memory: report the session's result as feedback")
    for name, help_ in OPTIONS.items():
        group.addoption(OPTION_PREFIX + name, metavar=name.upper(), help=f"{help_} ({ENV_PREFIX}{name.upper()})")


def pytest_configure(config: pytest.Config) -> None:
    """Take part where told to; workers of xdist leave it to their controller."""
    if hasattr(config, "workerinput"):
        return
    given = _given(config, os.environ)
    claim = given.get("trace") or given.get("episode") or ""
    if (claim or "url" in given) and os.environ.get(REPORTS) != claim:
        config.pluginmanager.register(Reporter(config, given, claim), "agent_memory_reporter")


def _given(config: pytest.Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what was set; the command line outranks the environment."""
    options = {name: str(config.getoption(f"agent_memory_{name}", None) or "").strip() for name in OPTIONS}
    variables = {name: environ.get(ENV_PREFIX + name.upper(), "").strip() for name in OPTIONS}
    if options["trace"] or options["episode"]:
        variables["trace"] = variables["episode"] = ""
    return {name: options[name] or variables[name] for name in OPTIONS if options[name] or variables[name]}


class Reporter:
    """Follows one session, reports its result at the end, and says in the summary what became of it."""

    def __init__(self, config: pytest.Config, given: Mapping[str, str], claim: str) -> None:
        self.config = config
        self.given = given
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        self.feedback_id = f"pytest-{uuid.uuid4().hex}"  # one for the session: sent twice, it counts once
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.warned = 0
        self.ended = ""  # why the session ended before its time
        self.line = ""
        self.well = False
        self._pid = os.getpid()
        self._outer = os.environ.get(REPORTS)
        os.environ[REPORTS] = claim

    # -- what pytest tells -------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a phase of a test."""
        with self._harmless():
            expected = hasattr(report, "wasxfail")
            if report.failed:
                self._failed(report, "failed" if report.when not in ("setup", "teardown") else "errors")
            elif report.skipped:
                self.counts["xfailed" if expected else "skipped"] += 1
            elif report.passed and report.when == "call" and not hasattr(report, "context"):  # no subtest
                self.counts["xpassed" if expected else "passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a module that could not be collected."""
        with self._harmless():
            if report.failed:
                self._failed(report, "errors")

    def pytest_warning_recorded(self) -> None:
        """Count a warning."""
        self.warned += 1

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note that someone broke the session off; pytest and xdist also stop by it, with a class of their own."""
        with self._harmless():
            own = isinstance(excinfo.value, KeyboardInterrupt) and excinfo.type is not KeyboardInterrupt
            if not own or "keyboard-interrupt" in str(excinfo.value):
                self.ended = "the session was interrupted"

    def pytest_internalerror(self) -> None:
        """Note that pytest itself failed."""
        self.ended = "pytest had an internal error"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Report the result, unless a test has forked and this is its child."""
        if os.getpid() != self._pid or self.line:  # with a line already, the counting went wrong
            return
        with self._harmless():
            status = int(session.exitstatus)
            value = self._verdict(status)
            endpoint = feedback_endpoint(self.given)
            feedback = {
                **target(self.given),
                "metric": "success",
                "value": value,
                "source": "code",
                "feedback_id": self.feedback_id,
                "evidence": {"command": self._command(), "exit_code": status, "output": self._output(status)},
            }
            receipt = post(endpoint, feedback, headers(self.given, self.key))
            self.well = True
            word = "success" if value else "failure"
            self.line = f"{word} reported on {self.given.get('trace') or self.given.get('episode')}: {receipt}"
            if receipt == "pending":
                self.line += " (not seen by this server under this key and namespace; it waits)"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say in one line what became of it."""
        with self._harmless():
            if self.line:
                line = one_line(f"agent memory: {self._without_key(self.line)}", LINE_CHARS)
                terminalreporter.write_line(line, **({} if self.well else {"yellow": True}))

    def pytest_unconfigure(self) -> None:
        """Leave the environment as it was."""
        if self._outer is None:
            os.environ.pop(REPORTS, None)
        else:
            os.environ[REPORTS] = self._outer

    # -- what is made of it ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn every fault into the line of the summary: nothing of ours may fail the user's tests."""
        try:
            yield
        except NotReported as reason:
            self.line = f"nothing reported: {reason}"
        except Exception as error:  # noqa: BLE001
            self.line = f"nothing reported: {type(error).__name__}: {error}"

    def _failed(self, report: pytest.TestReport | pytest.CollectReport, kind: str) -> None:
        self.counts[kind] += 1
        if len(self.failures) < FAILURES:
            word = "FAILED" if kind == "failed" else "ERROR"
            text = f"{word} {shortened(report.nodeid, FAILURE_CHARS // 2)}\n{message(report, self.config.rootpath)}"
            self.failures.append(shortened(self._without_key(text).replace("\n", "\n  "), FAILURE_CHARS))

    def _verdict(self, status: int) -> bool:
        if self.config.getoption("collectonly", default=False):
            raise NotReported("--collect-only runs no test")
        if self.ended or status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            raise NotReported(f"{self.ended or 'pytest could not run'}, which says nothing of the tests")
        if self.counts["failed"] or self.counts["errors"]:
            return False
        if not self.counts.keys() - {"skipped"}:
            raise NotReported("no test ran")
        # With status 1 and no failure a gate beside the tests failed (coverage, say): the tests themselves did well.
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or self._too_many_warnings():
            raise NotReported("no test failed, and yet pytest's exit status is not 0")
        if not self.counts["passed"]:
            raise NotReported("no test passed and none failed")
        return True

    def _too_many_warnings(self) -> bool:
        """Whether pytest will yet change the exit status for --max-warnings."""
        limit: Any = self.config.getoption("max_warnings", None)
        with contextlib.suppress(ValueError, KeyError):  # a pytest that has no such setting
            limit = self.config.getini("max_warnings") if limit is None else limit
        return limit not in (None, "") and self.warned > int(limit)

    def _command(self) -> str:
        arguments = without_own_options([str(a) for a in self.config.invocation_params.args])
        return shortened(self._without_key(shlex.join(["pytest", *arguments])), COMMAND_CHARS)

    def _output(self, status: int) -> str:
        counts = [f"{self.counts[k]} {k}" for k in ("failed", "errors", "passed", "skipped", "xfailed", "xpassed")]
        text = ", ".join([c for c in counts if not c.startswith("0 ")] + [f"exit status {status}"])
        left = self.counts["failed"] + self.counts["errors"]
        for failure in self.failures:
            if len(f"{text}\n{failure}".encode("utf-8", "replace")) > OUTPUT_BYTES - 100:
                break
            text, left = f"{text}\n{failure}", left - 1
        return f"{text}\n... and {left} more" if left else text

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, f"[{KEY_VARIABLE}]") if len(self.key) >= SHORTEST_SECRET else text


def message(report: pytest.TestReport | pytest.CollectReport, root: Path) -> str:
    """Return why a report failed: the line of the crash with its message, or what the traceback says last."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        path = Path(crash.path)
        where = path.relative_to(root) if path.is_relative_to(root) else path
        return f"{where}:{crash.lineno}: {crash.message}"
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    said = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join(said) if said else "".join(lines[-1:])


def without_own_options(arguments: Sequence[str]) -> list[str]:
    """Return pytest's arguments less ours: they are no part of what was tested, and a URL can hold a password."""
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        if dropping:
            dropping = False
        elif argument.partition("=")[0] in {OPTION_PREFIX + name for name in OPTIONS}:
            dropping = "=" not in argument
        else:
            kept.append(argument)
    return kept


def target(given: Mapping[str, str]) -> dict[str, str]:
    """Return what the feedback speaks of. Raises NotReported where that is missing or is no trace id."""
    trace, episode = given.get("trace", ""), given.get("episode", "")
    if not trace and not episode:
        raise NotReported(f"the trace is missing; give {_ways('trace')}, the id of the response that is tested")
    if trace and episode:
        raise NotReported(f"give either {_ways('trace')} or {_ways('episode')}, not both")
    if episode:
        return {"episode_id": episode}
    if not re.fullmatch("chatcmpl-.+|[0-9A-Fa-f]{32}", trace):
        raise NotReported(
            f"{trace!r} is no trace id (chatcmpl-..., 32 hex digits); an episode has an option of its own"
        )
    return {"trace_id": trace}


def feedback_endpoint(given: Mapping[str, str]) -> str:
    """Return where feedback goes. Raises NotReported where the URL is missing or none."""
    if "url" not in given:
        raise NotReported(f"the server is missing; give {_ways('url')}, for example http://127.0.0.1:8000")
    try:
        parts = urllib.parse.urlsplit(given["url"])
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or not given["url"].isprintable() or " " in given["url"]:
        raise NotReported(f"{_ways('url')} is no URL of a server; give one like http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise NotReported(f"{_ways('url')} holds a user; give the key in {KEY_VARIABLE} instead")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}/v1/agent_memory/feedback"


def headers(given: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the headers of the request. Raises NotReported for what a header cannot carry."""
    for name, text in ((KEY_VARIABLE, key), (_ways("namespace"), given.get("namespace", ""))):
        if not text.isascii() or not text.isprintable():
            raise NotReported(f"{name} holds characters that an HTTP header cannot carry")
    found = {"Content-Type": "application/json"}
    if key:
        found["Authorization"] = f"Bearer {key}"
    if "namespace" in given:
        found["X-Agent-Memory-Namespace"] = given["namespace"]
    return found


def _ways(name: str) -> str:
    return f"{OPTION_PREFIX}{name} (or {ENV_PREFIX}{name.upper()})"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would hand the key to the other server."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse."""


def post(endpoint: str, feedback: Mapping[str, Any], fields: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> str:
    """Send the feedback and return the receipt's status, within the time in all: names are looked up in it too.

    Raises NotReported with what went wrong and how to mend it.
    """
    answered: list[str | Exception] = []

    def send() -> None:
        try:
            answered.append(_post(endpoint, feedback, fields, timeout_s * 0.9))
        except Exception as error:  # noqa: BLE001 - handed on to the thread that waits
            answered.append(error)

    thread = threading.Thread(target=send, name="agent-memory-report", daemon=True)
    thread.start()
    thread.join(timeout_s)
    outcome: str | Exception = answered[0] if answered else TimeoutError()
    if isinstance(outcome, str):
        return outcome
    where = endpoint.removesuffix("/v1/agent_memory/feedback")
    reason = getattr(outcome, "reason", outcome)
    if isinstance(reason, TimeoutError):
        raise NotReported(f"{where} did not answer within {timeout_s:g} seconds; is the server busy?") from None
    if isinstance(outcome, (OSError, http.client.HTTPException)):
        raise NotReported(f"{where} cannot be reached ({reason}); start optillm, or mend {_ways('url')}") from None
    raise outcome


def _post(endpoint: str, feedback: Mapping[str, Any], fields: Mapping[str, str], timeout_s: float) -> str:
    body = json.dumps(feedback).encode()
    request = urllib.request.Request(endpoint, body, dict(fields), method="POST")  # noqa: S310 - http(s) alone
    proxies: dict[str, str] | None = {} if _is_loopback(urllib.parse.urlsplit(endpoint).hostname or "") else None
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(proxies))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            reply = _read(response)
    except urllib.error.HTTPError as error:
        with error:
            raise NotReported(_refusal(error.code, _read(error))) from None
    status = reply.get("status") if isinstance(reply, dict) else None
    if not isinstance(status, str) or not status:
        raise NotReported("the server's reply is no receipt; is it an optillm with agent memory?")
    return status


def _read(response: Any) -> Any:
    """Return the reply's JSON, or None."""
    try:
        return json.loads(response.read(REPLY_BYTES))
    except ValueError:
        return None


def _refusal(code: int, reply: Any) -> str:
    error = reply.get("error") if isinstance(reply, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    if 300 <= code < 400:  # noqa: PLR2004
        hint = f"it redirects; give its own address as {_ways('url')}"
    elif code in (401, 403):
        hint = f"is {KEY_VARIABLE} the server's key?"
    elif code in (404, 405):
        hint = "is it an optillm with agent memory?"
    else:
        hint = "see its log" if code >= 500 else ""  # noqa: PLR2004
    return "; ".join(filter(None, [f"the server answered {code}", str(said or ""), hint]))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shortened(text: str, limit: int) -> str:
    """Return the text as valid Unicode of at most so many characters."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(text: str, limit: int) -> str:
    """Return the text in one line without control characters: some of it comes from a server."""
    return shortened(" ".join("".join(c if c.isprintable() else " " for c in text).split()), limit)
