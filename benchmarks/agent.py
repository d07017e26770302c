"""`python -m benchmarks agent`: a scripted agent does real tasks, and again after a restart, with and without memory.

The upstream plays the LLM with the policy in `agent_policy.py`, which sees only its prompt. The client is an ordinary
agent's loop over the OpenAI client; a check of the finished sandbox gives the feedback on the episode, as CI would.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from benchmarks.agent_figures import Episode, Pass, figures
from benchmarks.agent_policy import AgentTask, Call, decide, failed_in, filled, goals_of
from benchmarks.agent_sandbox import TOOLS, Sandbox, missing
from benchmarks.agent_tasks import TASKS
from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.errors import HostError
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream, Reply, tool_call

MODEL, KEY, NAMESPACE = "agent_memory-scripted", "bench-agent", "bench-agent"
SYSTEM = "You work in a folder of your own with the tools given. Do what is asked, then say that you are done."
MOST_REQUESTS = 20


def scripted(request: dict[str, Any]) -> Reply:
    """Answer as the policy decides from this one request; only the call's id is random."""
    decision = decide(request.get("messages") or [], request.get("tools") or [], TASKS)
    if isinstance(decision, str):
        return Reply(content=decision)
    call = tool_call(decision.tool, decision.arguments, f"call_{uuid.uuid4().hex}")
    return Reply(content=None, tool_calls=[call])


def run(
    tasks: Sequence[AgentTask] = TASKS,
    *,
    seed: int = 0,
    share: float = 0.5,
    env: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _text: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Do the tasks three times and return the figures: at first, again after a restart, and again with a holdout.

    The third run starts from a copy of the database after the first run, with this share of episodes held out.
    Raises HostError if a program that the tasks need is missing.
    """
    if lacking := missing():
        raise HostError(f"the agent's tasks need {' and '.join(lacking)} on the path")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optillm-memory-bench-")))
        upstream = stack.enter_context(RecordingUpstream(scripted))
        bench = _Bench(folder, upstream, env or {}, tick)
        say("pass 1: an empty memory")
        first = bench.once(_shuffled(tasks, seed), folder / "memory.db", share=0.0)
        copy = folder / "copy"
        copy.mkdir()
        for file in folder.glob("memory.db*"):
            shutil.copy(file, copy)
        say("pass 2: a new process on the same database")
        second = bench.once(_shuffled(tasks, seed + 1), folder / "memory.db", share=0.0, again=True)
        say("pass 2 with a holdout, from a copy of the database after pass 1")
        third = bench.once(_shuffled(tasks, seed + 1), copy / "memory.db", share=share, again=True)
    return figures(first, second, third, share=share)


def _shuffled(tasks: Sequence[AgentTask], seed: int) -> list[AgentTask]:
    return random.Random(seed).sample(list(tasks), len(tasks))


class _Bench:
    """The parts that the passes share."""

    def __init__(
        self, folder: Path, upstream: RecordingUpstream, env: Mapping[str, str], tick: Callable[[], None]
    ) -> None:
        self._folder, self._upstream, self._env, self._tick = folder, upstream, env, tick

    def once(self, tasks: Sequence[AgentTask], db: Path, *, share: float, again: bool = False) -> Pass:
        """Start a server on a database, do the tasks, stop the server."""
        env = {"OPTILLM_AGENT_MEMORY_ENCODER": "hashing", **self._env, "OPTILLM_AGENT_MEMORY_HOLDOUT": str(share)}
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(HostProcess.serve(self._upstream.base_url, db=db, env=env))
            wait_for_encoder(server.base_url, KEY)
            client = stack.enter_context(OpenAI(base_url=server.base_url, api_key=KEY, max_retries=0, timeout=120))
            headers = {"Authorization": f"Bearer {KEY}", "X-Agent-Memory-Namespace": NAMESPACE}
            routes = stack.enter_context(
                httpx.Client(base_url=f"{server.base_url}/agent_memory", headers=headers, timeout=60, trust_env=False)
            )
            self._upstream.clear()
            started = time.perf_counter()
            episodes = []
            for task in tasks:
                with _fresh(self._folder) as sandbox:
                    episodes.append(do(task, sandbox, client, routes, again=again))
                self._tick()
            return Pass(episodes, len(self._upstream.requests), time.perf_counter() - started)


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Sandbox]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="sandbox-", ignore_cleanup_errors=True) as name:
        yield Sandbox(Path(name))


def do(task: AgentTask, sandbox: Sandbox, client: OpenAI, routes: httpx.Client, *, again: bool) -> Episode:
    """Do one task as an agent does: ask, execute the call, send the result, until the answer is a text.

    Then the check is run and its result posted as feedback on the episode. `again` selects the names of pass 2.
    """
    names = task.names[-1] if again else task.names[0]
    sandbox.prepare(filled(task.setup, names) or ":")
    episode = Episode(task.name, renamed=again and len(task.names) > 1)
    kinds = _kinds(task, names)
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": filled(task.asks, names)},
    ]
    metadata: dict[str, Any] = {}
    for _ in range(MOST_REQUESTS):
        completion = client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, extra_body={"agent_memory": {"namespace": NAMESPACE}}
        )
        metadata = (completion.model_extra or {})["agent_memory"]
        _count(episode, metadata)
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for made in message.tool_calls:
            if made.type != "function":
                continue
            call = Call(made.function.name, _arguments(made.function.arguments))
            observation = sandbox.run(call)
            messages.append({"role": "tool", "tool_call_id": made.id, "content": observation})
            episode.steps += 1
            if failed_in(observation):
                kind = kinds.get(call.same)
                episode.advised_failed += kind is None
                episode.failed.append(kind or f"{task.name} advised {call.text.strip()}")
    episode.solved = sandbox.solved(filled(task.check, names))
    feedback = {"episode_id": metadata["episode_id"], "metric": "success", "value": episode.solved, "source": "code"}
    routes.post("/feedback", json=feedback).raise_for_status()
    # The response has `holdout` only if there was something to inject; the trace has the assignment itself.
    trace = routes.get(f"/traces/{metadata['trace_id']}")
    trace.raise_for_status()
    episode.held_out = bool(trace.json()["held_out"])
    return episode


def _kinds(task: AgentTask, names: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Return a name for the failure of each candidate call, independent of the task's names."""
    return {
        call.same: f"{task.name} {number}.{index}"
        for number, goal in enumerate(goals_of(task, names))
        for index, call in enumerate(goal)
    }


def _arguments(text: str) -> dict[str, str]:
    given = json.loads(text)
    return {str(k): str(v) for k, v in given.items()}


def _count(episode: Episode, metadata: Mapping[str, Any]) -> None:
    extra = int(metadata.get("extra_calls") or 0)
    episode.llm_calls += 1 + extra
    episode.extra_llm_calls += extra
    episode.actions[str(metadata["action"])] += 1
    episode.advice |= {str(item["memory_id"]) for item in metadata["injected"] if item["kind"] in ("fix", "failure")}
    episode.skipped.update(str(item["reason"]) for item in metadata["skipped"])
