"""The fold from the log to memories: what is written when a trace or feedback arrives, and `rebuild`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from optillm_memory.errors import InvalidField
from optillm_memory.learn.attempts import Attempt, inferred_id
from optillm_memory.learn.exemplars import learn
from optillm_memory.learn.fixes import FixEvidence, advice_evidence, demonstrated_fix, mine
from optillm_memory.learn.outcomes import effective
from optillm_memory.records import VERIFYING, Feedback, FeedbackReceipt, Scope, Step, Trace
from optillm_memory.store.transaction import Transaction


def relearn(tx: Transaction, trace_ids: Iterable[str]) -> Iterable[tuple[Scope, str]]:
    """Fold these traces again; the result depends on the log alone, not on what was folded before.

    Returns the episodes that they belong to.
    """
    episodes: dict[tuple[Scope, str], None] = {}
    for trace_id in trace_ids:
        trace = tx.traces.get(trace_id)
        if trace is None:
            continue
        episodes[trace.scope, trace.episode_id] = None
        own, of_episode = tx.feedback.on(trace)
        closing_id = tx.traces.closing(trace.scope, trace.episode_id) if of_episode else None
        closing = trace if closing_id == trace_id else tx.traces.get(closing_id) if closing_id else None
        learned = learn(trace, own, of_episode, closing=closing)
        tx.exemplars.put(trace, learned)
        tx.proposals.put_label(trace, learned)
    for scope, episode_id in episodes:
        weigh(tx, scope, episode_id)
    return episodes


def weigh(tx: Transaction, scope: Scope, episode_id: str) -> None:
    """Bring up to date what an episode tells of its memories' uplift, whether they are retired, and of its arm."""
    weighed, chosen = tx.exposures.concerned(scope, episode_id)
    scope_id = tx.scopes.number(scope)
    if weighed and (touched := tx.exposures.put(scope_id, episode_id)):
        revision = tx.counters.revision()
        for memory_id in sorted(touched):
            if memory_id.startswith("fix-"):
                tx.fixes.refresh(scope_id, memory_id, revision)
            else:
                tx.exemplars.refresh(memory_id, revision)
    if chosen:
        tx.decisions.credit(scope, episode_id)


def rebuild(tx: Transaction) -> int:
    """Fold the whole log again; return how many traces it holds."""
    tx.clear_derived()
    trace_ids = tx.traces.ids()
    relearn(tx, trace_ids)
    for scope, episode_id in tx.traces.episodes():
        relearn_steps(tx, scope, episode_id)
    return len(trace_ids)


def relearn_steps(tx: Transaction, scope: Scope, episode_id: str) -> list[Attempt]:
    """Fold an episode's steps again into fixes; return its attempts."""
    if not tx.steps.acted(scope, episode_id):
        return []
    evidence: list[FixEvidence] = []
    tx.steps.interpret(scope, episode_id)
    if attempts := tx.steps.attempts(scope, episode_id):
        good = tx.traces.verdict(scope, episode_id) == "success"
        evidence += [
            FixEvidence(fix.memory_id(scope), worked.step_id, "mined", True, good, worked.trace_id, fix)
            for fix, worked in mine(attempts)
        ]
        # A step that failed is inferred evidence whatever became of the episode; one that worked shares its success.
        given = tx.fixes.advice_given(scope, episode_id)
        evidence += [replace(e, verified=e.success and good) for e in advice_evidence(attempts, given)]
    for trace in tx.traces.demonstrated(scope, episode_id):
        own, of_episode = tx.feedback.on(trace)
        standing = effective([*of_episode, *own])
        found = demonstrated_fix(
            standing, [a for a in attempts if a.trace_id == trace.trace_id] or attempts, trace.answer
        )
        if found is not None:
            fix, demonstration = found
            verified = demonstration.source in VERIFYING
            name = fix.memory_id(scope)
            evidence.append(FixEvidence(name, demonstration.feedback_id, "shown", True, verified, trace.trace_id, fix))
    tx.fixes.put_evidence(scope, episode_id, evidence)
    return attempts


def steps_arrived(tx: Transaction, trace: Trace, fresh: Sequence[Step], *, received_at: float) -> None:
    """Fold the steps whose observations came with a trace: what they say becomes feedback on the traces that acted."""
    if not fresh:
        return
    new = {step.step_id for step in fresh}
    acted: dict[str, None] = {}
    for attempt in relearn_steps(tx, trace.scope, trace.episode_id):
        if attempt.step_id in new and attempt.verdict != "unknown" and attempt.trace_id != trace.trace_id:
            feedback = inferred(trace.scope, trace.episode_id, attempt, trace.created_at)
            tx.feedback.add(trace.scope.tenant, None, feedback, received_at)
            acted[attempt.trace_id] = None
    relearn(tx, acted)


def inferred(scope: Scope, episode_id: str, attempt: Attempt, now: float) -> Feedback:
    """Return the feedback that an observation amounts to; retracting it makes the step's outcome unknown."""
    return Feedback(
        feedback_id=inferred_id(scope, episode_id, attempt.step_id),
        metric="success",
        value=attempt.verdict == "success",
        source="inferred",
        trace_id=attempt.trace_id,
        episode_id=None,
        evidence={"command": attempt.action.text[:500], "output": attempt.message},
        occurred_at=now,
    )


def trace_arrived(tx: Transaction, trace: Trace) -> None:
    """Fold a trace that was just written: feedback may have been waiting for it or for its episode."""
    if tx.traces.keep_untouched(trace):
        return
    own, of_episode = tx.feedback.on(trace)
    if of_episode:
        relearn(tx, tx.traces.of_episode(trace.scope, trace.episode_id))
    elif own:
        relearn(tx, [trace.trace_id])
    if own or of_episode:
        relearn_steps(tx, trace.scope, trace.episode_id)
    else:  # its episode may have an outcome already, and this trace may be the first where memory had an answer
        weigh(tx, trace.scope, trace.episode_id)


def proposal_arrived(tx: Transaction, trace: Trace) -> None:
    """Fold what memory would have answered to a trace: feedback may have come before it."""
    own, of_episode = tx.feedback.on(trace)
    if own or of_episode:
        relearn(tx, [trace.trace_id])


def feedback_arrived(
    tx: Transaction, tenant: str, scope: Scope | None, feedback: Feedback, *, received_at: float
) -> FeedbackReceipt:
    """Append feedback and fold the traces that it is on. The empty tenant is the operator.

    Raises InvalidField where several scopes have an episode of this name and the sender named none.
    """
    if feedback.value is None and not tenant:
        tenant = tx.feedback.tenant_of(feedback.feedback_id) or tenant
    trace = None
    if feedback.trace_id and not feedback.episode_id:
        trace = tx.traces.take_untouched(feedback.trace_id, received_at)
    scope_id = _episode_scope(tx, tenant, scope, feedback.episode_id) if feedback.episode_id else None
    settled = tx.feedback.add(tenant, scope_id, feedback, received_at)
    if trace is not None and settled is None and tenant in ("", trace.scope.tenant):
        # The usual case, and no query is needed: this is the only feedback on the trace.
        tx.exemplars.put(trace, learn(trace, [feedback], (), closing=None), untouched=True)
        if feedback.metric == "demonstration":
            relearn_steps(tx, trace.scope, trace.episode_id)
        return FeedbackReceipt(feedback.feedback_id, "applied")
    targets = tx.feedback.targets(tenant, scope_id, feedback)
    if settled != "duplicate":
        for scope_of, episode_id in relearn(tx, targets):
            relearn_steps(tx, scope_of, episode_id)
    return FeedbackReceipt(feedback.feedback_id, settled or ("applied" if targets else "pending"))


def _episode_scope(tx: Transaction, tenant: str, scope: Scope | None, episode_id: str) -> int | None:
    known = tx.traces.scopes_of(tenant, episode_id)
    if scope is not None and (not known or tx.scopes.number(scope) in known):
        return tx.scopes.number(scope)
    if len(known) > 1:
        raise InvalidField(
            "feedback.episode_id",
            f"{episode_id!r} names episodes in {len(known)} scopes; send X-Agent-Memory-Namespace (and -User-Id, "
            "-Agent-Id) with it, or give trace_id",
        )
    return known[0] if known else None
