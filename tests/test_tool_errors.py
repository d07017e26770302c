"""Errors in the words of databases, APIs, searches and custom tools, and what only speaks of errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import assistant

from optillm_memory.conversation.observation import read
from optillm_memory.conversation.parse import parse

FAILING = [
    ("find_user", "Error: user not found"),
    ("sql", "Error executing query: Table 'shop.bill' doesn't exist"),
    ("query_db", 'ERROR:  relation "users" does not exist\nLINE 1: SELECT * FROM users'),
    ("execute_sql", "sqlite3.OperationalError: no such column: x"),
    (
        "run_sql",
        "(sqlite3.OperationalError) no such table: t\n[SQL: SELECT 1 FROM t]\n(Background on this error at: ...)",
    ),
    ("db", "ERROR 1054 (42S22): Unknown column 'x' in 'field list'"),
    ("db", "ORA-00942: table or view does not exist"),
    ("db", "SQLSTATE[42S02]: Base table or view not found"),
    ("db", "(1054, \"Unknown column 'x' in 'field list'\")"),
    ("http_request", "HTTP 404: Not Found"),
    ("call_api", "404 Client Error: Not Found for url: http://x/y"),
    ("weather", "Request failed with status code 500"),
    ("api", "<html><head><title>502 Bad Gateway</title></head><body></body></html>"),
    ("calculate", "ZeroDivisionError: division by zero"),
    ("create_user", "1 validation error for User\nname\n  field required"),
    ("mcp_tool", "MCP error -32602: Invalid params"),
    ("book_flight", "Tool execution failed: no seats"),
    ("do", "Unknown action create_order"),
    ("lookup", "Exception: bad key"),
    ("api", '{"error": "index missing"}'),
    ("api", '{"status": 404, "message": "no such page"}'),
    ("api", '{"code": 500, "error": true, "message": "it broke"}'),
    ("api", '{"exception": "ValueError: x"}'),
    ("api", '{"detail": "Not found."}'),
    ("graphql", '{"errors": [{"message": "Cannot query field"}], "data": null}'),
    ("mcp", '{"isError": true, "content": [{"type": "text", "text": "nothing here"}]}'),
]
NO_ERROR = [
    ("api", '{"error": null, "result": 3}'),
    ("api", '{"error": "", "ok": true}'),
    ("api", '{"error": "none", "message": "done"}'),
    ("api", '{"errors": [], "data": {"a": 1}}'),
    ("api", '{"message": "No error"}'),
    ("search", "Error handling in Python: use try and except\nmore of it"),
    ("ask_expert", "Error handling: wrap it in a function"),
    ("ask_expert", "Errors are common there, e.g. TypeError: x"),
    ("search_docs", "404 Not Found explained\nA page about status codes"),
    ("list_issues", "Failed to fetch the page\nUnknown column in the report"),
    ("read_file", "Error: this is the content of a file"),
    ("get_log", "ERROR: disk full"),
    ("run_query", "[('Error: disk full',)]"),
    ("query", "400 rows"),
    ("count", "404"),
    ("calculate", "The error: rate is 3%"),
]


@pytest.mark.parametrize(("tool", "result"), FAILING)
def test_a_result_that_begins_as_an_error_does_is_a_failure(tool: str, result: str) -> None:
    """The call failed, and its error has a signature."""
    reading = read(result, tool=tool, arguments='{"a": "b"}')
    assert reading.verdict == "failure"
    assert reading.signature is not None
    assert reading.signature.key


@pytest.mark.parametrize(("tool", "result"), NO_ERROR)
def test_what_speaks_of_errors_is_none(tool: str, result: str) -> None:
    """Data, prose and content with such words are no failure."""
    assert read(result, tool=tool, arguments='{"a": "b"}').verdict != "failure"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Error: order 17 not found", "Error: order 99 not found"),
        ("Error executing query: Unknown column 'a' in 'where clause'",
         "Error executing query: Unknown column 'b' in 'where clause'"),
        ("Error executing query: the right syntax to use near 'HAVING x = 'a' LIMIT' at line 1",
         "Error executing query: the right syntax to use near ') b' at line 3"),
    ],
)  # fmt: skip
def test_names_and_numbers_do_not_split_a_signature(one: str, other: str) -> None:
    """The same error about something else has the same signature."""
    first, second = (read(text, tool="sql", arguments="{}").signature for text in (one, other))
    assert first is not None
    assert second is not None
    assert first.key == second.key


@pytest.mark.parametrize(
    "result",
    [
        {"role": "tool", "tool_call_id": "c", "content": "nothing of that kind", "is_error": True},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "nothing of that kind"}],
         "isError": True},
        {"role": "tool", "tool_call_id": "c",
         "content": [{"type": "text", "text": "nothing of that kind", "is_error": True}]},
    ],
)  # fmt: skip
def test_what_the_protocol_says_is_taken_as_said(result: dict[str, Any]) -> None:
    """`is_error: true` on a message or a part of it is a failure, with the text's signature; false is nothing."""
    call = {"id": "c", "type": "function", "function": {"name": "lend", "arguments": '{"book": "x"}'}}
    asked = {**assistant(""), "tool_calls": [call]}

    def verdict(message: dict[str, Any]) -> Any:
        (step,) = parse({"messages": [{"role": "user", "content": "u"}, asked, message]}).steps
        return read(step.observation or "", tool=step.tool, arguments=step.arguments)

    found = verdict(result)
    assert found.verdict == "failure"
    assert found.signature.message == "nothing of that kind"
    said = json.loads(json.dumps(result).replace("true", "false"))
    assert verdict(said).verdict == "unknown"
