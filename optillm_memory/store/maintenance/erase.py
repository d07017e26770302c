"""Forgetting from beginning to end: rows first, in small commits; then, in the background, their bytes in all files."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from optillm_memory.errors import NotFound
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.transaction import Transaction

BATCH = 100  # rows in one commit: others write in between
WAIT_S = 120.0
ERASED_WITHIN_S = 60  # from the answer until no byte is left, where nobody reads the same state for longer
_AT_ONCE = 1_000  # traces that are looked up together
_FEW, _COMMIT_S = 4, 0.02  # traces in the first commit; how long each commit should take
Progress = Callable[[str], None]


def forget(
    store: Store, selection: Selection, *, with_set_aside: bool = False, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Delete a selection down to its bytes; return counts and, under `left`, what still holds text and why.

    Interrupted, it has forgotten whole batches; the next one finishes it, whatever it is asked for. Raises NotFound.
    """
    if unfinished := store.forgetting.is_unfinished():
        store.outdate_indexes(None)  # whose vectors it left in files is not known any more
    try:
        found = forget_rows(store, selection, progress=progress)
    except NotFound:
        if not (unfinished or with_set_aside):
            raise
        found = {"traces": 0, "pending_feedback": 0}
    erased = erase(store, progress=progress)
    left = [*erased.pop("left"), *store.set_aside(delete=with_set_aside)]
    return {"traces": found["traces"], "pending_feedback": found["pending_feedback"], **erased, "left": left}


def forget_rows(store: Store, selection: Selection, *, progress: Progress = lambda _: None) -> dict[str, int]:
    """Delete the rows of a selection and all that came of them; return how many, and the receipt of their erasure.

    From then on nothing of it is recalled or shown; `erase` takes its bytes out of the files. Raises NotFound.
    """
    counts = store.forgetting.chosen_counts(selection)
    if not any(counts.values()):
        raise NotFound("there is nothing of that kind to forget")
    scopes = store.forgetting.chosen_scopes(selection)
    store.write(deletion.begin).result(WAIT_S)  # should it be interrupted
    forget_warnings(store, store.forgetting.errors_of(selection))
    done = 0
    while batch := store.forgetting.chosen(selection, _AT_ONCE):
        done += in_small_commits(store, batch, lambda tx, part: deletion.delete_traces(tx, part, time.time()))
        progress(f"{done} of {counts['traces']} traces forgotten")
    forget_copies(store)
    waiting = 0
    if condition := selection.waiting():
        waiting = store.write(lambda tx: deletion.delete_feedback(tx, *condition)).result(WAIT_S)
    store.outdate_indexes(scopes)
    # Only now: an erasure that was under way meanwhile has not seen all of it.
    receipt = store.write(deletion.begin).result(WAIT_S)
    return {"traces": done, "pending_feedback": waiting, "receipt": receipt}


def erase(store: Store, *, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Take the bytes of all that was forgotten so far out of all files; under `left` is what kept it from that."""
    receipt, _ = store.forgetting.erasures()
    forget_copies(store)
    tidied = tidy(store)
    if not (left := store.erase(progress=progress)):
        store.write(lambda tx: deletion.end(tx, receipt)).result(WAIT_S)
    return {**tidied, "left": left}


def erasure(store: Store, receipt: str) -> dict[str, Any]:
    """Return how the erasure with a receipt stands. Raises NotFound."""
    asked, erased = store.forgetting.erasures()
    number = int(receipt) if receipt.isascii() and receipt.isdigit() else 0
    if not 0 < number <= asked:
        raise NotFound(f"no erasure {receipt!r}")
    status = "done" if number <= erased else "erasing"
    return {"receipt": receipt, "status": status, "erased_within_s": ERASED_WITHIN_S}


def forget_copies(store: Store) -> None:
    """Take what was copied from forgotten memories out of other requests; they lose the insertion or the proposal."""
    if store.forgetting.has_copies():
        copied = store.forgetting.copied()
        in_small_commits(store, copied or [""], lambda tx, part: deletion.withdraw_copies(tx, part, time.time()))


def forget_warnings(store: Store, errors: Mapping[int, Collection[str]]) -> None:
    """Delete the insertions that warned of failures with these errors (by scope number): they quote them."""
    for scope_id, messages in errors.items():
        found = store.forgetting.warnings_of(scope_id, messages)
        for start in range(0, len(found), BATCH):
            part = found[start : start + BATCH]
            store.write(partial(deletion.delete_placements, scope_id=scope_id, places=part)).result(WAIT_S)


def in_small_commits(store: Store, ids: Sequence[str], forget_some: Callable[[Transaction, Sequence[str]], int]) -> int:
    """Run an operation on a few ids at a time, so that each commit is short; return the sum of what it returned."""
    total, place, size = 0, 0, _FEW
    while place < len(ids):
        part = ids[place : place + size]
        count, took_s = store.write(partial(_timed, forget_some, part)).result(WAIT_S)
        total, place = total + count, place + len(part)
        size = max(1, min(BATCH, 2 * size, int(size * _COMMIT_S / max(took_s, 1e-4))))
    return total


def _timed(
    operation: Callable[[Transaction, Sequence[str]], int], part: Sequence[str], tx: Transaction
) -> tuple[int, float]:
    started = time.perf_counter()
    return operation(tx, part), time.perf_counter() - started


def tidy(store: Store) -> dict[str, int]:
    """Delete the vectors that nothing uses and the names of scopes that nothing is left of; return how many."""
    keys, last = store.vectors.unused()
    vectors = in_small_commits(store, keys, lambda tx, part: tx.vectors.drop(part, last))
    scopes = 0
    if store.forgetting.has_empty_scopes():
        scopes = store.write(deletion.delete_empty_scopes).result(WAIT_S)
    return {"vectors": vectors, "scopes": scopes}
