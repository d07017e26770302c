"""Retention: the oldest and least valuable episodes go, through the same door as what is forgotten on purpose.

An episode goes whole, so that what is left of the log yields the same as before. What a memory rests on stays: verified
evidence (of a memory that never failed the latest few), the requests that put one in quarantine or retired one. What
the gate, the policy and the uplift rest on goes with its age, and last of all where it is the size that counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.erase import WAIT_S, forget_warnings, tidy
from optillm_memory.store.transaction import Transaction

BATCH = 10  # episodes in one commit: nobody who writes waits for long
GRACE_S = 86_400.0  # feedback may still come: what is younger goes last
_PAGE = 500
_ALL = 1 << 62
_DAY_S = 86_400.0
_SLACK = 0.02  # trimmed below a limit, so that not every request is one too many
NOTHING_KNOWN, OUTCOME_KNOWN, COUNTED, RESTED_ON = range(4)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept; 0 is no limit."""

    days: float = 0.0
    traces: int = 0
    bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.days or self.traces or self.bytes)


def retain(store: Store, limits: Limits, now: float, *, closing: Callable[[], bool] = lambda: False) -> dict[str, int]:
    """Delete what is beyond the limits, in small commits; return how many episodes went. `closing` breaks it off."""
    gone = 0
    if limits.days:
        gone += _trim(store, now - limits.days * _DAY_S, COUNTED, lambda: _ALL, closing)
    if limits.traces or limits.bytes:
        surplus = _Surplus(store, limits)
        for age, worth in ((GRACE_S, NOTHING_KNOWN), (GRACE_S, OUTCOME_KNOWN), (GRACE_S, COUNTED), (0.0, COUNTED)):
            gone += _trim(store, now - age, worth, surplus.traces, closing)
    return {"episodes": gone, **(tidy(store) if gone else {})}


class _Surplus:
    """Tells how many traces must go: once a limit is exceeded, until a little below it."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store, self._limits = store, limits
        self._aims: dict[str, float] = {}
        held = store.held()
        for name in ("traces", "bytes"):
            limit = getattr(limits, name)
            if limit and held[name] > limit:
                self._aims[name] = limit * (1 - _SLACK)

    def traces(self) -> int:
        """Return how many traces are beyond an exceeded limit, as far as their mean size tells."""
        if not self._aims:
            return 0
        held = self._store.held()
        return max(math.ceil(held["traces"] * (1 - aim / held[name])) for name, aim in self._aims.items())


def _trim(store: Store, before: float, worth: int, surplus: Callable[[], int], closing: Callable[[], bool]) -> int:
    """Delete episodes that ended before a moment and are worth so much at most; return how many."""
    gone = 0
    for batch in _batches(store, before):
        if closing() or (most := surplus()) <= 0:
            break
        went, errors = store.write(partial(_forget, batch, worth, before, most)).result(WAIT_S)
        forget_warnings(store, errors)
        gone += went
    return gone


def _forget(
    batch: list[tuple[int, str]], worth: int, before: float, most: int, tx: Transaction
) -> tuple[int, dict[int, set[str]]]:
    return deletion.delete_episodes(tx, batch, worth, before, most, time.time())


def _batches(store: Store, before: float) -> Iterator[list[tuple[int, str]]]:
    """Yield episodes that ended before a moment, oldest first; what is kept is passed by."""
    after: tuple[float, int, str] | None = None
    while page := store.forgetting.episodes_before(before, after, _PAGE):
        for start in range(0, len(page), BATCH):
            yield [(scope_id, episode_id) for _, scope_id, episode_id in page[start : start + BATCH]]
        after = page[-1]
