"""Many processes with many threads write to one file for minutes: errors, losses, and the time of a write."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.acknowledged import check, opened, request, send_feedback
from optillm_memory.bench.report import quantile
from optillm_memory.memory import Memory

_BEACON = 8  # every eighth request of a process's first thread is a beacon, which the next process waits for
_POLL_S = 0.02


def run(
    folder: Path, *, processes: int, threads: int, seconds: float, tick: Callable[[], object]
) -> dict[str, Any]:  # fmt: skip
    """Let them answer and learn without a pause; return the errors, losses, duplicates, and the times in ms."""
    path = folder / "soak.db"
    command = [sys.executable, "-m", __name__, str(path), str(processes), str(threads), str(seconds)]
    children = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "a process of the soak did not start"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    reports = [json.loads(child.communicate()[0]) for child in children]
    tick()
    errors: Counter[str] = sum((Counter(r["errors"]) for r in reports), Counter())
    took = [ms for r in reports for ms in r["write_ms"]]
    acknowledged = {f: t for r in reports for f, t in r["acknowledged"]}
    seen = [
        1000 * (moment - reports[(n + 1) % processes]["beacons"][task])
        for n, r in enumerate(reports)
        for task, moment in r["seen"].items()
        if task in reports[(n + 1) % processes]["beacons"]
    ]
    faults = check(path, acknowledged)
    tick()
    return {
        "processes": processes, "threads": threads, "seconds": seconds,
        "writes_per_s": round(len(took) / seconds, 1), "errors": sum(errors.values()), "errors_by_name": dict(errors),
        "acknowledged": len(acknowledged), **vars(faults),
        **{f"write_{name}_ms": _ms(took, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))},
        **{f"seen_{name}_ms": _ms(seen, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))},
    }  # fmt: skip


def _ms(values: list[float], share: float) -> float | None:
    return round(quantile(values, share), 2) if values else None


class Worker:
    """One process of the soak: its threads and their results."""

    def __init__(self, path: Path, processes: int, number: int) -> None:
        """Open the memory."""
        self.memory: Memory = opened(path)
        self.number = number
        self.neighbour = (number + 1) % processes
        self.acknowledged: list[tuple[str, str]] = []
        self.write_ms: list[float] = []
        self.errors: Counter[str] = Counter()
        self.beacons: dict[str, float] = {}
        self.seen: dict[str, float] = {}
        self.ends = 0.0

    def answer(self, thread: int) -> None:
        """Answer request after request, with feedback on each."""
        number = 0
        while time.time() < self.ends:
            task = f"beacon p{self.number}t{thread}n{number}"
            try:
                trace_id = request(self.memory, task)
                started = time.perf_counter()
                self.acknowledged.append((send_feedback(self.memory, trace_id), trace_id))
                self.write_ms.append(1000 * (time.perf_counter() - started))
            except Exception as error:  # noqa: BLE001 - the soak looks for every error
                self.errors[f"{type(error).__name__}: {error}"] += 1
            if thread == 0 and number % _BEACON == 0:
                self.beacons[task] = time.time()
            number += 1

    def watch(self) -> None:
        """Recall the beacons of the next process until each is found."""
        number = 0
        while time.time() < self.ends:
            task = f"beacon p{self.neighbour}t0n{number}"
            try:
                hits = self.memory.recall(task, limit=1)
            except Exception as error:  # noqa: BLE001 - as above
                self.errors[f"{type(error).__name__}: {error}"] += 1
                hits = []
            if hits and hits[0].memory.task == task:
                self.seen[task] = time.time()
                number += _BEACON
            else:
                time.sleep(_POLL_S)

    def work(self, threads: int, seconds: float) -> dict[str, Any]:
        """Run all threads for so long; return their results."""
        self.ends = time.time() + seconds
        running = [threading.Thread(target=self.answer, args=(n,)) for n in range(threads)]
        running.append(threading.Thread(target=self.watch))
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        self.memory.close()
        if self.memory.store.lost:
            self.errors["records were lost"] += self.memory.store.lost
        return {name: getattr(self, name) for name in ("acknowledged", "write_ms", "errors", "beacons", "seen")}


def _main() -> None:
    path, processes, threads, seconds, number = sys.argv[1:]
    worker = Worker(Path(path), int(processes), int(number))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(worker.work(int(threads), float(seconds))))


if __name__ == "__main__":
    _main()
