"""Effects: whether an action only looks, changes the state of the world, or hands in what was worked out.

Read conservatively from the tool's name and its arguments; what is not recognised is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from optillm_memory.conversation.actions import action_of
from optillm_memory.learn.procedures.values import leaves, parsed

Effect = Literal["reads", "writes", "submits", "unknown"]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_PARTS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_READS = _set(
    """
    get list find search read look lookup show view fetch query check calculate compute count describe retrieve
    think inspect select browse grep glob ls cat preview validate verify estimate summarize summarise explain
    recall wikipedia
    """
)
_WRITES = _set(
    """
    update cancel book send modify exchange return create delete remove insert add set transfer pay refund issue
    post put write edit move rename apply approve reject assign schedule reschedule buy purchase place charge
    grant revoke enable disable start stop restart deploy merge push commit reply register subscribe unsubscribe
    upload save patch change make confirm reserve release lock unlock open close invite kick mark archive
    upgrade downgrade reset clear drop replace order withdraw deposit publish notify email message toggle turn
    install uninstall
    """
)
_SUBMITS = _set("submit finish done propose answer complete final conclude")
_VERBS: tuple[tuple[Effect, frozenset[str]], ...] = (("submits", _SUBMITS), ("writes", _WRITES), ("reads", _READS))
_SQL_READS = re.compile(
    r"\s*(?:(?:select|show|describe|desc|explain|values|with)\b|pragma\s+\w+_(?:x?info|list|check)\b"
    r"|pragma\s+(?!optimize|incremental_vacuum|wal_checkpoint)\w+\s*(?:$|;))",
    re.IGNORECASE,
)
_SQL = re.compile(
    r"\s*(?:select|insert|update|delete|create|drop|alter|truncate|replace|merge|grant|revoke|show|describe|desc|explain"
    r"|with|values|pragma|call|set|begin|commit|use)\b",
    re.IGNORECASE,
)
# Words that make a query that begins like a reading one change something.
_SQL_WRITES = re.compile(
    r"\b(?:insert|update|delete|drop|alter|truncate|replace\s+into|merge|into\s+(?:outfile|dumpfile)|nextval|setval|"
    r"pg_terminate|lo_import|load_file|for\s+update)\b|;\s*\S",
    re.IGNORECASE,
)
_INTO = re.compile(r"\binto\b", re.IGNORECASE)  # a query whose result is kept
_LITERAL = re.compile(r"'[^']*'|\"[^\"]*\"")
_COMMENT = re.compile(r"\A(?:\s*(?:--[^\n]*(?:\n|$)|/\*(?!!).*?\*/))+", re.DOTALL)
_SQL_CHANGE = re.compile(
    r"\s*(?:(?:insert|replace|merge)\s+into|update\s+\S+\s+set|delete\s+from"
    r"|(?:drop|alter|create|truncate)\s+(?:or\s+replace\s+)?(?:table|view|index|database|schema|function|trigger|user))\b",
    re.IGNORECASE,
)
_SHELL_READS = _set(
    """
    ls cat head tail grep egrep fgrep rg ag find fd wc sort uniq cut tr nl tac rev file stat du df pwd echo
    printf which type tree diff cmp comm ps date whoami id hostname uname awk sed jq yq xxd od strings
    column test true basename dirname realpath readlink md5sum sha256sum cd seq bc expr
    """
)
_GIT_READS = _set("log diff status show blame grep ls-files rev-parse describe cat-file")
_SHELL_WRITES = re.compile(
    r"(?<![<=-])>|\|\s*(?:tee|xargs)\b"
    r"|\s-(?:delete|-?exec\w*|ok\w*|fprint\w*|-output|-pre)\b|\bfd\s[^|;&]*-[xX]\b|\bdate\s[^|;&]*-(?:s|-set)\b"
    r"|\btree\s[^|;&]*-o|\byq\s[^|;&]*-\w*i|\bhostname\s+[^-\s|;&]|\buniq\s(?:[^|;&]*\s)?[^-\s|;&]\S*\s+[^-\s|;&]"
    r"|\bsed\s[^|;&]*['\"\d;{/,$][we]\s"
    r"|[`]|\$\(|<\(|<<|\bsed\s[^|;&]*-\w*i|\bfind\s[^|;&]*-fls|\bsort\s[^|;&]*-o|\bsystem\("
)
_HARMLESS = re.compile(r"\d?>(?:&\d|\s*/dev/null\b)|&>\s*/dev/null\b")  # redirections that write nothing
_SEPARATORS = re.compile(r"\|\||&&|[|;&\n]")
_SQL_FIELDS, _SHELL_FIELDS = frozenset(("query", "sql", "statement")), frozenset(("command", "cmd", "bash_command"))
COMMAND_FIELDS = _SQL_FIELDS | _SHELL_FIELDS | {"code", "script", "input"}
_FENCE = re.compile(r"^\s*```\w*\s|\s*```\s*$")  # some models put a command into a code block
_SHELLS = _set("bash shell sh terminal zsh")


@lru_cache(maxsize=4096)
def effect_of(tool: str, arguments: str) -> Effect:
    """Return the effect of a call: of SQL and shell commands by their text, else by the first verb in the name."""
    words = _words(tool)
    return _by_text(tool, arguments, words) or _by_name(words)


def asks_to_write(tool: str, arguments: str) -> bool:
    """Whether a call is known to change something, or SQL in any of its arguments does."""
    if (effect := effect_of(tool, arguments)) == "writes":
        return True
    if effect == "reads" and _by_text(tool, arguments, _words(tool)) is not None:
        return False
    texts = [leaf for _, leaf in leaves(parsed(arguments)) if isinstance(leaf, str)]
    return any(_SQL_CHANGE.match(_bare(text)) for text in texts)


def _words(tool: str) -> list[str]:
    return [part.lower() for part in _PARTS.findall(tool)]


def _by_text(tool: str, arguments: str, words: Sequence[str]) -> Effect | None:
    """Return the effect of an SQL or shell command, None where a call is neither."""
    action = action_of(tool, arguments)
    text = _bare(action.text)
    if action.field in _SQL_FIELDS or "sql" in words or (action.field and _SQL.match(text) and not words):
        if "/*!" in text:  # a comment that MySQL executes
            return "writes"
        if _SQL.match(text):
            changes = _SQL_WRITES.search(text.rstrip("; \n")) or _INTO.search(_LITERAL.sub("''", text))
            return "reads" if _SQL_READS.match(text) and not changes else "writes"
    elif action.field in _SHELL_FIELDS or _SHELLS & set(words):
        return "reads" if _only_looks(_FENCE.sub("", action.text)) else "writes"  # `--` begins an option there
    return None


def _bare(text: str) -> str:
    """Return a command without the code block, and the comments, that it begins with."""
    return _COMMENT.sub("", _FENCE.sub("", text), count=1)


def is_sql(tool: str, arguments: str) -> bool:
    """Whether a call is an SQL statement, by its argument's name or the tool's, and its first word."""
    action = action_of(tool, arguments)
    named = action.field in _SQL_FIELDS or "sql" in _words(tool)
    return named and _SQL.match(_bare(action.text)) is not None


@lru_cache(maxsize=1024)
def is_named_change(tool: str) -> bool:
    """Whether a tool's name alone says that it changes something: that it was called tells what was done."""
    words = _words(tool)
    return not (_SHELLS & set(words) or "sql" in words) and _by_name(words) == "writes"


def _by_name(words: Sequence[str]) -> Effect:
    for word in words:
        for effect, verbs in _VERBS:
            if word in verbs:
                return effect
    return "unknown"


def _only_looks(command: str) -> bool:
    command = _HARMLESS.sub(" ", command)
    if _SHELL_WRITES.search(command):
        return False
    for part in _SEPARATORS.split(command):
        words = part.split()
        if words and words[0] == "git":
            if len(words) < 2 or words[1] not in _GIT_READS:  # noqa: PLR2004
                return False
        elif words and words[0].rpartition("/")[2] not in _SHELL_READS:
            return False
    return True
