"""`bench latency`: what memory adds to a round trip, and the time of the encoder alone."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI

from optillm_memory.bench.report import quantile
from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.bench.tasks import Task
from optillm_memory.conversation.parse import key_of
from optillm_memory.host.incoming import tenant_of_key
from optillm_memory.memory import Memory
from optillm_memory.recall.encoder import load_encoder
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream

KEY = "sk-bench"


def run(
    tasks: Sequence[Task],
    *,
    sizes: Sequence[int],
    repeats: int,
    seed: int,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return for each number of traces the p50 and p95 in milliseconds of `none`, `memory` and `encoder`.

    One server per size, an instant upstream, requests one after another; the three are interleaved, each on a text
    that is new to all. Every trace in the store is a verified exemplar: the most expensive case.
    """
    encoder = load_encoder("auto")
    assert encoder is not None
    chance = random.Random(seed)
    figures: dict[str, dict[str, float]] = {}
    for size in sizes:
        with (
            tempfile.TemporaryDirectory(prefix="optillm-memory-bench-") as folder,
            RecordingUpstream(lambda _request: "an answer") as upstream,
        ):
            db = Path(folder) / "memory.db"
            say(f"{size} traces: filling the store")
            texts = fresh_texts(tasks, chance, size + 3 * (repeats + 10))
            fill(db, texts[:size])
            say(f"{size} traces: starting optillm")
            with HostProcess.serve(upstream.base_url, db=db, env={"OPTILLM_AGENT_MEMORY_HOLDOUT": "0"}) as server:
                wait_for_encoder(server.base_url, KEY)
                times: dict[str, list[float]] = {"none": [], "memory": [], "encoder": []}
                with OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as client:
                    kinds: dict[str, Callable[[str], Any]] = {
                        "none": lambda text: _ask(client, "none-model", text),
                        "memory": lambda text: _ask(client, "agent_memory-model", text),
                        "encoder": lambda text: encoder.encode([text]),
                    }
                    asked = iter(texts[size:])
                    for number in range(repeats + 10):
                        for name in chance.sample(sorted(kinds), len(kinds)):
                            text = next(asked)
                            started = time.perf_counter()
                            kinds[name](text)
                            if number >= 10:  # the first few are a warm-up
                                times[name].append((time.perf_counter() - started) * 1000)
                        tick()
        figures[str(size)] = {
            f"{name}_p{share}_ms": round(quantile(values, share / 100), 3)
            for name, values in times.items()
            for share in (50, 95)
        }
    return figures


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
            memory.encoder.encode([key_of(text) for text in batch])
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


def _ask(client: OpenAI, model: str, text: str) -> None:
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
