"""Conflicts: of two verified results for one task the later one supersedes the earlier, until it fails or is retracted.

Where both keep being verified, turn by turn, both stand: the task has two answers, or the world changes back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from optillm_memory.decide.wording import asks_the_same
from optillm_memory.learn.outcomes import same_answer
from optillm_memory.records import Hit

K = TypeVar("K", bound=Hashable)


def superseded(verified: Mapping[K, Sequence[float]]) -> set[K]:
    """Return which of several conflicting results another one supersedes; the values are when each was verified.

    One that was verified again after another had been stands beside that one.
    """
    return {one for one in verified for other in verified if one != other and _supersedes(verified, other, one)}


def without_superseded(
    hits: Sequence[Hit], verified: Callable[[Sequence[str]], Mapping[str, Sequence[float]]]
) -> list[Hit]:
    """Return the hits without those that another answer to the same task supersedes.

    `verified` returns when each memory was verified; it is called only on conflicts. Conflicting answers that stand
    side by side have the date of their latest verification.
    """
    pairs = conflicts(hits)
    if not pairs:
        return list(hits)
    named = dict.fromkeys(hit.memory.memory_id for pair in pairs for hit in pair)
    known = verified(list(named))
    times = {memory_id: known.get(memory_id) or (0.0,) for memory_id in named}
    gone = set()
    for pair in pairs:
        gone |= superseded({hit.memory.memory_id: times[hit.memory.memory_id] for hit in pair})
    return [
        replace(hit, memory=replace(hit.memory, created_at=max(times[hit.memory.memory_id])))
        if hit.memory.memory_id in times
        else hit
        for hit in hits
        if hit.memory.memory_id not in gone
    ]


def conflicts(hits: Sequence[Hit]) -> list[tuple[Hit, Hit]]:
    """Return the pairs of hits that answer the same task differently."""
    return [(one, other) for place, one in enumerate(hits) for other in hits[:place] if _conflict(one, other)]


def words_of(task: str) -> str:
    """Return the form in which the same task is the same text."""
    return " ".join(task.split()).casefold()


def _supersedes(verified: Mapping[K, Sequence[float]], later: K, earlier: K) -> bool:
    new, old = verified[later], verified[earlier]
    if (max(new), str(later)) < (max(old), str(earlier)):
        return False
    return not any(min(old) < at < max(old) for at in new)


def _conflict(one: Hit, other: Hit) -> bool:
    a, b = one.memory, other.memory
    return (words_of(a.task) == words_of(b.task) or asks_the_same(a.task, b.task)) and not same_answer(
        a.answer, b.answer
    )
