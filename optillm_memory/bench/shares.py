"""Shares and means as benches report them: the value, what it was counted over, and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.learn.confidence import wilson

_Z = 1.959964  # of a normal distribution, 95 % lies within so many standard deviations


def share(name: str, count: int, total: int) -> dict[str, Any]:
    """Return a share with its count and its interval (Wilson 1927); no value where there was nothing to count."""
    if not total:
        return {name: None, f"{name}_count": "0/0", f"{name}_interval": None}
    found = wilson(count, total, _Z)
    interval = _within(found.low, found.high)
    return {name: round(count / total, 4), f"{name}_count": f"{count}/{total}", f"{name}_interval": interval}


def mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of values between 0 and 1 with their number and its interval (none for a single value)."""
    n = len(values)
    if not n:
        return {name: None, f"{name}_count": 0, f"{name}_interval": None}
    middle = sum(values) / n
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    interval = None if spread is None else _within(middle - _Z * spread, middle + _Z * spread)
    return {name: round(middle, 4), f"{name}_count": n, f"{name}_interval": interval}


def ratio(name: str, parts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the ratio of two sums over independent parts, with both sums and its interval (by linearisation)."""
    above, below = sum(a for a, _ in parts), sum(b for _, b in parts)
    if not below:
        return {name: None, f"{name}_count": "0/0", f"{name}_interval": None}
    found, n = above / below, len(parts)
    interval = None
    if n > 1:
        variance = n / (n - 1) * sum((a - found * b) ** 2 for a, b in parts) / (below * below)
        half = _Z * math.sqrt(variance)
        interval = _within(found - half, found + half)
    return {name: round(found, 4), f"{name}_count": f"{above}/{below}", f"{name}_interval": interval}


def lines(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as people read them: a share's count and interval behind its value."""
    shown: dict[str, Any] = {}
    for name, value in figures.items():
        if f"{name}_interval" in figures:
            interval = figures[f"{name}_interval"]
            between = f", {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
            counted = figures[f"{name}_count"]
            shown[name] = f"none ({counted})" if value is None else f"{value:.4f} ({counted}{between})"
        elif not any(name == f"{other}_{part}" for other in shown for part in ("count", "interval")):
            shown[name] = value
    return shown


def _within(low: float, high: float) -> list[float]:
    return [round(max(0.0, low), 4), round(min(1.0, high), 4)]
