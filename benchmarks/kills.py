"""`kill -9` at random moments, many times: a worker opens, answers and closes a memory again and again until killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlite_utils import Database
from typing_extensions import Self

from benchmarks.acknowledged import Faults, check, damage, opened, request, send_feedback
from optillm_memory.store.sqlite.migrations import migrations

LIVES = 20  # of one file, before the next begins
_LIFE_S, _FIRSTS, _POLL_S = 0.4, 3.0, 0.005
_SECOND_SCHEMA = "m002_steps_attempts_and_fixes"


class ForkServer:
    """A process that imports once and forks a worker for each life: before any thread a fork is safe, and fast."""

    def __init__(self) -> None:
        """Start it."""
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the process that forks the workers did not start"

    def life(self, path: Path, name: str, after_s: float | None, log: Path) -> None:
        """Let a worker use a file for so long (None: until the first acknowledgement); `log` gets a line for each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(path), name, after_s, str(log)]) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "killed\n":
            raise RuntimeError(f"the worker of {name} ended by itself")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)  # ends with its input


def run(folder: Path, kills: int, *, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """Kill a worker `kills` times, with a new file after every few; return the acknowledged feedback and the faults."""
    moments = random.Random(seed)
    faults, total = Faults(), 0
    with ForkServer() as server:
        # On a busy machine a life is longer, or none would get as far as an acknowledgement.
        longest_s = max(_LIFE_S, _FIRSTS * _first_s(server, folder))
        for first in range(0, kills, LIVES):
            path, log = folder / f"killed-{first}.db", folder / f"acknowledged-{first}"
            log.touch()
            if first // LIVES % 2:
                _with_the_first_schema(path)
            for life in range(first, min(kills, first + LIVES)):
                # The start with its migrations is short, and must get its share of the kills.
                part = moments.choice((0.075, 1.0, 1.0))
                server.life(path, f"life {life}", moments.uniform(0, part * longest_s), log)
                faults += damage(path)
                tick()
            acknowledged = dict(line.split() for line in log.read_text().splitlines())
            faults += check(path, acknowledged)
            total += len(acknowledged)
    return {"kills": kills, "acknowledged": total, **vars(faults)}


def _first_s(server: ForkServer, folder: Path) -> float:
    """Return the time from the start of a worker to its first acknowledgement."""
    log = folder / "first"
    log.touch()
    started = time.perf_counter()
    server.life(folder / "first.db", "the first life", None, log)
    return time.perf_counter() - started


def _with_the_first_schema(path: Path) -> None:
    db = Database(path)
    migrations.apply(db, stop_before=_SECOND_SCHEMA)
    db.close()


def _work(path: Path, name: str, log: Path) -> None:
    acknowledged = os.open(log, os.O_WRONLY | os.O_APPEND)
    number = 0
    for session in range(1, 1 << 40):
        with opened(path) as memory:
            for _ in range(session * 4):
                number += 1
                trace_id = request(memory, f"task {number} of {name}")
                os.write(acknowledged, f"{send_feedback(memory, trace_id)} {trace_id}\n".encode())


def _serve() -> None:
    print("ready", flush=True)  # everything is imported
    for line in sys.stdin:
        path, name, after_s, log = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                _work(Path(path), name, Path(log))
            finally:
                os._exit(1)
        if after_s is not None:
            time.sleep(after_s)
        while after_s is None and not Path(log).stat().st_size and not _ended(child):
            time.sleep(_POLL_S)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)


def _ended(child: int) -> bool:
    """Return whether a child has ended by itself; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


if __name__ == "__main__":
    _serve()
