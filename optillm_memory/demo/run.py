"""The demo's run: a small model, a real server, two sessions with a restart between them, and the ladder."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from optillm_memory.bench.stream import Result, Server, run, wait_for_encoder
from optillm_memory.bench.tasks import Task, load_tasks, shuffled
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.weights import smollm2_directory

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
KEY = "optillm"  # the key of optillm's own inference
BLOCK = 12
HOLDOUT = 0.2
MAX_ERROR = 0.1
REPEATED = 2 / 3  # of the tasks that are asked again at the end; the others are new


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the demo: its name and the results of its tasks."""

    name: str
    result: Result

    def figures(self) -> dict[str, Any]:
        """Return the row of the demo's table."""
        figures = self.result.figures()
        columns = ("accuracy", "requests", "llm_calls", "injected", "served", "held_out", "seconds")
        return {key: figures[key] for key in columns}


def play(
    *,
    baseline: int,
    session: int,
    again: int,
    seed: int,
    say: Callable[[str], None],
    bar: Bar,
) -> tuple[list[Part], dict[str, Any]]:
    """Ask without memory, then in session 1, restart the server, continue in session 2, and compare reuse.

    After each answer the demo, which knows the right one, posts feedback, with the right answer after a failure. A
    fifth of the episodes is held out. At the end some tasks are asked again, together with new ones: once with memory
    as before, once with reuse allowed. Returns the parts and the uplift that the server reports. `bar` makes a progress
    bar; it yields the function that advances it by one.
    """
    tasks = shuffled(load_tasks(), seed)
    model = smollm2_directory(progress=say)
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="optillm-memory-demo-") as folder:
        env = {"OPTILLM_API_KEY": KEY, "OPTILLM_AGENT_MEMORY_HOLDOUT": str(HOLDOUT)}
        process = HostProcess.serve(None, db=Path(folder) / "memory.db", env=env)
        first, second = tasks[:session], tasks[session : 2 * session]
        say("starting optillm with an empty memory")
        with process:
            server = _ready(process, model)
            parts.append(_part("without memory", server, second[:baseline], {"mode": "off", "feedback": "none"}, bar))
            parts.append(_part("session 1", server, first, {}, bar))
        say("restarting optillm: from now on all it remembers comes from the database")
        with process:
            server = _ready(process, model)
            parts.append(_part("session 2", server, second, {}, bar))
            uplift = _uplift(process.base_url)
            chance, known = random.Random(seed), [*first, *second]
            repeated = chance.sample(known, min(round(again * REPEATED), len(known)))
            last = shuffled([*repeated, *tasks[2 * session :][: again - len(repeated)]], seed)
            read_only = {"mode": "read", "feedback": "none", "episodes": "again"}
            parts.append(_part("again", server, last, read_only, bar))
            parts.append(_part("again, reuse", server, last, {**read_only, "max_error": MAX_ERROR}, bar))
    return parts, uplift


def curve(results: Sequence[Result], block: int = BLOCK) -> list[tuple[int, float]]:
    """Return (tasks so far, accuracy over the last `block` of them) along these results."""
    right = [answer for result in results for answer in result.right]
    ends = range(block, len(right) + 1, block)
    return [(end, sum(right[end - block : end]) / block) for end in ends]


def _uplift(base_url: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.get(f"{base_url}/agent_memory/uplift", headers=headers, timeout=30)
    response.raise_for_status()
    found: dict[str, Any] = response.json()["eligible"]
    return found


def _ready(process: HostProcess, model: Path) -> Server:
    wait_for_encoder(process.base_url, KEY)
    return Server(process.base_url, f"agent_memory-{model}", KEY)


def _part(
    name: str,
    server: Server,
    tasks: Sequence[Task],
    how: Mapping[str, Any],
    bar: Bar,
) -> Part:
    with bar(name, len(tasks)) as move:
        return Part(name, run(server, tasks, namespace="demo", tick=lambda _done: move(), **how))
