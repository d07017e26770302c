"""Maintenance: missing vectors are filled in and what is beyond the limits is deleted, in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.threads import start_thread
from optillm_memory.errors import EncoderUnavailable, StoreError
from optillm_memory.settings import Settings
from optillm_memory.store.base import Store
from optillm_memory.store.fold import fold_older
from optillm_memory.store.maintenance.erase import BATCH, ERASED_WITHIN_S, WAIT_S, erase, forget_copies
from optillm_memory.store.maintenance.retention import Limits, retain
from optillm_memory.store.transaction import Transaction

logger = logging.getLogger(__name__)

_ROWS = 64  # memories embedded in one commit
_FOLDED = 8  # traces of an earlier release that are folded in one commit
_GATHER_S = 0.02  # what was learned meanwhile is looked at together, and does not slow down who learns it
_REST = 9.0  # times as long as it looked at what is there already
_LOOK_S = 60.0  # between two looks at what is to go, and at what other processes learned
_TOGETHER_S, _ERASE_AGAIN_S = 1.0, 5.0  # for which forgetting gathers, and after which an erasure is tried again
_REPEAT_S = 3_600.0  # after which everything is looked through again: what was no memory yet may be one now
_CLOSING_S = 10.0
_SEAL_AGAIN_S = 86_400.0
_BREATH_S = 0.001  # now and then, while every row is read: whoever has a request goes first
Missing = Sequence[tuple[int, str, str]]


class Maintenance:
    """Four threads: for missing vectors, what is to be deleted, the bytes of what was forgotten, and the seal."""

    def __init__(self, store: Store, encoder: EncoderService, settings: Settings) -> None:
        """Join what `start` needs; the settings say how much is kept."""
        self._store = store
        self._encoder = encoder
        self._limits = Limits(settings.retention_days, settings.max_traces, settings.max_bytes)
        self._closing = threading.Event()
        self._missing = threading.Event()
        self._forgotten = threading.Event()
        self._caught_up = False  # every memory has its vector, but for what was learned this moment
        self._arrived: set[str] = set()  # keys of vectors that came with requests before that
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        self._threads.append(start_thread("agent-memory-vectors", self._fill))
        self._threads.append(start_thread("agent-memory-retention", self._delete))
        self._threads.append(start_thread("agent-memory-erasure", self._erase))
        self._threads.append(start_thread("agent-memory-seal", self._check_seal))

    def wake(self) -> None:
        """Look for memories without a vector."""
        self._missing.set()

    def vector_arrived(self, key: str) -> None:
        """Note that a vector came with a request: searches do not know yet that a memory has it."""
        with self._lock:
            if not self._caught_up:
                self._arrived.add(key)

    def erase_soon(self) -> None:
        """Remove the bytes of what was just forgotten from all files."""
        self._forgotten.set()

    def close(self) -> None:
        """Stop the threads."""
        self._closing.set()
        self._missing.set()
        self._forgotten.set()
        for thread in self._threads:
            thread.join(_CLOSING_S)

    def _fill(self) -> None:
        """Encode the memories that have no vector: those learned just now at once, older ones bit by bit.

        To look through a million takes seconds of a core, and reads much of the file while a host starts: so this
        rests in between.
        """
        while not self._closing.is_set() and not self._encoder.settled.wait(0.2):
            pass
        generation = -1
        latest = looked = before = 0
        repeat_at = next_at = 0.0
        while not self._closing.is_set() and self._encoder.state == "ready":
            try:
                current = self._store.recall.revision().generation
                if current != generation:  # a rebuild numbers memories again
                    generation, repeat_at, self._caught_up = current, 0.0, False
                    latest = self._store.vectors.last_number()
                if time.monotonic() >= repeat_at:
                    looked, before, repeat_at = 0, latest, time.monotonic() + _REPEAT_S
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
                    with self._lock:
                        self._caught_up = True
                        self._arrived.clear()
            except Exception:
                logger.exception("agent_memory: vectors could not be filled in; trying again")
                self._closing.wait(1.0)
                continue
            self._missing.wait(_LOOK_S if looked >= before else max(0.0, next_at - time.monotonic()))
            self._closing.wait(_GATHER_S)
            self._missing.clear()

    def _look(self, after: int) -> tuple[int, bool]:
        """Encode what has no vector in a stretch of the numbers; return how far it went, and whether there was any."""
        rows, upto = self._store.vectors.missing(self._encoder.fingerprint, after, _ROWS)
        if rows:
            _embed(self._store, self._encoder, rows)
        with self._lock:
            arrived = self._arrived.copy()
        if found := self._store.vectors.numbers_of(arrived, after, upto):
            self._store.write(lambda tx: tx.exemplars.touch(found)).result(WAIT_S)
        return upto, bool(rows)

    def _delete(self) -> None:
        """Delete what requests under way copied of what was forgotten, and what is beyond the limits.

        Before that, what an earlier release recorded is folded.
        """
        self._fold_older()
        while not self._closing.wait(_LOOK_S):
            try:
                now = time.time()
                forget_copies(self._store)
                if self._limits and (gone := retain(self._store, self._limits, now, closing=self._closing.is_set)):
                    logger.info("agent_memory: deleted, for it was beyond the limits: %s", gone)
            except Exception:
                logger.exception("agent_memory: what is beyond the limits could not be deleted; trying again")

    def _fold_older(self) -> None:
        more = True
        while more and not self._closing.is_set():
            started = time.monotonic()
            try:
                more = self._store.write(lambda tx: fold_older(tx, _FOLDED)).result(WAIT_S)
            except Exception:
                logger.exception("agent_memory: what an earlier release recorded could not be folded; rebuild does it")
                return
            self._closing.wait(_REST * (time.monotonic() - started))

    def _erase(self) -> None:
        """Remove the bytes of what was forgotten from all files, for several requests together.

        Also what an earlier process left unfinished, and then all vectors in files, for it is not known whose they are.
        """
        resumed, failing_since = True, 0.0
        while not self._closing.is_set():
            left: list[str] = []
            try:
                if self._store.forgetting.is_unfinished():
                    if resumed:
                        self._store.outdate_indexes(None)
                    left = erase(self._store)["left"]
                resumed = False
            except Exception:
                left = ["the log says why"]
                logger.exception("agent_memory: what was forgotten could not be erased; trying again")
            failing_since = (failing_since or time.monotonic()) if left else 0.0
            if left and time.monotonic() - failing_since > ERASED_WITHIN_S:
                failing_since = time.monotonic()
                logger.warning("agent_memory: what was forgotten is still in files: %s", left)
            self._forgotten.wait(_ERASE_AGAIN_S if left else _LOOK_S)
            self._closing.wait(_TOGETHER_S)
            self._forgotten.clear()  # before the look at whether this closes: its call to wake up must not be lost

    def _check_seal(self) -> None:
        """Compare every row with the seal, at the start and now and then."""
        while not self._closing.is_set():
            wait_s = _SEAL_AGAIN_S
            try:
                self._store.check_seal(rest=self._rest)
            except _ClosingError:
                return
            except StoreError:  # the file is being opened again, or cannot be read now
                wait_s = _LOOK_S
            except Exception:
                logger.exception("agent_memory: the seal could not be checked; trying again")
            self._closing.wait(wait_s)

    def _rest(self) -> None:
        if self._closing.wait(_BREATH_S):
            raise _ClosingError


class _ClosingError(Exception):
    """What is under way is left, for this closes."""


def reembed(store: Store, encoder: EncoderService, *, progress: Callable[[str], None] = lambda _: None) -> int:
    """Give every memory its vector by this encoder; return how many had none.

    Interrupted, it goes on where it was. Raises EncoderUnavailable.
    """
    place = 0
    total, embedded = store.vectors.coverage()
    done = before = embedded.get(encoder.fingerprint, 0)
    while True:
        rows, upto = store.vectors.missing(encoder.fingerprint, place, _ROWS)
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
    while count := store.write(lambda tx: tx.vectors.prune(fingerprint, BATCH)).result(WAIT_S):
        gone += count
    return gone


def _embed(store: Store, encoder: EncoderService, rows: Missing) -> None:
    """Give memories their vectors: those of the same encoder under a former fingerprint, else new ones."""
    if encoder.former_fingerprints:
        rows = store.write(lambda tx: _renamed(tx, encoder, rows)).result(WAIT_S)
    if not rows:
        return
    vectors = encoder.encode([key for _, key, _ in rows])
    if vectors is None:
        raise EncoderUnavailable(f"the encoder is {encoder.state}: {encoder.reason}")
    pairs = [(hashed, vector.tobytes()) for (_, _, hashed), vector in zip(rows, vectors, strict=True)]

    def fill(tx: Transaction) -> None:
        tx.vectors.put(pairs, encoder.fingerprint)
        tx.exemplars.touch([number for number, _, _ in rows])

    store.write(fill).result(WAIT_S)


def _renamed(tx: Transaction, encoder: EncoderService, rows: Missing) -> Missing:
    """Take over the vectors that have a former fingerprint of the encoder; return the memories without one."""
    hashes = [hashed for _, _, hashed in rows]
    renamed = tx.vectors.rename(hashes, encoder.former_fingerprints, encoder.fingerprint)
    if renamed:
        tx.exemplars.touch([number for number, _, hashed in rows if hashed in renamed])
    return [row for row in rows if row[2] not in renamed]
