"""The text of messages, and the parts that do not belong to an answer: thoughts, and blocks that memory inserted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

BLOCK_OPEN, BLOCK_CLOSE = "<agent_memory>", "</agent_memory>"
BLOCK_BEGIN = BLOCK_OPEN[:-1]  # in a prompt a nonce follows
SEPARATOR = "\n\n"  # between a message's own text and a block
# Marks of thoughts in the text of reasoning models: at the start of a line, so that an answer about such marks stays as
# it is.
_NAMES = "think|thinking|thought|thoughts|reasoning|seed:think"
_OPENERS = ("<think", "<thought", "<reasoning>", "<seed:think>", "\u25c1think", "[think]", "<|channel|>")
_THOUGHTS = re.compile(
    rf"^[ \t]*(?:<(?P<tag>{_NAMES})>.*?(?:</(?P=tag)>|\Z)|\u25c1think\u25b7.*?(?:\u25c1/think\u25b7|\Z)"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)<\|message\|>.*?(?:<\|end\|>|\Z))(?:[ \t]*\n)*",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_HARMONY_FINAL = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|<\|(?:end|return)\|>\Z")
# Some templates open the thoughts in the prompt: the answer contains only their end.
_CLOSERS = ("</think>", "</thinking>", "\u25c1/think\u25b7", "[/THINK]")
_THOUGHT_PARTS = frozenset(("thinking", "redacted_thinking", "reasoning", "reasoning_content", "reasoning.text"))


def is_thought(part: Any) -> bool:
    """Whether a part of a content list holds thoughts."""
    return isinstance(part, Mapping) and part.get("type") in _THOUGHT_PARTS


def is_text_part(part: Any) -> bool:
    """Whether a part of a content list is text."""
    return (
        isinstance(part, Mapping)
        and not is_thought(part)
        and (isinstance(part.get("text"), str) or (part.get("type") == "refusal" and "refusal" in part))
    )


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """Return the texts in a message: its content, or the text parts of it; no thoughts in parts."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        parts = [p.get("text", p.get("refusal")) for p in content if is_text_part(p)]
        return [p for p in parts if isinstance(p, str)]
    return []


def text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text, its parts joined by newlines."""
    return "\n".join(texts_of(message))


def without_thoughts(text: str) -> str:
    """Return an answer without the thoughts of a reasoning model; unchanged without any."""
    lowered = text.lower()
    if any(opener in lowered for opener in _OPENERS):
        text = _THOUGHTS.sub(_OutsideFences(), text)
        text = _HARMONY_FINAL.sub("", text) if "<|channel|>" in text else text
    for closer in _CLOSERS:
        before, found, after = text.partition(closer)
        if found and closer.replace("/", "", 1) not in before and after.strip():
            text = after.lstrip("\n")
    return text


class _OutsideFences:
    """Removes a match, unless it is in a code fence: there the marks are the subject of the answer."""

    def __init__(self) -> None:
        self._fences = self._seen = 0

    def __call__(self, found: re.Match[str]) -> str:
        self._fences += found.string.count("```", self._seen, found.start())
        self._seen = found.end()
        return found.group() if self._fences % 2 else ""


def without_insertions(text: str, insertions: Iterable[str]) -> str:
    """Return a text without the blocks that memory appended; only exact blocks are removed."""
    for block in insertions:
        if text.endswith(block):
            text = text[: -len(block)].removesuffix(SEPARATOR)
    return text
