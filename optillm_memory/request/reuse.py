"""Reusing: what memory would answer to a request by itself, and whether the gate lets it."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.decide.agreement import NEAREST, Neighbour, propose
from optillm_memory.decide.gate import CONFIDENT_AUDITS, Gate, is_audited
from optillm_memory.decide.gate_updater import Change, GateUpdater
from optillm_memory.recall.retriever import NEVER, Retriever, Version
from optillm_memory.records import Exemplar, Scope
from optillm_memory.request.turn import Turn

logger = logging.getLogger(__name__)

_EXEMPLARS_KEPT = 20_000  # of one scope
_SCOPES_KEPT = 64
_FORMS_KEPT = 8192  # answers in the form in which they are compared
_WAITING = 256  # requests to look at behind the callers' backs; more are let go
_PAUSE_S = 0.03  # until then the response is out: work in between would hold the interpreter while it is sent
# An exemplar, its value, and the revision up to which this holds.
_Known: TypeAlias = tuple[int, Exemplar | None, float]
_UNKNOWN: _Known = (-1, None, 0.0)


class Source(Protocol):
    """What reuse reads; every call is bound to one scope."""

    def revision(self, scope: Scope) -> Version:
        """Return what is another one whenever any memory or label has changed."""

    def exemplars(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, Exemplar]:
        """Return the verified exemplars of the scope that have these numbers."""

    def gate_changes(self, scope: Scope, since: int) -> tuple[int, list[Change]]:
        """Return (revision, changes) of the proposals that came, or whose label changed, after a revision."""


class Reuser:
    """Proposes verified answers, and decides by each scope's gate whether they are good enough."""

    def __init__(
        self,
        source: Source,
        recaller: Retriever,
        encoder: EncoderService,
        normal: Callable[[str], str],
        audit_share: float,
    ) -> None:
        """Start with nothing known; `normal` gives the form in which answers are compared."""
        self._audit_share = audit_share
        self._source = source
        self._retriever = recaller
        self._encoder = encoder
        self._normal = lru_cache(maxsize=_FORMS_KEPT)(normal)
        self._lock = threading.Lock()
        self._scopes: OrderedDict[Scope, _Kept] = OrderedDict()

    def considered(self, turn: Turn, vector: NDArray[np.float32] | None, salt: bytes) -> Turn:
        """Return the turn with what memory would answer, and the gate's decision on it.

        Where it may be reused, the turn's action is `reuse`.
        """
        conversation = turn.conversation
        assert conversation is not None
        partition, reason = turn.partition
        wanted = turn.options.reuse
        if not partition or vector is None:
            return turn.skip(f"reuse_{reason or 'no_encoder'}") if wanted else turn
        version = self._source.revision(turn.scope)
        neighbours, quarantined = self._neighbours(turn, partition, vector, version)
        proposal = propose(conversation.task, neighbours, self._normal)
        max_error = wanted["max_error"] if wanted else None
        audits = [is_audited(turn.trace_id, salt, self._audit_share * part) for part in (1.0, CONFIDENT_AUDITS)]
        gate = self._gate(turn.scope, version) if wanted else Gate()
        decision = gate.decide(
            proposal, partition, max_error, audit=audits[0], audit_if_confident=audits[1], quarantined=quarantined
        )  # fmt: skip
        if turn.held_out and decision.serve:  # only what would have been served: the other half of the comparison
            decision = replace(decision, serve=False, reason="holdout")
        action = "reuse" if decision.serve else turn.action
        turn = replace(turn, proposal=proposal, decision=decision, action=action)
        if decision.serve:
            return turn
        return turn.skip(f"reuse_{decision.reason}") if wanted else turn

    def _gate(self, scope: Scope, version: Version) -> Gate:
        """Return a scope's gate, up to date with the labels that are on disk."""
        kept = self._kept(scope, version)
        while kept.version != version:
            since = kept.keeper.since
            if kept.keeper.take(since, *self._source.gate_changes(scope, since)):
                kept.version = version
                break  # not to look again: another request may have come with a version of its own
        return kept.keeper.gate

    def _neighbours(
        self, turn: Turn, partition: str, vector: NDArray[np.float32], version: Version
    ) -> tuple[list[Neighbour], frozenset[str]]:
        near = self._retriever.near(
            turn.scope,
            vector,
            version,
            fingerprint=self._encoder.fingerprint,
            unrelated=self._encoder.unrelated,
            count=NEAREST,
        )
        known = self._exemplars(turn.scope, near, version)
        neighbours, quarantined = [], []
        for number, cosine, _ in near:
            _, exemplar, value = known.get(number, _UNKNOWN)
            if exemplar is None or not _answers(exemplar, partition, turn.episode_id):
                continue
            record = exemplar.record
            neighbours.append(
                Neighbour(
                    record.memory_id, record.task, record.answer, cosine, value, exemplar.failed, record.successes
                )
            )
            if exemplar.quarantined:
                quarantined.append(record.memory_id)
        return neighbours, frozenset(quarantined)

    def _exemplars(self, scope: Scope, near: Sequence[tuple[int, float, int]], version: Version) -> dict[int, _Known]:
        """Return what is known of the scope's exemplars, these read where they are new or have changed."""
        known = self._kept(scope, version).exemplars
        if len(known) > _EXEMPLARS_KEPT:
            known.clear()
        missing = {n: revision for n, _, revision in near if known.get(n, _UNKNOWN)[0] < revision}
        if missing:
            found = self._source.exemplars(scope, missing)
            for number, revision in missing.items():
                exemplar = found.get(number)
                known[number] = revision, exemplar, exemplar.record.value if exemplar else 0.0
        return known

    def _kept(self, scope: Scope, version: Version) -> _Kept:
        """Return what is kept of a scope; numbers and revisions of another origin say nothing of this one's."""
        with self._lock:
            kept = self._scopes.get(scope)
            if kept is None or kept.origin != version.origin:
                kept = self._scopes[scope] = _Kept(version.origin)
            self._scopes.move_to_end(scope)
            while len(self._scopes) > _SCOPES_KEPT:
                self._scopes.popitem(last=False)
            return kept


@dataclass(slots=True)
class _Kept:
    """A scope's exemplars by number, its keeper, and the version of the store whose labels that has taken."""

    origin: tuple[int, int]
    exemplars: dict[int, _Known] = field(default_factory=dict)
    keeper: GateUpdater = field(default_factory=GateUpdater)
    version: Version = NEVER


def _answers(exemplar: Exemplar, partition: str, episode_id: str) -> bool:
    """Whether an exemplar's answer was verified in this partition, in another episode than the one that asks."""
    for origin, first, last in exemplar.origins:
        if origin == partition:
            return not (first == last == episode_id)
    return False


class Shadow:
    """One thread that considers the requests that asked for no reuse: each one's feedback is a label for the gate."""

    def __init__(self, consider: Callable[[Turn], Turn], record: Callable[[Turn], None]) -> None:
        """`record` takes the turns that memory has a proposal for."""
        self._consider = consider
        self._record = record
        self._queue: queue.Queue[tuple[float, Turn] | None] = queue.Queue(_WAITING)
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-memory-shadow", daemon=True)
        self._thread.start()

    def submit(self, turn: Turn) -> None:
        """Have a turn considered, unless too many wait."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((time.monotonic() + _PAUSE_S, turn))

    def close(self) -> None:
        """Stop the thread after what waits."""
        self._hurry.set()
        self._queue.put(None)
        self._thread.join(10)

    def flush(self) -> None:
        """Wait until nothing waits."""
        self._hurry.set()
        self._queue.join()
        self._hurry.clear()

    def _run(self) -> None:
        while (waiting := self._queue.get()) is not None:
            due, turn = waiting
            self._hurry.wait(max(0.0, due - time.monotonic()))
            try:
                considered = self._consider(turn)
                if considered.proposal is not None:
                    self._record(considered)
            except Exception:
                logger.exception("agent_memory: what memory would have answered was not found out")
            finally:
                self._queue.task_done()
        self._queue.task_done()
