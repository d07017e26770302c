"""Validation of submitted feedback, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, cast

from optillm_memory.errors import InvalidField
from optillm_memory.records import METRICS, VERIFYING, Feedback, Metric, Source, Trust, uuid7_hex

KEYS = ("trace_id", "episode_id", "metric", "value", "source", "feedback_id", "evidence", "occurred_at", "valid_until")
SUBMITTED_SOURCES = ("code", "human", "llm")
EVIDENCE_KEYS = ("command", "exit_code", "output")
_NAME_LIMIT = 200
_LATEST = 253_402_300_800  # the end of the year 9999; in milliseconds it is the year 1978


def parse_feedback(payload: Any, *, now: float, param: str = "feedback") -> list[Feedback]:
    """Validate one feedback object or a list of them; `now` is in Unix seconds.

    Raises InvalidField with the name of the field (and its index in a list); an invalid list is rejected whole.
    """
    if isinstance(payload, Mapping):
        return [_one(payload, now, param)]
    if not isinstance(payload, list):
        raise InvalidField(param, "must be an object or a list of objects")
    if not payload:
        raise InvalidField(param, "is an empty list; send at least one feedback")
    found = []
    for index, item in enumerate(payload):
        if not isinstance(item, Mapping):
            raise InvalidField(f"{param}[{index}]", "must be an object")
        found.append(_one(item, now, f"{param}[{index}]"))
    return found


def attributed(items: Iterable[Feedback], reporter: str, trust: Trust) -> list[Feedback]:
    """Return feedback under the name of its reporter, which is empty where no credential came with it.

    Under strict trust such feedback verifies nothing: its source becomes `llm`.
    """
    is_opinion = trust == "strict" and not reporter
    named = [replace(item, reporter=reporter, trust=trust) for item in items]
    return [replace(f, source="llm") if is_opinion and f.source in VERIFYING else f for f in named]


def _one(item: Mapping[str, Any], now: float, param: str) -> Feedback:
    for key in item:
        if key not in KEYS:
            raise InvalidField(f"{param}.{key}", f"unknown key; known are {', '.join(KEYS)}")
    trace_id, episode_id = (_optional_name(item, key, param) for key in ("trace_id", "episode_id"))
    feedback_id = _optional_name(item, "feedback_id", param)
    retracts = "value" in item and item["value"] is None
    if retracts and feedback_id is None:
        raise InvalidField(f"{param}.feedback_id", "is needed to retract: name the feedback that `value: null` undoes")
    if (trace_id is None) == (episode_id is None) and not (retracts and trace_id is None):
        raise InvalidField(f"{param}.trace_id", "give either trace_id or episode_id")
    if trace_id is not None and len(trace_id) == 32:  # noqa: PLR2004
        trace_id = f"chatcmpl-{trace_id}"  # the bare UUID is accepted too
    metric = _choice(item, "metric", METRICS, param, default="comment" if retracts else None)
    source = _choice(item, "source", SUBMITTED_SOURCES, param, default="human" if retracts else None)
    return Feedback(
        feedback_id=feedback_id or f"fb-{uuid7_hex()}",
        metric=cast("Metric", metric),
        value=None if retracts else _value(item, metric, param),
        source=cast("Source", source),
        trace_id=trace_id,
        episode_id=episode_id,
        evidence=_evidence(item.get("evidence"), param),
        occurred_at=_occurred_at(item.get("occurred_at"), now, param),
        valid_until=None if retracts else _moment(item.get("valid_until"), f"{param}.valid_until"),
    )


def _choice(item: Mapping[str, Any], key: str, known: Sequence[str], param: str, default: str | None) -> str:
    value = item.get(key, default)
    if value is None:
        raise InvalidField(f"{param}.{key}", f"is missing; give one of {', '.join(known)}")
    if value not in known:
        raise InvalidField(f"{param}.{key}", f"{value!r} is none of {', '.join(known)}")
    return str(value)


def _value(item: Mapping[str, Any], metric: str, param: str) -> bool | float | str:
    name = f"{param}.value"
    if "value" not in item:
        raise InvalidField(name, "is missing (null retracts)")
    value = item["value"]
    if metric == "success":
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InvalidField(name, "must be true or false for metric success")
        return bool(value)
    if metric == "score":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InvalidField(name, "must be a number from 0 to 1 for metric score")
        return float(value)
    if not isinstance(value, str) or not value.strip():
        raise InvalidField(name, f"must be a text for metric {metric}")
    return value


def _optional_name(item: Mapping[str, Any], key: str, param: str) -> str | None:
    value = item.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or len(value) > _NAME_LIMIT or not is_unicode(value):
        raise InvalidField(f"{param}.{key}", f"must be a text of 1 to {_NAME_LIMIT} characters")
    return value


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode, without lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _evidence(value: Any, param: str) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidField(f"{param}.evidence", "must be an object")
    for key in value:
        if key not in EVIDENCE_KEYS:
            raise InvalidField(f"{param}.evidence.{key}", f"unknown key; known are {', '.join(EVIDENCE_KEYS)}")
    exit_code = value.get("exit_code")
    if exit_code is not None and (isinstance(exit_code, bool) or not isinstance(exit_code, int)):
        raise InvalidField(f"{param}.evidence.exit_code", "must be a whole number")
    for key in ("command", "output"):
        if not isinstance(value.get(key, ""), (str, type(None))):
            raise InvalidField(f"{param}.evidence.{key}", "must be a text")
    loaded: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return loaded


def _occurred_at(value: Any, now: float, param: str) -> float:
    moment = _moment(value, f"{param}.occurred_at")
    if moment is None:
        return now
    if moment > now + 86_400:
        raise InvalidField(f"{param}.occurred_at", "lies in the future; send Unix seconds, not milliseconds")
    return moment


def _moment(value: Any, param: str) -> float | None:
    """Return a moment in Unix seconds; None where none is given."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value.replace("Z", "+00:00"))
            value = (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).timestamp()
        except (ValueError, OverflowError, OSError):
            raise InvalidField(param, "must be a Unix time in seconds or ISO 8601") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidField(param, "must be a Unix time in seconds or ISO 8601")
    if not 0 <= value < _LATEST:
        raise InvalidField(param, "lies before 1970 or after the year 9999; send Unix seconds, not milliseconds")
    return float(value)
