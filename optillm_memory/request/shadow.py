"""Shadow mode: what memory would have answered to requests that asked for no reuse, found out in the background.

The feedback on each such request is then a label for the gate.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from optillm_memory.background.worker import BackgroundWorker
from optillm_memory.request.actions import ActionDecider
from optillm_memory.request.record import Recorder
from optillm_memory.request.reuse import ReuseDecider
from optillm_memory.request.turn import Turn

_WAITING = 256  # requests; more are not considered
_PAUSE_S = 0.03  # until then the response is out: work in between would hold the interpreter while it is sent
_CLOSING_S = 10.0


class Shadow:
    """Considers finished requests one by one."""

    def __init__(self, reuse: ReuseDecider, actions: ActionDecider, recorder: Recorder) -> None:
        """Start with nothing to consider."""
        self._actions = actions
        self._reuse = reuse
        self._recorder = recorder
        self._worker = BackgroundWorker("agent-memory-shadow")
        self._hurry = threading.Event()

    def submit(self, turn: Turn) -> None:
        """Have a turn considered if it is recorded and has not been, unless too many wait."""
        wanted = turn.options.writes and turn.options.reads and turn.conversation is not None and turn.decision is None
        if wanted and self._worker.remaining < _WAITING:
            due = time.monotonic() + _PAUSE_S
            self._worker.do(lambda: self._consider(turn, due))

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits; return whether that is so."""
        self._hurry.set()
        try:
            return self._worker.flush(timeout_s)
        finally:
            self._hurry.clear()

    def close(self) -> None:
        """Consider what waits, within limits, and stop."""
        self.flush(_CLOSING_S)
        self._worker.close()

    def _consider(self, turn: Turn, due: float) -> None:
        self._hurry.wait(max(0.0, due - time.monotonic()))
        considered = self._reuse.consider(turn)
        if considered.proposal is None:
            considered = self._actions.consider(replace(turn, options=replace(turn.options, reuse=None)))
        if considered.proposal is not None:
            self._recorder.post_proposal(considered)
