"""Reuse: what memory would answer to a request by itself, and whether the gate lets it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.threads import start_thread
from optillm_memory.conversation.parse import key_of
from optillm_memory.decide.agreement import NEAREST, Neighbour, propose
from optillm_memory.decide.gate import CONFIDENT_AUDITS, Gate, is_audited
from optillm_memory.decide.gate_updater import GateUpdater
from optillm_memory.recall.retriever import NEVER, Retriever, Version
from optillm_memory.records import Exemplar, Scope
from optillm_memory.request.turn import Turn
from optillm_memory.store.tables.proposals import ProposalReads

_EXEMPLARS_KEPT = 20_000  # of one scope
_SCOPES_KEPT = 64
_FORMS_KEPT = 8192  # answers in the form in which they are compared
_SHADOW_ENCODER_S = 5.0  # in shadow mode nobody waits


class ReuseDecider:
    """Proposes verified answers, and decides by each scope's gate whether they are good enough."""

    def __init__(
        self,
        source: ProposalReads,
        retriever: Retriever,
        encoder: EncoderService,
        normal: Callable[[str], str],
        salt: Callable[[], bytes],
        audit_share: float,
    ) -> None:
        """Start with nothing known; `normal` gives the form in which answers are compared."""
        self._audit_share = audit_share
        self._source = source
        self._retriever = retriever
        self._encoder = encoder
        self._normal = lru_cache(maxsize=_FORMS_KEPT)(normal)
        self._salt = salt
        self._lock = threading.Lock()
        self._scopes: OrderedDict[Scope, _ScopeState] = OrderedDict()

    def consider(self, turn: Turn) -> Turn:
        """Return the turn with what memory would answer, and the gate's decision on it.

        Where it may be reused, the turn's action is `reuse`.
        """
        partition, reason = turn.partition
        wanted, task = turn.options.reuse, turn.parsed.task
        limit_s = turn.encoder_limit_s if wanted else _SHADOW_ENCODER_S
        asked = self._encoder.ask(key_of(task), limit_s, owner=turn.scope.tenant) if partition else None
        if asked is None or (vector := asked.vector()) is None:
            return turn.skip(f"reuse_{reason or 'no_encoder'}") if wanted else turn
        version = self._source.revision(turn.scope)
        neighbours, quarantined = self._neighbours(turn, partition, vector, version)
        if (proposal := propose(task, neighbours, self._normal)) is not None:
            proposal = replace(proposal, encoder=self._encoder.fingerprint)
        max_error = wanted["max_error"] if wanted else None
        audits = [is_audited(turn.trace_id, self._salt(), self._audit_share * part) for part in (1.0, CONFIDENT_AUDITS)]
        gate = self.gate(turn.scope, version) if wanted else Gate()
        decision = gate.decide(
            proposal, partition, max_error, audit=audits[0], audit_if_confident=audits[1], quarantined=quarantined
        )
        if turn.held_out and decision.serve:  # only what would have been served: the other half of the comparison
            decision = replace(decision, serve=False, reason="holdout")
        action = "reuse" if decision.serve else turn.action
        turn = replace(turn, proposal=proposal, decision=decision, action=action)
        if decision.serve:
            return turn
        return turn.skip(f"reuse_{decision.reason}") if wanted else turn

    def gate(self, scope: Scope, version: Version) -> Gate:
        """Return a scope's gate, up to date with the labels that are on disk."""
        state = self._state(scope, version)
        while state.version != version:
            since = state.updater.since
            revision, changes = self._source.gate_changes(scope, since)
            # A threshold is one of this encoder's scores: the labels of another encoder's prove nothing about it.
            own = [change for change in changes if change.encoder in ("", self._encoder.fingerprint)]
            if state.updater.take(since, revision, own):
                state.version = version
                break  # not to look again: another request may have come with a version of its own
        return state.updater.gate

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
        neighbours, quarantined, now = [], [], self._source.clock()
        for number, cosine, _ in near:
            exemplar, value = known[number].exemplar, known[number].value
            if exemplar is None or not _answers(exemplar, partition, turn.episode_id):
                continue
            record = exemplar.record
            if not record.holds(now):  # it may have been read while it did
                continue
            neighbours.append(
                Neighbour(
                    record.memory_id, record.task, record.answer, cosine, value, exemplar.failed, record.successes
                )
            )
            if exemplar.quarantined:
                quarantined.append(record.memory_id)
        return neighbours, frozenset(quarantined)

    def _exemplars(
        self, scope: Scope, near: Sequence[tuple[int, float, int]], version: Version
    ) -> dict[int, _CachedExemplar]:
        """Return what is known of each of these exemplars; those that are new or have changed are read.

        It is this call's own: no other request takes away a neighbour that disagrees.
        """
        state = self._state(scope, version)
        with self._lock:
            known = {n: cached for n, _, at in near if (cached := state.exemplars.get(n)) and cached.revision >= at}
        missing = {n: revision for n, _, revision in near if n not in known}
        if missing:
            found = self._source.exemplars(scope, missing)
            fresh = {n: _CachedExemplar.of(revision, found.get(n)) for n, revision in missing.items()}
            known |= fresh
            with self._lock:
                if len(state.exemplars) > _EXEMPLARS_KEPT:
                    state.exemplars.clear()
                state.exemplars.update(fresh)
        return known

    def _state(self, scope: Scope, version: Version) -> _ScopeState:
        """Return the state of a scope; numbers and revisions of another origin say nothing of this one's."""
        with self._lock:
            state = self._scopes.get(scope)
            if state is None or state.origin != version.origin:
                state = self._scopes[scope] = _ScopeState(version.origin)
            self._scopes.move_to_end(scope)
            while len(self._scopes) > _SCOPES_KEPT:
                self._scopes.popitem(last=False)
            return state


class _CachedExemplar(NamedTuple):
    """An exemplar (None where there is none of that number any more), its value, and up to when this holds."""

    revision: int
    exemplar: Exemplar | None
    value: float

    @classmethod
    def of(cls, revision: int, exemplar: Exemplar | None) -> _CachedExemplar:
        """Return an exemplar as it was just read."""
        return cls(revision, exemplar, exemplar.record.value if exemplar else 0.0)


@dataclass(slots=True)
class _ScopeState:
    """A scope's exemplars by number, its gate, and the version of the store whose labels the gate has taken."""

    origin: tuple[int, int]
    exemplars: dict[int, _CachedExemplar] = field(default_factory=dict)
    updater: GateUpdater = field(default_factory=lambda: GateUpdater(start_thread))
    version: Version = NEVER


def _answers(exemplar: Exemplar, partition: str, episode_id: str) -> bool:
    """Whether an exemplar's answer was verified in this partition, in another episode than the one that asks."""
    for origin, first, last in exemplar.origins:
        if origin == partition:
            return not (first == last == episode_id)
    return False
