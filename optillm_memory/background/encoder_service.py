"""The encoder off the request path: loaded in the background, batched, cached, asked with a time limit."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import numpy as np
from numpy.typing import NDArray

from optillm_memory.background.threads import start_thread
from optillm_memory.errors import EncoderUnavailable
from optillm_memory.recall.encoder import REFERENCE, Encoder
from optillm_memory.recall.relevance_floor import UNRELATED, spread_of

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]
_Key = tuple[str, str]  # owner and text
_Asked = tuple[_Key, "Future[Vector]"]
BATCH = 16
_CLOSING_S = 5.0
_STOP = None


class PendingVector:
    """A vector that was asked for; `state` is the encoder's, or `slow` where it missed the time limit."""

    def __init__(self, found: Vector | Future[Vector] | None, state: str, timeout_s: float) -> None:
        """Keep what is known by now; the time limit starts now."""
        self._found = found
        self.state = state
        self._until = time.monotonic() + timeout_s

    def vector(self) -> Vector | None:
        """Wait for the vector within the limit; None without an encoder, or with one that is too slow."""
        if not isinstance(self._found, Future):
            return self._found
        try:
            return self._found.result(timeout=max(self._until - time.monotonic(), 0.001))
        except (TimeoutError, FutureTimeoutError):  # two unrelated errors before Python 3.11
            self.state = "slow"
            return None


class EncoderService:
    """One thread owns the encoder; concurrent requests are encoded together.

    Vectors are cached by tenant (`owner`): how quickly one is there must not tell what another tenant has asked.

    `state` is `loading`, `ready`, `none` (recall is lexical by choice), `failed` (lexical; `reason` says why) or
    `closed`.
    """

    def __init__(
        self,
        load: Callable[[], Encoder | None],
        *,
        cache_size: int = 4096,
        before: Callable[[], object] = lambda: None,
        lazy: bool = False,
    ) -> None:
        """Load in the background, after the quicker work `before` it: at once, or, if `lazy`, when first needed."""
        self.state = "loading"
        self.reason = ""
        self.fingerprint = ""
        self.former_fingerprints: tuple[str, ...] = ()  # under which earlier releases stored this encoder's vectors
        self.unrelated = UNRELATED  # (median, spread) of this encoder's cosines of unrelated texts
        self.settled = threading.Event()
        self._load, self._before = load, before
        self._cache: OrderedDict[_Key, Vector] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        if not lazy:
            self._ensure_thread()

    def cached(self, key: str, *, owner: str = "") -> Vector | None:
        """Return the vector of a key that was encoded for this owner before, if it is still there."""
        with self._lock:
            if (vector := self._cache.get((owner, key))) is not None:
                self._cache.move_to_end((owner, key))
            return vector

    def vector(self, key: str, timeout_s: float) -> Vector | None:
        """Return the key's unit vector, or None where there is no encoder (yet).

        Raises TimeoutError when the encoder is too slow for the caller's limit.
        """
        pending = self.ask(key, timeout_s)
        vector = pending.vector()
        if pending.state == "slow":
            raise TimeoutError(f"the encoder took longer than {timeout_s:.3f} s")
        return vector

    def ask(self, key: str, timeout_s: float, *, owner: str = "") -> PendingVector:
        """Start to encode a key; the caller can do other work before it fetches the vector."""
        if (vector := self.cached(key, owner=owner)) is not None:
            return PendingVector(vector, "ready", timeout_s)
        self._ensure_thread()
        futures = self._queued([key] if key else [], owner)
        return PendingVector(futures[0] if futures else None, self.state, timeout_s)

    def encode(self, keys: Sequence[str], *, owner: str = "") -> NDArray[np.float32] | None:
        """Encode many keys off the request path; None where there is no encoder. Raises EncoderUnavailable."""
        futures = self._queued(keys, owner)
        return np.stack([future.result() for future in futures]) if futures else None

    def wait(self, timeout_s: float) -> str:
        """Wait until the encoder is there or is known to be absent; return the state."""
        self._ensure_thread()
        self.settled.wait(timeout_s)
        return self.state

    def close(self) -> None:
        """Let the thread end after what it was asked, and wait for that; from now on there is no encoder.

        A process that ends while the model computes is aborted by it. What only loads is not waited for.
        """
        with self._lock:
            self._closed, self.state = True, "closed"
            self._queue.put(_STOP)
            thread = self._thread
        if thread is not None and self.settled.is_set() and thread is not threading.current_thread():
            thread.join(_CLOSING_S)

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = start_thread("agent-memory-encoder", self._run)

    def _queued(self, keys: Sequence[str], owner: str) -> list[Future[Vector]]:
        """Queue keys for the thread; none where it would not answer, now or any more."""
        futures: list[Future[Vector]] = [Future() for _ in keys]
        with self._lock:  # not after the sign to stop: nobody would answer
            if self.state != "ready":
                return []
            for key, future in zip(keys, futures, strict=True):
                self._queue.put(((owner, key), future))
        return futures

    def _run(self) -> None:
        try:
            if (encoder := self._loaded()) is not None:
                self._serve(encoder)
        finally:
            self.settled.set()
            with self._lock:
                if self.state in ("loading", "ready"):
                    self.state, self.reason = "failed", "the encoder's thread has ended"
            while not self._queue.empty():
                if (item := self._queue.get()) is not _STOP:
                    item[1].set_exception(EncoderUnavailable("the encoder has ended"))

    def _loaded(self) -> Encoder | None:
        """Load the encoder and say how that went; None where there is none."""
        encoder, state = None, "none"
        try:
            self._before()
            if (encoder := self._load()) is not None:
                self.unrelated = spread_of(encoder.encode(REFERENCE))  # the first call also warms it up
                self.former_fingerprints = getattr(encoder, "former_fingerprints", ())
                self.fingerprint, state = encoder.fingerprint, "ready"
                logger.info("agent_memory: the encoder %s is ready", encoder.fingerprint)
        except Exception as error:  # noqa: BLE001 - whatever a model raises: recall is lexical then
            self.reason, state, encoder = str(error), "failed", None
            logger.warning("agent_memory: recall is lexical: %s", error)
        with self._lock:
            if not self._closed:
                self.state = state
        self.settled.set()
        return encoder

    def _serve(self, encoder: Encoder) -> None:
        while (first := self._queue.get()) is not _STOP:
            batch, stop = self._batch(first)
            self._answer(encoder, batch)
            if stop:
                break

    def _batch(self, first: _Asked) -> tuple[list[_Asked], bool]:
        batch = [first]
        while len(batch) < BATCH:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is _STOP:
                return batch, True
            batch.append(item)
        return batch, False

    def _answer(self, encoder: Encoder, batch: list[_Asked]) -> None:
        keys = list(dict.fromkeys(key for (_, key), _ in batch))
        try:
            fresh = dict(zip(keys, encoder.encode(keys), strict=True))
        except BaseException as error:
            for _, future in batch:  # handed to whoever asked
                future.set_exception(error)
            if isinstance(error, Exception):
                return
            raise
        with self._lock:
            for owned, _ in batch:
                self._cache[owned] = fresh[owned[1]]
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        for (_, key), future in batch:
            future.set_result(fresh[key])
