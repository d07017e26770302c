"""The guard at the action's site: whether an action is about to be repeated that is known to fail."""

from __future__ import annotations

from collections.abc import Sequence

from optillm_memory.records import PastAttempt, Step

# A test or a build that failed may well pass now, a server may be back: only the action itself is to blame here.
_NOT_THE_ACTION = frozenset(("test_summary", "compiler", "http"))
_CHANGEABLE = ("http|", "curl|", "tool|timeout")
_WORDS_MOST = 40


def known_to_fail(
    past: Sequence[PastAttempt], here: Sequence[Step], *, episode_id: str, now: float, expiry_s: float
) -> list[PastAttempt]:
    """Return the failures of an action that speak against doing it again, latest first; none where it may work.

    It may where it worked since, where its failures are older than `expiry_s` seconds (what is not supported today may
    be tomorrow), and where this very conversation did something else since: its state is another.
    """
    decided = sorted((p for p in past if p.verdict != "unknown"), key=lambda p: p.at, reverse=True)
    failures: list[PastAttempt] = []
    for attempt in decided:
        if attempt.verdict == "success":
            break
        if now - attempt.at <= expiry_s and not _about_something_else(attempt):
            failures.append(attempt)
    own = {p.step_id for p in failures if p.episode_id == episode_id}
    if own and here and here[-1].step_id not in own and any(s.step_id in own for s in here):
        return []
    return failures


def _about_something_else(attempt: PastAttempt) -> bool:
    return attempt.basis in _NOT_THE_ACTION or attempt.signature.lower().startswith(_CHANGEABLE)


def same_but_for_names(action: str, known: str) -> list[int] | None:
    """Return the places of the words in which an action differs from a known one, where nothing but names differs.

    None otherwise: the program, the flags and the number of words are the same, and at most half of the words others.
    """
    one, other = action.split(), known.split()
    if len(one) != len(other) or not one or len(one) > _WORDS_MOST or one[0] != other[0]:
        return None
    places = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if not places or 2 * len(places) > len(one) or any(w[i].startswith("-") for w in (one, other) for i in places):
        return None
    return places


def of_same_form(action: str, text: str, places: Sequence[int]) -> bool:
    """Whether a text is the action but for the words at these places."""
    one, other = action.split(), text.split()
    return len(one) == len(other) and all(
        a == b or i in places for i, (a, b) in enumerate(zip(one, other, strict=True))
    )
