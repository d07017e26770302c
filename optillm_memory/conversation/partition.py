"""Partitions: the parts of a request, beside the task, that must be equal for an answer to be reusable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.conversation.identity import as_json
from optillm_memory.conversation.language import ENGLISH, language_of
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.steps import calls_of

# Fields without influence on the answer: our own, transport, bookkeeping; the messages are handled separately.
_IGNORED_FIELDS = {
    *("messages", "agent_memory", "optillm_approach", "stream", "stream_options", "user", "metadata", "store"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
}
# Fields that request more than a text.
_UNSUPPORTED_FIELDS = ("logprobs", "top_logprobs", "modalities", "audio", "prediction", "web_search_options")


def partition_of(body: Mapping[str, Any], conversation: Conversation, end_user: str = "") -> tuple[str, str]:
    """Return the hash of model, system prompt, history, tools, response format, sampling settings and end user.

    The second value is the reason why reuse is impossible: `tools`, `not_words`, `several_choices`,
    `unsupported_option`; then the hash is empty. Each language is a partition of its own: an error rate proven for one
    does not hold for another.
    """
    if body.get("tools") or body.get("functions") or conversation.steps:
        return "", "tools"
    messages = conversation.messages
    words = bool(conversation.task.strip()) and conversation.ends_with_user
    if not words or not isinstance(messages[-1].get("content"), str):
        return "", "not_words"
    if body.get("n", 1) not in (None, 1):
        return "", "several_choices"
    if asks_for_more_than_text(body):
        return "", "unsupported_option"
    settings = {key: value for key, value in body.items() if key not in _IGNORED_FIELDS and value is not None}
    parts = [settings, _as_sent(messages[:-1]), *([end_user] if end_user else [])]
    digest = hashlib.blake2b(as_json(parts).encode("utf-8", "replace"), digest_size=12).hexdigest()
    language = language_of(conversation.task)
    return (digest if language == ENGLISH else f"{digest}-{language}"), ""


def asks_for_more_than_text(body: Mapping[str, Any]) -> bool:
    """Whether a request wants with its answer what memory does not have."""
    return any(body.get(name) for name in _UNSUPPORTED_FIELDS)


def _as_sent(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of the exact history: another serialisation of the same messages has another hash."""
    hashed = ""
    for message in messages:
        content = message.get("content")
        text = content.strip() if isinstance(content, str) else content
        parts = [message.get("role"), text or None, calls_of(message, 0), message.get("tool_call_id")]
        line = hashed.encode("ascii") + as_json(parts).encode("ascii") + b"\n"
        hashed = hashlib.blake2b(line, digest_size=16).hexdigest()
    return hashed
