"""The direct lane: words go out as they come, who leaves is worked for no longer, and nothing is asked twice."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from agents import RIGHT, WRONG
from hosting import JSON, KEY, LEAN, MODEL, QUIET, Host, authorization, running, served, until

from optillm_memory.host.upstream import Cancellation, _TrackedStream
from optillm_memory.testing.host import HostProcess, child_environment
from optillm_memory.testing.upstream import RecordingUpstream, Reply, events, tool_call

pytestmark = pytest.mark.host

WORDS = "one two three four five six seven eight"
SLACK_S = 5.0
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]
LEFT = "the client disconnected before it had the whole answer"


def asking(text: str, memory: Mapping[str, Any] | None = None, **more: Any) -> JSON:
    """Return a streamed request's body."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True, **more}
    return {**body, "agent_memory": dict(memory)} if memory else body


@contextlib.contextmanager
def streaming(host: Host, body: JSON) -> Iterator[Any]:
    """Ask, and give the response while it comes."""
    url = f"{host.process.base_url}/chat/completions"
    with host.http.stream("POST", url, json=body, headers=authorization(KEY)) as response:
        yield response


def events_in(response: Any) -> Iterator[Any]:
    """Yield the chunks of a response as they come, and "[DONE]"."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]"


def said(chunks: list[JSON]) -> str:
    """Return the words of chunks."""
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


def trace_of(host: Host, response: Any) -> JSON:
    """Return the trace of a response, once it is there."""
    path = f"traces/{response.headers['X-Agent-Memory-Trace-Id']}"
    assert until(lambda: host.route("GET", path).status_code == 200)
    return host.get(path)


def only_trace(host: Host, text: str) -> JSON:
    """Return the one trace of a request for a text, once it is there."""
    found: list[JSON] = []

    def is_there() -> bool:
        found[:] = host.get("traces", text=text)["data"]
        return bool(found)

    assert until(is_there)
    assert len(found) == 1
    return host.get(f"traces/{found[0]['trace_id']}")


def test_words_go_out_as_they_come(host: Host, namespace: dict[str, str]) -> None:
    """The first word is there long before the upstream has said its last; all have the trace's id, and are recorded."""
    host.upstream.reply = lambda _: Reply(WORDS, chunk_delay_s=0.25)
    with streaming(host, asking("count", namespace)) as response:
        arrived = [(time.perf_counter(), chunk) for chunk in events_in(response)]
    times, chunks = [at for at, _ in arrived], [chunk for _, chunk in arrived]
    assert chunks.pop() == "[DONE]"
    assert times[-1] - times[1] > 1.0
    assert said(chunks) == WORDS
    trace_id = response.headers["X-Agent-Memory-Trace-Id"]
    assert {chunk["id"] for chunk in chunks} == {trace_id}
    assert [chunk.get("agent_memory", {}).get("trace_id") for chunk in chunks] == [None] * (len(chunks) - 1) + [
        trace_id
    ]
    trace = trace_of(host, response)
    assert (trace["trace_id"], trace["answer"], trace["error"]) == (trace_id, WORDS, None)
    assert host.sent[0]["stream"] is True


def test_a_streamed_answer_is_learned_from(host: Host, namespace: dict[str, str]) -> None:
    """Its trace takes feedback, and is injected next time, in a stream as well."""
    host.upstream.reply = lambda _: Reply("It is in uploader.toml.")
    task = "Which file holds the retry limit of the nightly uploader?"
    with streaming(host, asking(task, namespace)) as response:
        assert list(events_in(response))[-1] == "[DONE]"
    trace_id = response.headers["X-Agent-Memory-Trace-Id"]
    assert (
        host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"})["status"] == "applied"
    )
    with streaming(host, asking(task + " Say it.", namespace)) as response:
        chunks = list(events_in(response))[:-1]
    assert response.headers["X-Agent-Memory-Action"] == "inject"
    assert chunks[-1]["agent_memory"]["injected"]
    assert "It is in uploader.toml." in json.dumps(host.prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_in_place_of_an_answer_teaches_nothing(host: Host, *, stream: bool) -> None:
    """A login wall with status 200 reaches the client as the page that it is; the trace holds an error, no answer."""
    page = b"<html><body>Please sign in to go on.</body></html>"
    host.upstream.reply = lambda _: Reply(raw=page, headers={"Content-Type": "text/html"})
    response = host.post(asking("let me in") | {"stream": stream})
    assert (response.status_code, response.content) == (200, page)
    assert response.headers["Content-Type"] == "text/html"
    trace = trace_of(host, response)
    assert "sign in" in trace["error"]
    assert trace["answer"] is None
    host.tell({"trace_id": trace["trace_id"], "metric": "success", "value": True, "source": "code"})
    assert "sign in" not in json.dumps(host.get("memories", limit=1000))


def test_the_headers_are_there_in_every_mode(host: Host) -> None:
    """With memory off too, as where optillm answers; the body is the upstream's own then."""
    host.upstream.reply = lambda _: "ok"
    for stream in (False, True):
        response = host.post(asking("hi", {"mode": "off"}) | {"stream": stream})
        assert response.headers["X-Agent-Memory-Action"] == "plain"
        assert response.headers["X-Agent-Memory-Trace-Id"] not in response.text


def test_what_an_upstream_says_to_browsers_stays_there(host: Host) -> None:
    """Neither its cookies nor its leave for the pages of other sites: the key is the server's."""
    headers = {"access-control-allow-origin": "*", "set-cookie": "a=b", "x-request-id": "req_9"}
    host.upstream.reply = lambda _: Reply("ok", headers=headers)
    for stream in (False, True):
        response = host.post(asking("hi") | {"stream": stream})
        assert response.headers["x-request-id"] == "req_9"
        assert not {"access-control-allow-origin", "set-cookie"} & set(response.headers)


def test_cookies_of_one_caller_are_not_anothers(host: Host) -> None:
    """What the upstream sets with one answer does not come back to it with the next request."""
    host.upstream.reply = lambda _: Reply("ok", headers={"set-cookie": "session=alices; Path=/"})
    for key in ("sk-alice", "sk-bob", KEY):
        host.post(asking("hi") | {"stream": False}, key=key)
    assert all("cookie" not in request.headers for request in host.upstream.requests)
    assert [r.headers["authorization"].split("-")[1] for r in host.upstream.requests] == ["alice", "bob", "test"]


def test_headers_in_other_letters_pass(host: Host) -> None:
    """An upstream's header in UTF-8 reaches the client byte for byte."""
    value = "modèle-模型".encode()
    host.upstream.reply = lambda _: Reply("ok", headers={"x-model": value.decode("latin-1")})
    for stream in (False, True):
        with streaming(host, asking("hi") | {"stream": stream}) as response:
            assert {n.lower(): v for n, v in response.headers.raw}[b"x-model"] == value
            response.read()


def test_an_idempotency_key_goes_out_once(host: Host, namespace: dict[str, str]) -> None:
    """The call without memory after a refusal is another request: under the same key it would get the same refusal."""
    host.teach("Which file holds the retry limit?", "uploader.toml", memory=namespace)
    host.upstream.clear()
    host.upstream.reply = lambda r: 400 if "uploader.toml" in json.dumps(r["messages"]) else "It is there."
    body = asking("Which file holds the retry limit?", namespace) | {"stream": False}
    assert host.post(body, headers={"Idempotency-Key": "k-1"}).status_code == 200
    assert [request.headers.get("idempotency-key") for request in host.upstream.requests] == ["k-1", None]


def test_connections_are_kept(host: Host) -> None:
    """Requests one after another use one connection to the upstream, with the server's key."""
    host.chat("warm up")
    assert host.upstream.requests[-1].headers["authorization"] == "Bearer sk-test"
    before = host.upstream.connections
    for number in range(5):
        host.chat(f"question {number}")
        with streaming(host, asking(f"question {number}")) as response:
            list(events_in(response))
    assert host.upstream.connections == before


@pytest.mark.parametrize(
    ("reply", "stream"),
    [(Reply(WORDS, hang_after=3), True), (Reply(WORDS, chunk_delay_s=0.4), True), (Reply(hang=True), True),
     (Reply(hang=True), False)],
    ids=["no-chunk-due", "chunks", "before-the-first", "whole"],
)  # fmt: skip
def test_who_leaves_is_worked_for_no_longer(
    host: Host, namespace: dict[str, str], reply: Reply, *, stream: bool
) -> None:
    """Also while no chunk is due, and before the first: the upstream sees it, the trace says it, nothing is learned."""
    host.upstream.reply = lambda _: reply
    text = f"count for {uuid.uuid4().hex}"
    body = json.dumps({**asking(text, namespace), "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", host.process.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert until(lambda: bool(host.sent))
        if not reply.hang:
            client.settimeout(20)
            assert b"HTTP/1.1 200" in client.recv(1 << 16)
        time.sleep(0.5)
        left = time.perf_counter()
    assert until(lambda: bool(host.upstream.departed))
    assert host.upstream.departed[0] - left < 1.0 + SLACK_S
    trace = only_trace(host, text)
    assert LEFT in trace["error"]
    assert trace["answer"] is None
    if not reply.hang:
        assert trace["messages"][-1]["content"].startswith("one")
    assert host.tell({"trace_id": trace["trace_id"], "metric": "success", "value": True, "source": "code"})
    assert text not in json.dumps(host.get("memories", limit=1000)["data"])
    host.upstream.reply = lambda _: Reply("ok")
    assert host.chat("still there?")["choices"][0]["message"]["content"] == "ok"


def test_an_upstream_that_breaks_off_is_seen_to(host: Host, namespace: dict[str, str]) -> None:
    """The client's connection breaks off as well; the trace says so and keeps the words; nothing is learned."""
    host.upstream.reply = lambda _: Reply(WORDS, cut_after=4)
    chunks: list[JSON] = []
    with (
        streaming(host, asking("count", namespace)) as response,
        pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)),
    ):
        chunks.extend(events_in(response))
    assert said(chunks) == "one two three "
    trace = trace_of(host, response)
    assert trace["error"].startswith("the upstream broke off")
    assert (trace["answer"], trace["messages"][-1]["content"]) == (None, "one two three ")


def test_no_upstream(db: Path) -> None:
    """Nobody listens there: 502 in OpenAI's shape, and a trace."""
    with RecordingUpstream() as stopped:
        stopped.close()
        with served(stopped, db) as host:
            response = host.post({"model": MODEL, "messages": [{"role": "user", "content": "anybody there?"}]})
            assert response.status_code == 502
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("upstream_error", "upstream_unreachable")
            assert "ConnectError" in only_trace(host, "anybody there?")["error"]


def test_switched_off_the_host_answers(upstream: RecordingUpstream, db: Path) -> None:
    """With the setting off the host asks the upstream as ever: never for a stream."""
    upstream.clear()
    with served(upstream, db, env={"OPTILLM_AGENT_MEMORY_DIRECT": "off"}) as host:
        host.upstream.reply = lambda _: Reply(WORDS)
        with streaming(host, asking("count")) as response:
            assert said(list(events_in(response))[:-1]) == WORDS
        assert "stream" not in host.sent[0] or host.sent[0]["stream"] is False


def test_the_hosts_log_has_the_same_records(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """`--log-conversations`: what the host's own handler writes, on both lanes."""
    records = []
    for lane in ("on", "off"):
        folder = tmp_path / lane
        args = ("--log-conversations", "--conversation-log-dir", str(folder))
        with served(upstream, tmp_path / f"{lane}.db", *args, env={"OPTILLM_AGENT_MEMORY_DIRECT": lane}) as host:
            upstream.reply = lambda _: Reply("fine")
            host.chat("log this", temperature=0.5)
            with streaming(host, asking("log this stream")) as response:
                list(events_in(response))
            upstream.reply = lambda _: Reply(status=401)
            assert host.post(asking("refused") | {"stream": False}).status_code in (401, 500)
            lines = next(folder.glob("*.jsonl")).read_text().splitlines()
        records.append([json.loads(line) for line in lines])
    for direct, hosts in zip(*records, strict=True):
        assert direct.keys() == hosts.keys()
        assert direct["client_request"] == hosts["client_request"]
        assert (direct["approach"], direct["model"]) == (hosts["approach"], hosts["model"])
        assert direct["provider_calls"] == hosts["provider_calls"]
        assert (direct["error"] is None) == (hosts["error"] is None)
        if direct["final_response"] is not None:
            assert said_in(direct["final_response"]) == said_in(hosts["final_response"])


def said_in(completion: JSON) -> list[JSON]:
    """Return the messages of a completion, without the fields that the host's client adds as null."""
    return [{k: v for k, v in c["message"].items() if v is not None} for c in completion["choices"]]


def failing(host: Host, memory: Mapping[str, str]) -> list[JSON]:
    """Teach that a command fails and what works instead; return a conversation that comes to it again."""
    told = [{"role": "user", "content": "carry on with the work"}]
    for command, output in ((WRONG, "make: *** No rule\nExit code: 2"), (RIGHT, "done\nExit code: 0")):
        host.upstream.reply = lambda _, c=command: Reply(None, tool_calls=[tool_call("bash", {"command": c})])  # type: ignore[misc]
        answered = host.chat(told, memory=memory, tools=TOOLS)["choices"][0]["message"]
        told += [answered, {"role": "tool", "tool_call_id": answered["tool_calls"][0]["id"], "content": output}]
    host.upstream.reply = lambda _: "It is done."
    answered = host.chat(told, memory=memory, tools=TOOLS)
    episode = {
        "episode_id": answered["agent_memory"]["episode_id"],
        "metric": "success",
        "value": True,
        "source": "code",
    }
    host.tell(episode)
    return [{"role": "user", "content": "do the other piece of work"}]


@pytest.mark.parametrize("words", ["", "I will run it. "])
def test_a_streamed_call_is_guarded(host: Host, namespace: dict[str, str], words: str) -> None:
    """Words go out at once; a call that is known to fail is held back, and what a second answer calls goes out."""
    asked = failing(host, namespace)
    host.upstream.clear()

    def reply(request: JSON) -> Reply:
        command = RIGHT if "<agent_memory" in json.dumps(request["messages"]) else WRONG
        return Reply(words or None, tool_calls=[tool_call("bash", {"command": command})])

    host.upstream.reply = reply
    body = {**asking("", namespace, tools=TOOLS, stream_options={"include_usage": True}), "messages": asked}
    with streaming(host, body) as response:
        chunks = list(events_in(response))
    assert chunks.pop() == "[DONE]"
    arguments = "".join(
        call["function"]["arguments"]
        for chunk in chunks for c in chunk["choices"] for call in c["delta"].get("tool_calls") or []
    )  # fmt: skip
    assert json.loads(arguments) == {"command": RIGHT}
    assert said(chunks) == words
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == ["tool_calls"]
    assert [bool(request.get("stream")) for request in host.sent] == [True, False]
    told = next(chunk["agent_memory"] for chunk in chunks if "agent_memory" in chunk)
    assert told["extra_calls"] == 1
    assert chunks[-1]["usage"]["prompt_tokens"] > 0
    trace = trace_of(host, response)
    assert RIGHT in json.dumps(trace["messages"][-1])
    assert trace["messages"][-1]["content"] == words


def test_a_second_answer_without_a_call_does_not_end_what_words_began(host: Host, namespace: dict[str, str]) -> None:
    """Where words announced a call, an answer in other words could only be half told: the first call goes out."""
    asked = failing(host, namespace)
    host.upstream.clear()

    def reply(request: JSON) -> Reply:
        if "<agent_memory" in json.dumps(request["messages"]):
            return Reply("Better not.")
        return Reply("I will run it.", tool_calls=[tool_call("bash", {"command": WRONG})])

    host.upstream.reply = reply
    with streaming(host, {**asking("", namespace, tools=TOOLS), "messages": asked}) as response:
        chunks = list(events_in(response))
    assert len(host.sent) == 2
    assert said(chunks[:-1]) == "I will run it."
    assert [c["finish_reason"] for chunk in chunks[:-1] for c in chunk["choices"] if c["finish_reason"]] == [
        "tool_calls"
    ]


def test_a_call_is_not_held_beyond_its_end(host: Host, namespace: dict[str, str]) -> None:
    """The upstream says that this is all, and keeps the connection open: the client has its call."""
    calls = [tool_call("bash", {"command": "ls"})]
    number = len(events({}, {"choices": [{"message": {"content": None, "tool_calls": calls}}]}))
    sent = events({}, {"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}]})
    host.upstream.reply = lambda _: Reply(events=[*sent, ": bye\n\n"], hang_after=number)
    with streaming(host, asking("go on", namespace, tools=TOOLS)) as response:
        for event in events_in(response):
            if event == "[DONE]":
                break
    assert trace_of(host, response)["error"] is None


def test_who_leaves_does_not_cut_off_another() -> None:
    """A connection that went back to the pool is the next request's, whoever had it before."""
    cancellation, other = Cancellation(), Cancellation()
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(10)
    stream = _TrackedStream(SimpleNamespace(get_extra_info=lambda _: ends[0], write=ends[0].sendall))
    for call in (cancellation, other):
        with call.tracking():
            stream.write(b"x")
    cancellation()
    ends[1].sendall(b"y")
    assert ends[0].recv(1) == b"y"
    other.release()
    other()
    ends[1].sendall(b"z")
    assert ends[0].recv(1) == b"z"
    other.is_cancelled = False
    with other.tracking():  # a further call of the same request, over the same connection
        stream.write(b"x")
    other()
    assert ends[0].recv(1) == b""
    for end in ends:
        end.close()


def test_a_refusal_in_the_stream_is_asked_once_more(host: Host, namespace: dict[str, str]) -> None:
    """A gateway that answers 200 and says in its first event that it refuses the prompt with memory."""
    host.teach("Which file holds the retry limit?", "uploader.toml", memory=namespace)
    host.upstream.clear()

    def reply(request: JSON) -> Reply:
        if "uploader.toml" in json.dumps(request["messages"]):
            return Reply(events=(": wait\n\n", 'data: {"error": {"message": "no", "code": 400}}\n\n'))
        return Reply(WORDS)

    host.upstream.reply = reply
    with streaming(host, asking("Which file holds the retry limit?", namespace)) as response:
        chunks = list(events_in(response))
    assert said(chunks[:-1]) == WORDS
    assert len(host.sent) == 2
    trace = trace_of(host, response)
    assert (trace["answer"], trace["skipped"][0]["reason"]) == (WORDS, "refused_with_memory")


@pytest.mark.skipif(os.name == "nt", reason="gunicorn needs fork")
def test_under_gunicorn(upstream: RecordingUpstream, db: Path, tmp_path: Path) -> None:
    """The app of `serve` under a WSGI server with two workers: it streams, sees who leaves, and learns."""
    upstream.clear()
    process = HostProcess.gunicorn(upstream.base_url, db=db, threads=8, env={**QUIET, **LEAN}, cwd=tmp_path)
    with running(process, upstream, db) as host:
        upstream.reply = lambda _: Reply(WORDS, chunk_delay_s=0.25)
        with streaming(host, asking("count")) as response:
            arrived = [(time.perf_counter(), chunk) for chunk in events_in(response)]
        assert said([chunk for _, chunk in arrived[:-1]]) == WORDS
        assert arrived[-1][0] - arrived[1][0] > 1.0
        upstream.reply = lambda _: Reply(WORDS, hang_after=3)
        with streaming(host, asking("count again")) as response:
            assert next(events_in(response))["id"] == response.headers["X-Agent-Memory-Trace-Id"]
        assert until(lambda: bool(upstream.departed))
        assert LEFT in trace_of(host, response)["error"]
        upstream.reply = lambda _: "fine"
        host.teach("Who owns the ledger?", "The finance team.")
        assert until(lambda: host.chat("Who owns the ledger now?")["agent_memory"]["action"] == "inject")


BEFORE = (
    "direct:takes", "upstream:HostUpstream.of", "direct:_Call", "direct:_own_key", "direct:Client", "direct:_encoded",
    "direct:_Call.request", "upstream:Upstream.request",
)  # fmt: skip
BESIDE = (
    "direct:_ConversationLog.start", "direct:_ConversationLog.final", "exchange:Exchange.guarded",
    "exchange:Exchange.labelled", "exchange:Exchange.metadata", "exchange:Exchange.finish", "direct:with_data",
    "direct:StreamAccumulator.add", "direct:StreamAccumulator.completion", "direct:deltas_of",
)  # fmt: skip
WITHIN = (
    "direct:_Call._is_refused",
    "direct:split_events",
    "direct:returned_headers",
    "upstream:Upstream.send",
    "direct:_Call._response",
)


def test_whatever_fails_nothing_is_asked_twice(db: Path) -> None:
    """Before the upstream was asked the host answers instead; after that, the client gets what came, or an error."""
    env = child_environment(os.environ, db, {**QUIET, **LEAN})
    script = Path(__file__).with_name("direct_faults.py")
    done = subprocess.run(
        [sys.executable, str(script), *BEFORE, *BESIDE, *WITHIN], capture_output=True, text=True, env=env, check=False,
        timeout=300,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert len(found) == 2 * (1 + len(BEFORE) + len(BESIDE) + len(WITHIN))
    good = {"asked": 1, "status": 200, "words": "three words here"}
    for name, got in found.items():
        if name.split()[0] in WITHIN:
            assert got["asked"] <= 1, name
            assert got["status"] in (200, 502), name
        else:
            assert got == good, name
