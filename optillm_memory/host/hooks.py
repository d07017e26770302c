"""Hooks into the host's Flask app: our routes, the check of our field before the host starts work, the models."""

from __future__ import annotations

import json
from typing import Any

import flask

from optillm_memory.conversation.options import FIELD
from optillm_memory.errors import InvalidField, NotAllowed
from optillm_memory.host import direct, logs
from optillm_memory.host.exchange import OK, Exchange
from optillm_memory.host.incoming import SENT_N, SLUG, Incoming, read_incoming
from optillm_memory.host.routes import TOO_DEEP, blueprint, error_response
from optillm_memory.host.runtime import level, open_early, runtime
from optillm_memory.host.server import host

CHAT_PATH, MODELS_PATH = "/v1/chat/completions", "/v1/models"


def attach(app: flask.Flask) -> None:
    """Add the routes and hooks to the app, once; Flask allows that only before the first request."""
    if FIELD in app.extensions:
        return
    app.extensions[FIELD] = True
    app.register_blueprint(blueprint)
    app.before_request(before_request)  # runs after the host's check of the API key, which was registered earlier
    app.after_request(after_request)
    logs.attach(level)
    open_early()


def before_request() -> flask.Response | tuple[flask.Response, int] | None:
    """Refuse a bad `agent_memory` field with 400, and answer from memory if the gate allows it.

    Inside an approach, an exception would become a 500, and the host would have built its client already, which costs
    more than an answer from memory.
    """
    if flask.request.path != CHAT_PATH or flask.request.method != "POST":
        return None
    answers: list[flask.Response | tuple[flask.Response, int] | None] = []
    runtime().fail_open.quietly(lambda: answers.append(_answer_early()))
    return answers[0] if answers else None


def after_request(response: flask.Response) -> flask.Response:
    """Add each model with memory to the list of models: many clients offer only what is listed."""
    if flask.request.path == MODELS_PATH and flask.request.method == "GET" and response.status_code == OK:
        runtime().fail_open.quietly(lambda: _list_models(response))
    return response


def _answer_early() -> flask.Response | tuple[flask.Response, int] | None:
    server, refused = host(), None
    try:
        incoming = read_incoming(server)
    except InvalidField as error:
        refused = error_response(str(error), 400, param=error.param)
    except NotAllowed as error:
        refused = error_response(str(error), 401, code=error.code)
    except RecursionError:  # the host would answer 500, with a traceback in its log
        refused = error_response(TOO_DEEP, 400)
    if refused is not None or incoming is None:
        return refused
    process = runtime()
    is_direct = direct.takes(process, server, incoming)
    if is_direct or (incoming.options.reuse and incoming.operation == "SINGLE"):
        exchange = _begin(server, incoming)
        if exchange.turn.action == "reuse":
            flask.after_this_request(exchange.respond)
            return _from_memory(exchange)
        if is_direct and exchange.inner == "none":
            response = direct.answer(process, exchange, incoming.body)
            if response is not None:
                return response
        flask.after_this_request(exchange.respond)
    _make_countable(incoming)
    return None


def _list_models(response: flask.Response) -> None:
    listed = response.get_json(silent=True)
    if not isinstance(listed, dict) or not isinstance(models := listed.get("data"), list):
        return
    known = {m.get("id") for m in models if isinstance(m, dict)}
    ours = [
        {**m, "id": f"{SLUG}-{m['id']}"}
        for m in models
        if isinstance(m, dict) and isinstance(m.get("id"), str) and not m["id"].startswith(f"{SLUG}-")
    ]
    response.set_data(json.dumps({**listed, "data": [*models, *(m for m in ours if m["id"] not in known)]}))


def _begin(server: Any, incoming: Incoming) -> Exchange:
    # If memory does not answer, and the lane does not either, the exchange is kept in flask.g for the host's call:
    # recall runs once.
    messages = incoming.body.get("messages")
    incoming = incoming.with_messages(
        server.strip_optillm_approach_tags(messages if isinstance(messages, list) else [])
    )
    flask.g.agent_memory = exchange = Exchange.begin(server, runtime(), incoming)
    return exchange


def _from_memory(exchange: Exchange) -> flask.Response:
    server, body = exchange.host, exchange.incoming.body
    exchange.completion = completion = exchange.labelled(exchange.turn.reused())
    if not body.get("stream"):
        return flask.jsonify(completion)
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    chunks = server.generate_streaming_completion(completion, exchange.incoming.model, usage)
    return flask.Response(chunks, content_type="text/event-stream")


def _make_countable(incoming: Incoming) -> None:
    # For a plugin the host counts to `n`, for `none` it passes on whatever it is; the plugin restores it.
    n = incoming.body.get("n", 1)
    if not isinstance(n, int) or n < 1:
        flask.g.setdefault(SENT_N, n)
        flask.request.get_json()["n"] = 1
