"""`bench store`: inserts and recalls per second, recall@10, space and startup of a filled store."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from optillm_memory.background.worker import BackgroundWorker
from optillm_memory.bench.postgres import temporary_memory
from optillm_memory.bench.records import FINGERPRINT, LARGE, SMALL, Operation, Record, Records, operations, scope_of
from optillm_memory.bench.report import quantile
from optillm_memory.bench.store_host import KEPT, measure, rss_mb
from optillm_memory.errors import StoreError, StoreUnavailable
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.relevance_floor import UNRELATED
from optillm_memory.recall.retriever import Retriever
from optillm_memory.recall.vectors.scope_index import Limits
from optillm_memory.records import Scope
from optillm_memory.settings import is_url
from optillm_memory.store.base import Store
from optillm_memory.store.opening import open_store

NEAREST, QUERIES, WARMUP = 10, 400, 20
ENCODER_S = 0.004  # an encoder's time for a short text on a fast machine
_CLIENTS, _SHARED = 8, 0.1  # concurrent clients, and the share of the records that they insert
_BATCH = 8_192
_INDEX_S = 3_600.0


def run(
    sizes: Sequence[int], *, place: str | None, writes_per_s: float, seed: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Return for each size the figures of a store, in its own file or on an empty server.

    A record is a trace with the feedback that makes it a verified exemplar, and its vector, ready-made. Each phase has
    its own process. Recall is what a request does besides encoding: words, vectors, ranking, reading, minus the
    4 ms in which an encoder works in parallel; one thread of the same process writes `writes_per_s` records a second.
    `startup_s` and `rss_mb` are those of recall alone in such a process, `host_…` those of a real optillm on the file.
    A server is left as it was. Raises StoreError if it already has a memory, or if it fails.
    """
    figures: dict[str, dict[str, float]] = {}
    for size in sizes:
        with (
            tempfile.TemporaryDirectory(prefix="optillm-memory-bench-") as folder,
            temporary_memory(place) if place else contextlib.nullcontext(),
        ):
            db = place or str(Path(folder) / "memory.db")
            found: dict[str, float] = {}
            for name, phase in (
                ("ingest", _ingest),
                ("index", _index),
                ("recall", partial(_recall, per_s=writes_per_s)),
            ):
                say(f"{size} records: {name}")
                found |= _in_own_process(phase, db, size, seed)
            if not place:
                found |= measure(Path(db), Records(size, seed), say)
            figures[str(size)] = {name: round(value, 4) for name, value in found.items()}
    return figures


def _in_own_process(phase: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(phase, *arguments).result()
        except BrokenProcessPool as error:
            raise StoreError("the measuring process was killed from outside: is there enough memory?") from error


# -- inserting -------------------------------------------------------------------------------------


def _ingest(db: str, size: int, seed: int) -> dict[str, float]:
    records, alone = iter(Records(size, seed)), size - int(size * _SHARED)
    seconds = together = 0.0
    with _opened(db) as store, ThreadPoolExecutor(_CLIENTS) as pool:
        for start in range(0, alone, _BATCH):
            part = [_made(r) for r in islice(records, min(_BATCH, alone - start))]  # making them is not measured
            seconds += _timed(store, partial(_put_all, store, part))
        for start in range(alone, size, _BATCH):
            part = [_made(r) for r in islice(records, min(_BATCH, size - start))]
            shares = [part[client::_CLIENTS] for client in range(_CLIENTS)]
            together += _timed(store, lambda shares=shares: list(pool.map(partial(_put_all, store), shares)))  # type: ignore[misc]
        if (held := store.stats()["traces"]) != size:  # a failed commit is noticed here
            raise StoreError(f"{size - held} of {size} records were lost: {store.fault}")
    return {"ingest_per_s": alone / seconds, "ingest_8_per_s": (size - alone) / together}


def _timed(store: Store, work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    store.write(lambda _: None).result()  # all of it is on disk
    return time.perf_counter() - started


def _made(record: Record, prefix: str = "bench") -> tuple[Operation, Operation]:
    return operations(record, KEPT[record.scope], prefix=prefix)


def _put_all(store: Store, made: Iterable[Sequence[Operation]]) -> None:
    for record in made:
        _put(store, record)


def _put(store: Store, record: Sequence[Operation]) -> None:
    """Insert one record; wait while the writer's queue is full."""
    for operation in record:
        while True:
            try:
                store.write(operation)
                break
            except StoreUnavailable:
                time.sleep(0.002)


# -- recall ----------------------------------------------------------------------------------------


def _index(db: str, size: int, seed: int) -> dict[str, float]:
    """Build the index of the large scope, as the first requests after so many records would."""
    query = Records(size, seed).queries(1)[0][1]
    started = time.perf_counter()
    with _opened(db) as store, _retriever(store) as retriever:
        quiet = 0
        while quiet < 5:  # checked a few times: one background job may start another
            _near(store, retriever, LARGE, query)
            # A server builds its own index, and finds nothing until it is complete.
            building = size > Limits().flat_rows and store.recall.nearest(KEPT[LARGE], FINGERPRINT, query, 1) == []
            quiet = 0 if retriever.busy or building else quiet + 1
            time.sleep(0.05)
            if time.perf_counter() - started > _INDEX_S:
                raise StoreError("the index was not built within an hour")
    return {"index_s": time.perf_counter() - started}


def _recall(db: str, size: int, seed: int, *, per_s: float) -> dict[str, float]:
    records = Records(size, seed)
    queries = records.queries(QUERIES + WARMUP)
    exact = {scope: _exact(records, scope, [vector for _, vector in queries[:QUERIES]]) for scope in (LARGE, SMALL)}
    os.sync()  # gigabytes were just written, and reads wait while the disk is busy with them
    before = rss_mb(os.getpid())
    figures: dict[str, float] = {}
    started = time.perf_counter()
    with _opened(db) as store, _retriever(store) as retriever:
        while not _hits(retriever, LARGE, *queries[-1]) and time.perf_counter() - started < 60:
            pass
        figures["startup_s"] = time.perf_counter() - started
        figures["bytes_per_trace"] = (store.size_bytes() + _index_bytes(db)) / size
        _hits(retriever, SMALL, *queries[-1])
        while retriever.busy:
            time.sleep(0.05)
        for scope, name in ((LARGE, ""), (SMALL, "scope_")):
            found = [_near(store, retriever, scope, vector) for _, vector in queries[:QUERIES]]
            figures[f"{name}recall_at_10"] = _share_found(store, scope, found, exact[scope])
        with _writing(store, size, seed, per_s):
            for scope, name in ((LARGE, ""), (SMALL, "scope_")):
                for text, vector in queries[QUERIES:]:
                    _hits(retriever, scope, text, vector)
                times = [_recall_ms(retriever, scope, *query) for query in queries[:QUERIES]]
                for share in (50, 95, 99):
                    figures[f"{name}recall_p{share}_ms"] = quantile(times, share / 100)
        figures["rss_mb"] = rss_mb(os.getpid()) - before
    return figures


def _recall_ms(retriever: Retriever, scope: Scope, text: str, vector: np.ndarray[Any, Any]) -> float:
    """Return the time of recall beyond the encoder, in ms: words are looked up while it works, as in a request."""
    started = time.perf_counter()
    moments = []

    def encoded() -> np.ndarray[Any, Any]:
        moments.append(late := max(0.0, time.perf_counter() - started - ENCODER_S))
        time.sleep(0.0 if late else max(0.0, started + ENCODER_S - time.perf_counter()))
        moments.append(time.perf_counter())  # it may have slept too long
        return vector

    _recalled(retriever, scope, text, encoded)
    return (time.perf_counter() - moments[1] + moments[0]) * 1000


def _hits(retriever: Retriever, scope: Scope, text: str, vector: np.ndarray[Any, Any]) -> list[Any]:
    return _recalled(retriever, scope, text, lambda: vector)


def _recalled(retriever: Retriever, scope: Scope, text: str, vector: Callable[[], Any]) -> list[Any]:
    return retriever.recall(KEPT[scope], text, vector, fingerprint=FINGERPRINT, episode_id="asking", limit=NEAREST)


def _near(store: Store, retriever: Retriever, scope: Scope, vector: np.ndarray[Any, Any]) -> list[int]:
    kept = KEPT[scope]
    found = retriever.near(
        kept, vector, store.recall.revision(kept), fingerprint=FINGERPRINT, unrelated=UNRELATED, count=NEAREST
    )
    return [number for number, _, _ in found]


def _exact(records: Records, scope: Scope, vectors: Sequence[np.ndarray[Any, Any]]) -> list[set[int]]:
    """Return for each vector the numbers of the records of a scope that are nearest, by exact search."""
    asked = np.stack(vectors)
    best = np.full((len(asked), NEAREST), -2.0, dtype=np.float32)
    numbers = np.full((len(asked), NEAREST), -1, dtype=np.int64)
    for start, block in records.blocks():
        rows = np.array([n for n in range(start, start + len(block)) if scope_of(n) == scope], dtype=np.int64)
        if not len(rows):
            continue
        scores = np.hstack([best, asked @ block[rows - start].T])
        named = np.hstack([numbers, np.broadcast_to(rows, (len(asked), len(rows)))])
        order = np.argpartition(-scores, NEAREST - 1, axis=1)[:, :NEAREST]
        best, numbers = np.take_along_axis(scores, order, 1), np.take_along_axis(named, order, 1)
    return [set(row.tolist()) - {-1} for row in numbers]


def _share_found(store: Store, scope: Scope, found: Iterable[list[int]], exact: Iterable[set[int]]) -> float:
    right = wanted = 0
    for numbers, expected in zip(found, exact, strict=True):
        tasks = {memory.task for memory in store.recall.memories(KEPT[scope], numbers).values()}
        right += len({int(task.rsplit(" ", 1)[1]) for task in tasks} & expected)
        wanted += len(expected)
    return right / wanted


@contextlib.contextmanager
def _writing(store: Store, size: int, seed: int, per_s: float) -> Iterator[None]:
    """Write further records during the measurement, at a steady rate."""
    done = threading.Event()
    fresh = Records(4_096, seed + 1)

    def write() -> None:
        due = time.perf_counter()
        for record in fresh:
            _put(store, _made(Record(size + record.number, record.scope, record.task, record.vector), "during"))
            due += 1 / per_s
            if done.wait(max(0.0, due - time.perf_counter())):
                return

    thread = threading.Thread(target=write, daemon=True)
    if per_s > 0:
        thread.start()
    yield
    done.set()
    if per_s > 0:
        thread.join()


# -- opening ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(db: str) -> Iterator[Store]:
    store = open_store(db, queue_size=4 * _BATCH, normal=normal_answer)
    if store.fault:
        raise StoreError(store.fault)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def _retriever(store: Store) -> Iterator[Retriever]:
    workers = BackgroundWorker("bench-loader"), BackgroundWorker("bench-writer")
    retriever = Retriever(store.recall, *workers, store.index_files())
    try:
        yield retriever
    finally:
        retriever.close()


def _index_bytes(db: str) -> int:
    if is_url(db):
        return 0  # it is in the database
    return sum(file.stat().st_size for file in Path(f"{db}.index").glob("*") if file.is_file())
