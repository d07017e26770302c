"""`bench route`: the policy on rows whose every reward is known, and the figures that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from optillm_memory.bench.route import (
    SCENARIOS,
    Played,
    Row,
    Scenario,
    Table,
    load_rows,
    play,
    run,
    synthetic_rows,
    vectors_of,
)
from optillm_memory.cli import main
from optillm_memory.errors import InvalidField


@pytest.fixture(autouse=True)
def spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the encoder that needs no weights."""
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "hashing")


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Return the figures of two orders of made-up rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "hashing")
        rows = synthetic_rows(count=2400)
        return run(rows, vectors_of(rows), seeds=range(2))


def test_a_good_default_is_kept(figures: dict[str, Any]) -> None:
    """Full or sparse, what is earned is not far below the best single arm, over all and over any window."""
    for name in ("good_default", "good_default_sparse"):
        assert figures[name]["above_best_single_arm"] > -0.004
        assert figures[name]["worst_window_worst_seed"] > -0.04


def test_a_bad_default_is_overcome(figures: dict[str, Any]) -> None:
    """With a warm-up the policy gets to the best arm, with sparse and wrong feedback too."""
    found = figures["bad_default_warmup"]
    assert found["way_to_best_arm"] > 0.8
    assert found["utility"] > found["single_arms"]["small"]
    assert figures["bad_default_warmup_sparse"]["way_to_best_arm"] > 0.5


def test_an_arm_that_degrades_is_left(figures: dict[str, Any]) -> None:
    """Most of what staying with it would lose is made good; the scenario really halves its rewards."""
    rows = synthetic_rows(count=3600)
    assert (
        run(rows, vectors_of(rows), seeds=[0], scenarios=[s for s in SCENARIOS if s.name == "degrades"])["degrades"][
            "loss_made_good"
        ]
        > 0.8
    )
    assert figures["degrades"]["single_arms"]["large"] < figures["good_default"]["single_arms"]["large"] - 0.15


def test_figures_are_what_they_say() -> None:
    """On four requests, by hand: utility, regret, the best single arm, the best per task, the oracle, the window."""
    rows = [
        Row("a", {"x": {"reward": 1, "cost": 0}, "y": {"reward": 0, "cost": 2}}, "one"),
        Row("b", {"x": {"reward": 1, "cost": 0}, "y": {"reward": 1, "cost": 2}}, "one"),
        Row("c", {"x": {"reward": 0, "cost": 0}, "y": {"reward": 1, "cost": 2}}, "two"),
        Row("d", {"x": {"reward": 0, "cost": 0}, "y": {"reward": 0, "cost": 2}}, "two"),
    ]
    table = Table.of(rows, np.eye(4, dtype=np.float32), 0.1)
    assert table.utility == pytest.approx(np.array([[1, -0.1], [1, 0.9], [0, 0.9], [0, -0.1]]))
    found = Played(table, 0, np.array([0, 1, 0, 0])).figures(Scenario("by hand"))
    assert found["utility"] == pytest.approx((1 + 0.9) / 4)
    assert found["reward"] == pytest.approx(0.5)
    assert found["cost"] == pytest.approx(0.5)
    assert found["best_single_arm"] == pytest.approx(0.5)
    assert found["best_arm_per_task"] == pytest.approx((2 + 0.8) / 4)
    assert found["oracle"] == pytest.approx((1 + 1 + 0.9 + 0) / 4)
    assert found["regret"] == pytest.approx(found["oracle"] - found["utility"])
    assert found["worst_window"] == pytest.approx(-0.1 / 4)


def test_the_same_seed_gives_the_same_run() -> None:
    """A seed is all the randomness there is; another one is another order."""
    rows = synthetic_rows(count=300)
    table = Table.of(rows, vectors_of(rows), 0.1)
    scenario = next(s for s in SCENARIOS if s.name == "bad_default_warmup_sparse")
    one, again, other = (play(table, scenario, seed, 0.01) for seed in (1, 1, 2))
    assert (one.chosen == again.chosen).all()
    assert not np.array_equal(one.table.rewards, other.table.rewards)


def test_the_command_measures_a_file(tmp_path: Path) -> None:
    """Rows of one's own go in, every scenario's figures come out, for people and as JSON."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    lines = [json.dumps({"prompt": r.prompt, "task": r.task, "arms": r.arms}) for r in synthetic_rows(count=200)]
    data.write_text("\n".join(lines))
    done = CliRunner().invoke(main, ["bench", "route", "--data", str(data), "--seeds", "1", "--output", str(out)])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    for scenario in SCENARIOS:
        assert written[scenario.name]["oracle"] >= written[scenario.name]["utility"]
        assert scenario.name in done.output
    assert written["settings"]["data"] == "rows.jsonl"


ROW = '{"prompt": "x", "arms": {"a": {"reward": 1, "cost": 1}}}'


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"prompt": "x"}', ROW.replace('1, "cost"', '"much", "cost"'), f"{ROW}\n{ROW.replace('a', 'b')}"],
    ids=["empty", "no JSON", "no arms", "no number", "other arms"],
)
def test_bad_rows_are_named(tmp_path: Path, text: str) -> None:
    """A file that does not fit is refused with its name."""
    data = tmp_path / "rows.jsonl"
    data.write_text(text)
    with pytest.raises(InvalidField, match=r"rows\.jsonl"):
        load_rows(data)
