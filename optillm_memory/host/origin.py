"""Requests by pages of other sites, in a browser on this machine: they must not reach what its users may see.

A page may send requests to this machine from wherever it came: across sites, which the browser marks with
`Sec-Fetch-Site` and `Origin`, or under a name of its own that leads here (DNS rebinding), which is then its `Host`.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import flask

_FOREIGN = ("cross-site", "same-site")


def foreign_origin(request: flask.Request, listens_on: str, allowed_hosts: str) -> str | None:
    """Return why a request without a key is taken for that of another site's page; None where it is not.

    `listens_on` is the address that the host listens on; `allowed_hosts` are names, separated by commas, by which it is
    reached beside those of this machine.
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    own = _host_and_port(f"//{request.host}")
    # What the browser says of the page is sure; `Origin` is all that older ones say.
    if site.lower() in _FOREIGN if site else origin is not None and _host_and_port(origin) != own:
        return "a page of another site sent this request; send an API key with it"
    name = own[0]
    reached = {item.strip().lower() for item in allowed_hosts.split(",")}
    here = is_loopback(listens_on) and is_loopback(request.remote_addr or "")
    if here and not is_loopback(name) and name not in reached:
        return (
            f"{name!r} is no name of this machine; if it is one of this server, as behind a reverse proxy, add "
            "it to OPTILLM_AGENT_MEMORY_ALLOWED_HOSTS, or send an API key"
        )
    return None


def is_loopback(name: str) -> bool:
    """Whether a name or an address leads to this machine alone."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_and_port(url: str) -> tuple[str, int | None]:
    """Return the host and port of a URL; empty for an opaque origin (`null`) and for what is malformed."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None
