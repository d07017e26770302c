"""Redaction in every place: whatever field of a request or of feedback a secret is in, no file and no output holds it."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import body, hashing_memory, lexical_memory, response
from canaries import FORMATS
from click.testing import CliRunner
from hosting import BOTH_LANES, MODEL, Host

from optillm_memory import Memory
from optillm_memory.cli import main
from optillm_memory.conversation.redact import redact
from optillm_memory.host.logs import AccessLogFilter
from optillm_memory.records import Scope
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.testing.upstream import Reply, tool_call

LANES = BOTH_LANES
NAME = "user-ghp_Qw3rTy7uIoP9aSdFgH1jKlZxCvBnM2"  # a name with a token in it
TAG = "c0rrect-Horse!7"  # a value that only its tag's name gives away
# Those that are a name, or a word within one, need their surroundings in a text.
SECRETS = {secret for secret, _ in FORMATS.values()}
TEXTS = [text for _, text in FORMATS.values()]


@dataclass(frozen=True)
class Planted:
    """A memory that has seen every secret in every field, and the ids of what it recorded."""

    folder: Path
    trace_ids: list[str]
    memory: Memory

    def held(self) -> bytes:
        """Return what all files of the memory hold, its index folder with them."""
        return b"".join(path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file())


def planted_requests(memory: Memory) -> Iterator[str]:
    """Put every format into the task, the system prompt, a call, its result, an answer, an error and feedback."""
    for start in range(0, len(TEXTS), 10):
        some = "\n\n".join(TEXTS[start : start + 10])
        call = {
            "id": f"call-{NAME}",
            "type": "function",
            "function": {"name": f"run-{NAME}", "arguments": json.dumps({"command": some})},
        }
        options = {
            "episode_id": f"e{start}-{NAME}", "namespace": NAME, "user_id": NAME, "agent_id": NAME, "goal": some[:4_000],
            "tags": {"password": TAG, NAME: "x", "note": f"token {NAME}"},
        }  # fmt: skip
        request = body(
            {"role": "system", "content": some}, {"role": "user", "content": f"Do this: {some}"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": f"error: {some}\n[exit code: 1]"},
            model=f"model-{NAME}", agent_memory=options, user=NAME,
        )  # fmt: skip
        for error in (None, f"failed: {some}"):
            turn = memory.begin(request)
            memory.finish(turn, response(f"Done: {some}", {"content": None, "tool_calls": [call]}), error=error)
            memory.settle()
            yield turn.trace_id
        plain = memory.begin(body(f"Answer: {some}", agent_memory=options))
        memory.finish(plain, response(f"The answer: {some}"))
        memory.settle()
        about = {
            "trace_id": plain.trace_id,
            "source": "code",
            "evidence": {"command": some, "output": some, "exit_code": 0},
        }
        memory.feedback([
            {**about, "metric": "success", "value": True, "feedback_id": f"f{start}-{NAME}"},
            {**about, "metric": "demonstration", "value": some}, {**about, "metric": "comment", "value": some},
            {"episode_id": f"other{start}-{NAME}", "metric": "error", "value": some, "source": "human"},
        ])  # fmt: skip
        yield plain.trace_id


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """Return the memory, still open: what is not copied to the main file yet is in the WAL."""
    folder = tmp_path_factory.mktemp("planted")
    with hashing_memory(folder, redact="strict") as memory:
        ids = list(planted_requests(memory))
        yield Planted(folder, ids, memory)


def left_in(text: str) -> list[str]:
    """Return the secrets that a text holds, as they are or as JSON writes them."""
    looked_for = {*SECRETS, NAME, TAG}
    return [s for s in looked_for if s in text or json.dumps(s)[1:-1] in text]


def test_no_file_holds_a_secret(planted: Planted) -> None:
    """Neither the database, nor its WAL, nor the index folder; the same text without redaction is in them."""
    held = planted.held()
    assert any(path.name.endswith("-wal") for path in planted.folder.iterdir())
    assert [s for s in (*SECRETS, NAME, TAG) if s.encode() in held] == []
    assert b"[REDACTED:password]" in held
    assert b"redacted-" in held


def test_no_text_column_holds_a_secret(planted: Planted) -> None:
    """Every column of every table, read as a program would."""
    (path,) = (p for p in planted.folder.rglob("*.db"))
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = 0
        for table in tables:
            for row in db.execute(f"SELECT * FROM [{table}]"):
                rows += 1
                assert left_in("\n".join(value for value in row if isinstance(value, str))) == [], table
    assert rows > 500


def test_no_command_prints_a_secret(planted: Planted) -> None:
    """Lists, one trace with all that belongs to it, why, recall and stats, for people and as JSON."""
    (path,) = (p for p in planted.folder.rglob("*.db"))
    scope = ("--namespace", NAME, "--user-id", NAME, "--agent-id", NAME)
    commands = [
        ("traces",),
        ("memories",),
        ("stats",),
        ("uplift",),
        ("recall", "Answer this", *scope),
        ("policy", *scope),
    ]
    commands += [(name, trace_id) for trace_id in planted.trace_ids[:9] for name in ("show", "why")]
    for command in commands:
        for extra in ((), ("--json",)):
            done = CliRunner().invoke(
                main, [*command, *extra, "--db", str(path)], env={"OPTILLM_AGENT_MEMORY_ENCODER": "none"}
            )
            assert done.exit_code == 0, done.output
            assert left_in(done.output) == [], command


def test_what_is_sent_is_what_the_client_wrote(planted: Planted) -> None:
    """Redaction is for what is stored: the request goes upstream with its secrets, up to where memory inserts."""
    request = body("\n".join(TEXTS[:3]), agent_memory={"namespace": "plain"})
    turn = planted.memory.begin(request)
    assert turn.messages == request["messages"]


def test_a_conversation_with_secrets_is_recognised(tmp_path: Path) -> None:
    """The next request of an episode is found as such, also after a restart, though what is stored differs."""
    first = body(f"Deploy with {TEXTS[0]}")
    with lexical_memory(tmp_path) as memory:
        turn = memory.begin(first)
        memory.finish(turn, response(f"I used {TEXTS[0]}"))
        memory.settle()
    with lexical_memory(tmp_path) as memory:
        later = {
            **first,
            "messages": [
                *first["messages"],
                {"role": "assistant", "content": f"I used {TEXTS[0]}"},
                {"role": "user", "content": "and now?"},
            ],
        }
        assert memory.begin(later).episode_id == turn.episode_id


def test_an_action_with_a_secret_is_recognised_in_its_own_form(tmp_path: Path) -> None:
    """What failed with a password in it is known when it is about to be done again, and no advice holds the password."""
    secret = "hunter2Kq9"
    command = {"command": f"mysql -u root -p{secret} shop < dump.sql"}
    call = {"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": json.dumps(command)}}
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": "Load the dump"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    failed = {
        "role": "tool",
        "tool_call_id": "call_1",
        "content": f"ERROR 1045 (28000): Access denied with password={secret}\n[exit code: 1]",
    }
    with lexical_memory(tmp_path, holdout=0.0) as memory:
        for messages in (asked[:1], [*asked, failed]):
            turn = memory.begin(body(*messages))
            memory.finish(
                turn, response({"content": None, "tool_calls": [call]} if len(messages) == 1 else "I give up")
            )
            memory.settle()
        again = memory.begin(body({"role": "user", "content": "Load the dump again, please"}))
        guarded, ask_again = memory.guard(again, response({"content": None, "tool_calls": [call]}))
        assert ask_again
        assert "this action failed" in str(guarded.messages)
        assert secret not in str(guarded.messages)


def test_names_with_secrets_are_found_again(tmp_path: Path) -> None:
    """The digest of a name is stable in a database and differs between two; lists, feedback and deletion know the name."""
    scope = Scope("local", NAME)
    stored = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        with hashing_memory(folder) as memory:
            for _ in range(2):
                turn = memory.begin(body("What is due?", agent_memory={"namespace": NAME, "episode_id": NAME}))
                memory.finish(turn, response("Nothing."))
                memory.settle()
            stored.append({turn.scope.namespace, turn.episode_id})
            item = {"episode_id": NAME, "metric": "success", "value": True, "source": "code", "feedback_id": NAME}
            assert memory.feedback(item, view="local", scope=scope)[0].status == "applied"
            assert memory.feedback(item, view="local", scope=scope)[0].status == "duplicate"
            assert [hit.memory.answer for hit in memory.recall("What is due?", scope=scope)] == ["Nothing."]
            assert memory.tenants(NAME) == ["local"]
            assert memory.counts(Selection(namespace=NAME))["traces"] == 2
            memory.forget(Selection(episode_id=NAME))
            assert memory.counts(Selection(namespace=NAME))["traces"] == 0
    assert all(len(names) == 1 for names in stored)
    assert not stored[0] & stored[1]


@pytest.mark.parametrize(
    ("level", "kept"), [("off", True), (False, True), ("default", False), (True, False), ("strict", False)]
)
def test_the_level_is_kept(tmp_path: Path, level: Any, kept: bool) -> None:
    """`off`, and the false of earlier releases, store all as it came."""
    with hashing_memory(tmp_path, redact=level) as memory:
        turn = memory.begin(body(f"use {NAME}", agent_memory={"user_id": NAME}))
        memory.finish(turn, response("yes"))
        memory.settle()
    held = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert (NAME.encode() in held) is kept


def test_the_access_log_holds_no_query() -> None:
    """The query of our routes goes, secrets in a path go, what a caller did stays; other lines are as they were."""
    lines = {
        '127.0.0.1 - - [x] "GET /v1/agent_memory/memories?query=my+diary HTTP/1.1" 200 -': '127.0.0.1 - - [x] "GET /v1/agent_memory/memories?… HTTP/1.1" 200 -',
        '127.0.0.1 - - [x] "GET /v1/models?limit=5 HTTP/1.1" 200 -': '127.0.0.1 - - [x] "GET /v1/models?limit=5 HTTP/1.1" 200 -',
        f'"DELETE /v1/agent_memory/namespaces/{NAME} HTTP/1.1" 202 -': f'"DELETE /v1/agent_memory/namespaces/{redact(NAME)} HTTP/1.1" 202 -',
    }  # fmt: skip
    for level in ("default", "strict", "off"):
        for line, shown in lines.items():
            record = logging.LogRecord("werkzeug", logging.INFO, "", 0, "%s", (line,), None)
            assert AccessLogFilter(lambda: level).filter(record)  # noqa: B023
            assert record.getMessage() == (line if level == "off" else shown)


@pytest.mark.host
def test_a_real_host_logs_and_returns_no_secret(host: Host, lane: str) -> None:
    """What a client sends reaches the upstream whole, and neither the log, nor a route, nor a file."""
    some = "\n".join(TEXTS[:40])
    host.upstream.reply = lambda _: Reply(
        content=None, tool_calls=[tool_call(f"run-{NAME}", {"command": some}, "call_1")]
    )
    options = {"namespace": NAME, "user_id": NAME, "tags": {"password": TAG}}
    answer = host.post({"model": MODEL, "messages": [{"role": "user", "content": some}], "agent_memory": options})
    assert answer.status_code == 200, answer.text
    trace_id = answer.json()["id"]
    assert some in str(host.sent[-1]["messages"][-1]["content"])
    for route in (
        f"memories?query={TAG}&namespace={NAME}",
        f"traces?text={TAG}",
        f"traces/{trace_id}",
        f"traces/{trace_id}/why",
        "stats",
    ):
        shown = host.route("GET", route)
        assert left_in(shown.text) == [], route
    assert "/v1/agent_memory/memories?… HTTP" in host.process.logs()
    assert left_in(host.process.logs()) == []
    held = b"".join(p.read_bytes() for p in Path(host.db).parent.rglob("*") if p.is_file())
    assert [s for s in (NAME, TAG, *(secret for secret, _ in list(FORMATS.values())[:40])) if s.encode() in held] == []
