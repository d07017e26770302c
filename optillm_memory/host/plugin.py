"""The approach `agent_memory` as optillm calls it. The plugin file imports SLUG and run from here."""

from __future__ import annotations

import time
from typing import Any

import flask

from optillm_memory.conversation.options import FIELD, parse_options
from optillm_memory.host.exchange import Exchange
from optillm_memory.host.hooks import attach
from optillm_memory.host.incoming import SENT_N, SLUG, Incoming, read_incoming
from optillm_memory.host.runtime import runtime
from optillm_memory.host.server import host

__all__ = ["SLUG", "run"]


def run(
    system_prompt: str,
    initial_query: str,
    client: Any,
    model: str,
    request_config: dict[str, Any] | None = None,
    messages: list[dict[str, Any]] | None = None,
) -> tuple[dict[str, Any] | str, int]:
    """Answer as optillm's `none` (or the wrapped approach) would, with memory before and after.

    Returns a whole completion if the host passes it on, otherwise (text, completion tokens). Upstream errors are
    raised unchanged.
    """
    server = host()
    config = dict(request_config or {})
    field = config.pop(FIELD, None)
    config.pop("optillm_approach", None)  # the host leaves its own field in; no upstream knows it
    if not flask.has_request_context():
        return _batched(server, system_prompt, initial_query, client, model, config, field)
    exchange: Exchange | None = flask.g.get(FIELD)
    if exchange is None:
        incoming = read_incoming(server)
        assert incoming is not None
        body = incoming.body.get("messages")
        if messages is None and incoming.operation == "AND" and incoming.approaches[0] != SLUG:
            messages = _as_messages(system_prompt, initial_query)  # the query from the approach before us
        elif messages is None:
            messages = server.strip_optillm_approach_tags(body if isinstance(body, list) else [])
        incoming = incoming.with_messages(messages)
        flask.g.agent_memory = exchange = Exchange.begin(server, runtime(), incoming)
        flask.after_this_request(exchange.respond)
    if exchange.incoming.adds_to_query:
        return exchange.query_with_memory(initial_query, client), 0
    if exchange.incoming.operation == "SINGLE" and config.get("n", 1) == 1:
        if SENT_N in flask.g:
            config["n"] = flask.g.get(SENT_N)
        exchange.completion = exchange.ask_guarded(client, model, config)
        return exchange.labelled(exchange.completion), 0
    if exchange.incoming.operation == "SINGLE" and exchange.inner == "none":
        return _share_out(exchange, client, model, config)
    # The host calls us n times, or in parallel with or after other approaches: one text answer for each call.
    completion = exchange.ask(client, model, {**config, "n": 1})
    return _text(completion), _tokens(completion)


def _share_out(exchange: Exchange, client: Any, model: str, config: dict[str, Any]) -> tuple[str, int]:
    # The host calls once for each of n choices; `none` asks upstream once for all of them, and so do we. What text
    # cannot carry (tool calls, finish reasons) is restored in the response before it is sent.
    if exchange.completion is None:
        exchange.completion = exchange.ask(client, model, config)
    choices = exchange.completion.get("choices") or []
    number = exchange.shared_out or 0
    exchange.shared_out = number + 1
    text = str((choices[number].get("message") or {}).get("content") or "") if number < len(choices) else ""
    return text, _tokens(exchange.completion) if number == 0 else 0


def _batched(
    server: Any, system_prompt: str, query: str, client: Any, model: str, config: dict[str, Any], field: Any
) -> tuple[str, int]:
    # Batch mode has no request: no headers, no caller, no messages.
    options = parse_options(field, now=time.time())
    body = {"model": model, "messages": _as_messages(system_prompt, query), **config}
    incoming = Incoming(body, 0, "batch", options, "SINGLE", (SLUG,), model)
    exchange = Exchange.begin(server, runtime(), incoming)
    try:
        completion = exchange.ask(client, model, {**config, "n": 1})
    finally:
        exchange.fail_open.quietly(exchange.finish)
    return _text(completion), _tokens(completion)


def _as_messages(system_prompt: str, query: str) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": query}]


def _text(completion: dict[str, Any]) -> str:
    choices = completion.get("choices") or [{}]
    return str((choices[0].get("message") or {}).get("content") or "")


def _tokens(completion: dict[str, Any]) -> int:
    return int((completion.get("usage") or {}).get("completion_tokens") or 0)


attach(host().app)
