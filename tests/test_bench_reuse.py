"""The benches of reuse: the ladder, near misses and decisions a second, each on something small."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from optillm_memory.bench.ladder import compare
from optillm_memory.bench.near_misses import load_pairs, measure
from optillm_memory.bench.tasks import Task
from optillm_memory.cli import main
from optillm_memory.errors import InvalidField


@pytest.fixture(autouse=True)
def spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the encoder that needs no weights."""
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "hashing")


def tasks(count: int, seed: int = 0) -> list[Task]:
    """Return tasks of five kinds that spelling tells apart."""
    chance = random.Random(seed)
    kinds = ["refund", "invoice", "password", "parcel", "voucher"]
    opening = ["please help me with", "i have a question about", "what do i do about", "any news on"]
    closing = ["for my account", "from my order", "in the app", "on your website", "as a new customer", "for a friend"]
    made: dict[str, Task] = {}
    while len(made) < count:
        kind = chance.choice(kinds)
        text = f"{chance.choice(opening)} the {kind} {kind} {kind} {chance.choice(closing)} {chance.choice('abcdefgh')}"
        who = f"{text}{chance.choice('xyzuvw')}"
        made[who] = Task(who, f"desk {kind}")
    return list(made.values())


def test_the_ladder_serves_what_it_has_proven() -> None:
    """The gate serves a share within its limit and saves these calls; beside it no memory serves none."""
    figures = compare(
        tasks(600), upstream="random:0.7", max_error=0.05, similarity=0.95, seeds=range(2), say=lambda _text: None
    )
    assert figures["served"] > 100
    assert figures["within_limit"] == figures["seeds"] == 2
    assert figures["llm_calls"] + figures["served"] == figures["requests"] == 600
    assert figures["llm_calls_saved"] == figures["served"]
    assert figures["accuracy"] > figures["none"]["accuracy"] + 0.05
    assert figures["none"]["served"] == figures["inject"]["served"] == 0
    assert figures["top1"]["served"] > 0


def test_near_misses_are_served_only_after_calibration() -> None:
    """Without other traffic nothing is served; with it paraphrases may be, and pairs that differ are not."""
    found = measure(load_pairs(), tasks(500), max_error=0.05, seed=0, say=lambda _text: None)
    assert found["uncalibrated_differing_served"] == found["uncalibrated_same_served"] == 0
    assert found["differing_served"] == 0
    assert sum(found["reasons"].values()) == 48


def test_the_built_in_pairs_are_of_every_category() -> None:
    """Each category has its eight pairs, and no question stands in two of them."""
    pairs = load_pairs()
    assert {p.category for p in pairs if p.same_answer} == {"paraphrase", "near_repeat"}
    assert {p.category for p in pairs if not p.same_answer} == {"negation", "entity_swap", "number_date", "scope"}
    questions = [q for p in pairs for q in (p.a, p.b)]
    assert len(set(questions)) == len(questions) == 96


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    """A row without its fields, and a file without rows, are refused with their place."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"a": "x", "b": "y", "same_answer": true}\n{"a": "x"}\n')
    with pytest.raises(InvalidField, match="line 2"):
        load_pairs(file)
    file.write_text("\n")
    with pytest.raises(InvalidField, match="no rows"):
        load_pairs(file)


def run(*arguments: str, out: Path) -> Any:
    """Run a bench by its command; return what it wrote."""
    ended = CliRunner().invoke(main, ["bench", *arguments, "--output", str(out)])
    assert ended.exit_code == 0, ended.output
    return json.loads(out.read_text())


def test_the_commands_write_their_figures(tmp_path: Path) -> None:
    """`ladder` and `near-misses` run on the built-in tasks and write figures with settings and versions."""
    found = run("ladder", "--limit", "60", out=tmp_path / "a.json")
    assert {"served_last_1000", "error_per_hit", "accuracy", "llm_calls", "top1", "versions", "settings"} <= set(found)
    found = run("near-misses", out=tmp_path / "b.json")
    assert {"differing_served", "same_served", "uncalibrated_same_served", "by_category", "machine"} <= set(found)


@pytest.mark.host
@pytest.mark.usefixtures("lean_hosts")
def test_decisions_a_second(tmp_path: Path) -> None:
    """`decide` measures in process and over HTTP, and a hit beside the host's own round trip."""
    options = ["--size", "40", "--clients", "1,2", "--seconds", "0.3", "--repeats", "10"]
    found = run("decide", *options, out=tmp_path / "c.json")
    assert set(found["in_process"]) == set(found["http"]) == {"1", "2"}
    assert min(found["in_process"].values()) > 0
    assert found["hit_ratio"] == pytest.approx(found["hit_p50_ms"] / found["none_p50_ms"], rel=0.01)
