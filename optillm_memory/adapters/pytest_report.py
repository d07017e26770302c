"""Pytest reporter: the session's result becomes `code` feedback on a trace or an episode.

It runs in other people's test sessions: it imports pytest and the standard library alone, and whatever goes wrong
becomes one line in pytest's summary, never another exit status.
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

from optillm_memory.adapters.pytest_plugin import ENV_PREFIX, OPTION_PREFIX, OPTIONS, REPORTS

KEY_VARIABLE = f"{ENV_PREFIX}KEY"  # no option: other users can see command lines
REPORTER_VARIABLE = f"{ENV_PREFIX}REPORTER_KEY"
TIMEOUT_S = 5.0
FAILURES = 20  # at most in the evidence
FAILURE_CHARS = 500
COMMAND_CHARS = 2_000
OUTPUT_BYTES = 8_000
LINE_CHARS = 400
REPLY_BYTES = 100_000
SHORTEST_SECRET = 8  # characters of a key that is masked in texts; a shorter one can be a part of other words


class NotReported(Exception):
    """Nothing was reported; the message says why."""


class Reporter:
    """Follows one session, reports its result at the end, and adds a line about that to the summary."""

    def __init__(self, config: pytest.Config, chosen: Mapping[str, str], about: str) -> None:
        self.config = config
        self.chosen = chosen
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        self.reporter_key = os.environ.get(REPORTER_VARIABLE, "").strip()
        self.feedback_id = f"pytest-{uuid.uuid4().hex}"  # one for the session: sent twice, it counts once
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.warned = 0
        self.ended = ""  # why the session ended early
        self.line = ""
        self.reported = False
        self._pid = os.getpid()
        self._outer = os.environ.get(REPORTS)
        os.environ[REPORTS] = about

    # -- hooks that pytest calls -------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the result of a test's phase."""
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
        """Note an interrupt by the user; pytest and xdist also stop by this exception, with subclasses of it."""
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
        if os.getpid() != self._pid or self.line:  # a line here means that counting failed
            return
        with self._harmless():
            status = int(session.exitstatus)
            value = self._verdict(status)
            endpoint = feedback_endpoint(self.chosen)
            feedback = {
                **target(self.chosen),
                "metric": "success",
                "value": value,
                "source": "code",
                "feedback_id": self.feedback_id,
                "evidence": {"command": self._command(), "exit_code": status, "output": self._output(status)},
            }
            receipt = post(endpoint, feedback, headers(self.chosen, self.key, self.reporter_key))
            self.reported = True
            word = "success" if value else "failure"
            self.line = f"{word} reported on {self.chosen.get('trace') or self.chosen.get('episode')}: {receipt}"
            if receipt.startswith("pending"):
                self.line += " (this server has not seen it under this key and namespace yet)"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print one line about the report."""
        with self._harmless():
            if self.line:
                line = one_line(f"agent memory: {self._without_key(self.line)}", LINE_CHARS)
                terminalreporter.write_line(line, **({} if self.reported else {"yellow": True}))

    def pytest_unconfigure(self) -> None:
        """Restore the environment."""
        if self._outer is None:
            os.environ.pop(REPORTS, None)
        else:
            os.environ[REPORTS] = self._outer

    # -- making the report -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn every fault into the summary's line: the reporter must never fail the user's tests."""
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
            raise NotReported(f"{self.ended or 'pytest could not run'}, which says nothing about the tests")
        if self.counts["failed"] or self.counts["errors"]:
            return False
        if not self.counts.keys() - {"skipped"}:
            raise NotReported("no test ran")
        # Status 1 without a failed test comes from another check, such as coverage: the tests themselves passed.
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or self._too_many_warnings():
            raise NotReported("no test failed, but pytest's exit status is not 0")
        if not self.counts["passed"]:
            raise NotReported("no test passed and none failed")
        return True

    def _too_many_warnings(self) -> bool:
        """Whether pytest is about to change the exit status because of --max-warnings."""
        limit: Any = self.config.getoption("max_warnings", None)
        with contextlib.suppress(ValueError, KeyError):  # a pytest without that setting
            limit = self.config.getini("max_warnings") if limit is None else limit
        return limit not in (None, "") and self.warned > int(limit)

    def _command(self) -> str:
        arguments = without_own_options([str(a) for a in self.config.invocation_params.args])
        return shortened(self._without_key(shlex.join(["pytest", *arguments])), COMMAND_CHARS)

    def _output(self, status: int) -> str:
        counts = [f"{self.counts[k]} {k}" for k in ("failed", "errors", "passed", "skipped", "xfailed", "xpassed")]
        text = ", ".join([c for c in counts if not c.startswith("0 ")] + [f"exit status {status}"])
        remaining = self.counts["failed"] + self.counts["errors"]
        for failure in self.failures:
            if len(f"{text}\n{failure}".encode("utf-8", "replace")) > OUTPUT_BYTES - 100:
                break
            text, remaining = f"{text}\n{failure}", remaining - 1
        return f"{text}\n... and {remaining} more" if remaining else text

    def _without_key(self, text: str) -> str:
        for name, key in ((KEY_VARIABLE, self.key), (REPORTER_VARIABLE, self.reporter_key)):
            text = text.replace(key, f"[{name}]") if len(key) >= SHORTEST_SECRET else text
        return text


def message(report: pytest.TestReport | pytest.CollectReport, root: Path) -> str:
    """Return why a report failed: the line of the crash with its message, or the last lines of the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        path = Path(crash.path)
        where = path.relative_to(root) if path.is_relative_to(root) else path
        return f"{where}:{crash.lineno}: {crash.message}"
    lines = [line for line in report.longreprtext.splitlines() if line.strip()]
    messages = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join(messages) if messages else "".join(lines[-1:])


def without_own_options(arguments: Sequence[str]) -> list[str]:
    """Return pytest's arguments without ours, which are no part of what was tested; a URL can hold a password."""
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


def target(chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the trace or episode that the feedback is about. Raises NotReported if it is missing or not an id."""
    trace, episode = chosen.get("trace", ""), chosen.get("episode", "")
    if not trace and not episode:
        raise NotReported(f"the trace is missing; set {_ways('trace')} to the id of the response that is tested")
    if trace and episode:
        raise NotReported(f"set either {_ways('trace')} or {_ways('episode')}, not both")
    if episode:
        return {"episode_id": episode}
    if not re.fullmatch("chatcmpl-.+|[0-9A-Fa-f]{32}", trace):
        raise NotReported(
            f"{trace!r} is not a trace id (chatcmpl-... or 32 hex digits); episodes have their own option"
        )
    return {"trace_id": trace}


def feedback_endpoint(chosen: Mapping[str, str]) -> str:
    """Return the URL to post feedback to. Raises NotReported if the server's URL is missing or not valid."""
    if "url" not in chosen:
        raise NotReported(f"the server is missing; set {_ways('url')}, for example http://127.0.0.1:8000")
    try:
        parts = urllib.parse.urlsplit(chosen["url"])
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or not chosen["url"].isprintable() or " " in chosen["url"]:
        raise NotReported(f"{_ways('url')} is not the URL of a server; use one like http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise NotReported(f"{_ways('url')} contains a user; put the key into {KEY_VARIABLE} instead")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}/v1/agent_memory/feedback"


def headers(chosen: Mapping[str, str], key: str, reporter_key: str = "") -> dict[str, str]:
    """Return the request's headers. Raises NotReported for characters that a header cannot carry."""
    sent = ((KEY_VARIABLE, key), (REPORTER_VARIABLE, reporter_key), (_ways("namespace"), chosen.get("namespace", "")))
    for name, text in sent:
        if not text.isascii() or not text.isprintable():
            raise NotReported(f"{name} contains characters that an HTTP header cannot carry")
    found = {"Content-Type": "application/json"}
    if key:
        found["Authorization"] = f"Bearer {key}"
    if reporter_key:
        found["X-Agent-Memory-Reporter-Key"] = reporter_key
    if "namespace" in chosen:
        found["X-Agent-Memory-Namespace"] = chosen["namespace"]
    return found


def _ways(name: str) -> str:
    return f"{OPTION_PREFIX}{name} (or {ENV_PREFIX}{name.upper()})"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send the key to the other server."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse."""


def post(endpoint: str, feedback: Mapping[str, Any], fields: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> str:
    """Send the feedback and return the receipt's status; the time limit covers everything, name lookup too.

    Raises NotReported with what went wrong and how to fix it.
    """
    answered: list[str | Exception] = []

    def send() -> None:
        try:
            answered.append(_post(endpoint, feedback, fields, timeout_s * 0.9))
        except Exception as error:  # noqa: BLE001 - passed to the waiting thread
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
        raise NotReported(f"{where} cannot be reached ({reason}); start optillm, or correct {_ways('url')}") from None
    raise outcome


def _post(endpoint: str, feedback: Mapping[str, Any], fields: Mapping[str, str], timeout_s: float) -> str:
    body = json.dumps(feedback).encode()
    request = urllib.request.Request(endpoint, body, dict(fields), method="POST")  # noqa: S310 - checked to be http(s)
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
        raise NotReported("the server's reply is not a receipt; is it an optillm with agent memory?")
    if reply.get("source") == "llm":
        status += f" (it counts as `llm`: set {REPORTER_VARIABLE} to a reporter's key)"
    return status


def _read(response: Any) -> Any:
    """Return the reply's JSON, or None."""
    try:
        return json.loads(response.read(REPLY_BYTES))
    except ValueError:
        return None


def _refusal(code: int, reply: Any) -> str:
    error = reply.get("error") if isinstance(reply, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    if 300 <= code < 400:  # noqa: PLR2004
        hint = f"it redirects; set its own address as {_ways('url')}"
    elif code in (401, 403):
        hint = f"is {KEY_VARIABLE} the server's key, and {REPORTER_VARIABLE} a reporter's?"
    elif code in (404, 405):
        hint = "is it an optillm with agent memory?"
    else:
        hint = "see its log" if code >= 500 else ""  # noqa: PLR2004
    return "; ".join(filter(None, [f"the server answered {code}", str(text or ""), hint]))


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
