"""The closing reports of test runners, builds and linters, in their fixed formats."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optillm_memory.records import Verdict

_LAST = 14  # non-empty lines from the end in which a report's closing lines are looked for
_PYTEST = re.compile(
    r"^(?:=+ )?(?P<counts>(?:no tests ran|\d+ [a-z]+(?:, \d+ [a-z]+){0,9})) in \d+[\d.:]*s(?: \([\d:]+\))?(?: =+)?$"
)
_COUNT = re.compile(r"(\d{1,9}) ([a-z]+)")
_RAN = re.compile(r"^Ran \d+ tests? in \d")
_UNITTEST = re.compile(r"^(?P<good>OK)(?: \([a-z0-9=, ]{1,80}\))?$|^FAILED \([a-z0-9=, ]{1,80}\)$")
_JEST = re.compile(r"^\s{0,12}(?:Tests|Test Suites|Test Files):?\s+(?P<counts>\d[^\n]{0,120}?(?:\d+ total|\(\d+\)))$")
_GO_OK = re.compile(r"^ok\s{1,4}\S{1,200}\s(?:\d[\d.]*s|\(cached\))")
_GO_BAD = re.compile(r"^(?:FAIL|FAIL\s\S{1,200}(?:\s\d[\d.]*s|\s\[[a-z ]+\])|--- FAIL: \S{1,200} \([\d.]+s\))$")

# (basis, pattern of a closing line, verdict); the groups `bad` count failures: any above zero is a failure.
_CLOSING: tuple[tuple[str, str, str], ...] = (
    ("test_summary", r"^test result: (?:(?P<good>ok)|FAILED)\. \d+ passed; \d+ failed", ""),
    ("test_summary", r"^(?:# |\u2139 )fail (?P<bad>\d+)$", ""),
    ("test_summary", r"^OK \(\d+ tests?(?:, \d+ assertions?)?\)$", "success"),
    ("test_summary", r"^(?:\[\w+\] )?Tests run: \d+,\s+Failures: (?P<bad>\d+)(?:, Errors: (?P<bad2>\d+))?", ""),
    ("test_summary", r"^Tests: \d+, Assertions: \d+, (?:Failures|Errors): (?P<bad>\d+)", ""),
    ("test_summary", r"^\d+ (?:runs|tests|examples), .{0,30}\b(?P<bad>\d+) failures?(?:, (?P<bad2>\d+) errors?)?", ""),
    ("test_summary", r"^\d+% tests passed, (?P<bad>\d+) tests failed out of \d+$", ""),
    ("test_summary", r"^Result: (?:(?P<good>PASS)|FAIL)$", ""),
    ("test_summary", r"^(?:(?P<good>Passed)|Failed)!\s+- Failed:\s+\d+, Passed:\s+\d+", ""),
    ("test_summary", r"^No tests found, exiting with code 1$", "failure"),
    ("compiler", r"^(?:\[\w+\] )?BUILD (?:(?P<good>SUCCESS|SUCCESSFUL in .{1,40})|FAILURE|FAILED(?: in .{1,40})?)$",
     ""),
    ("compiler", r"^Success: no issues found in \d+ source files?$", "success"),
    ("compiler", r"^Found \d+ errors? in \d+ files?", "failure"),
    ("compiler", r"^All checks passed!$", "success"),
    ("compiler", r"^Found [1-9]\d* errors?(?:\.| \()", "failure"),
    ("compiler", r"^(?:\d+ files? would be reformatted|Would reformat: \S)", "failure"),
    ("compiler", r"^\d+ files? (?:already formatted|left unchanged)$", "success"),
    ("compiler", r"^✖ \d+ problems? \((?P<bad>\d+) errors?, \d+ warnings?\)$", ""),
    ("compiler", r"^\s{0,8}Finished (?:`[\w-]+`|[\w-]+) (?:profile )?\[[\w +]+\] target\(s\) in [\d.ms ]+$", "success"),
    ("compiler", r"^-- Build files have been written to: \S", "success"),
    ("compiler", r"^\[100%\] Built target \S+$", "success"),
    ("compiler", r"^make: (?:'[^']{1,200}' is up to date|Nothing to be done for '[^']{1,200}')\.$", "success"),
    ("shell", r"^(?:added|up to date|changed|removed) (?:\d+ packages?|in \d).{0,200}$", "success"),
    ("shell", r"^Successfully installed \S", "success"),
)  # fmt: skip
_LINES = tuple((basis, re.compile(pattern), verdict) for basis, pattern, verdict in _CLOSING)


def report_of(lines: Sequence[str]) -> tuple[Verdict, str, int] | None:
    """Return (verdict, basis, index of the line) of a runner's, build's or linter's closing report, or None.

    `lines` are the output's non-empty lines. One failure among several reports makes the verdict a failure.
    """
    found: list[tuple[Verdict, str, int]] = []
    start = max(0, len(lines) - _LAST)
    last = [line.rstrip()[:400] for line in lines[-_LAST:]]
    for index, line in enumerate(last):
        verdict = _pytest(line) or _jest(line) or _go(line)
        if (
            verdict is None
            and (match := _UNITTEST.match(line))
            and any(_RAN.match(earlier) for earlier in last[:index])
        ):
            verdict = "success" if match["good"] else "failure"
        if verdict is not None:
            found.append((verdict, "test_summary", start + index))
            continue
        for basis, pattern, constant in _LINES:
            if match := pattern.match(line):
                found.append((_closing(match, constant), basis, start + index))
                break
    failures = [item for item in found if item[0] == "failure"]
    return failures[0] if failures else found[-1] if found else None


def _closing(match: re.Match[str], constant: str) -> Verdict:
    if constant:
        return "success" if constant == "success" else "failure"
    groups = match.groupdict()
    if "good" in groups:
        return "success" if groups["good"] else "failure"
    return "failure" if any(int(count) for count in groups.values() if count) else "success"


def _pytest(line: str) -> Verdict | None:
    match = _PYTEST.match(line)
    if not match:
        return None
    counts = {word.rstrip("s"): int(number) for number, word in _COUNT.findall(match["counts"])}
    if counts.get("failed") or counts.get("error"):
        return "failure"
    # No tests run is exit code 5; a mere collection gives no verdict.
    if "collected" in match["counts"] or "test" in counts:
        return None
    return "success" if counts.keys() & {"passed", "skipped", "xfailed", "xpassed", "subtest"} else "failure"


def _jest(line: str) -> Verdict | None:
    match = _JEST.match(line)
    if not match:
        return None
    counts = {word: int(number) for number, word in _COUNT.findall(match["counts"])}
    if counts.get("failed"):
        return "failure"
    return "success" if counts.get("passed") else None


def _go(line: str) -> Verdict | None:
    if _GO_BAD.match(line):
        return "failure"
    return "success" if _GO_OK.match(line) else None
