"""Recording: a request with its response becomes a trace, its steps and what they teach, on the writer's thread."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.maintenance import Maintenance
from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.feedback import attributed, parse_feedback
from optillm_memory.conversation.goal import kept_lines
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.redact import QUOTED
from optillm_memory.conversation.steps import calls_of, steps_of, under_known_ids
from optillm_memory.records import Feedback, FeedbackReceipt, Placement, Scope, Step, Trace, Trust, View
from optillm_memory.request.locate import Locator
from optillm_memory.request.redaction import Redactor
from optillm_memory.request.response import (
    answer_of,
    ending_of,
    is_in_words_alone,
    recorded_message,
    recorded_messages,
)
from optillm_memory.request.turn import Turn
from optillm_memory.store import fold
from optillm_memory.store.announced import Announced, Arrival, Submission
from optillm_memory.store.base import Store
from optillm_memory.store.tables.calls import ModelCall
from optillm_memory.store.tables.feedback import kept_id
from optillm_memory.store.tables.vectors import key_hash
from optillm_memory.store.transaction import Transaction

T = TypeVar("T")


class Recorder:
    """Writes turns and feedback into the log, and folds what they teach."""

    def __init__(
        self,
        log: Store,
        encoder: EncoderService,
        locator: Locator,
        maintenance: Maintenance,
        redactor: Redactor,
        clock: Callable[[], float],
        trust: Trust,
    ) -> None:
        """Join what a record needs; maintenance is notified of what was learned."""
        self._trust = trust
        self._log = log
        self._redactor = redactor
        self._stored = redactor.text
        self._encoder = encoder
        self._locator = locator
        self._maintenance = maintenance
        self._clock = clock

    def finish(self, turn: Turn, response: Mapping[str, Any] | None, error: str | None) -> None:
        """Have a turn recorded with its response, or the error it ended in, in the background."""
        elapsed_ms = (time.perf_counter() - turn.started) * 1000
        prefixes: list[str] = []
        if turn.conversation is not None:
            prefixes = conversations.answer_prefixes(turn.conversation, response)
        self._locator.settle(turn, prefixes, answered=response is not None)
        if turn.options.writes:
            arrivals = [] if turn.conversation is None else [Arrival(turn.trace_id, turn.episode_id)]
            self._log.post(
                Announced(lambda tx: self._record(tx, turn, response, error, prefixes, elapsed_ms), arrivals)
            )

    def post_proposal(self, turn: Turn) -> None:
        """Have recorded what memory would have answered to a turn that was recorded before."""
        self._log.post(lambda tx: self._record_proposal(tx, turn))

    def submit_feedback(
        self, payload: Any, view: View, scope: Scope | None, reporter: str, *, may_wait: bool = True
    ) -> Future[list[FeedbackReceipt]]:
        """Have feedback written and applied; the future is set once it is on disk. Raises InvalidField."""
        now = self._clock()
        several = isinstance(payload, Iterable) and not isinstance(payload, (Mapping, str, bytes))
        items = list(payload) if several else payload
        if not (several and items and all(isinstance(f, Feedback) for f in items)):
            items = parse_feedback(items, now=now)
        view = self._redactor.view(view)
        scope = None if scope is None else self._redactor.scope(scope)
        given = [self._redactor.feedback(f) for f in items]
        counted = attributed(given, reporter, self._trust)

        def arrive(tx: Transaction, said: Feedback, counts: Feedback) -> FeedbackReceipt:
            receipt = fold.feedback_arrived(
                tx, view.tenant or "", scope, counts, received_at=now, within=view, may_wait=may_wait
            )
            return replace(receipt, is_capped=counts.source != said.source)

        future = self._log.write(
            Announced(
                lambda tx: [arrive(tx, said, counts) for said, counts in zip(given, counted, strict=True)],
                feedback=[Submission(view.tenant or "", kept_id(f.feedback_id, view), f.trace_id) for f in given],
            )
        )
        future.add_done_callback(lambda _: self._maintenance.wake())
        return future

    def _record(
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
            turn = self._locator.locate(replace(turn, conversation=conversations.parse(turn.body)))
            conversation = turn.parsed
            prefixes = conversations.answer_prefixes(conversation, response)
        usage = (response or {}).get("usage") or {}
        choices = (response or {}).get("choices") or []
        # Of what broke off in the middle, words are recorded, and nothing is learned.
        answer = answer_of(choices) if error is None else None
        trace = Trace(
            trace_id=turn.trace_id,
            scope=turn.scope,
            episode_id=turn.episode_id,
            created_at=turn.created_at,
            model=self._stored(turn.model),
            approach=self._stored(turn.approach),
            action=turn.action,
            held_out=turn.held_out,
            propensity=turn.propensity,
            task=self._stored(conversation.task),
            frame=conversation.frame,
            messages=json.dumps(recorded_messages(conversation, choices, self._stored, since=turn.continues)),
            answer=None if answer is None else self._stored(_without_quotes(answer, turn.placements)),
            finish_reason=None if (ending := ending_of(choices)) is None else self._stored(ending),
            error=None if error is None else self._stored(error),
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
            end_user=turn.options.end_user,
            goal=self._stored(turn.options.goal),
            asker=turn.options.reporter,
        )
        placed = turn.for_ledger if response is not None else ()
        if tx.add_trace(trace, prefixes=prefixes, placements=placed, injected=turn.injected, withheld=turn.withheld):
            if turn.calls:
                tx.calls.add(trace.trace_id, [self._call(call) for call in turn.calls])
            vector = self._encoder.cached(conversations.key_of(conversation.task), owner=turn.scope.tenant)
            if vector is not None:
                key = key_hash(trace.task)
                tx.vectors.put([(key, vector.tobytes())], self._encoder.fingerprint)
                self._maintenance.vector_arrived(key)
            scope_id = tx.scopes.number(trace.scope)
            if keys := kept_lines(conversation.messages, one_shot=conversation.one_shot):
                tx.procedures.add_lines(scope_id, trace, keys)
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
            self._add_proposal(tx, trace, scope_id, turn)
            if turn.choice is not None:
                tx.decisions.add(trace, scope_id, turn.choice, turn.length)
            fold.trace_arrived(tx, trace)
            fold.steps_arrived(tx, trace, observed, received_at=time.time())

    def _record_proposal(self, tx: Transaction, turn: Turn) -> None:
        trace = tx.traces.get(turn.trace_id)
        if trace is not None:
            self._add_proposal(tx, trace, tx.scopes.number(trace.scope), turn)
            fold.proposal_arrived(tx, trace)

    def _add_proposal(self, tx: Transaction, trace: Trace, scope_id: int, turn: Turn) -> None:
        proposal, action = turn.proposal, turn.next_action
        if proposal is None or turn.decision is None:
            return
        if action is not None:  # it holds values of this very request
            stored = replace(action, tool=self._stored(action.tool), arguments=self._stored(action.arguments))
            proposal = replace(proposal, answer=stored.as_text())
        tx.proposals.add(trace, scope_id, proposal, turn.decision)

    def _call(self, call: ModelCall) -> ModelCall:
        return replace(
            call,
            model=self._stored(call.model),
            messages=[recorded_message(message, self._stored) for message in call.messages],
            answers=[self._stored(answer) for answer in call.answers],
            error=None if call.error is None else self._stored(call.error),
        )

    def _step(self, step: Step) -> Step:
        return replace(
            step,
            call_id=self._stored(step.call_id),
            tool=self._stored(step.tool),
            arguments=self._stored(step.arguments),
            observation=None if step.observation is None else self._stored(step.observation),
        )


def _without_quotes(answer: str, placements: Sequence[Placement]) -> str:
    """Return an answer without the blocks of this request that the model repeated: those are not its own words."""
    for placement in placements:
        if isinstance(placement.payload, str):
            answer = answer.replace(placement.payload, QUOTED)
    return answer


def _steps(conversation: Conversation, choices: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> Sequence[Step]:
    """Return a conversation's steps with those that its answer asks for: only now is it known who asked for them."""
    message = (choices[0].get("message") or {}) if len(choices) == 1 and prefixes else {}
    if not calls_of(message, 0):
        return conversation.steps
    messages = [*conversation.messages, {**message, "role": "assistant"}]
    return steps_of(messages, [*conversation.prefixes, prefixes[0]])
