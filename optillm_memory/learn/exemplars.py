"""Exemplars: a task and its verified answer, folded from one trace and its effective feedback."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from optillm_memory.conversation.redact import is_whole
from optillm_memory.conversation.text import BLOCK_BEGIN, without_thoughts
from optillm_memory.learn.outcomes import effective, normal_answer, outcome, same_answer
from optillm_memory.records import VERIFYING, Feedback, Outcome, Scope, Trace

# Finish reasons of a complete answer, or none. Not: length, content_filter, …
_ENDED = frozenset(("stop", "none", "", "end_turn", "stop_sequence", "eos", "eos_token"))


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of one trace for one memory: this answer to its task was right, or wrong."""

    memory_id: str
    answer: str
    success: bool
    verified: bool


@dataclass(frozen=True, slots=True)
class Learned:
    """The result of learning from one trace: its outcome, and the evidence on exemplars."""

    outcome: Outcome
    evidence: tuple[Evidence, ...]


def learn(trace: Trace, own: Sequence[Feedback], of_episode: Sequence[Feedback], *, closing: Trace | None) -> Learned:
    """Fold the feedback on a trace and on its episode into an outcome and evidence.

    Feedback on the trace itself has precedence over its episode's, unless only the episode's is verified. An episode's
    feedback is evidence on the answer of the trace that closed it (`closing`) if that was a one-shot request: an
    agent's "All done." is no answer to its task. The other traces only share its outcome, and what is not verified
    makes a candidate of a one-shot request alone. Reused answers are no evidence, nor are answers that were truncated,
    altered for storing, or contain memory's own marks; a demonstration is.
    """
    feedback = effective(own)
    result = outcome(feedback, trace.answer)
    if not result.verified:
        shared = effective(of_episode)
        of_all = outcome(shared, closing.answer if closing else None)
        # A verified outcome of the episode has precedence over one inferred from a step.
        if of_all.verified or result.verdict == "unknown":
            result = of_all
            closes = closing is not None and closing.trace_id == trace.trace_id and trace.one_shot
            feedback = [*feedback, *shared] if closes else []
    if not (result.verified or trace.one_shot):  # a step that worked, or what a model thinks of it, makes no answer
        feedback = []
    if not trace.task.strip():
        return Learned(result, ())
    evidence: dict[str, Evidence] = {}
    answer = _teachable(trace.answer or "") if (trace.finish_reason or "None").lower() in _ENDED else ""
    if answer and result.verdict != "unknown" and feedback and trace.action != "reuse":
        item = _evidence(trace, answer, success=result.verdict == "success", verified=result.verified)
        evidence[item.memory_id] = item
    demonstrations = [f for f in feedback if f.metric == "demonstration" and isinstance(f.value, str)]
    verified = [f for f in demonstrations if f.source in VERIFYING]
    for demonstration in (verified or demonstrations)[-1:]:
        text = _teachable(str(demonstration.value))
        if text and not (answer and same_answer(answer, text)):
            item = _evidence(trace, text, success=True, verified=demonstration.source in VERIFYING)
            evidence[item.memory_id] = item
    return Learned(result, tuple(evidence.values()))


def _teachable(answer: str) -> str:
    """Return the reusable part of an answer: without thoughts; empty if it was redacted or shortened."""
    answer = without_thoughts(answer)
    return answer if answer.strip() and is_whole(answer) and BLOCK_BEGIN not in answer else ""


def exemplar_id(scope: Scope, frame: str, task: str, answer: str) -> str:
    """Return the id of an exemplar: the same task and answer in a scope are one memory."""
    parts = (scope.tenant, scope.namespace, scope.user_id, scope.agent_id, frame)
    text = "\x1f".join((*parts, " ".join(task.split()).casefold(), normal_answer(answer)))
    return "mem-" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


def _evidence(trace: Trace, answer: str, *, success: bool, verified: bool) -> Evidence:
    memory_id = exemplar_id(trace.scope, trace.frame, trace.task, answer)
    return Evidence(memory_id, answer, success, verified)


def status(verified_successes: int, verified_failures: int, successes: int) -> str:
    """Return a memory's status from the evidence on its own answer.

    Only `verified` memories act; `candidate` means no `code` or `human` success, `quarantined` at least as many
    verified failures as successes, `withdrawn` no success.
    """
    if verified_successes > verified_failures:
        return "verified"
    if verified_successes:
        return "quarantined"
    return "candidate" if successes else "withdrawn"
