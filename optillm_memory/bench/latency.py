"""`bench latency`: round trips and first tokens, with memory and without; many clients of a slow upstream."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from optillm_memory.bench.report import quantile
from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.bench.tasks import Task
from optillm_memory.conversation.parse import key_of
from optillm_memory.host.caller import tenant_of_key
from optillm_memory.memory import Memory
from optillm_memory.recall.encoder import load_encoder
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream, Reply

KEY = "sk-bench"
BLOCK = 10  # requests of a kind, one after another: what a server still does after them must not burden another kind
_REST_S = 0.1
STREAMED_WORDS, TOKEN_S = 40, 0.005
SLOW_S = 2.0
_BY_TOKENS = "-by-tokens"
_ROUND = {"direct": "model", "none": "none-model", "through_host": "agent_memory-model", "lane": "agent_memory-model"}


def run(
    tasks: Sequence[Task],
    *,
    sizes: Sequence[int],
    repeats: int,
    seed: int,
    server: str = "optillm",
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return for each number of traces the p50 and p95 in milliseconds of round trips and of first tokens.

    `direct` asks the upstream itself, `none` optillm without memory, `through_host` and `lane` memory on either lane,
    `encoder` encodes the text alone. The upstream answers at once; for the first tokens (`…_first_token_…`) it makes 40
    of them, 5 ms apart. One request after another, the kinds in blocks of ten, each on a text that is new to all. Every
    trace in the store is a verified exemplar: the most expensive case.
    """
    encoder = load_encoder("auto")
    assert encoder is not None
    chance = random.Random(seed)
    figures: dict[str, dict[str, float]] = {}
    for size in sizes:
        say(f"{size} traces: filling the store")
        texts = fresh_texts(tasks, chance, size + (2 * len(_ROUND) + 1) * blocks_of(repeats) * BLOCK)
        asked = iter(texts[size:])
        with _hosts(texts[:size], _answer, server=server) as clients:
            kinds: dict[str, Callable[[str], float]] = {"encoder": lambda text: _encoded(encoder, text)}
            for name, client in clients.items():
                kinds[name] = lambda text, c=client, m=_ROUND[name]: _round_trip(c, m, text)  # type: ignore[misc]
                kinds[f"{name}_first_token"] = lambda text, c=client, m=_ROUND[name]: _first_token(c, m, text)  # type: ignore[misc]
            times: dict[str, list[float]] = {name: [] for name in kinds}
            for number in range(blocks_of(repeats)):
                for name in chance.sample(sorted(kinds), len(kinds)):
                    time.sleep(_REST_S)
                    took_ms = [kinds[name](next(asked)) * 1000 for _ in range(BLOCK)]
                    if number:  # the first block is a warm-up
                        times[name] += took_ms
                tick()
        figures[str(size)] = {
            f"{name}_p{share}_ms": round(quantile(values, share / 100), 3)
            for name, values in times.items()
            for share in (50, 95)
        }
    return figures


def blocks_of(repeats: int) -> int:
    """Return how many blocks of requests `run` makes of each kind, with the warm-up."""
    return -(-repeats // BLOCK) + 1


def under_load(
    tasks: Sequence[Task],
    *,
    clients: Sequence[int],
    seconds: float,
    seed: int,
    server: str = "optillm",
    say: Callable[[str], None],
) -> dict[str, float]:
    """Return what many clients at once get from an upstream that takes two seconds for an answer.

    For each number of clients and each way (`direct`, `none`, `lane`): requests/s, p50 and p99 of what a request takes
    beyond the upstream's two seconds in ms, and errors; for the ways through a server also its threads and its memory
    in MB at the end. Memory holds 1,000 verified exemplars.
    """
    chance = random.Random(seed)
    texts = fresh_texts(tasks, chance, 1_000)
    figures: dict[str, float] = {}
    with _hosts(
        texts, lambda _: Reply("an answer", delay_s=SLOW_S), ways=("direct", "none", "lane"), server=server
    ) as ways:
        for number in clients:
            for name, client in ways.items():
                say(f"{number} clients, {name}")
                took, errors = _many(client, _ROUND[name], texts, number, seconds)
                figures[f"{name}_{number}_requests_per_s"] = round(len(took) / seconds, 2)
                figures[f"{name}_{number}_errors"] = errors
                for share in (50, 99):
                    extra_s = quantile(took, share / 100) - SLOW_S if took else 0.0
                    figures[f"{name}_{number}_over_p{share}_ms"] = round(extra_s * 1000, 2)
                if client.pid is not None:
                    threads, rss_mb = _size_of(client.pid)
                    figures |= {f"{name}_{number}_threads": threads, f"{name}_{number}_rss_mb": rss_mb}
    return figures


class _Way:
    """A server to be asked, and its process where it is one of its own."""

    def __init__(self, base_url: str, pid: int | None) -> None:
        self.base_url, self.pid = base_url, pid
        self.openai = OpenAI(base_url=base_url, api_key=KEY, max_retries=0)


@contextlib.contextmanager
def _hosts(
    stored: Sequence[str],
    reply: Callable[[dict[str, Any]], Any],
    ways: Sequence[str] = tuple(_ROUND),
    *,
    server: str,
) -> Iterator[dict[str, _Way]]:
    """Give the servers to compare: the upstream, an optillm with the lane, and one without it."""
    with (
        tempfile.TemporaryDirectory(prefix="optillm-memory-bench-") as folder,
        RecordingUpstream(reply) as upstream,
        contextlib.ExitStack() as running,
    ):
        db = Path(folder) / "memory.db"
        fill(db, stored)
        found = {"direct": _Way(upstream.base_url, None)}
        for direct in ("on", "off"):
            served = {"lane": "on", "none": "off", "through_host": "off"}
            names = [name for name in ways if served.get(name) == direct]
            if names:
                env = {"OPTILLM_AGENT_MEMORY_HOLDOUT": "0", "OPTILLM_AGENT_MEMORY_DIRECT": direct}
                made = HostProcess.gunicorn if server == "gunicorn" else HostProcess.serve
                process = running.enter_context(made(upstream.base_url, db=db, env=env))
                wait_for_encoder(process.base_url, KEY)
                found |= {name: _Way(process.base_url, process.pid) for name in names}
        yield {name: found[name] for name in ways}


def _answer(request: dict[str, Any]) -> Reply:
    if not request["model"].endswith(_BY_TOKENS):
        return Reply("an answer")
    whole_s = 0.0 if request.get("stream") else STREAMED_WORDS * TOKEN_S
    return Reply("word " * STREAMED_WORDS, chunk_delay_s=TOKEN_S, delay_s=whole_s)


def _encoded(encoder: Any, text: str) -> float:
    started = time.perf_counter()
    encoder.encode([text])
    return time.perf_counter() - started


def _round_trip(way: _Way, model: str, text: str) -> float:
    started = time.perf_counter()
    way.openai.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
    return time.perf_counter() - started


def _first_token(way: _Way, model: str, text: str) -> float:
    """Return the seconds to the first word of a stream; the rest is read, so that the connection is free again."""
    started, first = time.perf_counter(), 0.0
    messages: Any = [{"role": "user", "content": text}]
    for chunk in way.openai.chat.completions.create(model=model + _BY_TOKENS, messages=messages, stream=True):
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - started
    return first


def _many(way: _Way, model: str, texts: Sequence[str], clients: int, seconds: float) -> tuple[list[float], int]:
    """Return the seconds that requests took, of so many clients at once, and how many failed."""
    took: list[float] = []
    failed: list[int] = []
    until = time.perf_counter() + seconds
    headers = {"Authorization": f"Bearer {KEY}"}

    def ask(number: int) -> None:
        with httpx.Client(base_url=way.base_url, headers=headers, timeout=60, trust_env=False) as client:
            count = 0
            while time.perf_counter() < until:
                body = _body(f"{texts[(number * 7 + count) % len(texts)]} {number}-{count}") | {"model": model}
                count += 1
                started = time.perf_counter()
                try:
                    client.post("/chat/completions", json=body).raise_for_status()
                except httpx.HTTPError:
                    failed.append(1)
                else:
                    took.append(time.perf_counter() - started)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took, len(failed)


def _size_of(pid: int) -> tuple[int, float]:
    """Return the threads of a process and its children, and their memory in MB."""
    threads, rss_kb = 0, 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it may just have ended
            lines = status.read_text(encoding="ascii", errors="replace").splitlines()
            values = dict(line.split(":", 1) for line in lines if ":" in line)
            if pid in (int(values["Pid"]), int(values["PPid"])):
                threads += int(values["Threads"])
                rss_kb += int(values["VmRSS"].split()[0]) if "VmRSS" in values else 0
    return threads, round(rss_kb / 1024, 1)


def fresh_texts(tasks: Sequence[Task], chance: random.Random, count: int) -> list[str]:
    """Return `count` different texts: tasks, with an order number where there are not enough of them."""
    texts: list[str] = []
    inputs = [task.input for task in tasks]
    seen: set[str] = set()
    while len(texts) < count:
        text = chance.choice(inputs)
        if text in seen:
            text = f"{text} (order {chance.randrange(10**6)})"
        if text not in seen:
            seen.add(text)
            texts.append(text)
    return texts


def fill(db: Path, texts: Sequence[str]) -> None:
    """Fill a database with verified exemplars and their vectors, through the ordinary write path."""
    tenant = tenant_of_key(KEY)
    with Memory.open(db, holdout=0.0, queue_size=max(len(texts) * 2, 100)) as memory:
        memory.encoder.wait(120)
        for start in range(0, len(texts), 256):
            batch = texts[start : start + 256]
            memory.encoder.encode([key_of(text) for text in batch], owner=tenant)
            traces = []
            for text in batch:
                turn = memory.new_turn(_body(text), tenant=tenant)
                memory.finish(turn, _ANSWER)
                traces.append(turn.trace_id)
            memory.feedback([{"trace_id": t, "metric": "success", "value": True, "source": "code"} for t in traces])


_ANSWER: Mapping[str, Any] = {
    "choices": [{"message": {"role": "assistant", "content": "an answer"}, "finish_reason": "stop"}]
}


def _body(text: str) -> dict[str, Any]:
    return {"model": "model", "messages": [{"role": "user", "content": text}]}
