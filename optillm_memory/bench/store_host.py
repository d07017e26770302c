"""What a filled memory costs the host: the time until a real optillm answers with it, and its memory use."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from optillm_memory.bench.records import LARGE, SMALL, Records
from optillm_memory.bench.store_host_main import save_vectors
from optillm_memory.errors import HostError
from optillm_memory.host.caller import tenant_of_key
from optillm_memory.records import Scope
from optillm_memory.testing.host import HostProcess, child_environment
from optillm_memory.testing.upstream import RecordingUpstream

STARTS, REQUESTS = 5, 100
_TIMEOUT_S, _REST_S, _POLL_S = 300.0, 1.0, 0.02
_KEY, _UNRELATED = "sk-bench", "What did nobody hear of before?"
# The records are in the scope of the caller with this key.
TENANT = tenant_of_key(_KEY)
KEPT: Mapping[Scope, Scope] = {scope: replace(scope, tenant=TENANT) for scope in (LARGE, SMALL)}


def measure(db: Path, records: Records, say: Callable[[str], None]) -> dict[str, float]:
    """Return the additional cost of the host with a filled file: seconds until it answers with memory, megabytes.

    `host_startup_s` is the time from the start of the process to the first answer with an injected memory, found by its
    vector, minus the time to the first answer of stock optillm without the plugin: medians of alternating starts.
    `host_rss_mb` is the memory of the process after some requests, minus that of one with an empty file after the same;
    `host_rss_over_plain_mb` is minus that of stock optillm, so it includes the code of the plugin. The encoder knows
    all vectors in advance, so the figures include no cost of encoding.

    Raises HostError if memory does not answer.
    """
    asked = list(itertools.islice((record for record in records if record.scope == LARGE), REQUESTS))
    # The first shares no word with a record: a hit for it proves that the vectors are loaded.
    texts = [_UNRELATED, *(record.task for record in asked[1:])]
    vectors = db.with_name("asked.npz")
    save_vectors(vectors, texts, [record.vector for record in asked])
    seconds: dict[str, list[float]] = {"filled": [], "plain": []}
    with RecordingUpstream(lambda _: "an answer") as upstream:
        hosts: dict[str, tuple[HostProcess, str]] = {
            "filled": (_with_memory(upstream.base_url, db, vectors), "inject"),
            "plain": (HostProcess.plain(upstream.base_url, db=db.with_name("none.db"), cwd=_folder(db)), ""),
            "empty": (_with_memory(upstream.base_url, db.with_name("empty.db"), vectors), "plain"),
        }
        rss: dict[str, float] = {}
        for number in range(STARTS):
            say(f"{records.size} records: host {number + 1} of {STARTS}")
            for name in sorted(seconds, reverse=bool(number % 2)):
                with _answering(*hosts[name], texts[0]) as took:
                    seconds[name].append(took)
                    if number == STARTS - 1:
                        rss[name] = _rss_after(*hosts[name], texts)
        say(f"{records.size} records: host, empty")
        with _answering(*hosts["empty"], texts[0]):
            rss["empty"] = _rss_after(*hosts["empty"], texts)
    return {
        "host_startup_s": statistics.median(seconds["filled"]) - statistics.median(seconds["plain"]),
        "host_rss_mb": rss["filled"] - rss["empty"],
        "host_rss_over_plain_mb": rss["filled"] - rss["plain"],
    }


def _with_memory(upstream: str, db: Path, vectors: Path) -> HostProcess:
    port = HostProcess.free_port()
    command = [sys.executable, "-m", "optillm_memory.bench.store_host_main", str(vectors)]
    return HostProcess(
        argv=[*command, "--base-url", upstream, "--port", str(port)],
        env=child_environment(os.environ, db, {"OPTILLM_AGENT_MEMORY_HOLDOUT": "0"}),
        cwd=_folder(db),
        port=port,
        log=db.with_name(f"optillm-{port}.log"),
    )


def _folder(db: Path) -> Path:
    """Return a working directory without plugins."""
    folder = db.with_name("cwd")
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def _answering(process: HostProcess, action: str, text: str) -> Iterator[float]:
    """Run a host; yield the seconds from its start to the first answer with this action."""
    started = time.perf_counter()
    with process:
        while (found := _action(process, text, memory=bool(action))) != action:
            if time.perf_counter() - started > _TIMEOUT_S:
                raise HostError(f"the host answers with the action {found!r}, not {action!r}: {process.logs()[-500:]}")
            time.sleep(_POLL_S)
        yield time.perf_counter() - started


def _action(process: HostProcess, text: str, *, memory: bool) -> str:
    """Return the action of memory for a request; without memory an empty text."""
    response = httpx.post(
        f"{process.base_url}/chat/completions",
        json={
            "model": "agent_memory-model" if memory else "none-model",
            "messages": [{"role": "user", "content": text}],
        },
        headers={"Authorization": f"Bearer {_KEY}"},
        timeout=_TIMEOUT_S,
        trust_env=False,
    )
    if response.is_error:
        raise HostError(f"the host answers {response.status_code}: {response.text[:500]}")
    return str(response.headers.get("X-Agent-Memory-Action", ""))


def _rss_after(process: HostProcess, action: str, texts: Sequence[str]) -> float:
    """Return the resident megabytes of a host after requests, and after a pause for its background work."""
    for text in texts:
        _action(process, text, memory=bool(action))
    time.sleep(_REST_S)
    assert process.pid is not None
    return rss_mb(process.pid)


def rss_mb(pid: int) -> float:
    """Return the resident megabytes of a process, mapped files included."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(found.stdout) / 1024
