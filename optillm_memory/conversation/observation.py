"""The verdict on an action from its observation: from exit codes, and from fixed formats in which tools report.

Text is evidence only in a tool's own fixed format. A program's free text, and the content of a file, a page or a log,
is no evidence. When in doubt the verdict is `unknown`.

An exit code is the harness's, and no program's, where it stands in the same frame in each of the tool's results nearby,
and these come from more than one command.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from optillm_memory.conversation.commands import Command, command_of
from optillm_memory.conversation.error_search import FoundError, find_errors, lines_of
from optillm_memory.conversation.reports import report_of
from optillm_memory.conversation.signature import Signature, signature_in
from optillm_memory.conversation.tool_errors import tool_error
from optillm_memory.conversation.wrapping import Frame, ToolResult, ends_of, unwrap
from optillm_memory.records import Verdict

_ADVICE = re.compile(
    r"^(?:Try '|Usage: |usage: |hint: |See '|\t|make: Leaving directory|note: |For more information|  )"
)
_GIT_COMMIT = re.compile(r"^\[[\w./-]{1,100} (?:\(root-commit\) )?[0-9a-f]{7,40}\] ")
_GIT_DONE = re.compile(
    r"^(?:\[[\w./-]{1,100} (?:\(root-commit\) )?[0-9a-f]{7,40}\] |Switched to (?:a new )?branch '|"
    r"Already up to date\.$|Fast-forward$|Merge made by |Initialized empty Git repository|Successfully rebased )"
)
_COMMITS = re.compile(r"\bgit\b[^|;&\n]{0,200}\bcommit\b")
_FILE_ERROR = re.compile(
    r"no such file|not found|does not exist|permission denied|is a directory|can(?:not|'t) (?:open|access|read)",
    re.IGNORECASE,
)
_TOOL_ERROR = re.compile(r"^Error (?:executing|running|calling|invoking) (?:the )?(?:tool|function)\b")
_DATA_FILE = re.compile(r"\.(?:jsonl?|log|txt|ya?ml)\b")
_WORD = re.compile(r"[^\s'\"`\u2018\u2019\u201c\u201d|;&<>()]{1,300}")
_HTTP_BAD = re.compile(r"^HTTP/\d(?:\.\d)? [45]\d\d\b")
_SHELLS = ("bash", "sh", "zsh", "dash", "fish", "-bash", "/bin/sh", "/bin/bash")
NEARBY = 8  # results before one, in which a harness's frame must stand
_ANSWER = 1  # the exit code by which grep, diff and test answer "no"


@dataclass(frozen=True, slots=True)
class Reading:
    """The verdict on an action, and the basis of it; `signature` is that of its error, if it failed."""

    verdict: Verdict
    exit_code: int | None = None
    basis: str = ""
    signature: Signature | None = None


class Result(NamedTuple):
    """A result of a tool, with the arguments of the call."""

    arguments: str
    observation: str


def read(observation: str, others: Sequence[Result] = (), /, *, tool: str = "", arguments: str = "") -> Reading:
    """Return an observation's verdict, exit code and, on failure, the error's signature.

    `tool` and `arguments` are those of the call; they distinguish a program's own output from content that it displays.
    `others` are the tool's results nearby (`nearby`): without any, an exit code in the text proves nothing.
    """
    command = command_of(tool, arguments)
    result = unwrap(observation)
    if command.views and result.structured and not result.wraps and not _is_own_result(command, result):
        result = ToolResult(ends_of(observation))  # the content is JSON, not the tool's format
    code = None if command.shows_content else _harness_code(result, tool, arguments, others)
    lines = lines_of(result.text)
    found = find_errors(lines)
    verdict, basis = _verdict_of(result, code, command, lines, found)
    status = result.http_status
    if verdict == "unknown" and (own := tool_error(tool, command, lines)) is not None:
        verdict, basis, status = "failure", own.basis, own.status
    if verdict != "failure":
        return Reading(verdict, code, basis)
    if basis == "http" and status is not None:
        signature: Signature | None = Signature("http", str(status), "", ())
    else:
        signature = signature_in(lines, structured=result.error, found=_relevant_errors(command, found))
    return Reading(verdict, result.own_code if code is None else code, basis, signature)


def nearby(results: Sequence[Result], index: int, tool: str) -> list[Result]:
    """Return those of a tool's results, in order, that tell whether the one at an index is in the harness's frame.

    These are a few before it and, where they are of one source, those after it up to the first of another.
    """
    if command_of(tool, results[index].arguments).shows_content:
        return []
    own = _source(tool, results[index].arguments)
    found = list(results[max(0, index - NEARBY) : index])
    if all(_source(tool, item.arguments) == own for item in found):
        for item in results[index + 1 : index + 1 + NEARBY]:
            found.append(item)
            if _source(tool, item.arguments) != own:
                break
    return found


def _source(tool: str, arguments: str) -> Hashable:
    """Return what the results of one program's making have in common: pages and files may all be one author's."""
    command = command_of(tool, arguments)
    return command.programs if command.views else arguments


@lru_cache(maxsize=64)  # each result is compared with those before it
def _frames_in(observation: str) -> frozenset[Frame]:
    return frozenset(frame for frame, _ in unwrap(observation).codes)


def _harness_code(result: ToolResult, tool: str, arguments: str, others: Sequence[Result]) -> int | None:
    """Return the exit code that the harness tells: the one in a frame that all results share; None if in doubt."""
    if not result.codes or len({_source(tool, a) for a in (arguments, *(o.arguments for o in others))}) == 1:
        return None
    frames = [_frames_in(other.observation) for other in others]
    codes = {code for frame, code in result.codes if all(frame in known for known in frames)}
    return codes.pop() if len(codes) == 1 else None


def tests_of(observation: str, *, tool: str, arguments: str) -> Verdict:
    """Return how the tests went that an action ran; unknown where it ran none, or only shows what others printed."""
    command = command_of(tool, arguments)
    report = report_of(lines_of(unwrap(observation).text)) if command.runs_tests and not command.views else None
    return report[0] if report is not None and report[1] == "test_summary" else "unknown"


def is_commit(observation: str, *, tool: str, arguments: str) -> bool:
    """Whether an action made a commit, as git says."""
    command = command_of(tool, arguments)
    if command.views or not ("git" in command.programs and _COMMITS.search(command.names)):
        return False
    return any(_GIT_COMMIT.match(line) for line in lines_of(unwrap(observation).text))


def _is_own_result(command: Command, result: ToolResult) -> bool:
    """Whether a viewing tool returned an error of its own, and not a file that contains one."""
    failed = result.failed or result.http_status is not None
    return failed and command.dedicated and not _DATA_FILE.search(command.names)


def _relevant_errors(command: Command, found: list[FoundError]) -> list[FoundError]:
    """Return the errors that belong to the call: of a viewing tool only its own, not those in the content."""
    return [f for f in found if _is_own_error(command, f)] if command.views else found


def _verdict_of(
    result: ToolResult, code: int | None, command: Command, lines: Sequence[str], found: list[FoundError]
) -> tuple[Verdict, str]:
    text_verdict = None if command.views else _text_verdict(command, lines, found)
    viewer_error = _viewer_error(command, lines, found, coded=bool(code)) if command.views else None
    if code is None and result.own_code and not command.views:
        code = result.own_code
    if code is not None:
        return _exit_code_verdict(code, command, text_verdict, has_error=viewer_error is not None)
    if (result.http_status or 0) >= 400 and not (command.views and not command.dedicated):  # noqa: PLR2004
        return "failure", "http"  # that something was fetched is no success
    if result.failed and (result.structured or not command.views or len(lines) <= 2):  # noqa: PLR2004
        return "failure", "tool_error"
    if command.dedicated and lines and _TOOL_ERROR.match(lines[0]):
        return "failure", "tool_error"
    if viewer_error:
        return "failure", viewer_error
    return (_fetch_verdict(command, lines) if command.views else text_verdict) or ("unknown", "")


def _exit_code_verdict(
    code: int, command: Command, text_verdict: tuple[Verdict, str] | None, *, has_error: bool
) -> tuple[Verdict, str]:
    failed = text_verdict if text_verdict is not None and text_verdict[0] == "failure" else None
    if code == 0:
        # The exit code is from a program after the one that did the work: `pytest | tail`, `make || true`.
        hidden = failed if command.masks and failed is not None and failed[1] != "shell" else None
        return hidden or ("success", "exit_code")
    if code == _ANSWER and command.compares and not has_error and failed is None:
        return "unknown", "exit_code"
    return "failure", "exit_code"


def _fetch_verdict(command: Command, lines: Sequence[str]) -> tuple[Verdict, str]:
    """Return the verdict on fetched content: an HTTP status line (`curl -i`) tells a failure, nothing a success."""
    if command.programs[-1:] == ("curl",) and lines and _HTTP_BAD.match(lines[0]):
        return "failure", "http"
    return "unknown", ""


def _viewer_error(command: Command, lines: Sequence[str], found: list[FoundError], *, coded: bool) -> str | None:
    """Return the basis of a viewing tool's own error: a line with the tool's name and a name from the call.

    With a failing exit code (`coded`) a first or last line with the tool's name is enough.
    """
    for error in found:
        alone = command.single or error.line == len(lines) - 1
        outer = coded and error.line in (0, len(lines) - 1)
        if alone and _is_own_error(command, error) and (outer or _mentions(command, lines[error.line])):
            return error.pattern.basis
    if command.dedicated and lines:
        for line in (lines[0], lines[-1]):
            if _FILE_ERROR.search(line) and _mentions(command, line):
                return "tool_error"
    return None


def _is_own_error(command: Command, error: FoundError) -> bool:
    if error.program:
        name = error.program.rpartition("/")[2]
        return name in command.programs or error.program in _SHELLS
    if error.language == "git":
        return "git" in command.programs and error.line == 0
    return error.language in ("curl", "http") and "curl" in command.programs


def _mentions(command: Command, line: str) -> bool:
    """Whether a line contains a name from the call, which a file's content is unlikely to."""
    if "git" in command.programs or "curl" in command.programs:
        return True
    named = {word for word in _WORD.findall(command.names) if word not in command.programs}
    return any(word.strip(":.,") in named for word in _WORD.findall(line))


def _text_verdict(command: Command, lines: Sequence[str], found: list[FoundError]) -> tuple[Verdict, str] | None:
    """Return the verdict that the text alone proves for a program, and its basis."""
    report = report_of(lines)
    last = len(lines) - 1
    while last > 0 and _ADVICE.match(lines[last]):
        last -= 1
    # Passing tests may print any error: only errors after their report count.
    start = report[2] if report is not None and report[:2] == ("success", "test_summary") else -1
    for error in found:
        if error.line > start and _proves(command, error, lines, last):
            return "failure", error.pattern.basis
    if report is not None:
        verdict, basis, _ = report
        own = command.runs_tests if basis == "test_summary" else command.reports
        return (verdict, basis) if verdict == "failure" or own else None
    if "git" in command.programs and command.single and any(_GIT_DONE.match(line) for line in lines[-4:]):
        return "success", "shell"
    return None


def _proves(command: Command, error: FoundError, lines: Sequence[str], last: int) -> bool:
    proof = error.pattern.proof
    if proof in ("never", "always"):
        return proof == "always"
    if proof == "last":
        return error.line >= last or _trails_off(error, lines)
    # The program's own error: anywhere if it was the only program, else only in the last line.
    if error.program:
        name = error.program.rpartition("/")[2]
        named = {word.rpartition("/")[2] for word in _WORD.findall(command.names)}  # `python py/args.py`
        known = name in command.programs or error.program in _SHELLS or name in named
        if command.programs and not known:
            return False
    elif not command.ran(*_PROGRAMS.get(error.language, ())):
        return False
    if command.ends_idle:
        return False  # `rm x; true`: the error was expected
    return (command.single and bool(command.programs)) or error.line >= last


_PROGRAMS = {
    "git": ("git",),
    "psql": ("psql",),
    "mysql": ("mysql", "mariadb"),
    "sqlite3": ("sqlite3",),
    "http": ("curl", "wget", "http"),
    "perl": ("perl",),
    "apt": ("apt", "apt-get"),
    "cli": ("git", "cargo", "rustc", "pip", "pip3", "pytest", "npm", "uv", "poetry", "javac", "rustup", "ruff", "go"),
}


def _trails_off(error: FoundError, lines: Sequence[str]) -> bool:
    """Whether only the rest of a traceback follows the error: frames, a cause, the runtime's version."""
    rest = lines[error.line + 1 :]
    return all(_FRAME.match(line) for line in rest)


_FRAME = re.compile(
    r"^(?:\s|[|+]|Caused by: |\.\.\. \d|Node\.js v|note: |stack backtrace|goroutine |exit status |main\.|\}$|\d{1,4}: |"
    r"called `|left: |right: |Aborted|Execution of|BEGIN failed|--->|#\d|Segmentation|index out|explicit panic)"
)
