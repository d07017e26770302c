"""Steps: the actions of a conversation with their observations, each under an id that later requests give it too.

An agent repeats its whole conversation with every request, edits it, shortens it and goes back in it. A step keeps its
id through all of that, so that it is stored once; `parent_id` tells what came before it on its own branch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.conversation.text import BLOCK_OPEN, text_of, without_blocks
from optillm_memory.conversation.wrapping import unwrap
from optillm_memory.records import Step

_FENCE = re.compile(
    r"^```(?:bash|sh|shell|zsh|console|terminal|cmd|powershell|python|py|sql|execute|tool_code)[ \t]*\n"
    r"(.{0,20000}?)\n```",
    re.DOTALL | re.MULTILINE,
)
_TAGGED = re.compile(r"<(execute|command|bash|run)>(.{1,20000}?)</\1>", re.DOTALL)
_MARKED = re.compile(
    r"\s{0,20}(?:<(?:output|observation|result|returncode|execution|stdout)\b|(?:observation|output|result|stdout|"
    r"execution result|command output|tool output|exit code)\b[^\n]{0,80}[:\n]|\[(?:output|exit code)|exit:)",
    re.IGNORECASE,
)
TEXT_TOOL = "shell"


def steps_of(messages: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of tool calls, legacy function calls and fenced commands, in order.

    A command in the text is a step only where the user turn after it reads as an observation.
    """
    steps: list[Step] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        calls = calls_of(message, index)
        for call_id, tool, arguments in calls:
            observation = _result(messages, index, call_id)
            # A client's own id stays with its call wherever that goes; ids that are used again are counted.
            own = call_id if not call_id.startswith(("call-", "function-")) else prefixes[index]
            seen[own, tool, arguments] += 1
            step_id = _digest(own, tool, arguments, str(seen[own, tool, arguments]))
            steps.append(_step(step_id, steps, call_id, tool, arguments, observation, prefixes[index]))
        if not calls and (command := command_in(text_of(message))) is not None:
            after = messages[index + 1] if index + 1 < len(messages) else {}
            if is_observation(messages, index + 1):
                step_id = _digest(prefixes[index], TEXT_TOOL, command, "1")
                shown = _shown(after)
                steps.append(_step(step_id, steps, f"text-{index}", TEXT_TOOL, command, shown, prefixes[index]))
    return tuple(steps)


def command_in(text: str) -> str | None:
    """Return the one command that an answer asks to have run, None for none or several."""
    found = [m.group(1) for m in _FENCE.finditer(text)] or [m.group(2) for m in _TAGGED.finditer(text)]
    return found[0].strip() if len(found) == 1 and found[0].strip() else None


def is_observation(messages: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Whether the message at an index is the result of an action rather than somebody's words."""
    if not 0 <= index < len(messages):
        return False
    role = messages[index].get("role")
    if role in ("tool", "function"):
        return True
    if role != "user" or index == 0 or messages[index - 1].get("role") != "assistant":
        return False
    if command_in(text_of(messages[index - 1])) is None:
        return False
    text = text_of(messages[index])
    return bool(_MARKED.match(text)) or unwrap(text).exit_code is not None


def calls_of(message: Mapping[str, Any], index: int) -> list[tuple[str, str, str]]:
    """Return (call id, tool, arguments) of every call in a message; a legacy call is named by its index."""
    found = []
    calls = message.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            call_id = str(call.get("id") or f"call-{index}-{number}")
            found.append((call_id, str(function.get("name") or ""), _as_text(function.get("arguments"))))
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping):
        found.append((f"function-{index}", str(legacy.get("name") or ""), _as_text(legacy.get("arguments"))))
    return found


def _result(messages: Sequence[Mapping[str, Any]], index: int, call_id: str) -> str | None:
    # The result follows its call; where ids are used again, an equal id further on belongs to a later call.
    for message in messages[index + 1 :]:
        role = message.get("role")
        if role == "tool" and str(message.get("tool_call_id")) == call_id:
            return _shown(message)
        if role == "function" and call_id == f"function-{index}":
            return _shown(message)
        if role == "assistant" and (
            call_id.startswith("function-") or any(c[0] == call_id for c in calls_of(message, -1))
        ):
            return None
    return None


def _shown(message: Mapping[str, Any]) -> str:
    text = text_of(message)
    return without_blocks(text) if BLOCK_OPEN in text else text


def _step(
    step_id: str, before: Sequence[Step], call_id: str, tool: str, arguments: str, observation: str | None, made: str
) -> Step:
    parent = before[-1].step_id if before else ""
    return Step(call_id, len(before), tool, arguments, observation, step_id, parent, made)


def _digest(*parts: str) -> str:
    text = "\x1f".join(parts)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
