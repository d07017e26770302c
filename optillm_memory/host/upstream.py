"""The upstream of the direct lane: where the host's own client would call, over connections that are kept open."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

CONNECT_S, READ_S = 5.0, 600.0  # the openai package's own limits
# A proxy's connections are as many as its clients; one that is waited for would fail a request that the upstream takes.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=128, keepalive_expiry=60.0)
# What a caller's request says to the provider, not to this proxy.
_FORWARDED = ("openai-beta", "idempotency-key", "x-client-request-id", "traceparent", "tracestate")
_NOT_RETURNED = frozenset(
    (
        # of a connection
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "content-length", "content-encoding"),
        # of the server that this proxy is itself
        *("server", "date", "set-cookie", "alt-svc", "strict-transport-security"),
    )
)
# The last two are instructions to a web server in front of this proxy.
_NOT_RETURNED_PREFIXES = ("access-control-", "x-accel-", "x-sendfile")
_OWN_HEADERS = ("openai-organization", "openai-project")


class Upstream:
    """An OpenAI-compatible API, with a pool of connections that any thread may use."""

    def __init__(self, base_url: str, headers: Mapping[str, str], verify: Any) -> None:
        """Prepare the pool; `headers` are the server's own, `verify` is httpx's."""
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._headers = dict(headers)
        self._client = httpx.Client(
            verify=httpx.create_ssl_context(verify=verify),
            limits=_LIMITS,
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S, pool=None),
            follow_redirects=True,
            # What an upstream sets with one caller's answer must not go out with another's request.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        for transport in (self._client._transport, *self._client._mounts.values()):  # noqa: SLF001
            _track_streams(transport)

    @classmethod
    def of(cls, host: Any) -> Upstream | None:
        """Return the upstream of the host's own client, or None where that is no OpenAI one (Azure, LiteLLM, …)."""
        from openai import OpenAI  # noqa: PLC0415 -- the host's client loads it

        client, _ = host.get_config()
        if type(client) is not OpenAI:
            return None
        headers = {n: v for n, v in client.default_headers.items() if n.lower() in _OWN_HEADERS and isinstance(v, str)}
        headers["Authorization"] = f"Bearer {client.api_key}"
        config = host.server_config
        verify = bool(config.get("ssl_verify", True)) and (config.get("ssl_cert_path") or True)
        url = str(client.base_url)
        client.close()
        return cls(url, headers, verify)

    def request(
        self,
        body: bytes,
        key: str | None,
        caller: Mapping[str, str],
        *,
        timeout_s: float = READ_S,
        is_repeat: bool = False,
    ) -> httpx.Request:
        """Return the request that sends a body, with the caller's own key where there is one.

        `is_repeat` is a second one for the same request of the caller, whose `Idempotency-Key` it must not have.
        """
        forwarded = [n for n in _FORWARDED if not (is_repeat and n == "idempotency-key")]
        headers = {**self._headers, **{n: v for n, v in caller.items() if n.lower() in forwarded}}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        headers |= {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None)
        return self._client.build_request("POST", self._url, content=body, headers=headers, timeout=timeout)

    def send(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the response once its head is there. Raises httpx.HTTPError."""
        return self._client.send(request, stream=True)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


class HostUpstream:
    """The upstream that the host would ask; its configuration is known with the first request."""

    def __init__(self) -> None:
        """Make no connection."""
        self._found: Upstream | None = None
        self._is_known = False
        self._lock = threading.Lock()

    def of(self, host: Any) -> Upstream | None:
        """Return the upstream of the host's own client, or None where that is no OpenAI one."""
        with self._lock:
            if not self._is_known:
                self._is_known = True  # a host whose client cannot be made now is not asked with every request
                self._found = Upstream.of(host)
            return self._found

    def close(self) -> None:
        """Close its connections."""
        if self._found is not None:
            self._found.close()


def returned_headers(response: httpx.Response) -> list[tuple[str, str]]:
    """Return an upstream's headers as they go to the client.

    Without those of this connection and of its server, and without leave for the pages of other sites: with an upstream
    that lets any page read its answers, this proxy's own key would be at their service.
    """
    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in response.headers.raw]  # as WSGI has them
    return [
        (n, v)
        for n, v in headers
        if n.lower() not in _NOT_RETURNED and not n.lower().startswith(_NOT_RETURNED_PREFIXES)
    ]


class Cancellation:
    """Breaks off what one request does with an upstream, from another thread."""

    def __init__(self) -> None:
        """Nothing is broken off."""
        self.is_cancelled = False
        self._stream: _TrackedStream | None = None

    @contextlib.contextmanager
    def tracking(self) -> Iterator[None]:
        """Cover the calls that this thread makes within the `with` block."""
        before = getattr(_current, "cancellation", None)
        _current.cancellation = self
        try:
            yield
        finally:
            _current.cancellation = before

    def note(self, stream: _TrackedStream) -> None:
        """Note the connection that is used now; it is closed where this was hung up before. The caller has the lock."""
        self._stream = stream
        if self.is_cancelled:
            stream.shut_down()

    def release(self) -> None:
        """Leave the connection alone from here on: the answer is there, and others may use it."""
        with _owner_lock:
            if self._stream is not None and self._stream.owner is self:
                self._stream.owner = None  # a further call of this request notes it again
            self._stream = None

    def __call__(self) -> None:
        """Close the connection under the call: whoever waits for the upstream gets an error."""
        with _owner_lock:
            self.is_cancelled = True
            if self._stream is not None and self._stream.owner is self:
                self._stream.shut_down()


_current = threading.local()
_owner_lock = threading.Lock()  # a connection is one request's at a time, and is not closed under the next one


def _track_streams(transport: Any) -> None:
    # httpx hands out a connection only once it has answered; to hang up on one that has not, its use is noted here.
    pool = getattr(transport, "_pool", None)
    if hasattr(pool, "_network_backend"):
        pool._network_backend = _TrackingBackend(pool._network_backend)  # type: ignore[union-attr]  # noqa: SLF001


class _TrackingBackend:
    """httpcore's way to connect, whose connections note which call uses them."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def connect_tcp(self, *args: Any, **given: Any) -> _TrackedStream:
        return _TrackedStream(self._real.connect_tcp(*args, **given))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _TrackedStream:
    """A connection of httpcore, of any kind, and whose request it carries."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.owner: Cancellation | None = None

    def write(self, *args: Any, **given: Any) -> None:
        cancellation: Cancellation | None = getattr(_current, "cancellation", None)
        if self.owner is not cancellation:
            with _owner_lock:
                self.owner = cancellation
                if cancellation is not None:
                    cancellation.note(self)
        self._real.write(*args, **given)

    def start_tls(self, *args: Any, **given: Any) -> _TrackedStream:
        return _TrackedStream(self._real.start_tls(*args, **given))

    def shut_down(self) -> None:
        connection = self._real.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError, TypeError):
            # The plain socket's own method: that of TLS would let another thread go on in the clear.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
