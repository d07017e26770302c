"""What this process has just seen: the records behind a response may not be on disk when the next request comes."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from optillm_memory.conversation.episodes import Candidate, Located
from optillm_memory.records import Placement, Scope

_Place: TypeAlias = tuple[str, str]  # anchor and form
_KEPT = 20_000
_BEGIN_ALIKE = 64  # episodes kept of one prefix
# After so long it is on disk, or will never be. The store knows for longer what was forgotten: none of it comes back.
_KEPT_S = 6 * 3600.0


@dataclass(slots=True)
class _Known:
    """What is known of an episode that has a prefix: requests by how they go on from there, less those that failed."""

    latest: float
    inherits: str = ""
    taken: Counter[str] = field(default_factory=Counter)


class Recent:
    """Episodes by conversation prefix, and what is under way by episode; the oldest are forgotten (the store has them).

    A request takes the place where a conversation goes on when it begins, long before its record is on disk.

    Thread-safe. The time is given with each call.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._episodes: OrderedDict[tuple[Scope, str], dict[str, _Known]] = OrderedDict()
        self._advice: OrderedDict[tuple[Scope, str], tuple[float, tuple[Any, ...]]] = OrderedDict()
        self._placements: OrderedDict[tuple[Scope, str], dict[_Place, tuple[float, Placement]]] = OrderedDict()

    def remember(
        self, scope: Scope, episode_id: str, prefixes: Iterable[str], fresh: Sequence[Placement], now: float
    ) -> None:
        """Note that these prefixes belong to an episode, and what has just been put in its prompts."""
        with self._lock:
            for prefix in prefixes:
                self._episodes.setdefault((scope, prefix), {}).pop(episode_id, None)
                self._known(scope, prefix, episode_id, now)
            if fresh:
                noted: dict[_Place, tuple[float, Placement]] = {(p.anchor, p.form): (now, p) for p in fresh}
                self._placements.setdefault((scope, episode_id), {}).update(noted)
            for kept in (self._episodes, self._placements):
                while len(kept) > _KEPT:
                    kept.popitem(last=False)

    def advise(self, scope: Scope, episode_id: str, advice: Sequence[Any], now: float) -> None:
        """Note what the next request of an episode is to be told."""
        with self._lock:
            self._advice[scope, episode_id] = now, tuple(advice)
            while len(self._advice) > _KEPT:
                self._advice.popitem(last=False)

    def pending_advice(self, scope: Scope, episode_id: str, now: float) -> tuple[Any, ...]:
        """Return, once, what an episode's next request is to be told."""
        with self._lock:
            at, advice = self._advice.pop((scope, episode_id), (now, ()))
        return advice if now - at < _KEPT_S else ()

    def episodes_of(self, scope: Scope, prefix: str) -> list[Candidate]:
        """Return the episodes that have a prefix, as far as they are known here."""
        with self._lock:
            return [
                Candidate(name, k.latest, continuations=frozenset(+k.taken), inherits=k.inherits, here=True)
                for name, k in self._episodes.get((scope, prefix), {}).items()
            ]

    def take(self, scope: Scope, located: Located, now: float) -> None:
        """Note that a request goes on from a prefix in this way."""
        with self._lock:
            known = self._known(scope, located.continued, located.episode_id, now)
            known.inherits = located.inherits
            known.taken[located.continuation] += 1

    def _known(self, scope: Scope, prefix: str, episode_id: str, now: float) -> _Known:
        episodes = self._episodes.setdefault((scope, prefix), {})
        known = episodes.setdefault(episode_id, _Known(now))
        known.latest = now
        while len(episodes) > _BEGIN_ALIKE:
            del episodes[next(iter(episodes))]
        return known

    def settle(self, scope: Scope, located: Located, *, answered: bool) -> None:
        """Note what became of a request that took its place: where it was not answered, it has not gone on."""
        with self._lock:
            known = self._episodes.get((scope, located.continued), {}).get(located.episode_id)
            if known is not None and answered:
                known.inherits = ""
            elif known is not None:
                known.taken[located.continuation] -= 1

    def ledger(
        self, scope: Scope, episode_id: str, written: Callable[[], Sequence[Placement]], now: float
    ) -> list[Placement]:
        """Return what stands in an episode's prompts, in order: what is `written`, and what is on its way there.

        Any process may have put it there, so what is written comes first; it is not kept here any longer: where it is
        deleted there, it is gone.
        """
        key = (scope, episode_id)
        with self._lock:  # before it is read what is written: what gets there in between must not be missed
            noted = dict(self._placements.get(key, {}))
        found = {(p.anchor, p.form): p for p in written()}
        under_way = {place: p for place, (at, p) in noted.items() if now - at < _KEPT_S and place not in found}
        with self._lock:
            known = self._placements.get(key, {})
            for place in noted.keys() - under_way.keys():
                if known.get(place) is noted[place]:
                    del known[place]
            if not known:
                self._placements.pop(key, None)
        return sorted([*found.values(), *under_way.values()], key=lambda p: p.position)
