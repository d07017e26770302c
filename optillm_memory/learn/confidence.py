"""Confidence sequences: bounds valid at all times at once, for a difference of shares and for a weighted mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A bet is a stake (a share of the wealth) and a baseline (subtracted from each outcome).
STAKES: Array = np.geomspace(0.01, 0.99, 10)
BASELINES: Array = np.array([0.02, 0.15, 0.35, 0.5, 0.65, 0.85, 0.98])
_HALVINGS = 40
_ABOVE = 1e-9  # keeps the payoff of a bet finite at the floor


@dataclass(frozen=True, slots=True)
class Interval:
    """A lower and an upper bound."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Counts:
    """Successes and failures with and without treatment; `share` is each unit's probability to be held out."""

    share: float
    with_successes: int = 0
    with_failures: int = 0
    without_successes: int = 0
    without_failures: int = 0


def wilson(count: int, total: int, z: float) -> Interval:
    """Return the interval of a share of independent cases, `z` standard errors to each side (Wilson 1927)."""
    share = count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Interval(middle - half, middle + half)


def lower_bound(
    payoffs: Array, floors: Array, counts: Array, alpha: float, *, least: float, most: float = 1.0
) -> float:
    """Return a lower confidence bound of the mean payoff: at any time it is too high with probability `alpha` at most.

    `payoffs` has shape (baselines, observations), `counts` (observations,) how often each was made, and `floors`
    (baselines, 1) the least possible payoff. A payoff's mean, given the past, is the parameter, which lies between
    `least` and `most`.

    To test the mean v, a share u of the wealth is staked each time on a bet that is fair at v: it returns
    (payoff - floor) / (v - floor). The wealth is a martingale at v, and so is its mean over all bets; by
    Ville's inequality it ever reaches 1 / alpha with probability alpha at most, so every v where it does is refuted:
    the capital process of Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (JRSS-B
    2024, section 4), with a mean over fixed bets in place of one that follows the data.

    As the bets are fixed, the bound depends on what was observed, not on the order: late and retracted outcomes give
    the bound that they would have given at once. There is no running intersection, which would depend on the times.
    """
    refuted = math.log(1 / alpha)
    if _log_wealth(least, payoffs, floors, counts) < refuted:
        return least
    low, high = least, most  # the wealth falls as v rises
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _log_wealth(middle, payoffs, floors, counts) >= refuted:
            low = middle
        else:
            high = middle
    return low


def _log_wealth(mean: float, payoffs: Array, floors: Array, counts: Array) -> Array:
    returned = (payoffs - floors) / np.maximum(mean - floors, _ABOVE)
    gains = np.log1p(STAKES[:, None, None] * (returned - 1)) @ counts
    top = gains.max(axis=(0, 1))
    wealth: Array = top + np.log(np.exp(gains - top).mean(axis=(0, 1)))
    return wealth


def difference(tables: Sequence[Counts], alpha: float) -> Interval:
    """Return an interval for the success rate with treatment minus the one without, valid at all times at once.

    Treatment must have been randomised with the shares of the tables. A unit's payoff is its outcome less a
    baseline, divided by the probability of what was done to it, and negative where it went without: its mean is the
    difference, whatever the baseline and however the chance of success drifts (the doubly robust pseudo-outcome of
    Waudby-Smith et al., "Anytime-valid off-policy inference for contextual bandits", 2024, with a constant for the
    regression). Where the difference itself drifts, the interval is about its mean so far, in simulations if not by
    proof; that the high end is below 0 proves even then that the difference was negative at some time.
    """
    known = [t for t in tables if 0 < t.share < 1]
    treated = any(t.with_successes or t.with_failures for t in known)
    if not treated or not any(t.without_successes or t.without_failures for t in known):
        return Interval(-1.0, 1.0)  # one side alone contains almost no information
    low = _lower_difference(known, alpha / 2)
    mirrored = [
        Counts(t.share, t.with_failures, t.with_successes, t.without_failures, t.without_successes) for t in known
    ]
    return Interval(low, -_lower_difference(mirrored, alpha / 2))


def _lower_difference(tables: Sequence[Counts], alpha: float) -> float:
    payoffs = np.hstack([_payoffs(table.share) for table in tables])
    counts = [(t.with_successes, t.with_failures, t.without_successes, t.without_failures) for t in tables]
    # One floor for all shares: they may belong to different tasks, and a stake must not depend on the task.
    floors = payoffs.min(axis=1, keepdims=True)
    return lower_bound(payoffs, floors, np.array(counts, float).ravel(), alpha, least=-1.0)


def _payoffs(share: float) -> Array:
    """Return the payoffs of a table, shape (baselines, 4), in the order of its counts."""
    good, bad = 1 - BASELINES, -BASELINES
    return np.stack([good / (1 - share), bad / (1 - share), -good / share, -bad / share], axis=1)


def weighted_mean(rewards: Array, weights: Array, most: float, alpha: float) -> Interval:
    """Return an interval for the mean of rewards in [0, 1] under importance weights, valid at all times at once.

    Each weight has the mean 1 given the past, and `most` is the largest possible one for any task: a stake that
    depended on the task would be a bet on its difficulty. The payoff is the baseline plus the weight times the
    reward less the baseline (the same control variate as above).
    """
    base = BASELINES[:, None]

    def lower(values: Array) -> float:
        payoffs = base + weights * (values - base)
        return lower_bound(payoffs, base - most * base, np.ones(len(values)), alpha / 2, least=0.0)

    return Interval(lower(rewards), 1 - lower(1 - rewards))
