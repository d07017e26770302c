"""Labels: whether a proposal was right, by verified feedback."""

from __future__ import annotations

from collections.abc import Callable

from optillm_memory.learn.exemplars import Learned
from optillm_memory.records import Trace


def label(trace: Trace, learned: Learned, proposed: str, normal: Callable[[str], str]) -> bool | None:
    """Return whether the proposal for a trace was right; None without verified evidence.

    A reused answer has the outcome of its trace. In shadow the proposal is compared, in its normal form, with the
    answers that were verified right and wrong: a wrong answer is no evidence on another one.
    """
    if trace.action == "reuse":
        known = learned.outcome.verified and learned.outcome.verdict != "unknown"
        return learned.outcome.verdict == "success" if known else None
    form = normal(proposed)
    right = {normal(e.answer) for e in learned.evidence if e.verified and e.success}
    wrong = {normal(e.answer) for e in learned.evidence if e.verified and not e.success}
    if right:
        return form in right
    return False if form in wrong else None
