"""Off-policy evaluation: the reward of another policy on past traffic, from the logged propensities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optillm_memory.learn.confidence import Array, Interval, weighted_mean

ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class LoggedEpisode:
    """An episode in the policy's log: the arm with its propensity, the probabilities of all arms, and the results.

    `reward` is None without a verified outcome; `switched` means that later requests of the episode got another arm.
    """

    arm: str
    propensity: float
    probabilities: Mapping[str, float]
    reward: float | None
    tokens: float
    latency_ms: float
    switched: bool = False


Policy = Callable[[LoggedEpisode], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Prices:
    """The costs subtracted from the reward: for a thousand tokens, and for a second."""

    thousand_tokens: float = 0.0
    second: float = 0.0

    def utility(self, row: LoggedEpisode) -> float:
        """Return the reward minus the costs."""
        return (row.reward or 0.0) - self.thousand_tokens * row.tokens / 1000 - self.second * row.latency_ms / 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated figures of a policy for an episode.

    `covered` episodes are those in which every arm of the policy had a positive probability: the estimates are about
    these. `utility`, `reward`, `tokens` and `latency_ms` are self-normalised means, None where no
    episode had an arm of the policy; `clipped` is the utility with truncated weights. `effective` is the number of
    episodes of the policy itself with the same information.
    """

    covered: int
    effective: float
    largest_weight: float
    utility: float | None
    interval: Interval | None
    clipped: float | None
    reward: float | None
    tokens: float | None
    latency_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        interval = self.interval
        return {
            "covered_episodes": self.covered,
            "effective_sample_size": round(self.effective, 1),
            "largest_weight": round(self.largest_weight, 2),
            "utility": _rounded(self.utility),
            "low": _rounded(interval.low if interval else None),
            "high": _rounded(interval.high if interval else None),
            "clipped": _rounded(self.clipped),
            "reward": _rounded(self.reward),
            "tokens": _rounded(self.tokens),
            "latency_ms": _rounded(self.latency_ms),
        }


def always(arm: str) -> Policy:
    """Return the policy that always chooses one arm."""
    return lambda _: {arm: 1.0}


def logged_policy(row: LoggedEpisode) -> Mapping[str, float]:
    """Return the probabilities of the policy that wrote the log."""
    return row.probabilities


def estimate(
    rows: Sequence[LoggedEpisode], policy: Policy, prices: Prices = Prices(), alpha: float = ALPHA
) -> Estimate:
    """Return the estimates of a policy from the logged episodes with an outcome.

    The means are self-normalised (Swaminathan & Joachims, "The self-normalized estimator for counterfactual learning",
    NeurIPS 2015); the effective sample size is Kish's; weights are cut off at the root of the number of
    episodes (Ionides, "Truncated importance sampling", 2008). The interval holds at every look at once; it takes the
    largest weight that the log's probabilities allow for the largest there is, and so for the lowest utility, which
    without prices is a reward of 0.
    """
    rewarded = [row for row in rows if row.reward is not None and row.propensity > 0]
    weighed = [(row, *found) for row in rewarded if (found := _weight(row, policy(row))) is not None]
    if not weighed:
        return Estimate(0, 0.0, 0.0, None, None, None, None, None, None)
    weights = np.array([weight for _, weight, _ in weighed])
    most = max(largest for _, _, largest in weighed)
    utility = np.array([prices.utility(row) for row, _, _ in weighed])
    cut = np.minimum(weights, math.sqrt(len(weighed)))
    value = _mean(utility, weights)
    return Estimate(
        covered=len(weighed),
        effective=float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0,
        largest_weight=float(weights.max()),
        utility=value,
        interval=_interval(utility, weights, most, value, alpha),
        clipped=_mean(utility, cut),
        reward=_mean(np.array([row.reward for row, _, _ in weighed]), weights),
        tokens=_mean(np.array([row.tokens for row, _, _ in weighed]), weights),
        latency_ms=_mean(np.array([row.latency_ms for row, _, _ in weighed]), weights),
    )


def _weight(row: LoggedEpisode, target: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the weight of an episode and the largest that it could have had; None where the log does not cover it."""
    logged = {**row.probabilities, row.arm: row.propensity}
    wanted = {arm: share for arm, share in target.items() if share > 0}
    if any(logged.get(arm, 0.0) <= 0 for arm in wanted):
        return None
    return target.get(row.arm, 0.0) / row.propensity, max(share / logged[arm] for arm, share in wanted.items())


def _interval(utility: Array, weights: Array, most: float, value: float | None, alpha: float) -> Interval:
    low = min(0.0, float(utility.min()))
    span = max(1.0, float(utility.max())) - low
    found = weighted_mean((utility - low) / span, weights, most, alpha)
    found = Interval(low + span * found.low, low + span * found.high)
    # With very few episodes the self-normalised mean may lie outside: a wider interval is valid too.
    return found if value is None else Interval(min(found.low, value), max(found.high, value))


def _mean(values: Array, weights: Array) -> float | None:
    return float(weights @ values / weights.sum()) if weights.any() else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
