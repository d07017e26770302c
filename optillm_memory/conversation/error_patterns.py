"""The patterns in which languages, compilers, shells and services print an error.

A pattern matches the start of one line; `needs` is a substring without which it cannot match. Repetitions are
bounded and none is nested: matching time is linear in the line's length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# Where a match proves a failure if no exit code is known:
#   always: anywhere; last: only at the end of the output, since programs log such errors and go on;
#   own: as an error of the program that was called; never: it only describes the failure.
Proof = Literal["always", "last", "own", "never"]


@dataclass(frozen=True, slots=True)
class ErrorPattern:
    """One form in which an error is printed; `pick` selects the cause among several matches in one text.

    With `context` the needed substring is on another line than the error itself.
    """

    needs: str
    pattern: re.Pattern[str]
    basis: str
    language: str
    proof: Proof
    pick: Literal["first", "last"] = "first"
    error: str = ""
    context: bool = False


def _pattern(
    needs: str,
    pattern: str,
    basis: str,
    language: str,
    proof: Proof,
    pick: Literal["first", "last"] = "first",
    error: str = "",
    *,
    context: bool = False,
) -> ErrorPattern:
    return ErrorPattern(needs, re.compile(pattern), basis, language, proof, pick, error, context)


_PHRASE = (
    r"command not found|No such file or directory|Permission denied|Is a directory|Not a directory|File exists|"
    r"Directory not empty|Read-only file system|No space left on device|Connection refused|Operation not permitted|"
    r"not found|unbound variable|syntax error|unrecognized option|invalid option|unknown option|missing operand|"
    r"extra operand|invalid argument|cannot execute|Argument list too long|bad substitution|"
    r"Assertion|No such process|Too many open files|Device or resource busy|is not a directory"
)
QUALIFIED = r"(?:[A-Za-z_$][\w$]{0,80}\.){0,12}[A-Z][\w$]{0,100}"

HEADER = "Traceback (most recent call last):"
TRACEBACK = _pattern(
    HEADER,
    rf"^(?P<error>{QUALIFIED}|[a-z_]\w{{0,60}}(?:\.[A-Za-z_]\w{{0,80}}){{1,8}})(?:: (?P<message>.*))?$",
    "traceback",
    "python",
    "last",
    "last",
)

# The most specific first: of several that match, the first in the table is the error.
ERROR_PATTERNS: tuple[ErrorPattern, ...] = (
    _pattern("FAILED ", r"^FAILED (?P<where>\S{1,200}(?:::|\.py)\S{0,200})(?: - (?P<message>.+))?$",
           "test_summary", "python", "always"),
    _pattern("ERROR ", r"^ERROR (?P<where>\S{1,300}\.py\S{0,200})(?: - (?P<message>.+))?$",
           "test_summary", "python", "never"),
    _pattern("--- FAIL: ", r"^\s{0,16}--- FAIL: (?P<message>\S{1,200}) \(",
           "test_summary", "go", "always", "last", "FAIL"),
    _pattern("... FAILED", r"^test (?P<message>\S{1,200}) \.\.\. FAILED$",
           "test_summary", "rust", "always", "first", "FAILED"),
    _pattern("●", r"^\s{0,4}● (?P<message>.+)$", "test_summary", "javascript", "never", "first", "FAIL"),
    _pattern("not ok ", r"^\s{0,8}not ok \d{1,6} (?:- )?(?P<message>.+)$",
           "test_summary", "tap", "never", "first", "not ok"),
    _pattern("✖ ", r"^✖ (?P<message>.{1,300}?) \([\d.]{1,20}m?s\)$",
           "test_summary", "javascript", "never", "first", "FAIL"),
    _pattern("<<< ", r"^(?:\[ERROR\] )?(?P<message>\S{1,300}) -- .{1,60}<<< (?P<error>FAILURE|ERROR)!",
           "test_summary", "java", "always"),
    TRACEBACK,
    _pattern('File "', r"^(?P<error>SyntaxError|IndentationError|TabError): (?P<message>.*)$",
           "traceback", "python", "last", "last", context=True),
    _pattern("E   ", rf"^E   {{1,8}}(?P<error>{QUALIFIED}(?:Error|Exception))(?:: (?P<message>.*))?$",
           "test_summary", "python", "never"),
    _pattern("panicked at", r"^thread '[^']{0,100}'(?: \(\d{1,12}\))? panicked at "
           r"(?:'(?P<message>.{1,400})', )?\S{0,300}:\d{1,7}:\d{1,7}:?$",
           "traceback", "rust", "last", "last", "panic"),
    _pattern("goroutine ", r"^panic: (?P<message>.+)$", "traceback", "go", "last", "first", "panic", context=True),
    _pattern("fatal error: ", r"^fatal error: (?P<message>all goroutines .{1,80})$",
           "traceback", "go", "always", "first", "deadlock"),
    _pattern("\tat ", r"^(?:Exception in thread \"[^\"]{0,100}\" |Caused by: )?"
           r"(?P<error>(?:[a-z_]\w{0,60}\.){1,12}[A-Z][\w$]{0,100})"
           r"(?:: (?P<message>.*))?$", "traceback", "java", "last", "last", context=True),
    _pattern("Caused by: ",
           r"^Caused by: (?P<error>(?:[a-z_]\w{0,60}\.){1,12}[A-Z][\w$]{0,100})(?:: (?P<message>.*))?$",
           "traceback", "java", "last", "last"),
    _pattern("    at ", rf"^(?:Uncaught )?(?P<error>{QUALIFIED})(?: \[\w{{1,80}}\])?: (?P<message>.*)$",
           "traceback", "javascript", "never",
           context=True),
    _pattern("Node.js v", r"^(?P<error>Node)\.js v(?P<message>\d{1,3}\.\d{1,4}\.\d{1,4})$",
           "traceback", "javascript", "last"),
    _pattern(":in ", r"^\S{1,300}:\d{1,7}:in [`'][^']{0,200}': (?P<message>.{1,600}) \((?P<error>[\w:]{1,100})\)$",
           "traceback", "ruby", "last"),
    _pattern(" error: ", r"^(?:PHP )?(?P<error>Fatal error|Parse error): {1,4}(?P<message>.{1,600}?)"
           r"(?: in \S{1,300}(?: on line |:)\d{1,7})?$",
           "traceback", "php", "always"),
    _pattern(" line ", r"^(?P<message>.{1,600}) at \S{1,300} line \d{1,7}[.,]",
           "traceback", "perl", "last", "first", "die"),
    _pattern("error[", r"^error\[(?P<error>E\d{4})\]: (?P<message>.+)$", "compiler", "rust", "always"),
    _pattern("could not compile", r"^error: (?P<message>could not compile .+)$",
           "compiler", "rust", "always", "first", "error"),
    _pattern("error:", r"^(?P<where>[^\s:][^:]{0,300})(?::\d{1,7}){1,2}: (?:fatal )?error: (?P<message>.+)$",
           "compiler", "", "always",
           "first", "error"),
    _pattern("error:", r"^(?P<where>[^\s:]{1,200}/[^\s:]{1,100}\.[a-z]{1,5}): error: (?P<message>.+)$",
           "compiler", "", "always", "first", "error"),
    _pattern("[ERROR] ", r"^\[ERROR\] (?P<where>\S{1,300}\.(?:java|kt)):\[\d{1,7},\d{1,7}\] (?P<message>.+)$",
           "compiler", "java", "always",
           "first", "error"),
    _pattern("error TS", r"^\S{1,300}(?:\(\d{1,7},\d{1,7}\):|:\d{1,7}:\d{1,7} -) "
           r"error (?P<error>TS\d{4,5}): (?P<message>.+)$",
           "compiler",
           "typescript", "always"),
    _pattern(".go:", r"^(?:vet: )?(?:\./)?[^\s:]{1,300}\.go:\d{1,7}:\d{1,7}: (?P<message>.+)$",
           "compiler", "go", "always", "first", "error"),
    _pattern("undefined reference", r"^.{0,400}: (?P<message>undefined reference to .+)$",
           "compiler", "c", "always", "first", "link"),
    _pattern("multiple definition", r"^.{0,400}: (?P<message>multiple definition of .+)$",
           "compiler", "c", "always", "first", "link"),
    _pattern("error: ", r"^(?:cc1(?:plus)?|gcc|g\+\+|clang|collect2|ld)(?:: fatal)?:? error: (?P<message>.+)$",
           "compiler", "c", "always",
           "first", "error"),
    _pattern("CMake Error", r"^CMake Error(?: at (?P<where>[^\s:]{1,300}):\d{1,7} \(\w{1,60}\))?: ?(?P<message>.*)$",
           "compiler", "cmake",
           "always", "first", "error"),
    _pattern(" rule.", r"^error: (?P<message>.{1,400} rule\..*)$", "compiler", "make", "always", "first", "error"),
    _pattern("invalid-syntax", r"^(?:\S{1,300}:\d{1,7}:\d{1,7}: )?invalid-syntax: (?P<message>.+)$",
           "compiler", "python", "never",
           "first", "SyntaxError"),
    _pattern("npm ", r"^npm (?:ERR!|error) code (?P<error>E\w{1,40}|\d{1,3})(?P<message>)$",
           "tool_error", "npm", "always"),
    _pattern("npm ", r"^npm (?:ERR!|error) (?P<message>.+)$", "tool_error", "npm", "always", "first", "error"),
    _pattern("HTTP/", r"^HTTP/\d(?:\.\d)? (?P<error>[45]\d\d)(?: (?P<message>.*))?$", "http", "http", "own"),
    _pattern("curl: (", r"^curl: \((?P<error>\d{1,3})\) (?P<message>.+)$", "http", "curl", "always"),
    _pattern("psql: error: ", r"^psql: error: (?P<message>.+)$", "sql", "psql", "always", "first", "connection"),
    _pattern(":  ", r"^(?:psql:\S{1,300} )?(?P<error>ERROR|FATAL|PANIC):  (?P<message>.+)$", "sql", "psql", "own"),
    _pattern("ERROR ", r"^ERROR (?P<error>\d{4} \(\w{1,10}\))(?: at line \d{1,7})?: (?P<message>.+)$",
           "sql", "mysql", "own"),
    _pattern(" error near line", r"^(?P<error>Parse|Runtime) error near line \d{1,7}: (?P<message>.+)$",
           "sql", "sqlite3", "own"),
    _pattern("Error: ", r"^Error: (?:(?P<error>in prepare|stepping), |near line \d{1,7}: )(?P<message>.+)$",
           "sql", "sqlite3", "own"),
    _pattern("fatal: ", r"^fatal: (?P<message>.+)$", "shell", "git", "own", "last", "fatal"),
    _pattern("git: ", r"^git: (?P<message>.+ is not a git command.*)$", "shell", "git", "own", "first", "command"),
    _pattern("CONFLICT", r"^(?P<error>CONFLICT) (?P<message>\(.+)$", "shell", "git", "own"),
    _pattern("we can merge", r"^(?P<message>merge: .+ not something we can merge)$",
           "shell", "git", "own", "first", "merge"),
    _pattern(" *** ", r"^g?make(?:\[\d{1,3}\])?: \*\*\* (?P<message>.+)$",
           "compiler", "make", "always", "first", "error"),
    _pattern(" *** ", r"^\S{1,300}:\d{1,7}: \*\*\* (?P<message>.+)$", "compiler", "make", "always", "first", "error"),
    _pattern("not found", r"^(?P<prog>zsh|fish): (?P<error>command not found): (?P<message>.+)$",
           "shell", "shell", "own", "last"),
    _pattern(": ", rf"^(?P<prog>-?[\w./+-]{{1,80}}): (?:line \d{{1,7}}: )?"
           rf"(?P<message>(?:.{{0,400}}?[ :])??(?P<error>{_PHRASE})\b.*)$",
           "shell", "shell", "own", "last"),
    _pattern(" failed.", r"^(?P<prog>[\w./+-]{1,80}): "
           r"(?P<message>\S{1,200}:\d{1,7}: .{1,200}(?P<error>Assertion) .{1,400} failed\.)$",
           "traceback", "c", "last", "last"),
    _pattern("terminate called",
           r"^terminate called after throwing an instance of '(?P<error>[^']{1,200})'(?P<message>)$",
           "traceback",
           "cpp", "always"),
    _pattern("error: ", r"^(?P<prog>[\w./+-]{1,80}(?: [\w-]{1,40})?): error: (?P<message>.+)$",
           "tool_error", "cli", "own", "first", "usage"),
    _pattern("Can't open perl", r"^(?P<message>Can't open perl script .+)$",
           "tool_error", "perl", "own", "first", "open"),
    _pattern("No module named", r"^\S{1,200}: (?P<message>No module named .+)$",
           "tool_error", "python", "last", "last", "ModuleNotFoundError"),
    _pattern("can't open file", r"^\S{1,200}: (?P<message>can't open file .+)$",
           "tool_error", "python", "last", "last", "FileNotFoundError"),
    _pattern("Could not find or load", r"^Error: (?P<message>Could not find or load main class .+)$",
           "tool_error", "java", "always",
           "first", "ClassNotFoundException"),
    _pattern("E: ", r"^E: (?P<message>.+)$", "tool_error", "apt", "own", "first", "E"),
    _pattern("ERROR: ", r"^ERROR: (?P<message>.+)$", "tool_error", "cli", "own", "first", "ERROR"),
    _pattern("error: ", r"^error: (?P<message>.+)$", "tool_error", "cli", "own", "first", "error"),
)  # fmt: skip
ANY = _pattern("", r"^", "", "text", "never")
