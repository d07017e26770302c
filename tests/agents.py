"""What the tests of steps, fixes and the guard share: an agent that acts through a memory, and what its tools print."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from builders import NOW, assistant, response

from optillm_memory import Memory, Turn
from optillm_memory.conversation.actions import Action
from optillm_memory.learn.attempts import Attempt
from optillm_memory.records import Verdict

JSON = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]
DONE = "Everything up-to-date\nExit code: 0"


def mistyped(word: str, meant: str) -> str:
    """Return what git prints of a command that it does not know."""
    return (
        f"git: '{word}' is not a git command. See 'git --help'.\n\nThe most similar command is\n\t{meant}\nExit code: 1"
    )


WRONG, RIGHT = "git pussh origin main", "git push origin main"
ERROR = mistyped("pussh", "push")


def call(command: str | Mapping[str, Any], call_id: str = "", tool: str = "bash") -> JSON:
    """Return one tool call; a text stands for a command."""
    arguments = {"command": command} if isinstance(command, str) else dict(command)
    made = call_id or f"call_{uuid.uuid4().hex}"
    return {"id": made, "type": "function", "function": {"name": tool, "arguments": json.dumps(arguments)}}


def calling(*commands: str | Mapping[str, Any]) -> JSON:
    """Return an answer that asks for commands; whole calls are taken as they are."""
    calls = [dict(c) if isinstance(c, Mapping) and "function" in c else call(c) for c in commands]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str, content: Any) -> JSON:
    """Return a tool's result."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def results(answer: Mapping[str, Any], *contents: Any) -> list[JSON]:
    """Return the results of an answer's calls."""
    return [result(c["id"], text) for c, text in zip(answer["tool_calls"], contents, strict=True)]


@dataclass
class Agent:
    """An agent that keeps its conversation, in process: every request goes through begin, guard and finish."""

    memory: Memory
    task: str = "carry on with the work"
    keywords: JSON = field(default_factory=dict)
    options: JSON = field(default_factory=dict)
    messages: list[JSON] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    prompts: list[list[JSON]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start with the system prompt and the task."""
        self.messages = self.messages or [
            {"role": "system", "content": "You act."},
            {"role": "user", "content": self.task},
        ]

    def body(self) -> JSON:
        """Return the next request."""
        given = {"agent_memory": self.options} if self.options else {}
        return {"model": "m", "messages": list(self.messages), "tools": TOOLS, **given}

    def begin(self) -> Turn:
        """Begin the next request."""
        return self.memory.begin(self.body(), **self.keywords)

    def answered(self, message: JSON, turn: Turn | None = None) -> Turn:
        """Take a request to its end with this answer, as it is, and keep the answer."""
        turn = turn or self.begin()
        self.memory.finish(turn, response(message))
        self.memory.store.flush()
        self.turns.append(turn)
        self.prompts.append(turn.messages)
        self.messages.append(message)
        return turn

    def act(self, command: str | Mapping[str, Any], output: Any, **named: Any) -> Turn:
        """Ask for a command and take its output."""
        message = calling(call(command, **named))
        turn = self.answered(message)
        self.messages += results(message, output)
        return turn

    def close(self, text: str = "It is done.", *, success: bool | None = None, **said: Any) -> Turn:
        """End with words, and say how the episode went where that is known."""
        turn = self.answered(assistant(text))
        if success is not None:
            judge(self.memory, turn, success=success, **said)
        return turn


def judge(memory: Memory, turn: Turn, *, success: Any = True, **said: Any) -> None:
    """Say how a trace went: by default that code checked it."""
    given = {"trace_id": turn.trace_id, "metric": "success", "value": success, "source": "code", **said}
    assert memory.feedback(given)[0].status in ("applied", "retracted")


def work(
    memory: Memory,
    script: Sequence[tuple[str | Mapping[str, Any], Any]],
    *,
    success: bool | None = None,
    task: str = "publish the branch",
    keywords: JSON | None = None,
    **options: Any,
) -> Agent:
    """Run a whole episode: commands with their outputs, a last word, and whether it went well."""
    agent = Agent(memory, task, keywords or {}, options)
    for command, output in script:
        agent.act(command, output)
    agent.close(success=success)
    return agent


def mend(memory: Memory, *, success: bool | None = True, **options: Any) -> Agent:
    """Let an episode mistype `git push` and put it right."""
    return work(memory, [(WRONG, ERROR), (RIGHT, DONE)], success=success, **options)


def attempt(text: str, verdict: Verdict = "unknown", **fields: Any) -> Attempt:
    """Return an attempt by a shell; its id is its command unless one is given."""
    step_id = str(fields.pop("step_id", text))
    action = Action(str(fields.pop("tool", "bash")), str(fields.pop("field", "command")), text)
    given = {
        "parent_id": "", "trace_id": f"t-{step_id}", "output": f"the output of {text}", "basis": "exit_code",
        "signature": "sig" if verdict == "failure" else "", "message": "", "at": NOW, **fields,
    }  # fmt: skip
    return Attempt(step_id=step_id, action=action, verdict=verdict, **given)


def chain(*attempts: Attempt) -> list[Attempt]:
    """Return the attempts as the steps of one branch, in order."""
    made: list[Attempt] = []
    for item in attempts:
        made.append(replace(item, parent_id=made[-1].step_id if made else ""))
    return made


def fixes(memory: Memory) -> list[tuple[str, str, str]]:
    """Return (failing action, what worked, status) of the fixes that are known, withdrawn ones left out."""
    found = memory.store.list_memories(None, limit=1000)
    return sorted((m.task, m.answer, m.status) for m in found if m.kind == "fix" and m.status != "withdrawn")
