"""Fidelity: with memory, clients and upstream see what they would see with optillm's own `none`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hosting import JSON, Host, chunks_of

from optillm_memory.conversation.text import SEPARATOR
from optillm_memory.testing.upstream import Reply, tool_call

pytestmark = pytest.mark.host
LANES = ("host",)  # test_direct_fidelity.py is about the other one

PLAIN, MEMORY = "gpt-4o-mini", "agent_memory-gpt-4o-mini"
TASK = "Which file holds the retry limit of the nightly uploader?"
ANSWER = "It is in uploader.toml."
CALLS = [tool_call("run", {"command": "ls"}, "call_a"), tool_call("run", {"command": "pwd"}, "call_b")]
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]
# What optillm itself would cut or count differently were it not handed through whole.
TRICKY = "User: asked <think>three words here</think> Assistant: é😀 \u2028 done"
SHAPES = list(itertools.product((False, True), (False, True), (1, 3), (False, True), (False, True), (False, True)))
SHAPE_IDS = [
    "-".join(
        name
        for name, on in zip(("stream", "tools", "n3", "format", "null", "image"), (s, t, n > 1, f, u, i), strict=True)
        if on
    )
    or "bare"
    for s, t, n, f, u, i in SHAPES
]


def request_of(shape: tuple[bool, bool, int, bool, bool, bool], task: str = TASK) -> JSON:
    """Build a request of a shape, with fields of every kind that optillm passes on."""
    stream, tools, n, formatted, null, image = shape
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    asked: Any = [{"type": "text", "text": task}, picture] if image else task
    messages: list[JSON] = [{"role": "system", "content": "Be brief."}]
    if null:
        messages += [
            {"role": "user", "content": "look around"},
            {"role": "assistant", "content": None, "tool_calls": [CALLS[0]]},
            {"role": "tool", "tool_call_id": "call_a", "content": "a.txt"},
            {"role": "assistant", "content": "There is a.txt."},
        ]
    body: JSON = {"messages": [*messages, {"role": "user", "content": asked}], "temperature": 0.25, "seed": 7}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if tools:
        body |= {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}
    if formatted:
        schema = {"name": "x", "strict": True, "schema": {"type": "object", "properties": {}}}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if n > 1:
        body["n"] = n
    return body


def seen_by_client(response: httpx.Response, *, stream: bool, same_prompt: bool = True) -> Any:
    """Return what a client gets, less the ids, times and our own field, and less the length of another prompt."""
    parts = chunks_of(response) if stream and response.status_code == 200 else [response.json()]
    for part in parts:
        if not same_prompt and "usage" in part:
            part["usage"] = part["usage"]["completion_tokens"]
    return response.status_code, [
        {k: v for k, v in part.items() if k not in ("id", "created", "agent_memory")} for part in parts
    ]


def answer(request: Mapping[str, Any]) -> Reply:
    """Answer with tool calls where tools are offered, else with a text that is easily mangled."""
    return Reply(content=None, tool_calls=CALLS) if request.get("tools") else Reply(content=TRICKY)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_nothing_to_recall_changes_nothing(
    host: Host, namespace: dict[str, str], shape: tuple[bool, bool, int, bool, bool, bool]
) -> None:
    """With nothing in memory, upstream gets the same bytes and the client the same answer, in every mode."""
    host.upstream.reply = answer
    body, stream = request_of(shape), shape[0]
    expected = seen_by_client(host.post({"model": PLAIN, **body}), stream=stream)
    assert expected[0] == 200
    for mode in ("readwrite", "read", "write", "off"):
        memory = {**namespace, "mode": mode}
        response = host.post({"model": MEMORY, **body, "agent_memory": memory})
        assert seen_by_client(response, stream=stream) == expected, mode
        assert response.headers["X-Agent-Memory-Action"] == "plain"
        assert response.headers["X-Agent-Memory-Trace-Id"].startswith("chatcmpl-")
        if not stream:
            assert ("agent_memory" in response.json()) == (mode != "off")
    assert len(host.upstream.requests) == 5
    assert len({request.body for request in host.upstream.requests}) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_injection_changes_the_tail_alone(
    host: Host, module_namespace: dict[str, str], shape: tuple[bool, bool, int, bool, bool, bool]
) -> None:
    """With a memory, upstream gets the same but for an insertion at the tail, and the client the same answer.

    In the middle of a dialogue (`null`) nothing is inserted.
    """
    host.upstream.reply = answer
    body, stream = request_of(shape), shape[0]
    expected = seen_by_client(host.post({"model": PLAIN, **body}), stream=stream, same_prompt=False)
    memory = {**module_namespace, "mode": "read"}
    response = host.post({"model": MEMORY, **body, "agent_memory": memory})
    in_dialogue = shape[4]
    assert response.headers["X-Agent-Memory-Action"] == ("plain" if in_dialogue else "inject")
    assert seen_by_client(response, stream=stream, same_prompt=in_dialogue) == (
        seen_by_client(host.post({"model": PLAIN, **body}), stream=stream) if in_dialogue else expected
    )
    plain, injected = host.sent[:2]
    if in_dialogue:
        assert injected == plain
        return
    assert {**plain, "messages": 0} == {**injected, "messages": 0}
    *before, last = plain["messages"]
    assert injected["messages"][: len(before)] == before
    rest = injected["messages"][len(before) :]
    if len(rest) > 1:  # turns, which only a plain request gets
        assert rest == [{"role": "user", "content": TASK}, {"role": "assistant", "content": ANSWER}, last]
    else:
        gap = " " if isinstance(body["messages"][-1]["content"], list) else SEPARATOR
        assert rest[0]["content"].startswith(last["content"] + gap + "<agent_memory")
        assert rest[0]["content"].splitlines()[-1].startswith("</agent_memory")
        assert ANSWER in rest[0]["content"]


def test_off_is_off(host: Host, module_namespace: dict[str, str]) -> None:
    """Mode `off` sends the client's bytes although a memory fits, answers with the upstream's id, records nothing."""
    body = request_of((False, False, 1, False, False, False))
    host.post({"model": PLAIN, **body})
    host.settle()
    before = host.get("stats", key=None)["traces"]
    response = host.post({"model": MEMORY, **body, "agent_memory": {**module_namespace, "mode": "off"}})
    plain, off = host.upstream.requests
    assert plain.body == off.body
    assert response.json()["id"].startswith("chatcmpl-upstream-")
    host.settle()
    assert host.get("stats", key=None)["traces"] == before


def test_modes_read_and_write(host: Host, module_namespace: dict[str, str]) -> None:
    """`read` recalls and records nothing, `write` records and recalls nothing."""
    body = request_of((False, False, 1, False, False, False))
    for mode, action, recorded in (("read", "inject", 0), ("write", "plain", 1), ("readwrite", "inject", 1)):
        host.settle()
        before = host.get("stats", key=None)["traces"]
        response = host.post({"model": MEMORY, **body, "agent_memory": {**module_namespace, "mode": mode}})
        host.settle()
        assert response.json()["agent_memory"]["action"] == action, mode
        assert host.get("stats", key=None)["traces"] - before == recorded, mode


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_upstream_errors_pass_through(
    host: Host, module_namespace: dict[str, str], status: int, n: int, *, stream: bool
) -> None:
    """An upstream's error reaches the client with the status and body that `none` gives it.

    As many calls are made, and one more where the prompt itself was refused: without memory it may suit.
    """
    host.upstream.reply = lambda _request: Reply(status=status, headers={"x-should-retry": "false"})
    body = request_of((stream, False, n, False, False, False))
    expected = host.post({"model": PLAIN, **body})
    found = host.post({"model": MEMORY, **body, "agent_memory": module_namespace})
    assert (found.status_code, found.content) == (expected.status_code, expected.content)
    assert found.headers["Content-Type"] == expected.headers["Content-Type"]
    assert len(host.upstream.requests) <= (3 if status == 400 else 2)
    host.settle()
    trace = host.get(f"traces/{found.headers['X-Agent-Memory-Trace-Id']}")
    assert str(status) in trace["error"]
    assert trace["answer"] is None


def test_an_upstream_that_hangs(host: Host, module_namespace: dict[str, str]) -> None:
    """While the upstream hangs, the client waits as long as it likes, as with `none`, and others are served."""
    body = request_of((False, False, 1, False, False, False))
    host.upstream.reply = lambda _request: Reply(hang=True)
    for model in (PLAIN, MEMORY):
        with pytest.raises(httpx.ReadTimeout):
            host.post({"model": model, **body, "agent_memory": module_namespace} if model == MEMORY else
                      {"model": model, **body}, timeout_s=1.5)  # fmt: skip
    assert len(host.upstream.requests) == 2
    host.upstream.reply = lambda _request: "still here"
    answered = host.chat(TASK, memory=module_namespace)
    assert answered["choices"][0]["message"]["content"] == "still here"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"messages": "text"},
        {"messages": ["text"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": "x"}]},
        {"n": None},
        {"n": 0},
        {"n": -1},
        {"stream": None},
        {"unknown_field": 1},
        {"stream_options": 7},
        {"tools": 7},
        {"tools": [7]},
        {"max_tokens": 5},
        {"max_completion_tokens": 5, "max_tokens": 9},
    ],
    ids=json.dumps,
)
def test_odd_bodies_fare_as_with_none(host: Host, namespace: dict[str, str], fields: JSON) -> None:
    """A malformed or unusual body has the same status, answer and upstream bytes as with `none`."""
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    expected = host.post({"model": PLAIN, **body})
    sent_by_none = [request.body for request in host.upstream.requests]
    host.upstream.clear()
    found = host.post({"model": MEMORY, **body, "agent_memory": namespace})
    assert found.status_code == expected.status_code
    assert [request.body for request in host.upstream.requests] == sent_by_none
    if expected.status_code == 200:
        assert seen_by_client(found, stream=False) == seen_by_client(expected, stream=False)
    else:
        assert found.content == expected.content


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '"x"', "null"])
def test_bodies_that_are_no_object(host: Host, content: str) -> None:
    """A body that is no JSON object is the host's to refuse, as it does without the plugin, and serving goes on."""
    assert host.post(content).status_code in (400, 500)
    assert host.chat("hello")["agent_memory"]["action"] == "plain"


@pytest.fixture(scope="module")
def module_namespace(module_host: Host) -> dict[str, str]:
    """Give a namespace in which the task's answer is in memory, learned under the shapes' system prompt."""
    memory = {"namespace": "fidelity"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TASK}]
    module_host.upstream.reply = lambda _request: ANSWER
    trace_id = module_host.chat(messages, memory=memory)["id"]
    module_host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "human"})
    return memory
