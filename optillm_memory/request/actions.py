"""Reuse of actions: the tool call that memory would make next, and whether the gate and the caller let it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from optillm_memory.decide.actions import NextAction, action_partition, propose_action
from optillm_memory.decide.gate import CONFIDENT_AUDITS, Gate, is_audited
from optillm_memory.learn.procedures.mine import run_of
from optillm_memory.recall.retriever import Version
from optillm_memory.records import Scope
from optillm_memory.request.permission import refusal_of, with_declared_types
from optillm_memory.request.procedures import ProcedureAdviser
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings
from optillm_memory.store.tables.memories import RecallReads

_SHADOW_ENCODER_S = 5.0  # in shadow mode nobody waits


class ActionDecider:
    """Proposes the next action of an episode, and decides by the scope's gate whether it may be served.

    It may where the caller asked for it, the tool is declared read-only or allowed by name, and the gate has proven
    that such actions are right often enough: for each prompt signature and tool by labels of its own.
    """

    def __init__(
        self,
        source: RecallReads,
        procedures: ProcedureAdviser,
        gate: Callable[[Scope, Version], Gate],
        salt: Callable[[], bytes],
        settings: Settings,
    ) -> None:
        """Join what decides; `gate` gives a scope's gate as of a version of the store."""
        self._source = source
        self._procedures = procedures
        self._gate = gate
        self._salt = salt
        self._settings = settings

    def consider(self, turn: Turn) -> Turn:
        """Return the turn with the action that memory would take, and the decision on it.

        Where it may be served, the turn's action is `reuse`.
        """
        wanted = turn.options.reuse if turn.options.reuse and turn.options.reuse.get("actions") else None
        proposal = None
        if turn.parsed.ends_with_user or turn.parsed.ends_with_observation:
            found = self._procedures.solved(turn, turn.encoder_limit_s if wanted else _SHADOW_ENCODER_S)
            if found.near:
                texts, done = run_of(turn.parsed.messages)
                proposal = propose_action(found.near, texts, done, found.is_constant, misled=found.misled)
        if proposal is None:
            return turn.skip("reuse_no_action") if wanted else turn
        proposed = with_declared_types(turn.body, NextAction.of_text(proposal.answer))
        proposal = replace(proposal, answer=proposed.as_text(), key=proposed.key, encoder=found.fingerprint)
        partition = action_partition(turn.parsed.frame, proposed.tool)
        share = self._settings.reuse_audit
        audits = [is_audited(turn.trace_id, self._salt(), share * part) for part in (1.0, CONFIDENT_AUDITS)]
        gate = self._gate(turn.scope, self._source.revision(turn.scope)) if wanted else Gate()
        decision = gate.decide(
            proposal, partition, wanted["max_error"] if wanted else None,
            audit=audits[0], audit_if_confident=audits[1],
        )  # fmt: skip
        if decision.serve and (refusal := refusal_of(turn, self._settings, proposed)):
            decision = replace(decision, serve=False, reason=refusal)
        if decision.serve and turn.held_out:
            decision = replace(decision, serve=False, reason="holdout")
        turn = replace(turn, proposal=proposal, decision=decision, next_action=proposed)
        if decision.serve:
            return replace(turn, action="reuse")
        return turn.skip(f"reuse_{decision.reason}") if wanted else turn
