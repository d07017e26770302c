"""`bench peers`: the same records, questions and vectors through other memories, each as its users have it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peer_guard import environment, watch
from benchmarks.peer_kinds import PATIENCE_S, PEERS, Peer
from benchmarks.peer_parts import Known, Upstream
from optillm_memory.bench.records import Records
from optillm_memory.bench.report import quantile

QUESTIONS, ADDS, AT_ONCE, KILLED, OWN = 200, 200, 80, 20, 50
INGESTED = 4_000  # by one caller, in one go: not more than our encoder keeps vectors of, and four times the size
FILL_S = 900.0  # for all records of a slow one
_HANDS, _PART, _WARM = 8, 4_096, 5
_PHASES = ("fill", "ask", "add", "kill", "look", "ingest")

Figures = dict[str, float]


def run(
    sizes: Sequence[int], names: Sequence[str], *, seed: int, say: Callable[[str], None]
) -> dict[str, dict[str, Figures]]:
    """Return for each size and each peer that is installed what was measured.

    Every peer has a folder and an encoder that knows all vectors beforehand, so that encoding costs it nothing; its
    phases run in processes of their own, so that what one finds is what another left on disk. `add_per_s` is one
    caller who waits for each: ours returns when it is on disk, others when they see fit. `ingest_per_s` is one caller,
    too, one record after another, with nothing left to compute beforehand: ours takes each, as in `bench store`, a
    trace with the feedback on it, and the clock stops when all are on disk and learned. `requests_per_s`, which only
    ours has, is the same with whole requests, answers and feedback, which are parsed and redacted in that time.
    `fill_per_s` is the quickest way in. A phase that fails or takes too long leaves its figures out, and says so.
    """
    figures: dict[str, dict[str, Figures]] = {}
    for size in sizes:
        found = figures.setdefault(str(size), {})
        for name in names:
            if versions_of(name) is None:
                say(f"{name} is not installed")
                continue
            with tempfile.TemporaryDirectory(prefix="optillm-memory-bench-") as folder:
                found[name] = {}
                for phase in _PHASES:
                    say(f"{size} records: {name}: {phase}")
                    measured, wrong = _apart(phase, name, Path(folder), size, seed)
                    found[name] |= measured
                    if wrong:
                        say(f"{name}: {wrong}")
                        if phase == "fill":
                            break
    return figures


def versions_of(name: str) -> dict[str, str] | None:
    """Return the versions of the packages that a peer is, None where one is missing."""
    try:
        return {package: importlib.metadata.version(package) for package in PEERS[name][1]}
    except importlib.metadata.PackageNotFoundError:
        return None


_COLUMNS = {
    "ask ms p50": "ask_p50_ms", "p95": "ask_p95_ms", "finds its own": "finds", "fill/s": "fill_per_s",
    "add/s": "add_per_s", "ingest/s": "ingest_per_s", "requests/s": "requests_per_s",
    "LLM calls an add": "upstream_calls_per_add", "an ask": "upstream_calls_per_ask",
    "first answer s": "first_answer_s", "kept of 80 at once": "kept_of_80_at_once",
    "restart": "kept_after_restart", "kill": "kept_after_kill",
}  # fmt: skip


def table(found: Mapping[str, Figures]) -> str:
    """Return the figures of one size as a table in Markdown, a peer in each row; what has no figure has a hyphen."""
    rows = [["", *_COLUMNS], ["---"] * (1 + len(_COLUMNS))]
    for name, figures in found.items():
        rows.append([name, *(_cell(key, figures.get(key)) for key in _COLUMNS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("finds", "kept_after_restart", "kept_after_kill"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _apart(phase: str, name: str, folder: Path, size: int, seed: int) -> tuple[Figures, str]:
    out = folder / "figures.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, phase, name, str(folder), str(size), str(seed), str(out)]
    log = folder / "log"
    try:
        with log.open("wb") as said:
            subprocess.run(
                command, env=environment(folder), stdout=said, stderr=said, stdin=subprocess.DEVNULL, check=False,
                timeout=FILL_S if phase == "fill" else 10 * PATIENCE_S,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return {}, f"{phase} took longer than {error.timeout:.0f} s"
    if not out.exists():
        return {}, f"{phase} failed: {log.read_text(errors='replace').strip().splitlines()[-1:]}"
    return json.loads(out.read_text()), ""


# -- in the peer's process -------------------------------------------------------------------------


class _Bench:
    """One peer, open, and what it is asked and given."""

    def __init__(self, name: str, folder: Path, size: int, seed: int) -> None:
        self.known, self.upstream = Known(), Upstream()
        self.records = Records(size, seed)
        self._fresh = Records(ADDS + AT_ONCE + KILLED + _WARM, seed + 1)
        self.ingested = min(INGESTED, 4 * size)
        self._further = Records(2 * self.ingested + _WARM, seed + 2)
        started = time.perf_counter()
        self.peer: Peer = PEERS[name][0](folder, self.known, self.upstream, size + 2 * self.ingested)
        self.open_s = time.perf_counter() - started

    def learned(self, records: Iterable[Any]) -> list[str]:
        """Return the texts of records, whose vectors are known from now on."""
        texts = []
        for record in records:
            self.known.learn(record.task, record.vector)
            texts.append(record.task)
        return texts

    def fresh(self, start: int, count: int) -> list[str]:
        """Return texts that no record has."""
        chosen = itertools.islice(self._fresh, start, start + count)
        return self._named(chosen, "fresh")

    def further(self) -> list[str]:
        """Return the texts of a long ingest, which nothing else has."""
        return self._named(self._further, "further")

    def _named(self, records: Iterable[Any], word: str) -> list[str]:
        texts = []
        for record in records:
            texts.append(text := f"{record.task} {word}")
            self.known.learn(text, record.vector)
        return texts

    def finds(self, text: str) -> bool:
        """Whether a text is found with its own words and vector."""
        return any(text in found for found in self.peer.ask(text))


def _fill(bench: _Bench) -> Figures:
    seconds, records = 0.0, iter(bench.records)
    while texts := bench.learned(itertools.islice(records, _PART)):
        seconds += _timed(lambda texts=texts: bench.peer.add_all(texts))  # type: ignore[misc]
    seconds += _timed(bench.peer.close)
    return {"fill_per_s": bench.records.size / seconds}


def _ask(bench: _Bench) -> Figures:
    own = bench.learned(itertools.islice(bench.records, OWN))
    questions = bench.records.queries(QUESTIONS + _WARM)
    for text, vector in questions:
        bench.known.learn(text, vector)
    started = time.perf_counter()
    bench.peer.ask(questions[0][0])
    first_s = bench.open_s + time.perf_counter() - started
    for text, _ in questions[QUESTIONS:]:
        bench.peer.ask(text)
    before = bench.upstream.calls
    times = _while_patient([text for text, _ in questions[:QUESTIONS]], bench.peer.ask)
    calls = (bench.upstream.calls - before) / len(times)
    found = [bench.finds(text) for text in own[: max(1, int(PATIENCE_S / quantile(times, 0.5)))]]
    bench.peer.close()
    return {
        "first_answer_s": first_s,
        "ask_p50_ms": quantile(times, 0.5) * 1000,
        "ask_p95_ms": quantile(times, 0.95) * 1000,
        "upstream_calls_per_ask": calls,
        "finds": sum(found) / len(found),
    }


def _add(bench: _Bench) -> Figures:
    for text in bench.fresh(ADDS + AT_ONCE + KILLED, _WARM):
        bench.peer.add(text)
    times = _while_patient(bench.fresh(0, ADDS), bench.peer.add)
    before, as_default = bench.upstream.calls, getattr(bench.peer, "add_inferred", bench.peer.add)
    for text in bench.fresh(ADDS + AT_ONCE + KILLED, _WARM):
        as_default(f"{text} again")
    calls = (bench.upstream.calls - before) / _WARM
    with ThreadPoolExecutor(_HANDS) as pool:
        done = list(pool.map(_unless_it_fails(bench.peer.add), bench.fresh(ADDS, AT_ONCE)))
    bench.peer.close()
    return {
        "add_per_s": len(times) / sum(times),
        "upstream_calls_per_add": calls,
        "refused_of_80_at_once": float(done.count(False)),
        "added": float(len(times)),
    }


def _ingest(bench: _Bench) -> Figures:
    peer, texts = bench.peer, bench.further()
    for text in texts[2 * bench.ingested :]:
        peer.add(text)
    done, seconds = _taken_in(bench, texts[: bench.ingested], "accept", "prepare")
    figures = {"ingest_per_s": done / seconds, "ingested": float(done)}
    if hasattr(peer, "request"):
        done, seconds = _taken_in(bench, texts[bench.ingested : 2 * bench.ingested], "request", "prepare_requests")
        figures["requests_per_s"] = done / seconds
    peer.close()
    return figures


def _taken_in(bench: _Bench, texts: Sequence[str], accept: str, prepare: str) -> tuple[int, float]:
    """Return how many texts one caller had taken in, one after another, and in which time."""
    peer = bench.peer
    accept_one, settle = getattr(peer, accept, peer.add), getattr(peer, "settle", lambda: None)
    getattr(peer, prepare, lambda _: None)(texts)
    started = time.perf_counter()
    done = 0
    for done, text in enumerate(texts, 1):
        accept_one(text)
        if time.perf_counter() - started > PATIENCE_S and done >= KILLED:
            break
    settle()
    return done, time.perf_counter() - started


def _kill(bench: _Bench) -> Figures:
    for text in bench.fresh(ADDS + AT_ONCE, KILLED):
        bench.peer.add(text)
    return {}  # and the process ends as it stands


def _look(bench: _Bench) -> Figures:
    added = bench.fresh(0, KILLED)  # some of them: all are alike
    together, last = bench.fresh(ADDS, AT_ONCE), bench.fresh(ADDS + AT_ONCE, KILLED)
    figures = {
        "kept_after_restart": sum(map(bench.finds, added)) / len(added),
        "kept_of_80_at_once": float(sum(map(bench.finds, together))),
        "kept_after_kill": sum(map(bench.finds, last)) / len(last),
    }
    bench.peer.close()
    return figures


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _while_patient(items: Sequence[str], work: Callable[[str], Any]) -> list[float]:
    times: list[float] = []
    for item in items:
        times.append(_timed(lambda item=item: work(item)))  # type: ignore[misc]
        if sum(times) > PATIENCE_S and len(times) >= KILLED:
            break
    return times


def _unless_it_fails(work: Callable[[str], Any]) -> Callable[[str], bool]:
    def tried(item: str) -> bool:
        try:
            work(item)
        except Exception:  # noqa: BLE001 - whatever a peer raises under several callers
            return False
        return True

    return tried


_WORK: dict[str, Callable[[_Bench], Figures]] = {
    "fill": _fill, "ask": _ask, "add": _add, "kill": _kill, "look": _look, "ingest": _ingest,
}  # fmt: skip


def _main(phase: str, name: str, folder: str, size: str, seed: str, out: str) -> None:
    refused = watch()
    figures = _WORK[phase](_Bench(name, Path(folder), int(size), int(seed)))
    if refused:
        figures["refused_connections"] = float(refused.total())
    Path(out).write_text(json.dumps({key: round(value, 4) for key, value in figures.items()}))
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
