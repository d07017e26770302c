"""The text of messages, without what memory itself put there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

BLOCK_OPEN, BLOCK_CLOSE = "<agent_memory>", "</agent_memory>"
_BLOCK = re.compile(f"{BLOCK_OPEN}.*?(?:{BLOCK_CLOSE}|\\Z)", re.DOTALL)


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
    if BLOCK_OPEN not in text:
        return text.strip()
    # One pass, so that no text costs more than its length; what only looks like a block after it goes to the end.
    return _BLOCK.sub("", text).partition(BLOCK_OPEN)[0].strip()
