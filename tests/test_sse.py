"""Streams: events are found wherever the network cuts them, and put together they are the answer that was streamed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.host.sse import (
    StreamAccumulator,
    chunk_of,
    cut_off,
    data_of,
    events_of,
    split_events,
    with_data,
    with_usage,
)
from optillm_memory.testing.upstream import events

TEXT = st.text(max_size=40)
CALL = st.builds(
    lambda name, arguments, number: {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    },
    st.sampled_from(("run", "read_file")),
    st.dictionaries(TEXT, TEXT, max_size=3),
    st.integers(0, 9),
)


@st.composite
def completions(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a completion as a provider makes it."""
    choices = []
    for index in range(draw(st.integers(1, 3))):
        message: dict[str, Any] = {"role": "assistant", "content": draw(st.none() | TEXT)}
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXT.filter(bool))
        if calls := draw(st.lists(CALL, max_size=3)):
            message["tool_calls"] = calls
        reason = draw(st.sampled_from(("stop", "length", "tool_calls")))
        choices.append({"index": index, "message": message, "finish_reason": reason})
    usage = {"prompt_tokens": draw(st.integers(0, 10**12)), "completion_tokens": 3}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage,
        "provider_field": {"of": [1, None]},
    }  # fmt: skip


@given(completions(), st.data())
def test_what_is_streamed_is_put_together_again(completion: dict[str, Any], data: st.DataObject) -> None:
    """Whatever the choices hold, and wherever the bytes are cut."""
    sent = "".join(events({"stream_options": {"include_usage": True}}, completion)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=8)))
    pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    found = list(split_events(pieces))
    assert b"".join(found) == sent
    assert data_of(found[-1]) == "[DONE]"
    accumulator = StreamAccumulator()
    for event in found[:-1]:
        chunk = chunk_of(event)
        assert chunk is not None
        assert chunk_of(with_data(event, chunk)) == chunk
        accumulator.add(chunk)
    assert accumulator.is_complete
    assert accumulator.completion() == completion


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\r\r"])
def test_events_of_every_kind(end: str) -> None:
    """Comments, named events, several lines of data and an end without a blank line."""
    line = end[: len(end) // 2]
    sent = [f": ping{end}", f'event: x{line}data: {{"a":{line}data: 1}}{end}', "data: [DONE]"]
    found = list(split_events(["".join(sent).encode()]))
    assert found == [event.encode() for event in sent]
    assert [data_of(event) for event in found] == ["", '{"a":\n1}', "[DONE]"]
    assert chunk_of(found[1]) == {"a": 1}
    assert chunk_of(found[0]) is chunk_of(found[2]) is None
    assert with_data(found[1], {"b": 2}) == b'event: x\ndata: {"b": 2}\n\n'


def test_a_separator_of_unicode_ends_no_line() -> None:
    """Providers send it as it is within their JSON."""
    event = 'data: {"a": "one\u2028two\x85"}\n\n'.encode()
    assert chunk_of(event) == {"a": "one\u2028two\x85"}
    assert chunk_of(with_data(event, {"a": "\u2028"})) == {"a": "\u2028"}


def test_calls_whose_pieces_say_their_name_again() -> None:
    """Some providers send id, type and name with each piece of a call, some send whole calls without an index."""
    accumulator = StreamAccumulator()
    for arguments in ('{"a"', ": 1}"):
        call = {"index": 0, "id": "c", "type": "function", "function": {"name": "run", "arguments": arguments}}
        accumulator.add({"choices": [{"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}}]})
    whole = {"id": "d", "function": {"name": "look", "arguments": "{}"}}
    accumulator.add({"choices": [{"index": 0, "delta": {"tool_calls": [whole]}}]})
    message = accumulator.completion()["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "run", "arguments": '{"a": 1}'},
        whole["function"],
    ]
    assert not accumulator.is_complete


@pytest.mark.parametrize(
    "delta",
    [
        "text",
        ["a"],
        None,
        {"tool_calls": [None]},
        {"tool_calls": {"0": "x"}},
        {"tool_calls": [{}, None, 3]},
        {"content": 7},
    ],
    ids=repr,
)
def test_pieces_of_odd_shape_spoil_nothing(delta: Any) -> None:
    """What cannot be part of a message is left out of it; what came before and after is there."""
    accumulator = StreamAccumulator()
    for part in ({"content": "a"}, delta, {"refusal": "b"}):
        accumulator.add({"choices": [None, {"index": 0, "delta": part}]})
    accumulator.add({"choices": [{"index": "0", "delta": {}, "finish_reason": "stop"}]})
    message = accumulator.completion()["choices"][0]["message"]
    assert (str(message["content"])[0], message["refusal"]) in (("a", "b"), ("7", "b"))
    assert "tool_calls" not in message or all(isinstance(call, dict) for call in message["tool_calls"])
    assert accumulator.is_complete


def test_half_a_call_is_no_call() -> None:
    """Of what broke off neither form of a call is left."""
    accumulator = StreamAccumulator()
    accumulator.add(
        {"choices": [{"index": 0, "delta": {"content": "x", "function_call": {"name": "f", "arguments": "{"}}}]}
    )
    message = cut_off(accumulator.completion())["choices"][0]["message"]
    assert (message["content"], message.get("function_call"), message.get("tool_calls")) == ("x", None, None)


def test_a_large_event_in_small_pieces_takes_time_by_its_size() -> None:
    """A picture in one event is not searched anew with each piece."""

    def took(size: int) -> float:
        sent = b"data: " + b"x" * size + b"\n\n"
        started = time.process_time()
        assert len(list(split_events(sent[i : i + 1024] for i in range(0, len(sent), 1024)))) == 1
        return time.process_time() - started

    took(1 << 16)
    assert took(1 << 23) < 24 * max(took(1 << 20), 0.002)


def test_logprobs_go_on_and_an_error_is_kept() -> None:
    """Lists without an index are continued; a chunk may be an error."""
    accumulator = StreamAccumulator()
    for token in ("a", "b"):
        choice = {"index": 0, "delta": {"content": token}, "logprobs": {"content": [{"token": token}]}}
        accumulator.add({"id": "x", "choices": [choice]})
    accumulator.add({"error": {"message": "overloaded"}})
    made = accumulator.completion()
    assert made["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}
    assert accumulator.error == {"message": "overloaded"}
    assert "error" not in made
    cut = cut_off(made)["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("ab", "cut_off")


def test_another_answer_in_place_of_held_events() -> None:
    """Its calls and its end come where the held ones were; usage and [DONE] stay where they are."""
    call = {"id": "c", "type": "function", "function": {"name": "run", "arguments": "{}"}}
    message = {"role": "assistant", "content": "words", "tool_calls": [call]}
    first = {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": {"n": 1}}
    held = [e.encode() for e in events({"stream_options": {"include_usage": True}}, first)][3:]
    other = {
        "choices": [{"message": {"role": "assistant", "content": "no", "tool_calls": None}, "finish_reason": "stop"}]
    }
    for said in (True, False):
        made = events_of(other, like=held, without=("role", "content") if said else ())
        chunks = [chunk_of(event) for event in made]
        assert chunks[-1] is None
        accumulator = StreamAccumulator()
        for chunk in chunks[:-1]:
            assert chunk is not None
            assert chunk["id"] == "1"
            accumulator.add(chunk)
        answer = accumulator.completion()["choices"][0]
        assert answer["message"].get("content") == (None if said else "no")
        assert answer["finish_reason"] == "stop"
        assert (chunk_of(with_usage(made[-2], {"n": 2})) or {})["usage"] == {"n": 2}
