"""The commands of all benches: where their figures go, their options, and the rows that they read."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.cli import main as benchmarks
from optillm_memory.bench import near_misses, report, route
from optillm_memory.bench.rows import read_rows
from optillm_memory.cli import main
from optillm_memory.errors import InvalidField

MEASURING = {
    "decide", "encoder", "fixes", "ladder", "latency", "near-misses", "replay", "route", "store", "stream",
    "trajectories",
}  # fmt: skip
ROW = {"command": "git psuh", "output": "did you mean push?", "fix": "git push"}


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield the commands that do something, by their whole name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def option(command: click.Command, name: str) -> click.Option | None:
    """Return an option of a command."""
    found = [p for p in command.params if isinstance(p, click.Option) and name in p.opts]
    return found[0] if found else None


def test_json_is_a_flag_everywhere_and_measurements_have_output() -> None:
    """No command takes a path after `--json`; each that measures has `--output` besides."""
    every = dict([*commands(main), *commands(benchmarks, "benchmarks ")])
    measuring = {f"bench {name}" for name in MEASURING}
    assert {name for name in every if name.startswith("bench ")} == measuring
    research = {"benchmarks agent", "benchmarks durability", "benchmarks peers"}
    assert research <= every.keys()
    for name, command in every.items():
        found = option(command, "--json")
        assert found is None or found.is_flag, name
        if name in {*measuring, *research, "demo"}:
            assert found is not None, name
            assert option(command, "--output") is not None, name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write two failing commands."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (ROW, ROW)))
    return file


def test_figures_are_printed_as_text_or_json_and_written(data: Path, tmp_path: Path) -> None:
    """Standard output has the figures alone, as columns or as the JSON that the file gets, too."""
    out = tmp_path / "figures.json"
    shown = CliRunner().invoke(main, ["bench", "fixes", "--data", str(data)])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("rows")
    printed = CliRunner().invoke(main, ["bench", "fixes", "--data", str(data), "--json", "--output", str(out)])
    found = json.loads(printed.stdout)
    assert found == json.loads(out.read_text())
    assert found["rows"] == 2
    assert found["settings"] == {"data": "rows.jsonl"}
    assert {"python", "sqlite", "optillm-memory"} <= set(found["versions"])
    assert set(found["machine"]) == {"cores", "system", "processor"}


def test_a_folder_that_is_not_there_is_noticed_before_anything_is_measured(tmp_path: Path) -> None:
    """An hour of measuring is not lost to a mistyped path."""
    out = tmp_path / "none" / "figures.json"
    done = CliRunner().invoke(main, ["bench", "store", "--output", str(out)])
    assert done.exit_code == 2
    assert "Invalid value for '--output': there is no folder" in done.output


def test_numbers_have_commas_between_them() -> None:
    """Anything else is refused with the option's name."""
    done = CliRunner().invoke(main, ["bench", "decide", "--clients", "1;8"])
    assert done.exit_code == 2
    assert "Invalid value for '--clients': give whole numbers with commas between them" in done.output


def test_groups_of_figures_are_indented() -> None:
    """Figures stand in two columns, those of a group below its name."""
    figures = {"rows": 2, "by_size": {"10": {"p50_ms": 1.5}, "200": {}}, "names": ["ä"]}
    assert report.columns(figures).splitlines() == [
        "rows     2", "by_size", "  10", "    p50_ms  1.5", "  200", 'names    ["ä"]',
    ]  # fmt: skip


def test_research_runs_from_a_checkout() -> None:
    """`python -m benchmarks` lists what it has."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("Usage: python -m benchmarks ")
    assert all(f"  {name} " in done.stdout for name in ("agent", "ann", "durability", "peers"))


def test_a_command_of_its_own_module_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ann` is the command of that name in `benchmarks/ann.py`, which is imported only for it."""
    module = types.ModuleType("benchmarks.ann")
    vars(module)["ann"] = click.Command("ann", callback=lambda: click.echo("measured"))
    monkeypatch.setitem(sys.modules, "benchmarks.ann", module)
    assert CliRunner().invoke(benchmarks, ["ann"]).output == "measured\n"
    assert "  ann" in CliRunner().invoke(benchmarks, ["--help"]).output


def test_a_fault_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Research ends in a message, not in a traceback, where a program that it needs is missing."""
    monkeypatch.setattr("benchmarks.agent.missing", lambda: ["git"])
    done = CliRunner().invoke(benchmarks, ["agent"])
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "Error: the agent's tasks need git on the path")


def test_rows_may_hold_any_line_separator_in_their_texts(tmp_path: Path) -> None:
    """A U+2028 inside a JSON string does not end the row, whatever the bench."""
    file = tmp_path / "rows.jsonl"
    prompt = "one\u2028two"
    arms = {"a": {"reward": 1, "cost": 0.5}}
    file.write_text(json.dumps({"prompt": prompt, "arms": arms}, ensure_ascii=False), encoding="utf-8")
    assert [row.prompt for row in route.load_rows(file)] == [prompt]


def test_files_that_are_not_text_and_rows_that_are_not_right_are_named(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, and a text where true or false is wanted, are refused with their place."""
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b'{"a": "\xff"}')
    for load in (near_misses.load_pairs, route.load_rows, lambda path: list(read_rows(path))):
        with pytest.raises(InvalidField, match=r"pairs\.jsonl is not UTF-8 text"):
            load(file)
    file.write_text('{"a": "x", "b": "y", "same_answer": "false"}')
    with pytest.raises(InvalidField, match=r"same_answer.*line 1"):
        near_misses.load_pairs(file)
