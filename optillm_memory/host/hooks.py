"""What is attached to the host's Flask app: the routes, and the check of our field before the host starts work."""

from __future__ import annotations

import json
import logging

import flask

from optillm_memory.conversation.options import FIELD
from optillm_memory.errors import InvalidField
from optillm_memory.host.exchange import OK, Exchange
from optillm_memory.host.incoming import SENT_N, SLUG, Incoming, read_incoming
from optillm_memory.host.routes import blueprint, error_response
from optillm_memory.host.runtime import open_early, runtime
from optillm_memory.host.server import host

logger = logging.getLogger(__name__)
CHAT_PATH, MODELS_PATH = "/v1/chat/completions", "/v1/models"


def attach(app: flask.Flask) -> None:
    """Add routes and check to the app, once; must come before its first request, as plugins do."""
    if FIELD in app.extensions:
        return
    app.extensions[FIELD] = True
    app.register_blueprint(blueprint)
    app.before_request(before_request)  # after the host's own check of the API key, which was registered before
    app.after_request(after_request)
    open_early()


def before_request() -> flask.Response | tuple[flask.Response, int] | None:
    """Refuse a bad `agent_memory` field with 400, and answer from memory where the gate lets it.

    An exception inside an approach would be a 500; and by then the host has built its client, which costs more than
    an answer from memory.
    """
    if flask.request.path != CHAT_PATH or flask.request.method != "POST":
        return None
    try:
        if incoming := read_incoming(host()):
            _make_countable(incoming)
            if incoming.options.reuse and incoming.operation == "SINGLE":
                return _from_memory(incoming)
    except InvalidField as error:
        return error_response(str(error), 400, param=error.param)
    except Exception:
        logger.exception("agent_memory: the request could not be read; left to the host")
    return None


def after_request(response: flask.Response) -> flask.Response:
    """List each model with memory beside it: many clients offer only what is listed."""
    try:
        if flask.request.path == MODELS_PATH and flask.request.method == "GET" and response.status_code == OK:
            _list_models(response)
    except Exception:
        logger.exception("agent_memory: the list of models is left as it is")
    return response


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


def _from_memory(incoming: Incoming) -> flask.Response | None:
    # Where memory does not answer, the exchange waits in flask.g for the host's call: recall is done once.
    server, body = host(), incoming.body
    messages = body.get("messages")
    incoming = incoming.with_messages(
        server.strip_optillm_approach_tags(messages if isinstance(messages, list) else [])
    )
    flask.g.agent_memory = exchange = Exchange.begin(server, runtime(), incoming)
    flask.after_this_request(exchange.respond)
    if exchange.turn.action != "reuse":
        return None
    exchange.completion = completion = exchange.labelled(exchange.turn.reused())
    if not body.get("stream"):
        return flask.jsonify(completion)
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    chunks = server.generate_streaming_completion(completion, incoming.model, usage)
    return flask.Response(chunks, content_type="text/event-stream")


def _make_countable(incoming: Incoming) -> None:
    # The host counts to `n` for a plugin, but passes whatever it is on for `none`; the plugin puts it back.
    n = incoming.body.get("n", 1)
    if not isinstance(n, int) or n < 1:
        flask.g.setdefault(SENT_N, n)
        flask.request.get_json()["n"] = 1
