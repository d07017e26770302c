"""`python -m benchmarks peers`: the same records, questions and vectors in other memories, as installed."""

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

from benchmarks.ann_indexes import avx2_environment, mask_newer_than_avx2
from benchmarks.peer_guard import environment, watch
from benchmarks.peer_kinds import PEERS, TIME_LIMIT_S, Peer
from benchmarks.peer_parts import PeerEncoder, Upstream
from optillm_memory.bench.records import Records
from optillm_memory.bench.report import quantile

QUESTIONS, ADDS, AT_ONCE, KILLED, OWN = 200, 200, 80, 20, 50
INGESTED = 4_000  # by one caller: no more than our encoder's cache holds, and at most four times the size
FILL_S = 900.0  # for all records of a slow peer
_CALLERS, _BATCH, _WARMUP = 8, 4_096, 5
_PHASES = ("fill", "ask", "add", "kill", "look", "ingest")

Figures = dict[str, float]


def run(
    sizes: Sequence[int], names: Sequence[str], *, seed: int, say: Callable[[str], None], simd: str = "all"
) -> dict[str, dict[str, Figures]]:
    """Return the figures of each size and each installed peer.

    Every peer has a folder and an encoder that knows all vectors in advance, so that encoding costs it nothing; each
    phase has its own process, so that it finds only what an earlier one wrote to disk. `add_per_s` is one caller who
    waits for each record: ours returns when it is on disk, the others when they choose. `ingest_per_s` is one caller,
    too, one record after another, all prepared in advance: ours accepts, as in `bench store`, a trace with the feedback
    on it, and the clock stops when all are on disk and learned. `requests_per_s`, which only ours has, is the same with
    whole requests, answers and feedback, which are parsed and redacted in that time. `fill_per_s` is the fastest way
    to store records: ours writes traces with their feedback. A phase that fails or takes too long has no figures, and a
    message says so. With `simd` "avx2" numpy, its BLAS, faiss and ours are kept from newer instructions; what is
    compiled into another peer, as in chromadb, is not.
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
                    measured, wrong = _in_own_process(phase, name, Path(folder), size, seed, simd)
                    found[name] |= measured
                    if wrong:
                        say(f"{name}: {wrong}")
                        if phase == "fill":
                            break
    return figures


def versions_of(name: str) -> dict[str, str] | None:
    """Return the versions of a peer's packages, None if one is missing."""
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
    """Return the figures of one size as a table in Markdown, one row per peer; a missing figure is a hyphen."""
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


def _in_own_process(
    phase: str, name: str, folder: Path, size: int, seed: int, simd: str = "all"
) -> tuple[Figures, str]:
    out = folder / "figures.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, phase, name, str(folder), str(size), str(seed), str(out), simd]
    log = folder / "log"
    masked = avx2_environment() if simd == "avx2" else {}
    try:
        with log.open("wb") as sink:
            subprocess.run(
                command, env={**environment(folder), **masked}, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
                check=False, timeout=FILL_S if phase == "fill" else 10 * TIME_LIMIT_S,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return {}, f"{phase} took longer than {error.timeout:.0f} s"
    if not out.exists():
        return {}, f"{phase} failed: {log.read_text(errors='replace').strip().splitlines()[-1:]}"
    return json.loads(out.read_text()), ""


# -- in the peer's process -------------------------------------------------------------------------


class _Bench:
    """One peer, open, with the records and questions for it."""

    def __init__(self, name: str, folder: Path, size: int, seed: int) -> None:
        self.encoder, self.upstream = PeerEncoder(), Upstream()
        self.records = Records(size, seed)
        self._fresh = Records(ADDS + AT_ONCE + KILLED + _WARMUP, seed + 1)
        self.ingested = min(INGESTED, 4 * size)
        self._further = Records(2 * self.ingested + _WARMUP, seed + 2)
        started = time.perf_counter()
        self.peer: Peer = PEERS[name][0](folder, self.encoder, self.upstream, size + 2 * self.ingested)
        self.open_s = time.perf_counter() - started

    def learned(self, records: Iterable[Any]) -> list[str]:
        """Return the texts of records, and teach the encoder their vectors."""
        texts = []
        for record in records:
            self.encoder.learn(record.task, record.vector)
            texts.append(record.task)
        return texts

    def fresh(self, start: int, count: int) -> list[str]:
        """Return texts that no record has."""
        chosen = itertools.islice(self._fresh, start, start + count)
        return self._named(chosen, "fresh")

    def further(self) -> list[str]:
        """Return the texts of a long ingest, which no other phase uses."""
        return self._named(self._further, "further")

    def _named(self, records: Iterable[Any], word: str) -> list[str]:
        texts = []
        for record in records:
            texts.append(text := f"{record.task} {word}")
            self.encoder.learn(text, record.vector)
        return texts

    def finds(self, text: str) -> bool:
        """Return whether a query with a text's own words and vector finds it."""
        return any(text in found for found in self.peer.ask(text))


def _fill(bench: _Bench) -> Figures:
    seconds, records = 0.0, iter(bench.records)
    while texts := bench.learned(itertools.islice(records, _BATCH)):
        seconds += _timed(lambda texts=texts: bench.peer.add_all(texts))  # type: ignore[misc]
    seconds += _timed(bench.peer.close)
    return {"fill_per_s": bench.records.size / seconds}


def _ask(bench: _Bench) -> Figures:
    own = bench.learned(itertools.islice(bench.records, OWN))
    questions = bench.records.queries(QUESTIONS + _WARMUP)
    for text, vector in questions:
        bench.encoder.learn(text, vector)
    started = time.perf_counter()
    bench.peer.ask(questions[0][0])
    first_s = bench.open_s + time.perf_counter() - started
    for text, _ in questions[QUESTIONS:]:
        bench.peer.ask(text)
    before = bench.upstream.calls
    times = _times_within_limit([text for text, _ in questions[:QUESTIONS]], bench.peer.ask)
    calls = (bench.upstream.calls - before) / len(times)
    found = [bench.finds(text) for text in own[: max(1, int(TIME_LIMIT_S / quantile(times, 0.5)))]]
    bench.peer.close()
    return {
        "first_answer_s": first_s,
        "ask_p50_ms": quantile(times, 0.5) * 1000,
        "ask_p95_ms": quantile(times, 0.95) * 1000,
        "upstream_calls_per_ask": calls,
        "finds": sum(found) / len(found),
    }


def _add(bench: _Bench) -> Figures:
    for text in bench.fresh(ADDS + AT_ONCE + KILLED, _WARMUP):
        bench.peer.add(text)
    times = _times_within_limit(bench.fresh(0, ADDS), bench.peer.add)
    before, as_default = bench.upstream.calls, getattr(bench.peer, "add_inferred", bench.peer.add)
    for text in bench.fresh(ADDS + AT_ONCE + KILLED, _WARMUP):
        as_default(f"{text} again")
    calls = (bench.upstream.calls - before) / _WARMUP
    with ThreadPoolExecutor(_CALLERS) as pool:
        done = list(pool.map(_succeeds(bench.peer.add), bench.fresh(ADDS, AT_ONCE)))
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
    done, seconds = _ingested(bench, texts[: bench.ingested], "accept", "prepare")
    figures = {"ingest_per_s": done / seconds, "ingested": float(done)}
    if hasattr(peer, "request"):
        done, seconds = _ingested(bench, texts[bench.ingested : 2 * bench.ingested], "request", "prepare_requests")
        figures["requests_per_s"] = done / seconds
    peer.close()
    return figures


def _ingested(bench: _Bench, texts: Sequence[str], accept: str, prepare: str) -> tuple[int, float]:
    """Return how many texts one caller stored, one after another, and in how many seconds."""
    peer = bench.peer
    accept_one, settle = getattr(peer, accept, peer.add), getattr(peer, "settle", lambda: None)
    getattr(peer, prepare, lambda _: None)(texts)
    started = time.perf_counter()
    done = 0
    for done, text in enumerate(texts, 1):
        accept_one(text)
        if time.perf_counter() - started > TIME_LIMIT_S and done >= KILLED:
            break
    settle()
    return done, time.perf_counter() - started


def _kill(bench: _Bench) -> Figures:
    for text in bench.fresh(ADDS + AT_ONCE, KILLED):
        bench.peer.add(text)
    return {}  # and the process ends without closing


def _look(bench: _Bench) -> Figures:
    added = bench.fresh(0, KILLED)  # a sample
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


def _times_within_limit(items: Sequence[str], work: Callable[[str], Any]) -> list[float]:
    times: list[float] = []
    for item in items:
        times.append(_timed(lambda item=item: work(item)))  # type: ignore[misc]
        if sum(times) > TIME_LIMIT_S and len(times) >= KILLED:
            break
    return times


def _succeeds(work: Callable[[str], Any]) -> Callable[[str], bool]:
    def attempt(item: str) -> bool:
        try:
            work(item)
        except Exception:  # noqa: BLE001 - whatever a peer raises under several callers
            return False
        return True

    return attempt


_WORK: dict[str, Callable[[_Bench], Figures]] = {
    "fill": _fill, "ask": _ask, "add": _add, "kill": _kill, "look": _look, "ingest": _ingest,
}  # fmt: skip


def _main(phase: str, name: str, folder: str, size: str, seed: str, out: str, simd: str) -> None:
    refused = watch()
    if simd == "avx2":
        mask_newer_than_avx2("ours", Path(folder))
    figures = _WORK[phase](_Bench(name, Path(folder), int(size), int(seed)))
    if refused:
        figures["refused_connections"] = float(refused.total())
    Path(out).write_text(json.dumps({key: round(value, 4) for key, value in figures.items()}))
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
