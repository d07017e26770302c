"""Requests by pages of other sites, in somebody's browser: they must not reach what its user may see.

A page may send requests to a server that its user can reach: across sites, which the browser marks with
`Sec-Fetch-Site` and `Origin`, or under a name of its own that leads there (DNS rebinding), which is then the request's
`Host`. So that name must be one which nobody outside can have lead here.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from urllib.parse import urlsplit

import flask

_FOREIGN = ("cross-site", "same-site")
# Reserved: no such name can be registered. Containers reach the machine under them.
_PRIVATE = (".localhost", ".internal")


def foreign_origin(
    request: flask.Request, listens_on: str, allowed_hosts: str, *, any_name: bool = False
) -> str | None:
    """Return why a request is taken for that of another site's page; None where it is not.

    `listens_on` is the address that the host listens on; `allowed_hosts` are names, separated by commas, by which it is
    reached beside its own. With `any_name` a program may use any name of a server on the network: only pages are held
    to the known ones. Browsers name the page (`Origin`) in whatever they send but GET and HEAD.
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    own = _host_and_port(f"//{request.headers.get('Host', '')}")
    # What the browser says of the page is sure; `Origin` is all that older ones say.
    if site.lower() in _FOREIGN if site else origin is not None and _host_and_port(origin) != own:
        return "a page of another site sent this request"
    here = is_loopback(listens_on) and is_loopback(request.remote_addr or "")
    if any_name and not here and origin is None and site is None:
        return None
    name, reached = own[0], {item.strip().lower() for item in allowed_hosts.split(",") if item.strip()}
    if name in reached or _is_ours(name, here=here, listens_on=listens_on):
        return None
    return (
        f"{name!r} is not known as a name of this server; if it is one, as behind a reverse proxy, add it to "
        "OPTILLM_AGENT_MEMORY_ALLOWED_HOSTS, or send a key that this server knows"
    )


def is_loopback(name: str) -> bool:
    """Whether a name or an address leads to this machine alone."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_ours(name: str, *, here: bool, listens_on: str) -> bool:
    """Whether nobody outside can have a name lead to this server, as they could a domain of their own."""
    if is_loopback(name) or name.endswith(_PRIVATE) or name in (*_machine_names(), listens_on.lower()):
        return bool(name)
    # Of a server on the network: an address is nothing that DNS could change, a name without a dot the network's own.
    return not here and bool(name) and (_is_address(name) or "." not in name)


@functools.cache
def _machine_names() -> frozenset[str]:
    full = socket.gethostname().lower()
    short = full.partition(".")[0]
    return frozenset((full, short, f"{short}.local"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_and_port(url: str) -> tuple[str, int | None]:
    """Return the host and port of a URL; empty for an opaque origin (`null`) and for what is malformed."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None
