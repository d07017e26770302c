"""The policy: which arm answers a request, from the rewards of the arms on similar requests.

A contextual bandit with a default arm. Rewards have a hierarchical Beta model: of an arm over all requests, in each
band of lengths, in each task cluster. The default answers unless another arm is better with probability `certainty`.
Arms are explored by Thompson sampling (Thompson 1933; Russo et al. 2018, "A tutorial on Thompson sampling") within a
budget of expected loss, and each choice is logged with the exact probability of every arm.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.decide.clusters import LIMIT, NOWHERE, Clusters, weights
from optillm_memory.records import Arm

Array = NDArray[np.float64]
SHARED = 0.5  # the part of a task's difficulty that all arms are assumed to share
PRIOR = 24.0  # pseudo-observations: the weight of the wider group's mean in a cluster and in a band of lengths
BANDS = 10  # bands of request length, an octave each
_SHORTEST = 7  # bits of a length in the second octave: from 64 characters on
_DECAY = 0.5 ** (1 / 4000)  # of an observation's weight with each later request: half after 4,000
_SILENT_AFTER = 500  # requests without any feedback after which exploration stops
_RECENT = 100  # an arm's latest rewards, by which its change is noticed
_NOISE_VARIANCES = 4.0  # squared standard errors by which recent rewards differ from all by chance
_LARGEST_BUDGET = 100.0  # in requests: how much exploration can be saved up
_LARGEST_SHARE = 0.5  # of a request's probability that exploration may take
WARMUP_REQUESTS = 400  # the first requests, part of which is spread evenly over the arms
_REBASE = 2048  # requests after which weights are rescaled, so that they stay finite
_GRID = np.linspace(0.0, 1.0, 49)
_N, _REWARD, _ANSWERS, _COST, _LATENCY = range(5)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the user asks of the policy.

    Utility is reward less `cost_price` a unit of cost and `latency_price` a unit of latency. `exploration_budget` is
    the utility a request that finding out may cost, as far as one can tell beforehand. Another arm takes the default's
    place where it is better with probability `certainty`. `warmup_share` is the share of the first requests that is
    spread evenly over the arms; with one, the default has no claim, and the better arm is the likelier one.
    """

    cost_price: float = 0.0
    latency_price: float = 0.0
    exploration_budget: float = 0.003
    warmup_share: float = 0.0
    certainty: float = 0.9


@dataclass(frozen=True, slots=True)
class Situation:
    """What the policy sees of a request: the vector of its task, if there is one, and its length in characters."""

    vector: NDArray[np.float32] | None = None
    length: int = 0

    @property
    def band(self) -> int:
        """The octave of its length, 0 for the shortest: what is long costs more, and may need more."""
        return min(BANDS - 1, max(0, self.length.bit_length() - _SHORTEST))


@dataclass(frozen=True, slots=True)
class LoggedChoice:
    """A choice as it is logged; `stake` is its expected loss by exploration, in utility."""

    arm: str
    probabilities: Mapping[str, float]
    situation: Situation
    stake: float = 0.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of a choice: reward in [0, 1], cost, latency in seconds; None until it is measured."""

    reward: float | None = None
    cost: float | None = None
    latency: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The arm for a request, its probability and that of all, the task cluster, and why.

    Reasons: `default`, `better`, `exploration`, `warmup`, `only_arm` where no other could answer this request, and
    `over_budget` where the default was kept because the budget for exploration is spent.
    """

    arm: Arm
    propensity: float
    probabilities: Mapping[str, float]
    cluster: int
    reason: str
    stake: float

    def logged(self, situation: Situation) -> LoggedChoice:
        """Return what is to be remembered of it."""
        return LoggedChoice(self.arm.name, self.probabilities, situation, self.stake)


@dataclass(frozen=True, slots=True)
class _Estimates:
    """Estimates of every arm for one kind of request; each array has shape (arms,)."""

    n: Array
    mean: Array
    sd: Array
    cost: Array
    latency: Array
    utility: Array


class Policy:
    """A fold over choices in the order of their requests: the same rows give the same policy in any process.

    Measurements may arrive late, change or be retracted: the result is that of folding all rows again. Not thread-safe.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        default: str,
        terms: Terms = Terms(),
        rows: Iterable[tuple[LoggedChoice, Measurement]] = (),
    ) -> None:
        """Fold the rows; without any, the default answers."""
        self.arms = tuple(arms)
        self.terms = terms
        self.clusters = Clusters()
        self.count = 0
        self._index = {arm.name: number for number, arm in enumerate(self.arms)}
        self._default = self._index[default]
        self._rows: list[tuple[int | None, int, int, Measurement]] = []  # arm, cluster and band by number
        self._sums = np.zeros((LIMIT + 1, BANDS, len(self.arms), 5))  # the last one is NOWHERE
        self._rewards: list[list[tuple[int, float]]] = [[] for _ in self.arms]  # rewards in the order of their requests
        self._base = 0
        self._budget = 0.0
        for chosen, measured in rows:
            self.add(chosen, measured)

    def choose(
        self,
        situation: Situation,
        draw: float,
        eligible: Collection[str] | None = None,
        *,
        reserved: float = 0.0,
    ) -> Choice:
        """Choose an arm for a request; `draw`, uniform in [0, 1), is the only randomness.

        `eligible` names the arms that can answer this request: at least one, None for all. `reserved` is the
        stake of the choices that were made already and are not added yet.
        """
        vector = situation.vector
        nearness = self.clusters.nearness(vector) if vector is not None else np.zeros(0)
        cluster = self.clusters.assign(nearness) if vector is not None else NOWHERE
        able = [n for n, arm in enumerate(self.arms) if eligible is None or arm.name in eligible]
        estimates = self._estimate(nearness, situation.band)
        default = self._default if self._default in able else able[0]
        base = self._base_arm(estimates, able, default)
        wanted = _probabilities_best(estimates, able)
        wanted[base] = 0.0
        share = stake = 0.0
        probabilities = np.zeros(len(self.arms))
        warmup = self.terms.warmup_share if self.count < WARMUP_REQUESTS else 0.0
        if warmup:
            probabilities[able] = warmup / len(able)
        elif self._has_recent_feedback():
            stake = float(wanted @ _losses(estimates, base))
            left = max(0.0, self._budget - reserved)
            share = min(1.0, left / max(1e-9, stake), _LARGEST_SHARE / max(1e-9, float(wanted.sum())))
            probabilities += share * wanted
        probabilities[base] += 1.0 - probabilities.sum()
        chosen = _draw(probabilities, base, draw)
        if len(able) == 1:
            reason = "only_arm"
        elif chosen != base:
            reason = "warmup" if warmup else "exploration"
        elif base != default:
            reason = "better"
        else:
            # The part of the base's probability that exploration would have had with a full budget.
            held_back = probabilities[base] - (1.0 - min(_LARGEST_SHARE, float(wanted.sum())))
            over = share < 1.0 and self._has_recent_feedback() and draw >= probabilities[base] - held_back
            reason = "over_budget" if over else "default"
        named = {self.arms[n].name: float(probabilities[n]) for n in able}
        return Choice(self.arms[chosen], float(probabilities[chosen]), named, cluster, reason, share * stake)

    def add(self, chosen: LoggedChoice, measured: Measurement = Measurement()) -> int:
        """Add the next choice; return its index, for `observe`."""
        index = self.count
        self.count += 1
        if index - self._base >= _REBASE:
            self._sums *= _DECAY**_REBASE
            self._base += _REBASE
        situation = chosen.situation
        cluster = NOWHERE if situation.vector is None else self.clusters.add(situation.vector)
        most = _LARGEST_BUDGET * self.terms.exploration_budget
        self._budget = max(0.0, min(most, self._budget + self.terms.exploration_budget - chosen.stake))
        self._rows.append((self._index.get(chosen.arm), cluster, situation.band, measured))
        self._accumulate(index, 1.0)
        return index

    def observe(self, index: int, measured: Measurement) -> None:
        """Replace the measurement of a choice."""
        self._accumulate(index, -1.0)
        self._rows[index] = (*self._rows[index][:3], measured)
        self._accumulate(index, 1.0)

    @property
    def budget(self) -> float:
        """The expected loss, in utility, that exploration may cost now."""
        return self._budget

    def cluster_of(self, index: int) -> int:
        """Return the task cluster of a choice; NOWHERE where its request had no vector."""
        return self._rows[index][1]

    def requests_of(self, cluster: int) -> int:
        """Return how many requests a task cluster has had."""
        return sum(1 for row in self._rows if row[1] == cluster)

    def estimates(self, cluster: int | None = None) -> dict[str, dict[str, float]]:
        """Return the figures of every arm, over all requests or in a cluster; `rewards` counts them, with decay."""
        centre = self.clusters.centre(cluster) if cluster is not None else None
        estimates = self._estimate(np.zeros(0) if centre is None else self.clusters.nearness(centre), None)
        best = _probabilities_best(estimates, range(len(self.arms)))
        columns = {
            "rewards": estimates.n, "reward": estimates.mean, "reward_sd": estimates.sd, "cost": estimates.cost,
            "latency": estimates.latency, "utility": estimates.utility, "best": best,
        }  # fmt: skip
        return {
            arm.name: {name: float(column[number]) for name, column in columns.items()}
            for number, arm in enumerate(self.arms)
        }

    def _accumulate(self, index: int, sign: float) -> None:
        arm, cluster, band, measured = self._rows[index]
        if arm is None:
            return
        weight = sign * _DECAY ** (self._base - index)
        sums = self._sums[cluster, band, arm]
        if measured.reward is not None:
            sums[_N] += weight
            sums[_REWARD] += weight * measured.reward
            if sign > 0:
                bisect.insort(self._rewards[arm], (index, measured.reward))
            else:
                self._rewards[arm].remove((index, measured.reward))
        if measured.cost is not None:
            sums[_ANSWERS] += weight
            sums[_COST] += weight * measured.cost
            sums[_LATENCY] += weight * (measured.latency or 0.0)

    def _has_recent_feedback(self) -> bool:
        """Whether feedback still arrives: without it exploration finds out nothing."""
        return any(rewards and rewards[-1][0] >= self.count - _SILENT_AFTER for rewards in self._rewards)

    def _estimate(self, nearness: Array, band: int | None) -> _Estimates:
        """Return the estimates for requests of this cosine to each cluster and this band; without them, for all.

        An arm's mean in a cluster is shrunk to what the lengths of its requests let expect, and that to the arm's mean
        over all requests. A difficulty that all arms share counts by half for the arms that were not tried yet.
        """
        age = self.count - self._base
        bands = self._sums.sum(axis=0) * _DECAY**age
        whole = bands.sum(axis=0)
        near = np.tensordot(weights(nearness), self._sums[: len(nearness)], 1) * _DECAY**age
        level, drift, spread = self._level(whole)
        usual, doubt = _shrink(bands[:, :, _N], bands[:, :, _REWARD] * drift, level, spread)
        here, var = (usual[band], doubt[band]) if band is not None else (level, spread)
        n = near[:, :, _N].sum(axis=0)
        surplus = (near[:, :, _REWARD] * drift - near[:, :, _N] * usual).sum(axis=0)
        mean, var = (
            _shrink(n[None], (surplus + n * here)[None], here, var) if len(nearness) else (here[None], var[None])
        )
        cost, latency = (_expected_cost(whole, bands, near, band, column) for column in (_COST, _LATENCY))
        utility = mean[0] - self.terms.cost_price * cost - self.terms.latency_price * latency
        count = n if len(nearness) else whole[:, _N] if band is None else bands[band, :, _N]
        return _Estimates(count, mean[0], np.sqrt(var[0]), cost, latency, utility)

    def _level(self, whole: Array) -> tuple[Array, Array, Array]:
        """Return each arm's mean reward, its ratio to the long-term mean, and the variance of the mean."""
        n, total = whole[:, _N], whole[:, _REWARD]
        long = (total + 1) / (n + 2)
        latest = [rewards[-_RECENT:] for rewards in self._rewards]
        count = np.array([max(1, len(rewards)) for rewards in latest])
        short = np.array([sum(reward for _, reward in rewards) for rewards in latest]) / count
        noise = np.maximum(long * (1 - long), 0.01) / count
        trust = np.maximum(0.0, 1.0 - _NOISE_VARIANCES * noise / np.maximum((short - long) ** 2, 1e-12))
        level = long + trust * (short - long)
        spread = level * (1 - level) / (1 + trust * count + (1 - trust) * (n + 2))
        return level, level / long, spread

    def _base_arm(self, estimates: _Estimates, able: Sequence[int], default: int) -> int:
        """Return the default, or of the arms that are better with enough probability the one of highest utility."""
        claim = 0.5 if self.terms.warmup_share else self.terms.certainty
        best = default
        for number in able:
            if number != default and estimates.utility[number] > estimates.utility[best]:
                gap = estimates.utility[number] - estimates.utility[default]
                if _normal_cdf(gap / math.hypot(estimates.sd[number], estimates.sd[default])) >= claim:
                    best = number
        return best


def _losses(estimates: _Estimates, base: int) -> Array:
    """Return each arm's expected loss against the base: E[max(0, base - arm)], both normal."""
    gap = estimates.utility[base] - estimates.utility
    sd = np.hypot(estimates.sd, estimates.sd[base])
    return np.asarray(
        gap * _normal_cdf(gap / sd) + sd * np.exp(-0.5 * (gap / sd) ** 2) / math.sqrt(2 * math.pi), dtype=np.float64
    )


def _draw(probabilities: Array, base: int, draw: float) -> int:
    """Return the arm in whose share of [0, 1) the draw lies; the base has the first share."""
    left = draw - probabilities[base]
    if left < 0:
        return base
    for number in np.flatnonzero(probabilities):
        if number != base:
            left -= probabilities[number]
            if left < 0:
                return int(number)
    return base


def _shrink(n: Array, reward: Array, prior: Array, variance: Array) -> tuple[Array, Array]:
    """Return the means of groups (groups, arms), shrunk to a prior of this variance, and their variances."""
    hard = (reward - n * prior).sum(axis=1, keepdims=True) / (n.sum(axis=1, keepdims=True) + PRIOR)
    start = np.clip(prior + SHARED * hard, 0.01, 0.99)
    mean = np.clip((reward + PRIOR * start) / (n + PRIOR), 0.0, 1.0)
    kept = PRIOR / (n + PRIOR)
    return mean, np.maximum(mean * (1 - mean), 0.01) / (n + PRIOR + 1) + kept**2 * variance


def _expected_cost(whole: Array, bands: Array, near: Array, band: int | None, column: int) -> Array:
    """Return each arm's expected cost or latency here: its own mean, scaled by how expensive such requests are."""
    mean = _smoothed_ratio(whole[None, :, column], whole[None, :, _ANSWERS], np.zeros((1, whole.shape[0])))[0]
    usual = _smoothed_ratio(bands[:, :, column], bands[:, :, _ANSWERS], np.broadcast_to(mean, bands.shape[:2]))
    here = mean if band is None else usual[band]
    expected = (near[:, :, _ANSWERS] * usual).sum()
    # A task that takes long answers takes them from every arm.
    factor = (near[:, :, column].sum() + 2 * here.max()) / (expected + 2 * here.max()) if here.max() > 0 else 1.0
    return np.asarray(here * factor, dtype=np.float64)


def _smoothed_ratio(total: Array, n: Array, prior: Array) -> Array:
    """Return the means of groups, shape (groups, arms), with two pseudo-observations of the scaled prior each."""
    few = 1e-6 + 2 * (prior > 0)
    expected = (n * prior).sum(axis=1, keepdims=True)
    floor = 2 * prior.max(axis=1, keepdims=True, initial=0.0)
    factor = np.divide(
        total.sum(axis=1, keepdims=True) + floor, expected + floor, out=np.ones_like(floor), where=floor > 0
    )
    return np.asarray((total + few * prior * factor) / (n + few), dtype=np.float64)


def _normal_cdf(z: Any) -> Any:
    """Return the normal distribution function, to 0.0003 (Page's approximation)."""
    return 0.5 * (1.0 + np.tanh(0.7978845608 * (z + 0.044715 * z**3)))


def _probabilities_best(estimates: _Estimates, able: Sequence[int]) -> Array:
    """Return the probability of each arm to be the best of these, which is how often Thompson's rule draws it."""
    arms = list(able)
    utility, sd = estimates.utility[arms], estimates.sd[arms]
    low, high = (utility - 4 * sd).min(), (utility + 4 * sd).max()
    z = (low + (high - low) * _GRID[:, None] - utility) / sd
    below = np.maximum(_normal_cdf(z), 1e-12)
    mass = np.exp(-0.5 * z**2) / sd * below.prod(axis=1, keepdims=True) / below
    total = mass.sum(axis=0)
    found = np.zeros(len(estimates.utility))
    found[arms] = total / total.sum()
    return found
