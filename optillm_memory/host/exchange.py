"""Exchange: one chat request through the plugin, however the host calls it, and its one trace."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flask

from optillm_memory.conversation.options import FIELD, Options
from optillm_memory.conversation.text import text_of
from optillm_memory.errors import HostError
from optillm_memory.host.calls import (
    CallLog,
    RecordingClient,
    is_refusal,
    spaced,
    time_limit_of,
    with_limits,
)
from optillm_memory.host.failopen import FailOpen
from optillm_memory.host.incoming import Incoming
from optillm_memory.host.runtime import Runtime
from optillm_memory.host.sse import StreamAccumulator, chunk_of, split_events
from optillm_memory.inject.place import append_text
from optillm_memory.memory import Memory
from optillm_memory.records import FeedbackReceipt, Placement, View
from optillm_memory.request.deadline import Deadline
from optillm_memory.request.turn import Turn

RECEIPT_WAIT_S = 0.2
LEAST_WAIT_S = 1.0  # for an answer to the client's own prompt, however late the refusal came
GUARD_LEAST_S = 5.0
_SHOWN = 200  # characters of what came instead of a completion
OK = 200


@dataclass
class Exchange:
    """Holds what the host forgets between the calls it makes for one request."""

    host: Any
    memory: Memory | None
    fail_open: FailOpen
    incoming: Incoming
    turn: Turn
    calls: CallLog
    second_calls: FailOpen
    later: CallLog | None = None  # the calls of what comes after memory in a pipeline
    completion: dict[str, Any] | None = None
    choices: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None
    shared_out: int | None = None  # how many of the completion's n choices the host has fetched
    receipts: Callable[[float], list[FeedbackReceipt]] | None = None
    acknowledged: list[dict[str, str]] | None = None
    finished: bool = False
    is_partial: bool = False  # what went out was not the whole answer; `error` says why

    @classmethod
    def begin(cls, host: Any, runtime: Runtime, incoming: Incoming) -> Exchange:
        """Consult memory, within the deadline; whatever fails there, the exchange goes on without it."""
        memory, fail_open, options = runtime.memory, runtime.fail_open, incoming.options
        memory, options, fault = _named(memory, fail_open, options)
        turn = Turn.plain(
            {**incoming.body, "model": incoming.model}, tenant=incoming.tenant, options=options,
            approach=incoming.inner, now=time.time(), deadline=Deadline(fail_open.deadline_s),
        )  # fmt: skip
        exchange = cls(host, memory, fail_open, incoming, turn, CallLog(fail_open), runtime.second_calls)
        if memory is None:
            exchange.turn = turn.skip(fault or "memory_unavailable")
            return exchange
        with turn.deadline.running():
            if options.feedback:
                fail_open.quietly(exchange.submit)
            approaches = (*host.known_approaches, *host.plugin_approaches)
            begun, fault = fail_open.call(
                lambda: memory.consult(
                    turn, size=incoming.size, text_only=incoming.adds_to_query, approaches=approaches
                ),
                turn.deadline,
            )
        exchange.turn = begun if begun is not None else turn.skip(fault)
        return exchange

    def submit(self) -> None:
        """Queue the feedback that came along; its receipts are fetched when the answer is there."""
        assert self.memory is not None
        turn = self.turn
        # A user's agents may judge each other's work, in any namespace; no user judges another's.
        view = View(turn.scope.tenant, user_id=turn.scope.user_id or None)
        self.receipts = self.memory.submit_feedback(
            turn.options.feedback, view=view, scope=turn.scope, reporter=turn.options.reporter
        )

    @property
    def inner(self) -> str:
        """The approach that answers: the policy's arm, or the one that was asked for."""
        return self.turn.approach

    # -- the ways the host calls -------------------------------------------------------------------

    def query_with_memory(self, query: str, client: Any) -> str:
        """Return the pipeline's query with what memory adds to it, and see what becomes of the calls made with that."""
        if self.turn.placements and self.later is None:
            self._watch(client)
        for placement in self.turn.placements:
            query = append_text(query, str(placement.payload))
        return query

    def _watch(self, client: Any) -> None:
        # The host makes a client for each request, and hands it to whatever comes after memory.
        self.later = later = CallLog(self.fail_open)
        self.fail_open.quietly(lambda: setattr(client, "chat", RecordingClient(client, later).chat))

    def _once_more_as_sent(self, response: flask.Response) -> flask.Response:
        """Return the response of a pipeline that is run again without memory, where it failed by what memory added."""
        later, refused = self.later, self.turn
        if later is None or not later.refused or (response.status_code == OK and later.answered):
            return response
        self.give_up_insertions()
        endpoint = flask.request.endpoint
        assert endpoint is not None
        view: Callable[[], Any] = flask.current_app.view_functions[endpoint]
        again = flask.current_app.make_response(view())
        if again.status_code == OK:
            self.note_refusal(refused)
        return again

    def ask(self, client: Any, model: str, config: dict[str, Any]) -> dict[str, Any]:
        """Make the upstream call, plain or through the wrapped approach; return a completion.

        Where the upstream refuses what memory made of the prompt, it is asked once more with what the client sent.
        """
        before, started = (self.calls.refused, self.calls.answered), time.perf_counter()
        try:
            completion = self._call(client, model, config, self.turn.messages)
        except Exception as error:
            if not (self.turn.placements and (is_refusal(error) or self.calls.refused > before[0])):
                self.error = f"{type(error).__name__}: {error}"
                raise
            completion = {}
        nothing_came = self.calls.refused > before[0] and self.calls.answered == before[1]
        if self.turn.placements and (not completion or nothing_came):
            completion = self._ask_as_sent(client, model, config, time.perf_counter() - started)
        self.choices += completion.get("choices") or []
        self.tokens += int((completion.get("usage") or {}).get("completion_tokens") or 0)
        if self.inner != "none":
            self.fail_open.quietly(self._see_what_went_out)
        return completion

    def _ask_as_sent(self, client: Any, model: str, config: dict[str, Any], spent_s: float) -> dict[str, Any]:
        """Make the call with the client's messages, in what is left of the time that the client gives it."""
        refused, answered = self.turn, self.calls.answered
        self.give_up_insertions()
        if (limit_s := time_limit_of(client)) is not None:
            client = with_limits(client, timeout_s=max(limit_s - spent_s, LEAST_WAIT_S))
        try:
            completion = self._call(client, model, config, self.turn.messages)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            raise
        if self.calls.answered > answered:
            self.note_refusal(refused)
        return completion

    def _call(self, client: Any, model: str, config: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
        inner = self.inner
        if self.turn.arm:
            model = self.turn.model
        # `none` takes the messages as they are; other approaches take them flattened.
        flattened = inner != "none" or not messages
        system_prompt, query, _ = self.host.parse_conversation(messages) if flattened else ("", "", None)
        if self.turn.options.mode != "off":
            client = RecordingClient(client, self.calls)
        result, tokens = self.host.execute_single_approach(
            inner, system_prompt, query, client, model, config, None, messages
        )
        if isinstance(result, dict) and "choices" in result:
            return dict(result)
        if inner == "none":
            raise HostError(f"the upstream answered with no completion, but with {str(result)[:_SHOWN]!r}")
        return completion_of(self.host, result, tokens, model)

    def give_up_insertions(self) -> None:
        """Go on with the client's messages as they came; that costs one extra call."""
        self.turn = replace(self.turn.as_sent(), extra_calls=self.turn.extra_calls + 1)

    def note_refusal(self, refused: Turn) -> None:
        """Note that the upstream took the prompt without what memory had put there: it was memory that it refused."""
        memory = self.memory

        def note() -> None:
            assert memory is not None
            self.turn = replace(memory.refused(refused), extra_calls=self.turn.extra_calls)

        self.fail_open.quietly(note)

    def _see_what_went_out(self) -> None:
        # Most approaches are given words alone: what memory put beside a tool's result is left out with it.
        turn, asked = self.turn, self.calls.asked()
        out = [p for p in turn.placements if any(spaced(text) in asked for text in texts_of(p))]
        if asked and len(out) < len(turn.placements):
            standing = [p for p in out if p not in turn.fresh]
            self.turn = (
                turn.as_sent().placing(standing, *(p for p in out if p in turn.fresh)).skip("left_out_by_approach")
            )

    def ask_guarded(self, client: Any, model: str, config: dict[str, Any]) -> dict[str, Any]:
        """Make the upstream call, and one more where the guard wants it; return the better answer."""
        started = time.perf_counter()
        first = self.ask(client, model, config)

        def once_more(messages: list[dict[str, Any]], limit_s: float) -> dict[str, Any]:
            return self._call(with_limits(client, timeout_s=limit_s, max_retries=0), model, config, messages)

        return self.guarded(first, once_more, time.perf_counter() - started)

    def guarded(
        self,
        first: dict[str, Any],
        once_more: Callable[[list[dict[str, Any]], float], dict[str, Any]],
        took_s: float,
    ) -> dict[str, Any]:
        """Return an answer, or a second one where the first is about to repeat what is known to fail.

        `once_more` gets the messages with the guard's advice and a limit in seconds; `took_s` is the first call's time.
        The answer has the tokens of both calls. A second call that fails, or takes too long, costs nothing but itself:
        the first answer goes out.
        """
        memory, before = self.memory, self.turn
        is_plain = self.inner == "none" and not before.extra_calls
        if memory is None or before.conversation is None or not is_plain or self.finished:
            return first
        limit_s = min(max(GUARD_LEAST_S, 2 * took_s), memory.settings.guard_timeout_s)
        guarded, fault = self.fail_open.call(lambda: memory.guard(before, first), before.deadline)
        if guarded is None:
            self.turn = before.skip(fault)
            return first
        self.turn, again = turn, _ = guarded
        if not again:
            return first
        second, _ = self.second_calls.call(lambda: once_more(turn.messages, limit_s), limit_s)
        better, _ = self.fail_open.call(lambda: memory.guarded(turn, second or {}), turn.deadline)
        self.turn = replace(turn if better else before, extra_calls=1)
        if not better or second is None:
            return first if second is None else {**first, "usage": both(first.get("usage"), second.get("usage"))}
        self.choices = list(second.get("choices") or [])
        return {**second, "usage": both(first.get("usage"), second.get("usage"))}

    def labelled(self, completion: Mapping[str, Any]) -> dict[str, Any]:
        """Return the completion under the trace's id, with the metadata; as it came where memory is off."""
        if self.turn.options.mode == "off":
            return dict(completion)
        return {**completion, "id": self.turn.trace_id, FIELD: self.metadata()}

    def metadata(self) -> dict[str, Any]:
        """Return the response's field `agent_memory`, with the receipts of feedback that came along."""
        metadata = self.turn.metadata()
        if self.acknowledged is None and (receipts := self.receipts) is not None:
            self.acknowledged = []
            with self.turn.deadline.running():
                wait_s = max(0.0, min(RECEIPT_WAIT_S, self.turn.deadline.remaining_s))
                self.fail_open.quietly(lambda: self._acknowledge(receipts(wait_s)))
        if self.inner != "none":
            metadata["calls"] = len(self.calls)
        if self.acknowledged is not None:
            metadata["feedback"] = self.acknowledged
        return metadata

    def _acknowledge(self, receipts: list[FeedbackReceipt]) -> None:
        self.acknowledged = [r.as_dict() for r in receipts]

    # -- on the way out ----------------------------------------------------------------------------

    def respond(self, response: flask.Response) -> flask.Response:
        """Set the headers, say in the body what the host left out of it, and have the trace recorded."""
        if self.incoming.adds_to_query:
            repeated: list[flask.Response] = []
            self.fail_open.quietly(lambda: repeated.append(self._once_more_as_sent(response)))
            response = repeated[0] if repeated else response
        self.set_headers(response)
        self.fail_open.quietly(lambda: self._mend(response))
        self.fail_open.quietly(self.finish)
        return response

    def set_headers(self, response: flask.Response) -> None:
        """Name the trace and the action in the response's headers, in every mode."""
        response.headers["X-Agent-Memory-Trace-Id"] = self.turn.trace_id
        response.headers["X-Agent-Memory-Action"] = self.turn.action

    def finish(self) -> None:
        """Have the trace recorded, once."""
        if self.memory is None or self.finished:
            return
        self.finished = True
        completion = self.completion or {"choices": self.choices, "usage": {"completion_tokens": self.tokens}}
        calls = self.calls.close()
        # A single plain call is the trace itself.
        turn = replace(self.turn, calls=calls) if self.inner != "none" or len(calls) > 1 else self.turn
        answered = self.error is None or self.is_partial
        self.memory.finish(turn, completion if answered else None, error=self.error)

    def _mend(self, response: flask.Response) -> None:
        if response.status_code != OK:
            self.error = self.error or f"HTTP {response.status_code}: {response.get_data(as_text=True)[:2000]}"
        elif self.completion is not None:
            if self.shared_out is not None:
                self._replace(response, self.labelled(self.completion))
        elif response.is_json:
            body = response.get_json()
            if self.incoming.adds_to_query:
                self.choices = body.get("choices") or []
                self.tokens = int((body.get("usage") or {}).get("completion_tokens") or 0)
            response.set_data(json.dumps(self.labelled(body)))
        elif self.incoming.adds_to_query:
            self.choices = [{"message": {"role": "assistant", "content": streamed_text(response)}}]

    def _replace(self, response: flask.Response, completion: dict[str, Any]) -> None:
        body = self.incoming.body
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            response.response = self.host.generate_streaming_completion(completion, self.incoming.model, usage)
        else:
            response.set_data(json.dumps(completion))


def completion_of(host: Any, result: Any, tokens: Any, model: str) -> dict[str, Any]:
    """Return the completion that the host would make of an approach's text or list of texts.

    Raises HostError for a result that is neither.
    """
    texts = list(result) if isinstance(result, (list, tuple)) else [result]
    choices, reasoning = [], 0
    for index, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise HostError(f"the approach returned {type(text).__name__}, not text")
        # The host cuts a text at the last conversation tag in it; so do we.
        cut = host.tagged_conversation_to_messages(text)
        content = cut[-1]["content"] if isinstance(cut, list) and cut else text
        reasoning += host.count_reasoning_tokens(content)
        message = {"role": "assistant", "content": content}
        choices.append({"index": index, "message": message, "finish_reason": "stop"})
    completion_tokens = tokens if isinstance(tokens, int) else 0
    return {
        "id": "",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": 0,
            "completion_tokens": completion_tokens,
            "total_tokens": completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        },
    }


def texts_of(placement: Placement) -> list[str]:
    """Return what a placement says, by message."""
    payload = placement.payload
    return [payload] if isinstance(payload, str) else [text_of(message) for message in payload]


def both(first: Any, second: Any) -> Any:
    """Return the usage of two calls together: numbers added, at every level."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {**second, **{k: both(v, second.get(k)) for k, v in first.items()}}
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return first + second
    return first if second is None else second


def streamed_text(response: flask.Response) -> str:
    """Read the text of a finished answer that the host is about to send as server-sent events."""
    events = [chunk if isinstance(chunk, bytes) else str(chunk).encode() for chunk in response.response]
    response.response = events
    accumulator = StreamAccumulator()
    for event in split_events(events):
        accumulator.add(chunk_of(event) or {})
    return "".join(text_of(choice["message"]) for choice in accumulator.completion()["choices"])


def _named(memory: Memory | None, fail_open: FailOpen, options: Options) -> tuple[Memory | None, Options, str]:
    """Return the memory, the options with the names by which it stores, and the fault where it could not tell them.

    Then there is no memory for this request: nothing may be stored under a name with a secret.
    """
    if memory is None:
        return None, options, ""
    named: list[Options] = []
    fault = fail_open.quietly(lambda: named.append(memory.named(options)))
    return (memory, named[0], "") if named else (None, options, fault)
