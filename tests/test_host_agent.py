"""A real agent loop: the real OpenAI client, a real optillm, real commands; the upstream plays a model that errs."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hosting import BOTH_LANES, JSON, MODEL, Host, served

from optillm_memory.testing.upstream import Answer, RecordingUpstream, Reply, tool_call

pytestmark = pytest.mark.host
LANES = BOTH_LANES

BLOCK, SUGGESTED = "<agent_memory", "what worked instead"
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]
FUNCTIONS = [{"name": "bash", "parameters": {"type": "object", "properties": {}}}]
KEY = "alice"
WRONG, RIGHT = "mkdir out/x", "mkdir -p out/x"
# The first fails by the state of the folder, which is another one elsewhere; this one by the action itself.
FAULTY, SOUND = "touch --quick out/x/f", "touch out/x/f"
FIRST = ["pwd", "echo one > a.txt", "cp a.txt b.txt", WRONG, RIGHT, FAULTY, SOUND, "mv b.txt out/x", "rm a.txt"]
OTHER_WRONG, OTHER_RIGHT = "mkdir build/deep/dir", "mkdir -p build/deep/dir"
OTHER = ["date", "echo two > z.txt", "cp z.txt y.txt", OTHER_WRONG, "touch q", "mv y.txt q", "rm q", "rm z.txt"]
# Tasks that have nothing in common: what is told here is told of actions.
TASKS = {"one": "Prepare a release.", "two": "Sort holiday photographs", "three": "Translate my letters"}


@dataclass
class Model:
    """A model that acts by a plan, one command a request, unless memory tells it of a better one."""

    plan: Sequence[str]
    way: str = "tools"
    stubborn: bool = False

    def __call__(self, request: JSON) -> Answer:
        """Answer with the command that is due."""
        messages = request["messages"]
        number = sum(m["role"] == "assistant" for m in messages)
        told = suggestion(messages[-1])
        if number == len(self.plan):
            return "Finished."
        command = told if told and not self.stubborn else self.plan[number]
        if self.way == "text":
            return f"Step {number}.\n```bash\n{command}\n```"
        if self.way == "tools":
            return Reply(content=None, tool_calls=[tool_call("bash", {"command": command}, f"call_{number}")])
        called = {"name": "bash", "arguments": json.dumps({"command": command})}
        message = {"role": "assistant", "content": None, "function_call": called}
        return {
            "id": "x", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "function_call"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }  # fmt: skip


def suggestion(message: Mapping[str, Any]) -> str | None:
    """Return the action that a message's block proposes."""
    lines = str(message["content"]).rpartition(BLOCK)[2].splitlines()
    return next((after[2:] for line, after in itertools.pairwise(lines) if SUGGESTED in line), None)


@dataclass
class Run:
    """One episode as the client saw it: its messages, commands, metadata and trace ids; and what went upstream."""

    messages: list[JSON]
    commands: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    metadata: list[JSON] = field(default_factory=list)
    usage: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    prompts: list[list[list[JSON]]] = field(default_factory=list)

    def kept(self, *, first: bool = False) -> list[list[JSON]]:
        """Return the prompt of each request whose answer went out: the last one, unless the first was kept."""
        return [prompts[0 if first else -1] for prompts in self.prompts]


def run(host: Host, folder: Path, model: Model, memory: JSON, *, stream: bool = False, limit: int = 12) -> Run:
    """Let an agent work in a folder until the model is done."""
    folder.mkdir(parents=True, exist_ok=True)
    host.upstream.reply = model
    task = TASKS.get(folder.name, folder.name)
    done = Run([{"role": "system", "content": "Act."}, {"role": "user", "content": task}])
    offered: JSON = (
        {"tools": TOOLS} if model.way == "tools" else {"functions": FUNCTIONS} if model.way == "functions" else {}
    )
    with host.openai(key=KEY) as client:
        for _ in range(limit):
            host.upstream.clear()
            sent: Any = done.messages
            made = client.chat.completions.with_raw_response.create(
                model=MODEL, messages=sent, stream=stream, extra_body={"agent_memory": memory}, **offered
            )
            message = streamed(done, made) if stream else whole(done, made)
            done.prompts.append([request["messages"] for request in host.sent])
            done.messages.append(message)
            command = command_of(message, model.way)
            if command is None:
                return done
            ran = subprocess.run(
                command,
                shell=True,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
                env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
            )
            output = f"{ran.stdout}{ran.stderr}\nExit code: {ran.returncode}"
            done.commands.append(command)
            done.outputs.append(output)
            done.messages.append(observation(message, output, model.way))
    raise AssertionError("the agent does not come to an end")


def whole(done: Run, made: Any) -> JSON:
    """Note a completion; return its message as a client sends it back."""
    completion = made.parse()
    done.metadata.append((completion.model_extra or {}).get("agent_memory") or {})
    done.ids.append(completion.id)
    done.usage.append(completion.usage.total_tokens)
    message: JSON = completion.choices[0].message.model_dump(exclude_none=True)
    return {"content": None, **message}


def streamed(done: Run, made: Any) -> JSON:
    """Put a streamed completion together; return its message as a client sends it back."""
    text = ""
    calls: dict[int, JSON] = {}
    for chunk in made.parse():
        for choice in chunk.choices:
            text += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                kept = calls.setdefault(
                    part.index, {"id": part.id, "type": "function", "function": {"name": "", "arguments": ""}}
                )
                kept["function"]["name"] += part.function.name or ""
                kept["function"]["arguments"] += part.function.arguments or ""
    done.metadata.append({"action": made.headers["X-Agent-Memory-Action"]})
    done.ids.append(made.headers["X-Agent-Memory-Trace-Id"])
    message: JSON = {"role": "assistant", "content": text or None}
    return {**message, "tool_calls": list(calls.values())} if calls else message


def command_of(message: JSON, way: str) -> str | None:
    """Return the command that an answer asks for."""
    if way == "text":
        return message["content"].split("```bash\n")[1].split("\n```")[0] if "```" in message["content"] else None
    called = message.get("function_call") or (message.get("tool_calls") or [{}])[0].get("function")
    return str(json.loads(called["arguments"])["command"]) if called else None


def observation(message: JSON, output: str, way: str) -> JSON:
    """Return the message that shows an output to the model."""
    if way == "text":
        return {"role": "user", "content": f"Observation:\n{output}"}
    if way == "functions":
        return {"role": "function", "name": "bash", "content": output}
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": output}


def told_at(done: Run) -> list[int]:
    """Return the places of the messages that hold a block in the last prompt."""
    return [i for i, m in enumerate(done.kept()[-1]) if BLOCK in str(m["content"])]


def assert_stable(prompts: Sequence[list[JSON]]) -> None:
    """Each prompt starts, byte for byte, with all of the one before it."""
    for before, after in itertools.pairwise(prompts):
        assert len(after) == len(before) + 2
        assert json.dumps(after[: len(before)]) == json.dumps(before)


def praise(host: Host, done: Run) -> None:
    """Say that code found the episode's end right."""
    said = {"trace_id": done.ids[-1], "metric": "success", "value": True, "source": "code"}
    assert host.tell(said, key=KEY)["status"] == "applied"


def first_episode(host: Host, folder: Path, memory: JSON, way: str = "tools", **options: Any) -> Run:
    """Let an agent fail, find out what works, and be praised for it."""
    done = run(host, folder, Model(FIRST, way), memory, **options)
    assert done.commands == FIRST
    assert len(done.prompts) == 10
    assert "No such file" in done.outputs[3]
    assert "unrecognized option" in done.outputs[5]
    assert BLOCK not in json.dumps(done.prompts)
    praise(host, done)
    return done


# -- across processes ------------------------------------------------------------------------------


def test_a_fix_learned_in_one_process_is_told_in_another_at_the_error(
    upstream: RecordingUpstream, db: Path, tmp_path: Path
) -> None:
    """An agent of the next process that errs with other names is told what works; one that repeats is stopped."""
    memory = {"namespace": "across"}
    with served(upstream, db) as host:
        first_episode(host, tmp_path / "one", memory)
    with served(upstream, db) as host:
        done = run(host, tmp_path / "two", Model(OTHER), memory)
        assert len(done.prompts) == 9
        assert done.commands[3:5] == [OTHER_WRONG, OTHER_RIGHT]
        assert (tmp_path / "two/build/deep/dir").is_dir()
        told = done.prompts[4][0][-1]
        assert told["role"] == "tool"
        assert told["content"].startswith(done.outputs[3] + "\n\n" + BLOCK)
        assert suggestion(told) == OTHER_RIGHT
        assert BLOCK not in json.dumps(done.prompts[:4])
        assert [m["action"] for m in done.metadata] == ["plain"] * 4 + ["inject"] * 5
        assert [i.get("suggestion") for i in done.metadata[4]["injected"]] == [OTHER_RIGHT]
        assert told_at(done) == [len(done.prompts[4][0]) - 1]
        assert_stable(done.kept())
        assert all(len(prompts) == 1 for prompts in done.prompts)

        guarded = run(host, tmp_path / "three", Model(FIRST), memory)
        asked_twice = [n for n, prompts in enumerate(guarded.prompts) if len(prompts) == 2]
        assert asked_twice == [5]
        plain, advised = guarded.prompts[5]
        assert plain == [*advised[:-1], plain[-1]]
        assert BLOCK not in json.dumps(plain[-1])
        assert advised[-1]["content"].startswith(plain[-1]["content"])
        assert suggestion(advised[-1]) == SOUND
        assert guarded.commands[3:6] == [WRONG, RIGHT, SOUND]
        assert FAULTY not in guarded.commands
        assert guarded.outputs[5] == "\nExit code: 0"
        assert [m.get("extra_calls", 0) for m in guarded.metadata] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
        assert guarded.usage[5] > guarded.usage[4] * 1.5
        assert_stable(guarded.kept())
        host.settle()
        assert host.get("stats", key=None)["extra_llm_calls"] == 1
        assert host.get(f"traces/{guarded.ids[5]}", key=KEY)["extra_calls"] == 1


# -- every way to act ------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "stream"), [("tools", True), ("functions", False), ("text", False), ("text", True)])
def test_the_loop_holds_for_every_way_to_act(
    host: Host, namespace: dict[str, str], tmp_path: Path, way: str, *, stream: bool
) -> None:
    """Streamed tool calls, legacy function calls and commands in the text learn, are told and are stopped alike."""
    first_episode(host, tmp_path / "one", namespace, way, stream=stream)
    done = run(host, tmp_path / "two", Model(OTHER, way), namespace, stream=stream)
    assert done.commands[3:5] == [OTHER_WRONG, OTHER_RIGHT]
    assert suggestion(done.prompts[4][0][-1]) == OTHER_RIGHT
    assert told_at(done) == [len(done.prompts[4][0]) - 1]
    assert_stable(done.kept())
    guarded = run(host, tmp_path / "three", Model(FIRST, way), namespace, stream=stream)
    if host.is_direct and stream and way == "text":  # words have gone out before they can be looked at
        assert all(len(prompts) == 1 for prompts in guarded.prompts)
        return
    assert [n for n, prompts in enumerate(guarded.prompts) if len(prompts) == 2] == [5]
    assert guarded.commands[5] == SOUND
    assert_stable(guarded.kept())
    assert guarded.metadata[5]["action"] == "inject"


def test_a_model_that_does_not_listen_costs_one_call_a_request(
    host: Host, namespace: dict[str, str], tmp_path: Path
) -> None:
    """Where the second answer repeats the failure the first goes out, and later prompts hold nothing of it."""
    first_episode(host, tmp_path / "one", namespace)
    plan = ["pwd", "date", FAULTY, FAULTY, "ls -la", "id", "pwd", RIGHT]
    done = run(host, tmp_path / "two", Model(plan, stubborn=True), namespace)
    assert done.commands == plan
    assert [len(prompts) for prompts in done.prompts] == [1, 1, 2, 2, 1, 1, 1, 1, 1]
    first_answers = done.kept(first=True)
    assert BLOCK not in json.dumps(first_answers[:3])
    assert_stable(first_answers)
    assert [m.get("extra_calls", 0) for m in done.metadata][2:5] == [1, 1, 0]


def test_off_is_off(host: Host, namespace: dict[str, str], tmp_path: Path) -> None:
    """With mode `off` or `write` nothing is added and nothing is asked twice, whatever is known."""
    first_episode(host, tmp_path / "one", namespace)
    for mode in ("off", "write"):
        done = run(host, tmp_path / mode, Model(FIRST), {**namespace, "mode": mode})
        assert done.commands == FIRST
        assert [len(prompts) for prompts in done.prompts] == [1] * 10
        assert done.kept()[-1] == done.messages[:-1]
        assert_stable(done.kept())


@pytest.mark.parametrize(
    ("env", "action"),
    [({"OPTILLM_AGENT_MEMORY_GUARD": "off"}, "inject"), ({"OPTILLM_AGENT_MEMORY_HOLDOUT": "1"}, "holdout")],
)
def test_without_the_guard_and_held_out(
    upstream: RecordingUpstream, db: Path, tmp_path: Path, env: dict[str, str], action: str
) -> None:
    """With the guard off no request is asked twice; a held-out episode gets nothing at all, and is marked as such."""
    memory = {"namespace": "apart"}
    with served(upstream, db, env=env) as host:
        first_episode(host, tmp_path / "one", memory)
        done = run(host, tmp_path / "two", Model(FIRST), memory)
        assert (done.commands[3], done.commands[5]) == (WRONG, FAULTY)
        assert [len(prompts) for prompts in done.prompts] == [1] * 10
        assert done.metadata[5]["action"] == action
        if action == "holdout":
            assert done.metadata[4]["action"] == "holdout"
            assert BLOCK not in json.dumps(done.prompts)
            assert done.kept()[-1] == done.messages[:-1]
        else:
            assert suggestion(done.prompts[4][0][-1]) == RIGHT
