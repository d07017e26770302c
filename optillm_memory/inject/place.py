"""Placement: insertions into a conversation, the same ones in its later requests, and their removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optillm_memory.conversation.text import SEPARATOR
from optillm_memory.records import Message, Placement


def still_anchored(placements: Sequence[Placement], prefixes: Sequence[str]) -> list[Placement]:
    """Return the placements whose prefix is unchanged in this request: they are inserted again."""
    return [p for p in placements if p.position < len(prefixes) and prefixes[p.position] == p.anchor]


def place(messages: Sequence[Message], placements: Sequence[Placement]) -> list[Message]:
    """Return the client's messages with every insertion; the messages are not modified in place."""
    turns, blocks = _by_position(placements)
    placed: list[Message] = []
    for index, message in enumerate(messages):
        placed += [dict(turn) for turn in turns.get(index, [])]
        placed.append(_with_text(message, blocks[index]) if index in blocks else message)
    return placed


def strip(messages: Sequence[Message], placements: Sequence[Placement]) -> list[Message]:
    """Undo `place`: `strip(place(m, p), p) == m`."""
    turns, blocks = _by_position(placements)
    stripped: list[Message] = []
    index = skip = 0
    for message in messages:
        if skip == 0 and index in turns:
            skip = len(turns.pop(index))
        if skip:
            skip -= 1
            continue
        stripped.append(_without_text(message, blocks[index]) if index in blocks else message)
        index += 1
    return stripped


def _by_position(placements: Sequence[Placement]) -> tuple[dict[int, list[Message]], dict[int, list[str]]]:
    """Return the inserted turns and the appended blocks by the index of the message before or in which they are."""
    turns: dict[int, list[Message]] = {}
    blocks: dict[int, list[str]] = {}
    for placement in placements:
        if isinstance(placement.payload, str):
            blocks.setdefault(placement.position, []).append(placement.payload)
        else:
            turns.setdefault(placement.position, []).extend(placement.payload)
    return turns, blocks


def append_text(text: str, block: str) -> str:
    """Append a block to a text."""
    return f"{text}{SEPARATOR}{block}"


def _with_text(message: Message, blocks: list[str]) -> Message:
    content: Any = message.get("content")
    for block in blocks:
        if isinstance(content, list):
            content = [*content, {"type": "text", "text": block}]
        else:
            content = block if content is None else append_text(content, block)
    return {**message, "content": content}


def _without_text(message: Message, blocks: list[str]) -> Message:
    content: Any = message["content"]
    if isinstance(content, list):
        return {**message, "content": content[: len(content) - len(blocks)]}
    for block in reversed(blocks):
        # A text, even an empty one, is followed by the separator; null is not.
        content = None if content == block else content.removesuffix(SEPARATOR + block)
    return {**message, "content": content}
