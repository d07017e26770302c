"""Outcomes: success, failure or unknown from the feedback on a trace, independent of its order of arrival."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from optillm_memory.conversation.text import without_thoughts
from optillm_memory.records import VERIFYING, Feedback, Outcome, Verdict

SUCCESS_SCORE = 0.5
_INDENTED = re.compile(r"\n[ \t]+\S")


def effective(feedback: Iterable[Feedback]) -> list[Feedback]:
    """Return the feedback in force, in order of time: a retraction cancels the feedback of its id, in any order."""
    rows = list(feedback)
    retracted = {f.feedback_id for f in rows if f.value is None}
    standing = [f for f in rows if f.feedback_id not in retracted]
    return sorted(standing, key=lambda f: (f.occurred_at, f.feedback_id))


def outcome(standing: Sequence[Feedback], answer: str | None) -> Outcome:
    """Return the outcome of a trace with this answer by its feedback in force (`standing`).

    Within a source the latest verdict counts. Where `code` and `human` disagree it is a failure: a memory acts
    only when its evidence agrees. `llm` and `inferred` count only without these.
    """
    latest: dict[str, Verdict] = {}
    for item in standing:
        if (verdict := _verdict(item, answer)) != "unknown":
            latest[item.source] = verdict
    verified = [v for s, v in latest.items() if s in VERIFYING]
    verdicts: list[Verdict] = verified or list(latest.values())
    if not verdicts:
        return Outcome("unknown")
    return Outcome("failure" if "failure" in verdicts else "success", verified=bool(verified))


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
