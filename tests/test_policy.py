"""The policy: which arm it believes in, what exploring may cost, and that it is a fold over the log."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optillm_memory.background.threads import start_thread
from optillm_memory.decide.clusters import LIMIT, NOWHERE, Clusters
from optillm_memory.decide.policy import WARMUP_REQUESTS, LoggedChoice, Measurement, Policy, Situation, Terms
from optillm_memory.decide.policy_updater import PolicyUpdater, Row
from optillm_memory.errors import InvalidField
from optillm_memory.records import Arm
from optillm_memory.settings import Settings

SMALL, LARGE = Arm("none@small", "none", "small", 0.1), Arm("none@large", "none", "large")
HEAVY = Arm("moa@large", "moa", "large")
ARMS = (LARGE, SMALL, HEAVY)
ANYTHING = Situation()


def unit(*values: float) -> NDArray[np.float32]:
    """Return a vector of unit length."""
    vector = np.array(values, dtype=np.float32)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def taught(policy: Policy, rewards: dict[str, float], times: int = 200, situation: Situation = ANYTHING) -> Policy:
    """Have each arm answer so many requests, of which a share is successes."""
    for number in range(times):
        for arm, share in rewards.items():
            right = int((number + 1) * share) - int(number * share)
            policy.add(LoggedChoice(arm, {arm: 1.0}, situation), Measurement(float(right), 1.0, 0.0))
    return policy


def play(policy: Policy, chances: dict[str, float], requests: int, seed: int = 0, told: bool = True) -> list[str]:
    """Let the policy answer requests of which each arm gets a share right; return the arms it chose."""
    random = np.random.default_rng(seed)
    chosen = []
    for _ in range(requests):
        choice = policy.choose(ANYTHING, random.random())
        reward = float(random.random() < chances[choice.arm.name])
        policy.add(choice.logged(ANYTHING), Measurement(reward if told else None, 1.0, 0.0))
        chosen.append(choice.arm.name)
    return chosen


def test_without_evidence_the_default_answers() -> None:
    """At the start, and as long as nobody reports outcomes, the user's default is all there is."""
    chances = {arm.name: 1.0 for arm in ARMS}
    assert set(play(Policy(ARMS, LARGE.name), chances, 300, told=False)) == {LARGE.name}


def test_a_better_arm_takes_over() -> None:
    """An arm that is clearly better answers, and the reason is given."""
    policy = taught(Policy(ARMS, LARGE.name), {LARGE.name: 0.5, SMALL.name: 0.9})
    choice = policy.choose(ANYTHING, 0.0)
    assert (choice.arm, choice.reason) == (SMALL, "better")


def test_the_default_is_kept_unless_another_is_better_with_certainty() -> None:
    """A little better on little evidence is not enough."""
    policy = taught(Policy(ARMS, LARGE.name), {LARGE.name: 0.6, SMALL.name: 0.7}, times=20)
    assert policy.choose(ANYTHING, 0.0).arm == LARGE
    assert taught(policy, {LARGE.name: 0.6, SMALL.name: 0.7}, times=1000).choose(ANYTHING, 0.0).arm == SMALL


@pytest.mark.parametrize(("price", "wins"), [(0.0, LARGE), (0.5, SMALL)])
def test_cost_counts(price: float, wins: Arm) -> None:
    """What an arm costs is taken off what it earns, at the user's price."""
    policy = Policy(ARMS, LARGE.name, Terms(cost_price=price))
    for number in range(300):
        for arm, share, cost in ((LARGE, 0.9, 1.0), (SMALL, 0.8, 0.1)):
            right = int((number + 1) * share) - int(number * share)
            policy.add(LoggedChoice(arm.name, {arm.name: 1.0}, ANYTHING), Measurement(float(right), cost, 0.0))
    assert policy.choose(ANYTHING, 0.0).arm == wins


def test_latency_counts() -> None:
    """Waiting has a price of its own."""
    policy = Policy(ARMS, LARGE.name, Terms(latency_price=0.1))
    for _ in range(300):
        policy.add(LoggedChoice(LARGE.name, {LARGE.name: 1.0}, ANYTHING), Measurement(1.0, 1.0, 9.0))
        policy.add(LoggedChoice(SMALL.name, {SMALL.name: 1.0}, ANYTHING), Measurement(1.0, 1.0, 0.5))
    assert policy.choose(ANYTHING, 0.0).arm == SMALL
    beliefs = policy.estimates()
    assert beliefs[LARGE.name]["latency"] == pytest.approx(9.0, abs=0.01)
    assert beliefs[SMALL.name]["utility"] > beliefs[LARGE.name]["utility"]


def test_each_kind_of_task_has_its_own_arm() -> None:
    """What an arm earns on one kind of request says little of another kind."""
    easy, hard = Situation(unit(1, 0, 0)), Situation(unit(0, 1, 0))
    policy = Policy(ARMS, LARGE.name)
    for _ in range(60):
        taught(policy, {LARGE.name: 0.5, SMALL.name: 1.0}, 2, easy)
        taught(policy, {LARGE.name: 1.0, SMALL.name: 0.0}, 2, hard)
    assert policy.choose(easy, 0.0).arm == SMALL
    assert policy.choose(hard, 0.0).arm == LARGE
    near = Situation(unit(0.9, 0.2, 0.1))
    assert policy.choose(near, 0.0).arm == SMALL


def test_long_requests_are_told_from_short_ones() -> None:
    """An arm that pays on short requests need not on long ones."""
    short, long = Situation(length=100), Situation(length=20_000)
    policy = Policy(ARMS, LARGE.name)
    for _ in range(100):
        taught(policy, {LARGE.name: 0.5, SMALL.name: 1.0}, 1, short)
        taught(policy, {LARGE.name: 1.0, SMALL.name: 0.0}, 1, long)
    assert policy.choose(short, 0.0).arm == SMALL
    assert policy.choose(long, 0.0).arm == LARGE


def test_a_little_exploration_finds_the_better_arm() -> None:
    """From a default that is often wrong the policy gets to the good arm by itself."""
    policy = Policy(ARMS, LARGE.name)
    chosen = play(policy, {LARGE.name: 0.2, SMALL.name: 0.95, HEAVY.name: 0.1}, 1500)
    assert Counter(chosen[-200:])[SMALL.name] > 150


def test_exploration_keeps_its_budget() -> None:
    """What exploring puts at stake never exceeds what was granted; with a budget of nothing, nothing is explored."""
    terms = Terms(exploration_budget=0.003)
    policy = Policy(ARMS, LARGE.name, terms)
    random = np.random.default_rng(1)
    staked = 0.0
    for number in range(1200):
        choice = policy.choose(ANYTHING, random.random())
        staked += choice.stake
        assert staked <= terms.exploration_budget * number + 1e-9
        policy.add(choice.logged(ANYTHING), Measurement(float(random.random() < 0.7), 1.0, 0.0))
    assert staked > 0.0
    frugal = Policy(ARMS, LARGE.name, Terms(exploration_budget=0.0))
    assert set(play(frugal, {arm.name: 0.5 for arm in ARMS}, 500)) == {LARGE.name}


def test_what_is_in_flight_is_taken_off_the_budget() -> None:
    """Choices that are not in the log yet have spent their share already."""
    policy = taught(Policy(ARMS, LARGE.name), {LARGE.name: 0.6, SMALL.name: 0.55, HEAVY.name: 0.5}, times=40)
    free = policy.choose(ANYTHING, 0.5)
    assert free.stake > 0
    assert policy.choose(ANYTHING, 0.5, reserved=policy.budget).stake == 0


def test_a_default_that_goes_bad_is_left() -> None:
    """After an arm has degraded, what it once earned does not hold the policy back for long."""
    policy = Policy(ARMS[:2], LARGE.name)
    play(policy, {LARGE.name: 0.9, SMALL.name: 0.7}, 2000)
    chosen = play(policy, {LARGE.name: 0.3, SMALL.name: 0.7}, 1000, seed=1)
    assert Counter(chosen[-200:])[SMALL.name] > 150


def test_a_warmup_spreads_the_first_requests() -> None:
    """Each arm gets its part of the warm-up share; afterwards the better arm answers, default or not."""
    policy = Policy(ARMS, LARGE.name, Terms(warmup_share=0.6))
    chosen = play(policy, {LARGE.name: 0.5, SMALL.name: 0.7, HEAVY.name: 0.2}, WARMUP_REQUESTS)
    counts = Counter(chosen)
    assert counts[HEAVY.name] == pytest.approx(0.2 * WARMUP_REQUESTS, abs=30)
    assert counts[SMALL.name] >= 0.2 * WARMUP_REQUESTS - 30
    after = policy.choose(ANYTHING, 0.0)
    assert (after.arm, after.probabilities[HEAVY.name] < 0.05) == (SMALL, True)


def test_with_a_warmup_the_default_has_no_claim() -> None:
    """Where the default was a guess, the arm that is more likely better answers; else certainty is needed."""
    shares = {LARGE.name: 0.62, SMALL.name: 0.66}
    taught_both = [
        taught(Policy(ARMS[:2], LARGE.name, Terms(warmup_share=a)), shares, WARMUP_REQUESTS // 2) for a in (0.0, 0.5)
    ]
    assert [policy.choose(ANYTHING, 0.0).arm for policy in taught_both] == [LARGE, SMALL]


@given(st.floats(0, 1, exclude_max=True), st.sets(st.sampled_from([a.name for a in ARMS]), min_size=1), st.booleans())
def test_only_arms_that_can_answer_are_chosen(chance: float, eligible: set[str], warmup: bool) -> None:
    """The choice and all probabilities are of the eligible arms, and sum to one."""
    terms = Terms(warmup_share=0.5) if warmup else Terms()
    policy = taught(Policy(ARMS, LARGE.name, terms), {LARGE.name: 0.5, SMALL.name: 0.6, HEAVY.name: 0.55}, 5)
    choice = policy.choose(ANYTHING, chance, eligible)
    assert choice.arm.name in eligible == set(choice.probabilities)
    assert math.isclose(sum(choice.probabilities.values()), 1.0)
    assert choice.propensity == choice.probabilities[choice.arm.name] > 0
    if len(eligible) == 1:
        assert (choice.propensity, choice.reason) == (1.0, "only_arm")


def test_propensities_are_true() -> None:
    """Over many chances each arm comes up as often as its propensity says."""
    policy = taught(Policy(ARMS, LARGE.name), {LARGE.name: 0.6, SMALL.name: 0.62, HEAVY.name: 0.5}, times=40)
    draws = 4000
    choices = [policy.choose(ANYTHING, (number + 0.5) / draws) for number in range(draws)]
    counts = Counter(choice.arm.name for choice in choices)
    assert len(counts) > 1
    for name, probability in choices[0].probabilities.items():
        assert counts[name] / draws == pytest.approx(probability, abs=0.002)


ROWS = st.lists(
    st.tuples(
        st.sampled_from([*ARMS, Arm("gone@x", "gone", "x")]), st.integers(0, 3), st.integers(0, 5000),
        st.sampled_from([None, 0.0, 1.0]), st.floats(0, 9),
    ),
    min_size=1, max_size=30,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_it_is_a_fold(rows: list[tuple[Arm, int, int, float | None, float]], random: object) -> None:
    """Told late, in any order, or told otherwise at first: what is believed is what folding the log anew gives."""
    vectors = np.eye(4, dtype=np.float32)
    known = [Measurement(reward, cost, 1.0) for _, _, _, reward, cost in rows]
    chosen = [LoggedChoice(arm.name, {arm.name: 1.0}, Situation(vectors[v], length)) for arm, v, length, _, _ in rows]
    whole = Policy(ARMS, LARGE.name, rows=zip(chosen, known, strict=True))
    late = Policy(ARMS, LARGE.name)
    for row in chosen:
        late.add(row, Measurement(1.0, 5.0, 2.0))
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for index in order:
        late.observe(index, known[index])
    assert late.budget == whole.budget
    for situation in (ANYTHING, Situation(vectors[1], 700)):
        assert late.choose(situation, 0.3).probabilities == pytest.approx(whole.choose(situation, 0.3).probabilities)
    for name, beliefs in whole.estimates(None if whole.clusters.count == 0 else 0).items():
        assert late.estimates(None if late.clusters.count == 0 else 0)[name] == pytest.approx(beliefs)


def test_a_retraction_is_as_if_nothing_was_said() -> None:
    """Rewards that are taken back leave no trace in what is believed."""
    policy = taught(Policy(ARMS, LARGE.name), {LARGE.name: 0.5})
    before = policy.estimates()
    index = policy.add(LoggedChoice(LARGE.name, {LARGE.name: 1.0}, ANYTHING))
    policy.observe(index, Measurement(1.0))
    assert policy.estimates()[LARGE.name]["reward"] > before[LARGE.name]["reward"]
    policy.observe(index, Measurement())
    assert policy.estimates()[LARGE.name]["reward"] == pytest.approx(before[LARGE.name]["reward"], abs=1e-3)


def test_clusters_follow_the_requests() -> None:
    """Requests that differ found clusters; a repeat founds none, and there are never more than the limit."""
    clusters = Clusters()
    random = np.random.default_rng(0)
    assert clusters.assign(clusters.nearness(unit(1, 0))) == 0
    for _ in range(50):
        clusters.add(unit(1, 0))
    assert clusters.count == 1
    for _ in range(3000):
        clusters.add(unit(*random.normal(size=2)))
    many = Clusters()
    for _ in range(3000):
        many.add(unit(*random.normal(size=32)))
    assert 1 < clusters.count <= many.count == LIMIT


def rows_of(learner: PolicyUpdater, count: int, first: int = 0) -> list[Row]:
    """Return rows in which the small arm is right and the large one is not."""
    arms = [arm.name for arm in learner.policy.arms]
    return [
        Row(f"t{n:05}", LoggedChoice(arms[n % 2], {arms[n % 2]: 1.0}, ANYTHING), float(n % 2), 1000, 500.0)
        for n in range(first, first + count)
    ]


def test_the_learner_takes_rows_once() -> None:
    """A row that comes again with its reward is the same row; tokens become cost at the arm's price."""
    learner = PolicyUpdater((LARGE, SMALL), Terms(), start_thread)
    rows = rows_of(learner, 40)
    silent = [Row(r.trace_id, r.chosen, None, r.tokens, r.latency_ms) for r in rows]
    learner.take(learner.since, 1, silent)
    assert learner.policy.estimates()[SMALL.name]["rewards"] == 0
    learner.take(learner.since, 2, rows)
    assert learner.policy.count == len(rows)
    beliefs = learner.policy.estimates()
    assert beliefs[SMALL.name]["rewards"] == pytest.approx(20, abs=0.2)
    assert beliefs[SMALL.name]["cost"] == pytest.approx(0.1)
    assert beliefs[LARGE.name]["latency"] == pytest.approx(0.5)
    assert learner.report()[1] == {NOWHERE: rows[-1].trace_id}


def test_the_learner_takes_no_batch_that_another_overtook() -> None:
    """Read before a reward came but taken after it, a batch would undo what nobody tells of again."""
    learner = PolicyUpdater((LARGE, SMALL), Terms(), start_thread)
    rows = rows_of(learner, 40)
    assert learner.take(-1, 12, rows)
    assert not learner.take(-1, 11, [replace(row, reward=None) for row in rows])
    assert learner.since == 12
    assert learner.policy.estimates()[SMALL.name]["rewards"] == pytest.approx(20, abs=0.2)


def test_many_rows_that_come_later_are_folded_into_what_is_there() -> None:
    """Another process may bring thousands at once: what was learned before still counts."""
    learner = PolicyUpdater((LARGE, SMALL), Terms(), start_thread)
    learner.take(learner.since, 1, rows_of(learner, 40))
    learner.take(learner.since, 2, rows_of(learner, 3000, first=40))
    learner.wait(30)
    assert learner.policy.count == 3040
    whole = PolicyUpdater((LARGE, SMALL), Terms(), start_thread)
    whole.take(whole.since, 2, rows_of(whole, 3040))
    whole.wait(30)
    assert learner.policy.estimates() == whole.policy.estimates()


def test_many_rows_are_folded_behind() -> None:
    """A log of thousands of choices does not hold a request up, and is there once the thread has run."""
    begins = threading.Event()

    def start_late(name: str, work: Callable[[], None]) -> threading.Thread:
        return start_thread(name, lambda: work() if begins.wait(30) else None)

    learner = PolicyUpdater((LARGE, SMALL), Terms(), start_late)
    learner.take(learner.since, 1, rows_of(learner, 3000))
    assert (learner.busy, learner.policy.count) == (True, 0)
    begins.set()
    learner.wait(30)
    assert not learner.busy
    assert learner.policy.count == 3000
    learner.take(learner.since, 2, rows_of(learner, 10, first=3000))
    assert learner.policy.count == 3010
    assert learner.choose("t", ANYTHING, 0.0, {LARGE.name, SMALL.name}, recorded=True).arm == SMALL


def test_requests_that_are_not_recorded_explore_nothing() -> None:
    """Nothing is learned from them, so nothing is risked for it; what is recorded is charged at once."""
    learner = PolicyUpdater((LARGE, SMALL, HEAVY), Terms(), start_thread)
    taught(learner.policy, {LARGE.name: 0.6, SMALL.name: 0.55, HEAVY.name: 0.5}, 40)
    names = {arm.name for arm in learner.policy.arms}
    assert learner.choose("a", ANYTHING, 0.0, names, recorded=False).stake == 0
    stakes = [learner.choose(f"b{n}", ANYTHING, 0.0, names, recorded=True).stake for n in range(300)]
    assert 0 < sum(stakes) <= learner.policy.budget + 1e-9


def test_arms_are_read_from_the_settings() -> None:
    """An arm is `approach@model`, perhaps with a price; models keep their slashes and colons."""
    arms = Settings(arms="none@default, moa@org/model:8b=2.5").parsed_arms
    assert arms == (Arm("none@default", "none", "default"), Arm("moa@org/model:8b", "moa", "org/model:8b", 2.5))
    assert [arm.model_for("gpt") for arm in arms] == ["gpt", "org/model:8b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpt-4o", "approach@model"),
        ("none@a b", "approach@model"),
        ("none@a, none@a=2", "twice"),
        ("agent_memory@a", "optillm's own"),
        ("none@a=1e", "not a number"),
        ("none@a=-1", "0 or more"),
    ],
)
def test_bad_arms_are_refused(text: str, said: str) -> None:
    """A bad list of arms names the setting, the arm and the fix."""
    with pytest.raises(InvalidField, match=said) as caught:
        Settings(arms=text)
    assert "OPTILLM_AGENT_MEMORY_ARMS" in str(caught.value)
