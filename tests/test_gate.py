"""The gate: nothing is served above the limit that the user named, and what is proven is served."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory.background.threads import start_thread
from optillm_memory.decide import gate_updater as keeper_module
from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.calibration import (
    GRID,
    LOOKS,
    RIGHT,
    UNKNOWN,
    WRONG,
    Boundary,
    Calibration,
    cell_of,
    discount,
)
from optillm_memory.decide.gate import AUDIT_SHARE, Decision, Gate, Label, is_audited
from optillm_memory.decide.gate_updater import Change, GateUpdater

LIMIT = 0.05
STRICT, LAX = cell_of(0.45), cell_of(0.25)  # places in the grid
SURE = Proposal("A", "a", 0.9, False, (), ("m1", "m2"), 1.0, 0.9, 0.8)


def labels(count: int, score: float = 0.9, *, wrong: int = 0, partition: str = "p") -> list[Label]:
    """Return labels with one score, of which the last ones are wrong."""
    return [Label(score, i < count - wrong, partition) for i in range(count)]


def proven(limit: float, *parts: tuple[int, int, int]) -> Calibration:
    """Return a calibration that saw these (cell, verdict, count), each spread evenly over the others."""
    places = [((i + 0.5) / count, cell, verdict) for cell, verdict, count in parts for i in range(count)]
    calibration = Calibration(limit)
    for _, cell, verdict in sorted(places):
        calibration.add(cell, verdict)
    return calibration


def both_in_force() -> Calibration:
    """Return a calibration that has proven the lax threshold, and all before it."""
    calibration = proven(LIMIT, (STRICT, RIGHT, 400), (LAX, RIGHT, 400))
    assert calibration.threshold is not None
    assert cell_of(calibration.threshold) >= LAX
    return calibration


# -- validity --


@pytest.mark.parametrize(("limit", "share"), [(0.05, 0.05), (0.02, 0.04), (0.2, 0.2)])
def test_a_rate_at_the_limit_passes_with_no_more_than_its_share(limit: float, share: float) -> None:
    """At whichever look: the crossing probability of a boundary is what it may spend, and not far less."""
    rng = np.random.default_rng(1)
    runs, boundary = 20_000, Boundary(limit, share)
    errors, crossed, before = np.zeros(runs, dtype=int), np.zeros(runs, dtype=bool), 0
    for look, size in enumerate(LOOKS[:110]):
        errors += rng.binomial(size - before, limit, runs)
        crossed |= errors <= boundary.allowed(look)
        before = size
    spread = math.sqrt(share * (1 - share) / runs)
    assert 0.7 * share < crossed.mean() < share + 3 * spread


def test_a_larger_share_lets_pass_whatever_a_smaller_one_does() -> None:
    """What is handed on to a threshold makes its test no stricter at any look: else two tests would be spent on it."""
    for limit in (0.01, 0.02, 0.05, 0.1, 0.5):
        small, middle, large = (Boundary(limit, share) for share in (0.01, 0.04, 0.05))
        for look in range(len(LOOKS)):
            assert small.allowed(look) <= middle.allowed(look) <= large.allowed(look)


def constant(limit: float) -> list[float]:
    """Err just above the limit at every score."""
    return [1.02 * limit] * len(GRID)


def late(limit: float) -> list[float]:
    """Err within the limit where it is strict, until one threshold on the way brings the error just above it."""
    at = cell_of(0.3)
    before = [0.8 * limit] * at
    return [*before, 1.02 * limit * (at + 1) - sum(before), *[1.02 * limit] * (len(GRID) - at - 1)]


def rising(limit: float) -> list[float]:
    """Err the more the laxer, from never to four times the limit."""
    return [4 * limit * i / len(GRID) for i in range(len(GRID))]


def thresholds_in_force(errors: list[float], limit: float, rng: np.random.Generator, requests: int) -> list[int]:
    """Return the laxest place in force after each request of a stream; of what is served, a twentieth is labelled."""
    calibration = Calibration(limit)
    cells = rng.integers(0, len(GRID), requests)
    wrong = rng.random(requests) < np.array(errors)[cells]
    audited = rng.random(requests) < AUDIT_SHARE
    laxest, found = -1, []
    for cell, bad, audit in zip(cells.tolist(), wrong.tolist(), audited.tolist(), strict=True):
        calibration.add(cell, UNKNOWN if cell <= laxest and not audit else WRONG if bad else RIGHT)
        laxest = -1 if calibration.threshold is None else GRID.index(calibration.threshold)
        found.append(laxest)
    return found


@pytest.mark.parametrize("curve", [constant, late, rising])
def test_a_threshold_in_force_errs_more_than_the_limit_in_few_streams(curve: Callable[[float], list[float]]) -> None:
    """On streams with a known error, at most 5 % of the runs ever have a threshold in force that is above the limit."""
    rng, limit, runs = np.random.default_rng(2), 0.06, 120
    errors = curve(limit)
    too_lax = [sum(errors[: node + 1]) / (node + 1) > limit for node in range(len(GRID))]
    bad = sum(
        any(laxest >= 0 and too_lax[laxest] for laxest in set(thresholds_in_force(errors, limit, rng, 1_500)))
        for _ in range(runs)
    )
    assert bad <= 0.05 * runs


def test_what_is_well_below_the_limit_is_proven() -> None:
    """Streams that err a fourth of the limit are served nearly all of the time in the end, down to the laxest."""
    rng = np.random.default_rng(3)
    ends = [thresholds_in_force([0.015] * len(GRID), 0.06, rng, 1_500)[-1] for _ in range(20)]
    assert sum(end == len(GRID) - 1 for end in ends) >= 18


@pytest.mark.parametrize("limit", [0.05, 0.02, 0.01])
def test_without_errors_few_labels_are_enough(limit: float) -> None:
    """Not fewer than could prove it in one test at 5 %, and not three times as many."""
    calibration, needed = Calibration(limit), 0
    while calibration.threshold is None and needed < 5_000:
        calibration.add(STRICT, RIGHT)
        needed += 1
    least = math.log(0.05) / math.log(1 - limit)
    assert least <= needed <= 3 * least


def test_labels_count_by_what_is_proposed() -> None:
    """Where lax proposals are hardly labelled, their errors weigh as much as there are proposals like them."""
    seen = (STRICT, RIGHT, 1_200), (LAX, RIGHT, 280), (LAX, WRONG, 120)
    even = proven(0.2, *seen)
    assert even.threshold is not None
    assert cell_of(even.threshold) >= LAX
    hidden = proven(0.2, *seen, (LAX, UNKNOWN, 4_400))
    assert hidden.threshold is not None
    assert cell_of(hidden.threshold) < LAX


@pytest.mark.parametrize("count", [0, 10])
def test_what_is_hardly_labelled_is_not_proven_by_its_number(count: int) -> None:
    """A few labels or none among a thousand proposals say little, whatever is labelled beside them."""
    hidden = proven(LIMIT, (STRICT, RIGHT, 400), (LAX, RIGHT, count), (LAX, UNKNOWN, 1_000))
    assert hidden.threshold is not None
    assert cell_of(hidden.threshold) < LAX


def test_labels_below_a_threshold_say_nothing_of_it() -> None:
    """Lax labels prove nothing strict, and without that nothing lax is tested."""
    calibration = proven(LIMIT, (LAX, RIGHT, 3_000))
    assert calibration.threshold is None
    assert (calibration.labels(GRID[STRICT]), calibration.labels(GRID[LAX])) == (0, 3_000)


def test_a_score_belongs_to_the_strictest_threshold_that_it_reaches() -> None:
    """And to none where it is below all of them."""
    assert [cell_of(threshold) for threshold in GRID] == list(range(len(GRID)))
    assert [cell_of(threshold - 1e-9) for threshold in GRID] == list(range(1, len(GRID) + 1))
    assert cell_of(1.0) == 0


def test_a_threshold_that_fails_stops_those_behind_it() -> None:
    """Behind a start whose errors are too many nothing is tested, however clean its own labels make it look."""
    calibration = proven(0.1, (STRICT, WRONG, 30), (STRICT, RIGHT, 120), (cell_of(0.3), RIGHT, 3_000))
    assert calibration.threshold is None


def test_what_was_not_proven_at_first_may_be_later() -> None:
    """A threshold goes on being tested, with the share that those before it handed on."""
    calibration = proven(LIMIT, (STRICT, RIGHT, 400), (LAX, WRONG, 60))
    assert calibration.threshold == GRID[LAX - 1]
    for _ in range(5_000):
        calibration.add(LAX, RIGHT)
    assert calibration.threshold is not None
    assert cell_of(calibration.threshold) >= LAX


# -- when traffic changes --


def test_the_gate_retreats_to_what_recent_labels_do_not_speak_against() -> None:
    """Errors at lax scores take all of these out of force at once, and leave what is plainly right."""
    calibration, count = both_in_force(), 0
    before = calibration.threshold
    while calibration.threshold == before and count < 30:
        calibration.add(LAX, WRONG)
        count += 1
    assert calibration.threshold is not None
    assert STRICT <= cell_of(calibration.threshold) < LAX
    assert not calibration.closed


def test_errors_below_the_threshold_change_nothing() -> None:
    """A burst of what would not have been served anyway is no evidence against what is."""
    calibration = proven(LIMIT, (STRICT, RIGHT, 400), (LAX, WRONG, 200))
    before = calibration.threshold
    assert before is not None
    for _ in range(150):
        calibration.add(LAX, WRONG)
        calibration.add(len(GRID), WRONG)
    assert calibration.threshold == before


def test_what_is_laxer_has_to_be_proven_again() -> None:
    """After a retreat the lax threshold comes back, but not before fresh labels prove it."""
    calibration = both_in_force()
    while calibration.threshold is not None and cell_of(calibration.threshold) >= LAX:
        calibration.add(LAX, WRONG)
    fresh = 0
    while calibration.threshold is not None and cell_of(calibration.threshold) < LAX and fresh < 1_000:
        calibration.add(LAX, RIGHT)
        fresh += 1
    assert math.log(0.05) / math.log(1 - LIMIT) <= fresh < 1_000


def test_what_caused_a_retreat_does_not_cause_the_next() -> None:
    """Once the lax threshold is proven again, a single error does not bring back the doubt of before."""
    calibration = proven(0.3, (STRICT, RIGHT, 200), (LAX, RIGHT, 200))
    for verdict, goal in ((WRONG, False), (RIGHT, True), (WRONG, True)):
        for _ in range(1 if (verdict, goal) == (WRONG, True) else 200):
            calibration.add(LAX, verdict)
            threshold = calibration.threshold
            in_force = threshold is not None and cell_of(threshold) >= LAX
            if in_force == goal:
                break
        assert in_force == goal


def test_errors_everywhere_close_the_gate_until_it_is_proven_anew() -> None:
    """Where recent labels speak against all that was proven, nothing is served; fresh labels open it again."""
    gate = Gate(labels(300))
    assert gate.decide(SURE, "p", LIMIT).reason == "above_threshold"
    for label in labels(40, wrong=40):
        gate.add(label)
    assert gate.decide(SURE, "p", LIMIT) == Decision(serve=False, reason="closed")
    fresh = 0
    while not gate.decide(SURE, "p", LIMIT).serve and fresh < 1_000:
        gate.add(labels(1)[0])
        fresh += 1
    assert math.log(0.05) / math.log(1 - LIMIT) <= fresh < 1_000


def test_a_retreat_may_go_on() -> None:
    """What stayed in force in one retreat is left in the next, when errors come there too."""
    calibration = both_in_force()
    states = []
    for cell in (LAX, STRICT):
        for _ in range(30):
            calibration.add(cell, WRONG)
        states.append((calibration.closed, calibration.threshold is None))
    assert states == [(False, False), (True, True)]


def test_an_error_now_and_then_is_no_reason_to_retreat() -> None:
    """An error rate at the limit itself leaves in force what is: the odds of doubt are small."""
    calibration = both_in_force()
    before = calibration.threshold
    for number in range(600):
        calibration.add(STRICT, WRONG if number % 20 == 19 else RIGHT)
    assert calibration.threshold == before


# -- decisions --


@pytest.mark.parametrize(
    ("proposal", "max_error", "reason"),
    [
        (None, LIMIT, "no_neighbours"),
        (replace(SURE, vetoes=("veto_numbers", "veto_names")), LIMIT, "veto_numbers"),
        (replace(SURE, vetoes=("time_dependent",)), LIMIT, "time_dependent"),
        (replace(SURE, vetoes=("conflict",), exact=True), LIMIT, "conflict"),
        (replace(SURE, memory_ids=("misled", "m2")), LIMIT, "quarantined"),
        (replace(SURE, memory_ids=("misled",), exact=True), LIMIT, "quarantined"),
        (SURE, None, "shadow"),
        (replace(SURE, exact=True), None, "shadow"),
        (SURE, 0.0, "not_calibrated"),
        (SURE, 0.0001, "not_calibrated"),
        (replace(SURE, score=0.3), LIMIT, "below_threshold"),
    ],
)
def test_what_must_not_be_served_is_refused_with_its_reason(
    proposal: Proposal | None, max_error: float | None, reason: str
) -> None:
    """By a gate that serves the like of it; of several vetoes the first is named."""
    gate = Gate([*labels(300), *labels(300, 0.4, wrong=150)])
    assert gate.decide(SURE, "p", LIMIT, quarantined=frozenset(["m2"])).serve
    decision = gate.decide(proposal, "p", max_error, quarantined=frozenset(["misled"]))
    assert (decision.serve, decision.reason) == (False, reason)


def test_a_hit_is_served_and_says_its_threshold() -> None:
    """The threshold is one of the undiscounted score; at it a proposal is served, and below it is not."""
    gate = Gate(labels(300))
    threshold = gate.decide(SURE, "p", LIMIT).threshold
    assert threshold is not None
    assert gate.decide(replace(SURE, score=threshold + 1e-9), "p", LIMIT).reason == "above_threshold"
    assert gate.decide(replace(SURE, score=threshold - 1e-9), "p", LIMIT).reason == "below_threshold"


def test_an_audited_hit_is_not_served() -> None:
    """Its coin sends it to the model, calibrated or exact; what is no hit is not called an audit."""
    gate = Gate(labels(300))
    assert gate.decide(SURE, "p", LIMIT, audit=True).reason == "audit"
    assert not gate.decide(SURE, "p", LIMIT, audit=True).serve
    assert gate.decide(replace(SURE, exact=True), "p", LIMIT, audit=True) == Decision(serve=False, reason="audit")
    assert gate.decide(replace(SURE, score=0.01), "p", LIMIT, audit=True).reason == "below_threshold"


def test_what_is_sure_is_audited_less() -> None:
    """Far above the threshold a second coin has to agree; near it, and of exact repeats, the first one decides."""
    gate = Gate(labels(300))
    threshold = gate.decide(SURE, "p", LIMIT).threshold
    assert threshold is not None

    def decided(proposal: Proposal, *, audit: bool) -> str:
        return gate.decide(proposal, "p", LIMIT, audit=audit, audit_if_confident=False).reason

    assert decided(replace(SURE, score=threshold + 0.1), audit=True) == "above_threshold"
    assert decided(replace(SURE, score=threshold + 0.01), audit=True) == "audit"
    assert decided(replace(SURE, score=threshold + 0.01), audit=False) == "above_threshold"
    assert decided(replace(SURE, exact=True), audit=True) == "audit"


def test_an_exact_repeat_needs_no_labels() -> None:
    """An empty gate serves exact repeats and nothing else."""
    assert Gate().decide(replace(SURE, exact=True), "p", LIMIT) == Decision(serve=True, reason="exact")
    assert Gate().decide(SURE, "p", LIMIT) == Decision(serve=False, reason="not_calibrated", pooled=True)


def test_a_limit_above_a_half_is_taken_for_a_half() -> None:
    """Nobody can ask for an error at which more is wrong than right."""
    gate = Gate(label for i in range(600) for label in labels(1, wrong=i % 10 < 7))
    assert not gate.decide(SURE, "p", 1.0).serve
    assert not gate.decide(SURE, "p", 0.9).serve


def test_while_memory_is_small_more_is_asked_of_a_score() -> None:
    """What is taken off a score shrinks with the proposals before it, in labels and decisions alike."""
    assert discount(0) == 2 * discount(300) > 0
    assert discount(100_000) < 0.001
    gate = Gate(labels(300))
    early = gate.decide(SURE, "p", LIMIT).threshold
    for _ in range(1_000):
        gate.add(Label(0.9, None, "p"))
    later = gate.decide(SURE, "p", LIMIT).threshold
    assert early is not None
    assert later is not None
    assert later == pytest.approx(early - discount(300) + discount(1_300))
    # The same score is in a stricter place later than at first.
    rows = Gate([Label(0.5, True, "p"), *labels(2_000), Label(0.5, True, "p")]).logs[""].rows
    assert rows[0][0] > rows[-1][0]


@pytest.mark.parametrize("score", [-0.01, 1.01, math.nan, math.inf])
def test_a_score_out_of_range_is_an_error(score: float) -> None:
    """A label that cannot be placed is refused, and leaves the gate as it was."""
    gate = Gate()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        gate.add(Label(score, True, "p"))
    assert gate.logs == {}


# -- partitions --


def test_a_partition_without_labels_goes_by_all_the_others() -> None:
    """It is served what is proven in the pool, with the discount of a young memory."""
    gate = Gate(labels(300))
    own, other = gate.decide(SURE, "p", LIMIT), gate.decide(SURE, "q", LIMIT)
    assert (own.serve, own.pooled) == (True, False)
    assert (other.serve, other.pooled) == (True, True)
    assert own.threshold is not None
    assert other.threshold is not None
    assert other.threshold - own.threshold == pytest.approx(discount(0) - discount(300))


def test_a_partition_that_proved_something_goes_by_its_own() -> None:
    """The errors of another partition do not take from it what its labels prove."""
    gate = Gate([*labels(300), *labels(300, partition="q", wrong=150)])
    assert (gate.decide(SURE, "p", LIMIT).serve, gate.decide(SURE, "p", LIMIT).pooled) == (True, False)
    assert not gate.decide(SURE, "q", LIMIT).serve


def test_errors_of_its_own_keep_a_partition_from_the_pool() -> None:
    """A few recent ones close it; its neighbours are served on."""
    gate = Gate([*labels(2_000), *labels(10, partition="q"), *labels(6, partition="q", wrong=6)])
    assert gate.decide(SURE, "q", LIMIT) == Decision(serve=False, reason="closed", pooled=True)
    assert gate.decide(SURE, "p", LIMIT).serve
    assert gate.decide(SURE, "r", LIMIT).serve


def test_a_partition_with_labels_enough_is_not_pooled() -> None:
    """Whose own labels could have proven it, and did not, is not served on those of others."""
    mixed = [label for i in range(440) for label in labels(1, partition="q", wrong=i % 20 == 19)]
    gate = Gate([*labels(6_000), *mixed])
    assert gate.decide(SURE, "p", LIMIT).serve
    assert gate.decide(SURE, "q", LIMIT) == Decision(serve=False, reason="not_calibrated")
    few = Gate([*labels(6_000), *mixed[:100]])
    assert (few.decide(SURE, "q", LIMIT).serve, few.decide(SURE, "q", LIMIT).pooled) == (True, True)


# -- one gate in any process --


def test_an_audit_is_a_keyed_coin() -> None:
    """A request's coin is the same whenever it is thrown, falls for its share, and not without the key."""
    ids = [f"trace-{i}" for i in range(20_000)]
    coins = [is_audited(i, b"salt") for i in ids]
    assert coins == [is_audited(i, b"salt") for i in ids]
    assert 0.045 < sum(coins) / len(ids) < 0.055
    other = [is_audited(i, b"other salt") for i in ids]
    assert sum(a and b for a, b in zip(coins, other, strict=True)) / len(ids) < 0.005
    assert 0.28 < sum(is_audited(i, b"salt", 0.3) for i in ids) / len(ids) < 0.32
    assert not any(is_audited(i, b"salt", 0.0) for i in ids)
    assert all(is_audited(i, b"salt", 1.0) for i in ids)


def some_labels(seed: int, count: int) -> list[Label]:
    """Return labels of two partitions, some of them unknown."""
    chance = random.Random(seed)
    return [
        Label(chance.random(), chance.choice([True] * 40 + [False, None, None]), chance.choice("ppq"))
        for _ in range(count)
    ]


def test_deciding_in_between_changes_nothing() -> None:
    """A gate that is asked for many limits while labels come ends where one ends that gets all of them at once."""
    found, asked = some_labels(4, 900), Gate()
    limits = [0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.15, 0.25, 0.3]
    probes = [replace(SURE, score=score / 10) for score in range(11)]
    for number, label in enumerate(found):
        asked.add(label)
        asked.decide(SURE, "p", LIMIT)
        if number % 50 == 0:
            asked.decide(SURE, "q", limits[number // 50 % len(limits)])
    whole = Gate(found)
    for limit in limits:
        for partition in "pqr":
            decided = [whole.decide(probe, partition, limit) for probe in probes]
            assert [asked.decide(probe, partition, limit) for probe in probes] == decided
    assert whole.decide(SURE, "p", 0.1).serve


def agrees(keeper: GateUpdater, found: list[Label]) -> None:
    """Check that a keeper's gate is the one that all labels in order give."""
    whole = Gate(found)
    assert {name: book.rows for name, book in keeper.gate.logs.items()} == {
        name: book.rows for name, book in whole.logs.items()
    }
    for partition in "pqr":
        assert keeper.gate.decide(SURE, partition, 0.2) == whole.decide(SURE, partition, 0.2)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 150), st.randoms(use_true_random=False))
def test_a_keeper_has_the_gate_of_all_labels(seed: int, count: int, chance: random.Random) -> None:
    """Whatever comes late, changes its verdict or is retracted, once it is settled."""
    found = some_labels(seed, count)
    keeper = GateUpdater(start_thread)
    rows = [Change(f"{i:04}", label, served=chance.random() < 0.3) for i, label in enumerate(found)]
    for place in sorted(range(count), key=lambda i: i + chance.choice([0, 0, 0, 40])):
        keeper.take(keeper.since, place, [replace(rows[place], label=replace(found[place], correct=None))])
        for _ in range(chance.choice([0, 1, 2])):  # feedback on an earlier request, that may take some back
            other = chance.randrange(count)
            rows[other] = replace(rows[other], label=replace(found[other], correct=chance.choice([True, False, None])))
            keeper.take(keeper.since, place, [rows[other]])
    chance.shuffle(rows)
    keeper.take(keeper.since, count, rows)
    # What is still waited for is settled when so many others have come.
    after = [Change(f"{count + i:04}", Label(0.9, True, "p"), served=False) for i in range(40)]
    keeper.take(keeper.since, count + 1, after)
    agrees(keeper, [change.label for change in sorted(rows, key=lambda r: r.trace_id)] + [c.label for c in after])
    assert keeper.since == count + 1


def test_a_keeper_waits_for_feedback_but_not_for_ever() -> None:
    """The gate lags behind a request that may yet be labelled, by 32 at most; a served one is not waited for."""
    keeper = GateUpdater(start_thread)
    keeper.take(keeper.since, 1, [Change("0000", Label(0.9, None, "p"), served=True)])
    assert len(keeper.gate.logs[""].rows) == 1
    keeper.take(keeper.since, 2, [Change("0001", Label(0.9, None, "p"), served=False)])
    assert len(keeper.gate.logs[""].rows) == 1
    keeper.take(keeper.since, 3, [Change(f"{i:04}", Label(0.9, True, "p"), served=False) for i in range(2, 33)])
    assert len(keeper.gate.logs[""].rows) == 1
    keeper.take(keeper.since, 4, [Change("0033", Label(0.9, True, "p"), served=False)])
    assert len(keeper.gate.logs[""].rows) == 34


def test_a_keeper_takes_no_batch_that_another_overtook() -> None:
    """Read before a label changed but taken after it, a batch would undo what nobody tells of again."""
    keeper = GateUpdater(start_thread)
    served = [Change("0000", Label(0.9, correct, "p"), served=True) for correct in (None, False)]
    assert keeper.take(0, 12, served[1:])
    assert not keeper.take(0, 11, served[:1])
    assert keeper.since == 12
    assert [verdict for _, verdict in keeper.gate.logs[""].rows] == [WRONG]


def test_many_labels_are_folded_again_behind_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late label in a long log leaves the old gate in place until a thread has the new one."""
    monkeypatch.setattr(keeper_module, "_INLINE", 50)
    found = [label for label in some_labels(5, 400) if label.correct is not None]
    keeper = GateUpdater(start_thread)
    rows = [Change(f"{i:04}", label, served=False) for i, label in enumerate(found)]
    keeper.take(keeper.since, 1, rows)
    agrees(keeper, found)
    found[7] = replace(found[7], correct=not found[7].correct)
    keeper.take(keeper.since, 2, [replace(rows[7], label=found[7])])
    for thread in [t for t in threading.enumerate() if t.name == "agent-memory-gate"]:
        thread.join(10)
    agrees(keeper, found)
