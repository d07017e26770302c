"""Advice on calls that fail, read from a prompt as the agent reads it in the tasks with a shell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from benchmarks.agent_policy import Call, Tip, normal
from benchmarks.multistep.view import View


def fails(call: Call, tips: Sequence[Tip]) -> bool:
    """Whether the prompt knows that a call fails."""
    return any(_is_on(tip, call) for tip in tips)


def instead(call: Call, tips: Sequence[Tip], view: View, fields: Mapping[str, Sequence[str]]) -> Call | None:
    """Return what worked instead of a call, the latest advice first, if it was not tried; `fields` are the tools'."""
    for tip in reversed(tips):
        if tip.instead is None or not _is_on(tip, call):
            continue
        found = _call(tip.tool or call.tool, tip.instead, call, fields)
        if found is not None and not view.tried(found.tool, found.arguments):
            return found
    return None


def _is_on(tip: Tip, call: Call) -> bool:
    """Whether advice is on a call: it shows its arguments as JSON, or the only one as it is."""
    texts = {normal(call.text)}
    if len(call.arguments) == 1:
        texts.update(normal(value) for value in call.arguments.values())
    return normal(tip.action) in texts and tip.tool in ("", call.tool)


def _call(tool: str, text: str, call: Call, fields: Mapping[str, Sequence[str]]) -> Call | None:
    names = fields.get(tool, ())
    try:
        given = json.loads(text)
    except ValueError:
        given = text
    if isinstance(given, dict):
        return Call(tool, {str(k): str(v) for k, v in given.items()}) if set(given) == set(names) else None
    return Call(tool, {names[0]: text}) if len(names) == 1 and (tool != call.tool or text != call.text) else None
