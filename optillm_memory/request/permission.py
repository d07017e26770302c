"""Permission: whether a request leaves an action to memory, and whether who operates it lets memory take it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optillm_memory.conversation.partition import asks_for_more_than_text
from optillm_memory.decide.actions import NextAction
from optillm_memory.decide.declared import as_declared
from optillm_memory.learn.procedures.effects import asks_to_write
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings


def refusal_of(turn: Turn, settings: Settings, proposed: NextAction) -> str:
    """Return why a call is not to be made by memory, empty where it may be."""
    return _not_wanted(turn, proposed) or _not_allowed(turn, settings, proposed)


def with_declared_types(body: Mapping[str, Any], proposed: NextAction) -> NextAction:
    """Return an action with its arguments of the types that the request declares, as it is where it does not fit."""
    given = json.loads(proposed.arguments)
    arguments = as_declared(given, _schema_of(body, proposed.tool))
    if arguments is None or repr(arguments) == repr(given):
        return proposed
    return replace(proposed, arguments=json.dumps(arguments, ensure_ascii=False))


def _not_wanted(turn: Turn, proposed: NextAction) -> str:
    """Return why the request wants another answer."""
    offered = [_name_of(tool) for tool in _offered(turn.body)]
    if turn.approach != "none":  # other approaches see no results of tools: what the action shows would be lost
        return "unsupported_approach"
    if offered and proposed.tool not in offered:
        return "tool_not_offered"
    if as_declared(json.loads(proposed.arguments), _schema_of(turn.body, proposed.tool)) is None:
        return "arguments_not_declared"
    return "" if _takes_a_call(turn.body, proposed.tool) else "unsupported_option"


def _not_allowed(turn: Turn, settings: Settings, proposed: NextAction) -> str:
    """Return why memory has no leave to take an action."""
    tools, tool = turn.options.tools, proposed.tool
    if tool in (*tools.get("never", ()), *_names(settings.never_tools)):
        return "tool_forbidden"
    if tool in (*tools.get("allow", ()), *_names(settings.allowed_tools)):
        return ""
    declared = tool in (*tools.get("read_only", ()), *_names(settings.read_only_tools))
    if not declared and not any(_says_read_only(t) for t in _offered(turn.body) if _name_of(t) == tool):
        return "tool_not_declared"
    # A tool of many uses, such as a shell or SQL, may be declared read-only, and yet be asked to write.
    return "changes_state" if asks_to_write(tool, proposed.arguments) else ""


def _takes_a_call(body: Mapping[str, Any], tool: str) -> bool:
    """Whether a request leaves it open that its one answer is a call of this tool, in the form that memory has."""
    if body.get("functions") or body.get("n", 1) not in (None, 1) or asks_for_more_than_text(body):
        return False
    choice = body.get("tool_choice")
    if not isinstance(choice, Mapping):
        return choice != "none"
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        named = allowed.get("tools") if isinstance(allowed, Mapping) else None
        return tool in [_name_of(t) for t in named or () if isinstance(t, Mapping)]
    return _name_of(choice) == tool


def offered_tools(body: Mapping[str, Any]) -> set[str]:
    """Return the names of the tools that a request offers."""
    return {_name_of(tool) for tool in _offered(body)}


def _offered(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tools = body.get("tools")
    return [tool for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, list) else []


def _function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _name_of(tool: Mapping[str, Any]) -> str:
    return str(_function_of(tool).get("name") or "")


def _schema_of(body: Mapping[str, Any], tool: str) -> Any:
    function = next((_function_of(t) for t in _offered(body) if _name_of(t) == tool), {})
    return function.get("parameters")


def _says_read_only(tool: Mapping[str, Any]) -> bool:
    """Whether a tool carries MCP's hint that it only reads."""
    hints = [place.get("annotations") for place in (tool, _function_of(tool))]
    return any(isinstance(hint, Mapping) and hint.get("readOnlyHint") is True for hint in hints)


def _names(setting: str) -> list[str]:
    return [name.strip() for name in setting.split(",") if name.strip()]
