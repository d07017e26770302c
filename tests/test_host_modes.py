"""The host's modes: pipelines, parallel and wrapped approaches, every way to select them, agents and batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hosting import BOTH_LANES, JSON, MODEL, Host, chunks_of, served, until
from openai.types.chat import ChatCompletionMessage

from optillm_memory.testing.upstream import RecordingUpstream, Reply, tool_call

pytestmark = pytest.mark.host
LANES = BOTH_LANES

TASK = "Which file holds the retry limit of the nightly uploader?"
ANSWER = "It is in uploader.toml."
BLOCK = "<agent_memory"
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]
FOLLOW_UP = "Now tell me who rotates the signing keys of the release bot."
WHO = "The on-call person does."


@pytest.fixture
def known(host: Host, namespace: dict[str, str]) -> dict[str, str]:
    """Give a namespace in which the task's answer is in memory."""
    host.teach(TASK, ANSWER, memory=namespace)
    host.upstream.clear()
    return namespace


def texts_of(answered: Mapping[str, Any]) -> list[str]:
    """Return the texts of a response's choices."""
    return [choice["message"]["content"] for choice in answered["choices"]]


def test_before_an_approach_in_a_pipeline(host: Host, known: dict[str, str], namespace: dict[str, str]) -> None:
    """`agent_memory&re2-m` calls no LLM itself: re2 gets the query with the memory, or without one just the query."""
    answered = host.chat(TASK, model="agent_memory&re2-m", memory=known)
    assert len(host.sent) == 1
    assert host.prompt[-1]["content"].count(BLOCK) == 2
    assert host.prompt[-1]["content"].startswith(f"User: {TASK}")
    assert answered["agent_memory"]["action"] == "inject"
    host.settle()
    trace = host.get(f"traces/{answered['id']}")
    assert (trace["action"], trace["task"]) == ("inject", TASK)
    assert trace["messages"][0] == {"role": "user", "content": TASK}
    assert BLOCK not in trace["answer"]  # though the upstream echoed it
    host.upstream.clear()
    host.chat(TASK, model="agent_memory&re2-m", memory={**namespace, "user_id": "nobody"})
    host.chat(TASK, model="re2-m")
    assert host.upstream.requests[0].body == host.upstream.requests[1].body


def test_after_an_approach_in_a_pipeline(host: Host, known: dict[str, str]) -> None:
    """`re2&agent_memory-m` answers what re2 made of the query, with memory of that."""
    answers = iter([TASK, "second answer"])
    host.upstream.reply = lambda _request: next(answers)
    answered = host.chat("Rephrase it.", model="re2&agent_memory-m", memory=known)
    assert texts_of(answered) == ["second answer"]
    assert [m["content"] for m in host.prompt] == [TASK, ANSWER, TASK]
    assert answered["agent_memory"]["action"] == "inject"


def test_beside_an_approach(host: Host, known: dict[str, str]) -> None:
    """`agent_memory|re2-m` gives both answers in order, the first with memory, under one trace."""
    host.upstream.reply = lambda request: "with" if ANSWER in json.dumps(request) else "without"
    answered = host.chat(TASK, model="agent_memory|re2-m", memory=known)
    assert texts_of(answered) == ["with", "without"]
    assert len(host.sent) == 2
    assert answered["id"] == answered["agent_memory"]["trace_id"]
    assert answered["agent_memory"]["action"] == "inject"


@pytest.mark.parametrize("model", ["agent_memory&re2-m", "agent_memory|re2-m", "re2&agent_memory-m"])
@pytest.mark.parametrize("stream", [False, True])
def test_combined_modes_take_feedback(host: Host, namespace: dict[str, str], model: str, *, stream: bool) -> None:
    """In a pipeline and in parallel, streamed or not, the header names a trace that feedback makes a memory of."""
    host.upstream.reply = lambda _request: ANSWER
    body = {"model": model, "messages": [{"role": "user", "content": TASK}], "agent_memory": namespace}
    response = host.post({**body, "stream": stream})
    assert response.status_code == 200
    if stream:
        assert chunks_of(response)[0]["choices"][0]["delta"]["content"] == ANSWER
    trace_id = response.headers["X-Agent-Memory-Trace-Id"]
    receipt = host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"})
    assert receipt["status"] == "applied"
    shown = host.get(f"traces/{trace_id}")
    assert shown["answer"] == ANSWER
    if model.startswith("agent_memory"):
        assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"


@pytest.mark.parametrize("stream", [False, True])
def test_wrapped_approach_answers_as_alone(host: Host, namespace: dict[str, str], *, stream: bool) -> None:
    """`agent_memory-re2-m` with nothing in memory sends what `re2-m` sends and answers what it answers."""
    body = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}], "stream": stream}
    alone = host.post({"model": "re2-m", **body})
    wrapped = host.post({"model": "agent_memory-re2-m", **body, "agent_memory": namespace})
    assert host.upstream.requests[0].body == host.upstream.requests[1].body
    if stream:
        text = ["".join(c["choices"][0]["delta"].get("content", "") for c in chunks_of(r)) for r in (alone, wrapped)]
        assert text[0] == text[1]
        assert chunks_of(wrapped)[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        assert alone.json()["choices"] == wrapped.json()["choices"]
        expected = alone.json()["usage"]
        assert {k: v for k, v in wrapped.json()["usage"].items() if k in expected} == expected
        assert wrapped.json()["agent_memory"]["approach"] == "re2"


def test_wrapped_moa_sees_the_memory(host: Host, known: dict[str, str]) -> None:
    """`agent_memory-moa-m` puts the memory in every prompt that moa makes of the query."""
    answered = host.chat(TASK, model="agent_memory-moa-m", memory=known)
    assert answered["agent_memory"]["approach"] == "moa"
    assert answered["agent_memory"]["action"] == "inject"
    assert len(host.sent) == 3
    assert all(ANSWER in json.dumps(request["messages"]) for request in host.sent)


def test_wrapped_approach_with_n(host: Host, known: dict[str, str]) -> None:
    """`n = 3` with a wrapped approach runs it three times, as the host does, each time with the memory."""
    answered = host.chat(TASK, model="agent_memory-re2-m", memory=known, n=3)
    assert len(answered["choices"]) == len(host.sent) == 3
    assert all(ANSWER in request["messages"][-1]["content"] for request in host.sent)
    assert answered["id"] == answered["agent_memory"]["trace_id"]


@pytest.mark.parametrize(
    ("model", "fields", "text"),
    [
        ("m", {"optillm_approach": "agent_memory"}, TASK),
        ("re2-m", {"optillm_approach": "agent_memory"}, TASK),
        ("m", {"optillm_approach": "agent_memory&re2"}, TASK),
        ("m", {}, f"<optillm_approach>agent_memory</optillm_approach>{TASK}"),
        ("m", {}, f"{TASK} <optillm_approach>agent_memory&re2</optillm_approach>"),
        ("agent_memory-m", {"agent_memory": {"approach": "re2"}}, TASK),
        ("agent_memory-re2-m", {"agent_memory": {"approach": "none"}}, TASK),
    ],
)
def test_every_way_to_select(host: Host, known: dict[str, str], model: str, fields: JSON, text: str) -> None:
    """The model's name, `optillm_approach`, the tag and `approach` select memory and what it wraps."""
    memory = {**known, **fields.get("agent_memory", {})}
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields, "agent_memory": memory}
    response = host.post(body)
    assert response.status_code == 200, response.text
    assert response.headers["X-Agent-Memory-Action"] == "inject"
    assert len(host.sent) == 1
    sent = json.dumps(host.sent[0])
    assert ANSWER in sent
    assert "optillm_approach" not in sent
    rereads = "Read the question again" in sent
    selected = f"{model} {json.dumps(fields)} {text}"
    assert rereads == ("re2" in selected and '"none"' not in selected)
    assert host.sent[0]["model"] == "m"


def test_options_in_headers(host: Host, known: dict[str, str]) -> None:
    """`X-Agent-Memory-*` headers stand for the field where the body cannot be changed."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}]}
    headers = {"X-Agent-Memory-Namespace": known["namespace"], "X-Agent-Memory-Episode-Id": "e1"}
    metadata = host.post(body, headers=headers).json()["agent_memory"]
    assert (metadata["action"], metadata["episode_id"]) == ("inject", "e1")
    bad = host.post(body, headers={"X-Agent-Memory-Mod": "off"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "agent_memory.mod")


def test_limits_of_one_request(host: Host, known: dict[str, str]) -> None:
    """`max_items: 0` and a budget too small inject nothing; the latter names the memory that did not fit."""
    assert host.chat(TASK, memory={**known, "max_items": 0})["agent_memory"]["action"] == "plain"
    metadata = host.chat(TASK, memory={**known, "token_budget": 3})["agent_memory"]
    assert metadata["action"] == "plain"
    (skipped,) = metadata["skipped"]
    assert skipped["reason"] == "over_budget"
    assert skipped["memory_id"].startswith("mem-")


def test_three_choices_with_tool_calls_are_one_trace(host: Host, known: dict[str, str]) -> None:
    """`n = 3` with tool calls is one upstream call and one trace, which holds all three choices."""
    host.upstream.reply = lambda _request: Reply(content=None, tool_calls=[tool_call("run", {"command": "ls"})])
    answered = host.chat(TASK, memory=known, n=3, tools=TOOLS)
    assert len(host.sent) == 1
    assert [c["finish_reason"] for c in answered["choices"]] == ["tool_calls"] * 3
    assert all(c["message"]["tool_calls"][0]["function"]["name"] == "run" for c in answered["choices"])
    host.settle()
    shown = host.get(f"traces/{answered['id']}")
    assert shown["answer"] is None
    assert [m["role"] for m in shown["messages"]] == ["user", "assistant", "assistant", "assistant"]


@pytest.mark.parametrize("faithful", [True, False], ids=["client-keeps-all", "client-drops-fields"])
def test_an_agents_prefix_stays_byte_stable(host: Host, namespace: dict[str, str], *, faithful: bool) -> None:
    """In a 12-request agent loop with memory and a restart in it, each prompt starts with the one before it."""
    host.teach(TASK, ANSWER, memory=namespace)
    host.teach(FOLLOW_UP, WHO, memory=namespace)
    host.upstream.clear()
    calls = iter(range(100))

    def act(request: JSON) -> Reply:
        number = next(calls)
        if request["messages"][-1]["role"] == "tool" and number in (5, 11):
            return Reply(content=f"Finished part {number}.")
        one = [tool_call("run", {"command": f"step {number}"}, f"call_{number}")]
        return Reply(content=None, tool_calls=[*one, tool_call("run", {"x": "é"}, f"extra_{number}")])

    host.upstream.reply = act
    messages: list[Any] = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": TASK}]
    episodes, actions = set(), []
    for number in range(12):
        if number == 4:
            host.process.stop()  # at once: what was answered is written on the way out
            host.process.start()
        with host.openai(key="alice") as client:
            completion = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                tools=TOOLS,  # type: ignore[arg-type]
                extra_body={"agent_memory": namespace},
            )
        metadata = (completion.model_extra or {})["agent_memory"]
        episodes.add(metadata["episode_id"])
        actions.append(metadata["action"])
        message = completion.choices[0].message
        messages.append(message if faithful else lean(message))
        calls_made = message.tool_calls or []
        messages += [{"role": "tool", "tool_call_id": c.id, "content": f"result of {c.id}"} for c in calls_made]
        if not message.tool_calls:
            messages.append({"role": "user", "content": FOLLOW_UP})
    prompts = [request["messages"] for request in host.sent]
    assert len(prompts) == 12
    assert actions == ["inject"] * 12
    assert len(episodes) == 1
    for before, after in itertools.pairwise(prompts):
        assert len(after) > len(before)
        assert json.dumps(after[: len(before)]) == json.dumps(before)
    inserted = [i for i, m in enumerate(prompts[-1]) if BLOCK in str(m["content"])]
    assert inserted == [1]  # nothing at the user's later words
    assert ANSWER in prompts[-1][1]["content"]


def lean(message: ChatCompletionMessage) -> JSON:
    """Return the message as a client sends it back that keeps role, content and calls alone."""
    kept: JSON = {"role": "assistant", "content": message.content or ""}
    if message.tool_calls:
        kept["tool_calls"] = [c.model_dump(include={"id", "type", "function"}) for c in message.tool_calls]
    return kept


@pytest.fixture(scope="module")
def batching(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start the host with --batch-mode."""
    with served(upstream, Path(tmp_path_factory.mktemp("batch")) / "memory.db", "--batch-mode") as host:
        yield host


def test_batch_mode(batching: Host) -> None:
    """With --batch-mode requests are answered, recorded and, once verified, answered with memory."""
    batching.upstream.reply = lambda _request: ANSWER
    answered = batching.chat(TASK, memory={"episode_id": "batched"})
    assert texts_of(answered) == [ANSWER]
    batching.settle()
    (trace,) = batching.get("traces", key=None)["data"]
    assert (trace["task"], trace["answer"]) == (f"User: {TASK}", ANSWER)
    feedback = {"episode_id": "batched", "metric": "success", "value": True, "source": "code"}
    assert batching.tell(feedback, key=None)["status"] == "applied"
    batching.chat(TASK)
    assert [m["content"] for m in batching.prompt] == [f"User: {TASK}", ANSWER, f"User: {TASK}"]
    assert "agent_memory" not in batching.sent[-1]
    refused = batching.post({"model": MODEL, "messages": [], "agent_memory": {"x": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "agent_memory.x")


def test_batch_mode_with_faults_upstream(batching: Host) -> None:
    """In batch mode an upstream's error fails the request, as optillm has it, and is on the trace."""
    batching.upstream.reply = lambda _request: Reply(status=500, headers={"x-should-retry": "false"})
    response = batching.post({"model": MODEL, "messages": [{"role": "user", "content": "fails"}]})
    assert response.status_code == 500
    assert "500" in response.json()["error"]
    assert until(lambda: bool(batching.get("traces", key=None, text="fails")["data"]))
    (trace,) = batching.get("traces", key=None, text="fails")["data"]
    assert "500" in trace["error"]
