"""Actions: the part of a tool call that can go wrong and be mended, and the form in which actions are compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Where a call's own words stand, in the names that agents' tools give them.
_FIELDS = ("command", "cmd", "code", "script", "query", "sql", "input", "commands", "bash_command")
# What a call says to its reader, which changes nothing of what it does; and where it is done.
_ASIDES = frozenset(
    ("description", "explanation", "reason", "reasoning", "thought", "thoughts", "title", "summary", "security_risk")
)
_PLACES = frozenset(
    ("cwd", "workdir", "working_dir", "working_directory", "shell", "language", "session_id", "is_input", "timeout")
)
_LIMIT = 20_000
_KEY_LIMIT = 4_000
# What differs from run to run although the action is the same: folders for a moment, ids, hashes.
_FLEETING = re.compile(
    r"(?:/private)?/(?:tmp|var/tmp|var/folders|dev/shm)/[\w.@+-]{1,200}(?:/[\w.@+-]{0,200}/T/[\w.@+-]{1,200})?"
    r"|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b|\b(?=[a-f]{0,40}\d)[0-9a-f]{12,64}\b",
)


@dataclass(frozen=True, slots=True)
class Action:
    """What a call did: `text` is the value of its `field`, or all its arguments as JSON where `field` is empty.

    `rest` is what else was given, a folder or a limit: with another one it is another action.
    """

    tool: str
    field: str
    text: str
    rest: str = ""

    @property
    def key(self) -> str:
        """The form in which two actions are the same: white space and what is made anew in every run do not count."""
        rest = f"\x1f{normal_action(self.rest)}" if self.rest else ""
        return f"{self.tool}\x1f{self.field}\x1f{normal_action(self.text)}{rest}"


def action_of(tool: str, arguments: str) -> Action:
    """Read a call's action; arguments that are no JSON object are the action's text."""
    if not arguments.lstrip().startswith("{"):
        return Action(tool, "", arguments)
    try:
        given = json.loads(arguments) if len(arguments) <= _LIMIT else None
    except (ValueError, RecursionError):
        return Action(tool, "", arguments)
    if not isinstance(given, dict):
        return Action(tool, "", arguments)
    told = {k: v for k, v in given.items() if k not in _ASIDES}
    field = _field_of(told)
    if field is None:
        return Action(tool, "", canonical(told))
    rest = {k: v for k, v in told.items() if k != field}
    return Action(tool, field, told[field], canonical(rest) if rest else "")


def _field_of(told: Mapping[str, Any]) -> str | None:
    # One text among switches and numbers is the action; several texts (a path and its content) are it together.
    texts = [k for k, v in told.items() if isinstance(v, str) and k not in _PLACES]
    if any(isinstance(v, (list, dict)) for v in told.values()):
        return None
    if len(texts) == 1:
        return texts[0]
    # A single word beside other texts is the name of what is done with them: `view` a path.
    return next((k for k in _FIELDS if k in texts and len(told[k].split()) > 1), None)


def normal_action(text: str) -> str:
    """Return an action's text without what differs although the action is the same."""
    normal = _FLEETING.sub("<fleeting>", " ".join(text[:_KEY_LIMIT].split()))
    if len(text) <= _KEY_LIMIT:
        return normal
    return f"{normal} {hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"


def canonical(value: Any) -> str:
    """Return JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
