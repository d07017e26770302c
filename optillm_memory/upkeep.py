"""Upkeep: memories that came before the encoder was there get their vectors behind everything else."""

from __future__ import annotations

import logging
import threading

from optillm_memory.recall.service import EncoderService
from optillm_memory.store.sqlite import SqliteStore
from optillm_memory.store.transaction import Transaction

logger = logging.getLogger(__name__)


class Upkeep:
    """One thread that fills in missing vectors, woken when something was learned."""

    def __init__(self, store: SqliteStore, encoder: EncoderService) -> None:
        """Start the thread."""
        self._store = store
        self._encoder = encoder
        self._closing = threading.Event()
        self._missing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-memory-upkeep", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for memories without a vector."""
        self._missing.set()

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()
        self._missing.set()
        self._thread.join(10)

    def _run(self) -> None:
        """Encode the memories that have no vector yet: those of the time before the encoder was there."""
        while not self._closing.is_set() and not self._encoder.settled.wait(0.2):
            pass
        done, generation = 0, -1
        while not self._closing.is_set() and self._encoder.state == "ready":
            try:
                if (current := self._store.revision()[0]) != generation:  # a rebuild numbers the memories anew
                    done, generation = 0, current
                rows, seen = self._store.without_vectors(self._encoder.fingerprint, done, 64)
                if rows:
                    self._encode(rows)
                if seen > done:
                    done = seen
                    continue
            except Exception:
                logger.exception("agent_memory: vectors could not be filled in; trying again")
                self._closing.wait(1.0)
            self._missing.wait()
            self._missing.clear()

    def _encode(self, rows: list[tuple[int, str, str]]) -> None:
        vectors = self._encoder.encode([key for _, key, _ in rows])
        if vectors is None:
            return
        pairs = [(hashed, vector.tobytes()) for (_, _, hashed), vector in zip(rows, vectors, strict=True)]

        def fill(tx: Transaction) -> None:
            tx.put_vectors(pairs, self._encoder.fingerprint)
            tx.touch([number for number, _, _ in rows])

        self._store.write(fill).result()
