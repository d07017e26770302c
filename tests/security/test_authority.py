"""Over HTTP an address is no authority: what a caller may do depends on the secrets that it shows."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
from builders import lexical_memory, teach
from click.testing import CliRunner
from hosting import KEY, MODEL, Host, authorization, served

from optillm_memory import InvalidField, NotAllowed
from optillm_memory.cli import main
from optillm_memory.host.caller import bearer_key
from optillm_memory.host.credentials import NamedKeys, make_operator_key, operator_key_path, read_operator_key
from optillm_memory.host.runtime import KEYLESS
from optillm_memory.settings import Settings
from optillm_memory.testing.upstream import RecordingUpstream

TASK, ANSWER = "How do I open the vault?", "Turn the wheel three times."
CI = "ci-key-that-nobody-guesses"


@pytest.fixture(scope="module")
def strict_host(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start a host with strict trust and one reporter."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "reporters.json").write_text(json.dumps({"ci": CI}))
    env = {
        "OPTILLM_AGENT_MEMORY_TRUST": "strict",
        "OPTILLM_AGENT_MEMORY_REPORTERS_FILE": str(folder / "reporters.json"),
    }
    with served(upstream, folder / "memory.db", env=env, log=folder / "host.log") as host:
        yield host


# -- the operator's secret, and files of keys ------------------------------------------------------


def test_the_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    """Processes that start at once get the same one; its file has mode 0600, and nothing else is left."""
    settings = Settings(db=str(tmp_path / "new" / "agent_memory.db"))
    assert read_operator_key(settings) == ""
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(make_operator_key(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert set(made) == {read_operator_key(settings)}
    assert len(made[0]) >= 40
    path = operator_key_path(settings)
    assert [p.name for p in path.parent.iterdir()] == ["agent_memory.operator-key"]
    assert os.name != "posix" or stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """A new key counts at once, a removed one no more; while the file is broken what was read last counts."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"ci": "sha256:" + "0" * 64, "ops": ["one", "two"]}))
    keys = NamedKeys(str(path), "param")
    assert [keys.name_of(key) for key in ("one", "two", "three", "", "0" * 64)] == ["ops", "ops", "", "", ""]
    path.write_text(json.dumps({"later": "three and more"}))
    assert [keys.name_of(key) for key in ("one", "three and more")] == ["", "later"]
    path.write_text("{ broken")
    assert keys.name_of("three and more") == "later"
    with pytest.raises(InvalidField):
        NamedKeys(str(path), "param")


def test_the_commands_of_authority(tmp_path: Path) -> None:
    """A new key is one that the file knows it by; the operator's is printed; a reporter is listed, and revoked."""
    where = ["--json", "--db", str(tmp_path / "memory.db")]

    def ran(*words: str) -> Any:
        done = CliRunner(env={"OPTILLM_AGENT_MEMORY_DB": str(tmp_path / "memory.db")}).invoke(main, [*words])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    made = ran("reporters", "key", "ci", "--json")
    (tmp_path / "reporters.json").write_text(json.dumps(made["file"]))
    assert NamedKeys(str(tmp_path / "reporters.json"), "param").name_of(made["key"]) == "ci"
    with lexical_memory(tmp_path) as memory:
        turn = teach(memory, TASK, ANSWER)
        memory.feedback(
            {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}, reporter="ci"
        )
    secret = make_operator_key(Settings(db=str(tmp_path / "memory.db")))
    assert ran("operator-key", *where) == {"operator_key": secret}
    assert [(r["reporter"], r["feedback"]) for r in ran("reporters", "list", *where)] == [("ci", 1), ("python", 1)]
    assert ran("reporters", "revoke", "python", "--yes", *where) == {"reporter": "python", "traces": 1}
    assert [m["status"] for m in ran("memories", *where)] == ["verified"]  # by the other's word
    assert ran("reporters", "revoke", "ci", "--yes", *where)["traces"] == 1
    assert [m["status"] for m in ran("memories", *where)] == ["withdrawn"]


# -- who is who over HTTP --------------------------------------------------------------------------


@pytest.mark.host
def test_without_a_key_there_is_one_tenant_that_is_not_the_operator(host: Host, namespace: dict[str, str]) -> None:
    """A caller without a key on this machine has the tenant `local`: its own data, and no more."""
    mine = host.teach(TASK, ANSWER, memory=namespace, key="")
    others = host.chat("another's question", memory=namespace, key="bob")["id"]
    host.settle()
    assert host.get(f"traces/{mine}", key="")["scope"]["tenant"] == KEYLESS
    assert host.route("GET", f"traces/{others}", key="").status_code == 404
    assert others not in host.route("GET", "traces?limit=1000", key="").text
    refused = host.route("POST", "rebuild", key="")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")
    wrong = {"trace_id": others, "metric": "success", "value": True, "source": "code"}
    assert host.route("POST", "feedback", key="", json=wrong).json()["status"] == "pending"
    assert host.get(f"traces/{others}", key=None)["outcome"]["verdict"] == "unknown"
    shown = host.get("traces", key=None, limit=1000)["data"]
    assert {mine, others} <= {trace["trace_id"] for trace in shown}


@pytest.mark.host
def test_the_data_of_callers_without_a_key_stay_theirs(
    upstream: RecordingUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a database of an earlier release, where they were `anonymous`, they are told what they taught then."""
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER, tenant="anonymous")
        teach(memory, "another task", "another answer", tenant="local")
    with served(upstream, tmp_path / "memory.db") as host:
        answered = host.chat(TASK, key="")
        assert answered["agent_memory"]["action"] == "inject"
        host.settle()
        assert {m["answer"] for m in host.get("memories", key="")["data"]} == {ANSWER}
    with contextlib.closing(sqlite3.connect(tmp_path / "memory.db")) as db:
        assert dict(db.execute("SELECT tenant, count(*) FROM scopes GROUP BY tenant")).keys() == {"anonymous", "local"}


UNREADABLE = ["Basic YWxpY2U6eA==", "Bearer", "alice", "Digest username=x", "Token k", ""]


@pytest.mark.parametrize("value", [*UNREADABLE, "Bearer ", "bearer\t", " ", "Bearer\u00a0", "Bearer,alice"])
def test_what_names_no_key_is_not_read_as_one(value: str) -> None:
    """However little is missing, it is refused, and no tenant is made of it."""
    with flask.Flask(__name__).test_request_context("/", headers={"Authorization": value}):
        with pytest.raises(NotAllowed) as refused:
            bearer_key(flask.request)
        assert refused.value.code == "unreadable_authorization"


@pytest.mark.host
@pytest.mark.parametrize("value", UNREADABLE)
def test_an_unreadable_authorization_is_nobody(host: Host, namespace: dict[str, str], value: str) -> None:
    """It makes neither the operator nor the keyless tenant: 401 on our routes, and chat without memory."""
    host.teach(TASK, ANSWER, memory=namespace, key="")
    headers = {"Authorization": value}
    for method, path in (
        ("GET", "traces"),
        ("POST", "feedback"),
        ("POST", "rebuild"),
        ("DELETE", "namespaces/default"),
    ):
        refused = host.route(method, path, key="", headers=headers, **({"json": {}} if method == "POST" else {}))
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unreadable_authorization")
    host.upstream.clear()
    asked = [{"role": "user", "content": TASK}]
    answer = host.post({"model": MODEL, "messages": asked, "agent_memory": namespace}, key=None, headers=headers)
    assert (answer.status_code, "agent_memory" in answer.json()) == (200, False)
    assert host.prompt == asked


@pytest.mark.host
@pytest.mark.parametrize("name", ["X-Agent-Memory-Operator", "X-Agent-Memory-Key", "X-Agent-Memory-Reporter-Key"])
def test_a_wrong_secret_is_refused(host: Host, name: str) -> None:
    """Who shows a wrong secret is no lesser caller: 401, in chat as well, and nothing goes upstream."""
    for wrong in ("wrong", "", host.operator_key[:-1], "\xe9"):
        headers = {name: wrong.encode("latin-1")}
        raw = [(key.encode(), value) for key, value in headers.items()]
        url = f"{host.process.base_url}/agent_memory/traces"
        assert host.http.get(url, headers=raw).status_code == 401, wrong
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": TASK}]})
        sent = [*raw, (b"Content-Type", b"application/json")]
        refused = host.http.post(f"{host.process.base_url}/chat/completions", content=body, headers=sent)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_credential")
    assert host.sent == []


@pytest.mark.host
def test_the_operator_beside_the_servers_own_key(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """Where the server asks everybody for its key, its holder is a tenant, and the operator shows a second secret."""
    with served(upstream, tmp_path / "memory.db", "--optillm-api-key", "the-key-of-the-server") as host:
        key = "the-key-of-the-server"
        host.teach(TASK, ANSWER, key=key)
        assert host.route("POST", "rebuild", key=key).status_code == 403
        assert host.route("POST", "rebuild", key=None).status_code == 200
        only = {"X-Agent-Memory-Operator": host.operator_key}
        assert host.route("GET", "traces", key="", headers=only).status_code == 401
        foreign = {"Host": "llm.corp.example", "Origin": "https://dashboard.example"}
        assert host.route("GET", "traces", key=key, headers=foreign).status_code == 200  # no page knows that key


# -- what a page could send unasked ----------------------------------------------------------------

SIMPLE = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None]


@pytest.mark.host
@pytest.mark.parametrize("content_type", SIMPLE)
def test_every_write_is_json(host: Host, namespace: dict[str, str], content_type: str | None) -> None:
    """A type of body that a browser sends across sites without asking is refused with 415, and changes nothing."""
    trace_id = host.teach(TASK, ANSWER, memory=namespace)
    wrong = json.dumps({"trace_id": trace_id, "metric": "success", "value": False, "source": "code"}).encode()
    headers = authorization(KEY) | ({"Content-Type": content_type} if content_type else {})
    for method, path in (("POST", "feedback"), ("POST", "rebuild"), ("DELETE", f"traces/{trace_id}")):
        url = f"{host.process.base_url}/agent_memory/{path}"
        refused = host.http.request(method, url, content=wrong, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type"), path
    assert host.get(f"traces/{trace_id}")["outcome"]["verdict"] == "success"


@pytest.mark.host
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_a_body_nested_deeply_is_a_bad_request(strict_host: Host, text: str) -> None:
    """400 in OpenAI's shape on our routes and in chat, without a traceback in the log."""
    for path in ("agent_memory/feedback", "chat/completions"):
        url = f"{strict_host.process.base_url}/{path}"
        refused = strict_host.http.post(url, content=text, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400, (path, refused.text)
        assert refused.json()["error"]["type"] == "invalid_request_error"
    tags = {"X-Agent-Memory-Tags": "[" * 20_000}
    body = {"model": MODEL, "messages": []}
    assert strict_host.post(body, headers=tags).status_code == 400
    assert "RecursionError" not in strict_host.process.logs()


# -- strict trust over HTTP ------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("way", ["route", "in band"])
def test_only_a_reporters_key_verifies(strict_host: Host, namespace: dict[str, str], way: str) -> None:
    """Another caller's `code` counts as `llm`, and the receipt says so; with a reporter's key it verifies."""
    host = strict_host
    host.upstream.reply = lambda _request: ANSWER
    trace_id = host.chat(TASK, memory=namespace)["id"]
    item = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}

    def give(headers: dict[str, str]) -> dict[str, str]:
        if way == "route":
            receipt: dict[str, str] = host.route("POST", "feedback", headers=headers, json=item).json()
            return receipt
        messages = [{"role": "user", "content": "something else"}]
        memory = {**namespace, "feedback": [item]}
        answered = host.post({"model": MODEL, "messages": messages, "agent_memory": memory}, headers=headers).json()
        (receipt,) = answered["agent_memory"]["feedback"]
        return receipt

    capped = give({})
    assert (capped["status"], capped["source"], "reporter" in capped["note"]) == ("applied", "llm", True)
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"
    assert give({"X-Agent-Memory-Reporter-Key": CI}).keys() == {"feedback_id", "status"}
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"
    said = host.get(f"traces/{trace_id}")["feedback"]
    assert [(f["source"], f["reporter"], f["trust"]) for f in said] == [("llm", "", "strict"), ("code", "ci", "strict")]


@pytest.mark.host
def test_who_asks_with_a_reporters_key_does_not_verify_it_alone(strict_host: Host, namespace: dict[str, str]) -> None:
    """An agent that shows the key with its request, and then reports on that, is its own witness."""
    host, vouching = strict_host, {"X-Agent-Memory-Reporter-Key": CI}
    host.upstream.reply = lambda _request: ANSWER
    body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "agent_memory": namespace}
    trace_id = host.post(body, headers=vouching).json()["id"]
    item = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}
    assert host.route("POST", "feedback", headers=vouching, json=item).json()["status"] == "applied"
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"
    assert host.tell(item, key=None)["status"] == "applied"  # the operator is another
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"
