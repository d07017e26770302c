"""Language floors: in which languages the encoder tells related texts from unrelated ones, by a scope's own pairs.

An English encoder finds all Chinese texts alike. Whether it knows a language shows in the cosines of a scope's own
texts in that language, most of which have nothing to do with each other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from optillm_memory.conversation.language import language_of
from optillm_memory.recall.relevance_floor import expected_maximum, spread_of
from optillm_memory.records import Scope

SAMPLE = 256  # the latest memories of a scope
_FROM = 4  # texts of a language, from which on their pairs tell something
# So much nearer than unrelated English texts may those of another language come to each other.
_TRUSTED = 0.12
_SCOPES_KEPT = 256


class Source(Protocol):
    """Where a scope's texts and vectors are read."""

    def sample(self, scope: Scope, fingerprint: str, limit: int) -> Sequence[tuple[str, bytes]]:
        """Return (task, vector) of the latest memories of a scope that are searched by meaning."""


@dataclass(frozen=True, slots=True)
class _Measured:
    revision: int
    fingerprint: str
    spreads: dict[str, tuple[float, float, int]]

    @property
    def until(self) -> float:
        """The revision at which it is measured again."""
        return 1.5 * self.revision + 2


class LanguageFloors:
    """Keeps what was measured of recently used scopes; measures again each time a scope has grown by half."""

    def __init__(self, source: Source) -> None:
        """Start with nothing measured."""
        self._source = source
        self._lock = threading.Lock()
        self._scopes: OrderedDict[Scope, _Measured] = OrderedDict()

    def floor(
        self, scope: Scope, language: str, fingerprint: str, revision: int, unrelated: tuple[float, float]
    ) -> float | None:
        """Return the cosine that related texts in a language must reach; None where the encoder cannot tell them.

        `unrelated` is the median and spread of unrelated English texts; `revision` is the store's.
        """
        measured = self._measured(scope, fingerprint, revision)
        middle, spread, count = measured.spreads.get(language, (0.0, 0.0, 0))
        if count < _FROM:
            return None
        own = expected_maximum((middle, spread), count)
        return own if own <= expected_maximum(unrelated, count) + _TRUSTED else None

    def _measured(self, scope: Scope, fingerprint: str, revision: int) -> _Measured:
        with self._lock:
            known = self._scopes.get(scope)
            if known is not None:
                self._scopes.move_to_end(scope)
        if (
            known is not None
            and known.fingerprint == fingerprint
            and known.revision <= revision < 1.5 * known.revision + 2
        ):
            return known
        texts: defaultdict[str, list[bytes]] = defaultdict(list)
        for task, vector in self._source.sample(scope, fingerprint, SAMPLE):
            texts[language_of(task)].append(vector)
        spreads = {
            language: (*spread_of(np.stack([np.frombuffer(v, dtype=np.float32) for v in vectors])), len(vectors))
            for language, vectors in texts.items()
            if len(vectors) >= _FROM
        }
        measured = _Measured(revision, fingerprint, spreads)
        with self._lock:
            self._scopes[scope] = measured
            while len(self._scopes) > _SCOPES_KEPT:
                self._scopes.popitem(last=False)
        return measured
