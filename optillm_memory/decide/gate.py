"""The gate: whether an answer may be reused without a model call, at a limit of the error that the user sets.

The error is that **among hits**, not among all requests. A label is a verified verdict on a proposal: every miss gives
one where the right answer becomes known; of the hits at least an audited share does. Exact repeats and vetoed proposals
give no label. `calibration` describes the test by which labels prove a threshold.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.calibration import (
    GRID,
    RIGHT,
    UNKNOWN,
    UNSPENT,
    UNSPENT_ON_ACTIONS,
    WRONG,
    Calibration,
    cell_of,
    discount,
    exceeds_limit,
)

AUDIT_SHARE = 0.05
# Hits whose score is this far above the threshold are audited at this fraction of the share: where errors are rare few
# labels suffice (Neyman 1934, optimal allocation), and calibration weighs them by their stratum.
_CONFIDENT, CONFIDENT_AUDITS = 0.06, 0.4
ACTION = "act"  # begins the partition of an action
_ALONE = 20.0  # expected errors at the limit among a partition's own labels from which it decides without the pool
_LIMITS_KEPT = 8
_LARGEST = 0.5  # larger limits count as this one


@dataclass(frozen=True, slots=True)
class Label:
    """The score of a proposal, and whether it was right; None where no verified feedback shows it."""

    score: float
    correct: bool | None
    partition: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to reuse, and the reason; `threshold` is None where none is in force.

    Reasons to serve: `exact`, `above_threshold`. Not to: `shadow`, `no_neighbours`, `quarantined`, `time_dependent`,
    `too_long`, `conflict`, `failed`, `veto_numbers`, `veto_names`, `veto_negation`, `veto_scope`, `veto_words`,
    `veto_order`, `veto_layout`, `veto_language`, `not_calibrated`, `closed`, `below_threshold`, `audit`, `holdout`.
    Not to make an action: `tool_not_offered`, `arguments_not_declared`, `unsupported_option`, `unsupported_approach`,
    `tool_forbidden`, `tool_not_declared`, `changes_state`.
    """

    serve: bool
    reason: str
    threshold: float | None = None
    pooled: bool = False


class LabelLog:
    """The labels of one partition (or of all), with their calibration for each limit in use."""

    def __init__(self, rows: Iterable[tuple[int, int]] = (), unspent: float = UNSPENT) -> None:
        """Start with these (cell, verdict); `unspent` is that of `Calibration`."""
        self.rows = list(rows)
        self._unspent = unspent
        self._calibrations: dict[float, tuple[Calibration, int]] = {}

    def calibration(self, limit: float) -> Calibration:
        """Return the calibration by all rows so far for a limit of the error."""
        # Removed while it is extended: another thread that needs it meanwhile makes its own.
        kept = self._calibrations.pop(limit, None)
        calibration, seen = kept or (Calibration(limit, self._unspent), 0)
        rows = self.rows[seen:]
        for cell, verdict in rows:
            calibration.add(cell, verdict)
        self._calibrations[limit] = calibration, seen + len(rows)
        if len(self._calibrations) > _LIMITS_KEPT:
            self._calibrations.pop(next(iter(self._calibrations)), None)
        return calibration


class LanguagePool:
    """The labels of all partitions of one language, and each partition's own."""

    def __init__(self, unspent: float = UNSPENT) -> None:
        """Start without labels; `unspent` is that of `Calibration`."""
        self._unspent = unspent
        self.all = LabelLog(unspent=unspent)
        # While there is only one partition, its log is that of the pool.
        self.logs: dict[str, LabelLog] = {}

    def add(self, partition: str, row: tuple[int, int]) -> None:
        """Append a label as (cell, verdict)."""
        if not self.logs:
            self.logs[partition] = self.all
        if partition not in self.logs:
            if len(self.logs) == 1:
                self.logs = {name: LabelLog(log.rows, self._unspent) for name, log in self.logs.items()}
            self.logs[partition] = LabelLog(unspent=self._unspent)
        self.all.rows.append(row)
        if (own := self.logs[partition]) is not self.all:
            own.rows.append(row)


class Gate:
    """A fold over labels in the order of their requests: the same labels give the same gate in any process.

    A label that is late or retracted belongs in the middle: fold all labels again then, `Gate(labels)`. `add` only
    appends; the first decision for a limit calibrates, about 50 ms for 5,000 labels. `decide` is thread-safe, `add` is
    not.
    """

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        """Fold the labels; without any only exact repeats are served."""
        self._pools: dict[str, LanguagePool] = {}
        self._proposals: Counter[str] = Counter()
        for label in labels:
            self.add(label)

    @property
    def logs(self) -> dict[str, LabelLog]:
        """The labels by partition, and under the language alone (empty for English) those of all its partitions."""
        pools = self._pools.items()
        return {language: pool.all for language, pool in pools} | {n: b for _, p in pools for n, b in p.logs.items()}

    def add(self, label: Label) -> None:
        """Append the label of the latest request. Raises ValueError for a score outside of [0, 1]."""
        if not 0 <= label.score <= 1:
            raise ValueError(f"a score is in [0, 1], not {label.score}")
        discounted = label.score - discount(self._proposals[label.partition])
        self._proposals[label.partition] += 1
        row = cell_of(discounted), UNKNOWN if label.correct is None else RIGHT if label.correct else WRONG
        self._pool(label.partition).add(label.partition, row)

    def _pool(self, partition: str) -> LanguagePool:
        # A score means something else in each language: the encoder knows some better than others.
        # Of actions it is the agent that stands there.
        unspent = UNSPENT_ON_ACTIONS if partition.startswith(ACTION) else UNSPENT
        return self._pools.setdefault(partition.partition("-")[2], LanguagePool(unspent))

    def decide(
        self,
        proposal: Proposal | None,
        partition: str,
        max_error: float | None,
        *,
        audit: bool = False,
        audit_if_confident: bool = True,
        quarantined: frozenset[str] = frozenset(),
    ) -> Decision:
        """Decide on one request; `quarantined` are the memories that caused a wrong hit.

        With `audit` a hit goes to the model as a check; where its score is far above the threshold, only with
        `audit_if_confident` too.
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
            confident = proposal.score - young >= proven + _CONFIDENT
            reason = "audit" if audit and (audit_if_confident or not confident) else "above_threshold"
        return Decision(reason == "above_threshold", reason, None if proven is None else proven + young, pooled)

    def _proven(self, partition: str, limit: float) -> tuple[float | None, bool, bool]:
        """Return (threshold, closed, pooled).

        A partition uses the labels of all partitions of its language until its own have proven a threshold, or are
        enough to, unless its own recent labels contradict the pool.
        """
        if limit <= 0:
            return None, False, False
        of_language = self._pool(partition)
        pool = of_language.all.calibration(limit)
        log = of_language.logs.get(partition)
        if log is of_language.all:
            return pool.threshold, pool.closed, False
        if log is not None:
            own = log.calibration(limit)
            threshold = own.threshold or pool.threshold
            if own.threshold or own.closed or (threshold and own.labels(threshold) * limit >= _ALONE):
                return own.threshold, own.closed, False
            if threshold and exceeds_limit(own.recent, GRID.index(threshold), limit):
                return None, True, True
        return pool.threshold, pool.closed, True


def is_audited(trace_id: str, salt: bytes, share: float = AUDIT_SHARE) -> bool:
    """Whether a request's hit goes to the model as a check: by a keyed hash, unpredictable and equal in a rebuild."""
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
