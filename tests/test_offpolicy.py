"""Off-policy estimates: known values of policies are found again from logs that another policy wrote."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from optillm_memory.learn import confidence
from optillm_memory.learn.confidence import weighted_mean
from optillm_memory.learn.offpolicy import LoggedEpisode, Prices, always, estimate, logged_policy

# Tasks come in two sorts, told apart by what the logging policy did: (probabilities, chance of success by arm).
EASY = ({"small": 0.7, "large": 0.2, "moa": 0.1}, {"small": 0.9, "large": 0.9, "moa": 0.95})
HARD = ({"small": 0.2, "large": 0.5, "moa": 0.3}, {"small": 0.2, "large": 0.7, "moa": 0.8})
TOKENS = {"small": 100.0, "large": 400.0, "moa": 1_500.0}


def simulate(length: int, seed: int) -> list[LoggedEpisode]:
    """Write the log of a policy; half of the tasks are easy."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(length):
        probabilities, chances = (EASY, HARD)[int(rng.random() < 0.5)]
        arm = str(rng.choice(list(probabilities), p=list(probabilities.values())))
        reward = float(rng.random() < chances[arm])
        rows.append(LoggedEpisode(arm, probabilities[arm], probabilities, reward, TOKENS[arm], 10 * TOKENS[arm]))
    return rows


def candidate(row: LoggedEpisode) -> Mapping[str, float]:
    """Answer easy tasks with the small model and hard ones mostly with the approach."""
    return {"small": 1.0} if row.probabilities == EASY[0] else {"moa": 0.75, "large": 0.25}


CANDIDATE = 0.5 * 0.9 + 0.5 * (0.75 * 0.8 + 0.25 * 0.7)
VALUES = {arm: (EASY[1][arm] + HARD[1][arm]) / 2 for arm in TOKENS}


def test_every_arm_gets_its_own_value_back() -> None:
    """Each arm's estimates come to its known reward and tokens, inside an interval that is not wide."""
    rows = simulate(4_000, 1)
    for arm, value in VALUES.items():
        found = estimate(rows, always(arm))
        assert found.interval is not None
        assert found.reward == found.utility == pytest.approx(value, abs=0.04)
        assert found.interval.low < value < found.interval.high
        assert found.interval.high - found.interval.low < 0.25
        assert found.tokens == pytest.approx(TOKENS[arm])
        assert found.latency_ms == pytest.approx(10 * TOKENS[arm])
        assert found.covered == 4_000


def test_the_mean_of_an_arms_own_episodes_would_mislead() -> None:
    """The small model looks better than it is, for it was given the easy tasks; the estimate is not taken in."""
    rows = simulate(4_000, 2)
    own = np.mean([row.reward or 0.0 for row in rows if row.arm == "small"])
    assert own - VALUES["small"] > 0.15
    assert estimate(rows, always("small")).reward == pytest.approx(VALUES["small"], abs=0.04)


def test_a_candidate_and_the_policy_itself() -> None:
    """A candidate given as a function gets its known value; the policy that wrote the log its plain mean."""
    rows = simulate(4_000, 3)
    found = estimate(rows, candidate)
    assert found.reward == pytest.approx(CANDIDATE, abs=0.04)
    itself = estimate(rows, logged_policy)
    assert itself.reward == pytest.approx(np.mean([row.reward for row in rows]))
    assert itself.effective == pytest.approx(4_000)
    assert itself.largest_weight == pytest.approx(1.0)


def test_the_interval_covers_the_value_at_every_look() -> None:
    """In at least 95 % of 200 runs the candidate's true value is never refuted by any of the first 400 episodes."""
    missed, base = 0, confidence.BASELINES[:, None]
    stakes = confidence.STAKES[:, None, None]
    for seed in range(200):
        rows = simulate(400, seed)
        weights = np.array([candidate(row).get(row.arm, 0.0) / row.propensity for row in rows])
        most = max(1 / EASY[0]["small"], 0.75 / HARD[0]["moa"])
        rewards = np.array([row.reward for row in rows])
        outside = False
        for values, truth in ((rewards, CANDIDATE), (1 - rewards, 1 - CANDIDATE)):
            floors = base - most * base
            returned = (base + weights * (values - base) - floors) / (truth - floors)
            wealth = np.exp(np.cumsum(np.log1p(stakes * (returned - 1)), axis=2)).mean(axis=(0, 1))
            outside |= bool((wealth >= 40).any())
        missed += outside
    assert missed <= 10


def test_the_interval_ends_where_values_begin_to_be_refuted() -> None:
    """Without weights the interval is that of a plain mean: it holds the mean, and shrinks with more rewards."""
    found = [weighted_mean(np.tile([1.0, 1.0, 0.0, 1.0], n), np.ones(4 * n), 1.0, 0.05) for n in (5, 500)]
    assert all(interval.low < 0.75 < interval.high for interval in found)
    assert found[0].high - found[0].low < 0.7
    assert found[1].high - found[1].low < 0.1


def test_effective_episodes_and_clipping() -> None:
    """Of nine episodes of the likely arm and one of the rare the rare one weighs, and is cut off at the root."""
    logged = {"a": 0.9, "b": 0.1}
    rows = [LoggedEpisode("a", 0.9, logged, 0.0, 0, 0)] * 9 + [LoggedEpisode("b", 0.1, logged, 1.0, 0, 0)]
    found = estimate(rows, lambda _: {"a": 0.5, "b": 0.5})
    weights = np.array([0.5 / 0.9] * 9 + [5.0])
    assert found.largest_weight == pytest.approx(5.0)
    assert found.effective == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.utility == pytest.approx(5 / weights.sum())
    root = np.sqrt(10)
    assert found.clipped == pytest.approx(root / (5.0 + root))


def test_only_episodes_that_could_have_gone_so_are_counted() -> None:
    """Where the log gives an arm no chance it tells nothing of it; without an outcome or a propensity neither."""
    only = LoggedEpisode("a", 1.0, {"a": 1.0}, 1.0, 0, 0)
    both = LoggedEpisode("b", 0.5, {"a": 0.5, "b": 0.5}, 0.0, 0, 0)
    unsaid = LoggedEpisode("a", 0.5, {"a": 0.5, "b": 0.5}, None, 0, 0)
    broken = LoggedEpisode("a", 0.0, {"a": 0.0, "b": 1.0}, 1.0, 0, 0)
    found = estimate([only, both, unsaid, broken], always("b"))
    assert (found.covered, found.reward) == (1, 0.0)
    assert estimate([only, both], always("a")).covered == 2
    nothing = estimate([only], always("b"))
    assert (nothing.covered, nothing.utility, nothing.interval) == (0, None, None)
    never = estimate([LoggedEpisode("b", 0.5, {"a": 0.5, "b": 0.5}, 0.0, 0, 0)], always("a"))
    assert (never.covered, never.utility, never.effective) == (1, None, 0.0)
    assert never.as_dict()["utility"] is None


def test_prices_are_taken_off() -> None:
    """What is dear loses: the utility is the reward less tokens and seconds, and its interval may be below zero."""
    rows = simulate(3_000, 5)
    prices = Prices(thousand_tokens=0.4, second=0.04)
    found = {arm: estimate(rows, always(arm), prices) for arm in TOKENS}
    for arm, value in found.items():
        known = VALUES[arm] - 0.4 * TOKENS[arm] / 1000 - 0.04 * TOKENS[arm] / 100
        assert value.interval is not None
        assert value.utility == pytest.approx(known, abs=0.06)
        assert value.interval.low < known < value.interval.high
        assert value.reward == pytest.approx(VALUES[arm], abs=0.06)
    assert (found["moa"].utility or 0) < (found["small"].utility or 0)
