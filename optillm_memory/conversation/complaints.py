"""Where in a text an error is said, and what it says: the shapes of `shapes.py` looked for in its lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from optillm_memory.conversation.shapes import ANY, HEADER, QUALIFIED, SHAPES, TRACEBACK, Shape

_SUFFIX = {
    "c": "c", "h": "c", "cc": "cpp", "cpp": "cpp", "cxx": "cpp", "hpp": "cpp", "java": "java", "py": "python",
    "pyi": "python", "go": "go", "rs": "rust", "ts": "typescript", "tsx": "typescript", "kt": "kotlin",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """A shape met in a text: the error's class and message, and the number of its line."""

    shape: Shape
    error: str
    message: str
    line: int
    language: str
    program: str = ""


_CLASS = re.compile(r"^(?:[\w.]{1,80}\.)?(?P<error>[A-Z]\w{1,60}(?:Error|Exception))(?:: (?P<message>.*))?$")
_WORDS = (
    "error", "exception", "fatal", "failed", "failure", "cannot", "can't", "denied", "refused", "invalid", "unable",
    "not found", "no such", "unknown", "unexpected", "could not", "missing", "timed out", "timeout", "abort", "killed",
)  # fmt: skip
_TRIES = 24  # how many lines one shape is tried on


def lines_of(text: str, head: int = 60, tail: int = 160) -> list[str]:
    """Return the non-empty lines at a text's ends, each cut to 400 characters."""
    lines = [line[:400].rstrip() for line in text.split("\n") if line and not line.isspace()]
    return lines if len(lines) <= head + tail else [*lines[:head], *lines[-tail:]]


def find_errors(lines: Sequence[str]) -> list[Found]:
    """Return the error of each shape that is met, the most telling first."""
    text = "\n".join(lines)
    traceback = _of_traceback(lines) if HEADER in text else None
    found = []
    for shape in SHAPES:
        if shape is TRACEBACK and traceback:
            found.append(traceback)
        if shape.needs not in text or shape is TRACEBACK:
            continue
        order = range(len(lines)) if shape.pick == "first" else range(len(lines) - 1, -1, -1)
        near = [index for index in order if shape.context or shape.needs in lines[index]]
        for index in near if shape.context else near[:_TRIES]:
            if match := shape.pattern.match(lines[index]):
                found.append(_found(shape, match, index, lines))
                break
    return found


def _of_traceback(lines: Sequence[str]) -> Found | None:
    """Return the exception of the last traceback: the first line after its header that is not indented under it."""
    start = max(index for index, line in enumerate(lines) if HEADER in line)
    grouped = "Exception Group" in lines[start]
    for index in range(start + 1, len(lines)):
        line = lines[index][4:] if grouped else lines[index]
        if line and not line[0].isspace():
            match = TRACEBACK.pattern.match(line)
            return _found(TRACEBACK, match, index, lines) if match else None
    return None


def generic_error(lines: Sequence[str]) -> Found | None:
    """Return the first line with a word for an error in it, or else the last line."""
    for index, line in enumerate(lines):
        lowered = line.lower()
        for word in _WORDS:
            if word in lowered:
                match = _CLASS.match(line)
                error, message = (match["error"], match["message"] or "") if match else (word, line.strip())
                return Found(ANY, error, message[:400], index, "text")
    return Found(ANY, "", lines[-1].strip()[:400], len(lines) - 1, "text") if lines else None


def _found(shape: Shape, match: re.Match[str], index: int, lines: Sequence[str]) -> Found:
    groups = match.groupdict()
    error, message = groups.get("error") or shape.error, groups.get("message") or ""
    where = groups.get("where") or ""
    language = shape.language or _SUFFIX.get(where.rpartition(".")[2].lower(), "compiler")
    if not message and shape.language in ("rust", "cmake", "cpp") and index + 1 < len(lines):
        message = lines[index + 1].strip()  # these print the message on a line of its own
    if shape.basis == "test_summary" and where:
        error, message = _of_test(where, message or _first_of_pytest(lines))
    elif shape.basis == "test_summary" and shape.language not in ("tap", "python"):
        message = f"{message}: {_detail(lines, index)}"
    if not shape.language and (code := re.search(r"\[(-W[\w=+-]{1,80}|[a-z][a-z-]{2,60})\]$", message)):
        error, message = code[1], message[: code.start()].rstrip()
    return Found(shape, error, message, index, language, groups.get("prog") or "")


_EXCEPTION = re.compile(
    rf"^(?P<error>{QUALIFIED}(?:Error|Exception|Exit|Interrupt|Warning|NotFound))(?:: (?P<message>.*))?$"
)


def _of_test(where: str, message: str) -> tuple[str, str]:
    """Return the class and message of a failed test: its name, and what pytest says of it in short."""
    name = where.rpartition("::")[2].partition("[")[0] if "::" in where else "collection"
    if match := _EXCEPTION.match(message):
        return match["error"], f"{name}: {match['message'] or ''}"
    return ("AssertionError" if message.startswith("assert") else "failed"), f"{name}: {message}"


def _first_of_pytest(lines: Sequence[str]) -> str:
    """Return what pytest shows of the first exception, for its summary names only the file that did not import."""
    return next(
        (line[1:].strip() for line in lines if line.startswith("E   ") and _EXCEPTION.match(line[1:].strip())), ""
    )


def _detail(lines: Sequence[str], index: int) -> str:
    """Return the line in which a test says why it failed: the first after its name that is not another heading."""
    for line in lines[index + 1 : index + 12]:
        bare = line.strip()
        if bare and not bare.startswith(("---", "===", "thread ", "FAIL", "test ", "failures:", "running")):
            return bare[:300]
    return ""
