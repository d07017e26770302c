"""Actions: the part of a tool call that can fail and be corrected, and the form in which actions are compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The arguments of agents' tools that hold the action itself.
_ACTION_FIELDS = ("command", "cmd", "code", "script", "query", "sql", "input", "commands", "bash_command")
# Arguments for the reader, which do not change the action; and those that give its context.
_COMMENT_FIELDS = frozenset(
    ("description", "explanation", "reason", "reasoning", "thought", "thoughts", "title", "summary", "security_risk")
)
_CONTEXT_FIELDS = frozenset(
    ("cwd", "workdir", "working_dir", "working_directory", "shell", "language", "session_id", "is_input", "timeout")
)
_LIMIT = 20_000
_KEY_LIMIT = 4_000
# Parts that differ from run to run although the action is the same: temporary folders, ids, hashes.
_VOLATILE = re.compile(
    r"(?:/private)?/(?:tmp|var/tmp|var/folders|dev/shm)/[\w.@+-]{1,200}(?:/[\w.@+-]{0,200}/T/[\w.@+-]{1,200})?"
    r"|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b|\b(?=[a-f]{0,40}\d)[0-9a-f]{12,64}\b",
)


@dataclass(frozen=True, slots=True)
class Action:
    """The action of a call: `text` is the value of its `field`, or all its arguments as JSON where `field` is empty.

    `rest` holds the other arguments, a folder or a limit: with another value it is another action.
    """

    tool: str
    field: str
    text: str
    rest: str = ""

    @property
    def key(self) -> str:
        """Equal for equal actions: white space, temporary folders, ids and hashes are normalised."""
        rest = f"\x1f{normal_action(self.rest)}" if self.rest else ""
        return f"{self.tool}\x1f{self.field}\x1f{normal_action(self.text)}{rest}"


def action_of(tool: str, arguments: str) -> Action:
    """Return the action of a call; arguments that are no JSON object are the action's text."""
    if not arguments.lstrip().startswith("{"):
        return Action(tool, "", arguments)
    try:
        parsed = json.loads(arguments) if len(arguments) <= _LIMIT else None
    except (ValueError, RecursionError):
        return Action(tool, "", arguments)
    if not isinstance(parsed, dict):
        return Action(tool, "", arguments)
    effective = {k: v for k, v in parsed.items() if k not in _COMMENT_FIELDS}
    field = _field_of(effective)
    if field is None:
        return Action(tool, "", canonical(effective))
    rest = {k: v for k, v in effective.items() if k != field}
    return Action(tool, field, effective[field], canonical(rest) if rest else "")


def _field_of(arguments: Mapping[str, Any]) -> str | None:
    # A single text among switches and numbers is the action; several texts (a path and its content) are so together.
    texts = [k for k, v in arguments.items() if isinstance(v, str) and k not in _CONTEXT_FIELDS]
    if any(isinstance(v, (list, dict)) for v in arguments.values()):
        return None
    if len(texts) == 1:
        return texts[0]
    # A single word beside other texts is an operation on them: `view` a path.
    return next((k for k in _ACTION_FIELDS if k in texts and len(arguments[k].split()) > 1), None)


def normal_action(text: str) -> str:
    """Return an action's text with white space, temporary folders, ids and hashes normalised."""
    normal = _VOLATILE.sub("<fleeting>", " ".join(text[:_KEY_LIMIT].split()))
    if len(text) <= _KEY_LIMIT:
        return normal
    return f"{normal} {hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"


def canonical(value: Any) -> str:
    """Return JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
