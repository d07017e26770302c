"""Answer forms: the normal forms in which answers are compared; a task may need one of its own."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable

from optillm_memory.errors import InvalidField
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.settings import env_name

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def form_named(name: str) -> Callable[[str], str]:
    """Return the named form: `text`, `number`, `json`, or `module:function` from the caller's own code.

    Raises InvalidField for another name, and for a missing module or function.
    """
    if name in _FORMS:
        return _FORMS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(_FORMS)
        raise InvalidField(
            env_name("answer_form"), f"{name!r} is none of {known}, and no module:function ({error})"
        ) from None
    if not callable(found):
        raise InvalidField(env_name("answer_form"), f"{name!r} is not a function")
    return _guarded(found)


def number_in(answer: str) -> str:
    """Return the last number of an answer, written plainly; without one, the whole text."""
    found = _NUMBER.findall(answer)
    return f"{float(found[-1].replace(',', '')):.12g}" if found else normal_answer(answer)


def canonical_json(answer: str) -> str:
    """Return a JSON answer with its keys sorted; what is no JSON is compared as text."""
    text = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return normal_answer(answer)


def _guarded(form: Callable[[str], object]) -> Callable[[str], str]:
    def guarded(answer: str) -> str:
        try:
            return str(form(answer))
        except Exception:  # noqa: BLE001 - the caller's code: an answer that it cannot read is compared as text
            return normal_answer(answer)

    return guarded


_FORMS: dict[str, Callable[[str], str]] = {"text": normal_answer, "number": number_in, "json": canonical_json}
