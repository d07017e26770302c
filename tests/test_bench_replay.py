"""`bench replay`: a real log of the policy's decisions gives each arm's estimate, and says what it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import NOW, SCOPE, feedback, trace
from click.testing import CliRunner

from optillm_memory.bench.commands import bench
from optillm_memory.records import Scope
from optillm_memory.store import fold
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables.exposures import read_decisions
from optillm_memory.store.transaction import Transaction

HALF = {"none@m": 0.5, "moa@m": 0.5}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """Give an open store."""
    made = SqliteStore(tmp_path / "memory.db")
    yield made
    made.close()


def decide(
    store: SqliteStore,
    number: int,
    arm: str,
    success: bool | None,
    probabilities: Mapping[str, float] = HALF,
    **fields: Any,
) -> None:
    """Append a request for which the policy chose an arm, and say how it went."""
    named = {"episode_id": f"ep-{number}", "created_at": NOW + number, "prompt_tokens": 30, "latency_ms": 20.0}
    made = trace(**{**named, **fields})

    def arrive(tx: Transaction) -> None:
        tx.add_trace(made)
        tx.db.execute(
            "INSERT INTO decisions(trace_id, scope_id, arm, propensity, reason, cluster, probabilities) "
            "VALUES (?, ?, ?, ?, 'explore', 0, ?)",
            (made.trace_id, tx.scopes.number(made.scope), arm, probabilities.get(arm, 1.0), json.dumps(probabilities)),
        )
        if success is not None:
            said = feedback(success, trace_id=made.trace_id, feedback_id=f"fb-{made.trace_id}")
            fold.feedback_arrived(tx, made.scope.tenant, None, said, received_at=NOW)

    store.write(arrive).result(10)


def replayed(store: SqliteStore, tmp_path: Path, *options: str) -> tuple[Any, str]:
    """Run the command on a store's file; return its JSON and what it shows."""
    out = tmp_path / "out.json"
    done = CliRunner().invoke(bench, ["replay", "--db", str(store.path), "--output", str(out), *options])
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.output


def test_a_log_gives_the_estimates_of_its_arms(store: SqliteStore, tmp_path: Path) -> None:
    """Arms are estimated by their own episodes where they were drawn evenly, with their price, and are shown."""
    for number in range(40):
        decide(store, number, "none@m", number % 4 > 0, completion_tokens=70)
        decide(store, 100 + number, "moa@m", number % 10 > 0, completion_tokens=970)
    found, shown = replayed(store, tmp_path, "--token-price", "0.2", "--second-price", "1")
    assert (found["episodes"], found["episodes_with_outcome"], found["warnings"]) == (80, 80, [])
    plain, moa = found["arms"]["none@m"], found["arms"]["moa@m"]
    assert (plain["reward"], moa["reward"], found["policy"]["reward"]) == (0.75, 0.9, 0.825)
    assert (plain["tokens"], moa["tokens"]) == (100, 1000)
    assert plain["utility"] == pytest.approx(0.75 - 0.2 * 0.1 - 0.02)
    assert moa["utility"] == pytest.approx(0.9 - 0.2 - 0.02)
    assert plain["low"] < plain["utility"] < plain["high"]
    assert plain["effective_sample_size"] == 40
    assert found["settings"] == {"db": "memory.db", "token_price": 0.2, "second_price": 1.0}
    assert "moa@m" in shown
    assert "ESS 40.0" in shown


def test_an_episode_is_one_row_with_its_first_choice(store: SqliteStore) -> None:
    """Requests of one episode are no independent evidence: they share the outcome, their tokens add up."""
    decide(store, 1, "none@m", success=None)
    decide(store, 2, "moa@m", success=False, episode_id="ep-1")
    store.write(lambda tx: tx.add_trace(trace(episode_id="ep-1", created_at=NOW, prompt_tokens=5))).result(10)
    decide(store, 3, "moa@m", success=True, scope=Scope("bob"), episode_id="ep-1")
    mine, other = read_decisions(store.path, None)
    assert (mine.arm, mine.reward, mine.switched) == ("none@m", 0.0, True)
    assert (mine.tokens, mine.latency_ms) == (30 + 1 + 30 + 1 + 5 + 1, 41.0)
    assert (other.arm, other.reward, other.switched) == ("moa@m", 1.0, False)
    assert read_decisions(store.path, SCOPE.tenant) == [mine]


def test_what_a_log_lacks_is_said(store: SqliteStore, tmp_path: Path) -> None:
    """No decisions, no outcomes, arms without a chance, arms never drawn, few episodes and heavy ones are named."""
    assert replayed(store, tmp_path)[0]["warnings"] == [
        "the policy made no decision in this log: requests with approach `auto` do"
    ]
    decide(store, 1, "none@m", success=None)
    found, shown = replayed(store, tmp_path)
    assert "no episode with a decision has a verified outcome" in found["warnings"]
    assert "never chosen in an episode with an outcome" in shown
    decide(store, 2, "none@m", success=True)
    decide(store, 3, "rare@m", True, {"none@m": 0.98, "rare@m": 0.02})
    decide(store, 4, "none@m", success=True, probabilities={})
    decide(store, 5, "none@m", success=False)
    decide(store, 6, "moa@m", success=None, episode_id="ep-5")
    found, shown = replayed(store, tmp_path)
    assert set(found["warnings"]) == {
        "1 episodes changed their arm: their outcome is counted for the first",
        "policy: rests on 4.0 effective episodes",
        "moa@m: could have been chosen in 2 of 4 episodes: the figures are about these",
        "moa@m: was never chosen where it could have been",
        "none@m: rests on 2.8 effective episodes",
        "rare@m: could have been chosen in 1 of 4 episodes: the figures are about these",
        "rare@m: rests on 1.0 effective episodes",
        "rare@m: single episodes weigh up to 50",
    }
    assert found["arms"]["moa@m"]["covered_episodes"] == 2
    assert "warning 1" in shown


def test_the_log_is_only_read(store: SqliteStore, tmp_path: Path) -> None:
    """A file that is missing is refused, and one that is there stays as it is."""
    decide(store, 1, "none@m", success=True)
    store.flush()
    before = store.path.read_bytes()
    replayed(store, tmp_path)
    assert store.path.read_bytes() == before
    missing = CliRunner().invoke(bench, ["replay", "--db", str(tmp_path / "none.db")])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output
