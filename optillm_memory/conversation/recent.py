"""What this process has just seen: the records behind a response may not be on disk when the next request comes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from optillm_memory.records import Placement, Scope

_KEPT = 20_000


class Recent:
    """Episodes by conversation prefix, and placements by episode; the oldest are forgotten (the store has them)."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._episodes: OrderedDict[tuple[Scope, str], str] = OrderedDict()
        self._advice: OrderedDict[tuple[Scope, str], tuple[Any, ...]] = OrderedDict()
        self._placements: OrderedDict[tuple[Scope, str], tuple[Placement, ...]] = OrderedDict()

    def remember(self, scope: Scope, episode_id: str, prefixes: Iterable[str], placements: Sequence[Placement]) -> None:
        """Note that these prefixes belong to an episode, and what stands in the prompts of its conversations."""
        with self._lock:
            for prefix in prefixes:
                self._episodes[scope, prefix] = episode_id
            before = self._placements.get((scope, episode_id), ())
            merged = {(p.anchor, p.form): p for p in (*placements, *before)}
            self._placements[scope, episode_id] = tuple(sorted(merged.values(), key=lambda p: p.position))
            for kept in (self._episodes, self._placements):
                while len(kept) > _KEPT:
                    kept.popitem(last=False)

    def advise(self, scope: Scope, episode_id: str, advice: Sequence[Any]) -> None:
        """Note what the next request of an episode is to be told."""
        with self._lock:
            self._advice[scope, episode_id] = tuple(advice)
            while len(self._advice) > _KEPT:
                self._advice.popitem(last=False)

    def pending_advice(self, scope: Scope, episode_id: str) -> tuple[Any, ...]:
        """Return, once, what an episode's next request is to be told."""
        with self._lock:
            return self._advice.pop((scope, episode_id), ())

    def episode_of(self, scope: Scope, prefixes: Iterable[str]) -> str | None:
        """Return the episode of the first prefix that is known."""
        with self._lock:
            return next((e for p in prefixes if (e := self._episodes.get((scope, p)))), None)

    def placements(self, scope: Scope, episode_id: str) -> tuple[Placement, ...] | None:
        """Return what stands in an episode's prompts, in order; None where this process has not seen it."""
        with self._lock:
            return self._placements.get((scope, episode_id))
