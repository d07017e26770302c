"""PostgreSQL connections with the interface of SQLite's: the store's statements are written once, for both."""

from __future__ import annotations

import contextlib
import importlib
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from optillm_memory.errors import StoreError, StoreUnavailable
from optillm_memory.settings import without_password
from optillm_memory.store.sqlite import connection as sqlite

SCHEMA = "agent_memory"
# One lock for all that write, of any number of proxies: the fold then reads and writes as if it were alone.
WRITERS_LOCK = 0x6F70746D656D
_CONNECT_S, _STATEMENT_MS, _POOL = 5, 10_000, 8
_PATIENCE_S = 2.0  # for a connection that reads
# A lost connection (power loss, a network that is cut) is noticed within half a minute, on both sides: by default we
# would wait for a quarter of an hour, and the server would keep the lock of a lost writer for two hours.
_WATCH_SERVER = {
    "keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}  # fmt: skip
_WATCH_CLIENT = {
    "tcp_keepalives_idle": "10s", "tcp_keepalives_interval": "5s", "tcp_keepalives_count": "3",
    "tcp_user_timeout": "15s",
}  # fmt: skip
# PostgreSQL's texts have no place for NUL: it is written with an escape that is escaped itself.
_ESCAPE = "\ue000"
_ESCAPED = _ESCAPE.encode()


def driver() -> Any:
    """Return psycopg. Raises StoreUnavailable where it is not installed."""
    try:
        return importlib.import_module("psycopg")
    except ImportError as error:
        raise StoreUnavailable(
            "a postgresql:// database needs psycopg; run: pip install 'optillm-memory[postgres]'"
        ) from error


@lru_cache(maxsize=1024)
def translated(sql: str) -> str:
    """Return a statement of the store as psycopg takes it.

    CROSS JOIN is there to keep SQLite's planner to an order; PostgreSQL has no such form with USING.
    """
    return sql.replace("%", "%%").replace("?", "%s").replace("CROSS JOIN", "JOIN")


class PostgresConnection:
    """The part of `sqlite3.Connection` that the store uses, on PostgreSQL; errors are those of the SQLite module."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Connect. Raises OperationalError."""
        psycopg = driver()
        with _mapped(psycopg):
            own = psycopg.conninfo.conninfo_to_dict(url)
            watch = {name: value for name, value in _WATCH_SERVER.items() if name not in own}
            self._raw: Any = psycopg.connect(url, autocommit=True, connect_timeout=_CONNECT_S, **watch)
            self._raw.execute(f"SET search_path = {SCHEMA}, public")
            if read_only:
                self._raw.execute("SET default_transaction_read_only = on")
                self._raw.execute(f"SET statement_timeout = {_STATEMENT_MS}")
        self._psycopg = psycopg
        _adapt(psycopg, self._raw)
        if not read_only:  # one that only reads holds nothing up
            for name, value in _WATCH_CLIENT.items():
                self.try_set(name, value)

    def try_set(self, name: str, value: str) -> None:
        """Change a setting of the session; a server that does not know it, or forbids it, does without."""
        with contextlib.suppress(self._psycopg.Error):
            self._raw.execute(f"SET {name} = '{value}'")

    def execute(self, sql: str, values: Sequence[Any] = (), *, planned_anew: bool = False) -> Any:
        """Run one statement; return its cursor. `planned_anew` has the server plan it for these very values."""
        with _mapped(self._psycopg):
            if sql == "BEGIN IMMEDIATE":
                self._raw.execute("BEGIN")
                return self._raw.execute("SELECT pg_advisory_xact_lock(%s)", (WRITERS_LOCK,))
            # Left alone, psycopg prepares what comes again, and the server goes over to one plan for all values.
            return self._raw.execute(translated(sql), tuple(values), prepare=False if planned_anew else None)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row."""
        values = list(rows)
        if values:
            with _mapped(self._psycopg), self._raw.cursor() as cursor:
                cursor.executemany(translated(sql), values)

    def stream(self, sql: str) -> Iterator[Any]:
        """Yield the rows of a statement as they come, inside a transaction: they need not fit into memory."""
        with _mapped(self._psycopg), self._raw.cursor(name="rows") as cursor:
            cursor.itersize = 1_000
            yield from cursor.execute(translated(sql))

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return not self._raw.closed and self._raw.info.transaction_status.name != "IDLE"

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return bool(self._raw.closed)

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(Exception):
            self._raw.close()


class PostgresReaders:
    """A pool of connections that only read: any thread borrows one."""

    def __init__(self, url: str, size: int = _POOL) -> None:
        """Open connections as they are needed; at most `size` of them."""
        self._url = url
        self._idle: list[PostgresConnection] = []
        self._places = threading.BoundedSemaphore(size)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Any]:
        """Lend a connection; one that failed is closed, not lent again. Raises StoreError."""
        if not self._places.acquire(timeout=_PATIENCE_S):
            raise StoreError(
                f"cannot read {without_password(self._url)}: all connections have been busy for {_PATIENCE_S} s"
            )
        try:
            with self._lent() as connection:
                yield connection
        finally:
            self._places.release()

    @contextlib.contextmanager
    def _lent(self) -> Iterator[PostgresConnection]:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._open()
        try:
            yield connection
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite.DatabaseError):
                raise StoreError(f"cannot read {without_password(self._url)}: {error}") from error
            raise
        if not connection.closed:
            self._idle.append(connection)

    def _open(self) -> PostgresConnection:
        try:
            return PostgresConnection(self._url, read_only=True)
        except sqlite.DatabaseError as error:
            raise StoreError(f"cannot read {without_password(self._url)}: {error}") from error

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()


@contextlib.contextmanager
def _mapped(psycopg: Any) -> Iterator[None]:
    try:
        yield
    except (psycopg.IntegrityError, psycopg.DataError) as error:  # what is wrong with one record
        raise sqlite.IntegrityError(_first_line(error)) from error
    except psycopg.Error as error:
        raise sqlite.OperationalError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _adapt(psycopg: Any, connection: Any) -> None:
    """Convert values as SQLite does: numbers for booleans, exact sums, vectors as bytes, NUL in a text."""
    adapters, base = connection.adapters, psycopg.adapt

    class Untyped(base.Dumper):  # type: ignore[misc, name-defined]
        """A number without a type: the column it goes to has one, boolean or number."""

        oid = 0

        def dump(self, value: Any) -> bytes:
            return str(int(value)).encode()

        def quote(self, value: Any) -> bytes:
            return bytes(self.dump(value))

    class TextToServer(psycopg.types.string.StrDumperUnknown):  # type: ignore[misc]
        """A text to the server."""

        def dump(self, value: str) -> Any:
            if "\x00" in value or _ESCAPE in value:
                value = value.replace(_ESCAPE, _ESCAPE + "e").replace("\x00", _ESCAPE + "0")
            return super().dump(value)

    class TextFromServer(base.Loader):  # type: ignore[misc, name-defined]
        """A text from the server."""

        def load(self, data: Any) -> str:
            raw = bytes(data)
            if _ESCAPED in raw:
                raw = raw.replace(_ESCAPED + b"0", b"\x00").replace(_ESCAPED + b"e", _ESCAPED)
            return raw.decode()

    class Exact(base.Loader):  # type: ignore[misc, name-defined]
        """Sums of whole numbers are whole."""

        def load(self, data: Any) -> int | float:
            text = bytes(data).decode()
            return float(text) if "." in text else int(text)

    class Vector(base.Loader):  # type: ignore[misc, name-defined]
        """A vector as the bytes of its float32 numbers."""

        def load(self, data: Any) -> bytes:
            numbers = [float(part) for part in bytes(data).decode()[1:-1].split(",")]
            return struct.pack(f"<{len(numbers)}f", *numbers)

    for kind in (int, bool):
        adapters.register_dumper(kind, Untyped)
    adapters.register_dumper(str, TextToServer)
    adapters.register_loader("text", TextFromServer)
    adapters.register_loader("numeric", Exact)
    with contextlib.suppress(Exception):
        row = connection.execute("SELECT 'public.vector'::regtype::oid").fetchone()
        adapters.register_loader(int(row[0]), Vector)


def vector_text(vector: bytes) -> str:
    """Return a vector's float32 numbers as pgvector reads them, without loss."""
    return "[" + ",".join(f"{number:.9g}" for number in struct.unpack(f"<{len(vector) // 4}f", vector)) + "]"
