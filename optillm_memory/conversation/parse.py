"""Parsing of OpenAI messages into a Conversation: its task, steps, prefixes and frame."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.conversation.identity import as_json, extend_prefix, prefix_hashes
from optillm_memory.conversation.steps import is_observation, steps_of
from optillm_memory.conversation.text import is_text_part, text_of, without_insertions
from optillm_memory.records import Message, Step

_DIGITS = re.compile(r"\d+")
_UNIQUE = 16  # characters from which on a call's id is taken for random


@dataclass(frozen=True, slots=True)
class Conversation:
    """The parsed messages of a request.

    `task` is the last user text that is no observation, as it was sent; `prefixes[i]` hashes messages 0…i; `frame`
    hashes the system prompt, tools and response format; `plain` is True for one plain turn: optional system messages
    and a single user text, no tools. `one_shot` is True without assistant messages and tools: the answer is that to the
    task, and no step towards it.
    """

    messages: Sequence[Message]
    task: str
    steps: tuple[Step, ...]
    prefixes: tuple[str, ...]
    frame: str
    plain: bool
    one_shot: bool = True

    @property
    def is_first_turn(self) -> bool:
        """Whether no assistant has spoken yet."""
        return not any(message.get("role") == "assistant" for message in self.messages)

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
        """Return the ids of the latest steps with globally unique call ids, which identify the episode.

        An agent that shortens its conversation preserves no prefix.
        """
        return [s.step_id for s in reversed(self.steps) if len(s.call_id) >= _UNIQUE][:limit]

    def answered_prefixes(self, limit: int = 64) -> list[tuple[str, str]]:
        """Return (prefix that ends with an answer, prefix with one more message), longest first.

        The first is the end of an earlier request with its answer, the second how this conversation continues it.
        """
        ends = [i for i, m in enumerate(self.messages) if m.get("role") == "assistant"]
        after = [*self.prefixes[1:], ""]  # the model is to continue a last answer
        return [(self.prefixes[i], after[i]) for i in reversed(ends[-limit:])]


def parse(body: Mapping[str, Any], insertions: Sequence[str] = ()) -> Conversation:
    """Parse a request's body; malformed parts count as absent, since the upstream validates them.

    `insertions` are blocks that memory inserted into this conversation earlier.
    """
    raw = body.get("messages")
    messages = [m for m in raw if isinstance(m, Mapping)] if isinstance(raw, list) else []
    messages = [_less(message, insertions) for message in messages] if insertions else messages
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
        task=text_of(users[-1]) if users else "",
        steps=steps_of(messages, prefixes),
        prefixes=prefixes,
        frame=_frame(system, tools, body.get("response_format")),
        plain=plain,
        one_shot=len(users) == 1 and not others and not tools,
    )


def key_of(task: str) -> str:
    """Return the key of a task in recall: its ends, in one line of valid Unicode."""
    head, tail = task[:1000], task[1000:][-400:]
    return " ".join(f"{head} {tail}".encode("utf-8", "replace").decode("utf-8").split())


def answer_prefixes(conversation: Conversation, response: Mapping[str, Any] | None) -> list[str]:
    """Return the prefixes by which a conversation continues, one for each different choice of a response."""
    last = conversation.prefixes[-1] if conversation.prefixes else ""
    messages = [{**(c.get("message") or {}), "role": "assistant"} for c in (response or {}).get("choices") or []]
    return list(dict.fromkeys(extend_prefix(last, message) for message in messages))


def _less(message: Mapping[str, Any], insertions: Sequence[str]) -> Mapping[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": without_insertions(content, insertions)}
    if isinstance(content, list):
        return {**message, "content": [p for p in content if not (is_text_part(p) and p.get("text") in insertions)]}
    return message


def _frame(system: Sequence[str], tools: Any, response_format: Any) -> str:
    # Digits are masked: a date in the system prompt must not make a new frame every day.
    names = sorted(_tool_name(t) for t in tools) if isinstance(tools, list) else []
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    text = as_json([_DIGITS.sub("0", "\n".join(system)), names, kind])
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()


def _tool_name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
    return str(function.get("name")) if isinstance(function, Mapping) else ""
