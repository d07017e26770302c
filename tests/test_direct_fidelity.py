"""Fidelity of the direct lane: a client sees what the upstream itself would tell it, but for id and metadata."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosting import JSON, MODEL, Host
from openai import OpenAI

from optillm_memory.testing.upstream import Reply, tool_call

pytestmark = pytest.mark.host

CALLS = [tool_call("run", {"command": "ls -la /srv"}, "call_a"), tool_call("run", {"command": "pwd"}, "call_b")]
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
PAPER = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}
SCHEMA = {"name": "x", "strict": True, "schema": {"type": "object", "properties": {}}}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.000012345678901234567, "bytes": [97], "top_logprobs": []}]}
TRICKY = "User: asked <think>three words here</think> Assistant: é😀 \u2028 done"
HEADERS = {"x-request-id": "req_7", "x-ratelimit-remaining-requests": "41", "openai-processing-ms": "12"}


def message(logprobs: Any = None, **more: Any) -> JSON:
    """Return a whole answer's body with what else a message has."""
    said = {"role": "assistant", "content": "ok", **more}
    choice = {"index": 0, "message": said, "logprobs": logprobs, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-u", "object": "chat.completion", "created": 1, "model": "m-2026", "service_tier": "flex",
        "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        "later_field": {"big": 123456789012345678901234567890, "none": None},
    }  # fmt: skip


# What is asked, and what is answered.
REQUESTS: dict[str, tuple[JSON, Reply]] = {
    "plain": ({"temperature": 0.25, "seed": 7, "stop": None}, Reply(TRICKY, headers=HEADERS)),
    "nothing": ({}, Reply(content=None, finish_reason="content_filter")),
    "tools": ({"tools": TOOLS, "tool_choice": "auto"}, Reply(content=None, tool_calls=CALLS[:1])),
    "parallel": ({"tools": TOOLS, "parallel_tool_calls": True}, Reply("I look.", tool_calls=CALLS)),
    "picture": ({"of": [PICTURE, {"type": "text", "text": "what is it?"}]}, Reply("a cat")),
    "sound": ({"of": [{"type": "text", "text": "write it down"}, SOUND], "modalities": ["text"]}, Reply("hm")),
    "file": ({"of": [{"type": "text", "text": "sum it up"}, PAPER]}, Reply("long")),
    "format": ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, Reply("{}")),
    "logprobs": ({"logprobs": True, "top_logprobs": 2}, Reply(body=message(logprobs=LOGPROBS))),
    "n": ({"n": 3}, Reply("three times")),
    "reasoning": ({"reasoning_effort": "low"}, Reply(body=message(reasoning_content="I think of  it.\n"))),
    "refusal": ({}, Reply(body=message(content=None, refusal="No."))),
    "annotations": ({}, Reply(body=message(annotations=[{"type": "url_citation"}], audio=None))),
    "usage": ({"stream_options": {"include_usage": True}}, Reply("counted")),
    "unknown": ({"provider": {"order": ["b", "a"]}, "z": None, "a": 10**30, "f": 1e-7}, Reply(body=message())),
    "developer": ({"first": "developer"}, Reply("fine")),
}  # fmt: skip
FAILURES: dict[str, Reply] = {
    **{str(status): Reply(status=status, headers={"x-request-id": "req_8"}) for status in (400, 401, 404, 408, 413)},
    "429": Reply(status=429, headers={"retry-after": "7", "x-ratelimit-remaining-tokens": "0"}),
    "500": Reply(status=500),
    "503": Reply(status=503, headers={"retry-after": "1"}),
    "no-json": Reply(raw=b"<html>log in</html>", headers={"Content-Type": "text/html"}),
    "no-json-502": Reply(status=502, raw=b"<html>bad gateway</html>", headers={"Content-Type": "text/html"}),
    "nothing": Reply(raw=b"", headers={"Content-Type": "application/json"}),
    "other-json": Reply(raw=b'{"detail": "odd"}', headers={"Content-Type": "application/json"}),
    "cut-off": Reply("one two three four", cut_after=3),
    "error-in-stream": Reply(events=('data: {"error": {"message": "overloaded", "code": 529}}\n\n',)),
    "no-end": Reply(events=('data: {"id": "x", "choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n',)),
}


def request_of(changes: JSON, *, stream: bool) -> JSON:
    """Return a request's body, our own fields aside."""
    changes = dict(changes)
    asked: list[JSON] = [
        {"role": changes.pop("first", "system"), "content": "Be brief.", "name": None},
        {"role": "user", "content": changes.pop("of", "what is there?")},
    ]
    options = changes.pop("stream_options", {}) if not stream else changes.pop("stream_options", None)
    more = {"stream": True, **({"stream_options": options} if options else {})} if stream else {}
    return {"messages": asked, **changes, **more}


def seen(response: httpx.Response) -> Any:
    """Return what a client sees of a response, less the ids and our metadata."""
    headers = {k: v for k, v in response.headers.items() if k.startswith(("x-r", "openai", "retry", "content-type"))}
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return response.status_code, headers, [without_ours(line) for line in response.iter_lines() if line]
    return response.status_code, headers, without_ours(response.read().decode())


def without_ours(text: str) -> Any:
    """Return JSON, its keys in order, less what may differ; other text as it is."""
    try:
        pairs = json.loads(text.removeprefix("data: "), object_pairs_hook=list)
    except ValueError:
        return text
    return [pair for pair in pairs if pair[0] not in ("id", "created", "agent_memory")]


def both_ways(host: Host, body: JSON) -> tuple[Any, Any]:
    """Ask the upstream itself, and through memory; return what is seen of each."""
    results = []
    for url, model in ((host.upstream.base_url, "m"), (host.process.base_url, MODEL)):
        with host.http.stream(
            "POST", f"{url}/chat/completions", json={"model": model, **body}, headers={"Authorization": "Bearer sk-x"}
        ) as response:
            try:
                results.append(seen(response))
            except (httpx.RemoteProtocolError, httpx.ReadError):
                results.append((response.status_code, "broke off"))
    return results[0], results[1]


@pytest.fixture(scope="module")
def warm(module_host: Host) -> Host:
    """Give a host with a memory that has something to say."""
    module_host.teach("what is there?", "A cat.")
    return module_host


@pytest.mark.parametrize(
    ("kind", "stream", "memory"), list(itertools.product(REQUESTS, (False, True), ("off", "write", "readwrite")))
)
def test_a_request_and_its_answer_pass_whole(host: Host, warm: Host, kind: str, *, stream: bool, memory: str) -> None:
    """Every field, in order, in both directions; with memory switched on but for what memory adds to the prompt."""
    changes, reply = REQUESTS[kind]
    body = request_of(changes, stream=stream)
    host.upstream.reply = lambda _: reply
    direct, through = both_ways(host, {**body, "agent_memory": {"mode": memory, "namespace": f"{kind}-{memory}"}})
    assert through == direct
    sent, relayed = (json.loads(r.body, object_pairs_hook=list) for r in host.upstream.requests)
    assert relayed == [pair for pair in sent if pair[0] != "agent_memory"]
    assert host.upstream.requests[1].headers["authorization"] == "Bearer sk-x"


@pytest.mark.parametrize(("kind", "stream"), list(itertools.product(FAILURES, (False, True))))
def test_a_failure_passes_whole(host: Host, kind: str, *, stream: bool) -> None:
    """Status, headers and body of an error, and what is no completion, as the upstream sent it; asked once."""
    host.upstream.reply = lambda _: FAILURES[kind]
    direct, through = both_ways(host, request_of({}, stream=stream))
    assert through == direct
    assert len(host.sent) == 2


@pytest.mark.parametrize("kind", REQUESTS)
def test_the_python_client_reads_the_same(host: Host, kind: str) -> None:
    """The real package: whole answers, streams, and the fields that it does not know."""
    changes, reply = REQUESTS[kind]
    host.upstream.reply = lambda _: reply
    answers = []
    for url, model in ((host.upstream.base_url, "m"), (host.process.base_url, MODEL)):
        with OpenAI(base_url=url, api_key="sk-x", max_retries=0) as client:
            body = request_of(changes, stream=False)
            known = {k: body.pop(k) for k in ("messages", "tools") if k in body}
            whole = client.chat.completions.create(model=model, extra_body=body, **known)
            chunks = client.chat.completions.create(model=model, stream=True, extra_body=body, **known)
            answers.append([plain(part) for part in (whole, *chunks)])
    assert answers[1] == answers[0]


def plain(part: Any) -> JSON:
    """Return what the client read, less ids and metadata."""
    made: JSON = part.model_dump()
    return {k: v for k, v in made.items() if k not in ("id", "created", "agent_memory")}


NODE = """
import OpenAI from 'openai';
const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: 'sk-x', maxRetries: 0 });
const cut = (o) => { const { id, created, agent_memory, ...rest } = o; return rest; };
const out = [];
for await (const line of (await import('node:readline')).createInterface({ input: process.stdin })) {
  const body = { model, ...JSON.parse(line) };
  try {
    const answer = await client.chat.completions.create(body);
    if (body.stream) { for await (const chunk of answer) out.push(cut(chunk)); } else { out.push(cut(answer)); }
  } catch (error) {
    out.push({ error: error.constructor.name, status: error.status, said: error.error ?? null,
               after: error.headers?.get?.('retry-after') ?? null });
  }
}
console.log(JSON.stringify(out));
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the real Node client; skipped where there is no Node, or no registry that has it."""
    folder = tmp_path_factory.mktemp("node")
    if shutil.which("npm") is None:
        pytest.skip("Node is not installed: apt-get install nodejs npm")
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "openai@5"], cwd=folder, capture_output=True, check=False,
        text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"npm install openai: {done.stderr[-300:]}")
    (folder / "ask.mjs").write_text(NODE)
    return folder


def test_the_node_client_reads_the_same(host: Host, node: Path) -> None:
    """Each request and each failure, streamed and not."""
    answers: list[Reply] = []
    asked: list[JSON] = []
    for (changes, reply), stream in itertools.product(REQUESTS.values(), (False, True)):
        answers.append(reply)
        asked.append(request_of(changes, stream=stream))
    for reply, stream in itertools.product(FAILURES.values(), (False, True)):
        answers.append(reply)
        asked.append(request_of({}, stream=stream))
    lines = "".join(json.dumps(body) + "\n" for body in asked)
    told = []
    for url, model in ((host.upstream.base_url, "m"), (host.process.base_url, MODEL)):
        waiting = iter(answers)
        host.upstream.reply = lambda _, waiting=waiting: next(waiting)  # type: ignore[misc]
        done = subprocess.run(
            ["node", "ask.mjs", url, model], cwd=node, input=lines, capture_output=True, text=True, check=True,
            timeout=120,
        )  # fmt: skip
        told.append(json.loads(done.stdout))
        assert next(waiting, None) is None
    assert told[1] == told[0]
    assert len(told[0]) > len(asked)
