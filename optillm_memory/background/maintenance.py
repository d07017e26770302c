"""Maintenance: missing vectors are filled in, and what is beyond the limits goes, behind everything else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.settings import Settings
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance.erase import (
    BATCH,
    ERASED_WITHIN_S,
    WAIT_S,
    erase,
    forget_copies,
    is_unfinished,
)
from optillm_memory.store.maintenance.retention import Limits, retain
from optillm_memory.store.transaction import Transaction

logger = logging.getLogger(__name__)

_ROWS = 64  # memories embedded in one commit
_GATHER_S = 0.02  # what was learned meanwhile is looked at together, and does not slow down who learns it
_REST = 9.0  # times as long as it looked at what is there already
_LOOK_S = 60.0  # between two looks at what is to go, and at what other processes learned
_TOGETHER_S, _ERASE_AGAIN_S = 1.0, 5.0  # for which forgetting gathers, and after which an erasure is tried again
_ANEW_S = 3_600.0  # after which everything is looked through again: what was no memory yet may be one now
Missing = Sequence[tuple[int, str, str]]


class Maintenance:
    """Three threads: for missing vectors, for what is to be deleted, and for the bytes of what was forgotten."""

    def __init__(self, store: Store, encoder: EncoderService, limits: Limits) -> None:
        """Start the threads."""
        self._store = store
        self._encoder = encoder
        self._limits = limits
        self._closing = threading.Event()
        self._missing = threading.Event()
        self._forgotten = threading.Event()
        self._caught_up = False  # every memory has its vector, but for what was learned this moment
        self._brought: set[str] = set()  # keys of vectors that came with requests before that
        self._threads = [
            threading.Thread(target=work, name=f"agent-memory-{name}", daemon=True)
            for name, work in (("upkeep", self._fill), ("retention", self._keep), ("erasure", self._erase))
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for memories without a vector."""
        self._missing.set()

    def note(self, key: str) -> None:
        """Note that a vector came with a request: those that search do not know that a memory has got one."""
        if not self._caught_up:
            self._brought.add(key)

    def erase_soon(self) -> None:
        """Take what was just forgotten out of all files."""
        self._forgotten.set()

    def close(self) -> None:
        """Stop the threads."""
        self._closing.set()
        self._missing.set()
        self._forgotten.set()
        for thread in self._threads:
            thread.join(10)

    def _fill(self) -> None:
        """Encode the memories that have no vector: those learned just now at once, those of before bit by bit.

        To look through a million takes seconds of a core, and reads much of the file while a host starts: that rests
        in between.
        """
        while not self._closing.is_set() and not self._encoder.settled.wait(0.2):
            pass
        generation = -1
        latest = looked = before = 0
        anew_at = next_at = 0.0
        while not self._closing.is_set() and self._encoder.state == "ready":
            try:
                if (current := self._store.revision().generation) != generation:  # a rebuild numbers them anew
                    generation, anew_at, self._caught_up = current, 0.0, False
                    latest = self._store.last_number()
                if time.monotonic() >= anew_at:
                    looked, before, anew_at = 0, latest, time.monotonic() + _ANEW_S
                upto, _ = self._look(latest)
                if upto > latest:
                    latest = upto
                    continue
                if looked < before and (started := time.monotonic()) >= next_at:
                    looked, found = self._look(looked)
                    if found:
                        continue
                    next_at = time.monotonic() + _REST * (time.monotonic() - started)
                if looked >= before:
                    self._caught_up = True
                    self._brought.clear()
            except Exception:
                logger.exception("agent_memory: vectors could not be filled in; trying again")
                self._closing.wait(1.0)
                continue
            self._missing.wait(_LOOK_S if looked >= before else max(0.0, next_at - time.monotonic()))
            self._closing.wait(_GATHER_S)
            self._missing.clear()

    def _look(self, after: int) -> tuple[int, bool]:
        """Encode what has no vector in a stretch of the numbers; return how far it went, and whether there was any."""
        rows, upto = self._store.without_vectors(self._encoder.fingerprint, after, _ROWS)
        if rows:
            _embed(self._store, self._encoder, rows)
        if brought := self._store.numbers_of(self._brought.copy(), after, upto):
            self._store.write(lambda tx: tx.touch(brought)).result()
        return upto, bool(rows)

    def _keep(self) -> None:
        """Take out what requests under way copied of what was forgotten, and what is beyond the limits."""
        while not self._closing.wait(_LOOK_S):
            try:
                now = time.time()
                forget_copies(self._store)
                if self._limits and (gone := retain(self._store, self._limits, now, closing=self._closing.is_set)):
                    logger.info("agent_memory: beyond the limits, and gone: %s", gone)
            except Exception:
                logger.exception("agent_memory: what is to go could not be deleted; trying again")

    def _erase(self) -> None:
        """Take the bytes of what was forgotten out of all files, of several requests together.

        Also what an earlier process left unfinished, and then all vectors in files, for it is not known whose they are.
        """
        known, failing_since = False, 0.0
        while not self._closing.is_set():
            self._forgotten.clear()
            try:
                left = []
                if is_unfinished(self._store):
                    if not known:
                        self._store.outdate_indexes(None)
                    left = erase(self._store)["left"]
                known, failing_since = True, (failing_since or time.monotonic()) if left else 0.0
                if left and time.monotonic() - failing_since > ERASED_WITHIN_S:
                    failing_since = time.monotonic()
                    logger.warning("agent_memory: what was forgotten is still in files: %s", left)
            except Exception:
                left = ["it failed"]
                logger.exception("agent_memory: what was forgotten could not be erased; trying again")
            self._forgotten.wait(_ERASE_AGAIN_S if left else _LOOK_S)
            self._closing.wait(_TOGETHER_S)


def limits_of(settings: Settings) -> Limits:
    """Return how much the settings say is kept."""
    return Limits(settings.retention_days, settings.max_traces, settings.max_bytes)


def reembed(store: Store, encoder: EncoderService, *, progress: Callable[[str], None] = lambda _: None) -> int:
    """Give every memory its vector by this encoder; return how many had none. Interrupted, it goes on where it was."""
    place = 0
    total, embedded = store.coverage()
    done = before = embedded.get(encoder.fingerprint, 0)
    while True:
        rows, upto = store.without_vectors(encoder.fingerprint, place, _ROWS)
        if rows:
            _embed(store, encoder, rows)
            done += len(rows)
        elif upto == place:
            return done - before
        place = upto
        progress(f"{done} of {total} memories embedded")


def prune_vectors(store: Store, fingerprint: str) -> int:
    """Delete the vectors of all other encoders; return how many there were."""
    gone = 0
    while count := store.write(lambda tx: tx.prune_vectors(fingerprint, BATCH)).result(WAIT_S):
        gone += count
    return gone


def _embed(store: Store, encoder: EncoderService, rows: Missing) -> None:
    vectors = encoder.encode([key for _, key, _ in rows])
    if vectors is None:
        return
    pairs = [(hashed, vector.tobytes()) for (_, _, hashed), vector in zip(rows, vectors, strict=True)]

    def fill(tx: Transaction) -> None:
        tx.put_vectors(pairs, encoder.fingerprint)
        tx.touch([number for number, _, _ in rows])

    store.write(fill).result()
