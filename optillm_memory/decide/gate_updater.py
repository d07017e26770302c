"""The gate updater: one scope's gate, brought up to date with the labels as they come, late ones included."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from optillm_memory.decide.gate import Gate, Label
from optillm_memory.records import ThreadStarter

_PATIENCE = 32  # requests that a label is waited for; after one that comes later everything is folded again
_INLINE = 2_000  # labels that are folded again within a request; more take a thread of their own


@dataclass(frozen=True, slots=True)
class Change:
    """A proposal that came, or whose label changed; those `served` rarely get feedback, so it is not waited for."""

    trace_id: str
    label: Label
    served: bool
    encoder: str = ""  # the fingerprint of the encoder that the score is of; empty in logs of earlier releases


class GateUpdater:
    """Keeps a gate equal to `Gate(labels in the order of their requests)`, without folding all of them each time.

    The gate lags behind by the requests whose feedback is still awaited, `_PATIENCE` at most. Thread-safe.
    """

    def __init__(self, start: ThreadStarter) -> None:
        """Start with no label; `start` gives long folds a thread."""
        self._start = start
        self.since = 0  # the store's revision up to which changes were taken
        self._lock = threading.Lock()
        self._changes: dict[str, Change] = {}
        self._order: list[str] = []
        self._settled = 0
        self._gate = Gate()
        self._late = self._folding = False

    @property
    def gate(self) -> Gate:
        """The gate as it stands."""
        return self._gate

    def take(self, since: int, revision: int, changed: Iterable[Change]) -> bool:
        """Take the proposals that came or changed after `since`, up to a revision; their trace ids order them.

        False, and nothing is taken, where others were taken since these were read: these may be out of date.
        """
        with self._lock:
            if since != self.since:
                return False
            self.since = max(self.since, revision)
            for change in changed:
                known = self._changes.get(change.trace_id)
                if known != change:
                    self._late |= self._settled > 0 and change.trace_id <= self._order[self._settled - 1]
                    self._changes[change.trace_id] = change
                if known is None:
                    bisect.insort(self._order, change.trace_id)
            if self._folding:
                return True  # the thread looks again when it is done
            if not self._late:
                self._extend()
            elif len(self._order) <= _INLINE:
                self._adopt(Gate(), 0)
            else:
                self._start("agent-memory-gate", self._fold_again)  # which waits for the lock
                self._folding = True
            return True

    def _extend(self) -> None:
        while self._settled < len(self._order):
            change = self._changes[self._order[self._settled]]
            awaited = change.label.correct is None and not change.served
            if awaited and len(self._order) - self._settled <= _PATIENCE:
                break
            self._gate.add(change.label)
            self._settled += 1

    def _adopt(self, gate: Gate, settled: int) -> None:
        self._gate, self._settled, self._late = gate, settled, False
        self._extend()

    def _fold_again(self) -> None:
        try:
            while True:
                with self._lock:
                    labels = [self._changes[trace_id].label for trace_id in self._order[: self._settled]]
                    self._late = False
                started = time.monotonic()
                gate = Gate(labels)
                with self._lock:
                    if not self._late:
                        self._adopt(gate, len(labels))
                        self._folding = False
                        return
                    self._gate = gate  # as good as can be had while older labels keep coming in
                time.sleep(time.monotonic() - started)
        except BaseException:
            with self._lock:
                self._late, self._folding = True, False  # the next change has it tried again
            raise
