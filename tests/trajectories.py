"""What the tests of procedures share: an agent with tools that serves customers, and what memory learned of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from builders import assistant, response

from optillm_memory import Memory, MemoryRecord, Turn

JSON = dict[str, Any]
POLICY = {"role": "system", "content": "You serve the customers of a shop. Ask before you change anything."}
WISH = (
    "Hello, I have changed my mind and would like to cancel the order {order} that I placed with your shop yesterday, "
    "please, and get my money back for all of the items in it. My user id is {name}."
)
NAMES = (
    *("get_user", "get_order", "cancel_order", "think", "execute_sql", "submit", "get_product", "exchange_item"),
    *("book_flight",),
)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in NAMES]


def user(text: Any) -> JSON:
    """Return a user message."""
    return {"role": "user", "content": text}


@dataclass
class Dialogue:
    """A conversation of the agent, in process: every request goes through begin and finish, as a client sends it."""

    memory: Memory
    options: JSON = field(default_factory=dict)
    fields: JSON = field(default_factory=dict)
    keywords: JSON = field(default_factory=dict)
    messages: list[JSON] = field(default_factory=lambda: [POLICY])
    turns: list[Turn] = field(default_factory=list)

    def ask(self, text: Any) -> Turn:
        """Let the user write, and begin the request."""
        self.messages.append(user(text))
        return self.begin()

    def begin(self) -> Turn:
        """Begin a request with the conversation as it is."""
        body = {"model": "m", "messages": list(self.messages), "tools": TOOLS, **self.fields}
        if self.options:
            body["agent_memory"] = self.options
        return self.memory.begin(body, **self.keywords)

    def answer(self, message: str | JSON, turn: Turn | None = None) -> Turn:
        """Answer a request, by default a new one, to its end."""
        made = assistant(message) if isinstance(message, str) else message
        turn = turn or self.begin()
        self.memory.finish(turn, response(made))
        self.memory.store.flush()
        self.messages.append(made)
        self.turns.append(turn)
        return turn

    def act(self, tool: str, arguments: Any, observation: Any = "ok", turn: Turn | None = None) -> Turn:
        """Answer with a call, and take its result."""
        given = arguments if isinstance(arguments, str) else json.dumps(arguments)
        call_id = f"call_{len(self.turns)}_{id(self):016x}"
        call = {"id": call_id, "type": "function", "function": {"name": tool, "arguments": given}}
        turn = self.answer({"role": "assistant", "content": None, "tool_calls": [call]}, turn)
        shown = observation if isinstance(observation, str) else json.dumps(observation)
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": shown})
        return turn

    def judge(self, value: Any = True, *, by: str = "episode", source: str = "code", **said: Any) -> str:
        """Say how it went: of the whole episode, or of its last answer; return the feedback's status."""
        last = self.turns[-1]
        named = {"episode_id": last.episode_id} if by == "episode" else {"trace_id": last.trace_id}
        given = {**named, "metric": "success", "value": value, "source": source, **said}
        return self.memory.feedback(given, **scope_of(self))[0].status


def scope_of(dialogue: Dialogue) -> JSON:
    """Return the keyword with which feedback names a dialogue's scope."""
    return {"scope": dialogue.turns[-1].scope}


def cancelling(
    memory: Memory, name: str, order: str, *, judged: Any = True, asked: str = "", **keywords: Any
) -> Dialogue:
    """Let a customer have an order cancelled, and say how it went where that is known."""
    talk = Dialogue(memory, **keywords)
    turn = talk.ask(asked or WISH.format(name=name, order=order))
    talk.act("get_user", {"user_id": name}, {"name": {"first": name.title()}, "orders": [order, "#W0000001"]}, turn)
    talk.act(
        "get_order", {"order_id": order}, {"order_id": order, "status": "pending", "paid_with": f"card_{order[2:]}"}
    )
    talk.answer(f"Shall I cancel {order}?")
    turn = talk.ask("yes, do it")
    talk.act("cancel_order", {"order_id": order, "refund_to": f"card_{order[2:]}"}, {"status": "cancelled"}, turn)
    talk.answer(f"Order {order} is cancelled.")
    if judged is not None:
        talk.judge(judged)
    return talk


def warm(memory: Memory, **keywords: Any) -> None:
    """Have the goals of all solved episodes encoded: the first request after they were learned asks for that."""
    memory.settle()
    for _ in range(2):
        Dialogue(memory, **keywords).ask("Something else entirely, in many other words")
        memory.encoder.encode(["the last in the queue"])


def procedures(memory: Memory, *statuses: str) -> list[MemoryRecord]:
    """Return the procedures that are known, in order of their age: those that are verified, unless others are named."""
    memory.settle()
    found = memory.store.list_memories(None, limit=1_000)
    wanted = statuses or ("verified",)
    return sorted((m for m in found if m.kind == "procedure" and m.status in wanted), key=lambda m: m.created_at)


def tools_of(record: MemoryRecord) -> list[str]:
    """Return the tools of a procedure, questions as `?`."""
    return [step[0] or "?" for step in json.loads(record.answer)["steps"]]


def block_in(messages: Sequence[JSON]) -> str:
    """Return the block that memory inserted, empty without one."""
    found = [m["content"] for m in messages if "<agent_memory" in str(m.get("content"))]
    return str(found[-1]).partition("<agent_memory")[2] if found else ""
