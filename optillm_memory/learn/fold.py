"""The fold from the log to memories: what is written when a trace or feedback arrives, and `rebuild`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from optillm_memory.errors import InvalidField
from optillm_memory.learn.attempts import Attempt, inferred_id
from optillm_memory.learn.exemplars import Learned, learn
from optillm_memory.learn.fixes import FixEvidence, advice_evidence, demonstrated_fix, mine
from optillm_memory.learn.outcomes import effective
from optillm_memory.records import VERIFYING, Feedback, FeedbackReceipt, FeedbackStatus, Scope, Step, Trace, Verdict


class Log(Protocol):
    """What the fold needs of a store, inside one transaction."""

    def trace(self, trace_id: str) -> Trace | None:
        """Return a trace."""

    def feedback_on(self, trace: Trace) -> tuple[list[Feedback], list[Feedback]]:
        """Return all feedback on the trace itself, and on its episode, that its tenant or the operator gave."""

    def closing_trace(self, scope: Scope, episode_id: str) -> str | None:
        """Return the latest trace of the episode that has an answer in words."""

    def episode_traces(self, scope: Scope, episode_id: str) -> list[str]:
        """Return the ids of an episode's traces."""

    def scope_id(self, scope: Scope) -> int:
        """Return the scope's number."""

    def tenant_of_feedback(self, feedback_id: str) -> str | None:
        """Return whose feedback this is, where only one tenant has such an id."""

    def episode_scopes(self, tenant: str, episode_id: str) -> list[int]:
        """Return the scopes of a tenant (all, for the operator) that have an episode of this name."""

    def add_feedback(
        self, tenant: str, scope_id: int | None, feedback: Feedback, received_at: float
    ) -> FeedbackStatus | None:
        """Append feedback; return the status that settles it, None where it is new. Raises InvalidField."""

    def feedback_targets(self, tenant: str, scope_id: int | None, feedback: Feedback) -> list[str]:
        """Return the traces that a feedback, or what it retracts, speaks of."""

    def put_learned(self, trace: Trace, learned: Learned, *, untouched: bool = False) -> None:
        """Replace what this trace taught before, and bring every memory it touches up to date.

        Of an `untouched` one nothing was taught before, and nothing was injected.
        """

    def put_label(self, trace: Trace, learned: Learned) -> None:
        """Bring up to date whether what memory would have answered to this trace was right."""

    def concerned(self, scope: Scope, episode_id: str) -> tuple[bool, bool]:
        """Return whether an episode says anything of memories, or did, and whether an arm was chosen for it."""

    def keep_untouched(self, trace: Trace) -> bool:
        """Return whether nothing but a trace itself is written of it and of its episode; keep that for this commit."""

    def untouched(self, trace_id: str, received_at: float) -> Trace | None:
        """Return a trace that was kept as untouched, and still is, where feedback of such an age may speak of it.

        It is asked for once: then it is spoken of.
        """

    def weigh(self, scope: Scope, episode_id: str) -> None:
        """Bring up to date what an episode says of its memories' uplift, and whether they are retired."""

    def credit(self, scope: Scope, episode_id: str) -> None:
        """Bring up to date what the arm that an episode was given earned, and what the episode took in all."""

    def acted(self, scope: Scope, episode_id: str) -> bool:
        """Whether an episode has steps, or a demonstration, or anything that it says of fixes."""

    def attempts(self, scope: Scope, episode_id: str) -> list[Attempt]:
        """Return the observed steps of an episode with what their observations say, in order."""

    def advice_given(self, scope: Scope, episode_id: str) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Return by trace the (memory id, suggested action) of the fixes that were injected in an episode."""

    def episode_verdict(self, scope: Scope, episode_id: str) -> Verdict:
        """Return the latest verified outcome among an episode's traces."""

    def environments(self, scope: Scope, episode_id: str) -> Mapping[str, str]:
        """Return the environment of each trace of an episode."""

    def demonstrated(self, scope: Scope, episode_id: str) -> list[Trace]:
        """Return the traces of an episode that feedback shows the right way of."""

    def clear_derived(self) -> list[str]:
        """Empty what is derived from the log; return all trace ids in order, to be folded again."""

    def episodes(self) -> list[tuple[Scope, str]]:
        """Return every episode."""

    def put_fix_evidence(
        self, scope: Scope, episode_id: str, evidence: Iterable[FixEvidence], environments: Mapping[str, str]
    ) -> None:
        """Replace what an episode says of fixes, and bring every fix that it touches up to date."""


def relearn(log: Log, trace_ids: Iterable[str]) -> Iterable[tuple[Scope, str]]:
    """Fold these traces again; the result depends on the log alone, not on what was folded before.

    Returns the episodes that they belong to.
    """
    episodes: dict[tuple[Scope, str], None] = {}
    for trace_id in trace_ids:
        trace = log.trace(trace_id)
        if trace is None:
            continue
        episodes[trace.scope, trace.episode_id] = None
        own, of_episode = log.feedback_on(trace)
        closing_id = log.closing_trace(trace.scope, trace.episode_id) if of_episode else None
        closing = trace if closing_id == trace_id else log.trace(closing_id) if closing_id else None
        learned = learn(trace, own, of_episode, closing=closing)
        log.put_learned(trace, learned)
        log.put_label(trace, learned)
    for scope, episode_id in episodes:
        weigh(log, scope, episode_id)
    return episodes


def weigh(log: Log, scope: Scope, episode_id: str) -> None:
    """Bring up to date what an episode says of the memories and of the arm it was given, where there are any."""
    said, chosen = log.concerned(scope, episode_id)
    if said:
        log.weigh(scope, episode_id)
    if chosen:
        log.credit(scope, episode_id)


def rebuild(log: Log) -> int:
    """Fold the whole log again; return how many traces it holds."""
    trace_ids = log.clear_derived()
    relearn(log, trace_ids)
    for scope, episode_id in log.episodes():
        relearn_steps(log, scope, episode_id)
    return len(trace_ids)


def relearn_steps(log: Log, scope: Scope, episode_id: str) -> list[Attempt]:
    """Fold an episode's steps again into fixes; return its attempts."""
    if not log.acted(scope, episode_id):
        return []
    evidence: list[FixEvidence] = []
    if attempts := log.attempts(scope, episode_id):
        good = log.episode_verdict(scope, episode_id) == "success"
        evidence += [
            FixEvidence(fix.memory_id(scope), worked.step_id, "mined", True, good, worked.trace_id, fix)
            for fix, worked in mine(attempts)
        ]
        # A step that failed is inferred evidence whatever became of the episode; one that worked shares its success.
        evidence += [
            replace(e, verified=e.success and good)
            for e in advice_evidence(attempts, log.advice_given(scope, episode_id))
        ]
    for trace in log.demonstrated(scope, episode_id):
        own, of_episode = log.feedback_on(trace)
        standing = effective([*of_episode, *own])
        found = demonstrated_fix(
            standing, [a for a in attempts if a.trace_id == trace.trace_id] or attempts, trace.answer
        )
        if found is not None:
            fix, demonstration = found
            verified = demonstration.source in VERIFYING
            name = fix.memory_id(scope)
            evidence.append(FixEvidence(name, demonstration.feedback_id, "shown", True, verified, trace.trace_id, fix))
    log.put_fix_evidence(scope, episode_id, evidence, log.environments(scope, episode_id) if evidence else {})
    return attempts


def steps_arrived(log: Log, trace: Trace, fresh: Sequence[Step], *, received_at: float) -> None:
    """Fold the steps whose observations came with a trace: what they say becomes feedback on the traces that acted."""
    if not fresh:
        return
    new = {step.step_id for step in fresh}
    acted: dict[str, None] = {}
    for attempt in relearn_steps(log, trace.scope, trace.episode_id):
        if attempt.step_id in new and attempt.verdict != "unknown" and attempt.trace_id != trace.trace_id:
            said = inferred(trace.scope, trace.episode_id, attempt, trace.created_at)
            log.add_feedback(trace.scope.tenant, None, said, received_at)
            acted[attempt.trace_id] = None
    relearn(log, acted)


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


def trace_arrived(log: Log, trace: Trace) -> None:
    """Fold a trace that was just written: feedback may have been waiting for it or for its episode."""
    if log.keep_untouched(trace):
        return
    own, of_episode = log.feedback_on(trace)
    if of_episode:
        relearn(log, log.episode_traces(trace.scope, trace.episode_id))
    elif own:
        relearn(log, [trace.trace_id])
    if own or of_episode:
        relearn_steps(log, trace.scope, trace.episode_id)
    else:  # its episode may have an outcome already, and what memory said here comes first
        weigh(log, trace.scope, trace.episode_id)


def proposal_arrived(log: Log, trace: Trace) -> None:
    """Fold what memory would have answered to a trace: feedback may have come before it."""
    own, of_episode = log.feedback_on(trace)
    if own or of_episode:
        relearn(log, [trace.trace_id])


def feedback_arrived(
    log: Log, tenant: str, scope: Scope | None, feedback: Feedback, *, received_at: float
) -> FeedbackReceipt:
    """Append feedback and fold what it speaks of. The empty tenant is the operator at the machine.

    Raises InvalidField where an episode's name stands for several scopes and none was said.
    """
    if feedback.value is None and not tenant:
        tenant = log.tenant_of_feedback(feedback.feedback_id) or tenant
    trace = log.untouched(feedback.trace_id, received_at) if feedback.trace_id and not feedback.episode_id else None
    scope_id = _episode_scope(log, tenant, scope, feedback.episode_id) if feedback.episode_id else None
    settled = log.add_feedback(tenant, scope_id, feedback, received_at)
    if trace is not None and settled is None and tenant in ("", trace.scope.tenant):
        # The usual case, and what the log would be asked for is known: this alone is said of the trace.
        log.put_learned(trace, learn(trace, [feedback], (), closing=None), untouched=True)
        if feedback.metric == "demonstration":
            relearn_steps(log, trace.scope, trace.episode_id)
        return FeedbackReceipt(feedback.feedback_id, "applied")
    targets = log.feedback_targets(tenant, scope_id, feedback)
    if settled != "duplicate":
        for scope_of, episode_id in relearn(log, targets):
            relearn_steps(log, scope_of, episode_id)
    return FeedbackReceipt(feedback.feedback_id, settled or ("applied" if targets else "pending"))


def _episode_scope(log: Log, tenant: str, scope: Scope | None, episode_id: str) -> int | None:
    known = log.episode_scopes(tenant, episode_id)
    if scope is not None and (not known or log.scope_id(scope) in known):
        return log.scope_id(scope)
    if len(known) > 1:
        raise InvalidField(
            "feedback.episode_id",
            f"{episode_id!r} names episodes in {len(known)} scopes; send X-Agent-Memory-Namespace (and -User-Id, "
            "-Agent-Id) with it, or give trace_id",
        )
    return known[0] if known else None
