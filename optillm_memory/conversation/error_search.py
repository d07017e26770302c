"""Search for errors in a text: the patterns of `error_patterns` applied to its lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from optillm_memory.conversation.error_patterns import ANY, ERROR_PATTERNS, HEADER, QUALIFIED, TRACEBACK, ErrorPattern

_SUFFIX = {
    "c": "c", "h": "c", "cc": "cpp", "cpp": "cpp", "cxx": "cpp", "hpp": "cpp", "java": "java", "py": "python",
    "pyi": "python", "go": "go", "rs": "rust", "ts": "typescript", "tsx": "typescript", "kt": "kotlin",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FoundError:
    """An error in a text: its pattern, class and message, and the index of its line."""

    pattern: ErrorPattern
    error: str
    message: str
    line: int
    language: str
    program: str = ""


_CLASS = re.compile(r"^(?:[\w.]{1,80}\.)?(?P<error>[A-Z]\w{1,60}(?:Error|Exception))(?:: (?P<message>.*))?$")
_ERROR_WORDS = (
    "error", "exception", "fatal", "failed", "failure", "cannot", "can't", "denied", "refused", "invalid", "unable",
    "not found", "no such", "unknown", "unexpected", "could not", "missing", "timed out", "timeout", "abort", "killed",
)  # fmt: skip
_MAX_LINES_TRIED = 24  # lines that one pattern is tried on


def lines_of(text: str, head: int = 60, tail: int = 160) -> list[str]:
    """Return the non-empty lines at a text's ends, each cut to 400 characters."""
    lines = [line[:400].rstrip() for line in text.split("\n") if line and not line.isspace()]
    return lines if len(lines) <= head + tail else [*lines[:head], *lines[-tail:]]


def find_errors(lines: Sequence[str]) -> list[FoundError]:
    """Return the first match of each pattern, in the order of the pattern table (most specific first)."""
    text = "\n".join(lines)
    traceback = _traceback_error(lines) if HEADER in text else None
    found = []
    for pattern in ERROR_PATTERNS:
        if pattern is TRACEBACK and traceback:
            found.append(traceback)
        if pattern.needs not in text or pattern is TRACEBACK:
            continue
        order = range(len(lines)) if pattern.pick == "first" else range(len(lines) - 1, -1, -1)
        near = [index for index in order if pattern.context or pattern.needs in lines[index]]
        for index in near if pattern.context else near[:_MAX_LINES_TRIED]:
            if match := pattern.pattern.match(lines[index]):
                found.append(_found(pattern, match, index, lines))
                break
    return found


def _traceback_error(lines: Sequence[str]) -> FoundError | None:
    """Return the exception of the last traceback: the first line after its header that is not indented under it."""
    start = max(index for index, line in enumerate(lines) if HEADER in line)
    grouped = "Exception Group" in lines[start]
    for index in range(start + 1, len(lines)):
        line = lines[index][4:] if grouped else lines[index]
        if line and not line[0].isspace():
            match = TRACEBACK.pattern.match(line)
            return _found(TRACEBACK, match, index, lines) if match else None
    return None


def generic_error(lines: Sequence[str]) -> FoundError | None:
    """Return the first line that contains a word for an error, else the last line."""
    for index, line in enumerate(lines):
        lowered = line.lower()
        for word in _ERROR_WORDS:
            if word in lowered:
                match = _CLASS.match(line)
                error, message = (match["error"], match["message"] or "") if match else (word, line.strip())
                return FoundError(ANY, error, message[:400], index, "text")
    return FoundError(ANY, "", lines[-1].strip()[:400], len(lines) - 1, "text") if lines else None


def _found(pattern: ErrorPattern, match: re.Match[str], index: int, lines: Sequence[str]) -> FoundError:
    groups = match.groupdict()
    error, message = groups.get("error") or pattern.error, groups.get("message") or ""
    where = groups.get("where") or ""
    language = pattern.language or _SUFFIX.get(where.rpartition(".")[2].lower(), "compiler")
    if not message and pattern.language in ("rust", "cmake", "cpp") and index + 1 < len(lines):
        message = lines[index + 1].strip()  # these print the message on the next line
    if pattern.basis == "test_summary" and where:
        error, message = _test_error(where, message or _first_pytest_exception(lines))
    elif pattern.basis == "test_summary" and pattern.language not in ("tap", "python"):
        message = f"{message}: {_test_reason(lines, index)}"
    if not pattern.language and (code := re.search(r"\[(-W[\w=+-]{1,80}|[a-z][a-z-]{2,60})\]$", message)):
        error, message = code[1], message[: code.start()].rstrip()
    return FoundError(pattern, error, message, index, language, groups.get("prog") or "")


_EXCEPTION = re.compile(
    rf"^(?P<error>{QUALIFIED}(?:Error|Exception|Exit|Interrupt|Warning|NotFound))(?:: (?P<message>.*))?$"
)


def _test_error(where: str, message: str) -> tuple[str, str]:
    """Return the class and message of a failed test from pytest's short summary."""
    name = where.rpartition("::")[2].partition("[")[0] if "::" in where else "collection"
    if match := _EXCEPTION.match(message):
        return match["error"], f"{name}: {match['message'] or ''}"
    return ("AssertionError" if message.startswith("assert") else "failed"), f"{name}: {message}"


def _first_pytest_exception(lines: Sequence[str]) -> str:
    """Return the first exception that pytest prints: its summary names only the file that did not import."""
    return next(
        (line[1:].strip() for line in lines if line.startswith("E   ") and _EXCEPTION.match(line[1:].strip())), ""
    )


def _test_reason(lines: Sequence[str], index: int) -> str:
    """Return the reason of a failed test: the first line after its name that is no heading."""
    for line in lines[index + 1 : index + 12]:
        bare = line.strip()
        if bare and not bare.startswith(("---", "===", "thread ", "FAIL", "test ", "failures:", "running")):
            return bare[:300]
    return ""
