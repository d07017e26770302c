"""Forgetting from beginning to end: in batches that each leave everything consistent, down to the last file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from optillm_memory.errors import NotFound
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.selection import Selection

BATCH = 100  # traces in one commit: others write in between
WAIT_S = 120.0
Progress = Callable[[str], None]


def forget(
    store: Store, selection: Selection, *, with_set_aside: bool = False, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Delete a selection and give the disk back; return counts and, under `left`, what still holds text and why.

    Interrupted, it has forgotten whole batches; the next one finishes it, whatever it is asked for. Raises NotFound.
    """
    counts, unfinished = store.forgetting.chosen_counts(selection), store.forgetting.is_unfinished()
    if not (any(counts.values()) or unfinished or with_set_aside):
        raise NotFound("there is nothing of that kind to forget")
    # Whose vectors an interrupted one left in files is not known any more: all are made again.
    scopes = None if unfinished else store.forgetting.chosen_scopes(selection)
    store.write(deletion.begin).result(WAIT_S)
    done = 0
    while batch := store.forgetting.chosen(selection, BATCH):
        done += forget_traces(store, batch)
        progress(f"{done} of {counts['traces']} traces forgotten")
    if condition := selection.waiting():
        waiting = store.write(lambda tx: deletion.delete_feedback(tx, *condition)).result(WAIT_S)
    else:
        waiting = 0
    tidied = tidy(store)
    left = store.give_back(scopes, progress=progress)
    if not left:
        store.write(deletion.end).result(WAIT_S)
    left += store.set_aside(delete=with_set_aside)
    return {"traces": done, "pending_feedback": waiting, **tidied, "left": left}


def forget_traces(store: Store, trace_ids: Sequence[str]) -> int:
    """Delete traces, and what was copied from memories that go with them; return how many traces there were."""
    now = time.time()
    done = store.write(lambda tx: deletion.delete_traces(tx, trace_ids, now)).result(WAIT_S)
    while store.write(lambda tx: deletion.withdraw_copies(tx, BATCH, now)).result(WAIT_S):
        pass
    return int(done)


def tidy(store: Store) -> dict[str, int]:
    """Delete the vectors that nothing uses and the names of scopes that nothing is left of; return how many."""
    keys, last = store.vectors.unused()
    vectors = 0
    for start in range(0, len(keys), BATCH):
        part = keys[start : start + BATCH]
        vectors += store.write(lambda tx, part=part: tx.vectors.drop(part, last)).result(WAIT_S)  # type: ignore[misc]
    scopes = store.write(deletion.delete_empty_scopes).result(WAIT_S)
    return {"vectors": vectors, "scopes": scopes}
