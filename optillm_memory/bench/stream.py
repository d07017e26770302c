"""`bench stream`: a stream of tasks through a real server, with feedback after each."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from openai import OpenAI

from optillm_memory.bench.tasks import Task
from optillm_memory.errors import InvalidField
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream
from optillm_memory.testing.weights import smollm2_directory

FeedbackKind = Literal["demonstration", "binary", "none"]
MAX_TOKENS = 24
VOTERS = 5
Progress = Callable[[int], None]


@dataclass
class Server:
    """The server of the stream: an OpenAI-compatible URL, the model's name there, and the caller's key."""

    url: str
    model: str
    key: str
    calls: Callable[[], int] | None = None  # LLM calls as the upstream itself counted them


@dataclass
class Result:
    """The results of the tasks, in order."""

    right: list[bool] = field(default_factory=list)
    served: list[bool] = field(default_factory=list)
    vote_right: list[bool] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, *, right: bool, action: str) -> None:
        """Count one task."""
        self.right.append(right)
        self.served.append(action == "reuse")
        self.actions[action] += 1

    def figures(self) -> dict[str, Any]:
        """Return the flat figures; `accuracy_last_N` is over the last N tasks, or all if there are fewer.

        `served` were answered without an LLM call, and `error_per_hit` is the share of wrong answers among them.
        """
        figures: dict[str, Any] = {
            "accuracy": _share(self.right),
            "accuracy_last_100": _share(self.right[-100:]),
            "accuracy_last_1000": _share(self.right[-1000:]),
            "requests": len(self.right),
            "llm_calls": sum(n for action, n in self.actions.items() if action != "reuse"),
            "injected": self.actions["inject"],
            "held_out": self.actions["holdout"],
            "served": sum(self.served),
            "served_last_1000": _share(self.served[-1000:]),
            "error_per_hit": _share([not right for right, hit in zip(self.right, self.served, strict=True) if hit]),
            "seconds": round(self.seconds, 2),
        }
        if self.vote_right:
            figures["vote_accuracy"] = _share(self.vote_right)
            figures["vote_accuracy_last_100"] = _share(self.vote_right[-100:])
        return figures


def run(
    server: Server,
    tasks: Sequence[Task],
    *,
    feedback: FeedbackKind = "demonstration",
    mode: str = "readwrite",
    vote: bool = False,
    max_error: float | None = None,
    namespace: str = "default",
    episodes: str = "",
    tick: Progress = lambda _done: None,
) -> Result:
    """Ask for each task in turn, and send feedback before the next.

    With `demonstration` the right answer follows a failure; with `binary` the feedback is only success or failure.
    `vote` also measures recall alone, before the answer: the similarity-weighted vote of the nearest exemplars.
    `max_error` lets verified answers be reused; these get no feedback, as nobody has checked them. `episodes` names
    the tasks' episodes, so that another run with the same name holds out the same ones.
    """
    result = Result()
    started = time.perf_counter()
    headers = {"Authorization": f"Bearer {server.key}", "X-Agent-Memory-Namespace": namespace}
    with (
        OpenAI(base_url=server.url, api_key=server.key, timeout=600, max_retries=0) as client,
        httpx.Client(base_url=f"{server.url.rstrip('/')}/agent_memory", headers=headers, timeout=60) as routes,
    ):
        for done, task in enumerate(tasks, 1):
            if vote:
                result.vote_right.append(_vote(routes, task.input) == task.output)
            field: dict[str, Any] = {"mode": mode, "namespace": namespace}
            if episodes:
                field["episode_id"] = f"{episodes}-{done}"
            if max_error is not None:
                field["reuse"] = {"max_error": max_error}
            trace_id, answer, action = ask(client, server.model, task.input, field)
            right = answer.strip() == task.output
            result.add(right=right, action=action)
            if feedback != "none" and action != "reuse":
                send_feedback(routes, trace_id, task, right=right, demonstrate=feedback == "demonstration")
            tick(done)
    result.seconds = time.perf_counter() - started
    return result


def ask(client: OpenAI, model: str, text: str, memory: Mapping[str, Any]) -> tuple[str, str, str]:
    """Ask for one task; return (trace id, answer, action)."""
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        extra_body={"agent_memory": dict(memory)},
    )
    completion = raw.parse()
    action = raw.headers.get("X-Agent-Memory-Action", "plain")
    trace_id = raw.headers.get("X-Agent-Memory-Trace-Id", completion.id)
    return trace_id, completion.choices[0].message.content or "", action


def send_feedback(routes: httpx.Client, trace_id: str, task: Task, *, right: bool, demonstrate: bool) -> None:
    """Post feedback with source `code`: success or failure, and after a failure the right answer."""
    items: list[dict[str, Any]] = [{"trace_id": trace_id, "metric": "success", "value": right, "source": "code"}]
    if demonstrate and not right:
        items.append({"trace_id": trace_id, "metric": "demonstration", "value": task.output, "source": "code"})
    routes.post("/feedback", json=items).raise_for_status()


def _vote(routes: httpx.Client, text: str) -> str | None:
    response = routes.get("/memories", params={"query": text, "limit": VOTERS})
    response.raise_for_status()
    votes: Counter[str] = Counter()
    for hit in response.json()["data"]:
        votes[hit["answer"]] += hit["cosine"] or hit["score"]
    return votes.most_common(1)[0][0] if votes else None


def _share(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


# -- the bench's own servers -----------------------------------------------------------------------


@contextlib.contextmanager
def started_server(
    upstream: str, tasks: Sequence[Task], *, seed: int, env: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[Server]:
    """Run a real server on an empty database, with its own upstream.

    `upstream` is `smollm2` (SmolLM2-135M through optillm's own inference) or `random:P` (an upstream that knows
    the answers and returns the right one with probability P, else another label). Raises InvalidField.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optillm-memory-bench-")))
        if upstream == "smollm2":
            model, key, url = str(smollm2_directory(progress=say)), "optillm", None
            env = {**env, "OPTILLM_API_KEY": key}
            calls = None
        elif upstream.startswith("random:"):
            answering = stack.enter_context(RecordingUpstream(oracle(probability(upstream), tasks, seed)))
            model, key, url = "oracle", "sk-bench", answering.base_url
            calls = lambda: len(answering.requests)  # noqa: E731
        else:
            raise InvalidField("--upstream", f"{upstream!r} is neither smollm2 nor random:P")
        say("starting optillm")
        process = HostProcess.serve(url, db=folder / "memory.db", env=env)
        stack.enter_context(process)
        wait_for_encoder(process.base_url, key)
        yield Server(process.base_url, f"agent_memory-{model}", key, calls)


def wait_for_encoder(base_url: str, key: str, timeout_s: float = 120) -> str:
    """Wait until the server's encoder is loaded, or cannot be; return its state."""
    deadline = time.monotonic() + timeout_s
    state = "loading"
    while state == "loading" and time.monotonic() < deadline:
        response = httpx.get(f"{base_url}/agent_memory/stats", headers={"Authorization": f"Bearer {key}"}, timeout=30)
        response.raise_for_status()
        state = str(response.json()["encoder"])
        time.sleep(0.1)
    return state


def probability(upstream: str) -> float:
    """Return the P of `random:P`. Raises InvalidField."""
    try:
        share = float(upstream.partition(":")[2])
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InvalidField("--upstream", f"{upstream!r}: give a probability from 0 to 1, as in random:0.7")
    return share


def oracle(share: float, tasks: Sequence[Task], seed: int) -> Callable[[Mapping[str, Any]], str]:
    """Return an upstream that returns the right answer with this probability, else another label."""
    answers = {task.input: task.output for task in tasks}
    labels = sorted(set(answers.values()))
    chance = random.Random(seed)

    def reply(request: Mapping[str, Any]) -> str:
        right = answers.get(str(request["messages"][-1]["content"]), labels[0])
        if chance.random() < share or len(labels) == 1:
            return right
        return chance.choice([label for label in labels if label != right])

    return reply
