"""Actions through the real host: an agent with tools, the real OpenAI client, and look-ups that memory makes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from acting import ORDER, PARCEL, REUSE, SYSTEM, TOOLS, shown, task_of, way_of
from hosting import BOTH_LANES, JSON, KEY, MODEL, Host, chunks_of, on_lane, served, until

from optillm_memory.testing.upstream import Answer, RecordingUpstream, Reply, echo, tool_call

pytestmark = pytest.mark.host
LANES = BOTH_LANES

LOOKS = {"read_only": [ORDER, PARCEL]}
BOTH = [name for name, _ in way_of(7)]
TAUGHT = 8  # episodes, with two labels each from the second on


def model(request: JSON) -> Answer:
    """Play the model: the next look-up, or the answer once there are two results."""
    done = sum(m["role"] == "tool" for m in request["messages"])
    asked = next(m["content"] for m in request["messages"] if m["role"] == "user")
    number = int(asked.partition("order W")[2][:7])
    if done == len(BOTH):
        return "It is in Rome."
    name, value = way_of(number)[done]
    field_ = next(iter(TOOLS[done]["function"]["parameters"]["properties"]))
    return Reply(content=None, tool_calls=[tool_call(name, {field_: value}, f"call_{number}_{done}")])


@pytest.fixture(scope="module")
def acting(lane: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Run a host whose setting declares one tool, and let it see the task solved until its gate is open."""
    env = {"OPTILLM_AGENT_MEMORY_READ_ONLY_TOOLS": ORDER, **on_lane(lane)}
    db = tmp_path_factory.mktemp("acting") / "memory.db"
    with RecordingUpstream(model) as upstream, served(upstream, db, env=env) as host:
        for number in range(TAUGHT):
            run = episode(host, {})
            assert (run.served, len(run.requests)) == ([], 3)
            host.settle()
            if number:  # what memory would have done is found out in the background
                assert until(lambda ids=tuple(run.ids[:2]): all(_proposed(host, i) for i in ids))  # type: ignore[misc]
            host.tell({"trace_id": run.ids[-1], "metric": "success", "value": True, "source": "code"})
        yield host


def _proposed(host: Host, trace_id: str) -> bool:
    return host.get(f"traces/{trace_id}/why")["proposal"] is not None


@dataclass
class Run:
    """One episode as the client saw it, and what went upstream."""

    messages: list[JSON]
    ids: list[str] = field(default_factory=list)
    served: list[tuple[str, JSON]] = field(default_factory=list)
    metadata: list[JSON] = field(default_factory=list)
    usage: list[int] = field(default_factory=list)
    requests: list[JSON] = field(default_factory=list)


def episode(
    host: Host, memory: Mapping[str, Any], *, number: int = 7, stream: bool = False, world: Any = shown, most: int = 6
) -> Run:
    """Let an agent do the task through the OpenAI client."""
    done = Run([{"role": "system", "content": SYSTEM}, {"role": "user", "content": task_of(number)}])
    host.upstream.clear()
    with host.openai(key=KEY) as client:
        for _ in range(most):
            sent: Any = done.messages
            tools: Any = TOOLS
            made = client.chat.completions.with_raw_response.create(
                model=MODEL, messages=sent, tools=tools, stream=stream, extra_body={"agent_memory": dict(memory)}
            )
            message = _streamed(done, made) if stream else _whole(done, made)
            done.messages.append(message)
            if not message.get("tool_calls"):
                break
            for call in message["tool_calls"]:
                name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                if made.headers["X-Agent-Memory-Action"] == "reuse":
                    done.served.append((name, arguments))
                result = world(name, arguments)
                text = result if isinstance(result, str) else json.dumps(result)
                done.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    done.requests = host.sent
    return done


def _whole(done: Run, made: Any) -> JSON:
    completion = made.parse()
    assert made.headers["X-Agent-Memory-Trace-Id"] == completion.id
    done.ids.append(completion.id)
    done.metadata.append(completion.model_dump()["agent_memory"])
    done.usage.append(completion.usage.total_tokens)
    choice = completion.choices[0]
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    message: JSON = choice.message.model_dump(exclude_none=True)
    return message


def _streamed(done: Run, made: Any) -> JSON:
    message: JSON = {"role": "assistant", "content": "", "tool_calls": []}
    reason = None
    for chunk in made.parse():
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            message["tool_calls"] += [c.model_dump(exclude={"index"}) for c in choice.delta.tool_calls or ()]
            reason = choice.finish_reason or reason
        assert chunk.id == made.headers["X-Agent-Memory-Trace-Id"]
    done.ids.append(made.headers["X-Agent-Memory-Trace-Id"])
    assert reason == ("tool_calls" if message["tool_calls"] else "stop")
    if not message["tool_calls"]:
        del message["tool_calls"]
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_look_ups_are_made_without_the_model(acting: Host, *, stream: bool) -> None:
    """Both look-ups come from memory, streaming or not; the model is asked once, with all that was looked up."""
    run = episode(acting, {"reuse": REUSE, "tools": LOOKS}, stream=stream)
    assert run.served == [(ORDER, {"order_id": "W0000007"}), (PARCEL, {"parcel_id": "PX-0000007"})]
    assert run.messages[-1]["content"] == "It is in Rome."
    (request,) = run.requests
    sent = [m for m in request["messages"] if m["role"] in ("assistant", "tool")]
    assert [m["role"] for m in sent] == ["assistant", "tool"] * 2
    assert [m["content"] for m in sent[1::2]] == [m["content"] for m in run.messages if m["role"] == "tool"]
    assert len({m["tool_calls"][0]["id"] for m in sent[::2]}) == 2
    assert "agent_memory" not in request
    acting.settle()
    traces = [acting.get(f"traces/{trace_id}") for trace_id in run.ids]
    assert [t["action"] for t in traces][:2] == ["reuse", "reuse"]
    assert len({t["episode_id"] for t in traces}) == 1
    if stream:
        return
    assert run.usage[:2] == [0, 0]
    assert [m["action"] for m in run.metadata][:2] == ["reuse", "reuse"]
    for trace_id, metadata in zip(run.ids[:2], run.metadata, strict=False):
        assert metadata["trace_id"] == trace_id
        assert (metadata["reuse"]["served"], metadata["reuse"]["reason"]) == (True, "above_threshold")
        why = acting.get(f"traces/{trace_id}/why")
        assert why["proposal"]["memory_ids"] == metadata["reuse"]["memory_ids"]
        assert all(name.startswith("proc-") for name in why["proposal"]["memory_ids"])
    told = acting.tell({"trace_id": run.ids[-1], "metric": "success", "value": True, "source": "code"})
    assert told["status"] == "applied"
    assert acting.get(f"traces/{run.ids[0]}/why")["proposal"]["correct"] is True


def test_the_setting_declares_one_tool(acting: Host) -> None:
    """What the operator declares is served without the request's word; the other tool is the model's to call."""
    run = episode(acting, {"reuse": REUSE})
    assert [name for name, _ in run.served] == [ORDER]
    assert run.metadata[1]["reuse"]["reason"] == "tool_not_declared"
    assert len(run.requests) == 2
    none = episode(acting, {"reuse": REUSE, "tools": {"never": [ORDER]}})
    assert none.served == []
    assert none.metadata[0]["reuse"]["reason"] == "tool_forbidden"


def test_streamed_chunks_are_the_hosts(acting: Host) -> None:
    """The raw chunks of a served action: the call in a delta with its index, usage zero where it was asked for."""
    body = {
        "model": MODEL, "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task_of(7)}],
        "tools": TOOLS, "stream": True, "stream_options": {"include_usage": True},
        "agent_memory": {"reuse": REUSE, "tools": LOOKS, "mode": "read"},
    }  # fmt: skip
    acting.upstream.clear()
    response = acting.post(body)
    chunks = chunks_of(response)
    (call,) = chunks[0]["choices"][0]["delta"]["tool_calls"]
    assert (call["index"], call["type"], call["function"]["name"]) == (0, "function", ORDER)
    assert json.loads(call["function"]["arguments"]) == {"order_id": "W0000007"}
    assert chunks[-1]["usage"]["total_tokens"] == 0
    assert acting.sent == []


def test_a_wrapped_approach_acts_by_itself(acting: Host) -> None:
    """Where memory wraps another approach that approach answers, whatever the gate says."""
    acting.upstream.clear()
    field_ = {"reuse": REUSE, "tools": LOOKS, "mode": "read", "approach": "re2"}
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task_of(7)}]
    acting.upstream.reply = echo
    try:
        answered = acting.chat(asked, memory=field_, tools=TOOLS)
    finally:
        acting.upstream.reply = model
    assert answered["choices"][0]["message"]["content"].startswith(task_of(7))
    assert answered["agent_memory"]["reuse"]["reason"] == "unsupported_approach"


def test_a_refusal_hands_back_to_the_model(acting: Host) -> None:
    """A served action that fails is wrong at once: the model goes on, and the next episode is its own."""

    def refusing(name: str, arguments: Mapping[str, Any]) -> Any:
        return "Error: access denied" if name == ORDER else shown(name, arguments)

    serving = {"reuse": REUSE, "tools": LOOKS}
    run = episode(acting, serving, world=refusing)
    assert [name for name, _ in run.served] == [ORDER]
    assert len(run.requests) == 2  # the parcel and the answer
    acting.settle()
    assert acting.get(f"traces/{run.ids[0]}/why")["proposal"]["correct"] is False
    after = episode(acting, serving)
    assert after.served == []
    assert after.metadata[0]["reuse"]["reason"] == "quarantined"
