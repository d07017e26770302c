"""The goal of an episode: what the user wants, in the user's words, without what every request of that agent repeats.

An agent puts its instructions, examples and tool manuals into each conversation. A line that stands in several
different conversations of the same agent is the agent speaking, not the task (document frequency: Spärck Jones 1972).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from optillm_memory.conversation.steps import is_observation
from optillm_memory.conversation.text import text_of

KNOWN_FROM = 3  # different conversations from which on lines can be told apart by how often they come
KEY_LENGTH = 12  # hex digits
_SHARED_SHARE = 0.02  # of all conversations of the agent
_DIGITS = re.compile(r"\d+")
_LINES = 400  # of one message that are looked at
# Until an agent's conversations are known: sections that say how to work, and examples.
_SECTION = re.compile(
    r"<(?P<tag>[\w-]{0,40}(?:instruction|example|format|rule|important|system|polic|tool|guideline)[\w-]{0,40})\b[^>]{0,200}>"
    r".*?</(?P=tag)>",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class SharedLines:
    """How many different conversations of an agent are known, and in how many of them each line stands, by line key."""

    conversations: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    def holds(self, key: str) -> bool:
        """Whether a line is the agent's: it stands in three conversations or more, and in two per cent of all."""
        return self.counts.get(key, 0) >= max(KNOWN_FROM, _SHARED_SHARE * self.conversations)


def utterances(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the user wrote, oldest first: user messages that are not the results of actions."""
    return [
        text
        for index, message in enumerate(messages)
        if message.get("role") == "user" and not is_observation(messages, index) and (text := text_of(message)).strip()
    ]


def line_keys(texts: Iterable[str]) -> list[str]:
    """Return the keys of the lines of texts, each once."""
    return list(dict.fromkeys(line_key(line) for text in texts for line in _lines(text)))


def kept_lines(messages: Sequence[Mapping[str, Any]], *, one_shot: bool) -> list[str]:
    """Return the keys of the lines that the user wrote; of a single line to no agent there is nothing to compare."""
    keys = line_keys(utterances(messages))
    return [] if one_shot and len(keys) == 1 else keys


@lru_cache(maxsize=16_384)  # an agent repeats its instructions with every request
def line_key(line: str) -> str:
    """Return a line's key: a hash of its words, numbers masked, so that a counter makes no other line."""
    masked = _DIGITS.sub("0", " ".join(line.split()))
    return hashlib.blake2b(masked.encode("utf-8", "replace"), digest_size=KEY_LENGTH // 2).hexdigest()


def own_utterances(texts: Sequence[str], shared: SharedLines) -> list[str]:
    """Return what the user wrote without the agent's own lines; messages of which nothing remains are left out.

    Where every line is shared, those that are shared least are the task: it was asked before.
    """
    if shared.conversations < KNOWN_FROM:
        kept = [_SECTION.sub("", text).strip() for text in texts]
        return [text for text in kept if text] or list(texts)
    keyed = [[(line, line_key(line)) for line in _lines(text)] for text in texts]
    kept = ["\n".join(line for line, key in lines if not shared.holds(key)) for lines in keyed]
    if any(kept):
        return [text for text in kept if text]
    least = min((shared.counts.get(key, 0) for lines in keyed for _, key in lines), default=0)
    kept = ["\n".join(line for line, key in lines if shared.counts.get(key, 0) == least) for lines in keyed]
    return [text for text in kept if text]


def goal_of(texts: Sequence[str], shared: SharedLines) -> str:
    """Return the goal in what the user wrote, latest last."""
    return "\n".join(own_utterances(texts, shared))


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n")[:_LINES] if line.strip()]
