"""Effects: what a call does to the world, read conservatively from its name, or from the SQL or shell command in it."""

from __future__ import annotations

import json

import pytest

from optillm_memory.learn.procedures.effects import effect_of, is_named_change

NAMES = {
    "reads": ["get_user_details", "getUserDetails", "HTTPGet", "list_all", "calculate", "think", "search2", "grep"],
    "writes": [
        "cancel_reservation",
        "cancelReservation",
        "SendEmail",
        "transfer_to_human_agents",
        "deploy",
        "a.update",
    ],
    "submits": ["submit", "final_answer", "finish", "proposeSolution"],
    "unknown": ["frobnicate", "", "日本語", "🙂", "42", "getter", "_", "GET2"[3:]],
}
SQL = {
    "reads": [
        "SELECT a FROM b", "  with x as (select 1) select 1", "```sql\nSELECT 1\n```", "show tables",
        "EXPLAIN SELECT 1",
        "SELECT 1;", "-- how many?\nSELECT count(*) FROM t", "/* why */ SELECT 1", "PRAGMA table_info(x)",
        "DESCRIBE b",
    ],
    "writes": [
        "SELECT 1; DROP TABLE x", "UPDATE a SET b = 1", "SELECT * FROM a FOR UPDATE",
        "with x as (delete from a) select 1",
        "SELECT a INTO OUTFILE '/x' FROM b", "SELECT nextval('s')", "insert into a values (1)", "TRUNCATE a",
        "CALL x()",
        "PRAGMA writable_schema = 1", "SELECT '--'; DELETE FROM t", "/*! DELETE FROM t */ SELECT 1",
        "SELECT 1 -- x\n; DROP TABLE t", "-- only looks\nDELETE FROM t", "SELECT LOAD_FILE('/etc/passwd')",
    ],
}  # fmt: skip
SHELL = {
    "reads": [
        "ls -la | grep x", "ls 2>/dev/null", "git log", "sed -n 1,20p a.py", "sort a | uniq -c | sort -rn", "date +%F",
        "hostname", "cd src && cat a.py", "find . -name '*.py' | head", "grep -rn exec .", "cat a 2>&1", "uniq -c a",
        "awk '{print $1}' a", "/usr/bin/cat a", "sed 's/we are/x/' a", "head -n 5 a && tail -n 5 a",
    ],
    "writes": [
        "cat a > b", "cat a >> b", "find . -delete", "find . -exec rm {} +", "git push", "git branch -D x",
        "ls; rm x",
        "echo $(rm x)", "echo `rm x`", "ls && python x.py", "sed -i s/a/b/ f", "awk '{system(\"rm x\")}'",
        "sort -o b a",
        "env rm x", "command rm x", "awk '{print > \"f\"}' a", "date -s 2020-01-01", "git diff --output=x", "tree -o x",
        "uniq a b", "uniq -c a b", "hostname evil", "fd -x rm", "fd --exec rm", "rg --pre sh x",
        "yq -i .a=1 f",
        "sed -n '1,9w /etc/passwd' a", "sed '1e rm x' a", "ls | tee x", "ls | xargs rm", "cat <<EOF",
        "ls\nrm x", "sudo ls",
        "diff <(rm x) a", "./ls.sh", "X=1 rm y",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("tool", "effect"), [(name, effect) for effect, names in NAMES.items() for name in names])
def test_the_effect_of_a_name(tool: str, effect: str) -> None:
    """The first telling verb of a name says what a tool does; without one it is unknown."""
    assert effect_of(tool, '{"id": 1}') == effect


@pytest.mark.parametrize(("query", "effect"), [(query, effect) for effect, found in SQL.items() for query in found])
@pytest.mark.parametrize("tool", ["execute_sql", "run_query", "SQL"])
def test_the_effect_of_sql(tool: str, query: str, effect: str) -> None:
    """Whatever the tool is called, a query only reads where nothing in it may write."""
    assert effect_of(tool, json.dumps({"query": query})) == effect


@pytest.mark.parametrize(("command", "effect"), [(text, effect) for effect, found in SHELL.items() for text in found])
@pytest.mark.parametrize("tool", ["bash", "run_shell"])
def test_the_effect_of_a_command(tool: str, command: str, effect: str) -> None:
    """A command only reads where every program in it is known to, with these options, and nothing is redirected."""
    assert effect_of(tool, json.dumps({"command": command})) == effect


def test_a_text_agent_s_command_has_an_effect() -> None:
    """A fenced command is the argument itself."""
    assert effect_of("shell", "cat a.txt") == "reads"
    assert effect_of("shell", "rm a.txt") == "writes"


def test_a_name_alone_may_tell_a_change() -> None:
    """That a tool was called tells a change only by a verb in its name: a tool of many uses tells nothing."""
    assert all(map(is_named_change, ("cancel_order", "bookFlight")))
    assert not any(map(is_named_change, ("bash", "run_shell", "execute_sql", "insert_sql", "", "get_order", "submit")))
