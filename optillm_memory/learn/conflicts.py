"""Conflicts: of two verified answers to one task, the later one supersedes the earlier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from optillm_memory.decide.wording import asks_the_same
from optillm_memory.learn.outcomes import same_answer
from optillm_memory.records import Hit


def without_superseded(hits: Sequence[Hit], last_verified: Callable[[Sequence[str]], Mapping[str, float]]) -> list[Hit]:
    """Return the hits without those whose task has another answer that was verified later.

    `last_verified` returns the time of each memory's latest verified success; it is called only on conflicts.
    """
    pairs = [
        (one.memory.memory_id, other.memory.memory_id)
        for place, one in enumerate(hits)
        for other in hits[:place]
        if _conflict(one, other)
    ]
    if not pairs:
        return list(hits)
    times = last_verified(list(dict.fromkeys(memory_id for pair in pairs for memory_id in pair)))
    earlier = {min(pair, key=lambda memory_id: (times.get(memory_id, 0.0), memory_id)) for pair in pairs}
    return [hit for hit in hits if hit.memory.memory_id not in earlier]


def _conflict(one: Hit, other: Hit) -> bool:
    a, b = one.memory, other.memory
    same_text = " ".join(a.task.split()).casefold() == " ".join(b.task.split()).casefold()
    return (same_text or asks_the_same(a.task, b.task)) and not same_answer(a.answer, b.answer)
