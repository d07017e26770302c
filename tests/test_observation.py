"""Observations are read as they are meant: measured on a recorded table, and shape by shape."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.conversation.observation import Reading, Result, read
from optillm_memory.conversation.signature import signature_of

TABLE = Path(__file__).parent / "observations" / "observations.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
ANY_TEXT = st.text(st.characters())  # with lone surrogates and NUL


def shell(command: str) -> dict[str, str]:
    """Return the call of a command line as an agent makes it."""
    return {"tool": "bash", "arguments": json.dumps({"command": command})}


def framed(observation: str, **call: str) -> Reading:
    """Read a result whose frame is known to be the harness's: another command's result had it, too."""
    return read(observation, [Result('{"command": "another"}', observation)], **call)


def reading_of(row: dict[str, Any]) -> Reading:
    """Read a row of the table: a command line through the shell tool, or a tool of its own."""
    if row["command"].startswith("{"):
        return framed(row["observation"], tool=row["tool"], arguments=row["command"])
    return framed(row["observation"], **shell(row["command"]))


# -- the table -------------------------------------------------------------------------------------


def test_the_table_is_what_it_claims() -> None:
    """Enough rows of enough tools, each once, in two fixed parts, about half of them without any exit code."""
    assert len(ROWS) >= 170
    assert len({row["tool"] for row in ROWS}) >= 14
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row["split"] == ("develop" if int(row["id"].rpartition("-")[2], 16) % 2 else "held_out")
        assert row["verdict"] in ("success", "failure", "unknown")
    verdicts = Counter(row["verdict"] for row in ROWS)
    assert min(verdicts.values()) >= 40
    uncoded = [row for row in ROWS if reading_of(row).basis != "exit_code"]
    assert len(uncoded) >= 0.45 * len(ROWS)


def part(name: str) -> list[dict[str, Any]]:
    """Return the rows of one part of the table."""
    if name == "without exit code":
        return [row for row in ROWS if reading_of(row).basis != "exit_code"]
    return [row for row in ROWS if name in ("all", row["split"])]


@pytest.mark.parametrize("name", ["all", "develop", "held_out", "without exit code"])
def test_verdicts_agree_with_what_really_happened(name: str) -> None:
    """Of what is called success or failure nearly all was, and most of what can be known is called so."""
    pairs = [(reading_of(row).verdict, row["verdict"], row["id"]) for row in part(name)]
    called = [(read_as, truth, key) for read_as, truth, key in pairs if read_as != "unknown"]
    known = [(read_as, truth) for read_as, truth, _ in pairs if truth != "unknown"]
    wrong = [item for item in called if item[0] != item[1]]
    assert len(wrong) <= 0.02 * len(called), wrong
    assert sum(read_as == truth for read_as, truth in known) >= 0.85 * len(known)


def test_a_failure_has_a_signature_where_anything_was_printed() -> None:
    """Every failed row of the table with a word of output yields a signature without the recording's own paths."""
    for row in ROWS:
        reading = reading_of(row)
        assert (reading.signature is None) or reading.verdict == "failure"
        if reading.verdict == "failure" and reading.signature is not None:
            assert "/home/dev" not in reading.signature.key
    assert sum(reading_of(row).signature is not None for row in ROWS) > 150


# -- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        '{{"exit_code": {0}, "stdout": "x", "stderr": ""}}',
        '{{"returncode": {0}, "output": "x"}}',
        '{{"result": {{"exitCode": {0}, "stdout": "x"}}}}',
        '{{"content": [{{"type": "text", "text": "x\\nExit code: {0}"}}]}}',
        '[{{"type": "text", "text": "x\\n(exit code {0})"}}]',
        "Exit code: {0}\nx",
        "Exit code {0}\nx",
        "x\nexit status {0}",
        "x\n[exit code {0}]",
        "x\n(exit code {0})",
        "Process exited with code {0}\nOutput:\nx",
        "x\n[The command completed with exit code {0}.]",
        "Command finished with exit code {0}: x",
        "CompletedProcess(args='x', returncode={0}, stdout='x', stderr='')",
        "x\nreturncode={0}",
        "<returncode>{0}</returncode>\n<output>\nx\n</output>",
        "<exit_code>{0}</exit_code>",
        "x\n$? = {0}",
        "x\nEXIT={0}",
    ],
)
@pytest.mark.parametrize("code", [0, 1, 127])
def test_each_shape_of_an_exit_code_decides(template: str, code: int) -> None:
    """Zero is a success and anything else a failure, however the code is written."""
    reading = framed(template.format(code), **shell("./deploy --now"))
    assert (reading.exit_code, reading.basis) == (code, "exit_code")
    assert reading.verdict == ("failure" if code else "success")


def test_a_code_in_the_middle_of_a_long_result_is_still_read() -> None:
    """A JSON result that is too long to parse, or cut off, still tells its exit code; a quoted one in it does not."""
    output = "x" * 70_000
    assert framed(json.dumps({"exit_code": 2, "stdout": output}), **shell("make")).exit_code == 2
    assert framed('{"exit_code": 2, "stdout": "cut o', **shell("make")).verdict == "failure"
    quoted = json.dumps({"stdout": json.dumps({"exit_code": 1}) + output})
    assert framed(quoted, **shell("make")).exit_code is None


@pytest.mark.parametrize(
    "command", ["grep x a", "cd src && rg x", "diff a b", "cat a | grep x", "test -f a", "[ -f a ]"]
)
def test_one_is_an_answer_of_what_compares(command: str) -> None:
    """Exit code 1 of grep, diff and test is no failure, save with a complaint or another code."""
    assert framed("[exit code 1]", **shell(command)).verdict == "unknown"
    assert framed("[exit code 2]", **shell(command)).verdict == "failure"


def test_a_pipe_hides_the_exit_code_of_the_tests() -> None:
    """The last program of a pipe ended well; the tests before it did not."""
    text = "2 failed, 3 passed in 0.12s\n[exit code 0]"
    assert framed(text, **shell("pytest | tail -1")).verdict == "failure"
    assert framed(text, **shell("pytest || true")).verdict == "failure"
    assert framed("fine\n[exit code 0]", **shell("pytest | tail -1")).verdict == "success"


def test_a_timeout_is_a_failure() -> None:
    """A command that was stopped for its time did not do its work."""
    reading = read("Command timed out after 120 seconds", **shell("make"))
    assert (reading.verdict, reading.exit_code) == ("failure", None)


# -- what the runners say --------------------------------------------------------------------------

GOOD = [
    "3 passed in 0.12s",
    "===== 3 passed, 1 skipped, 2 warnings in 61.20s (0:01:01) =====",
    "Ran 3 tests in 0.001s\n\nOK",
    "Ran 3 tests in 0.001s\n\nOK (skipped=1)",
    "Tests:       3 passed, 3 total",
    "ok  \texample.com/x\t0.01s",
    "ok  \texample.com/x\t(cached)",
    "test result: ok. 3 passed; 0 failed; 0 ignored",
    "[INFO] BUILD SUCCESS",
    "BUILD SUCCESSFUL in 3s",
    "Tests run: 3, Failures: 0, Errors: 0, Skipped: 0",
    "OK (3 tests)",
    "OK (3 tests, 5 assertions)",
    "3 examples, 0 failures",
    "3 runs, 3 assertions, 0 failures, 0 errors",
    "# pass 3\n# fail 0",
    "100% tests passed, 0 tests failed out of 3",
    "Result: PASS",
    "All checks passed!",
    "Success: no issues found in 3 source files",
    "      Tests  3 passed (3)",
    "    Finished `dev` profile [unoptimized + debuginfo] target(s) in 0.08s",
]
BAD = [
    "2 failed, 3 passed in 0.12s",
    "1 error in 0.50s",
    "no tests ran in 0.01s",
    "Ran 1 test in 0.1s\n\nFAILED (failures=1)",
    "Tests:       1 failed, 2 passed, 3 total",
    "--- FAIL: TestX (0.00s)\nFAIL",
    "FAIL\texample.com/x\t0.01s",
    "FAIL\texample.com/x [build failed]",
    "test result: FAILED. 1 passed; 1 failed; 0 ignored",
    "[INFO] BUILD FAILURE",
    "BUILD FAILED in 2s",
    "Tests run: 3, Failures: 1, Errors: 0",
    "3 examples, 1 failure",
    "# pass 2\n# fail 1",
    "3 runs, 3 assertions, 0 failures, 1 errors",
    "Result: FAIL",
    "Found 3 errors.",
    "      Tests  1 failed | 2 passed (3)",
    "Found 2 errors in 1 file (checked 1 source file)",
    "Tests: 3, Assertions: 3, Failures: 1.",
    "50% tests passed, 1 tests failed out of 2",
    "No tests found, exiting with code 1",
]


@pytest.mark.parametrize(("text", "verdict"), [*((t, "success") for t in GOOD), *((t, "failure") for t in BAD)])
def test_closing_lines_of_runners_are_proof(text: str, verdict: str) -> None:
    """What a runner prints at its end decides without an exit code, but not when a file shows it."""
    reading = read(f"some output\n{text}\n", **shell("./check"))
    assert (reading.verdict, reading.exit_code) == (verdict, None)
    assert reading.basis in ("test_summary", "compiler")
    for viewer in ("cat ci.log", "tail -5 ci.log | head -3", "sed -n 1,9p ci.log", "cd logs && less ci.log"):
        assert read(f"some output\n{text}\n", **shell(viewer)).verdict == "unknown"
    assert read(text, tool="read_file", arguments='{"path": "ci.log"}').verdict == "unknown"


def test_tests_that_passed_may_have_printed_anything() -> None:
    """An error before the report of passing tests is what the tests printed; one after it counts."""
    text = "a.c:3:1: error: only printed\nTraceback (most recent call last):\nValueError: x\n3 passed in 0.12s\n"
    assert read(text, **shell("pytest -s")).verdict == "success"
    assert read(f"{text}make: *** [Makefile:9: deploy] Error 4\n", **shell("make")).verdict == "failure"


# -- what is no proof ------------------------------------------------------------------------------

TRACE = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n    f()\nValueError: bad\n'


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("", "make"),
        ("   \n", "make"),
        ("0 failed, no errors\n", "python x.py"),
        ("12 passed, all good\n", "python x.py"),
        ("Everything succeeded!\n", "./deploy"),
        ("see the chapter on error handling\n", "python docs.py"),
        ("Error: could not, going on\n", "python x.py"),
        (f"{TRACE}retried, fine\n", "python x.py"),
        (TRACE, "cat a.log"),
        (TRACE, "git show HEAD"),
        (TRACE, "git -C x log -p"),
        (TRACE, "docker logs web"),
        (TRACE, "curl -s localhost/log"),
        ("cat: other: No such file or directory\n", "cat notes.md"),
        ("a.c:3:1: error: x\n", "grep -n error a.log"),
        ('{"status": "error", "exit_code": 1}', "cat last.json"),
        ('{"error": "x"}', "jq . last.json"),
        ("Exit code: 1\nthe deploy failed", "cat notes.txt"),
        ("it ended\nProcess exited with code 1", "tail -3 ci.log"),
        ("rm: cannot remove 'x': No such file or directory\nbuilt\n", "rm x; ./build"),
        ("rm: cannot remove 'x': No such file or directory\n", "rm x; true"),
    ],
)
def test_in_doubt_it_is_unknown(text: str, command: str) -> None:
    """Words of a program about itself, shown files and empty output prove nothing."""
    assert read(text, **shell(command)).verdict == "unknown"
    assert read(text, tool="shell", arguments=command).verdict == "unknown"


@pytest.mark.parametrize(
    "tool", ["read_file", "Read", "view", "search_code", "web_fetch", "Edit", "ask_expert", "plan"]
)
def test_tools_that_show_or_tell_prove_nothing(tool: str) -> None:
    """A file, a page or prose that holds errors is no failure of the tool that brought it."""
    for text in (TRACE, "a.c:3:1: error: x\n", "1 failed in 0.12s\n", "Exit code: 1\nsaid the log"):
        assert read(text, tool=tool, arguments='{"path": "a.txt"}').verdict == "unknown"


@pytest.mark.parametrize(
    ("text", "call", "basis"),
    [
        ("cat: x.txt: No such file or directory\n", shell("cat x.txt"), "shell"),
        ("ls: cannot access 'x': No such file or directory\n", shell("ls x"), "shell"),
        ("bash: line 1: frob: command not found\n", shell("frob"), "shell"),
        ("fatal: not a git repository\n", shell("git log"), "shell"),
        ("curl: (22) The requested URL returned error: 404\n", shell("curl -f http://localhost/x"), "http"),
        ("HTTP/1.1 503 Service Unavailable\n\nsorry\n", shell("curl -i http://localhost/x"), "http"),
        ("File not found: a/b.py", {"tool": "read_file", "arguments": '{"path": "a/b.py"}'}, "tool_error"),
        ('{"error": "no such file"}', {"tool": "read_file", "arguments": '{"path": "a/b.py"}'}, "tool_error"),
        (
            '{"content": [{"type": "text", "text": "no"}], "isError": true}',
            {"tool": "x", "arguments": "{}"},
            "tool_error",
        ),
        ('{"status": 404, "body": "no"}', {"tool": "http_request", "arguments": "{}"}, "http"),
        ('{"success": false, "message": "no"}', {"tool": "run_job", "arguments": "{}"}, "tool_error"),
        (TRACE, shell("python a.py"), "traceback"),
        (TRACE, {}, "traceback"),
        ("Error executing tool fetch: boom", {"tool": "fetch", "arguments": "{}"}, "tool_error"),
        ('ERROR:  relation "x" does not exist\n', shell("psql -c 'select * from x'"), "sql"),
        ("main.go:3:5: undefined: x\n", shell("go build"), "compiler"),
        ("npm error code ENOENT\n", shell("npm run x"), "tool_error"),
    ],
)
def test_a_tools_own_complaint_is_a_failure(text: str, call: dict[str, str], basis: str) -> None:
    """What a tool says in its own shape counts, with what it was read off and a signature."""
    reading = read(text, **call)
    assert (reading.verdict, reading.basis) == ("failure", basis)
    assert reading.signature is not None


def test_only_a_failure_has_a_signature() -> None:
    """A success that printed a traceback on its way has none."""
    reading = framed(f"{TRACE}[exit code 0]", **shell("python x.py"))
    assert (reading.verdict, reading.signature) == ("success", None)


# -- hostile text ----------------------------------------------------------------------------------

UNITS = [
    "a",
    "'",
    '"',
    "[",
    "{",
    "(",
    "error: ",
    "x.c:3:5: error: ",
    "a: b ",
    "Traceback (most recent call last):\n",
    "\n",
    "a\n",
    "\x00",
    "\ud800",
    "=",
    "=1 passed, ",
    "FAILED a::b - ",
    "`",
    "“",
    "-a",
    "/a",
    "1.",
    "1",
    "<",
    "E   ",
    "a.B\n\tat ",
    '{"a":',
    '[{"a":',
    "error at a line 1, ",
    "a: No such file ",
    "\x1b[",
    "a.a:1:",
    '{"error":"',
    "HTTP/1.1 404 ",
    "exit code ",
    "CompletedProcess(args=",
    "x: a b c d e f g ",
    "thread 'main' panicked at ",
    "a:1:in `",
]


@pytest.mark.parametrize("unit", UNITS)
def test_hostile_text_costs_no_more_the_longer_it_is(unit: str) -> None:
    """Twenty kilobytes of what patterns stumble over cost about twice ten, and a megabyte hardly more than that."""

    def seconds(size: int) -> float:
        text, best = (unit * (size // len(unit) + 1))[:size], float("inf")
        for _ in range(3):
            started = time.process_time()
            read(text, tool=text[:5_000], arguments=text)
            read(text, **shell("python x.py"))
            signature_of(text)
            best = min(best, time.process_time() - started)
        return best

    small = seconds(10_000)
    assert seconds(20_000) < 6 * small + 0.02
    assert seconds(1_000_000) < 20 * small + 0.1


PIECES = [*UNITS, *GOOD, *BAD, TRACE, "\nExit code: 1\n", '{"exit_code": 1, "stdout": "', '"}', "\r", "make: *** "]
MIXED = ANY_TEXT | st.lists(st.sampled_from(PIECES) | ANY_TEXT, max_size=12).map("".join)


@given(MIXED, MIXED, MIXED)
def test_any_text_is_read(observation: str, tool: str, arguments: str) -> None:
    """Whatever comes, a reading comes back: one of three verdicts, with a signature only on failure."""
    reading = read(observation, tool=tool, arguments=arguments)
    assert reading.verdict in ("success", "failure", "unknown")
    assert reading.signature is None or reading.verdict == "failure"
    if reading.signature is not None:
        reading.signature.key.encode("utf-8")


KEYS = st.sampled_from(["exit_code", "error", "status", "content", "text", "stdout", "result", "isError"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)))
def test_any_json_is_read(value: Any) -> None:
    """A JSON result of any form is read without a fault, through a shell and through a tool of its own."""
    text = json.dumps(value)
    for call in (shell("python x.py"), shell("cat x"), {"tool": "fetch", "arguments": text}, {}):
        assert read(text, **call).verdict in ("success", "failure", "unknown")


def test_json_that_is_deep_or_huge_is_read() -> None:
    """Nesting beyond the parser's depth, and a number of a thousand digits, are text like any other."""
    for text in (
        "[{" * 9_000,
        '{"a":' * 9_000,
        '{"exit_code": ' + "9" * 9_000 + "}",
        '[{"a":' + "[" * 900 + "]" * 900 + "}]",
    ):
        assert read(text, **shell("python x.py")).verdict in ("unknown", "failure")
