"""What the tests of served actions share: an agent that looks up an order and its parcel, and what memory served it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from builders import assistant
from hosting import until

from optillm_memory import Memory, Turn

JSON = dict[str, Any]
ORDER, PARCEL, NOTE = "get_order", "get_parcel", "send_note"
REUSE = {"max_error": 0.5, "actions": True}  # so lax that ten labels open the gate
LOOKS = {"read_only": [ORDER, PARCEL]}
SERVING = {"reuse": REUSE, "tools": LOOKS}


def tool(name: str, **places: Any) -> JSON:
    """Return a tool's definition with one text argument, and what else there is of it."""
    properties = {_FIELDS[name]: {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}, **places}


_FIELDS = {ORDER: "order_id", PARCEL: "parcel_id", NOTE: "order_id"}
SYSTEM = "You are the desk of a shop."
TOOLS = [tool(ORDER), tool(PARCEL), tool(NOTE)]


def task_of(number: int) -> str:
    """Return what the user wants."""
    return f"Please find out for me where my order W{number:07d} is at the moment"


def shown(name: str, arguments: Mapping[str, Any]) -> Any:
    """Return what the tools show where nothing has changed."""
    value = next(iter(arguments.values()))
    if name == ORDER:
        return {"order_id": value, "status": "shipped", "parcel_id": f"PX-{value[1:]}"}
    if name == PARCEL:
        return {"parcel_id": value, "city": "Rome"}
    return "Sent."


Way = list[tuple[str, str]]


def way_of(number: int) -> Way:
    """Return the calls that solve a task: each tool with its argument."""
    return [(ORDER, f"W{number:07d}"), (PARCEL, f"PX-{number:07d}")]


@dataclass
class Run:
    """One episode: its turns, which of them memory answered with which call, and its messages."""

    messages: list[JSON]
    turns: list[Turn] = field(default_factory=list)
    served: list[tuple[str, JSON]] = field(default_factory=list)
    llm_calls: int = 0

    @property
    def reasons(self) -> list[str]:
        """Why each request was, or was not, answered by memory."""
        return [_reason(turn) for turn in self.turns]


def _reason(turn: Turn) -> str:
    if turn.decision is not None:
        return turn.decision.reason
    return next((s["reason"] for s in turn.skipped if s["reason"] == "reuse_no_action"), "")


def run(
    memory: Memory,
    number: int = 7,
    options: Mapping[str, Any] | None = SERVING,
    *,
    success: bool | None = True,
    way: Way | None = None,
    world: Callable[[str, Mapping[str, Any]], Any] = shown,
    task: str = "",
    keywords: Mapping[str, Any] | None = None,
    settle: bool = True,
    **fields: Any,
) -> Run:
    """Do a task: memory's call where it serves one, else the next one of the way that is not made yet.

    Every observation is `world`'s. `fields` are further ones of each request.
    """
    way = way_of(number) if way is None else way
    done = Run([{"role": "system", "content": SYSTEM}, {"role": "user", "content": task or task_of(number)}])
    made: list[tuple[str, str]] = []
    for _ in range(10):
        body: JSON = {"model": "m", "messages": list(done.messages), "tools": TOOLS, **fields}
        if options is not None:
            body["agent_memory"] = dict(options)
        turn = memory.begin(body, **(keywords or {}))
        done.turns.append(turn)
        following = next((call for call in way if call not in made), None)
        message = assistant("It is in Rome.") if following is None else _calling(*following, len(done.messages))
        if turn.action == "reuse":
            message = turn.reused()["choices"][0]["message"]
        done.llm_calls += turn.action != "reuse"
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        memory.finish(turn, {"choices": [{"index": 0, "message": message, "finish_reason": reason}]})
        memory.store.flush()
        done.messages.append(message)
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            if turn.action == "reuse":
                done.served.append((name, arguments))
            made.append((name, next(iter(arguments.values()), "")))
            observation = world(name, arguments)
            text = observation if isinstance(observation, str) else json.dumps(observation)
            done.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    if settle:
        memory.settle()
    if success is not None:
        tell(memory, done, success)
    return done


def tell(memory: Memory, done: Run, success: bool | None, **said: Any) -> None:
    """Say how an episode went."""
    turn = done.turns[-1]
    given = {"episode_id": turn.episode_id, "metric": "success", "value": success, "source": "code", **said}
    memory.feedback(given, view=turn.scope.tenant, scope=turn.scope)


def _calling(name: str, argument: str, place: int) -> JSON:
    function = {"name": name, "arguments": json.dumps({_FIELDS.get(name, "query"): argument})}
    call = {"id": f"call_{place:024d}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def woken(memory: Memory, number: int = 7, **options: Any) -> Memory:
    """Return a memory that was opened anew once it knows the goals of its solved episodes."""
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task_of(number)}]
    body = {"model": "m", "messages": asked, "tools": TOOLS, "agent_memory": {**SERVING, "mode": "read", **options}}
    assert until(lambda: memory.begin(body).proposal is not None)
    return memory


def warm(memory: Memory, count: int = 12, options: Mapping[str, Any] | None = None, **given: Any) -> None:
    """Let memory see the same task solved without its help until the gate is open for what it would have done."""
    for _ in range(count):
        run(memory, options=options, **given)


def labels(memory: Memory) -> list[bool | None]:
    """Return the labels of all proposed actions, in the order of their requests."""
    proposals = [memory.why(t["trace_id"])["proposal"] for t in reversed(memory.traces(limit=1000))]
    return [p["correct"] for p in proposals if p is not None]
