"""The policy: which arm answers a request, by what the arms earned on requests like it.

The user's default answers unless another arm is better with a probability that convinces. A little exploration, by
Thompson's rule and inside a budget, finds out. Every choice comes with the true probability of every arm.
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
SHARED = 0.5  # how much of a task's difficulty all arms are taken to share
PRIOR = 24.0  # observations that an arm's mean in all counts for in a cluster, and among requests of a length
BANDS = 10  # octaves of length that are told apart
_SHORTEST = 7  # bits of a length in the second octave: from 64 characters on
_SLOW = 0.5 ** (1 / 4000)  # what an observation keeps of its weight with each later request
_SILENCE = 500  # requests without any feedback, after which nothing is explored
_RECENT = 100  # an arm's latest rewards, by which its change is noticed
_NOISE = 4.0  # squared standard errors by which what is recent differs from the whole by chance
_PURSE = 100.0  # requests' worth of exploration that can be saved up
_MOST = 0.5  # exploration at most, for one request
WARMUP_REQUESTS = 400  # the first requests, a share of which is spread evenly over the arms
_REBASE = 2048  # requests after which weights are scaled anew, so that they stay finite
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
class Chosen:
    """A choice as it is logged."""

    arm: str
    probabilities: Mapping[str, float]
    situation: Situation
    stake: float = 0.0


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a choice since: reward in [0, 1], cost and latency, each None until told."""

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

    def logged(self, situation: Situation) -> Chosen:
        """Return what is to be remembered of it."""
        return Chosen(self.arm.name, self.probabilities, situation, self.stake)


@dataclass(frozen=True, slots=True)
class _Belief:
    """What is believed of every arm for one kind of request."""

    n: Array
    mean: Array
    sd: Array
    cost: Array
    latency: Array
    utility: Array


class Policy:
    """A fold over choices in the order of their requests: the same rows give the same policy in any process.

    To tell of an earlier choice, late or again or no more, gives what folding everything anew gives. Not thread-safe.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        default: str,
        terms: Terms = Terms(),
        rows: Iterable[tuple[Chosen, Known]] = (),
    ) -> None:
        """Fold the rows; without any, the default answers."""
        self.arms = tuple(arms)
        self.terms = terms
        self.clusters = Clusters()
        self.count = 0
        self._index = {arm.name: number for number, arm in enumerate(self.arms)}
        self._default = self._index[default]
        self._rows: list[tuple[int | None, int, int, Known]] = []  # arm, cluster and band by number
        self._sums = np.zeros((LIMIT + 1, BANDS, len(self.arms), 5))  # the last one is NOWHERE
        self._told: list[list[tuple[int, float]]] = [[] for _ in self.arms]  # rewards in the order of their requests
        self._base = 0
        self._purse = 0.0
        for chosen, known in rows:
            self.add(chosen, known)

    def choose(
        self,
        situation: Situation,
        chance: float,
        eligible: Collection[str] | None = None,
        *,
        reserved: float = 0.0,
    ) -> Choice:
        """Choose for a request; `chance` in [0, 1) is all the randomness there is.

        `eligible` names the arms that can answer this request: at least one, None for all. `reserved` is what the
        choices that were made since and are not added yet put at stake.
        """
        vector = situation.vector
        nearness = self.clusters.nearness(vector) if vector is not None else np.zeros(0)
        cluster = self.clusters.assign(nearness) if vector is not None else NOWHERE
        able = [n for n, arm in enumerate(self.arms) if eligible is None or arm.name in eligible]
        belief = self._belief(nearness, situation.band)
        default = self._default if self._default in able else able[0]
        base = self._base_arm(belief, able, default)
        wanted = _probabilities_best(belief, able)
        wanted[base] = 0.0
        share = stake = 0.0
        probabilities = np.zeros(len(self.arms))
        warming = self.terms.warmup_share if self.count < WARMUP_REQUESTS else 0.0
        if warming:
            probabilities[able] = warming / len(able)
        elif self._hears():
            stake = float(wanted @ _losses(belief, base))
            left = max(0.0, self._purse - reserved)
            share = min(1.0, left / max(1e-9, stake), _MOST / max(1e-9, float(wanted.sum())))
            probabilities += share * wanted
        probabilities[base] += 1.0 - probabilities.sum()
        chosen = _drawn(probabilities, base, chance)
        if len(able) == 1:
            reason = "only_arm"
        elif chosen != base:
            reason = "warmup" if warming else "exploration"
        elif base != default:
            reason = "better"
        else:
            # The part of the base's probability that exploration would have had with a full purse.
            held_back = probabilities[base] - (1.0 - min(_MOST, float(wanted.sum())))
            over = share < 1.0 and self._hears() and chance >= probabilities[base] - held_back
            reason = "over_budget" if over else "default"
        named = {self.arms[n].name: float(probabilities[n]) for n in able}
        return Choice(self.arms[chosen], float(probabilities[chosen]), named, cluster, reason, share * stake)

    def add(self, chosen: Chosen, known: Known = Known()) -> int:
        """Take in the next choice; return its index, by which to tell how it went."""
        index = self.count
        self.count += 1
        if index - self._base >= _REBASE:
            self._sums *= _SLOW**_REBASE
            self._base += _REBASE
        situation = chosen.situation
        cluster = NOWHERE if situation.vector is None else self.clusters.add(situation.vector)
        most = _PURSE * self.terms.exploration_budget
        self._purse = max(0.0, min(most, self._purse + self.terms.exploration_budget - chosen.stake))
        self._rows.append((self._index.get(chosen.arm), cluster, situation.band, known))
        self._weigh(index, 1.0)
        return index

    def observe(self, index: int, known: Known) -> None:
        """Set what is known of a choice, in place of what was."""
        self._weigh(index, -1.0)
        self._rows[index] = (*self._rows[index][:3], known)
        self._weigh(index, 1.0)

    @property
    def purse(self) -> float:
        """What exploring may put at stake now."""
        return self._purse

    def cluster_of(self, index: int) -> int:
        """Return the task cluster of a choice; NOWHERE where its request had no vector."""
        return self._rows[index][1]

    def requests_of(self, cluster: int) -> int:
        """Return how many requests a task cluster has had."""
        return sum(1 for row in self._rows if row[1] == cluster)

    def beliefs(self, cluster: int | None = None) -> dict[str, dict[str, float]]:
        """Return what is believed of every arm, in all or in a cluster: how often told, and each arm's figures."""
        centre = self.clusters.centre(cluster) if cluster is not None else None
        belief = self._belief(np.zeros(0) if centre is None else self.clusters.nearness(centre), None)
        best = _probabilities_best(belief, range(len(self.arms)))
        columns = {
            "told": belief.n, "reward": belief.mean, "reward_sd": belief.sd, "cost": belief.cost,
            "latency": belief.latency, "utility": belief.utility, "best": best,
        }  # fmt: skip
        return {
            arm.name: {name: float(column[number]) for name, column in columns.items()}
            for number, arm in enumerate(self.arms)
        }

    def _weigh(self, index: int, sign: float) -> None:
        arm, cluster, band, known = self._rows[index]
        if arm is None:
            return
        slow = sign * _SLOW ** (self._base - index)
        sums = self._sums[cluster, band, arm]
        if known.reward is not None:
            sums[_N] += slow
            sums[_REWARD] += slow * known.reward
            if sign > 0:
                bisect.insort(self._told[arm], (index, known.reward))
            else:
                self._told[arm].remove((index, known.reward))
        if known.cost is not None:
            sums[_ANSWERS] += slow
            sums[_COST] += slow * known.cost
            sums[_LATENCY] += slow * (known.latency or 0.0)

    def _hears(self) -> bool:
        """Whether feedback comes at all: without it there is nothing to find out."""
        return any(told and told[-1][0] >= self.count - _SILENCE for told in self._told)

    def _belief(self, nearness: Array, band: int | None) -> _Belief:
        """Return what is believed of requests that lie so and are so long; of all without a nearness, or a band.

        An arm's mean in a cluster shrinks to what its lengths let expect, and that to the arm's mean in all. What all
        arms have in common (a hard task) is taken to hold, by half, for those that were not tried yet.
        """
        age = self.count - self._base
        bands = self._sums.sum(axis=0) * _SLOW**age
        whole = bands.sum(axis=0)
        near = np.tensordot(weights(nearness), self._sums[: len(nearness)], 1) * _SLOW**age
        level, drift, spread = self._level(whole)
        usual, doubt = _shrunk(bands[:, :, _N], bands[:, :, _REWARD] * drift, level, spread)
        here, var = (usual[band], doubt[band]) if band is not None else (level, spread)
        n = near[:, :, _N].sum(axis=0)
        surplus = (near[:, :, _REWARD] * drift - near[:, :, _N] * usual).sum(axis=0)
        mean, var = (
            _shrunk(n[None], (surplus + n * here)[None], here, var) if len(nearness) else (here[None], var[None])
        )
        cost, latency = (_expense(whole, bands, near, band, column) for column in (_COST, _LATENCY))
        utility = mean[0] - self.terms.cost_price * cost - self.terms.latency_price * latency
        told = n if len(nearness) else whole[:, _N] if band is None else bands[band, :, _N]
        return _Belief(told, mean[0], np.sqrt(var[0]), cost, latency, utility)

    def _level(self, whole: Array) -> tuple[Array, Array, Array]:
        """Return each arm's mean reward over all requests, how it has drifted, and the variance of that mean."""
        n, total = whole[:, _N], whole[:, _REWARD]
        long = (total + 1) / (n + 2)
        latest = [told[-_RECENT:] for told in self._told]
        count = np.array([max(1, len(told)) for told in latest])
        short = np.array([sum(reward for _, reward in told) for told in latest]) / count
        chance = np.maximum(long * (1 - long), 0.01) / count
        trust = np.maximum(0.0, 1.0 - _NOISE * chance / np.maximum((short - long) ** 2, 1e-12))
        level = long + trust * (short - long)
        spread = level * (1 - level) / (1 + trust * count + (1 - trust) * (n + 2))
        return level, level / long, spread

    def _base_arm(self, belief: _Belief, able: Sequence[int], default: int) -> int:
        """Return the default, or the arm of the highest utility among those that are better enough."""
        claim = 0.5 if self.terms.warmup_share else self.terms.certainty
        best = default
        for number in able:
            if number != default and belief.utility[number] > belief.utility[best]:
                gap = belief.utility[number] - belief.utility[default]
                if _phi(gap / math.hypot(belief.sd[number], belief.sd[default])) >= claim:
                    best = number
        return best


def _losses(belief: _Belief, base: int) -> Array:
    """Return what each arm is expected to earn less than the base where it earns less: E[max(0, base - arm)]."""
    gap = belief.utility[base] - belief.utility
    sd = np.hypot(belief.sd, belief.sd[base])
    return np.asarray(
        gap * _phi(gap / sd) + sd * np.exp(-0.5 * (gap / sd) ** 2) / math.sqrt(2 * math.pi), dtype=np.float64
    )


def _drawn(probabilities: Array, base: int, chance: float) -> int:
    """Return the arm that a chance falls on, the base first."""
    left = chance - probabilities[base]
    if left < 0:
        return base
    for number in np.flatnonzero(probabilities):
        if number != base:
            left -= probabilities[number]
            if left < 0:
                return int(number)
    return base


def _shrunk(n: Array, reward: Array, prior: Array, variance: Array) -> tuple[Array, Array]:
    """Return the means of groups (groups, arms), shrunk to a prior of this variance, and their variances."""
    hard = (reward - n * prior).sum(axis=1, keepdims=True) / (n.sum(axis=1, keepdims=True) + PRIOR)
    start = np.clip(prior + SHARED * hard, 0.01, 0.99)
    mean = np.clip((reward + PRIOR * start) / (n + PRIOR), 0.0, 1.0)
    kept = PRIOR / (n + PRIOR)
    return mean, np.maximum(mean * (1 - mean), 0.01) / (n + PRIOR + 1) + kept**2 * variance


def _expense(whole: Array, bands: Array, near: Array, band: int | None, column: int) -> Array:
    """Return each arm's mean cost or latency here: its own, filled up with how dear requests like this are."""
    mean = _filled(whole[None, :, column], whole[None, :, _ANSWERS], np.zeros((1, whole.shape[0])))[0]
    usual = _filled(bands[:, :, column], bands[:, :, _ANSWERS], np.broadcast_to(mean, bands.shape[:2]))
    here = mean if band is None else usual[band]
    expected = (near[:, :, _ANSWERS] * usual).sum()
    # A task that takes long answers takes them from every arm.
    factor = (near[:, :, column].sum() + 2 * here.max()) / (expected + 2 * here.max()) if here.max() > 0 else 1.0
    return np.asarray(here * factor, dtype=np.float64)


def _filled(total: Array, n: Array, prior: Array) -> Array:
    """Return the means of groups (groups, arms), filled up with two of the prior, by how much dearer the group is."""
    few = 1e-6 + 2 * (prior > 0)
    expected = (n * prior).sum(axis=1, keepdims=True)
    floor = 2 * prior.max(axis=1, keepdims=True, initial=0.0)
    factor = np.divide(
        total.sum(axis=1, keepdims=True) + floor, expected + floor, out=np.ones_like(floor), where=floor > 0
    )
    return np.asarray((total + few * prior * factor) / (n + few), dtype=np.float64)


def _phi(z: Any) -> Any:
    """Return the normal distribution function, to 0.0003 (Page's approximation)."""
    return 0.5 * (1.0 + np.tanh(0.7978845608 * (z + 0.044715 * z**3)))


def _probabilities_best(belief: _Belief, able: Sequence[int]) -> Array:
    """Return the probability of each arm to be the best of these, which is how often Thompson's rule draws it."""
    arms = list(able)
    utility, sd = belief.utility[arms], belief.sd[arms]
    low, high = (utility - 4 * sd).min(), (utility + 4 * sd).max()
    z = (low + (high - low) * _GRID[:, None] - utility) / sd
    below = np.maximum(_phi(z), 1e-12)
    mass = np.exp(-0.5 * z**2) / sd * below.prod(axis=1, keepdims=True) / below
    total = mass.sum(axis=0)
    found = np.zeros(len(belief.utility))
    found[arms] = total / total.sum()
    return found
