"""What an error is in a tool's own dialect, learned: a form of message after which a corrected call follows.

A tool may say "Hm, no such thing as 'x'." where others say "Error: …". Such a message is known by what the agent does
next: it calls the same tool again with similar arguments, and the answer has another form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optillm_memory.conversation.actions import Action, normal_action
from optillm_memory.conversation.error_search import lines_of
from optillm_memory.conversation.signature import Signature, normalised
from optillm_memory.conversation.wrapping import unwrap
from optillm_memory.learn.confidence import wilson
from optillm_memory.learn.intents import alike

LEAST_EPISODES = 8
_LEAST_SHARE, _LIFT, _Z = 0.6, 0.25, 1.64
_LINES, _CHARS, _WORDS = 3, 300, 3
_ALIKE, _COMPARED = 0.5, 400  # share, characters
_WORD = re.compile(r"[^\W\d_]{2,}")
LANGUAGE = "dialect"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call got, by the form of its result (empty where it is no message), and the call after it, if any."""

    episode_id: str
    action: Action
    form: str
    next_action: Action | None = None
    next_form: str = ""
    next_failed: bool = False


def form_of(observation: str) -> Signature | None:
    """Return the form of a result that is a short message in words, and no data; else None."""
    text = unwrap(observation).text.strip()
    if not text or len(text) > _CHARS or text[0] in "[{(<|" or text.count("\n") >= _LINES:
        return None
    message, slots = normalised(" ".join(lines_of(text)))
    return Signature(LANGUAGE, "", message, slots) if len(_WORD.findall(message)) >= _WORDS else None


def is_error(form: str, replies: Sequence[Reply]) -> bool:
    """Whether a form is an error, by the replies of a tool: those of this form, and others to compare with.

    An episode counts once. The lower confidence bound of the share of episodes in which a corrected call followed must
    be high, and well above the share in which a like call follows the tool's other results.
    """
    own: dict[str, list[bool]] = {}
    others: dict[str, list[bool]] = {}
    for reply in replies:
        (own if reply.form == form else others).setdefault(reply.episode_id, []).append(_corrected(reply))
    if len(own) < LEAST_EPISODES:
        return False
    right = [_most(found) for found in own.values()]
    low = wilson(sum(right), len(right), _Z).low
    usual = [_most(found) for found in others.values()]
    return low >= _LEAST_SHARE and low >= _LIFT + (sum(usual) / len(usual) if usual else 0.0)


def _corrected(reply: Reply) -> bool:
    after = reply.next_action
    if after is None or reply.next_failed or reply.next_form == reply.form != "":
        return False
    return _is_like(reply.action, after)


def _is_like(one: Action, other: Action) -> bool:
    """Whether two calls of a tool have similar arguments, but not the same."""
    if (one.tool, one.field) != (other.tool, other.field) or one.key == other.key:
        return False
    first, second = _arguments(one), _arguments(other)
    if first and second:
        same = sum(second.get(name) == value for name, value in first.items())
        return 2 * len(first.keys() & second.keys()) > len(first.keys() | second.keys()) and same > 0
    return alike(normal_action(one.text)[:_COMPARED], normal_action(other.text)[:_COMPARED], _ALIKE)


def _arguments(action: Action) -> Mapping[str, object]:
    text = action.rest if action.field else action.text
    try:
        value = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) and len(value) > 1 else {}


def _most(found: Sequence[bool]) -> bool:
    return 2 * sum(found) > len(found)
