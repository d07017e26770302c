"""The encoder behind the request path: loaded in the background, batched, cached, asked with a time limit."""

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

from optillm_memory.recall.encoder import REFERENCE, Encoder
from optillm_memory.recall.vectors.flat import UNRELATED, spread_of

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]
BATCH = 16
_STOP = None


class Asked:
    """A vector that was asked for; `state` is the encoder's, or `slow` where it missed the time limit."""

    def __init__(self, found: Vector | Future[Vector] | None, state: str, timeout_s: float) -> None:
        """Keep what is known by now; the time limit runs from here."""
        self._found = found
        self.state = state
        self._until = time.monotonic() + timeout_s

    def vector(self) -> Vector | None:
        """Wait for the vector within the limit; None without an encoder, or with one that is too slow."""
        if not isinstance(self._found, Future):
            return self._found
        try:
            return self._found.result(timeout=max(self._until - time.monotonic(), 0.001))
        except (TimeoutError, FutureTimeoutError):  # two errors that are no kin before Python 3.11
            self.state = "slow"
            return None


class EncoderService:
    """One thread owns the encoder; concurrent requests are encoded together.

    `state` is `loading`, `ready`, `none` (recall is lexical by choice) or `failed` (lexical; `reason` says why).
    """

    def __init__(
        self,
        load: Callable[[], Encoder | None],
        *,
        cache_size: int = 4096,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Start loading in the background, with what is quicker `before` it."""
        self.state = "loading"
        self.reason = ""
        self.fingerprint = ""
        self.former_fingerprints: tuple[str, ...] = ()  # under which earlier releases stored this encoder's vectors
        self.unrelated = UNRELATED  # (median, spread) of this encoder's cosines of unrelated texts
        self.settled = threading.Event()
        self._cache: OrderedDict[str, Vector] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[str, Future[Vector]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(load, before), name="agent-memory-encoder", daemon=True)
        self._thread.start()

    def cached(self, key: str) -> Vector | None:
        """Return the vector of a key that was encoded before, if it is still there."""
        with self._lock:
            if (vector := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
            return vector

    def vector(self, key: str, timeout_s: float) -> Vector | None:
        """Return the key's unit vector, or None where there is no encoder (yet).

        Raises TimeoutError when the encoder is too slow for the caller's limit.
        """
        asked = self.ask(key, timeout_s)
        vector = asked.vector()
        if asked.state == "slow":
            raise TimeoutError(f"the encoder took longer than {timeout_s:.3f} s")
        return vector

    def ask(self, key: str, timeout_s: float) -> Asked:
        """Start to encode a key; who asks can do other work before it fetches the vector."""
        if (vector := self.cached(key)) is not None:
            return Asked(vector, "ready", timeout_s)
        if self.state != "ready" or not key:
            return Asked(None, self.state, timeout_s)
        future: Future[Vector] = Future()
        self._queue.put((key, future))
        return Asked(future, "ready", timeout_s)

    def encode(self, keys: Sequence[str]) -> NDArray[np.float32] | None:
        """Encode many keys off the request path; None where there is no encoder."""
        if self.state != "ready" or not keys:
            return None
        futures: list[Future[Vector]] = [Future() for _ in keys]
        for key, future in zip(keys, futures, strict=True):
            self._queue.put((key, future))
        return np.stack([future.result() for future in futures])

    def wait(self, timeout_s: float) -> str:
        """Wait until the encoder is there or is known to be absent; return the state."""
        self.settled.wait(timeout_s)
        return self.state

    def close(self) -> None:
        """Let the thread end after what it was asked."""
        self._queue.put(_STOP)

    def _run(self, load: Callable[[], Encoder | None], before: Callable[[], object]) -> None:
        try:
            before()
            encoder = load()
            if encoder is None:
                self.state = "none"
            else:
                self.unrelated = spread_of(encoder.encode(REFERENCE))  # the first call also warms it up
                self.former_fingerprints = getattr(encoder, "former_fingerprints", ())
                self.fingerprint, self.state = encoder.fingerprint, "ready"
                logger.info("agent_memory: the encoder %s is ready", encoder.fingerprint)
        except Exception as error:  # noqa: BLE001 - whatever a model raises: recall is lexical then
            self.reason, self.state = str(error), "failed"
            logger.warning("agent_memory: recall is lexical: %s", error)
            encoder = None
        self.settled.set()
        while (first := self._queue.get()) is not _STOP:
            batch, stop = self._drain(first)
            self._answer(encoder, batch)
            if stop:
                break

    def _drain(self, first: tuple[str, Future[Vector]]) -> tuple[list[tuple[str, Future[Vector]]], bool]:
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

    def _answer(self, encoder: Encoder | None, batch: list[tuple[str, Future[Vector]]]) -> None:
        keys = list(dict.fromkeys(key for key, _ in batch))
        try:
            if encoder is None:
                raise RuntimeError("there is no encoder")  # noqa: TRY301
            fresh = dict(zip(keys, encoder.encode(keys), strict=True))
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            for _, future in batch:
                future.set_exception(error)
            return
        with self._lock:
            self._cache.update(fresh)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        for key, future in batch:
            future.set_result(fresh[key])
