"""What is attached to the host's Flask app: the routes, and the check of our field before the host starts work."""

from __future__ import annotations

import logging

import flask

from optillm_memory.conversation.options import FIELD
from optillm_memory.errors import InvalidField
from optillm_memory.host.exchange import Exchange
from optillm_memory.host.incoming import SENT_N, Incoming, read_incoming
from optillm_memory.host.routes import blueprint, error_response
from optillm_memory.host.runtime import runtime
from optillm_memory.host.server import host

logger = logging.getLogger(__name__)
CHAT_PATH = "/v1/chat/completions"


def attach(app: flask.Flask) -> None:
    """Add routes and check to the app, once; must come before its first request, as plugins do."""
    if FIELD in app.extensions:
        return
    app.extensions[FIELD] = True
    app.register_blueprint(blueprint)
    app.before_request(before_request)  # after the host's own check of the API key, which was registered before
    runtime()  # opened now, so that the first request does not wait for it


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
