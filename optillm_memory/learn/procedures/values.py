"""Values in arguments and observations: where they stand (JSON paths), how they look, and where each came from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

SourceKind = Literal["user", "step", "constant", "free"]
_LEAVES = 2_000  # of one observation
_DEEPEST = 4  # levels of an observation that make its form


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one argument's value came from.

    `name` is its JSON path in the arguments. `kind` and `origin`: `user`, with the shape of the value; `step`, with the
    tool and JSON path of the observation that held it (`tool:path`); `constant`, with the value; `free`, where nothing
    before it held the value: whoever acts makes it up.
    """

    name: str
    kind: SourceKind
    origin: str = ""


def parsed(text: str) -> Any:
    """Return the value of a JSON text, or the text itself where it is none."""
    if text[:1] in '{["-0123456789tfn':
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


def leaves(value: Any, is_data: Callable[[str], bool] = lambda _: False) -> Iterator[tuple[str, Any]]:
    """Return (path, leaf) of a JSON value's texts, numbers and switches; places in lists are `[]`.

    The keys of an object whose keys are data (ids, and what `is_data` says of) are leaves themselves, under `{}`.
    """
    count = 0
    stack: list[tuple[str, Any]] = [("", value)]
    while stack and count < _LEAVES:
        where, found = stack.pop()
        if isinstance(found, dict):
            by_id = bool(found) and all(_is_id(key) for key in found)
            for key, inner in reversed(list(found.items())):
                if by_id or is_data(key):
                    stack.append((f"{where}{{}}", inner))
                    yield f"{where}{{}}", key
                    count += 1
                else:
                    stack.append((f"{where}.{key}" if where else str(key), inner))
        elif isinstance(found, list):
            stack.extend((f"{where}[]", inner) for inner in reversed(found))
        elif found is not None:
            yield where, found
            count += 1


def _is_id(key: str) -> bool:
    return any(c.isdigit() for c in key)


def text_of_leaf(leaf: Any) -> str:
    """Return a leaf as the text that it is compared by."""
    return leaf if isinstance(leaf, str) else json.dumps(leaf)


def values_at(observation: str, path: str) -> dict[str, Any]:
    """Return the distinct values at a path of a JSON observation, by their text."""
    return {text_of_leaf(leaf): leaf for where, leaf in leaves(parsed(observation)) if where == path}


def origins_of(slots: Iterable[Slot]) -> tuple[tuple[str, str, str], ...]:
    """Return where the values of arguments come from, so that it is equal for equal steps of a procedure."""
    return tuple((slot.name, slot.kind, slot.origin if slot.kind == "step" else "") for slot in slots)


@lru_cache(maxsize=4096)
def shape_of(text: str) -> str:
    """Return a regular expression for texts that look like this one: the same separators, letters, digits, lengths.

    Runs of lower-case letters may have any length; a word of capitals and digits, as ids are, keeps its length.
    """
    pieces = []
    for part in re.split(r"([^A-Za-z0-9]+)", text):
        if not part:
            continue
        if not part[0].isalnum() or not part.isascii():
            pieces.append(re.escape(part))
        elif part.isdigit():
            pieces.append(rf"\d{{{len(part)}}}" if len(part) > 1 else r"\d")
        elif part.islower() and part.isalpha():
            pieces.append("[a-z]+")
        elif part.isupper() and part.isalpha():
            pieces.append(rf"[A-Z]{{{len(part)}}}")
        elif part[0].isupper() and part[1:].islower() and part.isalpha():
            pieces.append("[A-Z][a-z]+")
        elif part.upper() == part:
            pieces.append(rf"[A-Z0-9]{{{len(part)}}}")
        else:
            pieces.append(r"[A-Za-z0-9]+")
    return "".join(pieces)


def is_specific(shape: str) -> bool:
    """Whether a shape tells a value from ordinary words."""
    return r"\d" in shape or "0-9" in shape or "[A-Z]{" in shape or "_" in shape or "@" in shape


def found_by_shape(shape: str, texts: Sequence[str]) -> list[str]:
    """Return the distinct values of a shape in texts, the latest text first."""
    pattern = _pattern(shape)
    values: dict[str, None] = {}
    for text in reversed(texts):
        values.update(dict.fromkeys(found.group() for found in pattern.finditer(text)))
    return list(values)


@lru_cache(maxsize=1024)
def _pattern(shape: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9_]){shape}(?![A-Za-z0-9_])")


def stands_in(value: str, text: str) -> bool:
    """Whether a value stands in a text as words of its own, whatever its case."""
    return stands_in_lowered(value.lower(), text.lower())


def stands_in_lowered(value: str, text: str) -> bool:
    """Whether a value stands in a text as words of its own, where both are in lower case."""
    place = text.find(value)
    while place >= 0:
        end = place + len(value)
        before, after = text[place - 1 : place], text[end : end + 1]
        if not (before.isalnum() and value[:1].isalnum()) and not (after.isalnum() and value[-1:].isalnum()):
            return True
        place = text.find(value, place + 1)
    return False


def digest_of(observation: str) -> str:
    """Return a digest by which equal observations are known: of JSON by its value, of text by its words."""
    value = parsed(observation)
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def shape_of_observation(observation: str) -> str:
    """Return a digest of an observation's form: of JSON the keys and the kinds of values, of text that it is one."""
    text = json.dumps(_form(parsed(observation), 0))
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=6).hexdigest()


def _form(value: Any, depth: int) -> Any:
    if isinstance(value, dict) and depth < _DEEPEST:
        if value and all(_is_id(key) for key in value):
            return ["{}", _form(next(iter(value.values())), depth + 1)]
        return {key: _form(value[key], depth + 1) for key in sorted(value)}
    if isinstance(value, list) and depth < _DEEPEST:
        return ["[]", _form(value[0], depth + 1)] if value else ["[]"]
    return "null" if value is None else "number" if isinstance(value, (int, float)) else "text"
