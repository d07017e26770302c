"""Actions: the part of a tool call that can go wrong and be mended, and the form in which actions are compared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# Where a call's own words stand, in the names that agents' tools give them.
_FIELDS = ("command", "cmd", "code", "script", "query", "sql", "input", "commands", "bash_command")
_LIMIT = 20_000
_KEY_LIMIT = 4_000
# What differs from run to run although the action is the same: folders for a moment, ids, hashes.
_FLEETING = re.compile(
    r"(?:/private)?/(?:tmp|var/tmp|var/folders|dev/shm)/[\w.@+-]{1,200}(?:/[\w.@+-]{0,200}/T/[\w.@+-]{1,200})?"
    r"|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b|\b(?=[a-f]{0,40}\d)[0-9a-f]{12,64}\b",
)


@dataclass(frozen=True, slots=True)
class Action:
    """What a call did: `text` is the value of its `field`, or all its arguments as JSON where `field` is empty."""

    tool: str
    field: str
    text: str

    @property
    def key(self) -> str:
        """The form in which two actions are the same: white space and what is made anew in every run do not count."""
        return f"{self.tool}\x1f{self.field}\x1f{normal_action(self.text)}"


def action_of(tool: str, arguments: str) -> Action:
    """Read a call's action; arguments that are no JSON object are the action's text."""
    if not arguments.lstrip().startswith("{"):
        return Action(tool, "", arguments)
    try:
        given = json.loads(arguments[:_LIMIT])
    except (ValueError, RecursionError):
        return Action(tool, "", arguments)
    if not isinstance(given, dict):
        return Action(tool, "", arguments)
    texts = {k: v for k, v in given.items() if isinstance(v, str)}
    named = next((k for k in _FIELDS if k in texts), None)
    # One text among switches and numbers is the action; several texts (a path and its content) are it together.
    field = named if named is not None else next(iter(texts)) if len(texts) == 1 else None
    if field is not None:
        return Action(tool, field, texts[field])
    return Action(tool, "", canonical(given))


def arguments_with(arguments: str, action: Action, text: str) -> str:
    """Return a call's arguments with another text in the action's field."""
    if not action.field:
        return text
    return json.dumps({**json.loads(arguments), action.field: text})


def normal_action(text: str) -> str:
    """Return an action's text without what differs although the action is the same."""
    return _FLEETING.sub("<fleeting>", " ".join(text[:_KEY_LIMIT].split()))


def canonical(value: Any) -> str:
    """Return JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
