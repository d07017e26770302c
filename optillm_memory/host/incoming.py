"""A request as it came to the host: its caller, approach and options."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flask

from optillm_memory.conversation.options import (
    FIELD,
    HEADER_PREFIX,
    KEY_HEADER,
    OPERATOR_HEADER,
    REPORTER_HEADER,
    Options,
    as_utf8,
    identified,
    parse_options,
)
from optillm_memory.errors import InvalidField, NotAllowed
from optillm_memory.host.caller import caller_of, refuse_foreign
from optillm_memory.host.runtime import runtime
from optillm_memory.records import NARROWING, Tenant, View

logger = logging.getLogger(__name__)

SLUG = "agent_memory"
_SECRET_HEADERS = tuple(name.lower() for name in (OPERATOR_HEADER, KEY_HEADER, REPORTER_HEADER))
SENT_N = "agent_memory_sent_n"  # on flask.g: the client's `n` if the host cannot count to it


@dataclass(frozen=True, slots=True)
class Incoming:
    """A chat request for the approach `agent_memory`."""

    body: Mapping[str, Any]
    size: int
    tenant: str
    options: Options
    operation: str
    approaches: tuple[str, ...]
    model: str

    def with_messages(self, messages: list[dict[str, Any]]) -> Incoming:
        """Return the request with the messages as the host passes them on."""
        return replace(self, body={**self.body, "messages": messages})

    @property
    def inner(self) -> str:
        """The approach that memory wraps: the caller's `approach`, or the next one in the model's name."""
        if self.options.approach not in (None, "auto"):
            return str(self.options.approach)
        after = [a for a in self.approaches if a != SLUG] if self.operation == "SINGLE" else []
        return after[0] if after else "none"

    @property
    def adds_to_query(self) -> bool:
        """Whether memory is followed by another approach in a pipeline, so that it does not answer itself."""
        return self.operation == "AND" and self.approaches[-1] != SLUG


def read_incoming(host: Any) -> Incoming | None:
    """Read Flask's current chat request, once; None if it is not for memory.

    Raises InvalidField for a bad `agent_memory` field or header, NotAllowed for a wrong secret in a header of ours, and
    RecursionError for a body that is nested too deeply.
    """
    if "agent_memory_incoming" not in flask.g:
        flask.g.agent_memory_incoming = _read(host, flask.request)
    incoming: Incoming | None = flask.g.agent_memory_incoming
    return incoming


def _read(host: Any, request: flask.Request) -> Incoming | None:
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        return None
    operation, approaches, model = _approaches(host, body)
    if SLUG not in approaches:
        return None
    options = parse_options(body.get(FIELD), dict(request.headers), now=time.time())
    known = ("none", "auto", *host.known_approaches, *host.plugin_approaches)
    if options.approach is not None and (options.approach not in known or options.approach == SLUG):
        raise InvalidField(f"{FIELD}.approach", f"{options.approach!r} is not an approach of this optillm")
    options = identified(options, body, dict(request.headers), maps=runtime().settings.identify_users)
    process = runtime()
    tenant = process.keyless_tenant
    try:
        caller = caller_of(request, host, process)
        refuse_foreign(request, host, process, caller, chat=True)
        tenant, options = caller.tenant, replace(options, reporter=caller.reporter)
    except NotAllowed as refused:
        if refused.code == "invalid_credential":
            raise
        logger.warning("agent_memory: a request is answered without memory: %s", refused)
        options = replace(options, mode="off", reuse=None, feedback=())
    size = request.content_length or len(request.get_data())  # a body in chunks has no length until it is read
    return Incoming(body, size, tenant, options, operation, approaches, model)


def _approaches(host: Any, body: Mapping[str, Any]) -> tuple[str, tuple[str, ...], str]:
    # The host parses the model's name in the same way, but passes plugins only a part of it.
    model = body.get("model", host.server_config["model"])
    approach = body.get("optillm_approach", host.server_config["approach"])
    messages = body.get("messages")
    if isinstance(messages, list) and b"<optillm_approach>" in flask.request.get_data():
        approach = host.parse_conversation(messages)[2] or approach
    if approach != "auto":
        model = f"{approach}-{model}"
    operation, approaches, model = host.parse_combined_approach(
        str(model), host.known_approaches, host.plugin_approaches
    )
    return operation, tuple(approaches), model


def narrowed(request: flask.Request, tenant: Tenant, *, takes: Sequence[str], scoped: bool) -> View:
    """Return what a request to our routes may see and change: its tenant's, narrowed to the parts of a scope it names.

    `takes` are the other names in the query that the route knows; a route that is not `scoped` concerns no scope. A
    name that would be ignored is refused, so that nobody is shown, or deletes, more than was meant.

    Raises InvalidField.
    """
    headers = {name.lower(): as_utf8(text) for name, text in request.headers.items()}
    values: dict[str, str] = {}
    for name in request.args:
        if len(request.args.getlist(name)) > 1:
            raise InvalidField(name, "is there more than once")
        if scoped and name in NARROWING:
            values[name] = request.args[name]
        elif name not in takes:
            raise InvalidField(name, "this route takes no such parameter")
    for header, value in headers.items():
        if not header.startswith(HEADER_PREFIX.lower()) or header in _SECRET_HEADERS:
            continue
        part = header.removeprefix(HEADER_PREFIX.lower()).replace("-", "_")
        if not scoped or part not in NARROWING:
            raise InvalidField(header, "this route does not heed this header")
        if values.setdefault(part, value) != value:
            raise InvalidField(part, "the header and the query name two different ones")
    maps = scoped and runtime().settings.identify_users
    options = identified(parse_options(values, now=time.time()), {}, dict(request.headers), maps=maps)
    return View(tenant, values.get("namespace"), options.user_id or None, values.get("agent_id"))
