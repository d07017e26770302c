"""Reading a response: its answer in words, how it ended, and its messages as they are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.steps import calls_of
from optillm_memory.conversation.text import text_of

_BESIDE_WORDS = ("annotations", "citations", "audio", "images")


def answer_of(choices: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the answer in words, or None for tool calls, an empty answer, and choices that differ."""
    messages = [choice.get("message") or {} for choice in choices]
    texts = {text_of(message) for message in messages}
    if len(texts) != 1 or any(calls_of(message, 0) for message in messages):
        return None
    return texts.pop() or None


def ending_of(choices: Sequence[Mapping[str, Any]]) -> str | None:
    """Return how an answer ended: the finish reason of the first choice that did not simply stop, else the first's."""
    reasons = [_ending(choice) for choice in choices]
    return next((r for r in reasons if r.lower() not in ("stop", "none")), reasons[0]) if reasons else None


def _ending(choice: Mapping[str, Any]) -> str:
    message = choice.get("message") or {}
    return "refusal" if message.get("refusal") else str(choice.get("finish_reason"))


def is_in_words_alone(choices: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer's text is all of it: no citations, sound or pictures came beside it."""
    return not any((choice.get("message") or {}).get(name) for choice in choices for name in _BESIDE_WORDS)


def recorded_messages(
    conversation: Conversation, choices: Sequence[Mapping[str, Any]], stored: Callable[[str], str], *, since: bool
) -> list[dict[str, Any]]:
    """Return what this request added to its conversation, and every choice of the response, as it is stored.

    An agent repeats the whole conversation with each request; with `since`, what stands before the last answer
    is left out, for earlier traces of the episode hold it.
    """
    answered = [i for i, m in enumerate(conversation.messages) if m.get("role") == "assistant"]
    first = answered[-1] + 1 if since and answered else 0
    messages = [*conversation.messages[first:], *(choice.get("message") or {} for choice in choices)]
    return [recorded_message(message, stored) for message in messages]


def recorded_message(message: Mapping[str, Any], stored: Callable[[str], str]) -> dict[str, Any]:
    """Return one message as it is stored: role, text and tool calls."""
    recorded: dict[str, Any] = {"role": stored(str(message.get("role"))), "content": stored(text_of(message))}
    if calls := calls_of(message, 0):
        recorded["tool_calls"] = [
            {"id": stored(call_id), "name": stored(name), "arguments": stored(args)} for call_id, name, args in calls
        ]
    if message.get("tool_call_id"):
        recorded["tool_call_id"] = stored(str(message["tool_call_id"]))
    return recorded
