"""Partition: what else must be equal, exactly, for the answer to one request to be the answer to another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from optillm_memory.conversation.parse import Conversation, as_json

# What does not shape the answer: our own field, the transport, bookkeeping; the messages are looked at one by one.
_NO_MATTER = {
    *("messages", "agent_memory", "optillm_approach", "stream", "stream_options", "user", "metadata", "store"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
}
# What asks for more than an answer in words.
_MORE = ("logprobs", "top_logprobs", "modalities", "audio", "prediction", "web_search_options")


def partition_of(body: Mapping[str, Any], conversation: Conversation) -> tuple[str, str]:
    """Return the hash of model, system prompt, history, tools, response format and sampling settings.

    With it comes the reason why reuse is out of the question: `tools`, `not_words`, `several_choices`,
    `unsupported_option`; then the hash is empty.
    """
    if body.get("tools") or body.get("functions") or conversation.steps:
        return "", "tools"
    messages = conversation.messages
    if not conversation.task or not conversation.ends_with_user or not isinstance(messages[-1].get("content"), str):
        return "", "not_words"
    if body.get("n", 1) not in (None, 1):
        return "", "several_choices"
    if any(body.get(name) for name in _MORE):
        return "", "unsupported_option"
    settings = {key: value for key, value in body.items() if key not in _NO_MATTER and value is not None}
    history = conversation.prefixes[-2] if len(messages) > 1 else ""
    text = as_json([settings, history])
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest(), ""
