"""Server-sent events of a streamed completion: read event by event, and put together again as one completion."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

DONE = "[DONE]"
_BOUNDARY = re.compile(rb"\r\n\r\n|\n\n|\r\r")
# In pieces of a call these are said again, not continued.
_REPEATED_KEYS = frozenset(("id", "type", "role", "name", "index"))


def split_events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Split a byte stream into events, each with the blank line that ends it; the last one may lack it."""
    waiting = bytearray()
    for piece in pieces:
        looked = max(0, len(waiting) - 3)  # the boundary may have begun in the piece before
        waiting += piece
        start = 0
        for boundary in _BOUNDARY.finditer(waiting, looked):
            yield bytes(waiting[start : boundary.end()])
            start = boundary.end()
        if start:
            del waiting[:start]
    if waiting:
        yield bytes(waiting)


def data_of(event: bytes) -> str:
    """Return the data of an event, or "" where it has none (a comment that keeps the connection open)."""
    # Lines of bytes: those of a text would also end at a separator of Unicode, which JSON may hold.
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).decode("utf-8", "replace")


def chunk_of(event: bytes) -> dict[str, Any] | None:
    """Return an event's data as a JSON object, or None where it is none."""
    data = data_of(event)
    if not data.startswith("{"):
        return None
    try:
        chunk = json.loads(data)
    except ValueError:
        return None
    return chunk if isinstance(chunk, dict) else None


def with_data(event: bytes, chunk: Mapping[str, Any]) -> bytes:
    """Return the event with another object as its data; its other lines stay."""
    others = [line for line in event.splitlines() if line and not line.startswith(b"data:")]
    return b"\n".join([*others, b"data: " + json.dumps(chunk).encode(), b"", b""])


class StreamAccumulator:
    """A completion that is put together from the chunks of its stream, whatever fields they have."""

    def __init__(self) -> None:
        """Start without chunks."""
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.error: Any = None
        self.is_done = False  # the upstream said that this is all

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in a chunk."""
        if chunk.get("error"):
            self.error = chunk["error"]
        choices = chunk.get("choices")
        self._head.update((k, v) for k, v in chunk.items() if k not in ("choices", "error") and v is not None)
        for choice in _dicts(choices):
            index = choice["index"] if isinstance(choice.get("index"), int) else 0
            known = self._choices.setdefault(index, {"index": index, "message": {"role": "assistant", "content": None}})
            known["message"] = _merged(known["message"], _dict(choice.get("delta")))
            for name, value in choice.items():
                if name not in ("index", "delta") and value is not None:
                    known[name] = _merged(known.get(name), value) if isinstance(value, dict) else value

    @property
    def is_empty(self) -> bool:
        """Whether nothing of an answer has come."""
        return not self._choices

    @property
    def fields(self) -> set[str]:
        """The fields of the first choice's message that hold something, the role aside."""
        message = self._choices[min(self._choices)]["message"] if self._choices else {}
        return {name for name, value in message.items() if value and name != "role"}

    @property
    def is_complete(self) -> bool:
        """Whether the upstream said that this is all, or every choice so far has ended."""
        return self.is_done or (
            bool(self._choices) and all(choice.get("finish_reason") for choice in self._choices.values())
        )

    def completion(self) -> dict[str, Any]:
        """Return what has come so far in the form of an answer that is not streamed."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"finish_reason": None, **choice, "message": _as_message(choice)} for choice in choices],
        }


def deltas_of(chunk: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a chunk adds to its choices."""
    return [_dict(choice.get("delta")) for choice in _dicts(chunk.get("choices"))]


def with_fields(completion: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a completion of one choice with fields of another message in place of its own."""
    choice = completion["choices"][0]
    return {**completion, "choices": [{**choice, "message": {**choice["message"], **message}}]}


def events_of(completion: Mapping[str, Any], *, like: list[bytes], without: Collection[str]) -> list[bytes]:
    """Return the events of a completion of one choice in place of others, of which those without a choice stay.

    The fields `without` are left out of its message: they have gone out before.
    """
    chunks = [chunk_of(event) or {} for event in like]
    choice, head = completion["choices"][0], {k: v for k, v in chunks[0].items() if k != "usage"}
    calls = [{"index": i, **call} for i, call in enumerate(_dicts(choice["message"].get("tool_calls")))]
    delta = {k: v for k, v in choice["message"].items() if v is not None and k not in without}
    whole = {"index": 0, "delta": {**delta, **({"tool_calls": calls} if calls else {})}, "finish_reason": None}
    end = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason")}
    usage: dict[str, Any] = {"usage": {}} if any(c.get("choices") and c.get("usage") for c in chunks) else {}
    made = [{**head, "choices": [whole]}, {**head, "choices": [end], **usage}]
    stays = [event for event, chunk in zip(like, chunks, strict=True) if not chunk.get("choices")]
    return [*(with_data(b"", chunk) for chunk in made), *stays]


def with_usage(event: bytes, usage: Any) -> bytes:
    """Return an event with another usage, if it tells one."""
    chunk = chunk_of(event) or {}
    return with_data(event, {**chunk, "usage": usage}) if chunk.get("usage") is not None else event


def cut_off(completion: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came of a completion that broke off: its words, without calls that may not be whole."""
    nothing = {"tool_calls": None, "function_call": None}
    choices = [
        {**choice, "message": {**choice["message"], **nothing}, "finish_reason": "cut_off"}
        for choice in completion["choices"]
    ]
    return {**completion, "choices": choices}


def _as_message(choice: Mapping[str, Any]) -> dict[str, Any]:
    message = dict(choice["message"])
    if "tool_calls" in message:
        calls = [{k: v for k, v in call.items() if k != "index"} for call in _dicts(message.pop("tool_calls"))]
        message |= {"tool_calls": calls} if calls else {}
    return message


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _merged(known: Any, new: Any, name: str = "") -> Any:
    """Return a value with what a later chunk adds to it: texts go on, lists by their items' `index` or at their end."""
    if known is None or new is None:
        return known if new is None else new
    if isinstance(known, dict) and isinstance(new, dict):
        return {**known, **{key: _merged(known.get(key), value, key) for key, value in new.items()}}
    if isinstance(known, list) and isinstance(new, list):
        return _lists_merged(known, new)
    if isinstance(known, str) and isinstance(new, str) and name not in _REPEATED_KEYS:
        return known + new
    return new or known


def _lists_merged(known: list[Any], new: list[Any]) -> list[Any]:
    merged = list(known)
    for item in new:
        index = item.get("index") if isinstance(item, dict) else None
        at = next((i for i, k in enumerate(merged) if isinstance(k, dict) and k.get("index") == index), None)
        if index is None or at is None:
            merged.append(item)
        else:
            merged[at] = _merged(merged[at], item)
    return merged
