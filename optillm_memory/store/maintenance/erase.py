"""Forgetting from beginning to end: rows first, in small commits; then, in the background, their bytes in all files."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from time import perf_counter as clock
from typing import Any, TypeVar

from optillm_memory.errors import NotFound
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.transaction import Transaction

BATCH = 100  # rows in one commit at most: others write in between
WAIT_S = 120.0
ERASED_WITHIN_S = 60  # from the answer until no byte is left, where nobody reads the same state for longer
_AT_ONCE = 1_000  # traces that are looked up together
_TOGETHER = 8  # traces of short episodes that are deleted by the same statements
_SLICE_S = 0.008  # after which a commit takes up no more
_COPIED = 4  # commits after which what they wrote is copied to where it stays
Progress = Callable[[str], None]
T = TypeVar("T")


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
        done += _in_slices(store, _joined(batch), lambda tx, part: deletion.delete_traces(tx, part, time.time()))
        progress(f"{done} of {counts['traces']} traces forgotten")
    forget_copies(store)
    waiting = 0
    if found := store.forgetting.waiting(selection):
        waiting = _in_slices(store, _batches(found), deletion.delete_waiting)
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
        store.write(lambda tx: deletion.drop_old_notes(tx, time.time())).result(WAIT_S)
        copied = store.forgetting.copied()
        _in_slices(store, _singly(copied), deletion.withdraw_copies)


def forget_warnings(store: Store, errors: Mapping[int, Collection[str]]) -> None:
    """Delete the insertions that warned of failures with these errors (by scope number): they quote them."""
    for scope_id, messages in errors.items():
        places = _batches(store.forgetting.warnings_of(scope_id, messages))
        _in_slices(store, places, partial(deletion.delete_placements, scope_id=scope_id))


def _in_slices(
    store: Store, groups: Sequence[Sequence[T]], operation: Callable[[Transaction, Sequence[T]], int]
) -> int:
    """Run an operation on groups, as many in a commit as fit into a slice of time; return the sum of its results.

    After each commit all others that wait to write have their turn.
    """
    parts = [part for group in groups for part in _batches(group)]
    total = place = commits = 0
    while place < len(parts):
        count, place = store.write(partial(_slice, operation, parts, place)).result(WAIT_S)
        total, commits = total + count, commits + 1
        if commits % _COPIED == 0:
            store.copy_wal()  # here, and not when the writer has to, with others waiting
    return total


def _slice(
    operation: Callable[[Transaction, Sequence[T]], int], parts: Sequence[Sequence[T]], place: int, tx: Transaction
) -> tuple[int, int]:
    """Run an operation on parts from a place on until the time is up; return its results' sum, and where to go on."""
    ends, total = clock() + _SLICE_S, 0
    while place < len(parts):
        total, place = total + operation(tx, parts[place]), place + 1
        if clock() >= ends:
            break
    return total, place


def _joined(groups: Sequence[Sequence[T]]) -> list[Sequence[T]]:
    """Return groups with small ones joined."""
    joined: list[Sequence[T]] = []
    for group in groups:
        if joined and len(joined[-1]) + len(group) <= _TOGETHER:
            joined[-1] = [*joined[-1], *group]
        else:
            joined.append(group)
    return joined


def _batches(found: Sequence[T]) -> list[Sequence[T]]:
    return [found[start : start + BATCH] for start in range(0, len(found), BATCH)]


def _singly(found: Sequence[T]) -> list[Sequence[T]]:
    return [[one] for one in found]


def tidy(store: Store) -> dict[str, int]:
    """Delete the vectors that nothing uses and the names of scopes that nothing is left of; return how many."""
    keys, last = store.vectors.unused()
    vectors = _in_slices(store, _singly(keys), lambda tx, part: tx.vectors.drop(part, last))
    empty, latest = store.forgetting.empty_scopes()
    scopes = _in_slices(store, _singly(empty), lambda tx, part: deletion.delete_scopes(tx, part, latest))
    return {"vectors": vectors, "scopes": scopes}
