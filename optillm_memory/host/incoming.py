"""A request as it came to the host: its caller, approach and options."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flask

from optillm_memory.conversation.options import FIELD, Options, identified, parse_options
from optillm_memory.errors import InvalidField
from optillm_memory.host.origin import foreign_origin, is_loopback
from optillm_memory.host.runtime import runtime
from optillm_memory.records import OPERATOR, Scope, Tenant

logger = logging.getLogger(__name__)

SLUG = "agent_memory"
ANONYMOUS = "anonymous"
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

    Raises InvalidField for a bad `agent_memory` field or header.
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
    if reason := refusal_of(request, host):
        logger.warning("agent_memory: a request is answered without memory: %s", reason)
        options = replace(options, mode="off", reuse=None, feedback=())
    size = request.content_length or len(request.get_data())  # a body in chunks has no length until it is read
    return Incoming(body, size, tenant_of(request), options, operation, approaches, model)


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


def tenant_of(request: flask.Request) -> str:
    """Return the caller's tenant."""
    scheme, *key = request.headers.get("Authorization", "").split(None, 1) or [""]
    return tenant_of_key(key[0].strip() if key and scheme.lower() == "bearer" else "")


def tenant_of_key(key: str) -> str:
    """Return the tenant of a key: a digest of it, never the key itself."""
    return f"key-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}" if key else ANONYMOUS


def refusal_of(request: flask.Request, host: Any) -> str | None:
    """Return why memory is kept from a caller; None where it is not. One with a key has a tenant of its own."""
    if tenant_of(request) != ANONYMOUS:
        return None
    return foreign_origin(request, str(host.server_config["host"]), runtime().settings.allowed_hosts)


def caller_of(request: flask.Request, host: Any) -> Tenant:
    """Return the tenant whose data a caller of our routes may see: its own, or all of them for the operator.

    The operator is a caller without a key, on this machine, of a host that listens on this machine only and has no
    key: that caller could read the file as well.
    """
    tenant = tenant_of(request)
    forwarded = request.headers.get("X-Forwarded-For") or request.headers.get("Forwarded")
    local = is_loopback(host.server_config["host"]) and is_loopback(request.remote_addr or "") and not forwarded
    if tenant == ANONYMOUS and local and not host.server_config["optillm_api_key"]:
        return OPERATOR
    return tenant


def scope_of(request: flask.Request, tenant: str) -> Scope:
    """Return the scope from the request's headers and query."""
    named = {k: request.args[k] for k in ("namespace", "user_id", "agent_id") if k in request.args}
    headers = dict(request.headers)
    options = parse_options(named, headers, now=time.time())
    options = identified(options, {}, headers, maps=runtime().settings.identify_users)
    return Scope(tenant, options.namespace, options.user_id, options.agent_id)
