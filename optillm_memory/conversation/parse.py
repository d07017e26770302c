"""Messages in OpenAI's form become a Conversation: its task, steps, prefixes and frame."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.conversation.steps import calls_of, is_observation, steps_of
from optillm_memory.conversation.text import text_of, without_blocks
from optillm_memory.records import Message, Step

_DIGITS = re.compile(r"\d+")
as_json = json.JSONEncoder(sort_keys=True, default=str).encode  # one for all: to make one takes as long as to use it
_UNIQUE = 16  # characters from which on a call's id is taken for random


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request's messages say.

    `task` is the last user text that is no observation; `prefixes[i]` hashes messages 0…i; `frame` hashes what else
    shapes the answer (system prompt, tools, response format); `plain` is True for one plain turn: optional system
    messages and a single user text, no tools.
    """

    messages: Sequence[Message]
    task: str
    steps: tuple[Step, ...]
    prefixes: tuple[str, ...]
    frame: str
    plain: bool

    @property
    def ends_with_user(self) -> bool:
        """Whether the last message is the user's own words: where exemplars may be injected."""
        return bool(self.messages) and self.messages[-1].get("role") == "user" and not self.ends_with_observation

    @property
    def ends_with_observation(self) -> bool:
        """Whether the last message is the result of an action: where a fix may be injected."""
        return is_observation(self.messages, len(self.messages) - 1)

    @property
    def observed(self) -> tuple[Step, ...]:
        """The steps whose results are new in this request: those of the last answer."""
        answered = [i for i, m in enumerate(self.messages) if m.get("role") == "assistant"]
        if not answered:
            return ()
        made = self.prefixes[answered[-1]]
        return tuple(s for s in self.steps if s.made == made and s.observation is not None)

    def telling_steps(self, limit: int = 16) -> list[str]:
        """Return the latest steps whose calls have ids that no other conversation has: they tell the episode.

        An agent that shortens its conversation leaves no prefix as it was.
        """
        return [s.step_id for s in reversed(self.steps) if len(s.call_id) >= _UNIQUE][:limit]

    def answered_prefixes(self, limit: int = 64) -> list[str]:
        """Return the prefixes that end with an answer, longest first: where an earlier request left off."""
        ends = [i for i, m in enumerate(self.messages) if m.get("role") == "assistant"]
        return [self.prefixes[i] for i in reversed(ends[-limit:])]


def parse(body: Mapping[str, Any]) -> Conversation:
    """Read a request's body; what is malformed reads as absent, since the upstream is the judge of it."""
    raw = body.get("messages")
    messages = [m for m in raw if isinstance(m, Mapping)] if isinstance(raw, list) else []
    system = [text_of(m) for m in messages if m.get("role") in ("system", "developer")]
    users = [m for i, m in enumerate(messages) if m.get("role") == "user" and not is_observation(messages, i)]
    others = [m for m in messages if m.get("role") not in ("system", "developer", "user")]
    prefixes = prefix_hashes(messages)
    tools = body.get("tools") or body.get("functions") or []
    plain = (
        len(users) == 1
        and not others
        and len(messages) == len(system) + 1
        and messages[-1] is users[0]
        and isinstance(users[0].get("content"), str)
        and not tools
    )
    return Conversation(
        messages=[dict(m) for m in messages],
        task=without_blocks(text_of(users[-1])) if users else "",
        steps=steps_of(messages, prefixes),
        prefixes=prefixes,
        frame=_frame(system, tools, body.get("response_format")),
        plain=plain,
    )


def key_of(task: str) -> str:
    """Return the short key that stands for a task in recall: its ends, in one line of valid Unicode."""
    head, tail = task[:1000], task[1000:][-400:]
    return " ".join(f"{head} {tail}".encode("utf-8", "replace").decode("utf-8").split())


def prefix_hashes(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return for each message the hash of the conversation up to and with it."""
    hashes: list[str] = []
    for message in messages:
        hashes.append(extend_prefix(hashes[-1] if hashes else "", message))
    return tuple(hashes)


def extend_prefix(prefix: str, message: Mapping[str, Any]) -> str:
    """Return the hash of a conversation with this prefix and one message more."""
    return hashlib.blake2b(prefix.encode("ascii") + _canonical(message), digest_size=16).hexdigest()


def answer_prefixes(conversation: Conversation, response: Mapping[str, Any] | None) -> list[str]:
    """Return the prefixes with which a conversation goes on, one for each different choice of a response."""
    last = conversation.prefixes[-1] if conversation.prefixes else ""
    messages = [choice.get("message") or {} for choice in (response or {}).get("choices") or []]
    return list(dict.fromkeys(extend_prefix(last, message) for message in messages))


def _canonical(message: Mapping[str, Any]) -> bytes:
    # What every client keeps when it sends an answer back: role, text and calls. Other fields come and go.
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    parts = [message.get("role"), text or None, calls_of(message, 0), message.get("tool_call_id")]
    return as_json(parts).encode("ascii") + b"\n"


def _frame(system: Sequence[str], tools: Any, response_format: Any) -> str:
    # Digits are masked: a date in the system prompt must not make a new frame every day.
    names = sorted(_tool_name(t) for t in tools) if isinstance(tools, list) else []
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    text = as_json([_DIGITS.sub("0", "\n".join(system)), names, kind])
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()


def _tool_name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(function.get("name")) if isinstance(function, Mapping) else ""
