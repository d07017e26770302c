"""Exemplars: a task and its verified answer, folded from one trace and the feedback that stands on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from optillm_memory.conversation.redact import is_whole
from optillm_memory.conversation.text import BLOCK_OPEN, without_thoughts
from optillm_memory.learn.outcomes import effective, normal_answer, outcome, same_answer
from optillm_memory.records import VERIFYING, Feedback, Outcome, Scope, Trace

# How an answer ends that says all it had to say; a missing reason is no objection. Not: length, content_filter, …
_ENDED = frozenset(("stop", "none", "", "end_turn", "stop_sequence", "eos", "eos_token"))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one trace says of one memory: that this answer to its task was right, or wrong."""

    memory_id: str
    answer: str
    success: bool
    verified: bool


@dataclass(frozen=True, slots=True)
class Learned:
    """All that one trace teaches: its outcome, evidence on exemplars, and whether its injected memories did well."""

    outcome: Outcome
    evidence: tuple[Evidence, ...]


def learn(trace: Trace, own: Sequence[Feedback], of_episode: Sequence[Feedback], *, closing: Trace | None) -> Learned:
    """Fold the feedback on a trace and on its episode into what the trace teaches.

    Feedback on the trace itself outranks its episode's, unless only the episode's is verified. An episode's feedback
    speaks for the answer of the trace that closed it (`closing`) where that was a one-shot request: an agent's "All
    done." is no answer to its task. The others share its outcome. Answers that came from reuse teach nothing, nor do
    those that were cut off, altered for storing, or that speak in memory's own marks; a demonstration of a better one
    does.
    """
    standing = effective(own)
    result = outcome(standing, trace.answer)
    if not result.verified:
        shared = effective(of_episode)
        of_all = outcome(shared, closing.answer if closing else None)
        # What an observation suggests of one step gives way to what was verified of the whole.
        if of_all.verified or result.verdict == "unknown":
            result = of_all
            closes = closing is not None and closing.trace_id == trace.trace_id and trace.one_shot
            standing = [*standing, *shared] if closes else []
    if not trace.task.strip():
        return Learned(result, ())
    evidence: dict[str, Evidence] = {}
    answer = _teachable(trace.answer or "") if (trace.finish_reason or "None").lower() in _ENDED else ""
    if answer and result.verdict != "unknown" and standing and trace.action != "reuse":
        item = _evidence(trace, answer, success=result.verdict == "success", verified=result.verified)
        evidence[item.memory_id] = item
    demonstrations = [f for f in standing if f.metric == "demonstration" and isinstance(f.value, str)]
    verified = [f for f in demonstrations if f.source in VERIFYING]
    for shown in (verified or demonstrations)[-1:]:
        text = _teachable(str(shown.value))
        if text and not (answer and same_answer(answer, text)):
            item = _evidence(trace, text, success=True, verified=shown.source in VERIFYING)
            evidence[item.memory_id] = item
    return Learned(result, tuple(evidence.values()))


def _teachable(answer: str) -> str:
    """Return what of an answer may be given as an answer again: all but thoughts, or nothing where it is not whole."""
    answer = without_thoughts(answer)
    return answer if answer.strip() and is_whole(answer) and BLOCK_OPEN not in answer else ""


def exemplar_id(scope: Scope, frame: str, task: str, answer: str) -> str:
    """Return the id of the exemplar that says so: the same task and answer in a scope are one memory."""
    parts = (scope.tenant, scope.namespace, scope.user_id, scope.agent_id, frame)
    text = "\x1f".join((*parts, " ".join(task.split()).casefold(), normal_answer(answer)))
    return "mem-" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


def _evidence(trace: Trace, answer: str, *, success: bool, verified: bool) -> Evidence:
    memory_id = exemplar_id(trace.scope, trace.frame, trace.task, answer)
    return Evidence(memory_id, answer, success, verified)


def status(verified_successes: int, verified_failures: int, successes: int) -> str:
    """Return a memory's status from the evidence on its own answer.

    `verified` acts; `candidate` (no `code` or `human` success) and `quarantined` (verified failures weigh as much
    as successes) do not; `withdrawn` has no success left.
    """
    if verified_successes > verified_failures:
        return "verified"
    if verified_successes:
        return "quarantined"
    return "candidate" if successes else "withdrawn"
