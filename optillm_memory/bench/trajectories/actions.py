"""Actions of recorded runs: the form in which two are equal, whether one failed, and whether one changes state.

All of it is told from names and texts alone, and independently of how memory tells it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_SHELL_TOOL = re.compile(r"bash|shell|terminal|(?:^|_)(?:sh|cmd|commands?|exec)(?:_|$)", re.IGNORECASE)
_SHELL_FIELDS = frozenset(("command", "cmd", "commands", "bash_command"))
_CD = re.compile(r"^\s*cd\s+(?:\"[^\"]*\"|'[^']*'|[^\s;&|]+)\s*(?:&&|;)\s*")
_INTERPRETER = re.compile(r"(?<![^\s;&|(])[\w.~$/-]*/(python[\d.]*|bash|sh|zsh|node|ruby|perl|php)(?=\s|$)")
_HERE = re.compile(r"(?<![^\s;&|(])\./(?=\w)")
_PAGER = re.compile(r"\s*\|\s*(?:cat|less|more|head|tail)(?:\s+(?:-{1,2}[\w=-]+|\+?\d+))*\s*$")

_SQL_WRITES = re.compile(
    r"(?:^|[;`\[])\s*(?:sql\s+)?(?:insert\s+into|update\s+\S+\s+set|delete\s+from|merge\s+into|replace\s+into|truncate\s"
    r"|(?:create|drop|alter|rename)\s+(?:\w+\s+){0,3}?(?:table|database|schema|view|index|user|trigger|procedure)\b"
    r"|(?:grant|revoke)\s.*\s(?:to|from)\s)",
    re.IGNORECASE | re.DOTALL,
)
_QUOTED = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"")
_NOWHERE = re.compile(r"[\d&]?>>?\s*(?:/dev/null|&\d)")
_SHELL_WRITES = re.compile(
    r"(?<![=<-])>>?\s*[\w./~$]"
    r"|(?:^|[;&|(\n]\s*|\bsudo\s+|\bxargs\s+(?:-\S+\s+)*|-exec\s+)"
    r"(?:rm|mv|cp|mkdir|rmdir|touch|tee|ln|chmod|chown|truncate|dd|patch|unzip|tar|kill|pkill)\b"
    r"|\b(?:sed|perl)\b[^|;&]*\s-\w*i\b|\bfind\b[^|;&]*\s-delete\b"
    r"|\bgit\s+(?:-\S+\s+)*(?:add|am|apply|checkout|cherry-pick|clean|clone|commit|init|merge|mv|pull|push|rebase|reset"
    r"|restore|revert|rm|stash|switch|tag)\b"
    r"|\b(?:pip3?|npm|yarn|apt|apt-get|conda|brew|cargo)\s+(?:install|uninstall|remove|add|ci|i)\b",
)
_READING_WORDS = frozenset(
    ("calculate", "check", "compare", "compute", "count", "describe", "estimate", "explain", "fetch", "find", "get",
     "has", "is", "list", "look", "lookup", "preview", "query", "read", "retrieve", "search", "show", "think",
     "validate", "verify", "view"),
)  # fmt: skip
_CHANGING_WORDS = frozenset(
    ("accept", "activate", "add", "approve", "archive", "assign", "buy", "cancel", "create", "deactivate", "delete",
     "deploy", "disable", "edit", "enable", "insert", "modify", "pay", "publish", "purchase", "refund", "register",
     "reject", "remove", "rename", "replace", "reschedule", "revoke", "send", "update", "upgrade", "upload",
     "withdraw", "write"),
)  # fmt: skip
# Nouns as well: they count as the first word alone, and not where the last asks for information (`order_status`).
_CHANGING_FIRST = frozenset(
    ("apply", "book", "change", "charge", "close", "drop", "exchange", "grant", "issue", "merge", "move", "order",
     "patch", "place", "post", "put", "reply", "reserve", "reset", "return", "schedule", "set", "transfer"),
)  # fmt: skip
_INFORMATION = frozenset(("count", "detail", "details", "history", "info", "information", "status", "summary"))
_OPERATION_FIELDS = frozenset(("command", "action", "operation", "method"))
_NAME_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SUBMITS = frozenset(("submit", "finish", "done", "complete", "answer", "final_answer", "propose_solution"))

_RETURN_CODE = re.compile(r"\s*(?:<returncode>|(?:exit|return)[ _]code:?\s*)(-?\d+)", re.IGNORECASE)
_ERROR = re.compile(
    r"(?:observation:[\s-]*)?(?:error\b|[\w.]*(?:Error|Exception)\b(?::|$)|fatal:|traceback \(most recent)",
    re.IGNORECASE,
)
_SHELL_ERROR = re.compile(
    r"^\S[^\n]{0,200}: (?:command not found|no such file or directory|permission denied|syntax error\b.*)$",
    re.IGNORECASE | re.MULTILINE,
)


def canonical_action(tool: str, arguments: str) -> str:
    """Return an action in the form in which two are equal.

    Tool and arguments as sorted JSON, white space folded, a final `;` cut. Of shell commands a leading `cd … &&`, `./`,
    an interpreter's path and pager pipes are cut, too.
    """
    given = arguments_of(arguments)
    shell = bool(_SHELL_TOOL.search(tool))
    return f"{tool} {json.dumps(_folded(given, shell=shell), sort_keys=True, ensure_ascii=False)}"


def arguments_of(text: str) -> dict[str, Any]:
    """Return the arguments of a call; what is no JSON object is one argument without a name."""
    if not text.strip():
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        given = text
    return given if isinstance(given, dict) else {"": given}


def _folded(value: Any, *, shell: bool) -> Any:
    if isinstance(value, dict):
        return {k: _folded(v, shell=shell or k in _SHELL_FIELDS) for k, v in value.items()}
    if isinstance(value, list):
        return [_folded(v, shell=shell) for v in value]
    if not isinstance(value, str):
        return value
    text = " ".join(value.split()).rstrip("; ")
    return _plain_command(text) if shell else text


def _plain_command(text: str) -> str:
    while (shorter := _PAGER.sub("", _CD.sub("", text, count=1))) != text:
        text = shorter
    return _HERE.sub("", _INTERPRETER.sub(r"\1", text)).rstrip("; ")


def changes_state(tool: str, arguments: str) -> bool:
    """Whether an action changes the state of the world, as far as its name and arguments tell."""
    given = arguments_of(arguments)
    texts = list(texts_in(given))
    if _SHELL_TOOL.search(tool) or any(k in _SHELL_FIELDS and len(str(v).split()) > 1 for k, v in given.items()):
        return any(_SHELL_WRITES.search(_NOWHERE.sub(" ", _QUOTED.sub("''", text))) for text in texts)
    if any(_SQL_WRITES.search(text) for text in texts):
        return True
    operations = [v for k, v in given.items() if k in _OPERATION_FIELDS and isinstance(v, str)]
    if any(_words(name)[:1] and _words(name)[0] in _READING_WORDS for name in operations):
        return False
    return any(map(named_as_changing, (*operations, tool)))


def named_as_changing(name: str) -> bool:
    """Whether a name says that something is changed: `cancel_order` does, `get_update_history` does not."""
    words = _words(name)
    if not words or words[0] in _READING_WORDS:
        return False
    return not _CHANGING_WORDS.isdisjoint(words) or (words[0] in _CHANGING_FIRST and words[-1] not in _INFORMATION)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _NAME_PART.findall(name)]


def submits(tool: str) -> bool:
    """Whether an action only hands in what earlier ones worked out."""
    return tool.lower() in _SUBMITS


def failed(observation: str) -> bool:
    """Whether an observation says that its action failed: by exit code, by an error field, or in its first words."""
    text = observation.strip()
    if code := _RETURN_CODE.match(text):
        return int(code.group(1)) != 0
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return (
                bool(found.get("error") or found.get("errors") or found.get("is_error"))
                or found.get("success") is False
            )
    return bool(_ERROR.match(text) or _SHELL_ERROR.search(text)) or "Traceback (most recent call last)" in text


def texts_in(value: Any) -> Iterator[str]:
    """Return the texts inside of a JSON value, names of fields left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
