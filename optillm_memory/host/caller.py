"""Whose request it is, by the secrets that came with it: an address is no authority."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import flask

from optillm_memory.conversation.options import KEY_HEADER, OPERATOR_HEADER, REPORTER_HEADER
from optillm_memory.errors import NotAllowed
from optillm_memory.host.credentials import is_same
from optillm_memory.host.origin import foreign_origin
from optillm_memory.host.runtime import Runtime
from optillm_memory.records import OPERATING, OPERATOR, Tenant

SECRET_LENGTH = 16  # characters of a key that is no secret if it has fewer: optillm's own inference asks for "optillm"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: `tenant` has what it records; the operator sees all tenants' on our routes.

    `is_known`: it showed a secret that this server knows, so no page of another site can have sent it. A key that a
    caller chose itself is none: it names a tenant, and can be guessed.
    """

    tenant: str
    reporter: str = ""
    is_operator: bool = False
    is_known: bool = False

    @property
    def visible(self) -> Tenant:
        """The tenant whose data it may see; all of them for the operator."""
        return OPERATOR if self.is_operator else self.tenant


def caller_of(request: flask.Request, host: Any, process: Runtime) -> Caller:
    """Return who sent a request.

    The operator is a reporter of that name, unless a reporter's key came along.

    Raises NotAllowed for a wrong secret in a header of ours (`invalid_credential`) and for an `Authorization` that is
    no bearer key (`unreadable_authorization`): neither makes a lesser caller of who meant to be another.
    """
    operator, own_key, vouching = (request.headers.get(name) for name in (OPERATOR_HEADER, KEY_HEADER, REPORTER_HEADER))
    if operator is not None and not is_same(process.operator_key, operator.strip()):
        raise NotAllowed("invalid_credential", f"{OPERATOR_HEADER}: this is not the operator's secret")
    named = ""
    if own_key is not None and not (named := process.tenants.name_of(own_key.strip())):
        raise NotAllowed(
            "invalid_credential", f"{KEY_HEADER}: no tenant has this key in OPTILLM_AGENT_MEMORY_TENANTS_FILE"
        )
    reporter = OPERATING if operator is not None else ""
    if vouching is not None and not (reporter := process.reporters.name_of(vouching.strip())):
        raise NotAllowed(
            "invalid_credential", f"{REPORTER_HEADER}: no reporter has this key in OPTILLM_AGENT_MEMORY_REPORTERS_FILE"
        )
    key = bearer_key(request)
    # The host has compared the key before, if it requires one.
    of_server = len(host.server_config["optillm_api_key"] or "") >= SECRET_LENGTH
    known = bool(operator or named or vouching or of_server)
    if not named and key and (of_key := process.tenants.name_of(key)):
        named, known = of_key, True
    tenant = named or (tenant_of_key(key) if key else process.keyless_tenant)
    return Caller(tenant, reporter, is_operator=operator is not None, is_known=known)


def refuse_foreign(request: flask.Request, host: Any, process: Runtime, caller: Caller, *, chat: bool = False) -> None:
    """Refuse what a page of another site sent. Raises NotAllowed (`foreign_origin`).

    A chat request with a key of any kind is let through: a page cannot send one to another site unasked, and what a
    program sends is as it always was.
    """
    if caller.is_known or (chat and request.headers.get("Authorization")):
        return
    reason = foreign_origin(request, str(host.server_config["host"]), process.settings.allowed_hosts, any_name=chat)
    if reason is not None:
        raise NotAllowed("foreign_origin", reason)


def tenant_of_key(key: str) -> str:
    """Return the tenant of a key that has no name: a digest of it, never the key itself."""
    return f"key-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def bearer_key(request: flask.Request) -> str:
    """Return the bearer key; empty where there is no `Authorization`. Raises NotAllowed for any other one."""
    header = request.headers.get("Authorization")
    if header is None:
        return ""
    scheme, *key = header.split(None, 1) or [""]
    if scheme.lower() != "bearer" or not key or not key[0].strip():
        raise NotAllowed("unreadable_authorization", "Authorization: send `Bearer` and a key, or leave it out")
    return key[0].strip()
