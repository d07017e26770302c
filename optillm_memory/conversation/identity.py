"""Message identity: a hash that is equal for the same message however a client serialises it when it sends it back.

A client repeats the conversation with every request, and rewrites it: a text becomes a list of parts, thoughts and
empty fields disappear, call ids are replaced, cache marks move. Stable are the role, the text, the calls (name, and
arguments as JSON values) and the content of parts that are no text. The identity consists of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.conversation.steps import calls_of
from optillm_memory.conversation.text import is_text_part, is_thought, texts_of, without_thoughts

as_json = json.JSONEncoder(sort_keys=True, default=str).encode  # shared: to construct one takes as long as to use it
# Synonymous roles: clients and gateways rename them.
_ROLES = {"developer": "system", "function": "tool"}
# Fields of a part that clients add or leave out, and that do not change its content.
_MARKS = ("cache_control", "detail")
# Types of parts that are only text; an image part may have a text too.
_TEXTS = (None, "text", "input_text", "output_text", "refusal")


def prefix_hashes(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return for each message the hash of the conversation up to and including it."""
    hashes: list[str] = []
    for message in messages:
        hashes.append(extend_prefix(hashes[-1] if hashes else "", message))
    return tuple(hashes)


def extend_prefix(prefix: str, message: Mapping[str, Any]) -> str:
    """Return the hash of a conversation with this prefix and one more message."""
    identity = as_json(identity_of(message)).encode("ascii")
    return hashlib.blake2b(prefix.encode("ascii") + identity + b"\n", digest_size=16).hexdigest()


def identity_of(message: Mapping[str, Any]) -> list[Any]:
    """Return the stable content of a message as JSON values: role, text, calls and other parts.

    Raises RecursionError for parts nested several hundred deep.
    """
    role = _ROLES.get(str(message.get("role")), message.get("role"))
    text = "\n".join(map(str.rstrip, texts_of(message)))
    if role == "assistant":
        refusal = message.get("refusal")
        text = without_thoughts(text) or (refusal if isinstance(refusal, str) else "")
    calls = [[name, value_of(arguments)] for _, name, arguments in calls_of(message, 0)]
    content = message.get("content")
    parts = [_part(p) for p in content if not _is_of_text(p)] if isinstance(content, list) else []
    audio = message.get("audio")  # of a spoken answer clients send back the id
    audio_id = [audio.get("id")] if isinstance(audio, Mapping) else []
    return [role, _folded(text), calls, parts, *audio_id]


def _folded(text: str) -> str:
    """Return a text without carriage returns and trailing white space, which editors and clients remove."""
    return "\n".join(map(str.rstrip, text.split("\n"))).strip()


def _is_of_text(part: Any) -> bool:
    return is_thought(part) or (is_text_part(part) and part.get("type") in _TEXTS)


def _part(part: Any) -> Any:
    if isinstance(part, Mapping):
        kept = {key: _part(value) for key, value in part.items() if key not in _MARKS and value is not None}
        return {key: value for key, value in kept.items() if value not in ({}, [])}
    return [_part(item) for item in part] if isinstance(part, list) else part


def value_of(arguments: str) -> Any:
    """Return a call's arguments as JSON values: clients parse and serialise them again."""
    if not arguments.strip():
        return {}
    try:
        return _plain(json.loads(arguments))
    except (ValueError, RecursionError):
        return _folded(arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)  # JavaScript has one type of number: 1.0 comes back as 1
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
