"""Client disconnects: the upstream stops working for a client that closed its connection before it had its answer."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optillm_memory.background.threads import start_thread

INTERVAL_S = 0.2
_IDLE_S = 10.0  # then the thread ends, and the next watch starts another
_SOCKETS = ("werkzeug.socket", "gunicorn.socket")
_WITHOUT_WAITING = getattr(socket, "MSG_DONTWAIT", 0)


class DisconnectWatcher:
    """Looks at the connections of waiting clients, on one thread, and calls what each of them asked to be called."""

    def __init__(self, quietly: Callable[[Callable[[], Any]], str]) -> None:
        """Watch nobody; the thread starts with the first watch. `quietly` calls something that may fail."""
        self._quietly = quietly
        self._watched: dict[int, tuple[Callable[[], bool], Callable[[], None]]] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_running = False

    @contextlib.contextmanager
    def watching(self, is_disconnected: Callable[[], bool] | None, cancel: Callable[[], None]) -> Iterator[None]:
        """Call `cancel` once, on the watching thread, where the client leaves within the `with` block."""
        if is_disconnected is None:
            yield
            return
        number = next(self._numbers)
        with self._changed:
            self._watched[number] = is_disconnected, cancel
            if not self._is_running:
                self._quietly(self._start)  # should there be no thread for it, nobody's answer depends on that
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:  # no look at a connection that the server closes now
                self._watched.pop(number, None)

    def _start(self) -> None:
        start_thread("agent-memory-disconnects", self._run)
        self._is_running = True

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watched and not self._changed.wait_for(lambda: self._watched, _IDLE_S):
                    self._is_running = False
                    return
                for number, (is_disconnected, cancel) in list(self._watched.items()):
                    self._quietly(lambda: self._look(number, is_disconnected, cancel))  # noqa: B023 -- called at once
            time.sleep(INTERVAL_S)

    def _look(self, number: int, is_disconnected: Callable[[], bool], cancel: Callable[[], None]) -> None:
        if is_disconnected():
            del self._watched[number]
            cancel()


class Client:
    """The connection of the client that a request came over, as far as the server shows it."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        """Look for it in a WSGI environment."""
        told = environ.get("waitress.client_disconnected")
        self._asks_server: Callable[[], Any] | None = told if callable(told) else None
        found = (environ.get(name) for name in _SOCKETS)
        self._socket = next((one for one in found if isinstance(one, socket.socket)), None)
        # It sends chunks to whoever asks by HTTP/1.1.
        self._is_werkzeug = _SOCKETS[0] in environ and environ.get("SERVER_PROTOCOL") == "HTTP/1.1"

    @property
    def is_disconnected(self) -> Callable[[], bool] | None:
        """A function that says whether the client has closed its connection; None where that cannot be seen."""
        if self._asks_server is not None:
            return lambda: bool(self._asks_server and self._asks_server())
        return self._has_closed if self._socket is not None and _WITHOUT_WAITING else None

    def break_off(self) -> None:
        """See to it that the client does not take half a streamed answer for a whole one.

        Werkzeug says `Connection: close`, after which Node's client, for one, takes any end of the connection for the
        end of the answer: it gets a chunk that is none. Other servers end a connection so that it is seen.
        """
        if self._socket is not None and self._is_werkzeug:
            with contextlib.suppress(OSError):
                self._socket.sendall(b"broken off\r\n")

    def _has_closed(self) -> bool:
        assert self._socket is not None
        try:
            # The plain socket's own method: below TLS, and without taking anything away.
            return not socket.socket.recv(self._socket, 1, socket.MSG_PEEK | _WITHOUT_WAITING)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
