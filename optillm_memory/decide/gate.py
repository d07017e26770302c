"""The gate: whether an answer may be reused without a model call, at an error that the user named.

The error is that **among hits**, not among all requests. Labels are verified verdicts on what memory would have said:
every miss gives one where the right answer becomes known, and of the hits those that feedback tells of, at least an
audited share. Exact repeats and vetoed proposals are no labels. What labels prove, and by which test, says
`calibration`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.calibration import GRID, RIGHT, UNKNOWN, WRONG, Calibration, cell_of, discount, doubtful

AUDIT_SHARE = 0.05
# A score this far above the threshold is audited this part as often: where errors are rare a few labels tell enough
# (Neyman 1934, optimal allocation), and calibration weighs them by their stratum.
_SURE, SURE_AUDITS = 0.06, 0.4
_ALONE = 20.0  # errors that the limit lets expect among a partition's own labels, from which on it decides alone
_LIMITS_KEPT = 8
_LARGEST = 0.5  # a limit above it is taken for it


@dataclass(frozen=True, slots=True)
class Label:
    """A verified verdict on what memory would have said (or did say): its score, and whether it was right, if known."""

    score: float
    correct: bool | None
    partition: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to reuse, and why (not); `threshold` is None where none is in force.

    Reasons to serve: `exact`, `above_threshold`. Not to: `shadow`, `no_neighbours`, `quarantined`, `time_dependent`,
    `too_long`, `conflict`, `failed`, `veto_numbers`, `veto_names`, `veto_negation`, `veto_scope`, `veto_words`,
    `veto_order`, `veto_layout`, `veto_language`, `not_calibrated`, `closed`, `below_threshold`, `audit`.
    """

    serve: bool
    reason: str
    threshold: float | None = None
    pooled: bool = False


class Book:
    """The labels of one partition (or of all), and what they prove for each limit that was asked for."""

    def __init__(self, rows: Iterable[tuple[int, int]] = ()) -> None:
        """Start with these (cell, verdict)."""
        self.rows = list(rows)
        self._calibrations: dict[float, tuple[Calibration, int]] = {}

    def calibration(self, limit: float) -> Calibration:
        """Return what all rows so far prove for a limit."""
        # Taken out while it is extended: another thread that asks meanwhile makes its own.
        kept = self._calibrations.pop(limit, None)
        calibration, seen = kept or (Calibration(limit), 0)
        rows = self.rows[seen:]
        for cell, verdict in rows:
            calibration.add(cell, verdict)
        self._calibrations[limit] = calibration, seen + len(rows)
        if len(self._calibrations) > _LIMITS_KEPT:
            self._calibrations.pop(next(iter(self._calibrations)), None)
        return calibration


class Pool:
    """The labels of all partitions of one language, and each partition's own."""

    def __init__(self) -> None:
        """Start without labels."""
        self.all = Book()
        # As long as there is one partition, the pool is its book.
        self.books: dict[str, Book] = {}

    def add(self, partition: str, row: tuple[int, int]) -> None:
        """Take one more label as (cell, verdict)."""
        if not self.books:
            self.books[partition] = self.all
        if partition not in self.books:
            if len(self.books) == 1:
                self.books = {name: Book(book.rows) for name, book in self.books.items()}
            self.books[partition] = Book()
        self.all.rows.append(row)
        if (own := self.books[partition]) is not self.all:
            own.rows.append(row)


class Gate:
    """A fold over labels in the order of their requests: the same labels give the same gate in any process.

    A label that comes late or is retracted belongs in the middle: then fold anew, `Gate(labels)`. To add is to append;
    the first decision for a limit does the work: some 50 ms for 5,000 labels. Deciding is thread-safe, adding is not.
    """

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        """Fold the labels; without any, nothing is served but exact repeats."""
        self._pools: dict[str, Pool] = {}
        self._proposals: Counter[str] = Counter()
        for label in labels:
            self.add(label)

    @property
    def books(self) -> dict[str, Book]:
        """The labels by partition, and under the language alone (empty for English) those of all its partitions."""
        pools = self._pools.items()
        return {language: pool.all for language, pool in pools} | {n: b for _, p in pools for n, b in p.books.items()}

    def add(self, label: Label) -> None:
        """Take one more label, of a request that came after those of all before it."""
        if not 0 <= label.score <= 1:
            raise ValueError(f"a score is in [0, 1], not {label.score}")
        discounted = label.score - discount(self._proposals[label.partition])
        self._proposals[label.partition] += 1
        row = cell_of(discounted), UNKNOWN if label.correct is None else RIGHT if label.correct else WRONG
        self._pool(label.partition).add(label.partition, row)

    def _pool(self, partition: str) -> Pool:
        # A score means another thing in each language: the encoder knows some better than others.
        return self._pools.setdefault(partition.partition("-")[2], Pool())

    def decide(
        self,
        proposal: Proposal | None,
        partition: str,
        max_error: float | None,
        *,
        audit: bool = False,
        audit_if_sure: bool = True,
        quarantined: frozenset[str] = frozenset(),
    ) -> Decision:
        """Decide on one request; `quarantined` are the memories that misled a hit.

        `audit` says whether a hit goes to the model as a check, unless its score is far above the threshold: then
        `audit_if_sure` has to say so too.
        """
        if (refusal := _refusal(proposal, max_error, quarantined)) or proposal is None or max_error is None:
            return Decision(serve=False, reason=refusal)
        if proposal.exact:
            return Decision(serve=False, reason="audit") if audit else Decision(serve=True, reason="exact")
        proven, closed, pooled = self._proven(partition, min(max_error, _LARGEST))
        young = discount(self._proposals[partition])
        if closed:
            reason = "closed"
        elif proven is None:
            reason = "not_calibrated"
        elif proposal.score - young < proven:
            reason = "below_threshold"
        else:
            sure = proposal.score - young >= proven + _SURE
            reason = "audit" if audit and (audit_if_sure or not sure) else "above_threshold"
        return Decision(reason == "above_threshold", reason, None if proven is None else proven + young, pooled)

    def _proven(self, partition: str, limit: float) -> tuple[float | None, bool, bool]:
        """Return (threshold, closed, pooled).

        A partition goes by the labels of all partitions of its language until its own have proven something, or could
        have, unless its own recent ones speak against it.
        """
        if limit <= 0:
            return None, False, False
        of_language = self._pool(partition)
        pool = of_language.all.calibration(limit)
        book = of_language.books.get(partition)
        if book is of_language.all:
            return pool.threshold, pool.closed, False
        if book is not None:
            own = book.calibration(limit)
            threshold = own.threshold or pool.threshold
            if own.threshold or own.closed or (threshold and own.labels(threshold) * limit >= _ALONE):
                return own.threshold, own.closed, False
            if threshold and doubtful(own.recent, GRID.index(threshold), limit):
                return None, True, True
        return pool.threshold, pool.closed, True


def label_of(proposal: Proposal | None, right: str | None, partition: str) -> Label | None:
    """Return what a verified answer (in the form in which answers are compared) says of a proposal, if anything."""
    if proposal is None or proposal.exact or proposal.vetoes:
        return None
    return Label(proposal.score, None if right is None else proposal.key == right, partition)


def is_audited(trace_id: str, salt: bytes, share: float = AUDIT_SHARE) -> bool:
    """Whether a request's hit goes to the model all the same: a keyed hash, not to be guessed, equal in a rebuild."""
    digest = hashlib.blake2b(trace_id.encode("utf-8", "replace"), key=salt, digest_size=8, person=b"audit").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _refusal(proposal: Proposal | None, max_error: float | None, quarantined: frozenset[str]) -> str:
    if proposal is None:
        return "no_neighbours"
    if proposal.vetoes:
        return proposal.vetoes[0]
    if proposal.memory_ids[0] in quarantined:
        return "quarantined"
    return "shadow" if max_error is None else ""
