"""Labels: whether what memory would have answered (or did answer) was right, as far as verified feedback tells."""

from __future__ import annotations

from collections.abc import Callable

from optillm_memory.learn.exemplars import Learned
from optillm_memory.records import Trace


def label(trace: Trace, learned: Learned, proposed: str, normal: Callable[[str], str]) -> bool | None:
    """Return whether a proposal made for a trace was right; None where nothing verified tells.

    An answer that was reused is judged as itself. In shadow the proposal is compared, in its normal form, with the
    answers that were verified right and wrong: a wrong answer says of another one nothing.
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
