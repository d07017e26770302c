"""`kill -9` at random moments: a worker opens, answers, closes and opens again until it is killed, over and over."""

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

from benchmarks.acknowledged import Faults, check, damage, opened, request, tell
from optillm_memory.store.sqlite.migrations import migrations

LIVES = 20  # of one file, before the next begins
_SECOND_SCHEMA = "m002_steps_attempts_and_fixes"


class Nursery:
    """A process that imports once and forks a worker for each life: a fork before any thread is safe, and quick."""

    def __init__(self) -> None:
        """Start it."""
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def life(self, path: Path, name: str, after_s: float, said: Path) -> None:
        """Have a worker live on a file for so long; what it was acknowledged is in `said` then, a line each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(path), name, after_s, str(said)]) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "killed\n":
            raise RuntimeError(f"the worker of {name} ended by itself")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)  # ends with its input


def run(folder: Path, kills: int, *, seed: int, tick: Callable[[], object]) -> dict[str, Any]:
    """Kill a worker so many times, every few on a file of its own; return what was acknowledged and what is wrong."""
    moments = random.Random(seed)
    faults, acknowledged = Faults(), 0
    with Nursery() as nursery:
        for first in range(0, kills, LIVES):
            path, said = folder / f"killed-{first}.db", folder / f"said-{first}"
            said.touch()
            if first // LIVES % 2:
                _with_the_first_schema(path)
            for life in range(first, min(kills, first + LIVES)):
                # The start with its migrations takes little of a life's time, and has its share of the kills.
                longest = moments.choice((0.03, 0.4, 0.4))
                nursery.life(path, f"life {life}", moments.uniform(0, longest), said)
                faults += damage(path)
                tick()
            told = dict(line.split() for line in said.read_text().splitlines())
            faults += check(path, told)
            acknowledged += len(told)
    return {"kills": kills, "acknowledged": acknowledged, **vars(faults)}


def _with_the_first_schema(path: Path) -> None:
    db = Database(path)
    migrations.apply(db, stop_before=_SECOND_SCHEMA)
    db.close()


def _work(path: Path, name: str, said: Path) -> None:
    acknowledged = os.open(said, os.O_WRONLY | os.O_APPEND)
    number = 0
    for sitting in range(1, 1 << 40):
        with opened(path) as memory:
            for _ in range(sitting * 4):
                number += 1
                trace_id = request(memory, f"task {number} of {name}")
                os.write(acknowledged, f"{tell(memory, trace_id)} {trace_id}\n".encode())


def _serve() -> None:
    for line in sys.stdin:
        path, name, after_s, said = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                _work(Path(path), name, Path(said))
            finally:
                os._exit(1)
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)


if __name__ == "__main__":
    _serve()
