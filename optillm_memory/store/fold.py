"""The fold from the log to memories: what is written when a trace or feedback arrives, and `rebuild`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from optillm_memory.conversation.actions import normal_action
from optillm_memory.conversation.goal import kept_lines
from optillm_memory.conversation.provenance import Told, action_identity, actions_in_answer, makers_of
from optillm_memory.decide.actions import label_of
from optillm_memory.errors import InvalidField, NotAllowed, TooMany
from optillm_memory.learn.attempts import Attempt, inferred_id
from optillm_memory.learn.dialect import LANGUAGE
from optillm_memory.learn.endings import Ending, ending_of, may_end
from optillm_memory.learn.exemplars import learn
from optillm_memory.learn.fixes import FixEvidence, advice_evidence, demonstrated_fix, mine
from optillm_memory.learn.outcomes import effective, weighed
from optillm_memory.learn.procedures.mine import mined, run_of
from optillm_memory.records import (
    EVERYTHING,
    OPERATOR,
    VERIFYING,
    Feedback,
    FeedbackReceipt,
    Message,
    Scope,
    Step,
    Trace,
    View,
)
from optillm_memory.store.tables.procedures import sent as as_sent
from optillm_memory.store.transaction import Transaction

WAITING_RETRY_S = 60.0  # after which a sender whose quota is used up may try again


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
    read = tx.steps.interpret(scope, episode_id)
    for other in tx.steps.learn_dialect(scope, episode_id, None if fresh is None else {*read, *fresh}):
        if other != episode_id:
            _mine_again(tx, scope, other)
    return _mine_again(tx, scope, episode_id)


def _mine_again(tx: Transaction, scope: Scope, episode_id: str) -> list[Attempt]:
    evidence: list[FixEvidence] = []
    tx.steps.interpret(scope, episode_id)
    if attempts := tx.steps.attempts(scope, episode_id):
        good = tx.traces.verdict(scope, episode_id) == "success"
        given = tx.fixes.advice_given(scope, episode_id)
        # What memory suggested here is no finding of this episode: it goes with the fix that it came from.
        told = {normal_action(text) for items in given.values() for _, text in items}
        evidence += [
            FixEvidence(fix.memory_id(scope), worked.step_id, "mined", True, good, worked.trace_id, fix)
            for fix, worked in mine(attempts)
            if normal_action(fix.text) not in told
        ]
        # A step that failed is inferred evidence whatever became of the episode; one that worked shares its success.
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
    texts, steps = run_of(messages, _answered(tx, scope, episode_id, traces, messages))
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
    if latest is None or latest.one_shot or latest.finish_reason is None:  # without an answer its end is the client's
        return False
    messages = json.loads(latest.messages)
    return bool(messages) and may_end(as_sent(messages[-1]))


def _answered(
    tx: Transaction, scope: Scope, episode_id: str, traces: Sequence[Trace], messages: Sequence[Message]
) -> Callable[[int, str, str], bool]:
    """Return what tells whether an action in a message left in a recorded answer; others are the client's word."""
    places = answer_places(traces)
    own = {places[trace.trace_id] for trace in traces if trace.finish_reason is not None}
    others = {n: m for n, m in enumerate(messages) if n not in own and m.get("role") == "assistant"}
    if not any(map(actions_in_answer, others.values())):
        return lambda *_: True
    # A history that was changed, or begins in the middle: its answers may be those of other traces of the conversation.
    at, brought = 0, {}
    for trace in traces:
        for index in range(at, places[trace.trace_id] + 1):
            brought[index] = trace.created_at, trace.trace_id
        at = places[trace.trace_id] + 1
    mine = {trace.trace_id for trace in traces}
    answers = [a for a in tx.steps.answers(scope, episode_id) if a.at[1] not in mine]
    told = [
        Told(f"{index} {action}", action, brought[index])
        for index, message in others.items()
        for action in actions_in_answer(message)
    ]
    made = makers_of(told, answers)
    return lambda index, tool, arguments: index in own or f"{index} {action_identity(tool, arguments)}" in made


def answer_places(traces: Sequence[Trace]) -> dict[str, int]:
    """Return the index of each trace's answer among the messages of their conversation."""
    places, count = {}, 0
    for trace in traces:
        count += len(json.loads(trace.messages))
        places[trace.trace_id] = count - 1
    return places


def steps_arrived(tx: Transaction, trace: Trace, fresh: Sequence[Step], *, received_at: float) -> None:
    """Fold the steps whose observations came with a trace: what they say becomes feedback on the traces that acted."""
    if not tx.traces.is_untouched(trace):  # else it is the only one of its episode
        fresh = [*fresh, *tx.steps.made_late(tx.scopes.number(trace.scope), trace)]
    if not fresh:
        # It may have ended its episode, or shown that it goes on; one with an outcome was folded when it arrived.
        if not tx.traces.is_untouched(trace) and tx.traces.verdict(trace.scope, trace.episode_id) == "unknown":
            relearn_procedure(tx, trace.scope, trace.episode_id)
        return
    acted: dict[str, None] = {}
    scope, episode_id = trace.scope, trace.episode_id
    told = [name for step in fresh for name in (step.step_id, step.parent_id)]
    # What a dialect means is a matter of all episodes, and none of this one's feedback.
    tell = [a for a in relearn_steps(tx, scope, episode_id, told) if a.verdict != "unknown" and a.basis != LANGUAGE]
    sent = tx.feedback.known(scope.tenant, [inferred_id(scope, episode_id, a.step_id) for a in tell])
    for attempt in tell:
        feedback = inferred(scope, episode_id, attempt)
        if feedback.feedback_id not in sent:
            tx.feedback.add(scope.tenant, None, feedback, received_at)
            acted[attempt.trace_id] = None
    relearn(tx, acted)


def inferred(scope: Scope, episode_id: str, attempt: Attempt) -> Feedback:
    """Return the feedback that an observation amounts to; retracting it makes the step's outcome unknown."""
    return Feedback(
        feedback_id=inferred_id(scope, episode_id, attempt.step_id),
        metric="success",
        value=attempt.verdict == "success",
        source="inferred",
        trace_id=attempt.trace_id,
        episode_id=None,
        evidence={"command": attempt.action.text[:500], "output": attempt.message},
        occurred_at=attempt.at,
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
    tx: Transaction,
    tenant: str,
    scope: Scope | None,
    feedback: Feedback,
    *,
    received_at: float,
    within: View = EVERYTHING,
    may_wait: bool = True,
) -> FeedbackReceipt:
    """Append feedback and fold the traces that it is on. The empty tenant is the operator.

    It counts on no trace that is not `within` what the call was narrowed to. Raises InvalidField where several scopes
    have an episode of this name and the sender named none, NotAllowed for a reporter who was revoked, and TooMany where
    it would have to wait for its trace and may not.
    """
    if feedback.reporter and tx.feedback.is_revoked(feedback.reporter):
        raise NotAllowed("revoked_reporter", f"the reporter {feedback.reporter!r} was revoked")
    if feedback.value is None and not tenant:
        tenant = tx.feedback.tenant_of(feedback.feedback_id) or tenant
    view = replace(within, tenant=tenant or OPERATOR)
    trace = None
    if feedback.trace_id and not feedback.episode_id:
        trace = tx.traces.take_untouched(feedback.trace_id, received_at)
    scope_id = _episode_scope(tx, view, scope, feedback.episode_id) if feedback.episode_id else None
    settled = tx.feedback.add(tenant, scope_id, feedback, received_at, view)
    if trace is not None and settled is None and view.covers(trace.scope):
        # The usual case, and no query is needed: this is the only feedback on the trace.
        alone = weighed([feedback], trace.askers)
        tx.exemplars.put_untouched(trace, learn(trace, alone, (), closing=None))
        if feedback.metric == "demonstration":
            relearn_steps(tx, trace.scope, trace.episode_id)
        return FeedbackReceipt(feedback.feedback_id, "applied")
    targets = tx.feedback.targets(view, scope_id, feedback)
    if not (may_wait or settled or targets):
        raise TooMany("too much feedback is waiting for traces; send it when its trace is there", WAITING_RETRY_S)
    if settled != "duplicate":
        for scope_of, episode_id in relearn(tx, targets):
            relearn_steps(tx, scope_of, episode_id)
    return FeedbackReceipt(feedback.feedback_id, settled or ("applied" if targets else "pending"))


def revoke(tx: Transaction, reporter: str, at: float) -> int:
    """Take back all that came of what a reporter said; return how many traces it was on. That is for good."""
    targets = tx.feedback.revoke(reporter, at)
    for scope, episode_id in relearn(tx, targets):
        relearn_steps(tx, scope, episode_id)
    return len(targets)


def _episode_scope(tx: Transaction, view: View, scope: Scope | None, episode_id: str) -> int | None:
    known = tx.traces.scopes_of(view, episode_id)
    if scope is not None and (not known or tx.scopes.number(scope) in known):
        return tx.scopes.number(scope)
    if len(known) > 1:
        raise InvalidField(
            "feedback.episode_id",
            f"{episode_id!r} names episodes in {len(known)} scopes; send X-Agent-Memory-Namespace (and -User-Id, "
            "-Agent-Id) with it, or give trace_id",
        )
    return known[0] if known else None
