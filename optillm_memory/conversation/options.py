"""The request's own field `agent_memory`, and the headers `X-Agent-Memory-*` that stand for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from optillm_memory.conversation.feedback import is_unicode, parse_feedback
from optillm_memory.errors import InvalidField
from optillm_memory.records import Feedback, Mode

FIELD = "agent_memory"
HEADER_PREFIX = "X-Agent-Memory-"
# Headers with the prefix that are secrets of the caller, and none of its options.
OPERATOR_HEADER, KEY_HEADER, REPORTER_HEADER = (HEADER_PREFIX + name for name in ("Operator", "Key", "Reporter-Key"))
NAME_LIMIT, GOAL_LIMIT = 200, 4_000
TOOL_LISTS = ("read_only", "allow", "never")
AUTO = "auto"  # the approach that lets the policy choose


@dataclass(frozen=True, slots=True)
class Options:
    """A caller's options for one request; see the table in the documentation."""

    namespace: str = "default"
    user_id: str = ""
    agent_id: str = ""
    episode_id: str | None = None
    goal: str = ""
    mode: Mode = "readwrite"
    approach: str | None = None
    reuse: Mapping[str, Any] | None = None
    tools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    max_items: int | None = None
    token_budget: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    feedback: tuple[Feedback, ...] = ()
    # Not of our keys: the end user whom fields of the body or of a gateway name, and the reporter whose key came along.
    end_user: str = ""
    reporter: str = ""

    @property
    def reads(self) -> bool:
        """Whether memory may be recalled for this request."""
        return self.mode in ("readwrite", "read")

    @property
    def writes(self) -> bool:
        """Whether this request is recorded."""
        return self.mode in ("readwrite", "write")

    def limits(self, max_items: int, token_budget: int) -> dict[str, int]:
        """Return the limits of injection at one place: the caller's, else these."""
        return {
            "max_items": max_items if self.max_items is None else self.max_items,
            "token_budget": token_budget if self.token_budget is None else self.token_budget,
        }


KEYS = tuple(name for name in Options.__dataclass_fields__ if name not in ("end_user", "reporter"))
_SECRETS = ("operator", "key", "reporter_key")
# Where clients and gateways name the end user, the most specific first.
_USER_HEADERS = ("x-openwebui-user-id", "x-litellm-end-user-id", "x-litellm-customer-id", "x-librechat-user-id")
_USER_FIELDS = ("safety_identifier", "user")


def parse_options(value: Any, headers: Mapping[str, str] | None = None, *, now: float) -> Options:
    """Validate the field and the headers; the field has precedence over a header of the same key.

    Raises InvalidField for an unknown key and for a value of the wrong type or range.
    """
    if value is not None and not isinstance(value, Mapping):
        raise InvalidField(FIELD, f"must be an object, not {type(value).__name__}")
    values = {**_from_headers({name: as_utf8(text) for name, text in (headers or {}).items()}), **(value or {})}
    checked: dict[str, Any] = {}
    for key, item in values.items():
        if key not in KEYS:
            raise InvalidField(f"{FIELD}.{key}", f"unknown key; known are {', '.join(KEYS)}")
        if item is not None:
            checked[key] = _CHECKS[key](f"{FIELD}.{key}", item, now)
    return Options(**checked)


def identified(options: Options, body: Mapping[str, Any], headers: Mapping[str, str], *, maps: bool) -> Options:
    """Return the options with the end user from fields and headers of clients and gateways.

    With `maps` it becomes the `user_id`, if the caller set none. Without, it still separates the answers of users.
    """
    named = {name.lower(): as_utf8(text) for name, text in headers.items()}
    identifiers = [named.get(name) for name in _USER_HEADERS] + [body.get(name) for name in _USER_FIELDS]
    names = [str(n).strip() for n in identifiers if isinstance(n, (str, int, float)) and not isinstance(n, bool)]
    names = [_short(name) for name in names if name]
    if not names:
        return options
    # All of them together: a gateway may send its own name in one and the user's in another.
    everyone = _short("\n".join(dict.fromkeys(names)))
    return replace(options, end_user=everyone, user_id=options.user_id or (names[0] if maps else ""))


def as_utf8(header: str) -> str:
    """Return a header's text: HTTP servers read its bytes as Latin-1, clients send UTF-8."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def _short(name: str) -> str:
    if len(name) <= NAME_LIMIT and is_unicode(name):
        return name
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _from_headers(headers: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in headers.items():
        if not name.lower().startswith(HEADER_PREFIX.lower()):
            continue
        key = name[len(HEADER_PREFIX) :].lower().replace("-", "_")
        if key in _SECRETS:
            continue
        if key in ("max_items", "token_budget", "tags", "feedback", "reuse", "tools"):
            try:
                values[key] = json.loads(text)
            except (ValueError, RecursionError):
                raise InvalidField(name, "must be JSON, and not nested deeply") from None
        else:
            values[key] = text
    return values


def _name(param: str, value: Any, _now: float) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > NAME_LIMIT:
        raise InvalidField(param, f"must be a text of 1 to {NAME_LIMIT} characters")
    if not is_unicode(value):
        raise InvalidField(param, "holds a lone surrogate; send valid Unicode")
    return value


def _mode(param: str, value: Any, _now: float) -> str:
    if value not in get_args(Mode):
        raise InvalidField(param, f"{value!r} is none of {', '.join(get_args(Mode))}")
    return str(value)


def _count(param: str, value: Any, _now: float) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidField(param, "must be a whole number, 0 or more")
    return value


def _reuse(param: str, value: Any, _now: float) -> dict[str, Any]:
    value = value if isinstance(value, Mapping) else {}
    for key in value:
        if key not in ("max_error", "actions"):
            raise InvalidField(f"{param}.{key}", "unknown key; known are max_error, actions")
    error, actions = value.get("max_error"), value.get("actions", False)
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error < 1:
        raise InvalidField(param, 'must be {"max_error": a number between 0 and 1}, with "actions": true if you like')
    if not isinstance(actions, bool):
        raise InvalidField(f"{param}.actions", "must be true or false")
    return {"max_error": float(error), "actions": actions}


def _goal(param: str, value: Any, _now: float) -> str:
    if not isinstance(value, str) or len(value) > GOAL_LIMIT or not is_unicode(value):
        raise InvalidField(param, f"must be a text of at most {GOAL_LIMIT} characters of valid Unicode")
    return value.strip()


def _tools(param: str, value: Any, now: float) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise InvalidField(param, f"must be an object with lists of tool names under {', '.join(TOOL_LISTS)}")
    for key, names in value.items():
        if key not in TOOL_LISTS:
            raise InvalidField(f"{param}.{key}", f"unknown key; known are {', '.join(TOOL_LISTS)}")
        if not isinstance(names, (list, tuple)) or len(names) > 1_000:  # noqa: PLR2004
            raise InvalidField(f"{param}.{key}", "must be a list of at most 1000 tool names")
    return {key: tuple(_name(f"{param}.{key}", name, now) for name in names) for key, names in value.items()}


def _tags(param: str, value: Any, now: float) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > 50:  # noqa: PLR2004
        raise InvalidField(param, "must be an object of at most 50 texts")
    return {_name(param, k, now): _name(f"{param}.{k}", v, now) for k, v in value.items()}


def _feedback(param: str, value: Any, now: float) -> tuple[Feedback, ...]:
    return tuple(parse_feedback(value, now=now, param=param))


_CHECKS = {
    "namespace": _name,
    "user_id": _name,
    "agent_id": _name,
    "episode_id": _name,
    "goal": _goal,
    "mode": _mode,
    "approach": _name,
    "reuse": _reuse,
    "tools": _tools,
    "max_items": _count,
    "token_budget": _count,
    "tags": _tags,
    "feedback": _feedback,
}
