"""Refusals: forms of insertion that a model's provider refused recently, and that are not tried for a while."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from optillm_memory.records import Scope

FORMS = frozenset(("turns", "block"))
REFUSED_FOR_S = 600.0
_EPISODE_FOR_S = 6 * 3600.0  # its prompts were sent without insertions, and the prompt cache holds them so
_KEPT = 10_000


class Refusals:
    """Recent refusals in this process. Thread-safe; each call takes the time."""

    def __init__(self) -> None:
        """Start without refusals."""
        self._lock = threading.Lock()
        self._forms: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._episodes: OrderedDict[tuple[Scope, str], float] = OrderedDict()

    def note(self, scope: Scope, episode_id: str, model: str, forms: Iterable[str], now: float) -> None:
        """Record that a model refused a prompt with insertions of these forms, and accepted it without."""
        with self._lock:
            for form in forms:
                self._forms[scope.tenant, model, form] = now
                self._forms.move_to_end((scope.tenant, model, form))
            self._episodes[scope, episode_id] = now
            self._episodes.move_to_end((scope, episode_id))
            for kept in (self._forms, self._episodes):
                while len(kept) > _KEPT:
                    kept.popitem(last=False)

    def forms(self, scope: Scope, episode_id: str, model: str, now: float) -> frozenset[str]:
        """Return the forms not to use with a model in an episode."""
        with self._lock:
            if now - self._episodes.get((scope, episode_id), -_EPISODE_FOR_S) < _EPISODE_FOR_S:
                return FORMS
            refused_at = {form: self._forms.get((scope.tenant, model, form), -REFUSED_FOR_S) for form in FORMS}
        return frozenset(form for form, at in refused_at.items() if now - at < REFUSED_FOR_S)
