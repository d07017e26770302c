"""Reuse through the real host: a verified answer is served before the host builds its client."""

from __future__ import annotations

from typing import Any

import pytest
from hosting import BOTH_LANES, JSON, MODEL, Host, chunks_of, served, until

from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = pytest.mark.host
LANES = BOTH_LANES

TASK = "Which team owns the nightly export of the ledger?"
ANSWER = "The finance platform team."
REUSE = {"reuse": {"max_error": 0.05}}


@pytest.fixture
def known(host: Host, namespace: dict[str, str]) -> dict[str, Any]:
    """Give an `agent_memory` field that allows reuse, in a namespace where the task's answer is verified."""
    host.teach(TASK, ANSWER, memory=namespace)
    host.upstream.clear()
    return {**namespace, **REUSE}


def test_a_verified_answer_is_served_without_a_call(host: Host, known: dict[str, Any]) -> None:
    """The real client gets the host's form with our metadata; the upstream is not asked; the log holds the request."""
    with host.openai(key="alice") as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": TASK}], extra_body={"agent_memory": known}
        )
    completion = raw.parse()
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 0
    assert raw.headers["X-Agent-Memory-Action"] == "reuse"
    assert raw.headers["X-Agent-Memory-Trace-Id"] == completion.id
    metadata = completion.model_dump()["agent_memory"]
    assert (metadata["action"], metadata["reuse"]["reason"]) == ("reuse", "exact")
    assert host.sent == []
    host.settle()
    why = host.get(f"traces/{completion.id}/why")
    assert (why["action"], why["proposal"]["memory_ids"]) == ("reuse", metadata["reuse"]["memory_ids"])


def test_a_stream_is_served_as_the_host_streams(host: Host, known: dict[str, Any]) -> None:
    """Streaming gives the host's own chunks, and usage where it was asked for."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "stream": True, "agent_memory": known}
    answered = host.post(body)
    assert answered.headers["Content-Type"].startswith("text/event-stream")
    chunks = chunks_of(answered)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == ANSWER
    assert {c["id"] for c in chunks} == {answered.headers["X-Agent-Memory-Trace-Id"]}
    with_usage = chunks_of(host.post({**body, "stream_options": {"include_usage": True}}))
    assert with_usage[-1]["usage"]["total_tokens"] == 0
    assert host.sent == []


def test_who_does_not_ask_for_reuse_gets_the_model(host: Host, known: dict[str, Any]) -> None:
    """Without `reuse` the upstream answers, as ever; and by what it is told afterwards the gate learns."""
    namespace = {"namespace": known["namespace"]}
    answered = host.chat(TASK, memory=namespace)
    assert len(host.sent) == 1
    assert "reuse" not in answered["agent_memory"]
    host.settle()
    why = f"traces/{answered['id']}/why"
    assert until(lambda: host.get(why)["proposal"] is not None)  # it is found out behind the answer's back
    assert host.get(why)["proposal"]["reason"] == "shadow"


def test_what_is_not_calibrated_goes_on_to_the_model_once(host: Host, known: dict[str, Any]) -> None:
    """A request that memory may not answer is recalled for once, answered by the upstream, and told why."""
    answered = host.chat("Which team owns the weekly export of the ledger?", memory=known)
    assert len(host.sent) == 1
    metadata = answered["agent_memory"]
    assert metadata["action"] == "inject"
    assert metadata["reuse"]["served"] is False
    assert f"reuse_{metadata['reuse']['reason']}" in [s["reason"] for s in metadata["skipped"]]


def test_a_wrong_answer_is_not_served_again(host: Host, known: dict[str, Any]) -> None:
    """Feedback on a reused answer counts at the very next request."""
    wrong = host.chat(TASK, memory=known)
    assert wrong["agent_memory"]["action"] == "reuse"
    host.tell({"trace_id": wrong["id"], "metric": "success", "value": False, "source": "human"})
    after: JSON = host.chat(TASK, memory=known)
    assert after["agent_memory"]["reuse"]["reason"] == "quarantined"
    assert len(host.sent) == 1


@pytest.mark.parametrize("model", ["agent_memory&re2-m", "re2&agent_memory-m", "agent_memory|re2-m"])
def test_combined_approaches_are_answered_by_the_host(host: Host, known: dict[str, Any], model: str) -> None:
    """In a pipeline and in parallel memory is one voice of several: it does not answer for the others."""
    host.chat(TASK, model=model, memory=known)
    assert host.sent


def test_several_choices_and_tools_are_the_models(host: Host, known: dict[str, Any]) -> None:
    """A request for several choices, or with tools, is never answered from memory."""
    tools = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]
    asked: list[dict[str, Any]] = [{"n": 2}, {"tools": tools}]
    for number, fields in enumerate(asked, 1):
        answered = host.chat(TASK, memory=known, **fields)
        assert answered["agent_memory"]["action"] != "reuse"
        assert len(host.sent) == number


def test_the_hosts_key_covers_what_memory_answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without the host's key there is no answer from memory either; and feedback along with the request is taken."""
    db = tmp_path_factory.mktemp("keyed") / "memory.db"
    with RecordingUpstream() as upstream, served(upstream, db, "--optillm-api-key", "alice") as host:
        trace_id = host.teach(TASK, ANSWER)
        # The first request of a server may come before its encoder is there.
        assert until(lambda: host.get("stats", key=None)["memories_without_vector"] == 0)
        host.upstream.clear()
        body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "agent_memory": REUSE}
        assert host.post(body, key=None).status_code == 401
        assert host.post(body, key="mallory").status_code == 401
        said = {"trace_id": trace_id, "metric": "comment", "value": "thanks", "source": "human"}
        answered = host.chat(TASK, memory={**REUSE, "feedback": [said]})
        assert answered["agent_memory"]["action"] == "reuse"
        assert [f["status"] for f in answered["agent_memory"]["feedback"]] == ["applied"]
        assert host.sent == []
