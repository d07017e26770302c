"""The fold from the log to memories: what is written when a trace or feedback arrives, and `rebuild`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from optillm_memory.errors import InvalidField
from optillm_memory.learn.exemplars import Learned, learn
from optillm_memory.records import Feedback, FeedbackReceipt, FeedbackStatus, Scope, Trace


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

    def feedback_targets(self, tenant: str, feedback: Feedback) -> list[str]:
        """Return the traces that a feedback, or what it retracts, speaks of."""

    def put_learned(self, trace: Trace, learned: Learned) -> None:
        """Replace what this trace taught before, and bring every memory it touches up to date."""


def relearn(log: Log, trace_ids: Iterable[str]) -> None:
    """Fold these traces again; the result depends on the log alone, not on what was folded before."""
    for trace_id in trace_ids:
        trace = log.trace(trace_id)
        if trace is None:
            continue
        own, of_episode = log.feedback_on(trace)
        closing_id = log.closing_trace(trace.scope, trace.episode_id) if of_episode else None
        closing = trace if closing_id == trace_id else log.trace(closing_id) if closing_id else None
        log.put_learned(trace, learn(trace, own, of_episode, closing=closing))


def trace_arrived(log: Log, trace: Trace) -> None:
    """Fold a trace that was just written: feedback may have been waiting for it or for its episode."""
    own, of_episode = log.feedback_on(trace)
    if of_episode:
        relearn(log, log.episode_traces(trace.scope, trace.episode_id))
    elif own:
        relearn(log, [trace.trace_id])


def feedback_arrived(
    log: Log, tenant: str, scope: Scope | None, feedback: Feedback, *, received_at: float
) -> FeedbackReceipt:
    """Append feedback and fold what it speaks of. The empty tenant is the operator at the machine.

    Raises InvalidField where an episode's name stands for several scopes and none was said.
    """
    if feedback.value is None and not tenant:
        tenant = log.tenant_of_feedback(feedback.feedback_id) or tenant
    scope_id = _episode_scope(log, tenant, scope, feedback.episode_id) if feedback.episode_id else None
    settled = log.add_feedback(tenant, scope_id, feedback, received_at)
    targets = log.feedback_targets(tenant, feedback)
    if settled != "duplicate":
        relearn(log, targets)
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
