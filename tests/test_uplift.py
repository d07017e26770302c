"""Uplift: its interval covers the truth at every look, what harms is retired, and the log's order does not matter."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import NOW, SCOPE, body, feedback, lexical_memory, response, teach, tell, trace
from click.testing import CliRunner
from hosting import KEY, served

from optillm_memory.cli.commands import main
from optillm_memory.learn import confidence
from optillm_memory.learn.confidence import Counts, difference
from optillm_memory.learn.uplift import Episode, Tasks, flipped_tasks, report, standing, summary, tabulated, uplift
from optillm_memory.records import Injected, Scope, Trace
from optillm_memory.store import fold
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables.exposures import episodes_of
from optillm_memory.store.transaction import Transaction
from optillm_memory.testing.upstream import RecordingUpstream

MEMORY = ("mem-1", "exemplar")
RUNS = 200
FAILURES_FIRST = [1, 0, 3, 2]  # the counts with success and failure exchanged


def counts_by_look(share: float, without: float, with_: float, length: int, rng: np.random.Generator) -> Any:
    """Simulate episodes; return the four counts of `Counts` after each of them."""
    treated = rng.random(length) >= share
    good = rng.random(length) < np.where(treated, with_, without)
    cells = [treated & good, treated & ~good, ~treated & good, ~treated & ~good]
    return np.cumsum(cells, axis=1).astype(float)


def refuted(counts: Any, share: float, value: float, alpha: float = 0.05) -> Any:
    """Return at which looks the interval leaves a value out, by the wealth that `difference` bisects."""
    payoffs = confidence._payoffs(share)
    floors = payoffs.min(axis=1, keepdims=True)
    low = confidence._log_wealth(value, payoffs, floors, counts)
    high = confidence._log_wealth(-value, payoffs, floors, counts[FAILURES_FIRST])
    return np.maximum(low, high) >= np.log(2 / alpha)


def episode(number: int, **fields: Any) -> Episode:
    """Return a reported episode in which one memory was injected."""
    made = Episode(SCOPE, f"ep-{number}", NOW + number, f"task-{number}", "none@m", False, 0.2, True, (MEMORY,))
    return replace(made, **fields)


def stream(rng: random.Random, length: int, share: float, without: float, with_: float, **fields: Any) -> list[Episode]:
    """Simulate randomised episodes with a known effect."""
    made = []
    for number in range(length):
        held = rng.random() < share
        success = rng.random() < (without if held else with_)
        made.append(episode(number, held_out=held, share=share, success=success, **fields))
    return made


# -- the interval ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "without", "with_"), [(0.05, 0.5, 0.7), (0.05, 0.95, 0.9), (0.2, 0.3, 0.3), (0.5, 0.05, 0.15)]
)
def test_the_interval_covers_a_known_effect_at_every_look(share: float, without: float, with_: float) -> None:
    """In at least 95 % of 200 runs the truth is inside after every single one of 2,000 episodes."""
    rng = np.random.default_rng(7)
    missed = sum(
        bool(refuted(counts_by_look(share, without, with_, 2_000, rng), share, with_ - without).any())
        for _ in range(RUNS)
    )
    assert missed <= 0.05 * RUNS


def test_the_interval_covers_the_effect_so_far_where_everything_drifts() -> None:
    """Where the tasks get easier and memory better as it learns, the interval covers the mean effect so far."""
    rng, length, missed = np.random.default_rng(8), 2_000, 0
    without = np.linspace(0.2, 0.5, length)
    with_ = without + np.linspace(-0.1, 0.4, length)
    so_far = np.cumsum(with_ - without) / np.arange(1, length + 1)
    looks = np.unique(np.geomspace(20, length, 40).astype(int)) - 1
    for _ in range(RUNS):
        counts = counts_by_look(0.2, without, with_, length, rng)  # type: ignore[arg-type]
        missed += any(refuted(counts[:, [look]], 0.2, so_far[look])[0] for look in looks)
    assert missed <= 0.05 * RUNS


def test_servers_with_other_shares_and_tasks_may_write_one_log() -> None:
    """Where memory helps on one server and not on another with a smaller holdout, the mean of both is covered."""
    rng, missed = np.random.default_rng(12), 0
    payoffs = np.hstack([confidence._payoffs(0.5), confidence._payoffs(0.05)])
    floors = payoffs.min(axis=1, keepdims=True)
    for _ in range(RUNS):
        first = rng.random(1_500) < 0.5
        counts = []
        for mine, share, with_ in ((first, 0.5, 0.8), (~first, 0.05, 0.4)):
            treated = rng.random(1_500) >= share
            good = rng.random(1_500) < np.where(treated, with_, 0.4)
            counts += [treated & good, treated & ~good, ~treated & good, ~treated & ~good]
            counts[-4:] = [cell & mine for cell in counts[-4:]]
        so_far = np.cumsum(counts, axis=1).astype(float)
        flipped = so_far[[1, 0, 3, 2, 5, 4, 7, 6]]
        low, high = (
            confidence._log_wealth(0.2, payoffs, floors, so_far),
            confidence._log_wealth(-0.2, payoffs, floors, flipped),
        )
        missed += bool((np.maximum(low, high) >= np.log(40)).any())
    assert missed <= 0.05 * RUNS


def test_the_bounds_are_where_values_begin_to_be_refuted() -> None:
    """Values just outside of the interval are refuted and those just inside are not."""
    counts = np.array([[180.0], [40.0], [15.0], [25.0]])
    found = difference([Counts(0.2, 180, 40, 15, 25)], 0.05)
    assert 0 < found.low < found.high < 1
    for bound, inward in ((found.low, 1e-6), (found.high, -1e-6)):
        assert refuted(counts, 0.2, bound - inward)[0]
        assert not refuted(counts, 0.2, bound + inward)[0]


def test_the_interval_narrows_and_needs_both_sides() -> None:
    """One side alone, or no chance of the other, tells nothing; ten times as much tells more."""
    whole = confidence.Interval(-1.0, 1.0)
    assert difference([], 0.05) == difference([Counts(0.05, 900, 100)], 0.05) == whole
    assert difference([Counts(0.0, 90, 10, 1, 2), Counts(1.0, 1, 2, 90, 10)], 0.05) == whole
    few, many = (difference([Counts(0.1, 70 * n, 20 * n, 5 * n, 5 * n)], 0.05) for n in (1, 10))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_shares_of_different_times_are_weighed_apart() -> None:
    """A holdout that was changed while the tasks got easier does not pass for an uplift; pooling would see one."""
    tables = [Counts(0.5, 100, 400, 100, 400), Counts(0.05, 855, 95, 45, 5)]
    found = uplift(
        [
            episode(i, held_out=held, share=t.share, success=good)
            for t in tables
            for held, good, n in (
                (False, True, t.with_successes), (False, False, t.with_failures),
                (True, True, t.without_successes), (True, False, t.without_failures),
            )
            for i in range(n)
        ]
    )  # fmt: skip
    assert found.counts == (tables[1], tables[0])
    assert found.estimate == pytest.approx(0.0)
    assert found.interval.low < 0 < found.interval.high
    assert difference([Counts(0.25, 955, 495, 145, 405)], 0.05).low > 0


# -- figures ---------------------------------------------------------------------------------------


def test_a_report_counts_both_sides() -> None:
    """Only randomised episodes are compared, only reported ones have a say, and gains are uplift times episodes."""
    made = [
        *(episode(i, success=i % 10 > 0) for i in range(80)),
        *(episode(100 + i, held_out=True, success=i % 2 > 0) for i in range(20)),
        episode(200, success=None), episode(201, success=None, held_out=True), episode(202, share=0.0, success=False),
    ]  # fmt: skip
    found = uplift(made).as_dict()
    assert found["with_memory"] == {"episodes": 80, "successes": 72, "unreported": 1}
    assert found["without_memory"] == {"episodes": 20, "successes": 10, "unreported": 1}
    assert found["uplift"] == pytest.approx(0.4)
    assert found["low"] < 0.4 < found["high"]
    gained = found["episodes_gained"]
    assert gained["estimate"] == pytest.approx(32)
    assert gained["low"] == pytest.approx(80 * found["low"], abs=0.1)
    assert gained["high"] == pytest.approx(80 * found["high"], abs=0.1)
    nothing = uplift([]).as_dict()
    assert (nothing["uplift"], nothing["low"], nothing["high"]) == (None, -1.0, 1.0)
    assert nothing["episodes_gained"]["estimate"] is None


def test_tasks_are_fixed_and_broken_by_the_latest_of_each_side() -> None:
    """A task counts where it came with and without memory; earlier outcomes, other scopes and no task do not."""

    def seen(number: int, task: str, *, held: bool, success: bool, **fields: Any) -> Episode:
        return episode(number, task_key=task, held_out=held, success=success, **fields)

    made = [
        seen(1, "fixed", held=True, success=True), seen(2, "fixed", held=True, success=False),
        seen(3, "fixed", held=False, success=True),
        seen(4, "broken", held=False, success=False), seen(5, "broken", held=True, success=True),
        seen(6, "same", held=False, success=True), seen(7, "same", held=True, success=True),
        seen(8, "one side", held=False, success=True),
        seen(9, "one side", held=True, success=False, scope=Scope("other")),
        seen(10, "", held=True, success=False), seen(11, "", held=False, success=True),
    ]  # fmt: skip
    assert flipped_tasks(reversed(made)) == Tasks(compared=3, fixed=1, broken=1)


def test_a_report_is_by_scope_kind_arm_and_memory() -> None:
    """Each figure is about its own episodes; memories come best known first, and only eligible episodes count there."""
    fix, other = ("fix-1", "fix"), Scope("local", "other")
    made = [
        *(episode(i, held_out=i % 2 > 0) for i in range(8)),
        *(episode(i, held_out=i % 2 > 0, memories=(MEMORY, fix), arm="moa@m") for i in range(10, 14)),
        *(episode(i, held_out=i % 2 > 0, memories=()) for i in range(20, 26)),
        *(episode(i, held_out=i % 2 > 0, scope=other, memories=(fix,)) for i in range(30, 32)),
    ]
    found = report(made, limit=1)
    sizes = [f["with_memory"]["episodes"] for f in (found["all"], found["eligible"])]
    assert sizes == [10, 7]
    local, second = found["scopes"]
    assert (local["namespace"], second["namespace"]) == ("default", "other")
    assert local["all"]["with_memory"]["episodes"] == 9
    assert {k: v["with_memory"]["episodes"] for k, v in local["kinds"].items()} == {"exemplar": 6, "fix": 2}
    assert {k: v["with_memory"]["episodes"] for k, v in local["arms"].items()} == {"none@m": 4, "moa@m": 2}
    (memory,) = local["memories"]
    assert (memory["memory_id"], memory["verdict"], memory["confidence"]) == ("mem-1", "keep", 0.98)
    (single,) = second["memories"]
    assert single["memory_id"] == "fix-1"
    lines = summary(found)
    assert lines["eligible episodes"].startswith("+0.000 [-")
    assert "local/other fix-1" in lines
    assert lines["local/default mem-1"].endswith("keep")


def test_the_order_of_arrival_does_not_matter() -> None:
    """The same episodes in any order give the same report."""
    made = stream(random.Random(3), 300, 0.3, 0.4, 0.6)
    mixed = random.Random(4).sample(made, len(made))
    assert report(mixed, limit=10) == report(made, limit=10)


# -- retirement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "length"), [(0.05, 3_000), (0.2, 1_500), (0.5, 800)])
def test_a_planted_harmful_memory_is_retired_and_a_useful_one_is_not(share: float, length: int) -> None:
    """What lowers success by 0.4 is retired in the end; what raises it by 0.2, or does nothing, at no look."""
    rng = np.random.default_rng(9)
    for _ in range(10):
        harmful = counts_by_look(share, 0.8, 0.4, length, rng)
        assert standing([Counts(share, *(int(n) for n in harmful[:, -1]))]) == "retire"
        for with_ in (0.8, 0.6):
            harmless = counts_by_look(share, 0.6, with_, length, rng)
            looks = np.unique(np.geomspace(20, length, 40).astype(int)) - 1
            standings = {standing([Counts(share, *(int(n) for n in harmless[:, look]))]) for look in looks}
            assert standings == {"keep"}


def test_hardly_any_harmless_memory_is_ever_retired() -> None:
    """Of 500 memories without any effect at most 2 % are retired at any of 1,000 looks (1 % is the bound)."""
    rng, share = np.random.default_rng(10), 0.2
    payoffs = confidence._payoffs(share)
    floors = payoffs.min(axis=1, keepdims=True)
    retired = 0
    for _ in range(500):
        counts = counts_by_look(share, 0.7, 0.7, 1_000, rng)
        wealth = confidence._log_wealth(0.0, payoffs, floors, counts[FAILURES_FIRST])
        retired += bool((wealth >= np.log(100)).any())
    assert retired <= 10


def test_the_standing_is_what_the_shown_interval_says() -> None:
    """A memory's standing by its counts is that of its figure: retired where the high end is below zero."""
    for seed in range(20):
        made = stream(random.Random(seed), 400, 0.3, 0.7, 0.45)
        figure = uplift(made, 0.02)
        assert figure.standing == standing(figure.counts)
        assert (figure.standing == "retire") == (figure.as_dict()["high"] < 0)
    assert {standing([Counts(0.3, 10, 90, 40, 2)]), standing([])} == {"retire", "keep"}


# -- the log ---------------------------------------------------------------------------------------


def execute(store: SqliteStore, sql: str, *values: Any) -> list[Any]:
    """Run one statement on the writing connection."""
    return store.write(lambda tx: tx.db.execute(sql, values).fetchall()).result(10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """Give an open store."""
    made = SqliteStore(tmp_path / "memory.db")
    yield made
    made.close()


def add(
    store: SqliteStore, episode_id: str, *, at: float = 0.0, held: bool = False, said: Sequence[str] = (), **fields: Any
) -> Trace:
    """Append a trace of an episode in which memory had this to say, held out with the chance 0.2."""
    items = [Injected(memory_id, "fix" if memory_id.startswith("fix") else "exemplar", 1.0, 10) for memory_id in said]
    drawn = {"created_at": NOW + at, "held_out": held, "propensity": 0.2 if held else 0.8}
    made = trace(episode_id=episode_id, **{**drawn, **fields})
    given, withheld = ([], items) if held else (items, [])
    store.write(lambda tx: tx.add_trace(made, injected=given, withheld=withheld)).result(10)
    return made


def say(store: SqliteStore, made: Trace, value: bool | None, **fields: Any) -> None:
    """Say how a trace went."""
    said = feedback(value, **{"feedback_id": f"fb-{made.trace_id}", "trace_id": made.trace_id, **fields})
    store.write(lambda tx: fold.feedback_arrived(tx, "local", None, said, received_at=NOW)).result(10)


def episodes(store: SqliteStore) -> list[Episode]:
    """Return what the log says of its episodes."""
    return store.exposures.episodes(None)


def test_an_episode_is_one_unit(store: SqliteStore) -> None:
    """Many requests are one episode: the first time memory spoke counts, and the latest verified outcome."""
    add(store, "ep-1", at=0, task="the task", approach="none")
    first = add(store, "ep-1", at=1, said=["mem-b", "mem-a"], approach="moa")
    last = add(store, "ep-1", at=2, said=["fix-later"])
    say(store, first, value=True)
    say(store, last, value=False, source="inferred")
    (found,) = episodes(store)
    assert found.memories == (("mem-a", "exemplar"), ("mem-b", "exemplar"))
    assert (found.arm, found.held_out) == ("moa@m", False)
    assert found.share == pytest.approx(0.2)
    assert found.success is True
    say(store, last, value=False, feedback_id="fb-verified")
    assert [e.success for e in episodes(store)] == [False]
    say(store, last, value=None, feedback_id="fb-verified")
    assert [e.success for e in episodes(store)] == [True]


def test_what_was_withheld_is_the_other_side(store: SqliteStore) -> None:
    """A held-out episode knows what it would have had, with the chance that it had; without that it is not eligible."""
    add(store, "ep-1", held=True, said=["fix-1"])
    add(store, "ep-2", at=1, held=True)
    add(store, "ep-3", at=2, propensity=1.0)
    one, two, three = episodes(store)
    assert (one.held_out, one.share, one.memories, one.success) == (True, 0.2, (("fix-1", "fix"),), None)
    assert (two.held_out, two.memories) == (True, ())
    assert three.share == 0.0


def test_a_reused_answer_speaks_for_its_memory_alone(store: SqliteStore) -> None:
    """Where an answer was reused, or would have been but for the holdout, the comparison is about its memory."""
    for number, (held, serve, reason) in enumerate(
        [(False, 1, "exact"), (True, 0, "holdout"), (False, 0, "not_calibrated")]
    ):
        made = add(store, f"ep-{number}", at=number, held=held, said=["mem-near"] if not serve else [])
        values = (made.trace_id, 1, "p", "an answer", "[]", "mem-reused", 1.0, 1, "[]", serve, 0, reason, "{}")
        execute(store, f"INSERT INTO proposals VALUES ({', '.join('?' * 13)})", *values)
    assert [e.memories[0][0] for e in episodes(store)] == ["mem-reused", "mem-reused", "mem-near"]


def test_the_reports_of_tenants_are_apart(store: SqliteStore) -> None:
    """A tenant sees its own episodes, the operator all."""
    add(store, "ep-1", scope=Scope("alice"))
    add(store, "ep-1", at=1, scope=Scope("bob"))
    assert [e.scope.tenant for e in store.exposures.episodes("bob")] == ["bob"]
    assert [e.scope.tenant for e in episodes(store)] == ["alice", "bob"]


def put(store: SqliteStore, episode_id: str) -> set[str]:
    """Fold one episode into the exposures; return the memories that it touches."""
    return store.write(lambda tx: tx.exposures.put(tx.scopes.number(SCOPE), episode_id)).result(10)


def is_retired(store: SqliteStore, since: float = 0.0) -> bool:
    """Whether the exposures say that the one memory harms."""
    return store.write(lambda tx: tx.exposures.is_retired("mem-1", since)).result(10)


def exposures(store: SqliteStore) -> list[Any]:
    """Return what is known of every memory."""
    return execute(store, "SELECT * FROM exposures ORDER BY memory_id, episode_id")


def exposed(store: SqliteStore, order: Sequence[int]) -> list[Any]:
    """Fold episodes that a memory harms, in this order; return the exposures."""
    for number in order:
        held = number % 2 > 0
        made = add(store, f"ep-{number}", at=number, held=held, said=["mem-1"])
        say(store, made, value=held)
        put(store, made.episode_id)
        assert put(store, made.episode_id) == set()
    return exposures(store)


def test_retirement_is_a_fold_of_the_log(store: SqliteStore, tmp_path: Path) -> None:
    """A harmful memory is retired whatever the order; feedback taken back undoes it, and so does an approval."""
    numbers = range(60)
    rows = exposed(store, numbers)
    with contextlib.closing(SqliteStore(tmp_path / "other.db")) as other:
        assert exposed(other, random.Random(1).sample(numbers, len(numbers))) == rows
        assert is_retired(other)
    assert is_retired(store)
    assert not is_retired(store, since=NOW + 58)
    for made in store.traces(None, limit=60):
        if made["held_out"]:
            say(store, trace(trace_id=made["trace_id"]), value=None)
            put(store, made["episode_id"])
    assert not is_retired(store)
    assert len(exposures(store)) == 30


def test_unrandomised_and_unreported_episodes_expose_nothing(store: SqliteStore) -> None:
    """An episode without an outcome, or that could not have been held out, says nothing of its memories."""
    silent = add(store, "ep-1", said=["mem-1"])
    say(store, add(store, "ep-2", said=["mem-1"], propensity=1.0), value=False)
    assert put(store, "ep-1") == put(store, "ep-2") == set()
    assert exposures(store) == []
    say(store, silent, value=True)
    put(store, "ep-1")
    assert len(exposures(store)) == 1


def test_what_harms_is_retired_and_a_rebuild_says_the_same(tmp_path: Path) -> None:
    """Outcomes retire a harmful memory, no later request gets it, and it is back once they are taken back."""
    task, told = "how do I raise the retry limit of the uploader", []
    with lexical_memory(tmp_path, holdout=0.5) as memory:
        teach(memory, task, "set retry_limit")
        for number in range(60):
            turn = memory.begin(body(task))
            cut_off = {"message": {"role": "assistant", "content": f"answer {number}"}, "finish_reason": "length"}
            memory.finish(turn, {"choices": [cut_off]})  # no other answer is learned, which would take its place
            memory.store.flush()
            tell(memory, turn, value=not turn.injected, feedback_id=turn.trace_id)
            told.append(turn)
        (known,) = [m for m in memory.store.list_memories(None, limit=200) if m.answer == "set retry_limit"]
        assert known.status == "retired"
        assert "set retry_limit" not in str(memory.begin(body(task)).messages)
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
        for turn in told:
            memory.feedback({"feedback_id": turn.trace_id, "value": None})
        assert memory.memory(known.memory_id).status == "verified"


# -- people's ways in ------------------------------------------------------------------------------


def test_the_command_shows_what_memory_did(tmp_path: Path) -> None:
    """A memory that makes the difference is found by `optillm-memory uplift`, with its interval and the task fixed."""
    with lexical_memory(tmp_path, holdout=0.5) as memory:
        teach(memory, "how do I raise the retry limit of the uploader", "set retry_limit")
        for _ in range(60):
            turn = memory.begin(body("how do I raise the retry limit of the uploader"))
            memory.finish(turn, response("no idea" if turn.held_out else "set retry_limit"))
            memory.store.flush()
            tell(memory, turn, value=not turn.held_out)
    db = ["--db", str(tmp_path / "memory.db")]
    done = CliRunner(env={"OPTILLM_AGENT_MEMORY_ENCODER": "none"}).invoke(main, ["uplift", *db, "--json"])
    assert done.exit_code == 0, done.output
    (scope,) = json.loads(done.output)["scopes"]
    figure = scope["eligible"]
    assert figure["uplift"] == 1.0
    assert 0.3 < figure["low"] < 1.0
    assert figure["with_memory"]["episodes"] + figure["without_memory"]["episodes"] == 60
    assert figure["tasks"] == {"compared": 1, "fixed": 1, "broken": 0}
    (known,) = scope["memories"]
    assert (known["kind"], known["verdict"]) == ("exemplar", "keep")
    shown = CliRunner().invoke(main, ["uplift", *db, "--limit", "1"])
    assert shown.exit_code == 0, shown.output
    assert known["memory_id"] in shown.output
    assert "tasks fixed 1, broken 0 of 1" in shown.output


@pytest.mark.host
def test_the_route_shows_its_own_to_each_caller(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """`GET uplift` counts the caller's episodes alone, all for the operator, and refuses a bad limit."""
    with served(upstream, tmp_path / "memory.db", env={"OPTILLM_AGENT_MEMORY_HOLDOUT": "0.5"}) as host:
        for number in range(4):
            answered = host.chat(f"task {number}")
            host.settle()
            host.tell({"trace_id": answered["id"], "metric": "success", "value": True, "source": "code"})
        (scope,) = host.get("uplift")["scopes"]
        sides = scope["all"]["with_memory"], scope["all"]["without_memory"]
        assert sum(side["episodes"] for side in sides) == 4
        assert sum(side["successes"] for side in sides) == 4
        assert scope["all"]["confidence"] == 0.95
        assert host.get("uplift", key="mallory")["scopes"] == []
        assert len(host.get("uplift", key=None)["scopes"]) == 1
        refused = host.route("GET", "uplift", key=KEY, params={"limit": "0"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")


def test_one_episode_is_read_by_its_condition(store: SqliteStore) -> None:
    """The fold reads one episode of one scope, not the whole log."""
    made = add(store, "ep-1")
    add(store, "ep-1", at=1, scope=Scope("other"))
    add(store, "ep-2", at=2)

    def read(tx: Transaction) -> list[Episode]:
        return episodes_of(tx.db, "traces.scope_id = ? AND episode_id = ?", (tx.scopes.number(SCOPE), made.episode_id))

    assert [(e.scope, e.episode_id) for e in store.write(read).result(10)] == [(SCOPE, "ep-1")]


def test_counts_are_tabulated_by_share() -> None:
    """Shares that differ by rounding are one; each cell holds its own number."""
    rows = [(0.05, False, True, 3), (1 - 0.95, True, False, 2), (0.05, True, True, 1), (0.5, False, False, 4)]
    assert tabulated(rows) == (Counts(0.05, 3, 0, 1, 2), Counts(0.5, 0, 4, 0, 0))
