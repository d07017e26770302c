"""`bench decide`: decisions per second where memory answers by itself, in process and over HTTP."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from optillm_memory.bench.latency import KEY, fill, fresh_texts
from optillm_memory.bench.report import quantile
from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.bench.tasks import Task
from optillm_memory.conversation.parse import key_of
from optillm_memory.host.caller import tenant_of_key
from optillm_memory.memory import Memory
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream

REUSE = {"reuse": {"max_error": 0.05}}
QUIET = {"OPTILLM_AGENT_MEMORY_HOLDOUT": "0", "OPTILLM_AGENT_MEMORY_REUSE_AUDIT": "0"}
Ask = Callable[[str], bool]


def run(
    tasks: Sequence[Task],
    *,
    size: int,
    clients: Sequence[int],
    seconds: float,
    repeats: int,
    seed: int,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return decisions per second by number of clients, and the round trips of a hit and of approach `none`.

    Memory holds `size` verified exemplars. Throughput is over requests that were asked before, so the encoder's cache
    is warm; the round trips are over texts that the server has never encoded, so they include the encoder.
    """
    texts = fresh_texts(tasks, random.Random(seed), size)
    figures: dict[str, Any] = {"in_process": {}, "http": {}, "http_hit_share": {}}
    with tempfile.TemporaryDirectory(prefix="optillm-memory-bench-") as folder:
        db = Path(folder) / "memory.db"
        say(f"filling the store with {size} traces")
        fill(db, texts)
        say("in process")
        with Memory.open(db, holdout=0.0, reuse_audit=0.0) as memory:
            memory.encoder.wait(120)
            memory.encoder.encode([key_of(text) for text in texts], owner=tenant_of_key(KEY))
            with _in_process(memory) as ask:
                texts = [text for text in texts if ask(text)]  # one about today is never answered from memory
            for number in clients:
                rate, share = _rate(lambda: _in_process(memory), texts, number, seconds)
                if share < 1:  # the rate would not be one of reuse
                    raise RuntimeError(f"only {share:.0%} of the requests were answered from memory")
                figures["in_process"][str(number)] = rate
                tick()
        say("starting optillm")
        with (
            RecordingUpstream(lambda _request: "an answer") as upstream,
            HostProcess.serve(upstream.base_url, db=db, env=QUIET) as server,
        ):
            wait_for_encoder(server.base_url, KEY)
            figures |= _round_trips(server.base_url, random.Random(seed).sample(texts, min(repeats, len(texts))))
            tick()
            with _over_http(server.base_url) as ask:
                for text in texts:
                    ask(text)
            for number in clients:
                rate, share = _rate(lambda: _over_http(server.base_url), texts, number, seconds)
                figures["http"][str(number)], figures["http_hit_share"][str(number)] = rate, share
                tick()
    return figures


def _rate(connect: Callable[[], Any], texts: Sequence[str], clients: int, seconds: float) -> tuple[float, float]:
    """Return (hits per second, share of hits) of concurrent clients, each of which asks without a pause.

    If clients wait for each other longer than memory's deadline, their requests go on without memory.
    """
    ready = threading.Barrier(clients + 1)
    until = [0.0]

    def client(number: int) -> tuple[int, int]:
        chance, asked, hits = random.Random(number), 0, 0
        with connect() as ask:
            ask(texts[0])
            ready.wait()
            while time.perf_counter() < until[0] or not until[0]:
                hits += ask(chance.choice(texts))
                asked += 1
        return asked, hits

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        ready.wait()
        until[0] = time.perf_counter() + seconds
        counts = [future.result() for future in running]
    asked, hits = sum(a for a, _ in counts), sum(h for _, h in counts)
    return round(hits / seconds, 1), round(hits / asked, 4)


@contextmanager
def _in_process(memory: Memory) -> Iterator[Ask]:
    tenant = tenant_of_key(KEY)
    yield lambda text: memory.begin(_body(text), tenant=tenant).action == "reuse"


@contextmanager
def _over_http(base_url: str) -> Iterator[Ask]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=base_url, headers=headers, timeout=60, trust_env=False) as http:
        yield lambda text: bool(
            http.post("/chat/completions", json={**_body(text), "model": "agent_memory-model"}).headers.get(
                "X-Agent-Memory-Action"
            )
            == "reuse"
        )


def _round_trips(base_url: str, texts: Sequence[str]) -> dict[str, float]:
    hit: list[float] = []
    none: list[float] = []
    with OpenAI(base_url=base_url, api_key=KEY, max_retries=0) as client:
        for text in texts:
            for times, model, extra in ((hit, "agent_memory-model", {"agent_memory": REUSE}), (none, "model", {})):
                started = time.perf_counter()
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": text}], extra_body=extra
                )
                times.append((time.perf_counter() - started) * 1000)
    p50s = {"hit_p50_ms": quantile(hit[5:] or hit, 0.5), "none_p50_ms": quantile(none[5:] or none, 0.5)}
    return {
        **{k: round(v, 3) for k, v in p50s.items()},
        "hit_ratio": round(p50s["hit_p50_ms"] / p50s["none_p50_ms"], 3),
    }


def _body(text: str) -> dict[str, Any]:
    return {"model": "model", "messages": [{"role": "user", "content": text}], "agent_memory": REUSE}
