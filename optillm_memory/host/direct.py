"""The direct lane: a plain request is sent upstream by us and relayed as the answer comes.

The host waits for a whole answer before it sends the first byte, makes a new connection for each request, turns every
upstream error into a 500 and drops what is not text. Here the client gets what the upstream itself would have told it,
under the trace's id and with our metadata. Whatever fails before the upstream was asked is left to the host; after that
nothing is asked twice, but for the guard's second call and the one without what memory had put into the prompt.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import flask
import httpx

from optillm_memory.conversation.options import FIELD
from optillm_memory.conversation.steps import calls_of
from optillm_memory.errors import HostError
from optillm_memory.host.calls import REFUSED, says_refused
from optillm_memory.host.disconnects import Client
from optillm_memory.host.exchange import LEAST_WAIT_S, OK, Exchange
from optillm_memory.host.incoming import SLUG, Incoming
from optillm_memory.host.runtime import Runtime
from optillm_memory.host.sse import (
    DONE,
    StreamAccumulator,
    chunk_of,
    cut_off,
    data_of,
    deltas_of,
    events_of,
    split_events,
    with_data,
    with_fields,
    with_usage,
)
from optillm_memory.host.upstream import READ_S, Cancellation, Upstream, returned_headers

logger = logging.getLogger(__name__)

_OURS = (FIELD, "optillm_approach")  # no upstream knows these fields
_SHOWN = 2_000  # characters of an upstream's error that are recorded
_UNREACHABLE, _TOO_LATE = 502, 504


def takes(process: Runtime, host: Any, incoming: Incoming) -> bool:
    """Whether a request is plain, and the host would send it to an OpenAI-compatible upstream."""
    is_plain = incoming.operation == "SINGLE" and incoming.approaches[0] == SLUG and incoming.inner == "none"
    if not (process.settings.direct and is_plain and getattr(host, "request_batcher", None) is None):
        return False
    return isinstance(incoming.body.get("messages"), list) and process.upstream.of(host) is not None


def answer(process: Runtime, exchange: Exchange, sent: Mapping[str, Any]) -> flask.Response | None:
    """Return the response, or None where something failed before the upstream was asked.

    `sent` is the body as the client sent it; the trace is recorded when the response has gone out.
    """
    upstream = process.upstream.of(exchange.host)
    made: list[tuple[_Call, httpx.Request]] = []

    def prepare() -> None:
        assert upstream is not None
        call = _Call(process, upstream, exchange, sent)
        made.append((call, call.request(exchange.turn.messages)))

    if exchange.fail_open.quietly(prepare):
        return None
    call, request = made[0]
    return call.answer(request)


class _UpstreamFailed(HostError):
    """The upstream could not be asked, or did not answer."""

    def __init__(self, error: httpx.HTTPError) -> None:
        is_late = isinstance(error, httpx.TimeoutException)
        self.status, self.code = (_TOO_LATE, "upstream_timeout") if is_late else (_UNREACHABLE, "upstream_unreachable")
        what = "did not answer in time" if is_late else "could not be reached, or ended the connection"
        super().__init__(f"the upstream {what}: {type(error).__name__}: {error}")


class _Call:
    """One request on the lane."""

    def __init__(self, process: Runtime, upstream: Upstream, exchange: Exchange, sent: Mapping[str, Any]) -> None:
        """Read from Flask's request what is needed once it is over."""
        self._process, self._upstream, self._exchange, self._sent = process, upstream, exchange, sent
        self._key = _own_key(flask.request)
        self._headers = dict(flask.request.headers)
        self._client = Client(flask.request.environ)
        self._cancellation = Cancellation()
        self._started = time.perf_counter()
        self._log = _ConversationLog(exchange.host)
        self._second: dict[str, Any] | None = None  # the guard's second answer, where that is streamed
        self._is_labelled = self._is_holding = self._is_decided = self._is_finished = False
        self._sent_fields: set[str] = set()  # the fields of the answer that had gone out when the rest was held back

    # -- asking ------------------------------------------------------------------------------------

    def request(
        self,
        messages: list[dict[str, Any]],
        *,
        streams: bool = True,
        limit_s: float = READ_S,
        is_repeat: bool = False,
    ) -> httpx.Request:
        """Return the upstream's request: the client's body less our fields, with these messages."""
        turn, config = self._exchange.turn, self._exchange.host.server_config
        body = {name: value for name, value in self._sent.items() if name not in _OURS}
        body |= {"model": turn.model, "messages": messages}
        if "n" not in body and config.get("n", 1) != 1:
            body["n"] = config["n"]
        if not streams:
            body = {n: v for n, v in body.items() if n not in ("stream", "stream_options")}
        data = _encoded(body)
        return self._upstream.request(data, self._key, self._headers, timeout_s=limit_s, is_repeat=is_repeat)

    def answer(self, request: httpx.Request) -> flask.Response:
        """Ask the upstream, and return what it says; the upstream's own failure to answer is an error of this proxy."""
        self._exchange.fail_open.quietly(lambda: self._log.start(self._sent, self._exchange.incoming.model))
        try:
            with (
                self._process.disconnects.watching(self._client.is_disconnected, self._cancellation),
                self._cancellation.tracking(),
            ):
                reply = self._whole_or_stream(self._send(request))
                if self._is_refused(reply):
                    reply = self._as_sent()
                if reply.is_closed:
                    self._cancellation.release()
                    return self._whole(reply)
            return self._streamed(reply)
        except Exception as error:
            if not isinstance(error, _UpstreamFailed):
                logger.exception("agent_memory: the direct lane failed after the upstream was asked")
            return self._failed(error)

    def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._upstream.send(request)
        except httpx.HTTPError as error:
            raise _UpstreamFailed(error) from error

    def _whole_or_stream(self, reply: httpx.Response) -> httpx.Response:
        # What is no stream is read to its end, and its connection is free again.
        if reply.status_code != OK or not reply.headers.get("content-type", "").startswith("text/event-stream"):
            try:
                reply.read()
            except httpx.HTTPError as error:
                reply.close()
                raise _UpstreamFailed(error) from error
        return reply

    def _is_refused(self, reply: httpx.Response) -> bool:
        """Whether the upstream refused a prompt that memory had changed."""
        if not self._exchange.turn.placements or not reply.is_closed:
            return False
        return reply.status_code in REFUSED or (reply.status_code == OK and says_refused(_object(reply.content)))

    def _as_sent(self) -> httpx.Response:
        """Ask once more, with the client's own messages, in what is left of the time."""
        exchange, turn = self._exchange, self._exchange.turn
        exchange.give_up_insertions()
        left_s = max(READ_S - (time.perf_counter() - self._started), LEAST_WAIT_S)
        reply = self._whole_or_stream(self._send(self.request(exchange.turn.messages, limit_s=left_s, is_repeat=True)))
        if reply.status_code == OK and not (reply.is_closed and says_refused(_object(reply.content))):
            exchange.note_refusal(turn)
        return reply

    def _once_more(self, messages: list[dict[str, Any]], limit_s: float) -> dict[str, Any]:
        """Make the guard's second call. Raises HostError where no completion comes in time."""
        until = time.monotonic() + limit_s
        with self._cancellation.tracking():  # a client that leaves ends this one, too
            reply = self._send(self.request(messages, streams=False, limit_s=limit_s, is_repeat=True))
            try:
                data = bytearray()
                for piece in reply.iter_bytes():
                    data += piece
                    if time.monotonic() > until:
                        raise HostError("the second answer takes too long")
            finally:
                self._cancellation.release()
                reply.close()
        completion = _object(bytes(data))
        if reply.status_code != OK or not completion.get("choices"):
            raise HostError(f"HTTP {reply.status_code}")
        if self._sent_fields and not calls_of((completion["choices"][0].get("message") or {}), 0):
            raise HostError("only words, where others have gone out")
        return completion

    # -- a whole answer ----------------------------------------------------------------------------

    def _whole(self, reply: httpx.Response) -> flask.Response:
        exchange, data = self._exchange, reply.content
        completion = _object(data) if reply.status_code == OK else {}
        if not isinstance(completion.get("choices"), list):
            exchange.error = error = f"HTTP {reply.status_code}: {reply.text[:_SHOWN]}"
            exchange.fail_open.quietly(lambda: self._log.error(error))
        else:
            answers: list[dict[str, Any]] = []
            exchange.completion = completion
            exchange.fail_open.quietly(lambda: answers.append(self._with_memory(completion)))
            if answers and exchange.turn.options.mode != "off":
                data = json.dumps(answers[0]).encode()
        response = self._response(data, reply)
        exchange.fail_open.quietly(exchange.finish)
        return response

    def _with_memory(self, completion: dict[str, Any]) -> dict[str, Any]:
        exchange = self._exchange
        guarded = exchange.guarded(completion, self._once_more, time.perf_counter() - self._started)
        exchange.completion = labelled = exchange.labelled(guarded)
        self._log.final(labelled)
        return labelled

    def _failed(self, error: Exception) -> flask.Response:
        exchange = self._exchange
        exchange.error = f"{type(error).__name__}: {error}" if not self._cancellation.is_cancelled else _DISCONNECTED
        status, code = (error.status, error.code) if isinstance(error, _UpstreamFailed) else (_UNREACHABLE, None)
        body = {"error": {"message": str(error), "type": "upstream_error", "param": None, "code": code}}
        response = flask.Response(json.dumps(body), status, content_type="application/json")
        exchange.fail_open.quietly(lambda: self._log.error(str(exchange.error)))
        exchange.fail_open.quietly(lambda: exchange.set_headers(response))
        exchange.fail_open.quietly(exchange.finish)
        return response

    def _response(self, data: Any, reply: httpx.Response) -> flask.Response:
        response = flask.Response(data, reply.status_code)
        del response.headers["Content-Type"]
        for name, value in returned_headers(reply):
            response.headers.add(name, value)
        self._exchange.set_headers(response)
        return response

    # -- a stream ----------------------------------------------------------------------------------

    def _streamed(self, reply: httpx.Response) -> flask.Response:
        try:
            return self._response(self._relayed(reply), reply)
        except Exception:
            reply.close()
            raise

    def _relayed(self, reply: httpx.Response) -> Iterator[bytes]:
        """Yield the upstream's events as they come, and have recorded what has gone out, however it ends."""
        exchange, accumulator, is_over, has_begun = self._exchange, StreamAccumulator(), False, False
        try:
            with self._process.disconnects.watching(self._client.is_disconnected, self._cancellation):
                for event in self._events(reply, accumulator):
                    has_begun = True
                    yield event
            is_over = True
        except GeneratorExit:
            is_over = accumulator.is_complete and not self._is_holding  # some read no further than to the finish reason
            exchange.error = None if is_over else _DISCONNECTED
            raise
        except Exception as error:
            exchange.error = _DISCONNECTED if self._cancellation.is_cancelled else f"the upstream broke off: {error}"
            if not self._cancellation.is_cancelled:
                if has_begun:
                    self._client.break_off()
                raise HostError(exchange.error) from error  # the server drops the connection: the client sees it
        finally:
            reply.close()
            self._finish(accumulator, is_over=is_over)

    def _events(self, reply: httpx.Response, accumulator: StreamAccumulator) -> Iterator[bytes]:
        held: list[bytes] = []  # from the first piece of a call on, where the guard wants to see it whole
        for event in split_events(reply.iter_bytes()):
            chunk = chunk_of(event)
            if chunk is not None and self._exchange.turn.placements and accumulator.is_empty and says_refused(chunk):
                yield from self._events_as_sent(accumulator)
                return
            if chunk is not None:
                self._exchange.fail_open.quietly(lambda: self._take_in(chunk, accumulator))  # noqa: B023 -- called at once
            if not (self._is_holding and (data := data_of(event))):
                yield self._outgoing(event, chunk, accumulator)
                continue
            held.append(event)
            if data == DONE:  # what comes after it is nothing to wait for
                yield from self._released(held, accumulator)
                held = []
        self._cancellation.release()
        if held:
            yield from self._released(held, accumulator)

    def _released(self, held: list[bytes], accumulator: StreamAccumulator) -> Iterator[bytes]:
        made: list[list[bytes]] = []
        self._exchange.fail_open.quietly(lambda: made.append(self._guarded(held, accumulator)))
        self._is_holding, self._is_decided = False, True
        for event in made[0] if made else held:
            yield self._outgoing(event, chunk_of(event), accumulator)

    def _outgoing(self, event: bytes, chunk: dict[str, Any] | None, accumulator: StreamAccumulator) -> bytes:
        if chunk is None and data_of(event) == DONE:
            # Before the client knows that it has the whole answer: its next request is to find this one.
            accumulator.is_done = True
            self._finish(accumulator, is_over=True)
        return self._labelled(event, chunk)

    def _events_as_sent(self, accumulator: StreamAccumulator) -> Iterator[bytes]:
        """Yield the events of a second call, without what memory had put into the prompt."""
        with self._cancellation.tracking():
            reply = self._as_sent()
        try:
            if reply.is_closed:
                accumulator.add({"error": _object(reply.content).get("error") or reply.text[:_SHOWN]})
                yield with_data(b"", {"error": accumulator.error})
            else:
                yield from self._events(reply, accumulator)
        finally:
            reply.close()

    def _take_in(self, chunk: Mapping[str, Any], accumulator: StreamAccumulator) -> None:
        if not (self._is_holding or self._is_decided) and self._is_guarded:
            self._is_holding = any(delta.get("tool_calls") or delta.get("function_call") for delta in deltas_of(chunk))
            self._sent_fields = accumulator.fields if self._is_holding else set()
        accumulator.add(chunk)

    @property
    def _is_guarded(self) -> bool:
        """Whether the guard is to see a call before it goes out; it looks at answers of one choice."""
        turn, n = self._exchange.turn, self._sent.get("n") or self._exchange.host.server_config.get("n", 1)
        return self._process.settings.guard != "off" and turn.conversation is not None and turn.options.reads and n == 1

    def _guarded(self, held: list[bytes], accumulator: StreamAccumulator) -> list[bytes]:
        """Return the events that were held back, or those of a second answer in their place."""
        if not accumulator.is_complete:
            return held
        first, took_s = accumulator.completion(), time.perf_counter() - self._started
        better = self._exchange.guarded(first, self._once_more, took_s)
        if better is first:
            return held
        if better["choices"] is not first["choices"]:
            sent = {name: value for name, value in first["choices"][0]["message"].items() if name in self._sent_fields}
            better = with_fields(better, sent)
            held = events_of(better, like=held, without=sent)
            self._second = better
        return [with_usage(event, better.get("usage")) for event in held]

    def _labelled(self, event: bytes, chunk: dict[str, Any] | None) -> bytes:
        """Return an event under the trace's id, the one that ends the answer with our metadata."""
        if chunk is None or "choices" not in chunk or self._exchange.turn.options.mode == "off":
            return event
        made: list[bytes] = []
        self._exchange.fail_open.quietly(lambda: made.append(with_data(event, self._with_metadata(chunk))))
        return made[0] if made else event

    def _with_metadata(self, chunk: dict[str, Any]) -> dict[str, Any]:
        labelled = {**chunk, "id": self._exchange.turn.trace_id}
        if not self._is_labelled and any(choice.get("finish_reason") for choice in chunk["choices"] or []):
            self._is_labelled = True
            labelled[FIELD] = self._exchange.metadata()
        return labelled

    def _finish(self, accumulator: StreamAccumulator, *, is_over: bool) -> None:
        """Have the trace recorded, once."""
        if not self._is_finished:
            self._is_finished = True
            self._exchange.fail_open.quietly(lambda: self._record(accumulator, is_over=is_over))

    def _record(self, accumulator: StreamAccumulator, *, is_over: bool) -> None:
        exchange, made = self._exchange, []
        fault = exchange.fail_open.quietly(lambda: made.append(self._second or accumulator.completion()))
        completion: dict[str, Any] = made[0] if made else {"choices": []}
        if exchange.error is None and accumulator.error is not None:
            exchange.error = f"the upstream broke off: {json.dumps(accumulator.error)[:_SHOWN]}"
        elif exchange.error is None and (fault or not (is_over and accumulator.is_complete)):
            exchange.error = "the upstream ended its answer without a finish reason"
        if exchange.error is None:
            exchange.completion = exchange.labelled(completion)
            self._log.final(exchange.completion)
        else:
            exchange.is_partial = bool(completion["choices"])
            exchange.completion = cut_off(completion)
            self._log.error(exchange.error)
        exchange.finish()


_DISCONNECTED = "the client disconnected before it had the whole answer"


class _ConversationLog:
    """The host's own log of conversations (`--log-conversations`), which its handler would have written."""

    def __init__(self, host: Any) -> None:
        log = getattr(host, "conversation_logger", None)
        self._log = log if log is not None and log.enabled else None
        self._host, self._id = host, ""

    def start(self, sent: Mapping[str, Any], model: str) -> None:
        """Begin an entry."""
        if self._log is not None:
            config = self._host.server_config
            asked = {"model": config["model"], "stream": False, "n": config.get("n", 1), **sent}
            self._id = self._log.start_conversation(client_request=asked, approach=SLUG, model=model)

    def final(self, completion: Mapping[str, Any]) -> None:
        """Log the answer, and close the entry."""
        if self._log is not None and self._id:
            self._log.log_final_response(self._id, dict(completion))
            self._log.finalize_conversation(self._id)

    def error(self, error: str) -> None:
        """Log what it failed by, and close the entry."""
        if self._log is not None and self._id:
            self._log.log_error(self._id, error)
            self._log.finalize_conversation(self._id)


def _own_key(request: flask.Request) -> str | None:
    """Return the caller's key where the host would use it upstream: one that begins with `sk-`."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    key = key.strip()
    return key if scheme == "Bearer" and key.startswith("sk-") else None


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a character, which JSON can say and UTF-8 cannot
        return json.dumps(body, separators=(",", ":")).encode()


def _object(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
