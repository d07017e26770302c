"""PostgreSQL connections with the interface of SQLite's: the store's statements are written once, for both."""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from optillm_memory.errors import StoreError, StoreUnavailable
from optillm_memory.settings import without_password
from optillm_memory.store.deferred import Deferring
from optillm_memory.store.postgres.values import adapt
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
# An insert of many rows takes as many statements of these sizes as it needs: few enough to be prepared each. Those of
# wide rows, which may be long ones, take fewer.
_ROWS, _MOST_VALUES = (256, 64, 16, 4, 1), 2_048
_MANY = 30  # values of a statement
_VALUES = re.compile(r"(INSERT INTO .+ VALUES )(\([^()]*\))([^()]*(?:\([^()]*\))?[^()]*)", re.DOTALL)


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
    """Return a statement of the store as PostgreSQL takes it.

    CROSS JOIN is there to keep SQLite's planner to an order; PostgreSQL has no such form with USING.
    """
    first, *others = sql.replace("CROSS JOIN", "JOIN").split("?")
    return first + "".join(f"${number}{part}" for number, part in enumerate(others, 1))


@lru_cache(maxsize=1024)
def of_many(sql: str, count: int) -> str | None:
    """Return an insert of one row as the insert of `count` rows on PostgreSQL; None where it has no such form."""
    parts = _VALUES.fullmatch(sql)
    return None if parts is None else translated(f"{parts[1]}{', '.join([parts[2]] * count)}{parts[3]}")


class PostgresConnection(Deferring):
    """The part of `sqlite3.Connection` that the store uses, on PostgreSQL; errors are those of the SQLite module.

    What was deferred is sent without waiting for the server, which works on it meanwhile (libpq's pipeline mode); the
    next statement waits for all of it, and raises what it failed of.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Connect. Raises OperationalError."""
        super().__init__()
        self._pipeline = contextlib.ExitStack()
        self._settings: dict[str, str] = {}
        psycopg = driver()
        with _mapped(psycopg):
            own = psycopg.conninfo.conninfo_to_dict(url)
            watch = {name: value for name, value in _WATCH_SERVER.items() if name not in own}
            self._raw: Any = psycopg.connect(url, autocommit=True, connect_timeout=_CONNECT_S, **watch)
            self._raw.cursor_factory = psycopg.RawCursor  # which takes a statement as it is
            self._raw.execute(f"SET search_path = {SCHEMA}, public")
            if read_only:
                self._raw.execute("SET default_transaction_read_only = on")
                self._raw.execute(f"SET statement_timeout = {_STATEMENT_MS}")
        self._psycopg = psycopg
        self._pipelines = psycopg.Pipeline.is_supported()  # by libpq 14
        adapt(psycopg, self._raw)
        if not read_only:  # one that only reads holds nothing up
            for name, value in _WATCH_CLIENT.items():
                self.try_set(name, value)

    def try_set(self, name: str, value: str) -> None:
        """Change a setting of the session; a server that does not know it, or forbids it, does without."""
        with contextlib.suppress(self._psycopg.Error):
            self._raw.execute(f"SET {name} = '{value}'")

    def use(self, settings: Mapping[str, str]) -> None:
        """Change settings of the session, unless they are so already."""
        for name, value in settings.items():
            if self._settings.get(name) != value:
                self.execute("SELECT set_config(?, ?, FALSE)", (name, value))
                self._settings[name] = value

    def execute(self, sql: str, values: Sequence[Any] = (), *, planned_anew: bool = False) -> Any:
        """Run one statement; return its cursor. `planned_anew` has the server plan it for these very values."""
        self.write_deferred()
        with self._sending():
            if sql == "BEGIN IMMEDIATE":
                self._raw.execute("BEGIN")
                sql, values = "SELECT pg_advisory_xact_lock(?)", (WRITERS_LOCK,)
            # Left alone, psycopg prepares what comes again, and the server goes over to one plan for all values. One
            # for many keys, made while the tables were small, would scan them for ever.
            prepare = False if planned_anew or len(values) > _MANY else None
            cursor = self._raw.execute(translated(sql), tuple(values), prepare=prepare, binary=True)
            self._pipeline.close()
            return cursor

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row."""
        self.write_deferred()
        self._insert(sql, list(rows))
        with self._sending():
            self._pipeline.close()

    def _insert(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        with self._sending():
            done = 0
            while done < len(rows):
                if self._pipelines and self._raw.pgconn.pipeline_status == 0:
                    self._pipeline.enter_context(self._raw.pipeline())
                most = min(len(rows) - done, max(1, _MOST_VALUES // len(rows[done])))
                count = next(size for size in _ROWS if size <= most)
                if (many := of_many(sql, count)) is None:
                    many, count = translated(sql), 1
                values = [value for row in rows[done : done + count] for value in row]
                self._raw.execute(many, values)
                done += count

    def drop_deferred(self) -> None:
        """Forget what was deferred, and what became of what was sent: its transaction is undone."""
        super().drop_deferred()
        with contextlib.suppress(self._psycopg.Error):
            self._pipeline.close()

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """Map what a statement fails of; what was sent before it is done with then, too."""
        try:
            with _mapped(self._psycopg):
                yield
        except BaseException:
            with contextlib.suppress(self._psycopg.Error):
                self._pipeline.close()
            raise

    def stream(self, sql: str) -> Iterator[Any]:
        """Yield the rows of a statement as they come, inside a transaction: they need not fit into memory."""
        with _mapped(self._psycopg), self._raw.cursor(name="rows", binary=True) as cursor:
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
