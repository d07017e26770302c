"""One episode: the agent's loop over a task, with or without memory, and what is counted of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.agent_policy import Call
from benchmarks.multistep.policy import Agent
from benchmarks.multistep.task import Task
from benchmarks.multistep.world import UNCHANGED, Change, World, has_failed
from optillm_memory.conversation.options import FIELD
from optillm_memory.inject.render import estimate_tokens
from optillm_memory.memory import Memory
from optillm_memory.request.turn import Turn

MODEL, MOST_REQUESTS = "scripted", 60


@dataclass(frozen=True, slots=True)
class Served:
    """An action that memory served: when it was made, whether it failed, and whether its tool was offered."""

    step: int
    call: Call
    failed: bool
    offered: bool
    again: bool


@dataclass
class Course:
    """What is counted of one episode.

    `steps` are calls and questions. `prompt_tokens` are those of the client's messages over all calls of the LLM,
    `injected` what memory put in anew and `repeated` what stood there from earlier requests. `mismatch` is the step
    whose observation first differed in shape from that of an unchanged environment.
    """

    task: Task
    steps: int = 0
    llm_calls: int = 0
    extra_llm_calls: int = 0
    solved: bool = False
    held_out: bool = False
    mismatch: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    injected: int = 0
    repeated: int = 0
    procedures: int = 0
    served_answers: int = 0
    served: list[Served] = field(default_factory=list)
    worked: list[Call] = field(default_factory=list)

    @property
    def served_after_mismatch(self) -> list[Served]:
        """The actions that memory served after the first observation of another shape."""
        return [s for s in self.served if self.mismatch is not None and s.step > self.mismatch]


def run_episode(
    task: Task,
    agent: Agent,
    memory: Memory | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    change: Change = UNCHANGED,
) -> Course:
    """Do a task as an agent does, and report the outcome of the check as feedback.

    Without memory the agent's own requests are answered by itself alone. `options` are the request's `agent_memory`.
    """
    course = Course(task)
    world, twin = task.world(change), task.world()
    loop = _Loop(course, world, twin, agent, memory, options or {})
    answer = loop.run()
    course.solved = task.solved(world, answer)
    if memory is not None and loop.turn is not None and loop.turn.options.writes:
        memory.feedback(
            {"episode_id": loop.turn.episode_id, "metric": "success", "value": course.solved, "source": "code"}
        )
    return course


class _Loop:
    """The parts of one episode."""

    def __init__(
        self, course: Course, world: World, twin: World, agent: Agent, memory: Memory | None, options: Mapping[str, Any]
    ) -> None:
        self.course, self.world, self.twin, self.agent, self.memory, self.options = (
            course, world, twin, agent, memory, options,
        )  # fmt: skip
        self.turn: Turn | None = None
        domain = course.task.family.domain
        self.messages: list[dict[str, Any]] = [
            {"role": "system", "content": domain.system},
            {"role": "user", "content": course.task.asked},
        ]

    def run(self) -> str:
        """Return the last answer."""
        for _ in range(MOST_REQUESTS):
            message, served = self._answered()
            self.messages.append(message)
            if calls := message.get("tool_calls"):
                for made in calls:
                    self._execute(made, served=served)
                if self.world.submitted is not None:
                    return ""
                continue
            text = str(message.get("content") or "")
            self.course.served_answers += served
            if not text.endswith("?"):
                return text
            self.course.steps += 1
            self.twin.answer(text)
            self.messages.append({"role": "user", "content": self.world.answer(text)})
        return ""

    def _answered(self) -> tuple[dict[str, Any], bool]:
        """Return the next message, and whether memory served it."""
        body = {"model": MODEL, "messages": list(self.messages), "tools": self.world.definitions}
        if self.memory is None:
            return self._asked(self.messages), False
        turn = self.turn = self.memory.begin({**body, FIELD: dict(self.options)})
        self.course.held_out |= turn.held_out
        if turn.action == "reuse":
            completion = turn.reused()
            self.memory.finish(turn, completion)
            return {k: v for k, v in completion["choices"][0]["message"].items() if v is not None}, True
        self._count(turn)
        message = self._asked(turn.messages)
        turn, message = self._guarded(turn, message)
        self.memory.finish(turn, _completion(message))
        return message, False

    def _guarded(self, turn: Turn, message: dict[str, Any]) -> tuple[Turn, dict[str, Any]]:
        """Ask once more where the guard wants it, as the host does."""
        assert self.memory is not None
        before, (turn, again) = turn, self.memory.guard(turn, _completion(message))
        if not again:
            return turn, message
        self.course.extra_llm_calls += 1
        self._count(turn, before)
        second = self._asked(turn.messages)
        accepted = self.memory.guarded(turn, _completion(second))
        return replace(turn if accepted else before, extra_calls=1), second if accepted else message

    def _asked(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        decision = self.agent.decide(messages, self.world.definitions)
        self.course.llm_calls += 1
        self.course.prompt_tokens += sum(estimate_tokens(json.dumps(m)) for m in self.messages)
        message: dict[str, Any]
        if isinstance(decision, str):
            message = {"role": "assistant", "content": decision}
        else:
            function = {"name": decision.tool, "arguments": json.dumps(dict(decision.arguments))}
            call = {"id": f"call_{len(self.messages):024d}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        self.course.completion_tokens += estimate_tokens(json.dumps(message))
        return message

    def _count(self, turn: Turn, before: Turn | None = None) -> None:
        """Count what of a prompt is memory's; `before` is the same request as it was asked already."""
        counted = {item.memory_id for p in before.fresh for item in p.items} if before else set()
        items = [item for placement in turn.placements for item in placement.items]
        fresh = [item for placement in turn.fresh for item in placement.items if item.memory_id not in counted]
        new = sum(item.tokens for item in fresh)
        self.course.injected += new
        self.course.repeated += sum(item.tokens for item in items) - new
        self.course.procedures += sum(item.kind == "procedure" for item in fresh)

    def _execute(self, made: Mapping[str, Any], *, served: bool) -> None:
        course, function = self.course, made["function"]
        call = Call(str(function["name"]), {str(k): str(v) for k, v in json.loads(function["arguments"]).items()})
        again = call.same in {worked.same for worked in course.worked}
        offered = call.tool in {d["function"]["name"] for d in self.world.definitions}
        observation = self.world.call(call.tool, call.arguments)
        expected = self.twin.call(self.world.known(call.tool), call.arguments)
        failed = has_failed(observation)
        is_gone = bool(self.world.gone) and self.world.gone in call.arguments.values()
        if course.mismatch is None and (is_gone or _shape(observation) != _shape(expected)):
            course.mismatch = course.steps
        if not failed:
            course.worked.append(call)
        if served:
            course.served.append(Served(course.steps, call, failed, offered, again))
        course.steps += 1
        self.messages.append({"role": "tool", "tool_call_id": made["id"], "content": observation})


def _completion(message: Mapping[str, Any]) -> dict[str, Any]:
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    return {"choices": [{"index": 0, "message": dict(message), "finish_reason": reason}]}


def _shape(observation: str) -> object:
    """Return what an observation is like: why it was refused, the keys of its JSON, and the columns of a table."""
    if has_failed(observation):
        return observation
    try:
        shown = json.loads(observation)
    except ValueError:
        return "text"
    return (sorted(shown), shown.get("columns")) if isinstance(shown, dict) else type(shown).__name__
