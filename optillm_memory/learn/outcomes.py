"""Outcomes: success, failure or unknown from the feedback on a trace, independent of its order of arrival."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from optillm_memory.conversation.text import without_thoughts
from optillm_memory.records import TRUSTED, VERIFYING, Feedback, Outcome, Verdict

SUCCESS_SCORE = 0.5
_INDENTED = re.compile(r"\n[ \t]+\S")


def effective(feedback: Iterable[Feedback]) -> list[Feedback]:
    """Return the feedback in force, in order of time: a retraction cancels the feedback of its id, in any order."""
    rows = list(feedback)
    retracted = {f.feedback_id for f in rows if f.value is None}
    standing = [f for f in rows if f.feedback_id not in retracted]
    return sorted(standing, key=lambda f: (f.occurred_at, f.feedback_id))


def weighed(feedback: Iterable[Feedback], askers: Collection[str]) -> list[Feedback]:
    """Return feedback on what somebody of these names asked; what its reporter cannot verify alone counts as `llm`.

    Under strict trust nobody verifies their own work: what is said to come from `code` or a `human` does where its
    reporter is not who asked, or where two reporters say the same.
    """
    rows = list(feedback)
    reporters: dict[Any, set[str]] = {}
    for item in rows:
        if _is_claim(item):
            reporters.setdefault(_statement(item), set()).add(item.reporter)
    return [
        replace(item, source="llm")
        if _is_claim(item) and item.reporter in askers and len(reporters[_statement(item)]) == 1
        else item
        for item in rows
    ]


def _is_claim(item: Feedback) -> bool:
    return item.trust == "strict" and item.source in VERIFYING and item.value is not None


def _statement(item: Feedback) -> Any:
    """Return what feedback says, in a form that is equal where two say the same."""
    if item.metric == "demonstration":
        return "demonstration", normal_answer(str(item.value))
    return _verdict(item, None)


def confirming(feedback: Iterable[Feedback], given: str | None, answer: str) -> set[str]:
    """Return who says, of a trace that was `given` one answer, that `answer` is right, and can verify it by their word.

    Empty is the name of nobody in particular.
    """
    right = same_answer(given or "", answer)
    return {
        item.reporter
        for item in feedback
        if item.source in VERIFYING
        and _verdict(item, answer) == "success"
        and (right or item.metric == "demonstration")
    }


def stands_alone(reporters: Collection[str]) -> bool:
    """Whether a memory that these reporters confirm has no second witness; the operator needs none."""
    return TRUSTED.isdisjoint(reporters) and len({*reporters} - {""}) <= 1


def outcome(standing: Sequence[Feedback], answer: str | None) -> Outcome:
    """Return the outcome of a trace with this answer by its feedback in force (`standing`).

    Within a source the latest verdict counts. Where `code` and `human` disagree it is a failure: a memory acts
    only when its evidence agrees. `llm` and `inferred` count only without these. Until when it holds is said by the
    latest that counts.
    """
    latest: dict[str, tuple[Verdict, Feedback]] = {}
    for item in standing:
        if (verdict := _verdict(item, answer)) != "unknown":
            latest.pop(item.source, None)  # in order of time
            latest[item.source] = (verdict, item)
    verified = [found for source, found in latest.items() if source in VERIFYING]
    counting = verified or list(latest.values())
    if not counting:
        return Outcome("unknown")
    failed = any(verdict == "failure" for verdict, _ in counting)
    return Outcome("failure" if failed else "success", bool(verified), counting[-1][1].valid_until)


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal except for thoughts, case, white space in lines and a final full stop."""
    return normal_answer(one) == normal_answer(other)


def normal_answer(text: str) -> str:
    """Return the normal form of an answer; if lines are indented, it contains the indentation."""
    text = without_thoughts(text)
    if _INDENTED.search(text):
        lines = [line for line in text.expandtabs(8).splitlines() if line.strip()]
        text = "\n".join([line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in lines])
        return text.rstrip(" .").casefold()
    return " ".join(text.split()).rstrip(" .").casefold()


def _verdict(item: Feedback, answer: str | None) -> Verdict:
    value: Any = item.value
    if item.metric == "success":
        good = bool(value)
    elif item.metric == "score":
        good = value >= SUCCESS_SCORE
    elif item.metric == "demonstration":
        good = answer is not None and same_answer(answer, value)
    elif item.metric == "error":
        good = False
    else:
        return "unknown"
    return "success" if good else "failure"
