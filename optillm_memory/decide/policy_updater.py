"""The learner: one scope's policy, brought up to date with the choices and what came of them."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from optillm_memory.decide.policy import Choice, LoggedChoice, Measurement, Policy, Situation, Terms
from optillm_memory.records import Arm

_INLINE = 2_000  # rows that are folded within a request; more take a thread of their own
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

    def __init__(self, arms: Sequence[Arm], terms: Terms) -> None:
        """Start with no row; the first arm is the default."""
        self.since = -1  # the store's revision up to which rows were taken
        self.policy = Policy(arms, arms[0].name, terms)
        self._prices = {arm.name: arm.price for arm in arms}
        self._lock = threading.Lock()
        self._index: dict[str, int] = {}
        self._examples: dict[int, str] = {}
        self._reserved: dict[str, tuple[float, float]] = {}  # stake and time of choices that are not in the log yet
        self._folding: threading.Thread | None = None

    def take(self, since: int, revision: int, rows: Sequence[Row]) -> bool:
        """Take the rows that came or changed after `since`, up to a revision; very many are folded behind the caller.

        False, and nothing is taken, while it is busy, and where others were taken since these were read: they may say
        what is out of date.
        """
        with self._lock:
            if self._folding is not None or since != self.since:
                return False
            self.since = max(self.since, revision)
            if len(rows) <= _INLINE:
                self._fold(rows)
                return True
            name = "agent-memory-policy"
            self._folding = threading.Thread(target=self._fold_behind, args=(rows,), name=name, daemon=True)
            self._folding.start()
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
        """Whether rows are being folded behind the caller's back: more are not taken until then."""
        return self._folding is not None

    def wait(self, timeout_s: float) -> None:
        """Wait until what is folded behind is there."""
        if (thread := self._folding) is not None:
            thread.join(timeout_s)

    def examples(self) -> dict[int, str]:
        """Return the trace id of the latest request of each task cluster."""
        with self._lock:
            return dict(self._examples)

    def _fold_behind(self, rows: Iterable[Row]) -> None:
        # The policy is not looked at while it grows: a copy does, and the one that there is answers meanwhile.
        grown = PolicyUpdater(self.policy.arms, self.policy.terms)
        grown.policy, grown._index, grown._examples = copy.deepcopy((self.policy, self._index, self._examples))
        grown._fold(rows)
        with self._lock:
            self.policy, self._index, self._examples = grown.policy, grown._index, grown._examples
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
