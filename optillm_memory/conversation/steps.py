"""Steps: the actions of a conversation with their observations, under ids that are stable over its requests.

An agent repeats its whole conversation with every request, edits it, shortens it and goes back in it. The id of a step
survives that, so that the step is stored once; `parent_id` is the step before it on its own branch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optillm_memory.conversation.text import text_of
from optillm_memory.conversation.wrapping import unwrap, with_flag
from optillm_memory.records import Step

_FENCE = re.compile(
    r"^```(?:bash|sh|shell|zsh|console|terminal|cmd|powershell|python|py|sql|execute|tool_code)[ \t]*\n"
    r"(.{0,20000}?)\n```",
    re.DOTALL | re.MULTILINE,
)
_TAGS = ("<execute>", "<command>", "<bash>", "<run>")
_TAGGED = re.compile(r"<(execute|command|bash|run)>(.{1,20000}?)</\1>", re.DOTALL)
_TAGGED_MOST = 8  # with more they are no commands: each unclosed one is searched to the end
_MARKED = re.compile(
    r"\s{0,20}(?:<(?:output|observation|result|returncode|execution|stdout)\b|"
    r"(?:observation|output|result|stdout|execution result|command output|tool output|exit code)"
    r"(?:[ \t]{0,4}(?:\d{1,6}|[(\[][^\n]{0,60}[)\]]))?[ \t]{0,4}(?::|\n)|"
    r"(?:output|result)s? (?:of|from) [^\n]{0,120}:[ \t]{0,4}\n|\[(?:output|exit code)|exit:)",
    re.IGNORECASE,
)
# Generated ids of calls without one, from their position.
_GENERATED_ID = re.compile(r"call-\d+-(\d+)|function-\d+")
_LEGACY = "function"
TEXT_TOOL = "shell"


def steps_of(messages: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of tool calls, legacy function calls and fenced commands, in order.

    A command in the text is a step only where the user turn after it reads as an observation.
    """
    steps: list[Step] = []
    results = _results(messages)
    seen: Counter[tuple[str, str, str]] = Counter()
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        calls = calls_of(message, index)
        for number, (call_id, tool, arguments) in enumerate(calls):
            observation = results.get((index, number))
            # A client's own id stays with its call; repeated ids are counted.
            own = prefixes[index] if _GENERATED_ID.fullmatch(call_id) else call_id
            seen[own, tool, arguments] += 1
            step_id = _digest(own, tool, arguments, str(seen[own, tool, arguments]))
            steps.append(_step(step_id, steps, call_id, tool, arguments, observation, prefixes[index]))
        if not calls and (command := command_in(text_of(message))) is not None:
            after = messages[index + 1] if index + 1 < len(messages) else {}
            if is_observation(messages, index + 1):
                step_id = _digest(prefixes[index], TEXT_TOOL, command, "1")
                observation = text_of(after)
                steps.append(_step(step_id, steps, f"text-{index}", TEXT_TOOL, command, observation, prefixes[index]))
    return tuple(steps)


def under_known_ids(steps: Sequence[Step], known: Iterable[tuple[str, str]]) -> Sequence[Step]:
    """Return the steps under their stored ids: clients replace call ids and serialise arguments again.

    `known` are the stored (step id, `made`) in order. Equal `made` means equal calls.
    """
    stored: dict[str, list[str]] = {}
    for step_id, made in known:
        stored.setdefault(made, []).append(step_id)
    unanswered: dict[str, list[str]] = {}
    for step in steps:
        unanswered.setdefault(step.made, []).append(step.step_id)
    own = {
        new: old
        for made, ids in unanswered.items()
        if len(stored.get(made, ())) == len(ids)
        for new, old in zip(ids, stored[made], strict=True)
        if new not in stored[made]
    }
    if not own:
        return steps
    return [
        replace(s, step_id=own.get(s.step_id, s.step_id), parent_id=own.get(s.parent_id, s.parent_id)) for s in steps
    ]


def command_in(text: str) -> str | None:
    """Return the command that an answer asks to run; None without one or with several."""
    found = [m.group(1) for m in _FENCE.finditer(text)]
    if not found and 0 < sum(text.count(tag) for tag in _TAGS) <= _TAGGED_MOST:
        found = [m.group(2) for m in _TAGGED.finditer(text)]
    return found[0].strip() if len(found) == 1 and found[0].strip() else None


def is_observation(messages: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Whether the message at an index is the result of an action and not a person's text."""
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
    if _MARKED.match(text):
        return True
    return unwrap(text).exit_code is not None and not text.rstrip().endswith("?")  # people ask, tools do not


def calls_of(message: Mapping[str, Any], index: int) -> list[tuple[str, str, str]]:
    """Return (call id, tool, arguments) of every call in a message; a legacy call is named by its index."""
    found = []
    calls = message.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        # The arguments of a function are JSON, the input of a custom tool is any text.
        made = (call.get("function") or call.get("custom")) if isinstance(call, Mapping) else None
        if isinstance(made, Mapping):
            call_id = str(call.get("id") or f"call-{index}-{number}")
            arguments = made.get("arguments", made.get("input"))
            found.append((call_id, str(made.get("name") or ""), _as_text(arguments)))
    legacy = message.get("function_call")
    if isinstance(legacy, Mapping):
        found.append((f"function-{index}", str(legacy.get("name") or ""), _as_text(legacy.get("arguments"))))
    return found


def _results(messages: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], str]:
    """Return the results by (index of the calling message, number of the call in it)."""
    results: dict[tuple[int, int], str] = {}
    # Unanswered calls by id. Of repeated ids a result belongs to the latest call, and within one answer to the first
    # unanswered one; a legacy result has no id and belongs to the answer before it.
    open_calls: dict[str, list[tuple[int, int]]] = {}
    for index, message in enumerate(messages):
        role = message.get("role")
        if role == "assistant":
            open_calls.pop(_LEGACY, None)
            unanswered: dict[str, list[tuple[int, int]]] = {}
            for number, (call_id, _, _) in enumerate(calls_of(message, index)):
                generated = _GENERATED_ID.fullmatch(call_id)
                nameless = () if generated is None else (_LEGACY,) if generated[1] is None else ("",)
                for name in (call_id, *nameless):
                    unanswered.setdefault(name, []).append((index, number))
            open_calls.update(unanswered)
        elif role in ("tool", "function"):
            call_id = _LEGACY if role == "function" else str(message.get("tool_call_id") or "")
            if queue := open_calls.get(call_id):
                results.setdefault(queue.pop(0), _result_of(message))
    return results


def _result_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return with_flag(text_of(message), (message, *(content if isinstance(content, list) else ())))


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
