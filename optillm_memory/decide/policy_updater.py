"""The policy updater: one scope's policy, brought up to date with the choices and what came of them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optillm_memory.decide.policy import Choice, LoggedChoice, Measurement, Policy, Situation, Terms
from optillm_memory.records import Arm, ThreadStarter

_INLINE = 2_000  # rows that are folded within a request; more take a thread of their own
_AGAIN_S = 60.0  # after rows that could not be folded
_RESERVED_S = 60.0  # a choice that is not in the log by then never will be


@dataclass(frozen=True, slots=True)
class Row:
    """A choice in the log, and what is known of its episode: the reward once there is an outcome, tokens, time."""

    trace_id: str
    chosen: LoggedChoice
    reward: float | None
    tokens: int
    latency_ms: float


class PolicyUpdater:
    """Keeps a policy equal to the fold of all rows in the order of their requests. Thread-safe.

    Rows of another process that come late are taken where they arrive: a few places that a new start corrects.
    """

    def __init__(self, arms: Sequence[Arm], terms: Terms, start: ThreadStarter) -> None:
        """Start with no row; the first arm is the default. `start` gives long folds a thread."""
        self.since = -1  # the store's revision up to which rows were taken
        self.policy = Policy(arms, arms[0].name, terms)
        self._start = start
        self._prices = {arm.name: arm.price for arm in arms}
        self._lock = threading.Lock()
        self._index: dict[str, int] = {}
        self._examples: dict[int, str] = {}
        self._reserved: dict[str, tuple[float, float]] = {}  # stake and time of choices that are not in the log yet
        self._folding: threading.Thread | None = None
        self._not_before = 0.0

    def take(self, since: int, revision: int, rows: Sequence[Row]) -> bool:
        """Take the rows that came or changed after `since`, up to a revision; very many are folded in the background.

        False, and nothing is taken, while it is busy, and where others were taken since these were read: these may be
        out of date.
        """
        with self._lock:
            if self.busy or since != self.since:
                return False
            try:
                if len(rows) <= _INLINE:
                    self._fold(rows)
                else:
                    self._folding = self._start("agent-memory-policy", lambda: self._fold_many(rows, since))
            except BaseException:
                self._not_before = time.monotonic() + _AGAIN_S
                raise
            self.since = max(since, revision)
            return True

    def choose(
        self, trace_id: str, situation: Situation, chance: float, eligible: Collection[str], *, recorded: bool
    ) -> Choice:
        """Choose an arm for a request; one that is not recorded teaches nothing, so it explores nothing."""
        now = time.monotonic()
        with self._lock:
            self._reserved = {t: r for t, r in self._reserved.items() if now - r[1] < _RESERVED_S}
            reserved = sum(stake for stake, _ in self._reserved.values()) if recorded else float("inf")
            choice = self.policy.choose(situation, chance, eligible, reserved=reserved)
            if recorded and choice.stake:
                self._reserved[trace_id] = (choice.stake, now)
        return choice

    @property
    def busy(self) -> bool:
        """Whether rows are being folded in the background, or just failed to be: no more are taken until then."""
        return self._folding is not None or time.monotonic() < self._not_before

    def wait(self, timeout_s: float) -> None:
        """Wait until what is folded in the background is there."""
        if (thread := self._folding) is not None:
            thread.join(timeout_s)

    def report(self) -> tuple[dict[str, Any], dict[int, str]]:
        """Return the policy's figures for people, and the trace id of the latest request of each task cluster."""
        with self._lock:
            policy, examples = self.policy, dict(self._examples)
            figures = {
                "choices": policy.count,
                "budget_remaining": round(policy.budget, 4),
                "all": _rounded(policy.estimates()),
                "clusters": [
                    {"cluster": c, "requests": policy.requests_of(c), "arms": _rounded(policy.estimates(c))}
                    for c in sorted(examples)
                    if c >= 0
                ],
            }
        return figures, examples

    def _fold_many(self, rows: Iterable[Row], since: int) -> None:
        # The policy is not read while it grows: a copy grows, and the present one answers meanwhile.
        grown = PolicyUpdater(self.policy.arms, self.policy.terms, self._start)
        try:
            grown.policy, grown._index, grown._examples = copy.deepcopy((self.policy, self._index, self._examples))
            grown._fold(rows)
        except BaseException:
            with self._lock:
                self.since, self._folding, self._not_before = since, None, time.monotonic() + _AGAIN_S
            raise
        with self._lock:
            self.policy, self._index, self._examples = grown.policy, grown._index, grown._examples
            for row in rows:
                self._reserved.pop(row.trace_id, None)
            self._folding = None

    def _fold(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._reserved.pop(row.trace_id, None)
            known = Measurement(
                row.reward, row.tokens / 1000 * self._prices.get(row.chosen.arm, 1.0), row.latency_ms / 1000
            )
            if (index := self._index.get(row.trace_id)) is not None:
                self.policy.observe(index, known)
                continue
            self._index[row.trace_id] = index = self.policy.add(row.chosen, known)
            self._examples[self.policy.cluster_of(index)] = row.trace_id


def _rounded(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 4) for key, value in found.items()} for name, found in figures.items()}
