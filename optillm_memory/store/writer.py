"""The writer: one thread, one connection, a bounded queue, and a commit for as many records as are waiting."""

from __future__ import annotations

import abc
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from optillm_memory.errors import AgentMemoryError, StoreTooNew, StoreUnavailable
from optillm_memory.records import ThreadStarter
from optillm_memory.store.announced import Announced
from optillm_memory.store.sqlite.connection import DatabaseError, IntegrityError, WritingConnection
from optillm_memory.store.threads import start_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[Any], Any]
GROUP = 1_024
_RETRIES = 5
_AGAIN_S, _LONGEST_S = 0.05, 0.4  # between attempts: longer each time
_CLOSING_S = 30.0
# What nobody waits for gives way to the response that it records, and gathers company for its commit.
_BEHIND_S = 0.02


class Sealing:
    """What goes along with every commit: this one does nothing, a seal sees the transaction begin and end."""

    def begin(self, db: WritingConnection) -> None:
        """See the transaction begin."""

    def mark(self) -> Any:
        """Return what `undo` needs to go back to here."""

    def undo(self, mark: Any) -> None:
        """Go back: what was written since was rolled back."""

    def end(self, db: WritingConnection) -> None:
        """See it end, before the commit."""

    def committed(self) -> None:
        """Take note that the commit is on disk."""


class _RefusedError(Exception):
    """An operation of a group was refused: the group is run again with each of them apart."""


class Writer(abc.ABC):
    """Runs operations on the writing connection, many in a shared, durable commit; one that is refused fails alone.

    An operation may be run again, so it does nothing but read and write the database. Its outcome is set only after
    the commit that holds it (`synchronous=FULL`).
    """

    def __init__(
        self,
        place: str,
        *,
        queue_size: int,
        within: Callable[[WritingConnection], Any] = lambda connection: connection,
        sealing: Sealing | None = None,
        start: ThreadStarter = start_thread,
    ) -> None:
        """Open the database; where that fails for now, each later operation tries again. `place` is its name.

        `within` makes what operations are given: one for all of a commit, so it may remember what it read and wrote.
        `sealing` goes along with every commit. `start` starts the thread that writes.
        """
        self.place = place
        self._sealing = sealing or Sealing()
        self._within = within
        self.lost = 0
        self.fault = ""
        # Not a Queue with a bound of its own: its lock is contended, and held while Python runs.
        self._queue: queue.SimpleQueue[tuple[Operation, Future[Any] | None] | None] = queue.SimpleQueue()
        self._queue_size = queue_size
        self._connection: WritingConnection | None = None
        self._closed = False
        self._awaited = threading.Event()  # somebody waits for what is in the queue
        self._retry_at = 0.0
        self._held = 0  # records taken from the queue that could not be written yet
        self._passes = False  # what the last attempt failed of
        self._at_work = threading.Lock()
        try:
            with self._passing():
                self._connect()
        except StoreTooNew:
            raise
        except StoreUnavailable as error:
            self._note(error)
        self._thread = start("agent-memory-writer", self._run)

    # -- what a database brings --------------------------------------------------------------------

    @abc.abstractmethod
    def _open(self) -> WritingConnection:
        """Return the connection that writes. Raises StoreUnavailable."""

    @abc.abstractmethod
    def _stands(self) -> bool:
        """Whether the connection still leads to where what is written should go; drops one that does not."""

    def _written(self) -> None:  # noqa: B027 - most databases have nothing to note
        """Take note that a commit went well."""

    def _tidy(self) -> None:  # noqa: B027 - nor to tidy
        """Do what is to be done now and then while the turn is still ours, and nobody waits for us."""

    def _will_pass(self, error: Exception) -> bool:
        """Whether what a commit failed of passes by itself: until then what nobody waits for is kept."""
        return isinstance(error, StoreUnavailable)

    def _failed(self, error: Exception) -> None:  # noqa: B027 - nor to repair
        """Do what is to be done after a commit that failed, so that the next one may not."""

    def _passing(self) -> AbstractContextManager[None]:
        """Wait for the turn among all that write to the database."""
        return nullcontext()

    # -- what is queued ----------------------------------------------------------------------------

    def submit(self, operation: Callable[[Any], T]) -> Future[T]:
        """Queue an operation whose result is awaited; raises StoreUnavailable when the queue is full or closed."""
        future: Future[T] = Future()
        self._put((operation, future))
        self._awaited.set()
        return future

    def post(self, operation: Operation) -> None:
        """Queue an operation that nobody waits for; one that finds no room is dropped and counted in `lost`."""
        try:
            self._put((operation, None))
        except StoreUnavailable:
            self.lost += 1

    def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until what was queued before is on disk."""
        self.submit(lambda _: None).result(timeout_s)

    def pause(self, timeout_s: float) -> bool:
        """Start no commit until `resume`; return whether none is under way any more."""
        return self._at_work.acquire(timeout=timeout_s)

    def resume(self) -> None:
        """Go on after a `pause` that succeeded."""
        self._at_work.release()

    def close(self) -> None:
        """Write what is queued, then close; nothing is taken after this."""
        if self._closed:
            return
        self._closed = True
        self._awaited.set()
        self._queue.put(None)
        self._thread.join(_CLOSING_S)  # should it hang: what waits there was never acknowledged

    def _put(self, item: tuple[Operation, Future[Any] | None]) -> None:
        if self._closed:
            raise StoreUnavailable("the memory is closed")
        if self._queue.qsize() + self._held >= self._queue_size:
            raise StoreUnavailable("too many records are waiting to be written; try again")
        self._queue.put(item)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            if first[1] is None and not self._closed and self._queue.qsize() < GROUP:
                self._awaited.wait(_BEHIND_S)
            self._awaited.clear()
            if self._write([first]):
                break
        if self._connection is not None:
            self._connection.close()

    def _write(self, batch: list[tuple[Operation, Future[Any] | None]]) -> bool:
        """Write these with what came meanwhile; return whether that was the last."""
        stop, failures = False, 0
        while batch:
            try:
                with self._passing(), self._at_work:
                    # Not before: what waited for its turn with us is in the same commit, and what is awaited gets its
                    # answer also while others are held.
                    stop = self._gather(batch, GROUP + self._held) or stop
                    batch = self._attempt(batch)
                    self._tidy()
            except Exception as error:  # noqa: BLE001 - should this thread end, all would wait for ever
                batch = self._refused(batch, error)
            self._held = len(batch)
            failures += not self._passes
            if self._closed or failures == _RETRIES:
                break
            if batch:
                time.sleep(min(_AGAIN_S * 2**failures, _LONGEST_S))
        self._held = 0
        self.lost += len(batch)
        return stop

    def _gather(self, batch: list[tuple[Operation, Future[Any] | None]], most: int) -> bool:
        while len(batch) < most:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return False
            if item is None:
                return True
            batch.append(item)
        return False

    def _attempt(self, batch: list[tuple[Operation, Future[Any] | None]]) -> list[tuple[Operation, Future[Any] | None]]:
        """Commit a group and settle what is awaited; return what is to be tried again."""
        try:
            results = self._commit(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is: should this thread end, all would wait for ever
            batch = self._refused(batch, error)
            self._failed(error)
            return batch
        self.fault, self._passes = "", False
        self._sealing.committed()
        self._written()
        for (_, future), result in zip(batch, results, strict=True):
            if future is None and isinstance(result, Exception):
                self.lost += 1
            _settle(future, result)
        return []

    def _refused(
        self, batch: list[tuple[Operation, Future[Any] | None]], error: Exception
    ) -> list[tuple[Operation, Future[Any] | None]]:
        """Refuse at once what is awaited, so that the caller can try again; return what is to be tried again.

        What nobody waits for gets a few more chances: a disk that is full now may have room in a moment.
        """
        self._note(error)
        self._passes = self._will_pass(error)
        fault = StoreUnavailable(f"cannot write {self.place}: {error}")
        for _, future in batch:
            if future is not None and not future.done():
                future.set_exception(fault)
        return [item for item in batch if item[1] is None]

    def _commit(self, batch: list[tuple[Operation, Future[Any] | None]]) -> list[Any]:
        if self._connection is None or not self._stands():
            self._connect()
        assert self._connection is not None
        # Savepoints cost a tenth of the time: they are for the rare group in which a record is refused.
        try:
            return _transact(self._connection, self._within, batch, self._sealing, apart=False)
        except _RefusedError:
            return _transact(self._connection, self._within, batch, self._sealing, apart=True)

    def _connect(self) -> None:
        if time.monotonic() < self._retry_at:
            raise StoreUnavailable(self.fault)
        try:
            self._connection = self._open()
        except StoreUnavailable:
            self._retry_at = time.monotonic() + 1.0
            raise

    def _note(self, error: Exception) -> None:
        if str(error) != self.fault:
            logger.error("agent_memory: %s", error)
        self.fault = str(error)


class ReadOnlyWriter:
    """Stands in for the writer of a store that was opened read-only: it has no connection, no queue and no thread."""

    lost = 0
    fault = ""

    def __init__(self, place: str) -> None:
        """Keep the name of the database."""
        self.place = place

    def submit(self, operation: Callable[[Any], T]) -> Future[T]:  # noqa: ARG002
        """Raise StoreUnavailable."""
        raise StoreUnavailable(f"{self.place} was opened read-only")

    def post(self, operation: Operation) -> None:
        """Drop an operation that nobody waits for."""

    def flush(self) -> None:
        """Return at once: nothing is queued."""

    def pause(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Return that no commit is under way."""
        return True

    def resume(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _transact(
    connection: WritingConnection,
    within: Callable[[WritingConnection], Any],
    batch: list[tuple[Operation, Future[Any] | None]],
    sealing: Sealing,
    *,
    apart: bool,
) -> list[Any]:
    """Run operations in one commit and return their results. Raises _RefusedError, with nothing done, for a bad one.

    Kept `apart`, one that is refused does not take the others with it: its error is its result.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        sealing.begin(connection)
        operations = [operation for operation, _ in batch]
        results = _run_apart(connection, within, operations, sealing) if apart else _run(connection, within, operations)
        with _refusing():
            connection.write_deferred()
            sealing.end(connection)
            connection.execute("COMMIT")
    except BaseException:
        connection.drop_deferred()
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return results


def _run(connection: WritingConnection, within: Callable[[Any], Any], operations: Sequence[Operation]) -> list[Any]:
    given = within(connection)
    if announced := [operation for operation in operations if isinstance(operation, Announced)]:
        given.read_ahead(announced)
    with _refusing():
        return [operation(given) for operation in operations]


def _run_apart(
    connection: WritingConnection, within: Callable[[Any], Any], operations: Sequence[Operation], sealing: Sealing
) -> list[Any]:
    results: list[Any] = []
    for operation in operations:
        connection.execute("SAVEPOINT operation")
        mark = sealing.mark()
        try:
            result = operation(within(connection))  # what it is given must not remember what is undone
            connection.execute("RELEASE operation")  # writes what was deferred
        except Exception as error:
            if _is_fault(error):
                raise
            connection.drop_deferred()
            connection.execute("ROLLBACK TO operation")
            connection.execute("RELEASE operation")
            sealing.undo(mark)
            result = error
            if not isinstance(error, AgentMemoryError):
                logger.exception("agent_memory: a record could not be written")
        results.append(result)
    return results


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise _RefusedError where what was to be written is at fault."""
    try:
        yield
    except Exception as error:
        if _is_fault(error):
            raise
        raise _RefusedError from error


def _is_fault(error: Exception) -> bool:
    """Whether an error is one of the database, not of what was to be written."""
    return isinstance(error, DatabaseError) and not isinstance(error, IntegrityError)


def fulfil(future: Future[T], work: Callable[[], T]) -> None:
    """Do some work, and give its result, or the error that it ended in, to whoever waits for it."""
    try:
        result = work()
    except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
        future.set_exception(error)
    else:
        future.set_result(result)


def _settle(future: Future[Any] | None, result: Any) -> None:
    if future is None:
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
