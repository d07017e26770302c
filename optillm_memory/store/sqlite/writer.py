"""The writer of a SQLite file: what it does when the file is not what it was."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from optillm_memory.errors import StoreUnavailable
from optillm_memory.records import ThreadStarter
from optillm_memory.store.sqlite.connection import (
    WAL_BYTES,
    Connection,
    DatabaseError,
    Identity,
    OperationalError,
    WritingConnection,
    checkpoint,
    identity,
    is_corruption,
    leave,
    open_writer,
    set_aside,
    wal_bytes,
)
from optillm_memory.store.sqlite.turnstile import Turnstile
from optillm_memory.store.threads import start_thread
from optillm_memory.store.writer import Sealing, Writer, fulfil

logger = logging.getLogger(__name__)

T = TypeVar("T")
# How long writing waits for readers that hold the WAL back: at first, and where it has a quarter more than its bound.
_READERS_S, _MORE_READERS_S = 0.02, 0.5
_REST = 4.0  # times as long as it waited, until it tries again
_HELD_BYTES = 4 * WAL_BYTES  # of a WAL that is held back: who operates it should know


class SqliteWriter(Writer):
    """Writes to one file; notices when it was removed, replaced or broken, and goes on with one that is whole."""

    def __init__(
        self,
        path: Path,
        *,
        queue_size: int,
        within: Callable[[Connection], Any] = lambda connection: connection,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
        sealing: Sealing | None = None,
        start: ThreadStarter = start_thread,
    ) -> None:
        """Open the file, making it where it is missing; `within` makes what operations are given.

        `alone` keeps all other connections of this process away while the file is opened. `start` starts threads.
        """
        self.path = path
        self._identity: Identity = identity(path)
        self._alone = alone
        self._vouched = False  # the file was checked throughout, and nothing was written since
        self._suspect = threading.Event()
        self._jobs: queue.SimpleQueue[tuple[Callable[[Connection], Any], Future[Any]]] = queue.SimpleQueue()
        self._checkpoint_at = 0.0
        self._held_back = False  # the WAL grew far beyond its bound, and that was logged
        self._turnstile = Turnstile(path.with_name(path.name + "-turnstile"), start)
        super().__init__(str(path), queue_size=queue_size, within=within, sealing=sealing, start=start)

    def distrust(self) -> None:
        """Check the file before the next commit: a reader found it broken, which our own cached pages may hide."""
        self._suspect.set()

    def look(self) -> None:
        """See soon whether the file is still what it was, as before every commit."""
        with suppress(StoreUnavailable):  # who has enough to do looks anyway
            self.submit(lambda _: None)

    def apart(self, job: Callable[[Connection], T]) -> Future[T]:
        """Run a job between two commits, outside of a transaction; raises StoreUnavailable when the queue is full."""
        done: Future[T] = Future()
        self._jobs.put((job, done))
        self.submit(lambda _: None)
        return done

    def close(self) -> None:
        """Write what is queued, then close; nothing is taken after this."""
        super().close()
        self._turnstile.close()
        while not self._jobs.empty():
            self._jobs.get_nowait()[1].set_exception(StoreUnavailable("the memory is closed"))

    def _passing(self) -> AbstractContextManager[None]:
        return self._turnstile.passing()

    def _open(self) -> WritingConnection:
        thorough = self._suspect.is_set()
        # They share the WAL's index with what is opened here: one of another file, or one that is only read.
        try:
            with self._alone():
                connection = open_writer(self.path, thorough=thorough)
        except OperationalError as error:
            raise StoreUnavailable(str(error)) from error
        present = identity(self.path)
        if self._identity[0] not in (None, present[0]):
            _renew(connection)
        self._identity = present
        self._suspect.clear()
        self._vouched = thorough
        return connection

    def _stands(self) -> bool:
        if self._suspect.is_set() or identity(self.path) != self._identity:
            self._leave()  # what goes there now would be lost
            return False
        return True

    def _leave(self) -> None:
        if self._connection is None:
            return
        if identity(self.path) == self._identity:
            self._connection.close()
        else:
            logger.error("agent_memory: %s was removed, replaced or parted from its WAL; it is opened again", self.path)
            leave(self._connection)
        self._connection = None

    def _written(self) -> None:
        self._vouched = False

    def _tidy(self) -> None:
        # With the turnstile still ours: while others write a checkpoint has no end.
        if self._connection is not None and (size := wal_bytes(self.path)) > WAL_BYTES:
            self._cut_off_wal(self._connection, size)
        while not self._jobs.empty():
            job, done = self._jobs.get_nowait()
            fulfil(done, partial(self._done, job))

    def _done(self, job: Callable[[Connection], T]) -> T:
        if self._connection is None:
            raise StoreUnavailable(self.fault)
        return job(self._connection)

    def _cut_off_wal(self, connection: Connection, size: int) -> None:
        if time.monotonic() < self._checkpoint_at:
            return
        wait_s = _READERS_S if size < WAL_BYTES + WAL_BYTES // 4 else _MORE_READERS_S
        if checkpoint(connection, wait_s=wait_s):
            self._held_back = False
            return
        self._checkpoint_at = time.monotonic() + _REST * wait_s
        if size > _HELD_BYTES and not self._held_back:
            self._held_back = True
            logger.warning(
                "agent_memory: the WAL of %s has %d MB, for somebody has read the same state for long; "
                "it is cut off when that reader is done", self.path, size >> 20,
            )  # fmt: skip

    def _will_pass(self, error: Exception) -> bool:
        return "locked" in str(error)  # another process is at it, perhaps for minutes: it writes the file anew

    def _failed(self, error: Exception) -> None:
        if not is_corruption(error):
            return
        try:
            self._leave()
            if self._vouched:  # it was found whole, and still fails
                set_aside(self.path, self._identity, error)
            else:
                self._suspect.set()
        except (DatabaseError, OSError) as refused:
            self._note(refused)


def _renew(connection: Connection) -> None:
    """Give a file that took another's place a generation of its own.

    It may be an older copy of it: with the same generation, what was read of the other would be taken for what it says.
    """
    try:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'generation'", (secrets.randbits(32),))
    except BaseException:
        connection.close()
        raise
