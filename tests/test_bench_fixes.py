"""`bench fixes`: its figures against ones worked out by hand, its rows, and its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from optillm_memory.bench.commands import bench
from optillm_memory.bench.fixes import Answer, Row, calibration_error, coverage, figures, load_rows, run
from optillm_memory.errors import InvalidField


def verb(wrong: str, right: str, group: str | None = "verb") -> Row:
    """Return a row whose output names the right word."""
    return Row(f"boat {wrong}", f"unknown verb '{wrong}'. Did you mean '{right}'?", (f"boat {right}",), group)


ROWS = [verb("lanch", "launch"), verb("ancor", "anchor"), verb("sial", "sail"), Row("wc x", "", ("zap 7",), "alone")]


def written(folder: Path, *rows: Any) -> Path:
    """Return a file with rows, each as JSON or as the text it is."""
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def answers(*pairs: tuple[float, bool]) -> list[Answer]:
    """Return answers from pairs."""
    return [Answer(confidence, right) for confidence, right in pairs]


def test_the_figures_of_four_rows_are_those_worked_out_by_hand() -> None:
    """Three rows teach one another and the fourth teaches and learns nothing."""
    found = run(ROWS)
    assert (found["rows"], found["top1"], found["top1_learnable"], found["answered"]) == (4, 0.75, 1.0, 0.75)
    assert (found["coverage_at_95"], found["replay"]) == (0.75, 0.0)
    # In order: nothing is known of the first; the second and third follow from those before them.
    assert (found["stream"]["top1"], found["stream"]["answered"]) == (0.5, 0.5)
    assert (found["stream"]["coverage_at_95"], found["stream"]["replay"]) == (0.5, 0.0)
    assert found["ms_p50"] > 0


def test_replay_repeats_the_nearest_fix() -> None:
    """Rows that are alike and have the same fix are right by replay, one row after the other."""
    found = run([Row("boat go", "locked", ("boat unlock && boat go",))] * 3)
    assert (found["replay"], found["stream"]["replay"]) == (1.0, 0.6667)


def test_without_groups_nothing_is_said_of_learnable_rows() -> None:
    """Where a row has no group, `top1_learnable` is null; the rest is there."""
    found = run([verb("lanch", "launch", None), verb("ancor", "anchor")])
    assert found["top1_learnable"] is None
    assert found["top1"] == 1.0


def test_a_row_accepts_any_of_its_fixes_white_space_aside() -> None:
    """Every listed correction counts, however it is spaced; another does not."""
    row = Row("a", "", ("b  c", "d"))
    assert row.accepts("b c")
    assert row.accepts(" d ")
    assert not row.accepts("bc")


def test_coverage_is_the_largest_share_that_is_right_enough() -> None:
    """Rows are taken by falling confidence, equal ones together, and what is not answered is never covered."""
    assert coverage(answers((0.9, True), (0.8, True), (0.7, False), (0.6, True))) == 0.5
    assert coverage(answers((0.9, False), (0.8, True)), wanted=0.5) == 1.0
    assert coverage(answers((0.9, True), (0.9, False), (0.8, True))) == 0.0
    assert coverage(answers(*[(1 - n / 100, n != 10) for n in range(20)])) == 1.0
    assert coverage(answers((0.9, True), (0.0, True))) == 0.5
    assert coverage([]) == 0.0


def test_the_calibration_error_is_the_mean_gap_of_ten_bins() -> None:
    """Each bin's gap between confidence and success weighs by its count; what is not answered has none."""
    assert calibration_error(answers(*[(0.8, n % 5 != 0) for n in range(10)])) == pytest.approx(0.32)
    assert calibration_error(answers(*[(0.5, n % 2 == 0) for n in range(20)])) == 0.0
    assert calibration_error(answers((0.75, True), (0.0, False))) == 0.25
    assert calibration_error([]) == 0.0
    assert figures(answers((0.75, True), (0.0, False)))["answered"] == 0.5


def test_rows_are_read_as_they_are_written(tmp_path: Path) -> None:
    """A single fix may be a text, a group may be missing, and further fields and empty lines do not matter."""
    one = {"command": "a", "output": "", "fix": "b", "more": 1}
    two = {"command": "c", "output": "d", "fix": ["e", "f"], "group": "g"}
    path = written(tmp_path, one, "", two)
    assert load_rows(path) == [Row("a", "", ("b",)), Row("c", "d", ("e", "f"), "g")]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("{", "row"),
        ("[]", "row"),
        ({"output": "", "fix": "b"}, "command"),
        ({"command": " ", "output": "", "fix": "b"}, "command"),
        ({"command": "a", "fix": "b"}, "output"),
        ({"command": "a", "output": 1, "fix": "b"}, "output"),
        ({"command": "a", "output": ""}, "fix"),
        ({"command": "a", "output": "", "fix": []}, "fix"),
        ({"command": "a", "output": "", "fix": ["b", " "]}, "fix"),
        ({"command": "a", "output": "", "fix": "b", "group": 3}, "group"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, field: str) -> None:
    """The error says which field of which line is wrong."""
    path = written(tmp_path, {"command": "a", "output": "", "fix": "b"}, row)
    with pytest.raises(InvalidField, match="line 2") as caught:
        load_rows(path)
    assert caught.value.param == field


def test_a_file_without_rows_or_without_text_is_refused(tmp_path: Path) -> None:
    """An empty file and a binary one are named."""
    with pytest.raises(InvalidField, match="holds no rows"):
        load_rows(written(tmp_path, ""))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidField, match="UTF-8"):
        load_rows(binary)


def test_our_own_rows_are_whole() -> None:
    """The built-in rows are about forty, of several kinds with several rows each, and none stands there twice."""
    rows = load_rows()
    groups = [row.group for row in rows]
    assert 35 <= len(rows) <= 50
    assert len(set(groups)) >= 10
    assert min(groups.count(group) for group in groups) >= 2
    assert len({row.command for row in rows}) == len(rows)


def test_our_own_rows_are_mostly_mended() -> None:
    """On the built-in rows memory mends most commands, and far more than replay does."""
    found = run(load_rows())
    assert found["top1"] >= 0.75
    assert found["coverage_at_95"] >= 0.5
    assert found["replay"] <= 0.2
    assert found["stream"]["top1"] >= 0.4


def test_the_command_shows_and_writes_its_figures(tmp_path: Path) -> None:
    """`bench fixes --data FILE --output OUT` writes the figures with what they were got with, and shows them."""
    rows = [{"command": r.command, "output": r.output, "fix": list(r.fix), "group": r.group} for r in ROWS]
    out = tmp_path / "out.json"
    result = CliRunner().invoke(bench, ["fixes", "--data", str(written(tmp_path, *rows)), "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert "coverage_at_95" in result.output
    figures = json.loads(out.read_text())
    assert (figures["top1"], figures["stream"]["top1"]) == (0.75, 0.5)
    assert figures["settings"] == {"data": "rows.jsonl"}
    assert "versions" in figures
