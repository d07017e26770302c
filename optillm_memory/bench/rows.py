"""The rows of a JSONL file; errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optillm_memory.errors import InvalidField


def read_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row with its place ("FILE, line N"), without empty lines.

    Raises InvalidField for a file that is not UTF-8 text or has no rows, and for a row that is not a JSON object; and
    OSError for a file that cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidField("file", f"{file} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise InvalidField("file", f"{file} holds no rows")
    # Not splitlines: JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            yield _object(line, place), place


def text_field(row: Mapping[str, Any], name: str, place: str, *, empty: bool = False) -> str:
    """Return a field that must be a text, and not an empty one unless `empty`. Raises InvalidField."""
    if name not in row:
        raise InvalidField(name, f"missing in {place}")
    value = row[name]
    if not isinstance(value, str) or not (empty or value.strip()):
        kind = "a text" if empty else "a text that is not empty"
        raise InvalidField(name, f"must be {kind} in {place}, but is {value!r:.80}")
    return value


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InvalidField("row", f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidField("row", f"{place} is not a JSON object")
    return row
