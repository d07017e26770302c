"""A recording upstream: a small OpenAI-compatible server on the loopback that answers as a test wants."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

MODEL = "upstream-model"
_CLOSE_S = 10.0  # at most, to stop serving
_POLL_S = 0.05  # between two looks whether the client is still there
_ERROR_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request.

    `content` goes into each of the `n` choices (None stays null), as do `tool_calls` and `finish_reason`. `body`
    replaces the whole body. A `status` other than 200 gets an OpenAI-shaped error body. `delay_s` delays the answer;
    with `hang` there is none, and the connection is dropped when the upstream closes. `raw` is sent as it is, with the
    `headers`. Where the request asks for a stream, the answer comes in chunks, `chunk_delay_s` apart, of which `events`
    are a replacement; after `cut_after` of them the connection breaks off, after `hang_after` nothing more comes.
    """

    content: str | None = "ok"
    status: int = 200
    body: Mapping[str, Any] | None = None
    delay_s: float = 0.0
    hang: bool = False
    tool_calls: Sequence[Mapping[str, Any]] = ()
    finish_reason: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    events: Sequence[str] | None = None
    chunk_delay_s: float = 0.0
    cut_after: int | None = None
    hang_after: int | None = None


Answer: TypeAlias = Reply | str | dict[str, Any] | int
ReplyFunction: TypeAlias = Callable[[dict[str, Any]], Answer]


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One POST to /v1/chat/completions as it arrived; `arrived_s` is on `time.perf_counter`'s clock."""

    body: bytes
    json: dict[str, Any]
    headers: Mapping[str, str]  # names in lower case
    arrived_s: float


def tool_call(name: str, arguments: Mapping[str, Any], call_id: str = "call_1") -> dict[str, Any]:
    """Return one tool call in OpenAI's shape, for `Reply(content=None, tool_calls=[…])`."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(dict(arguments))},
    }


def echo(request: dict[str, Any]) -> str:
    """Answer with the last user message: the default `reply`."""
    texts = [_text(message) for message in _messages(request) if message.get("role") == "user"]
    return f"echo: {texts[-1] if texts else ''}"


class RecordingUpstream:
    """An OpenAI-compatible server that records its requests and answers with what `reply` returns.

        with RecordingUpstream(lambda request: "Paris") as upstream:
            client = OpenAI(base_url=upstream.base_url, api_key="any")
            ...
            assert upstream.requests[0].json["messages"][-1]["content"] == "What is the capital of France?"

    It serves from construction until `close()`, many requests at once. `reply` gets the parsed request; it returns a
    str (the assistant's text), a dict (the whole body), an int (an error status) or a `Reply`. A `reply` that raises
    becomes a 500 with its message. A request with `stream` is answered with server-sent events. Raises OSError if
    `port` is taken; 0 picks a free one.
    """

    def __init__(self, reply: ReplyFunction = echo, port: int = 0) -> None:
        self._state = _State(reply)
        self._server = _Server(self._state, port)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def base_url(self) -> str:
        """The URL for an OpenAI client."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def reply(self) -> ReplyFunction:
        """The function that answers; it may be replaced at any time."""
        return self._state.reply

    @reply.setter
    def reply(self, reply: ReplyFunction) -> None:
        self._state.reply = reply

    @property
    def requests(self) -> list[RecordedRequest]:
        """The requests so far, oldest first; a copy."""
        return self._state.recorded()

    @property
    def departed(self) -> list[float]:
        """When clients left before they had their whole answer, on `time.perf_counter`'s clock."""
        return list(self._state.departed)

    @property
    def connections(self) -> int:
        """How many connections have been opened to it."""
        return self._state.connections

    def clear(self) -> None:
        """Forget the requests so far."""
        self._state.clear()

    def close(self) -> None:
        """Stop serving and drop every connection, hanging ones too; a second call does nothing."""
        if self._state.closing.is_set():
            return
        self._state.closing.set()
        self._server.shutdown()
        self._thread.join(_CLOSE_S)
        self._server.drop_connections()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _State:
    """The state that the upstream and its answering threads share."""

    def __init__(self, reply: ReplyFunction) -> None:
        self.reply = reply
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._requests: list[RecordedRequest] = []
        self._answered = 0
        self.departed: list[float] = []
        self.connections = 0

    def record(self, request: RecordedRequest) -> None:
        with self._lock:
            self._requests.append(request)

    def recorded(self) -> list[RecordedRequest]:
        with self._lock:
            return list(self._requests)

    def clear(self) -> None:
        with self._lock:
            self._requests.clear()
            self.departed.clear()

    def next_number(self) -> int:
        with self._lock:
            self._answered += 1
            return self._answered

    def answer(self, request: dict[str, Any]) -> Reply:
        try:
            answer = self.reply(request)
        except Exception as error:  # noqa: BLE001 -- the callback's fault belongs in the caller's test
            return Reply(status=500, body=_error(500, f"reply raised {type(error).__name__}: {error}"))
        if isinstance(answer, str):
            return Reply(content=answer)
        if isinstance(answer, int):
            return Reply(status=answer)
        return answer if isinstance(answer, Reply) else Reply(body=answer)


def _completion(request: dict[str, Any], reply: Reply, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.tool_calls:
        message["tool_calls"] = [dict(call) for call in reply.tool_calls]
    finish = reply.finish_reason or ("tool_calls" if reply.tool_calls else "stop")
    choices = request.get("n") or 1
    prompt = sum(len(_text(one).split()) for one in _messages(request))
    completion = choices * len((reply.content or "").split())
    return {
        "id": f"chatcmpl-upstream-{number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.get("model", MODEL),
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": finish} for index in range(choices)
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }


def events(request: Mapping[str, Any], completion: Mapping[str, Any]) -> list[str]:
    """Return a completion as the server-sent events of a provider: a word or a piece of arguments at a time."""
    head = {k: v for k, v in completion.items() if k not in ("object", "choices", "usage")}
    head |= {"object": "chat.completion.chunk"}
    made: list[str] = []

    def add(index: int, delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> None:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        made.append(f"data: {json.dumps({**head, 'choices': [choice]})}\n\n")

    for choice in completion.get("choices") or []:
        index, message = choice.get("index", 0), choice.get("message") or {}
        add(index, {"role": "assistant", "content": "" if message.get("content") is not None else None})
        for name in ("reasoning_content", "refusal", "content"):
            for word in re.findall(r"\S*\s*", message.get(name) or "")[:-1]:
                add(index, {name: word})
        for number, call in enumerate(message.get("tool_calls") or []):
            function = call.get("function") or {}
            add(index, {"tool_calls": [{"index": number, **call, "function": {**function, "arguments": ""}}]})
            arguments = function.get("arguments") or ""
            for piece in (arguments[i : i + 8] for i in range(0, len(arguments), 8)):
                add(index, {"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
        add(index, {}, choice.get("finish_reason") or "stop")
    if (request.get("stream_options") or {}).get("include_usage"):
        made.append(f"data: {json.dumps({**head, 'choices': [], 'usage': completion.get('usage')})}\n\n")
    return [*made, "data: [DONE]\n\n"]


def _messages(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = request.get("messages")
    return [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return content if isinstance(content, str) else ""


def _error(status: int, message: str) -> dict[str, Any]:
    kind = _ERROR_KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes a burst of clients wait a second for a new SYN

    def __init__(self, state: _State, port: int) -> None:
        self.state = state
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def keep(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.add(connection)
            self.state.connections += 1

    def forget(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.discard(connection)

    def drop_connections(self) -> None:
        """Drop kept-alive connections, which would still be answered after the close."""
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client may be gone already
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless a client gave up waiting."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet

    def setup(self) -> None:
        super().setup()
        self.server.keep(self.connection)

    def finish(self) -> None:
        self.server.forget(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class names it so
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._send(404, _error(404, f"no such path: {self.path}"))
            return
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "recording"}
        self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        arrived = time.perf_counter()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            self._send(404, _error(404, f"no such path: {self.path}"))
            return
        try:
            parsed = json.loads(body)
        except ValueError:
            parsed = None
        request = parsed if isinstance(parsed, dict) else {}
        headers = {name.lower(): value for name, value in self.headers.items()}
        state = self.server.state
        state.record(RecordedRequest(body, request, headers, arrived))
        if not isinstance(parsed, dict):
            self._send(400, _error(400, "the body is not a JSON object"))
        else:
            self._reply(request, state.answer(request))

    def _reply(self, request: dict[str, Any], reply: Reply) -> None:
        if (reply.hang or reply.delay_s) and not self._wait(None if reply.hang else reply.delay_s):
            return
        if reply.raw is not None:
            self._send_bytes(reply.status, reply.raw, reply.headers)
        elif request.get("stream") and reply.status == HTTPStatus.OK and (reply.body or {"choices": 1}).get("choices"):
            self._stream(request, reply)
        elif reply.body is not None:
            self._send(reply.status, reply.body, reply.headers)
        elif reply.status == HTTPStatus.OK:
            self._send(HTTPStatus.OK, _completion(request, reply, self.server.state.next_number()), reply.headers)
        else:
            self._send(reply.status, _error(reply.status, f"the upstream answers {reply.status}"), reply.headers)

    def _stream(self, request: dict[str, Any], reply: Reply) -> None:
        completion = reply.body or _completion(request, reply, self.server.state.next_number())
        sent = reply.events if reply.events is not None else events(request, completion)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        for number, event in enumerate(sent):
            if number == reply.cut_after:
                self._break_off()
                return
            waits = None if number == reply.hang_after else reply.chunk_delay_s
            if waits != 0.0 and not self._wait(waits):
                return
            data = event.encode()
            try:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
            except ConnectionError:
                self._note_departure()
                return
        if reply.cut_after is not None:
            self._break_off()
            return
        self.wfile.write(b"0\r\n\r\n")

    def _wait(self, seconds: float | None) -> bool:
        """Wait, without end where None is given; return whether there still is somebody to answer."""
        state, until = self.server.state, None if seconds is None else time.monotonic() + seconds
        while until is None or (remaining := until - time.monotonic()) > 0:
            if state.closing.wait(_POLL_S if until is None else min(_POLL_S, remaining)):
                self.close_connection = True
                return False
            if self._is_left():
                self._note_departure()
                return False
        return True

    def _is_left(self) -> bool:
        try:
            return select.select([self.connection], [], [], 0)[0] != [] and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def _note_departure(self) -> None:
        self.close_connection = True
        self.server.state.departed.append(time.perf_counter())

    def _break_off(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send_bytes(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
