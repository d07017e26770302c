"""Recent episodes of this process: the record of a response may not be on disk when the next request arrives."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from optillm_memory.conversation.episodes import Candidate, Located
from optillm_memory.records import Placement, Scope

_Slot: TypeAlias = tuple[str, str]  # anchor and form
_KEPT = 20_000
_EPISODES_PER_PREFIX = 64  # episodes kept of one prefix
# Seconds; later it is on disk, or will never be. The store remembers longer what was forgotten, so that none returns.
_KEPT_S = 6 * 3600.0


@dataclass(slots=True)
class _EpisodeState:
    """The state of an episode with a prefix: its requests by continuation, without those that failed."""

    latest: float
    inherits: str = ""
    continuations: Counter[str] = field(default_factory=Counter)


class RecentEpisodes:
    """Episodes by conversation prefix, and pending advice and placements by episode; the oldest are dropped.

    A request claims its continuation of a prefix when it begins, long before its record is on disk. Thread-safe; each
    call takes the time.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._episodes: OrderedDict[tuple[Scope, str], dict[str, _EpisodeState]] = OrderedDict()
        self._advice: OrderedDict[tuple[Scope, str], tuple[float, tuple[Any, ...]]] = OrderedDict()
        self._placements: OrderedDict[tuple[Scope, str], dict[_Slot, tuple[float, Placement]]] = OrderedDict()

    def remember(
        self, scope: Scope, episode_id: str, prefixes: Iterable[str], fresh: Sequence[Placement], now: float
    ) -> None:
        """Remember that these prefixes belong to an episode, and its new placements."""
        with self._lock:
            for prefix in prefixes:
                self._episodes.setdefault((scope, prefix), {}).pop(episode_id, None)
                self._state(scope, prefix, episode_id, now)
            if fresh:
                pending: dict[_Slot, tuple[float, Placement]] = {(p.anchor, p.form): (now, p) for p in fresh}
                self._placements.setdefault((scope, episode_id), {}).update(pending)
            for kept in (self._episodes, self._placements):
                while len(kept) > _KEPT:
                    kept.popitem(last=False)

    def advise(self, scope: Scope, episode_id: str, advice: Sequence[Any], now: float) -> None:
        """Keep advice for the next request of an episode."""
        with self._lock:
            self._advice[scope, episode_id] = now, tuple(advice)
            while len(self._advice) > _KEPT:
                self._advice.popitem(last=False)

    def pending_advice(self, scope: Scope, episode_id: str, now: float) -> tuple[Any, ...]:
        """Remove and return the advice for an episode's next request."""
        with self._lock:
            at, advice = self._advice.pop((scope, episode_id), (now, ()))
        return advice if now - at < _KEPT_S else ()

    def episodes_of(self, scope: Scope, prefix: str) -> list[Candidate]:
        """Return the episodes with a prefix that this process has seen."""
        with self._lock:
            return [
                Candidate(name, k.latest, continuations=frozenset(+k.continuations), inherits=k.inherits, here=True)
                for name, k in self._episodes.get((scope, prefix), {}).items()
            ]

    def take(self, scope: Scope, located: Located, now: float) -> None:
        """Claim a continuation of a prefix for a request."""
        with self._lock:
            state = self._state(scope, located.continued, located.episode_id, now)
            state.inherits = located.inherits
            state.continuations[located.continuation] += 1

    def _state(self, scope: Scope, prefix: str, episode_id: str, now: float) -> _EpisodeState:
        episodes = self._episodes.setdefault((scope, prefix), {})
        state = episodes.setdefault(episode_id, _EpisodeState(now))
        state.latest = now
        while len(episodes) > _EPISODES_PER_PREFIX:
            del episodes[next(iter(episodes))]
        return state

    def settle(self, scope: Scope, located: Located, *, answered: bool) -> None:
        """Confirm the claim of a request that was answered, or withdraw it."""
        with self._lock:
            state = self._episodes.get((scope, located.continued), {}).get(located.episode_id)
            if state is not None and answered:
                state.inherits = ""
            elif state is not None:
                state.continuations[located.continuation] -= 1

    def ledger(
        self, scope: Scope, episode_id: str, stored: Callable[[], Sequence[Placement]], now: float
    ) -> list[Placement]:
        """Return the placements in an episode's prompts, by position: those in the store, and those not yet written.

        Stored placements have precedence, since any process may have written them. They are dropped here, so that
        deleting them in the store is final.
        """
        key = (scope, episode_id)
        with self._lock:  # read before the store: what is written in between must not be missed
            pending = dict(self._placements.get(key, {}))
        found = {(p.anchor, p.form): p for p in stored()}
        unwritten = {place: p for place, (at, p) in pending.items() if now - at < _KEPT_S and place not in found}
        with self._lock:
            state = self._placements.get(key, {})
            for place in pending.keys() - unwritten.keys():
                if state.get(place) is pending[place]:
                    del state[place]
            if not state:
                self._placements.pop(key, None)
        return sorted([*found.values(), *unwritten.values()], key=lambda p: p.position)
