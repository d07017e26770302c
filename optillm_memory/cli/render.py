"""How the command line renders records as text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

_LEVELS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def finding_line(level: str, name: str, message: str) -> str:
    """Return a finding of `doctor` or `verify` as one line."""
    return f"{_LEVELS[level]}  {name:18} {message}"


def mapping(values: Mapping[str, Any]) -> str:
    """Return names and values in two columns."""
    width = max(len(name) for name in values)
    # Further lines of a value are indented, so that none looks like a name with its value.
    lines = ((name, _value(value).replace("\n", "\n" + " " * (width + 2))) for name, value in values.items())
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def trace_lines(found: Sequence[Mapping[str, Any]]) -> str:
    """Return one line for each trace: time, id, action, outcome, task."""
    lines = []
    for trace in found:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trace["created_at"]))
        verdict = trace["outcome"]["verdict"]
        lines.append(f"{moment}  {trace['trace_id']}  {trace['action']:8} {verdict:8} {short(trace['task'])}")
    return "\n".join(lines) or "no traces"


def memory_lines(found: Sequence[Mapping[str, Any]]) -> str:
    """Return one line for each memory: id, status, counts, task and answer."""
    lines = []
    for memory in found:
        score = f"{memory['score']:.3f}  " if "score" in memory else ""
        counts = f"+{memory['successes']} -{memory['failures']}"
        lines.append(
            f"{score}{memory['memory_id']}  {memory['status']:11} {counts:8} "
            f"{short(memory['task'])} → {short(memory['answer'], 40)}"
        )
    return "\n".join(lines) or "no memories"


def short(text: str, limit: int = 60) -> str:
    """Return a text as one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else str(value)
