"""Threads: one exception, or one thread that cannot be started, stops nothing for good; all that runs is closed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import SCOPE, body, hashing_memory, lexical_memory, response, teach
from hosting import until
from numpy.typing import NDArray
from test_durability import passing, says_in

from optillm_memory import Memory, StoreUnavailable
from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.threads import close_in_order, start_thread
from optillm_memory.background.worker import BackgroundWorker, Closed
from optillm_memory.decide import gate_updater, policy_updater
from optillm_memory.decide.gate import Gate, Label
from optillm_memory.decide.gate_updater import Change, GateUpdater
from optillm_memory.decide.policy import LoggedChoice, Policy, Situation, Terms
from optillm_memory.decide.policy_updater import PolicyUpdater, Row
from optillm_memory.errors import EncoderUnavailable
from optillm_memory.host.failopen import FailOpen
from optillm_memory.learn.suggest import Calibrator, Example, FixBook
from optillm_memory.learn.suggester import Suggester
from optillm_memory.recall.encoder import HashingEncoder
from optillm_memory.recall.vectors.scope_index import Limits, ScopeIndex
from optillm_memory.records import Arm
from optillm_memory.store.postgres.search import HnswSearch
from optillm_memory.store.sqlite import connection
from optillm_memory.store.sqlite.connection import Readers
from optillm_memory.store.sqlite.turnstile import Turnstile

ARMS = (Arm("none@large", "none", "large"), Arm("none@small", "none", "small"))


def no_more_threads(_name: str, _work: Callable[[], None]) -> threading.Thread:
    """Fail as `Thread.start` does where the process may have no more threads."""
    raise RuntimeError("can't start new thread")


class Starter:
    """Starts threads and keeps them; the first so many cannot be started."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.started: list[threading.Thread] = []

    def __call__(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Start a thread, or fail."""
        if self.failures:
            self.failures -= 1
            return no_more_threads(name, work)
        self.started.append(start_thread(name, work))
        return self.started[-1]

    def join(self) -> None:
        """Wait for all that were started."""
        for thread in self.started:
            thread.join(20)
            assert not thread.is_alive()


def failing_once(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: BaseException) -> None:
    """Have a function fail the next time it is called, and work from then on."""
    works, errors = getattr(where, name), [error]

    def fails(*given: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return works(*given, **named)

    monkeypatch.setattr(where, name, fails)


# -- starting and closing --------------------------------------------------------------------------


def test_a_thread_has_its_name_and_logs_what_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    """No error of a thread is lost, and no thread keeps the process from ending."""

    def fails() -> None:
        raise ValueError("broken off")

    thread = start_thread("agent-memory-test", fails)
    thread.join(10)
    assert (thread.name, thread.daemon) == ("agent-memory-test", True)
    assert "agent-memory-test" in caplog.text
    assert "broken off" in caplog.text


def test_closing_goes_on_after_an_error() -> None:
    """Every step is taken, in order; the first error comes out."""
    taken: list[int] = []

    def step(number: int) -> None:
        taken.append(number)
        if number % 2:
            raise OSError(number)

    with pytest.raises(OSError, match="1"):
        close_in_order(*(lambda number=number: step(number) for number in range(5)))
    assert taken == list(range(5))
    close_in_order()


@pytest.mark.parametrize("part", ["_maintenance", "_shadow", "_retriever", "encoder"])
def test_a_memory_is_closed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A part that cannot be closed does not leave the others open, and above all not what is queued unwritten."""
    before = {thread for thread in threading.enumerate() if thread.name.startswith("agent-memory-")}
    memory = hashing_memory(tmp_path)
    turn = memory.begin(body("a task"))
    memory.finish(turn, response("an answer"))
    failing_once(monkeypatch, getattr(memory, part), "close", OSError("stuck"))
    with pytest.raises(OSError, match="stuck"):
        memory.close()
    with pytest.raises(StoreUnavailable):
        memory.probe()
    getattr(memory, part).close()
    assert until(lambda: not {t for t in threading.enumerate() if t.name.startswith("agent-memory-")} - before)
    with lexical_memory(tmp_path) as again:
        assert again.trace(turn.trace_id)["answer"] == "an answer"


# -- the worker ------------------------------------------------------------------------------------


def test_a_worker_goes_on_whatever_happens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An error, an exit, or a thread that cannot be started costs what was to be done, and nothing after it."""
    worker, done = BackgroundWorker("agent-memory-test"), threading.Event()
    failing_once(monkeypatch, threading, "Thread", RuntimeError("can't start new thread"))
    with pytest.raises(RuntimeError):
        worker.do(done.set)
    assert (worker.busy, done.is_set()) == (False, False)

    def raising(error: BaseException) -> None:
        raise error

    caplog.set_level(logging.CRITICAL)
    for error in (ValueError("no"), OSError("no"), Closed(), SystemExit()):
        worker.do(lambda error=error: raising(error))  # type: ignore[misc]
        assert worker.flush(10)
    worker.do(done.set)
    assert done.wait(10)
    assert worker.flush(10)
    worker.close()
    assert not worker.busy


def test_a_closed_worker_is_not_busy() -> None:
    """What was given up when it was closed is not waited for any more."""
    worker, begun = BackgroundWorker("agent-memory-test"), threading.Event()

    def work() -> None:
        begun.set()
        while True:
            worker.rest()
            time.sleep(0.01)

    worker.do(work)
    worker.do(work)
    assert begun.wait(10)
    assert (worker.busy, worker.remaining) == (True, 2)
    assert not worker.flush(0.01)
    worker.close()
    assert not worker.busy
    assert worker.flush(0)
    worker.do(work)
    assert not worker.busy


# -- the encoder -----------------------------------------------------------------------------------


class Exiting(HashingEncoder):
    """An encoder that ends the thread that asks for `the end`."""

    def encode(self, texts: Any) -> Any:
        """Encode, or leave."""
        if "the end" in texts:
            raise SystemExit
        return super().encode(texts)


def in_time(work: Callable[[], Any]) -> Any:
    """Return what is done within ten seconds; what takes longer hangs."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(10)
    assert done, "it hangs"
    return done[0]


def test_after_closing_there_is_no_encoder() -> None:
    """Whoever asks a closed encoder is told at once that there is none, also for what it had encoded for others."""
    service = EncoderService(HashingEncoder)
    assert service.wait(10) == "ready"
    service.close()
    assert in_time(lambda: [service.encode(["a text"])]) == [None]
    assert in_time(lambda: [service.vector("a text", 5)]) == [None]
    assert service.wait(1) == "closed"


class Slow(HashingEncoder):
    """Takes its time, as a model does that computes without the interpreter's lock."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of several texts, after a while."""
        time.sleep(0.2)
        return super().encode(texts)


def test_closing_waits_for_what_is_being_encoded() -> None:
    """No model computes after closing: the end of the process would be aborted by it."""
    service = EncoderService(Slow)
    assert service.wait(10) == "ready"
    pending = [service.ask(f"text {number}", 10) for number in range(3)]
    service.close()
    assert service._thread not in threading.enumerate()
    assert all(each.vector() is not None for each in pending)


def test_closing_while_it_loads_leaves_nobody_waiting() -> None:
    """An encoder that is ready only after it was closed is not used."""
    there = threading.Event()

    def load() -> HashingEncoder:
        assert there.wait(10)
        return HashingEncoder()

    service = EncoderService(load)
    service.close()
    there.set()
    assert service.settled.wait(10)
    assert service.wait(10) == "closed"
    assert in_time(lambda: [service.encode(["a text"])]) == [None]


def test_an_encoder_that_ends_its_thread_is_reported() -> None:
    """Whoever waits gets an error, and from then on recall goes by words."""
    service = EncoderService(Exiting)
    assert service.wait(10) == "ready"

    def ends() -> str:
        try:
            service.encode(["the end"])
        except (SystemExit, EncoderUnavailable) as error:
            return type(error).__name__
        return "nothing"

    assert in_time(ends) == "SystemExit"
    assert until(lambda: service.state == "failed")
    assert "ended" in service.reason
    assert in_time(lambda: [service.encode(["a text"])]) == [None]
    service.close()


# -- what learns -----------------------------------------------------------------------------------


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have few rows folded in the background, and what failed tried again at once."""
    monkeypatch.setattr(gate_updater, "_INLINE", 20)
    monkeypatch.setattr(policy_updater, "_INLINE", 20)
    monkeypatch.setattr(policy_updater, "_AGAIN_S", 0.0)


@pytest.mark.parametrize("fault", ["fold", "start"])
@pytest.mark.usefixtures("no_pause")
def test_a_gate_that_could_not_be_folded_is_folded_later(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """After an exception the next change has all labels folded: the gate is that of all labels again."""
    starter = Starter()
    updater = GateUpdater(starter)
    found = [Label(0.9, True, "p")] * 60
    changes = [Change(f"{number:04}", label, served=False) for number, label in enumerate(found)]
    updater.take(updater.since, 1, changes)
    found[7] = found[30] = replace(found[7], correct=False)
    if fault == "fold":
        failing_once(monkeypatch, gate_updater, "Gate", MemoryError("no room"))
        updater.take(updater.since, 2, [replace(changes[7], label=found[7])])
        starter.join()
    else:
        starter.failures = 1
        with pytest.raises(RuntimeError):
            updater.take(updater.since, 2, [replace(changes[7], label=found[7])])
    updater.take(updater.since, 3, [replace(changes[30], label=found[30])])
    starter.join()
    assert {n: b.rows for n, b in updater.gate.logs.items()} == {n: b.rows for n, b in Gate(found).logs.items()}


def rows(count: int, first: int = 0) -> list[Row]:
    """Return choices with their rewards."""
    return [
        Row(
            f"t{n:05}",
            LoggedChoice(ARMS[n % 2].name, {ARMS[n % 2].name: 1.0}, Situation(None, 0)),
            float(n % 2),
            1000,
            5.0,
        )
        for n in range(first, first + count)
    ]


@pytest.mark.parametrize("count", [10, 100], ids=["few", "many"])
@pytest.mark.parametrize("fault", ["fold", "start"])
@pytest.mark.usefixtures("no_pause")
def test_choices_that_could_not_be_folded_are_read_again(
    monkeypatch: pytest.MonkeyPatch, fault: str, count: int
) -> None:
    """After an exception the same rows are asked for again: the policy learns, and no row is lost."""
    starter = Starter(failures=int(fault == "start"))
    updater = PolicyUpdater(ARMS, Terms(), starter)
    if fault == "fold":
        failing_once(monkeypatch, Policy, "add", MemoryError("no room"))
    first = updater.since
    if count > 20 and fault == "fold":
        assert updater.take(first, 5, rows(count))
    elif count > 20 or fault == "fold":
        with pytest.raises((RuntimeError, MemoryError)):
            updater.take(first, 5, rows(count))
    starter.join()
    assert not updater.busy
    assert updater.since == first
    assert updater.take(first, 5, rows(count))
    starter.join()
    assert (updater.policy.count, updater.since) == (count, 5)
    whole = PolicyUpdater(ARMS, Terms(), starter)
    whole.take(whole.since, 5, rows(count))
    starter.join()
    assert updater.report() == whole.report()


def test_rows_that_cannot_be_folded_are_not_tried_at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a minute requests go by what was learned before."""
    updater = PolicyUpdater(ARMS, Terms(), start_thread)
    failing_once(monkeypatch, Policy, "add", MemoryError("no room"))
    with pytest.raises(MemoryError):
        updater.take(updater.since, 5, rows(3))
    assert updater.busy
    assert not updater.take(updater.since, 5, rows(3))
    assert updater.choose("t", Situation(None, 0), 0.5, {ARMS[0].name}, recorded=True).arm == ARMS[0]


@pytest.mark.parametrize("fault", ["learn", "fit", "start"])
def test_what_could_not_be_learned_is_learned_later(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """After an exception in the background the constants stand; a later request tries again."""
    monkeypatch.setattr("optillm_memory.learn.suggester._PAUSE_S", 0.0)
    examples = [Example(f"pip instal p{n}", "unknown command", f"pip install p{n}", 0.8) for n in range(40)]
    starter = Starter(failures=int(fault == "start"))
    suggester = Suggester(starter)

    def suggest(count: int) -> Any:
        return suggester.suggest("pip", examples[:count], "pip instal x", "unknown command", min_confidence=0.0)

    if fault == "start":
        with pytest.raises(RuntimeError):
            suggest(40)
    else:
        owner, name = (FixBook, "learn") if fault == "learn" else (Calibrator, "fitted")
        assert suggest(4) is not None
        failing_once(monkeypatch, owner, name, MemoryError("no room"))
        with contextlib.suppress(MemoryError):
            suggest(40)
    shelf = suggester._shelf("pip")
    for _ in range(30):
        starter.join()
        assert suggest(40) is not None
        starter.join()
        if shelf.fitted and not shelf.busy:
            break
    assert len(shelf.places) == shelf.fitted == 40
    assert not shelf.busy


def settled(memory: Memory) -> bool:
    """Wait until all is in the log."""
    memory.settle()
    return True


# -- shadow mode and the host ----------------------------------------------------------------------


def test_shadow_mode_goes_on_after_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request that cannot be considered costs its own label; the next one has its proposal in the log."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, "restart the nginx server", "systemctl restart nginx")
        memory.settle()
        for error in (ValueError("no"), SystemExit()):
            failing_once(monkeypatch, memory._reuse, "consider", error)
            memory.finish(memory.begin(body("restart the nginx server")), response("done"))
            in_time(lambda: settled(memory))
        turn = memory.begin(body("restart the nginx server"))
        memory.finish(turn, response("done"))
        in_time(lambda: settled(memory))
        assert memory.why(turn.trace_id)["proposal"]["reason"] == "shadow"


def test_a_request_goes_on_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without room for a thread answers without memory at once, and with it as soon as there is room."""
    fail_open = FailOpen(20)
    failing_once(monkeypatch, threading, "Thread", RuntimeError("can't start new thread"))
    started = time.monotonic()
    assert fail_open.call(lambda: 7) == (None, "RuntimeError")
    assert time.monotonic() - started < 10
    assert fail_open.call(lambda: 7) == (7, "")
    release = threading.Event()
    hangs = [threading.Thread(target=fail_open.call, args=(lambda: release.wait(10),)) for _ in range(3)]
    for thread in hangs:
        thread.start()
    failing_once(monkeypatch, threading, "Thread", RuntimeError("can't start new thread"))
    release.set()
    for thread in hangs:
        thread.join(10)
    assert fail_open.call(lambda: 8) == (8, "")


# -- recall and the store -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limits", "worker"), [(Limits(inline=1), "_loader"), (Limits(flat_rows=2), "_writer")])
def test_an_index_that_no_thread_could_load_is_loaded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: Limits, worker: str
) -> None:
    """A request that finds no thread for it goes without; after the next change all is loaded, or the file written."""
    monkeypatch.setattr("optillm_memory.recall.vectors.cache._PIECES", 1)
    with hashing_memory(tmp_path) as memory:
        for number in range(12):
            teach(memory, f"restart server number {number}", "done")
        assert until(lambda: memory.stats()["memories_without_vector"] == 0)
    with hashing_memory(tmp_path) as memory:
        indexes = memory._retriever._indexes
        indexes._limits = limits
        failing_once(monkeypatch, getattr(indexes, worker), "do", RuntimeError("can't start new thread"))
        with pytest.raises(RuntimeError):
            memory.recall("restart server number 3")
        teach(memory, "restart server number 12", "done")
        assert memory.recall("restart server number 3")
        assert until(lambda: not memory.busy)
        (cached,) = indexes._scopes.values()
        assert isinstance(cached.index, ScopeIndex)
        assert (len(cached.index), cached.loading, cached.writing) == (13, False, False)
        assert (cached.index.ivf is not None) == (worker == "_writer")


@pytest.mark.parametrize("part", ["_passing", "_tidy", "_written", "_failed"])
def test_the_writer_goes_on_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """What waits for its turn, tidies up or takes note may fail: what comes after it is written."""
    with lexical_memory(tmp_path) as memory:
        writer = memory.store._writer
        failing_once(monkeypatch, writer, part, RuntimeError("can't start new thread"))
        if part == "_failed":
            failing_once(monkeypatch, writer, "_commit", RuntimeError("no room"))
        started = time.monotonic()
        with contextlib.suppress(StoreUnavailable):
            memory.probe(20)
        memory.probe(20)
        assert time.monotonic() - started < 15
        turn = memory.begin(body("a task"))
        memory.finish(turn, response("an answer"))
        memory.store.flush()
        assert memory.trace(turn.trace_id)["answer"] == "an answer"


def test_a_turnstile_without_a_thread_lets_through(tmp_path: Path) -> None:
    """Where no thread can be started to wait, there is no order this time; there is one again the next time."""
    turnstile = Turnstile(tmp_path / "turnstile", Starter(failures=1))
    other = passing(tmp_path / "turnstile")
    assert says_in(other)
    assert not turnstile._enter()
    other.communicate("on\n")
    assert turnstile._enter()
    turnstile.close()


def test_a_reader_that_cannot_be_opened_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keeps a connection from being opened or closed, the writer can have the file to itself afterwards."""
    lexical_memory(tmp_path).close()
    readers = Readers(tmp_path / "memory.db")
    failing_once(monkeypatch, connection, "connect", OSError("too many files"))
    with pytest.raises(OSError, match="too many"), readers.borrow():
        pass
    with readers.away():
        pass
    with readers.borrow() as db:
        assert db.execute("SELECT count(*) FROM traces").fetchone() == (0,)
    readers.close()


class NoIndex:
    """A server's connections, on which no index is found."""

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Any]:
        """Lend a connection."""
        yield self

    def execute(self, *_given: Any) -> Any:
        """Find nothing."""
        return self

    def fetchone(self) -> None:
        """Return no row."""

    def close(self) -> None:
        """Do nothing."""


def test_an_index_that_no_thread_could_build_is_built_later() -> None:
    """On a server, too, the next request has the index of vectors built."""
    started: list[str] = []

    def start(name: str, work: Callable[[], None]) -> threading.Thread:
        started.append(name)
        return no_more_threads(name, work) if len(started) == 1 else threading.Thread()

    readers: Any = NoIndex()
    search = HnswSearch("postgresql://nowhere", readers, start)
    vector = HashingEncoder().encode(["a text"])[0]
    with pytest.raises(RuntimeError):
        search.nearest(SCOPE, "encoder", vector, 3)
    for _ in range(3):
        assert search.nearest(SCOPE, "encoder", vector, 3) == []
    assert started == ["agent-memory-hnsw"] * 2
