"""SQLite connections: which library, which journal, which rights; a broken file is set aside."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import secrets
import sqlite3 as stdlib_sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from optillm_memory.errors import StoreError, StoreTooNew, StoreUnavailable
from optillm_memory.store.deferred import Deferring
from optillm_memory.store.sqlite.library import sqlite3, wal_is_safe, words_are_secure

logger = logging.getLogger(__name__)

Connection: TypeAlias = stdlib_sqlite3.Connection  # the type; the object may be pysqlite3's twin of it
if TYPE_CHECKING:
    _Connection = stdlib_sqlite3.Connection
else:
    _Connection = sqlite3.Connection
DatabaseError: type[Exception] = sqlite3.DatabaseError
OperationalError: type[Exception] = sqlite3.OperationalError
IntegrityError: type[Exception] = sqlite3.IntegrityError
LATEST = "m011_provenance_validity_and_seal"  # the last of the numbered migrations
BUSY_TIMEOUT_S = 10.0
_AWAY_S, _REOPENED_S = 5.0, 0.1  # how long who opens a file again waits for those who read, and they for that
_TELL_S = 0.2
_LOOKED_AGAIN_S = 0.01  # while a file that cannot be read is perhaps being opened again
_CHECKED_BYTES = 64 << 20  # a check reads the whole file: a larger one would delay the start
WAL_BYTES = 14 << 20  # a larger WAL is copied into the file and cut off after the commit that made it so
WORDS_LEFT = "words_left"  # in `meta`: the full-text index may hold words of rows that were deleted
_WORDS_SECURE = "SELECT 1 FROM memories_fts_config WHERE k = 'secure-delete' AND v = 1"
_JOURNALS = ("-shm", "-wal", "-journal")
_CORRUPT = ("malformed", "not a database", "disk image", "file is encrypted")


def is_corruption(error: BaseException) -> bool:
    """Whether an error says that the file itself is broken, not that it is busy, full or read-only."""
    return isinstance(error, DatabaseError) and any(word in str(error).lower() for word in _CORRUPT)


def open_writer(path: Path, *, mend: bool = True, thorough: bool = False) -> WritingConnection:
    """Open the one connection that writes and checkpoints; create the file (0600) and bring its schema up.

    Raises StoreUnavailable where the file cannot be written and StoreTooNew where a later release wrote it. A
    corrupt file is renamed aside, reported in the log, and a fresh one started; not so without `mend`. A large
    file is checked throughout only when asked to be `thorough`.
    """
    before = identity(path)
    try:
        return _open_writer(path, thorough=thorough)
    except DatabaseError as error:
        if not is_corruption(error) or not mend:
            raise StoreUnavailable(f"cannot write {path}: {error}") from error
        try:
            set_aside(path, before, error)
            return _open_writer(path)
        except (DatabaseError, OSError) as again:
            raise StoreUnavailable(f"cannot write {path}: {again}") from again
    except OSError as error:
        raise StoreUnavailable(f"cannot write {path}: {error}") from error


def _open_writer(path: Path, *, thorough: bool = False) -> WritingConnection:
    _make(path)
    connection = cast("WritingConnection", connect(path, kind=WritingConnection))
    try:
        if not (current := is_current(connection)):
            refuse_newer(connection, path)
        # In a WAL the same as FULL; a rollback journal whose removal is not synced would undo what was acknowledged.
        connection.execute("PRAGMA synchronous=EXTRA")
        connection.execute("PRAGMA cache_size=-65536")  # KiB: what is found by a hash lies anywhere in a large file
        # Where an affected SQLite is all there is, a rollback journal keeps several processes safe.
        _set_journal(connection, "WAL" if wal_is_safe() else "DELETE")
        # The writer copies the WAL into the file itself, when what it wrote has been acknowledged.
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
        connection.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
        if thorough or path.stat().st_size <= _CHECKED_BYTES:
            _check(connection, thorough=thorough)
        if not current:
            _migrate(connection)
        _secure_words(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _make(path: Path) -> None:
    """Make the file (0600) where it is missing, so that it outlasts a power loss; or see that it may be written.

    A file that is there is not opened: to close it again would drop the locks of all our connections to it.
    """
    journals = [size for suffix in _JOURNALS if (size := _size(f"{path}{suffix}")) is not None]
    if (_size(path) is None and journals) or (_size(path) == 0 and _size(f"{path}-wal")):
        # SQLite would delete what may be all that is left of the old one, or take a new file for it.
        set_aside(path, identity(path), "it is gone or empty, its journal is there")
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None
        for suffix in _JOURNALS:  # made by a reader while the file was read-only, they are so too
            if not os.access(f"{path}{suffix}", os.W_OK):
                with contextlib.suppress(OSError):
                    Path(f"{path}{suffix}").chmod(0o600)
        return
    for folder in {path.parent, *(new.parent for new in missing)}:
        with contextlib.suppress(OSError):  # not every system opens folders
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)


def _size(path: Path | str) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def _set_journal(connection: Connection, mode: str) -> None:
    # SQLite does not wait by itself while another process changes the mode of a new file at the same time.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode={mode}").fetchall()
        except OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _check(connection: Connection, *, thorough: bool) -> None:
    # The quick check leaves out whether an index holds what its table does.
    found = connection.execute(f"PRAGMA {'integrity' if thorough else 'quick'}_check(1)").fetchone()
    if found != ("ok",):
        raise sqlite3.DatabaseError(f"database disk image is malformed: {found}")


def is_current(connection: Connection) -> bool:
    """Whether a file has had just the migrations that this release knows."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone():
        return False
    done = connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = 'optillm_memory'").fetchall()
    return len(done) == int(LATEST[1:4]) and (LATEST,) in done


def refuse_newer(connection: Connection, path: Path) -> None:
    """Raise StoreTooNew for a file that has had migrations which this release does not know."""
    from sqlite_utils import Database  # noqa: PLC0415

    from optillm_memory.store.sqlite.migrations import newer_than_us  # noqa: PLC0415

    if newer := newer_than_us(Database(connection)):
        raise StoreTooNew(
            f"{path} was written by a newer optillm-memory (it knows {newer[-1]}); upgrade the package, "
            "or name another file in OPTILLM_AGENT_MEMORY_DB"
        )


def _migrate(connection: Connection) -> None:
    from sqlite_utils import Database  # noqa: PLC0415

    from optillm_memory.store.sqlite.migrations import migrations  # noqa: PLC0415

    db = Database(connection)
    if migrations.pending(db):
        connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once: one migrates
        with db.atomic():
            new = not migrations.applied(db)
            migrations.apply(db)
            if new:  # what was read of a file that was here before must not be taken for what this one holds
                generation = (secrets.randbits(32),)
                connection.execute("UPDATE meta SET value = ? WHERE key = 'generation'", generation)
        connection.execute("COMMIT")


def _secure_words(connection: Connection) -> None:
    """Have the full-text index overwrite what is deleted in it; note whether it holds words of earlier deletions."""
    if not words_are_secure() or connection.execute(_WORDS_SECURE).fetchone():
        return
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"INSERT INTO meta SELECT '{WORDS_LEFT}', 1 FROM memories_fts_docsize LIMIT 1")
    connection.execute("INSERT INTO memories_fts(memories_fts, rank) VALUES ('secure-delete', 1)")
    connection.execute("COMMIT")


class WritingConnection(Deferring, _Connection):
    """The connection that writes."""

    def execute(self, sql: str, values: Any = ()) -> stdlib_sqlite3.Cursor:
        """Run one statement, after what was deferred; return its cursor."""
        if self._first or self._deferred:
            self.write_deferred()
        return super().execute(sql, values)

    def executemany(self, sql: str, rows: Any) -> stdlib_sqlite3.Cursor:
        """Run one statement for each row, after what was deferred."""
        if self._first or self._deferred:
            self.write_deferred()
        return super().executemany(sql, rows)


def connect(
    path: Path,
    *,
    read_only: bool = False,
    immutable: bool = False,
    create: bool = True,
    kind: type[Connection] | None = None,
) -> Connection:
    """Return a connection to a file, to write or to read: the one place where that is done.

    A file that is missing is made, unless it may not be `create`d. `immutable` asks SQLite to make no file beside it
    and to take no lock: only for a file that nobody writes.
    """
    mode = "ro" if read_only else "rwc" if create else "rw"
    uri = f"{path.absolute().as_uri()}?mode={mode}{'&immutable=1' if immutable else ''}"
    connection: Connection = sqlite3.connect(
        uri,
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        factory=kind or sqlite3.Connection,
        cached_statements=1024,  # all of ours: making a statement ready costs many times what running it does
    )
    connection.execute("PRAGMA foreign_keys=OFF")
    return connection


Identity: TypeAlias = tuple[tuple[int, int] | None, ...]


def identity(path: Path) -> Identity:
    """Return what tells a database, its WAL and the WAL's index from others that took their places."""
    return tuple(_inode(f"{path}{suffix}") for suffix in ("", "-wal", "-shm"))


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - every read asks: a Path takes longer than the call
    except OSError:
        return None
    return status.st_dev, status.st_ino


def set_aside(path: Path, broken: Identity, error: object) -> None:
    """Rename a broken database (and its journal files) so that nothing of it is lost, and say so in the log.

    Where another process has done so already, the file that took its place is left alone. The journals go first:
    whoever opens the file meanwhile makes its own.
    """
    if broken[0] not in (None, identity(path)[0]):
        return
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.corrupt-{stamp}-{os.getpid()}")
    for suffix in (*_JOURNALS, ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    logger.error("agent_memory: %s is broken (%s); kept as %s, a fresh one is started", path, error, aside.name)


def wal_bytes(path: Path) -> int:
    """Return the size of a file's WAL."""
    return _size(f"{path}-wal") or 0


def checkpoint(connection: Connection, *, wait_s: float) -> bool:
    """Copy what the WAL holds into the file and cut it off; return whether nothing of it is left.

    A reader of an earlier state holds part of it back: it is waited for, and who writes waits meanwhile.
    """
    try:
        # First what needs no lock: others go on writing and reading while it is copied.
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        connection.execute(f"PRAGMA busy_timeout={wait_s * 1000:.0f}")
        try:
            return not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000:.0f}")
    except DatabaseError as error:
        logger.warning("agent_memory: the WAL grows, for it cannot be copied into the database: %s", error)
        return False


def copy_wal(path: Path) -> None:
    """Copy what the WAL holds into the file, while others write and read; it begins anew where all of it is copied."""
    with contextlib.suppress(DatabaseError), contextlib.closing(connect(path, create=False)) as own:
        own.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()


def leave(connection: Connection) -> None:
    """Close a connection to a file that is not what it was: its WAL, perhaps out of sight, goes into the file first.

    Raises OperationalError while somebody reads from that WAL.
    """
    try:
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except DatabaseError as error:
        logger.warning("agent_memory: the WAL could not be copied, unless another process has done so: %s", error)
        busy = False
    if busy:
        raise OperationalError("the WAL was taken away, and what it holds cannot be written while it is read")
    connection.close()


class Readers:
    """A pool of read-only connections: any thread borrows one, none ever blocks the writer."""

    def __init__(self, path: Path, size: int = 16) -> None:
        """Open connections as they are needed; keep at most `size` of them."""
        self._path = path
        self.on_corruption: Callable[[], None] = lambda: None  # tells who mends that the file is broken
        self.on_change: Callable[[], None] = lambda: None  # that it is not what it was, or cannot be read
        self._seen: Identity = ()
        self._tell_at = 0.0
        self._idle: queue.LifoQueue[tuple[Connection, Identity]] = queue.LifoQueue(size)
        self._open_ones, self._shut = 0, False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Connection]:
        """Lend a connection; one that failed is closed, not lent again. Raises StoreError for a broken file."""
        present = identity(self._path)
        if present != self._seen and self._told():
            self._seen = present
        connection = self._idle_connection(present) or self._open()
        try:
            yield connection
        except BaseException as error:
            self._close(connection)
            if is_corruption(error):
                self.on_corruption()
            if isinstance(error, DatabaseError):
                self._told()
                raise StoreError(f"cannot read {self._path}: {error}") from error
            raise
        try:
            self._idle.put_nowait((connection, present))
        except queue.Full:
            self._close(connection)
        if self._shut:
            self.close()

    def _idle_connection(self, present: Identity) -> Connection | None:
        while True:
            try:
                connection, opened = self._idle.get_nowait()
            except queue.Empty:
                return None
            # While a WAL is merely gone, who has it open still reads it; the writer sees to the rest.
            if opened[0] == present[0] and all(
                now in (None, then) for then, now in zip(opened[1:], present[1:], strict=True)
            ):
                return connection
            self._close(connection)  # the file was replaced since

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Have all connections closed, and none opened meanwhile. Raises OperationalError where one is read from.

        All connections of a process to a file share what SQLite knows of its WAL. While one of them is open, what is
        opened beside it goes by the index of a WAL that may be gone, and two processes write over each other.
        """
        with self._changed:
            self._shut = True
        try:
            self.close()
            with self._changed:
                if not self._changed.wait_for(lambda: self._open_ones == 0, _AWAY_S):
                    raise OperationalError(f"{self._open_ones} connections still read from what {self._path} was")
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()

    @property
    def asked_back(self) -> bool:
        """Whether what is lent must come back: somebody waits for `away`."""
        return self._shut

    def _close(self, connection: Connection | None) -> None:
        try:
            if connection is not None:
                connection.close()
        finally:
            with self._changed:
                self._open_ones -= 1
                self._changed.notify_all()

    def _open(self) -> Connection:
        """Open a connection that reads; a WAL that was taken away is waited for."""
        deadline = time.monotonic() + _REOPENED_S
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._shut, max(0.0, deadline - time.monotonic())):
                    raise StoreError(f"cannot read {self._path}: it is being opened again")
                self._open_ones += 1
            connection: Connection | None = None
            try:
                connection = connect(self._path, read_only=True)
                connection.execute("PRAGMA query_only=ON")
                connection.execute("PRAGMA busy_timeout=200")
                connection.execute("PRAGMA schema_version").fetchone()  # the first to look at the file
            except BaseException as error:
                self._close(connection)
                if not isinstance(error, DatabaseError):
                    raise
                if corrupt := is_corruption(error):
                    self.on_corruption()
                self._told()
                if corrupt or time.monotonic() > deadline:
                    raise StoreError(f"cannot read {self._path}: {error}") from error
            else:
                return connection
            time.sleep(_LOOKED_AGAIN_S)

    def _told(self) -> bool:
        """Tell who writes to look at the file, now and then: where nothing can be read, perhaps nothing is written."""
        if (now := time.monotonic()) < self._tell_at:
            return False
        self._tell_at = now + _TELL_S
        self.on_change()
        return True

    def close(self) -> None:
        """Close what is idle."""
        while True:
            try:
                self._close(self._idle.get_nowait()[0])
            except queue.Empty:
                return


def marks(values: Sized) -> str:
    """Return the placeholders of so many values, for IN."""
    return ", ".join("?" * len(values)) or "NULL"


def objects(db: Connection, sql: str, values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return rows as objects by column name."""
    cursor = db.execute(sql, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
