"""Messages in OpenAI's form become a Conversation: its task, steps, prefixes and frame."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.records import Message, Step

BLOCK_OPEN, BLOCK_CLOSE = "<agent_memory>", "</agent_memory>"
_BLOCK = re.compile(f"{BLOCK_OPEN}.*?(?:{BLOCK_CLOSE}|\\Z)", re.DOTALL)
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request's messages say.

    `task` is the last user text; `prefixes[i]` hashes messages 0…i; `frame` hashes what else shapes the answer
    (system prompt, tools, response format); `plain` is True for one plain turn: optional system messages and
    a single user text, no tools.
    """

    messages: Sequence[Message]
    task: str
    steps: tuple[Step, ...]
    prefixes: tuple[str, ...]
    frame: str
    plain: bool

    @property
    def ends_with_user(self) -> bool:
        """Whether the last message is the user's: the only place where something new may be injected."""
        return bool(self.messages) and self.messages[-1].get("role") == "user"

    def answered_prefixes(self, limit: int = 64) -> list[str]:
        """Return the prefixes that end with an answer, longest first: where an earlier request left off."""
        ends = [i for i, m in enumerate(self.messages) if m.get("role") == "assistant"]
        return [self.prefixes[i] for i in reversed(ends[-limit:])]


def parse(body: Mapping[str, Any]) -> Conversation:
    """Read a request's body; what is malformed reads as absent, since the upstream is the judge of it."""
    raw = body.get("messages")
    messages = [m for m in raw if isinstance(m, Mapping)] if isinstance(raw, list) else []
    system = [text_of(m) for m in messages if m.get("role") in ("system", "developer")]
    users = [m for m in messages if m.get("role") == "user"]
    others = [m for m in messages if m.get("role") not in ("system", "developer", "user")]
    tools = body.get("tools") or body.get("functions") or []
    plain = (
        len(users) == 1
        and not others
        and messages[-1] is users[0]
        and isinstance(users[0].get("content"), str)
        and not tools
    )
    return Conversation(
        messages=[dict(m) for m in messages],
        task=without_blocks(text_of(users[-1])) if users else "",
        steps=steps_of(messages),
        prefixes=prefix_hashes(messages),
        frame=_frame(system, tools, body.get("response_format")),
        plain=plain,
    )


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text: its content, or the text parts of it joined by newlines."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p.get("text") for p in content if isinstance(p, Mapping)]
        return "\n".join(p for p in parts if isinstance(p, str))
    return ""


def without_blocks(text: str) -> str:
    """Return the text without any memory block, so that what was injected is never learned from."""
    # One pass, so that no text costs more than its length; what only looks like a block after it goes to the end.
    return _BLOCK.sub("", text).partition(BLOCK_OPEN)[0].strip()


def key_of(task: str) -> str:
    """Return the short key that stands for a task in recall: its ends, in one line of valid Unicode."""
    head, tail = task[:1000], task[1000:][-400:]
    return " ".join(f"{head} {tail}".encode("utf-8", "replace").decode("utf-8").split())


def steps_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """Pair tool calls (and legacy function calls) with the results that follow them, in order."""
    observed: dict[str, str] = {}
    for index, message in enumerate(messages):
        if message.get("role") == "tool":
            observed.setdefault(str(message.get("tool_call_id")), text_of(message))
        elif message.get("role") == "function":
            observed.setdefault(f"function-{index - 1}", text_of(message))
    steps: list[Step] = []
    for index, message in enumerate(messages):
        for call_id, tool, arguments in calls_of(message, index):
            steps.append(Step(call_id, len(steps), tool, arguments, observed.get(call_id)))
    return tuple(steps)


def calls_of(message: Mapping[str, Any], index: int) -> list[tuple[str, str, str]]:
    """Return (call id, tool, arguments) of every call in a message; a legacy call is named by its index."""
    found = []
    calls = message.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            call_id = str(call.get("id") or f"call-{index}-{number}")
            found.append((call_id, str(function.get("name") or ""), _as_text(function.get("arguments"))))
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping):
        found.append((f"function-{index}", str(legacy.get("name") or ""), _as_text(legacy.get("arguments"))))
    return found


def prefix_hashes(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return for each message the hash of the conversation up to and with it."""
    hashes: list[str] = []
    for message in messages:
        hashes.append(extend_prefix(hashes[-1] if hashes else "", message))
    return tuple(hashes)


def extend_prefix(prefix: str, message: Mapping[str, Any]) -> str:
    """Return the hash of a conversation with this prefix and one message more."""
    return hashlib.blake2b(prefix.encode("ascii") + _canonical(message), digest_size=16).hexdigest()


def _canonical(message: Mapping[str, Any]) -> bytes:
    # What every client keeps when it sends an answer back: role, text and calls. Other fields come and go.
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    parts = [message.get("role"), text or None, calls_of(message, 0), message.get("tool_call_id")]
    return json.dumps(parts, sort_keys=True, default=str).encode("ascii") + b"\n"


def _frame(system: Sequence[str], tools: Any, response_format: Any) -> str:
    # Digits are masked: a date in the system prompt must not make a new frame every day.
    names = sorted(_tool_name(t) for t in tools) if isinstance(tools, list) else []
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    text = json.dumps([_DIGITS.sub("0", "\n".join(system)), names, kind], default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()


def _tool_name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(function.get("name")) if isinstance(function, Mapping) else ""


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
