"""The suggester keeps fix books between requests: to learn examples and fit a calibrator takes longer than one may."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from optillm_memory.learn.suggest import Calibrator, Example, FixBook, Suggestion
from optillm_memory.records import ThreadStarter

KEPT = 64  # books
MOST_EXAMPLES = 5_000  # of one book
_AT_ONCE = 4  # examples that one request learns; more are learned in the background
_FIT_FROM = 30
_GROWN = 1.5
_REHEARSED = 48
_PAUSE_S = 0.02  # between examples in the background, so that requests have the interpreter in between


@dataclass
class _Shelf:
    """One owner's book, the place of each example in it, and how many examples its calibrator was fitted to."""

    book: FixBook = field(default_factory=FixBook)
    places: dict[tuple[str, str, str], int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    fitted: int = 0
    busy: bool = False


class Suggester:
    """Fix books by owner (a scope's tool). Thread-safe.

    A few new examples are learned by the request that brings them, more of them and the calibrator in the background;
    until then the constants stand, and examples that are not learned yet suggest nothing.
    """

    def __init__(self, start: ThreadStarter) -> None:
        """`start` gives the background work a thread."""
        self._start = start
        self._lock = threading.Lock()
        self._shelves: OrderedDict[Hashable, _Shelf] = OrderedDict()

    def suggest(
        self, owner: Hashable, examples: Sequence[Example], action: str, output: str, *, min_confidence: float
    ) -> tuple[Suggestion, Sequence[Example]] | None:
        """Return what these examples suggest for a failing action, with the examples that its `support` counts.

        A book is asked by one thread at a time.
        """
        shelf = self._shelf(owner)
        with shelf.lock:
            places = [self._place(shelf, e) for e in examples]
            missing = [e for e, place in zip(examples, places, strict=True) if place is None]
            places += [self._add(shelf, example) for example in missing[:_AT_ONCE]]
            among = [place for place in places if place is not None]
            found = shelf.book.suggest(action, output, min_confidence=min_confidence, among=among) if among else None
            answer = (found, shelf.book.examples) if found is not None else None
        if len(missing) > _AT_ONCE:
            self._in_background(shelf, "agent-memory-fixes", lambda: self._learn(shelf, missing[_AT_ONCE:]))
        elif len(shelf.places) >= max(_FIT_FROM, _GROWN * shelf.fitted):
            self._in_background(shelf, "agent-memory-calibrate", lambda: self._fit(shelf))
        return answer

    def _shelf(self, owner: Hashable) -> _Shelf:
        with self._lock:
            shelf = self._shelves.get(owner)
            if shelf is None or len(shelf.places) > MOST_EXAMPLES:
                shelf = self._shelves[owner] = _Shelf()
            self._shelves.move_to_end(owner)
            while len(self._shelves) > KEPT:
                self._shelves.popitem(last=False)
            return shelf

    def _place(self, shelf: _Shelf, example: Example) -> int | None:
        place = shelf.places.get((example.action, example.output, example.fix))
        if place is not None and shelf.book.examples[place].weight != example.weight:
            shelf.book.weigh(place, example.weight)
        return place

    def _add(self, shelf: _Shelf, example: Example) -> int:
        key = example.action, example.output, example.fix
        if key not in shelf.places:
            shelf.places[key] = shelf.book.add(example)
            shelf.book.learn(shelf.places[key])
        return shelf.places[key]

    def _in_background(self, shelf: _Shelf, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:  # what could not be done is tried again by a later request
                shelf.busy = False

        with self._lock:
            if shelf.busy:
                return
            shelf.busy = True
        try:
            self._start(name, run)
        except BaseException:
            shelf.busy = False
            raise

    def _learn(self, shelf: _Shelf, examples: Sequence[Example]) -> None:
        for example in examples:
            with shelf.lock:
                self._add(shelf, example)
            time.sleep(_PAUSE_S)

    def _fit(self, shelf: _Shelf) -> None:
        count = len(shelf.places)
        features: list[tuple[float, ...]] = []
        right: list[bool] = []
        for index in range(0, count, max(1, count // _REHEARSED)):
            with shelf.lock:
                found, labels = shelf.book.rehearse(index)
            features += found
            right += labels
            time.sleep(_PAUSE_S)
        shelf.fitted = count
        shelf.book.calibrator = Calibrator().fitted(features, right)
