"""`bench encoder`: both encoders see the same texts, of the lengths that it says, and their vectors are the same."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from optillm_memory.bench.encoder import LENGTHS
from optillm_memory.cli import main


def test_figures_are_all_there_and_vectors_the_same(tmp_path: Path) -> None:
    """Each length has both times and their ratio; through OpenVINO the vectors are the reference's."""
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["bench", "encoder", "--repeats", "2", "--output", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    for length in LENGTHS:
        assert set(figures[str(length)]) == {"encoder_p50_ms", "reference_p50_ms", "ratio"}
        assert all(value > 0 for value in figures[str(length)].values())
    assert figures["encoder"] == "OpenVinoEncoder"
    assert figures["min_cosine"] >= 0.9999
    assert figures["ratio_under_64"] > 0
