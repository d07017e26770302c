"""The recording client: transparent to approaches and on the wire, complete in what it keeps, harmless."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from agents import ERROR, RIGHT, WRONG, Agent, calling, mend
from builders import body, lexical_memory, response
from hypothesis import given
from hypothesis import strategies as st
from openai import APIStatusError, AzureOpenAI, OpenAI
from openai.resources.chat.completions import Completions
from openai.types.chat import ChatCompletionMessage

from optillm_memory import Memory
from optillm_memory.conversation.options import Options
from optillm_memory.host.calls import CallLog, RecordingClient, sent_lean
from optillm_memory.host.exchange import Exchange
from optillm_memory.host.failopen import FailOpen
from optillm_memory.host.incoming import Incoming

JSON = dict[str, Any]
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "run", "description": "é\u2028", "parameters": {"b": 1, "a": [{}]}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"x": "é"}'}}
COMPLETION = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for i, text in enumerate(("one", None, "three"))
    ],
    "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
}  # fmt: skip


class Wire:
    """An OpenAI client whose requests end here."""

    def __init__(self, kind: type[OpenAI] = OpenAI, status: int = 200, **options: Any) -> None:
        """Make the client; every request is answered with the completion, or with an error of that status."""
        self.sent: list[httpx.Request] = []
        self.status = status
        http = httpx.Client(transport=httpx.MockTransport(self._answer))
        options = options or {"base_url": "http://upstream/v1"}
        self.client: Any = kind(api_key="key", http_client=http, max_retries=0, **options)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        if json.loads(request.content).get("stream"):
            chunk = {
                **COMPLETION,
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": {"content": "x"}}],
            }
            return httpx.Response(200, text=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
        return httpx.Response(self.status, json=COMPLETION if self.status == 200 else {"error": {"message": "no"}})


@pytest.fixture
def wire() -> Wire:
    """Give a plain OpenAI client."""
    return Wire()


def recording(client: Any) -> tuple[Any, CallLog]:
    """Stand a recording client in for a client."""
    log = CallLog(FailOpen(1))
    return RecordingClient(client, log), log


# -- what goes over the wire ---------------------------------------------------------------------------

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "function", "developer", "odd", ""])},
        optional={
            "content": st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["type", "text", "image_url", "url", "input_audio", "data", "file", "x"]),
                        inner,
                        max_size=3,
                    )
                ),
                max_leaves=8,
            ),
            "tool_calls": st.lists(st.sampled_from([CALL, {}, 7, "x"]), max_size=2) | st.text() | st.none(),
            "tool_call_id": st.text() | st.none(),
            "name": st.text(),
            "function_call": st.sampled_from([CALL["function"], None, {"name": "f"}]),
            "reasoning_content": st.text(),
        },
    ),
    max_size=4,
)
FIELDS: st.SearchStrategy[JSON] = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.lists(st.sampled_from([TOOL, {}, 7, None]), max_size=2) | st.none(),
        "temperature": st.floats(0, 2),
        "n": st.integers(1, 3),
        "max_tokens": st.none() | st.integers(1, 9),
        "response_format": st.just({"type": "json_object"}),
        "extra_body": st.dictionaries(
            st.sampled_from(["messages", "tools", "top_k", "model", "é"]), st.sampled_from([1, "x", None, [], {}])
        )
        | st.none(),
        "seed": st.integers(),
    },
)


WIRE = Wire()


@given(MESSAGES, FIELDS)
def test_the_body_on_the_wire_is_the_same(messages: list[JSON], fields: JSON) -> None:
    """Whatever JSON a request holds, its bytes and its address are those that the client alone would send."""
    stand_in, _ = recording(WIRE.client)
    for client in (WIRE.client, stand_in):
        client.chat.completions.create(model="m", messages=messages, **fields)
    alone, recorded = WIRE.sent[-2:]
    assert recorded.content == alone.content
    assert recorded.url == alone.url


def test_the_same_through_azure() -> None:
    """An AzureOpenAI client builds the same address (from the model) and the same body."""
    wire = Wire(AzureOpenAI, azure_endpoint="http://azure", api_version="2024-10-21")
    stand_in, log = recording(wire.client)
    for client in (wire.client, stand_in):
        client.chat.completions.create(model="deployed", messages=HELLO, tools=[TOOL])
    alone, recorded = wire.sent
    assert "deployments/deployed" in str(alone.url)
    assert (recorded.url, recorded.content) == (alone.url, alone.content)
    assert len(log) == 1


def test_plain_messages_skip_the_clients_walk(wire: Wire) -> None:
    """Messages and tools that are JSON are handed over as they are, each in its place of the body."""
    lean = sent_lean(wire.client.chat.completions, {"model": "m", "messages": HELLO, "tools": [TOOL], "n": 1})
    assert lean["extra_body"]["messages"] is HELLO
    assert (lean["messages"], lean["tools"], lean["model"], lean["n"]) == ([], [], "m", 1)


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": "text"},
        {"messages": ({"role": "user", "content": "x"},)},
        {"messages": [{"role": "user", "content": ("x",)}]},
        {"messages": [ChatCompletionMessage(role="assistant", content="x")]},
        {"messages": [{1: "x"}]},
        {"messages": HELLO, "extra_body": "x"},
        {},
    ],
    ids=repr,
)
def test_what_is_not_plain_goes_the_ordinary_way(wire: Wire, asked: JSON) -> None:
    """Objects, tuples and odd arguments are left to the client's own walk."""
    assert sent_lean(wire.client.chat.completions, asked) is asked


def test_objects_among_the_messages_arrive(wire: Wire) -> None:
    """A message object of the openai package, as approaches send it back, is sent and kept as the client sends it."""
    stand_in, log = recording(wire.client)
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [CALL]})
    messages = [*HELLO, {"role": "assistant", "content": "", "tool_calls": message.tool_calls}, message]
    for client in (wire.client, stand_in):
        client.chat.completions.create(model="m", messages=messages)
    assert wire.sent[0].content == wire.sent[1].content
    (call,) = log.close()
    assert call.messages[1]["tool_calls"][0]["function"] == CALL["function"]
    assert call.messages[2]["tool_calls"][0]["id"] == "c1"


def test_who_looks_on_sees_the_arguments(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Telemetry that replaces the package's function, for all clients or for one, is given the messages themselves."""
    seen = []
    original = Completions.create

    def watched(*args: Any, **asked: Any) -> Any:
        seen.append(asked["messages"])
        return original(*args, **asked)

    monkeypatch.setattr(Completions, "create", watched)
    stand_in, _ = recording(wire.client)
    stand_in.chat.completions.create(model="m", messages=HELLO)
    monkeypatch.undo()
    one = wire.client.chat.completions
    monkeypatch.setattr(one, "create", lambda **asked: watched(one, **asked))
    stand_in.chat.completions.create(model="m", messages=HELLO)
    assert seen == [HELLO, HELLO]


# -- what an approach sees ------------------------------------------------------------------------------


def test_it_stands_for_the_client(wire: Wire) -> None:
    """Every other attribute is the client's own, isinstance sees its type, and no approach takes it for one by name."""
    stand_in, _ = recording(wire.client)
    assert stand_in.base_url is wire.client.base_url
    assert stand_in.models is wire.client.models
    assert stand_in.chat.completions.with_raw_response is wire.client.chat.completions.with_raw_response
    assert isinstance(stand_in, OpenAI)
    assert isinstance(stand_in.chat.completions, Completions)
    assert not hasattr(stand_in, "no_such_thing")
    assert "OpenAI" not in stand_in.__class__.__name__  # optillm's deep_research would build a client of its own


def test_a_client_with_other_options_records_too(wire: Wire) -> None:
    """What `with_options` gives makes calls of the same request."""
    stand_in, log = recording(wire.client)
    other = stand_in.with_options(timeout=3)
    assert other.timeout == 3
    other.chat.completions.create(model="m", messages=HELLO)
    assert len(log) == 1


class Positional:
    """Stands for a client that is no OpenAI client and answers with mappings, as LiteLLM's and the local one may."""

    class chat:  # noqa: N801
        """The shape of a client."""

        class completions:  # noqa: N801
            """The shape of a client."""

            @staticmethod
            def create(model: str, messages: list[JSON], **kwargs: Any) -> Any:
                """Answer with what came."""
                return {"choices": [{"message": {"content": f"{model} {messages} {kwargs}"}}], "usage": None}


def test_any_client_will_do() -> None:
    """A client of no known kind is called with the very arguments, and what is known of its answers is kept."""
    stand_in, log = recording(Positional)
    answered = stand_in.chat.completions.create("m", HELLO, decoding="cot_decoding")
    assert answered["choices"][0]["message"]["content"] == f"m {HELLO} {{'decoding': 'cot_decoding'}}"
    named = stand_in.chat.completions.create(model="m", messages=HELLO, extra_body={"k": 1})
    first, second = log.close()
    assert first.answers == [answered["choices"][0]["message"]["content"]]
    assert (second.model, second.messages, second.prompt_tokens) == ("m", HELLO, 0)
    assert second.answers == [named["choices"][0]["message"]["content"]]


# -- what is kept ---------------------------------------------------------------------------------------


def test_a_call_is_kept_whole(wire: Wire) -> None:
    """Model, messages, every choice's text, tokens and time are kept; what is added to the list later is not."""
    stand_in, log = recording(wire.client)
    messages: list[JSON] = list(HELLO)
    answered = stand_in.chat.completions.create(model="m", messages=messages, n=3)
    messages.append({"role": "assistant", "content": "one"})
    (call,) = log.close()
    assert answered.choices[2].message.content == "three"
    assert (call.model, call.messages, call.answers) == ("m", HELLO, ["one", "", "three"])
    assert (call.prompt_tokens, call.completion_tokens, call.error) == (11, 5, None)
    assert call.latency_ms > 0


def test_an_upstream_error_passes_and_is_kept() -> None:
    """The client's own error reaches the approach, and the call is kept with it."""
    wire = Wire(status=429)
    stand_in, log = recording(wire.client)
    with pytest.raises(APIStatusError) as caught:
        stand_in.chat.completions.create(model="m", messages=HELLO)
    assert caught.value.status_code == 429
    (call,) = log.close()
    assert call.error is not None
    assert call.error.startswith("RateLimitError")
    assert (call.answers, call.messages) == ([], HELLO)


def test_a_stream_passes_unharmed(wire: Wire) -> None:
    """A streamed call yields its chunks as they come, and is kept without an answer."""
    stand_in, log = recording(wire.client)
    chunks = list(stand_in.chat.completions.create(model="m", messages=HELLO, stream=True))
    assert [c.choices[0].delta.content for c in chunks] == ["x"]
    (call,) = log.close()
    assert (call.answers, call.error) == ([], None)


def test_threads_share_a_log(wire: Wire) -> None:
    """Calls from many threads at once are all kept, each whole."""
    stand_in, log = recording(wire.client)

    def call(number: int) -> None:
        stand_in.chat.completions.create(model=f"m{number}", messages=[{"role": "user", "content": f"{number}"}])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    kept = {call.model: call.messages[0]["content"] for call in log.close()}
    assert kept == {f"m{number}": f"{number}" for number in range(32)}


def test_a_closed_log_takes_no_more(wire: Wire) -> None:
    """An approach that keeps its client for longer than the request (optillm's proxy does) goes on unrecorded."""
    stand_in, log = recording(wire.client)
    assert log.close() == ()
    assert stand_in.chat.completions.create(model="m", messages=HELLO).id == "x"
    assert log.close() == ()


class Unreadable:
    """An answer whose every part fails to be read."""

    def __getattr__(self, name: str) -> Any:
        """Fail."""
        raise RuntimeError(name)


class Endless(dict[str, Any]):
    """A message that no recording can copy."""

    def items(self) -> Any:
        """Fail."""
        raise RuntimeError("endless")


def test_a_fault_in_recording_costs_the_record_alone() -> None:
    """Where an answer or a message cannot be read, the call comes back as ever and the fault is counted."""
    answer = Unreadable()
    completions = SimpleNamespace(create=lambda **_: answer)
    fail_open = FailOpen(1)
    log = CallLog(fail_open)
    stand_in: Any = RecordingClient(SimpleNamespace(chat=SimpleNamespace(completions=completions)), log)
    assert stand_in.chat.completions.create(model="m", messages=HELLO) is answer
    assert stand_in.chat.completions.create(model="m", messages=[Endless()]) is answer
    assert log.close() == ()
    # Each was looked at twice: whether it is a refusal, and for the record.
    assert fail_open.faults["RuntimeError"] == 4


def test_a_fault_in_looking_at_the_messages_sends_them_as_they_are(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the short way cannot be found out, the client sends the messages its own way."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("optillm_memory.host.calls.sent_lean", broken)
    stand_in, log = recording(wire.client)
    stand_in.chat.completions.create(model="m", messages=HELLO)
    assert json.loads(wire.sent[0].content)["messages"] == HELLO
    assert len(log) == 1


# -- what becomes of it ---------------------------------------------------------------------------------


class Host:
    """Stands for optillm: runs its approach with the client that it is given, and the query that it makes."""

    known_approaches = plugin_approaches = ()

    def __init__(self, approach: Callable[[Any], Any]) -> None:
        """Keep the approach."""
        self.approach = approach
        self.query = ""
        self.count_reasoning_tokens = len

    def parse_conversation(self, messages: Any) -> tuple[str, str, None]:
        """Give the conversation as optillm flattens it: without tool results."""
        self.query = "\n".join(str(m["content"]) for m in messages if m["role"] == "user")
        return "", self.query, None

    def execute_single_approach(self, *given: Any) -> tuple[Any, int]:
        """Run the approach."""
        return self.approach(given[3]), 3

    def tagged_conversation_to_messages(self, text: str) -> str:
        """Give a text without tags."""
        return text


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Give a memory."""
    with lexical_memory(tmp_path) as opened:
        yield opened


def recorded(memory: Memory, approach: Callable[[Any], Any], name: str = "re2", **fields: Any) -> tuple[JSON, JSON]:
    """Take a request through an approach with a client on the wire; return its metadata and its trace."""
    request = body("carry on with the work", **fields)
    made = exchange(memory, request, Host(approach), Options(approach=name))
    try:
        made.completion = made.ask_guarded(Wire().client, "m", {})
    finally:
        metadata = made.metadata()
        made.finish()
        memory.store.flush()
    return metadata, memory.trace(metadata["trace_id"])


def exchange(memory: Memory, request: JSON, host: Host, options: Options) -> Exchange:
    """Begin an exchange."""
    here: Any = SimpleNamespace(memory=memory, fail_open=FailOpen(10), second_calls=FailOpen(10))
    return Exchange.begin(host, here, Incoming(request, 0, "local", options, "SINGLE", ("agent_memory",), "m"))


def asks(client: Any, *contents: str) -> str:
    """Call the model once for each text; return the last answer's."""
    for content in contents:
        answered = client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    return str(answered.choices[0].message.content)


def test_the_inner_calls_are_in_the_trace(memory: Memory) -> None:
    """A wrapped approach's calls are in its trace in order, and the trace knows all their tokens."""
    metadata, shown = recorded(memory, lambda client: asks(client, "a", "b"))
    assert metadata["calls"] == 2
    assert [c["messages"][0]["content"] for c in shown["calls"]] == ["a", "b"]
    assert [c["answers"] for c in shown["calls"]] == [["one", "", "three"]] * 2
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (22, 10)
    assert all(c["latency_ms"] > 0 for c in shown["calls"])


def test_the_calls_of_an_approach_that_fails_are_in_the_trace(memory: Memory) -> None:
    """Where an approach breaks after some calls, they are kept beside its error."""

    def breaks(client: Any) -> Any:
        asks(client, "a")
        raise ValueError("no plan")

    with pytest.raises(ValueError, match="no plan"):
        recorded(memory, breaks)
    (shown,) = memory.store.traces(None)
    assert (shown["error"], shown["prompt_tokens"]) == ("ValueError: no plan", 11)
    assert len(memory.trace(shown["trace_id"])["calls"]) == 1


def test_what_is_stored_is_redacted_and_shortened(tmp_path: Path) -> None:
    """Secrets are taken out of an inner call's messages, answers and errors, and long texts lose their middle."""
    secret, long = "sk-" + "a1B2" * 12, "x" * 5000

    def leaks(client: Any) -> Any:
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": f"{secret} {long}"}, {"role": "assistant", "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "run", "arguments": secret}}]}],
        )  # fmt: skip
        return "done"

    with lexical_memory(tmp_path, max_text=400) as memory:
        _, shown = recorded(memory, leaks)
    (call,) = shown["calls"]
    assert secret not in json.dumps(shown)
    assert len(call["messages"][0]["content"]) < 600
    assert call["messages"][1]["tool_calls"][0]["name"] == "run"


def test_a_plain_call_is_not_stored_twice(memory: Memory) -> None:
    """A plain request's one call is the trace itself: no rows, no count, the completion's own tokens."""

    def plain(client: Any) -> Mapping[str, Any]:
        return dict(client.chat.completions.create(model="m", messages=HELLO).model_dump())

    metadata, shown = recorded(memory, plain, "none")
    assert "calls" not in metadata
    assert shown["calls"] == []
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (11, 5)


def test_the_guards_second_call_is_stored_beside_the_first(memory: Memory) -> None:
    """Where the guard asked twice, both calls are in the trace, and their tokens are counted once."""
    mend(memory)
    answers = iter([WRONG, RIGHT])

    def acts(client: Any) -> Mapping[str, Any]:
        asks(client, "x")
        usage = {"usage": {"prompt_tokens": 11, "completion_tokens": 5}}
        return {**response(calling(next(answers))), **usage}

    metadata, shown = recorded(memory, acts, "none", tools=[])
    assert metadata["extra_calls"] == 1
    assert len(shown["calls"]) == 2
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == (22, 10)


def test_off_has_no_stand_in(memory: Memory) -> None:
    """With mode `off` an approach is given the host's client itself."""
    wire = Wire()
    given_to: list[Any] = []

    def approach(client: Any) -> JSON:
        given_to.append(client)
        return response("x")

    made = exchange(memory, body("x"), Host(approach), Options(mode="off"))
    made.ask(wire.client, "m", {})
    assert given_to == [wire.client]
    assert type(given_to[0]) is OpenAI


@pytest.mark.parametrize("taken", [False, True], ids=["flattened", "whole"])
def test_what_an_approach_leaves_out_was_not_injected(memory: Memory, *, taken: bool) -> None:
    """Advice beside a tool's result is lost where the approach takes words alone; then the trace does not claim it."""
    mend(memory)
    agent = Agent(memory)
    agent.act(WRONG, ERROR)

    def words(client: Any) -> str:
        prompt = str(made.turn.messages[-1]["content"]) if taken else host.query
        return asks(client, prompt.replace("\n", "\n    "))

    host = Host(words)
    made = exchange(memory, agent.body(), host, Options(approach="re2"))
    assert made.turn.action == "inject"
    made.completion = made.ask(Wire().client, "m", {})
    made.finish()
    memory.store.flush()
    metadata = made.metadata()
    shown = memory.trace(metadata["trace_id"])
    assert metadata["action"] == shown["action"] == ("inject" if taken else "plain")
    assert bool(metadata["injected"]) == bool(shown["injected"]) == taken
    assert [s["reason"] for s in metadata["skipped"]] == ([] if taken else ["left_out_by_approach"])
    agent.messages += [calling(RIGHT), {"role": "user", "content": "and?"}]
    assert (RIGHT in str(agent.begin().messages[:-2])) == taken
