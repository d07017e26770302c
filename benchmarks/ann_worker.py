"""A contestant of `benchmarks ann` in a process of its own: built, asked, changed and purged by calls over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ann_indexes import KINDS, Vectors, avx2_environment, found_in, mask_newer_than_avx2
from optillm_memory.bench.records import Records

NEAREST = 10
_OF_LIMIT = 0.002  # so much less than what the greatest effort finds is as good
Figures = dict[str, float]


class Worker:
    """A contestant in a process of its own; every method is called from the parent by its name."""

    def __init__(self, name: str, folder: Path, simd: str) -> None:
        """Load the contestant's library."""
        self._masked = simd == "all" or mask_newer_than_avx2(name, folder)
        self._folder = folder
        self._index = KINDS[name](folder)
        self._baseline = _memory_of(os.getpid())

    def masked(self) -> bool:
        """Whether the process is kept to the instructions that were asked for."""
        return self._masked

    def build(self, size: int, seed: int) -> Figures:
        """Build the index; what generating the vectors takes is taken off."""
        records = Records(size, seed)
        started, processor = time.perf_counter(), time.process_time()
        for _ in records.blocks():
            pass
        generating, generating_cpu = time.perf_counter() - started, time.process_time() - processor
        started, processor = time.perf_counter(), time.process_time()
        with _peak_of_private_memory() as peak:
            self._index.build(records)
        seconds = time.perf_counter() - started - generating
        size_on_disk = sum(path.stat().st_size for path in self._folder.iterdir())
        return {
            "build_s": seconds, "build_cpu_s": time.process_time() - processor - generating_cpu,
            "build_private_mb": peak[0] - self._baseline[1], "bytes_per_row": size_on_disk / size,
        }  # fmt: skip

    def open(self, query: Vectors, *, writable: bool) -> Figures:
        """Open the index and ask one question."""
        started = time.perf_counter()
        self._index.open(writable=writable)
        self._index.set_effort(self._index.efforts[0])
        opened = time.perf_counter()
        self._index.search(query, NEAREST)
        return {"open_s": opened - started, "first_ms": (time.perf_counter() - opened) * 1000}

    def tune(self, queries: Vectors, nearest: NDArray[np.int64], target: float) -> int:
        """Choose the least effort that finds the target's share, or nearly what the greatest finds where that is less.

        Rows of 8 bits have a limit, which more effort does not move.
        """
        efforts = self._index.efforts

        def recall(effort: int) -> float:
            self._index.set_effort(effort)
            return recall_of([self._index.search(query, NEAREST) for query in queries], nearest)

        low, high = 0, len(efforts) - 1
        target = min(target, recall(efforts[high]) - _OF_LIMIT)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if recall(efforts[middle]) >= target else (middle + 1, high)
        return efforts[low]

    def set_effort(self, effort: int) -> None:
        """Set what was chosen in another process."""
        self._index.set_effort(effort)

    def ask(self, queries: Vectors) -> tuple[list[float], list[list[int]]]:
        """Ask some questions one by one; return the milliseconds of each and what was found."""
        times, found = [], []
        for query in queries:
            started = time.perf_counter()
            found.append(self._index.search(query, NEAREST))
            times.append((time.perf_counter() - started) * 1000)
        return times, found

    def change(self, inserted: Vectors, deleted: NDArray[np.int64], first: int) -> Figures:
        """Insert and delete rows one by one, as requests do."""
        started = time.perf_counter()
        for number, vector in enumerate(inserted, first):
            self._index.insert(number, vector)
        between = time.perf_counter()
        for number in deleted.tolist():
            self._index.delete(number)
        ended = time.perf_counter()
        return {
            "insert_ms": (between - started) * 1000 / len(inserted),
            "delete_ms": (ended - between) * 1000 / len(deleted),
        }

    def stored(self, numbers: NDArray[np.int64], vectors: Vectors) -> list[bytes]:
        """Return the bytes by which rows would be recognised on disk."""
        return self._index.stored(numbers, vectors)

    def forget(self, patterns: Sequence[bytes]) -> Figures:
        """Put the deletions on disk, at first quickly and then for good; see each time whether the bytes are gone."""
        there = found_in(self._folder, patterns)
        started = time.perf_counter()
        self._index.save()
        save = time.perf_counter() - started
        left = found_in(self._folder, patterns)
        started, processor = time.perf_counter(), time.process_time()
        with _peak_of_private_memory() as peak:
            self._index.purge()
        purge, purge_cpu = time.perf_counter() - started, time.process_time() - processor
        return {
            "known_on_disk": there, "left_after_save": left, "left_after_purge": found_in(self._folder, patterns),
            "save_s": save, "purge_s": purge, "purge_cpu_s": purge_cpu,
            "purge_private_mb": peak[0] - self._baseline[1],
        }  # fmt: skip

    def memory(self) -> Figures:
        """Return what the index takes of memory, beyond what the process took without it."""
        now = _memory_of(os.getpid())
        return {"rss_mb": now[0] - self._baseline[0], "private_mb": now[1] - self._baseline[1]}


def _serve(connection: Connection, name: str, folder: Path, simd: str) -> None:
    worker = Worker(name, folder, simd)
    with contextlib.suppress(EOFError):
        while True:
            method, given, named = connection.recv()
            try:
                connection.send((getattr(worker, method)(*given, **named), None))
            except Exception as error:  # noqa: BLE001 - told to the parent, which goes on without this contestant
                connection.send((None, f"{type(error).__name__}: {error}"))


class Contestant:
    """The parent's end of a contestant's process."""

    def __init__(self, name: str, folder: Path, simd: str = "all") -> None:
        """Start the process, with the environment that masks instructions where that is asked for."""
        self.name = name
        # One question at a time is too little work for several threads of a BLAS: they would only wait for one another.
        variables = {"OPENBLAS_NUM_THREADS": "1", **(avx2_environment() if simd == "avx2" else {})}
        before = {key: os.environ.get(key) for key in variables}
        self._end, theirs = multiprocessing.get_context("spawn").Pipe()
        os.environ.update(variables)
        try:
            self._process = multiprocessing.get_context("spawn").Process(
                target=_serve, args=(theirs, name, folder, simd), daemon=True
            )
            self._process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        theirs.close()

    def do(self, method: str, *given: Any, **named: Any) -> Any:
        """Call a method there. Raises RuntimeError where it failed or the process ended."""
        try:
            self._end.send((method, given, named))
            found, fault = self._end.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.name}: the process ended: is there memory enough?") from error
        if fault:
            raise RuntimeError(f"{self.name}: {method}: {fault}")
        return found

    def close(self) -> None:
        """End the process."""
        self._end.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


@contextlib.contextmanager
def running(names: Sequence[str], folder: Path, simd: str = "all") -> Iterator[list[Contestant]]:
    """Start a process for each contestant, and end them all."""
    started: list[Contestant] = []
    try:
        for name in names:
            started.append(Contestant(name, folder / name, simd))  # noqa: PERF401 - each is closed if the next fails
        yield started
    finally:
        for contestant in started:
            contestant.close()


def recall_of(found: Sequence[Sequence[int]], nearest: NDArray[np.int64]) -> float:
    """Return the share of the true nearest that was found."""
    hits = sum(len(set(mine) & set(true.tolist())) for mine, true in zip(found, nearest, strict=True))
    return hits / nearest.size


def _memory_of(pid: int) -> tuple[float, float]:
    """Return the resident memory of a process, and how much of it is not of files, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)
              if name in ("VmRSS", "RssAnon")}  # fmt: skip
    return fields["VmRSS"], fields["RssAnon"]


@contextlib.contextmanager
def _peak_of_private_memory() -> Iterator[list[float]]:
    """Yield a list that holds at the end, in MB, the most memory that was not of files meanwhile."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], _memory_of(os.getpid())[1])
            if done.wait(0.02):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
