"""How tools other than a shell say that a call failed: databases, APIs, searches, custom functions.

Such a tool prints no exit code, and its result is not a program's free text: one that begins as an error does is one.
Only its first line is looked at; of a tool that shows stored content (a file, a page, a log) no line is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from optillm_memory.conversation.commands import Command

_REASON = (
    r"(?:Bad Request|Unauthorized|Payment Required|Forbidden|Not Found|Method Not Allowed|Not Acceptable|"
    r"Request Timeout|Conflict|Gone|Payload Too Large|Unprocessable (?:Entity|Content)|Too Many Requests|"
    r"Internal Server Error|Not Implemented|Bad Gateway|Service Unavailable|Gateway Time-?out)"
)
_DOING = (
    r"(?:execut|runn|call|invok|process|pars|load|connect|open|read|writ|fetch|search|creat|updat|delet|cancel|book|"
    r"validat|send|retriev|query|gett|sett|return|perform|add|remov|modify|sav|insert|select)ing"
)
# The first lines of results that report an error, by their basis.
_HTTP = (
    # A status line, or a status with its reason.
    (
        r"(?:(?:Error|Request failed|Response|Failed)[^\d\n]{0,40} )?\(?"
        r"(?:HTTP(?:/\d(?:\.\d)?)?(?: (?:status|error|code))*:? ?|status(?:[ _]code)?:? ?)(?P<status>[45]\d\d)\b"
    ),
    rf"(?:Error:? )?(?P<status>[45]\d\d)(?: (?:Client|Server) Error)?:? (?:- )?{_REASON}\b",
    rf"{_REASON}[.!]?$",
    r"(?:Error: )?Request failed with status(?: code)? (?P<status>[45]\d\d)\b",
)
_SPELLED = (
    # "Error: …", "Error executing query: …", "Validation error: …", "API Error (code 3): …".
    (
        rf"(?:\[?error\]?)(?: {_DOING}\b[^:\n]{{0,80}}"
        r"| (?:in|while|during|from|at|on|code|for) [^:\n]{1,60}"
        r"| ?[(\[][\w .-]{1,40}[)\]]| [A-Z]?\d{1,6})?: {0,4}\S"
    ),
    rf"error {_DOING} \S",
    r"\[error\] \S",
    (
        r"(?!(?:the|an?|no|this|that|any|its?) )(?:[A-Z][\w-]{0,30} ){1,3}"
        r"(?:error|exception|failure)(?: ?[(\[][\w .-]{1,40}[)\]])?: ?\S"
    ),
    (
        r"(?:Unknown|Invalid|Unsupported|Unrecognized|Missing|No such) (?:required )?(?:action|tool|function|command|"
        r"method|parameters?|arguments?|params|operation|fields?|input|request|query|api key|token|credentials)\b"
    ),
    r"(?:MCP|JSON-?RPC) error -?\d{1,6}\b",
)
_CODED = (
    # Exceptions as text: `ValueError: …`, `sqlite3.OperationalError: …`, `(psycopg2.errors.UndefinedTable) …`.
    (
        r"\(?(?:[A-Za-z_]\w{0,60}\.){0,8}(?:[A-Z]\w{0,80}(?:Error|Exception|Fault|NotFound|Denied|Timeout)|Exception)"
        r"\b(?:\(.{0,300}|\)? ?:? ?.{0,2000})$"
    ),
    r"\((?:[a-z_]\w{0,60}\.){1,6}[A-Z]\w{0,80}\) \S",
    # Codes of databases: MySQL, Oracle, ODBC and PDO, SQL Server, a driver's tuple.
    r"(?:ERROR|Error)(?: code)?:? ?\d{3,5}(?: ?\([0-9A-Z]{5}\))?[:.] ?\S",
    r"(?:ORA|PLS|DB2|SQL|PG|TNS|CRS)-?\d{4,5}[A-Z]?: ",
    r"\[?SQLSTATE\b|Msg \d{1,6}, Level \d",
    r"\(?\d{4},? ?['\"].{1,400}['\"]\)$|\(\d{4}\)[:,]? [A-Z]",
    (
        r"(?:no such (?:table|column|function|index|module)|ambiguous column name|unrecognized token|"
        r"relation \"[^\"]{1,80}\" does not exist|near \"[^\"]{0,80}\": syntax error)\b"
    ),
    # "Failed to fetch …", "Query failed: …", "Tool execution failed …", "Access denied …".
    r"(?:Failed|Unable) to [a-z]\w{1,30}\b",
    (
        r"[A-Z][\w-]{0,30} (?:[\w-]{1,30} ){0,2}(?:failed|denied|rejected|timed out)"
        r"(?:: |\. |\.?$| (?:with|for|due to|because) )"
    ),
    r"\d{1,3} validation errors? for \S",
)
_LEADS: tuple[tuple[re.Pattern[str], str], ...] = (
    *((re.compile(pattern, re.IGNORECASE), "http") for pattern in _HTTP),
    *((re.compile(pattern, re.IGNORECASE), "tool_error") for pattern in _SPELLED),
    *((re.compile(pattern), "tool_error") for pattern in _CODED),
)
# Tools that show what is stored elsewhere, word for word.
_SHOWS = re.compile(
    r"(?:^|[_\W])(?:read|view|cat|open|grep|logs?|diff|docs?|scroll|browse|web|page|file|fetch|show|glob|ls|print|tail|"
    r"head)(?=$|[_\W])|(?:Read|View|Grep|Fetch|Log|File|Page)(?=$|[A-Z_])"
)
_LISTS = re.compile(r"(?:^|[_\W])(?:search|find|list|lookup)(?=$|[_\W])|(?:Search|Find|List)(?=$|[A-Z_])")
_PAGE_TITLE = re.compile(rf"<title>(?:Error )?(?P<status>[45]\d\d)?:?[ -]{{0,3}}{_REASON}", re.IGNORECASE)
_LONG, _SHORT, _FEW_LINES = 600, 4, 12


@dataclass(frozen=True, slots=True)
class ToolError:
    """An error in a tool's own words: the basis of the verdict, and the HTTP status where it is one."""

    basis: str
    status: int | None = None


def tool_error(tool: str, command: Command, lines: Sequence[str]) -> ToolError | None:
    """Return the error that a tool's result reports in its first line, or None."""
    if not lines or not command.dedicated or _SHOWS.search(tool[:200]):
        return None
    first = lines[0].strip()
    if first.startswith("<") and (page := _PAGE_TITLE.search(" ".join(lines[:8])[:1_000])):
        return ToolError("http", int(page["status"]) if page["status"] else None)
    # What looks something up, or answers in prose, may speak of errors: its own are short.
    most = 1 if _LISTS.search(tool[:200]) else _SHORT if command.views else None
    if most is not None and (len(lines) > most or len(first) > _LONG):
        return None
    for pattern, basis in _LEADS:
        if found := pattern.match(first):
            status = found.groupdict().get("status")
            if basis == "http" and len(lines) > _FEW_LINES:
                return None
            return ToolError(basis, int(status) if status else None)
    return None
