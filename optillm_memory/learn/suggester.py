"""The suggester keeps fix books between requests: to induce programs and fit a calibrator takes longer than one may."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from optillm_memory.learn.suggest import Calibrator, Example, FixBook, Suggestion, normal
from optillm_memory.records import ThreadStarter

KEPT = 64
_FIT_FROM = 30
_GROWN = 1.5
_REHEARSED = 32
_PAUSE_S = 0.05  # between rehearsals, so that requests have the interpreter in between


class Suggester:
    """Fix books by their content, and calibrators by owner (a scope's tool). Thread-safe.

    A calibrator is fitted in the background of the request that first needs it; until then the constants stand.
    """

    def __init__(self, start: ThreadStarter) -> None:
        """`start` gives the fitting a thread."""
        self._start = start
        self._lock = threading.Lock()
        self._books: OrderedDict[tuple[Hashable, tuple[Example, ...]], tuple[FixBook, threading.Lock]] = OrderedDict()
        self._fitted: OrderedDict[Hashable, tuple[int, Calibrator]] = OrderedDict()
        self._fitting = False

    def suggest(
        self, owner: Hashable, examples: Sequence[Example], action: str, output: str, *, min_confidence: float
    ) -> Suggestion | None:
        """Return what these examples suggest for a failing action, with what was learned of the owner's confidences.

        A book is asked by one thread at a time; the first that asks fills its caches for all.
        """
        book, lock = self._book(owner, examples)
        with lock:
            return book.suggest(action, output, min_confidence=min_confidence)

    def _book(self, owner: Hashable, examples: Sequence[Example]) -> tuple[FixBook, threading.Lock]:
        key = (owner, tuple(examples))
        with self._lock:
            known = self._books.get(key)
            count, calibrator = self._fitted.get(owner, (0, Calibrator()))
            if known is None:
                known = self._books[key] = FixBook(examples, calibrator=calibrator), threading.Lock()
            self._books.move_to_end(key)
            while len(self._books) > KEPT:
                self._books.popitem(last=False)
            if len(examples) >= max(_FIT_FROM, _GROWN * count) and not self._fitting:
                self._start("agent-memory-calibrate", lambda: self._fit(*key))
                self._fitting = True  # before the thread, which waits for the lock, says that it is done
        return known

    def _fit(self, owner: Hashable, examples: tuple[Example, ...]) -> None:
        fitted = None
        try:
            fitted = self._calibrator(examples)
        finally:  # where it could not be fitted, the present one stands until there are more examples
            with self._lock:
                calibrator = fitted or self._fitted.get(owner, (0, Calibrator()))[1]
                self._fitting = False
                self._fitted[owner] = len(examples), calibrator
                self._fitted.move_to_end(owner)
                while len(self._fitted) > KEPT:
                    self._fitted.popitem(last=False)
                for (whose, _), (book, _) in self._books.items():
                    if whose == owner:
                        book.calibrator = calibrator

    def _calibrator(self, examples: Sequence[Example]) -> Calibrator:
        book, shares, right = FixBook(examples, calibrator=Calibrator()), [], []
        for index in range(0, len(examples), max(1, len(examples) // _REHEARSED)):
            example = examples[index]
            if (found := book.best(example.action, example.output, without=index)) is not None:
                shares.append(found[1])
                right.append(normal(found[0]) == normal(example.fix))
            time.sleep(_PAUSE_S)
        return Calibrator().fitted(shares, right)
