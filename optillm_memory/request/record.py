"""Recording: a request with its response becomes a trace, its steps and what they teach; on the writer's thread."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.redact import QUOTED, storable
from optillm_memory.conversation.steps import calls_of, steps_of, under_known_ids
from optillm_memory.records import Feedback, Placement, Step, Trace
from optillm_memory.request.turn import (
    Turn,
    answer_of,
    ending_of,
    is_in_words_alone,
    recorded_message,
    recorded_messages,
)
from optillm_memory.settings import Settings
from optillm_memory.store import fold
from optillm_memory.store.tables.calls import ModelCall
from optillm_memory.store.tables.vectors import key_hash
from optillm_memory.store.transaction import Transaction


class Recorder:
    """Writes turns into the log and folds what they teach."""

    def __init__(
        self,
        settings: Settings,
        encoder: EncoderService,
        locate: Callable[[Turn], Turn],
        brought: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`locate` finds the episode of a turn that memory was not consulted for.

        `brought` is told the key of each vector that comes with a request.
        """
        self._settings = settings
        self._encoder = encoder
        self._locate = locate
        self._brought = brought

    def record(
        self,
        tx: Transaction,
        turn: Turn,
        response: Mapping[str, Any] | None,
        error: str | None,
        prefixes: list[str],
        elapsed_ms: float,
    ) -> None:
        """Append a turn's trace with its steps, and fold what came with it."""
        conversation = turn.conversation
        if conversation is None:  # recall failed or was left out: what it would have found out is found out here
            conversation = conversations.parse(turn.body)
            turn = self._locate(replace(turn, conversation=conversation))
            prefixes = conversations.answer_prefixes(conversation, response)
        usage = (response or {}).get("usage") or {}
        choices = (response or {}).get("choices") or []
        answer = answer_of(choices)
        trace = Trace(
            trace_id=turn.trace_id,
            scope=turn.scope,
            episode_id=turn.episode_id,
            created_at=turn.created_at,
            model=self.stored(turn.model),
            approach=turn.approach,
            action=turn.action,
            held_out=turn.held_out,
            propensity=turn.propensity,
            task=self.stored(conversation.task),
            frame=conversation.frame,
            messages=json.dumps(recorded_messages(conversation, choices, self.stored, since=turn.continues)),
            answer=None if answer is None else self.stored(_without_quotes(answer, turn.placements)),
            finish_reason=None if (ending := ending_of(choices)) is None else self.stored(ending),
            error=None if error is None else self.stored(error),
            skipped=json.dumps(list(turn.skipped)),
            # Of an approach the host reports the completion's tokens at best.
            prompt_tokens=sum(c.prompt_tokens for c in turn.calls) or int(usage.get("prompt_tokens") or 0),
            completion_tokens=sum(c.completion_tokens for c in turn.calls) or int(usage.get("completion_tokens") or 0),
            latency_ms=elapsed_ms,
            recall_ms=turn.recall_ms,
            tags=turn.options.tags,
            extra_calls=turn.extra_calls,
            partition=turn.partition[0] if is_in_words_alone(choices) else "",
            continued=turn.located.continued if turn.located and response is not None else "",
            continuation=turn.located.continuation if turn.located and response is not None else "",
            one_shot=conversation.one_shot,
        )
        placed = turn.for_ledger if response is not None else ()
        if tx.add_trace(trace, prefixes=prefixes, placements=placed, injected=turn.injected, withheld=turn.withheld):
            if turn.calls:
                tx.calls.add(trace.trace_id, [self._call(call) for call in turn.calls])
            vector = self._encoder.cached(conversations.key_of(conversation.task))
            if vector is not None:
                key = key_hash(trace.task)
                tx.vectors.put([(key, vector.tobytes())], self._encoder.fingerprint)
                self._brought(key)
            scope_id = tx.scopes.number(trace.scope)
            observed: Sequence[Step] = ()
            if steps := _steps(conversation, choices, prefixes):
                known = tx.steps.known(scope_id, trace.episode_id)
                if turn.located is not None and turn.located.inherits:  # that episode's own evidence, up to the fork
                    before = tx.steps.known(scope_id, turn.located.inherits)
                    known += [step for step in before if step[1] != turn.located.continued]
                steps = under_known_ids(steps, [(step_id, made) for step_id, made, _ in known])
                whole = {step_id for step_id, _, is_observed in known if is_observed}
                fresh_steps = [self._step(s) for s in steps if s.step_id not in whole]
                observed = tx.steps.add(scope_id, trace.episode_id, trace.trace_id, fresh_steps)
            if turn.proposal is not None and turn.decision is not None:
                tx.proposals.add(trace, scope_id, turn.proposal, turn.decision)
            if turn.choice is not None:
                tx.decisions.add(trace, scope_id, turn.choice, turn.length)
            fold.trace_arrived(tx, trace)
            fold.steps_arrived(tx, trace, observed, received_at=time.time())

    def record_proposal(self, tx: Transaction, turn: Turn) -> None:
        """Append what memory would have answered to a turn whose trace is in the log."""
        trace = tx.traces.get(turn.trace_id)
        if trace is not None and turn.proposal is not None and turn.decision is not None:
            tx.proposals.add(trace, tx.scopes.number(trace.scope), turn.proposal, turn.decision)
            fold.proposal_arrived(tx, trace)

    def _call(self, call: ModelCall) -> ModelCall:
        return replace(
            call,
            model=self.stored(call.model),
            messages=[recorded_message(message, self.stored) for message in call.messages],
            answers=[self.stored(answer) for answer in call.answers],
            error=None if call.error is None else self.stored(call.error),
        )

    def _step(self, step: Step) -> Step:
        return replace(
            step,
            call_id=self.stored(step.call_id),
            tool=self.stored(step.tool),
            arguments=self.stored(step.arguments),
            observation=None if step.observation is None else self.stored(step.observation),
        )

    def stored(self, text: str) -> str:
        """Return a text as it may be stored."""
        return storable(text, self._settings.max_text, secrets=self._settings.redact)

    def cleaned(self, feedback: Feedback) -> Feedback:
        """Return feedback as it may be stored."""
        evidence = feedback.evidence and {
            k: self.stored(v) if isinstance(v, str) else v for k, v in feedback.evidence.items()
        }
        value = self.stored(feedback.value) if isinstance(feedback.value, str) else feedback.value
        return replace(feedback, value=value, evidence=evidence)


def _without_quotes(answer: str, placements: Sequence[Placement]) -> str:
    """Return an answer less the blocks of this request that the model repeated: they are no words of its own."""
    for placement in placements:
        if isinstance(placement.payload, str):
            answer = answer.replace(placement.payload, QUOTED)
    return answer


def _steps(conversation: Conversation, choices: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> Sequence[Step]:
    """Return a conversation's steps with those that its answer asks for: later on nothing else may tell who did."""
    message = (choices[0].get("message") or {}) if len(choices) == 1 and prefixes else {}
    if not calls_of(message, 0):
        return conversation.steps
    messages = [*conversation.messages, {**message, "role": "assistant"}]
    return steps_of(messages, [*conversation.prefixes, prefixes[0]])
