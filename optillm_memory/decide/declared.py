"""Arguments as a tool declares them: with the declared types, or found not to fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optillm_memory.learn.procedures.values import parsed, text_of_leaf

_KINDS: dict[str, type | tuple[type, ...]] = {"integer": int, "number": (int, float), "boolean": bool}


def as_declared(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any] | None:
    """Return a call's arguments with the types that its tool's JSON schema declares, None where they do not fit it.

    A value that was bound by its text may have lost its type. A schema that says nothing of an argument's names fits
    everything.
    """
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or not properties:
        return dict(arguments)
    required = schema.get("required")
    if not set(arguments) <= set(properties) or not set(required if isinstance(required, list) else ()) <= {*arguments}:
        return None
    found = {name: _typed(value, properties[name]) for name, value in arguments.items()}
    return found if all(_is_allowed(value, properties[name]) for name, value in found.items()) else None


def _typed(value: Any, declared: Any) -> Any:
    kind = declared.get("type") if isinstance(declared, Mapping) else None
    if kind == "string" and isinstance(value, (bool, int, float)):
        return text_of_leaf(value)
    if isinstance(kind, str) and kind in _KINDS and isinstance(value, str):
        meant = parsed(value)
        fits = isinstance(meant, _KINDS[kind]) and (kind == "boolean" or not isinstance(meant, bool))
        return meant if fits else value
    return value


def _is_allowed(value: Any, declared: Any) -> bool:
    allowed = declared.get("enum") if isinstance(declared, Mapping) else None
    return not isinstance(allowed, list) or value in allowed
