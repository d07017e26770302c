"""What the host tests share: a real optillm with its recording upstream, asked over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream

CHECKOUT = Path(__file__).resolve().parents[1]
KEY = "alice"  # no sk- in front: the server's own client answers, which spares each request a new one
MODEL = "agent_memory-m"
TIMEOUT_S = 60.0
# The holdout would leave a random share of the tests without memory; trigrams need no weights and no time to load.
QUIET = {
    "OPTILLM_AGENT_MEMORY_HOLDOUT": "0",
    "OPTILLM_AGENT_MEMORY_REUSE_AUDIT": "0",
    "OPTILLM_AGENT_MEMORY_ENCODER": "hashing",
}

JSON = dict[str, Any]
# Where children look for modules: optillm's plugins `privacy`, `json` and `router` fail there, for loading torch takes
# half of the time of a start.
LEAN_PATH = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("without_torch")), str(CHECKOUT), os.environ.get("PYTHONPATH")])
)
LEAN = {"PYTHONPATH": LEAN_PATH}
COMPLETE = {"PYTHONPATH": str(CHECKOUT)}


@dataclass(frozen=True)
class Host:
    """A running optillm, its upstream and its database; a key is the caller, None on our routes the operator."""

    process: HostProcess
    upstream: RecordingUpstream
    db: Path
    http: httpx.Client

    @property
    def is_direct(self) -> bool:
        """Whether plain requests take the direct lane."""
        return self.process.env.get("OPTILLM_AGENT_MEMORY_DIRECT") != "off"

    def post(
        self,
        body: Any,
        *,
        key: str | None = KEY,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> httpx.Response:
        """Send a chat request's body as it is (text and bytes too) and return the raw response."""
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        given = {"Content-Type": "application/json", **authorization(key), **(headers or {})}
        return self.http.post(
            f"{self.process.base_url}/chat/completions", content=content, headers=given, timeout=timeout_s
        )

    def without_memory(self, body: Any) -> httpx.Response:
        """Send a request's body as it fares without memory: optillm answers, or, in place of the lane, the upstream."""
        if not self.is_direct:
            return self.post(body)
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        return self.http.post(
            f"{self.upstream.base_url}/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )

    def chat(
        self,
        asked: str | Sequence[Mapping[str, Any]],
        *,
        model: str = MODEL,
        memory: Mapping[str, Any] | None = None,
        key: str | None = KEY,
        **fields: Any,
    ) -> JSON:
        """Ask with one text or with messages; return the answered body."""
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        body = {"model": model, "messages": messages, **fields}
        if memory is not None:
            body["agent_memory"] = dict(memory)
        response = self.post(body, key=key)
        assert response.status_code == 200, response.text
        answered: JSON = response.json()
        return answered

    def route(
        self, method: str, path: str, *, key: str | None = KEY, headers: Mapping[str, str] | None = None, **given: Any
    ) -> httpx.Response:
        """Ask one of our own routes: as a caller with a key, without one (`""`), or as the operator (None)."""
        url = f"{self.process.base_url}/agent_memory/{path}"
        of_caller = authorization(self.server_key if key is None else key)
        if key is None:
            of_caller["X-Agent-Memory-Operator"] = self.operator_key
        if method == "POST" and not given.keys() & {"json", "content"}:
            of_caller["Content-Type"] = "application/json"
        return self.http.request(method, url, headers={**of_caller, **(headers or {})}, **given)

    @property
    def server_key(self) -> str:
        """The key that the server asks of everybody; empty where it asks for none."""
        argv = self.process.argv
        return argv[argv.index("--optillm-api-key") + 1] if "--optillm-api-key" in argv else ""

    @property
    def operator_key(self) -> str:
        """The operator's secret, from its file beside the database."""
        return self.db.with_name(f"{self.db.stem}.operator-key").read_text().strip()

    def get(self, path: str, *, key: str | None = KEY, **params: Any) -> JSON:
        """Return what a route answers with 200."""
        response = self.route("GET", path, key=key, params=params)
        assert response.status_code == 200, response.text
        found: JSON = response.json()
        return found

    def tell(self, payload: Any, *, key: str | None = KEY) -> Any:
        """Post feedback that must be acknowledged; return the receipt or receipts."""
        response = self.route("POST", "feedback", key=key, json=payload)
        assert response.status_code == 202, response.text
        return response.json()

    def teach(self, task: str, answer: str, *, memory: Mapping[str, Any] | None = None, key: str | None = KEY) -> str:
        """Ask for a task, have it answered so, say that it was right; return the trace id."""
        before, self.upstream.reply = self.upstream.reply, lambda _request: answer
        try:
            trace_id: str = self.chat(task, memory=memory, key=key)["id"]
        finally:
            self.upstream.reply = before
        told = self.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}, key=key)
        assert told["status"] == "applied"
        return trace_id

    def settle(self) -> None:
        """Wait until what was queued for writing is on disk."""
        assert self.route("GET", "ready", key=KEY).status_code == 200

    @property
    def sent(self) -> list[JSON]:
        """The bodies that the upstream has received."""
        return [request.json for request in self.upstream.requests]

    @property
    def prompt(self) -> list[JSON]:
        """The messages that the upstream received last."""
        messages: list[JSON] = self.sent[-1]["messages"]
        return messages

    @contextlib.contextmanager
    def openai(self, key: str = "sk-test", **options: Any) -> Iterator[OpenAI]:
        """Give the real OpenAI client."""
        with OpenAI(base_url=self.process.base_url, api_key=key, max_retries=0, **options) as client:
            yield client


BOTH_LANES = ("direct", "host")


def on_lane(lane: str) -> dict[str, str]:
    """Return the setting with which plain requests take a lane."""
    return {"OPTILLM_AGENT_MEMORY_DIRECT": "on" if lane == "direct" else "off"}


def authorization(key: str | None) -> dict[str, str]:
    """Return the header of a caller's key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextlib.contextmanager
def running(process: HostProcess, upstream: RecordingUpstream, db: Path) -> Iterator[Host]:
    """Start the process (unless it runs), give it as a Host, and stop it at the end."""
    with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as http:
        if process.pid is None:
            process.start()
        try:
            yield Host(process, upstream, db, http)
        finally:
            process.stop()


@contextlib.contextmanager
def served(
    upstream: RecordingUpstream,
    db: Path,
    *extra_args: str,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Host]:
    """Run `optillm-memory serve` on a database; all plugins of optillm are there if `env` has `COMPLETE`."""
    given = {**QUIET, **LEAN, **(env or {})}
    process = HostProcess.serve(upstream.base_url, db=db, extra_args=extra_args, env=given, log=log)
    with running(process, upstream, db) as host:
        yield host


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Wait until the condition holds; return whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def chunks_of(response: httpx.Response) -> list[JSON]:
    """Return the chunks of a streamed answer, which must end with [DONE]."""
    events = [line[len("data: ") :] for line in response.text.splitlines() if line.startswith("data: ")]
    assert events, response.text
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]
