"""The fold from the log to memories: what is written when a trace or feedback arrives, and `rebuild`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from optillm_memory.conversation.goal import kept_lines
from optillm_memory.decide.actions import label_of
from optillm_memory.errors import InvalidField
from optillm_memory.learn.attempts import Attempt, inferred_id
from optillm_memory.learn.dialect import LANGUAGE
from optillm_memory.learn.endings import Ending, ending_of, may_end
from optillm_memory.learn.exemplars import learn
from optillm_memory.learn.fixes import FixEvidence, advice_evidence, demonstrated_fix, mine
from optillm_memory.learn.outcomes import effective
from optillm_memory.learn.procedures.mine import mined, run_of
from optillm_memory.records import VERIFYING, Feedback, FeedbackReceipt, Scope, Step, Trace
from optillm_memory.store.tables.procedures import sent
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


def fold_older(tx: Transaction, count: int) -> bool:
    """Fold the next episodes of an earlier release, by up to `count` traces; return whether there are more.

    Where it is comes with the commit: interrupted it goes on from there, and several processes share the work.
    """
    upto, done = tx.counters.value("fold_upto"), tx.counters.value("folded")
    if done >= upto:
        return False
    found = tx.traces.after(done, upto, count)
    for _, trace_id in found:
        trace = tx.traces.get(trace_id)
        if trace is None or tx.traces.of_episode(trace.scope, trace.episode_id)[0] != trace_id:
            continue  # an episode is folded with its first trace
        traces, messages = tx.procedures.conversation(trace.scope, trace.episode_id)
        if keys := kept_lines(messages, one_shot=traces[0].one_shot and len(traces) == 1):
            tx.procedures.add_lines(tx.scopes.number(trace.scope), traces[0], keys)
        relearn_steps(tx, trace.scope, trace.episode_id)
    tx.counters.put("folded", found[-1][0] if found else upto)
    return bool(found)


def relearn_steps(
    tx: Transaction, scope: Scope, episode_id: str, fresh: Collection[str] | None = None
) -> list[Attempt]:
    """Fold an episode's steps again into fixes, and its procedure; return its attempts.

    Where its messages (those of the `fresh` steps, if given) change what is an error in a tool's dialect, the other
    episodes with such messages are folded again, too.
    """
    relearn_procedure(tx, scope, episode_id)
    if not tx.steps.acted(scope, episode_id):
        return []
    tx.steps.interpret(scope, episode_id)
    for other in tx.steps.learn_dialect(scope, episode_id, fresh):
        if other != episode_id:
            _mine_again(tx, scope, other)
    return _mine_again(tx, scope, episode_id)


def _mine_again(tx: Transaction, scope: Scope, episode_id: str) -> list[Attempt]:
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


def relearn_procedure(tx: Transaction, scope: Scope, episode_id: str) -> None:
    """Fold an episode into its procedure: it has one while its outcome is a verified success.

    Where nobody reported an outcome and the session shows that it ended well, the procedure is a candidate. What memory
    did itself teaches nothing: an episode with a reused answer or action has none.
    """
    procedure, first, ending = None, None, Ending()
    verdict = tx.traces.verdict(scope, episode_id)
    ended = verdict == "unknown" and _may_have_ended(tx, scope, episode_id)
    proposed = tx.proposals.actions_of(tx.scopes.number(scope), episode_id)
    labelled = verdict == "success" or any(served for _, _, served, _ in proposed)
    traces, messages = tx.procedures.conversation(scope, episode_id) if labelled or ended else ([], [])
    texts, steps = run_of(messages)
    if ended and messages:
        ending = ending_of(texts, steps, messages[-1])
    if traces and "success" in (verdict, ending.verdict) and not any(trace.action == "reuse" for trace in traces):
        first = traces[0]
        procedure = mined(texts, steps)
        if procedure is not None and first.goal:
            procedure = replace(procedure, texts=(first.goal,))
    steps, answered_at = (steps, answer_places(traces)) if labelled else ([], {})
    for trace_id, action, served, before in proposed:
        solved = None if verdict == "unknown" else verdict == "success"
        correct = label_of(action, answered_at.get(trace_id), steps, served=served, solved=solved)
        if correct != before:
            tx.proposals.put_action_label(trace_id, correct)
    tx.procedures.put(scope, episode_id, procedure, first, ending.basis)
    tx.procedures.credit(scope, episode_id, verdict)


def _may_have_ended(tx: Transaction, scope: Scope, episode_id: str) -> bool:
    """Whether an episode's latest message can be its last: only then the whole of it is looked at."""
    latest = tx.traces.latest(scope, episode_id)
    if latest is None or latest.one_shot:
        return False
    messages = json.loads(latest.messages)
    return bool(messages) and may_end(sent(messages[-1]))


def answer_places(traces: Sequence[Trace]) -> dict[str, int]:
    """Return the index of each trace's answer among the messages of their conversation."""
    places, count = {}, 0
    for trace in traces:
        count += len(json.loads(trace.messages))
        places[trace.trace_id] = count - 1
    return places


def steps_arrived(tx: Transaction, trace: Trace, fresh: Sequence[Step], *, received_at: float) -> None:
    """Fold the steps whose observations came with a trace: what they say becomes feedback on the traces that acted."""
    if not fresh:
        # It may have ended its episode, or shown that it goes on; one with an outcome was folded when it arrived.
        if not tx.traces.is_untouched(trace) and tx.traces.verdict(trace.scope, trace.episode_id) == "unknown":
            relearn_procedure(tx, trace.scope, trace.episode_id)
        return
    new = {step.step_id for step in fresh}
    acted: dict[str, None] = {}
    told = [*new, *(step.parent_id for step in fresh)]
    for attempt in relearn_steps(tx, trace.scope, trace.episode_id, told):
        # What a dialect means is a matter of all episodes, and none of this one's feedback.
        known = attempt.verdict != "unknown" and attempt.basis != LANGUAGE
        if attempt.step_id in new and known and attempt.trace_id != trace.trace_id:
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
        if tx.traces.verdict(trace.scope, trace.episode_id) != "unknown":
            relearn_procedure(tx, trace.scope, trace.episode_id)


def proposal_arrived(tx: Transaction, trace: Trace) -> None:
    """Fold what memory would have answered to a trace: feedback on it, or on its episode, may have come before it."""
    if any(tx.feedback.on(trace)):
        relearn(tx, [trace.trace_id])
    if tx.traces.verdict(trace.scope, trace.episode_id) != "unknown":
        relearn_procedure(tx, trace.scope, trace.episode_id)


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
