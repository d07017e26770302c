"""Kinds of tool calls: whether the output is the program's own, or shows content that is stored elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from optillm_memory.conversation.runners import reports, runs_tests

LIMIT = 4_000
_MAIN_WORDS = 12  # of a program's arguments in which a test runner is looked for
_COMMAND_KEYS = ("command", "cmd", "script", "code", "bash", "shell", "input", "commands", "keystrokes")
_VIEWING_TOOL = re.compile(
    r"(?:^|[_\W])(?:read|view|cat|open|search|grep|find|glob|list|ls|fetch|browse|web|get|show|logs?|diff|docs?|scroll|"
    r"edit|write|create|insert|patch)(?=$|[_\W])|str_?replace|"
    r"(?:Read|View|Search|Grep|Glob|Fetch|Edit|Write|List)(?=$|[A-Z_])"
)
_EXECUTING_TOOL = re.compile(
    r"run|exec|test|build|shell|bash|terminal|command|cmd|python|code|compile|lint|check|repl|notebook|eval|make|npm|"
    r"cargo|sql|install|deploy|process",
    re.IGNORECASE,
)
_PIECES = re.compile(
    # An unclosed quote extends to the end, so that no text is scanned twice.
    r"""'[^']*'?|"(?:[^"\\]|\\.)*"?|\|\||&&|\|&?|;|\n|[^\s'"|;&]+|&|\\""",
    re.DOTALL,
)
SEARCHERS = frozenset(("grep", "egrep", "fgrep", "zgrep", "rg", "ag", "ack", "findstr"))
_VIEWERS = SEARCHERS.union(
    (
        *("cat", "head", "tail", "less", "more", "nl", "bat", "batcat", "strings", "xxd", "od", "hexdump", "jq", "yq"),
        *("cut", "sort", "uniq", "column", "tac", "rev", "fold"),
        *("zcat", "awk", "gawk", "mawk", "echo", "printf", "ls", "find", "fd", "tree", "wc", "stat", "file", "diff"),
        *("cmp", "comm", "man", "history", "env", "ps", "journalctl", "dmesg", "curl", "wget", "http", "type", "which"),
        *("pwd", "date"),
    )
)
_VIEWING_VERBS = {
    "git": frozenset(
        ("log", "show", "diff", "blame", "grep", "status", "reflog", "ls-files", "cat-file", "branch", "tag", "stash")
    ),
    "docker": frozenset(("logs", "ps", "inspect", "images")),
    "kubectl": frozenset(("logs", "describe", "get")),
    "gh": frozenset(("run", "pr", "issue", "api", "view")),
}
_COMPARERS = SEARCHERS.union(("diff", "cmp", "comm", "test", "[", "[[", "which", "pgrep", "expr"))
_NEUTRAL = frozenset(("cd", "pushd", "popd", "export", "set", "source", ".", "unset", "shopt", "umask", "ulimit"))
_PREFIXES = frozenset(
    ("sudo", "time", "nohup", "exec", "command", "env", "nice", "xargs", "npx", "uvx", "poetry", "pipenv", "uv")
)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w{0,80}=")
_TRIVIAL = frozenset(("true", ":", "echo", "exit", "printf"))


@dataclass(frozen=True, slots=True)
class Command:
    """The programs that a call ran, and how to interpret its output.

    `views`: the output shows content that is stored elsewhere; `compares`: exit code 1 is an answer and no error;
    `single`: there is one program (no `;`, no `||`, no pipe); `masks`: the exit code may come from another program than
    the one that did the work; `dedicated`: a tool of its own, no command line; `names`: the caller's texts, in which
    names from an error message can be looked up.
    """

    programs: tuple[str, ...] = ()
    views: bool = False
    compares: bool = False
    single: bool = True
    masks: bool = False
    dedicated: bool = False
    names: str = ""
    main: tuple[str, ...] = ()

    @property
    def shows_content(self) -> bool:
        """Whether it is a tool of its own that fetches, searches or reads: what it returns is all content."""
        return self.views and self.dedicated

    @property
    def runs_tests(self) -> bool:
        """Whether the program that printed the end of the output runs tests."""
        return runs_tests(self.main)

    @property
    def reports(self) -> bool:
        """Whether the program that printed the end of the output tests, builds, lints or installs."""
        return reports(self.main)

    @property
    def ends_idle(self) -> bool:
        """Whether the last program cannot fail: `true`, `echo done`."""
        return len(self.programs) > 1 and self.programs[-1] in _TRIVIAL

    def ran(self, *programs: str) -> bool:
        """Whether one of these programs was run, or the programs are unknown."""
        return not self.programs or any(p in programs for p in self.programs)


def command_of(tool: str, arguments: str) -> Command:
    """Classify a call by its tool name and arguments (JSON, or a plain command text)."""
    return _command_of(tool[:200], arguments[:LIMIT])


@lru_cache(maxsize=512)  # each result of a tool is compared with several others
def _command_of(name: str, arguments: str) -> Command:
    text, names = _command_text(arguments)
    viewing = bool(_VIEWING_TOOL.search(name))
    if text is None or viewing:
        # A tool whose name neither shows nor runs anything (an expert, a plan) answers in prose.
        views = viewing or bool(name and not _EXECUTING_TOOL.search(name))
        return Command(views=views, dedicated=bool(name), names=names)
    return _shell(text) if text.strip() else Command()


def _command_text(arguments: str) -> tuple[str | None, str]:
    """Return (command line or None, all texts of the arguments joined)."""
    if not arguments.lstrip().startswith(("{", "[")):
        return arguments, arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return (None, arguments) if arguments.lstrip().startswith('{"') else (arguments, arguments)
    if isinstance(parsed, list):
        return " ".join(item for item in parsed if isinstance(item, str)), arguments
    for key in _COMMAND_KEYS:
        value = parsed.get(key)
        if isinstance(value, list):
            value = " ".join(item for item in value if isinstance(item, str))
        if isinstance(value, str):
            return value, value
    return None, "\n".join(value for value in parsed.values() if isinstance(value, str))


def _segments(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each simple command with the operator before it."""
    operator = ""
    words: list[str] = []
    for piece in _PIECES.findall(text):
        if piece in ("||", "&&", "|", "|&", ";", "\n"):
            if words:
                yield operator, words
                operator, words = piece, []
            continue
        words.append(piece.strip("'\""))
    if words:
        yield operator, words


def _program(words: list[str]) -> tuple[str, list[str]]:
    """Return the program of a simple command and its arguments, after `sudo`, `env A=b`, `timeout 5` and the like."""
    rest = list(words)
    while rest:
        name = rest[0].rpartition("/")[2]
        if _ASSIGNMENT.match(rest[0]) or name in ("(", "{", "if", "then", "do", "!"):
            rest = rest[1:]
        elif name == "timeout":
            rest = rest[1:]
            while rest and (rest[0].startswith("-") or rest[0][:1].isdigit()):
                rest = rest[1:]
        elif name in _PREFIXES and len(rest) > 1:
            rest = [word for word in rest[1:] if word != "run"]
        else:
            return name, rest[1:]
    return "", []


def _writes(name: str, words: list[str]) -> bool:
    """Whether a viewing program is used to create or remove files."""
    if name == "find":
        return any(w in ("-delete", "-exec", "-execdir", "-ok") for w in words)
    if name == "sort" and any(w.startswith(("-o", "--output")) for w in words):
        return True
    for word, following in zip(words, [*words[1:], ""], strict=False):
        before, mark, after = word.partition(">")
        target = (after or following).lstrip(">")
        if mark and before in ("", "1") and target not in ("", "/dev/null", "&1", "&2"):
            return True
    return False


def _is_viewer(name: str, words: list[str]) -> bool:
    if _writes(name, words):
        return False
    if name == "sed":
        return not any(w.startswith(("-i", "--in-place")) for w in words)
    if name in _VIEWING_VERBS:
        skip = False
        for word in words:
            if skip or word.startswith("-"):
                skip = word in ("-C", "-c") and not skip
                continue
            # `git stash pop` and `git branch x` change something; `git stash list` and `git branch` only show.
            bare = word not in ("stash", "branch", "tag") or all(
                w.startswith("-") or w in (word, "list") for w in words
            )
            return word in _VIEWING_VERBS[name] and bare
        return False
    return name in _VIEWERS


def _shell(text: str) -> Command:
    """Classify a command line: the first program of the last pipeline decides the kind of the output."""
    programs: list[str] = []
    main: tuple[str, ...] = ()
    single, piped, views, compares, tail_is_trivial, fallback = True, False, False, False, False, False
    for operator, words in _segments(text[:LIMIT]):
        name, rest = _program(words)
        if operator in ("|", "|&"):
            piped = True
            compares = name in _COMPARERS
            continue
        if not name or name in _NEUTRAL:
            programs.append(name)
            continue
        single = single and operator not in (";", "||", "\n")
        fallback = fallback or operator == "||"
        tail_is_trivial = operator in (";", "\n", "||") and name in _TRIVIAL
        if not (programs and tail_is_trivial and not views):
            views = _is_viewer(name, rest)
            main = (name, *rest[:_MAIN_WORDS])
        compares = (
            (compares and operator == "&&")
            or name in _COMPARERS
            or (name == "git" and ("--exit-code" in rest or "grep" in rest[:1]))
        )
        programs.append(name)
        if name in ("python", "python3") and rest[:1] == ["-m"] and len(rest) > 1:
            programs.append(rest[1])
    return Command(
        programs=tuple(programs),
        views=views,
        compares=compares,
        single=single and not piped,
        masks=(piped and not views) or tail_is_trivial or fallback,
        names=text,
        main=main,
    )
