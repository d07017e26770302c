"""Recall among many vectors: memory and files searched as one, written in the background, checked when opened."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import body, hashing_memory, response
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vectors import FINGERPRINT, TableSource, Vectors, clustered, unit, workers

from optillm_memory import MemoryRecord, Scope
from optillm_memory.conversation.options import Options
from optillm_memory.recall.relevance_floor import expected_maximum
from optillm_memory.recall.retriever import Retriever
from optillm_memory.recall.vectors import flat, ivf_calibration, ivf_writer, quantization
from optillm_memory.recall.vectors.cache import IndexCache, IndexKey
from optillm_memory.recall.vectors.flat import FlatIndex, Query, top_k
from optillm_memory.recall.vectors.ivf import IvfIndex
from optillm_memory.recall.vectors.ivf_format import Draft, Header
from optillm_memory.recall.vectors.scope_index import Batch, Limits, ScopeIndex, header_for, without
from optillm_memory.recall.vectors.source import Change
from optillm_memory.store.sqlite import index_files
from optillm_memory.store.sqlite.index_files import IndexFiles, folder_of

SCOPE = Scope("local")
SMALL = Limits(inline=150, flat_rows=200, rewrite_share=0.25, loaded_rows=400)
UNRELATED = (0.0, 0.1)
WHOLE = 32  # dimensions
PATIENCE_S = 120  # a busy machine may take so long; nothing waits for it otherwise


# -- fixed point and the rows in memory ------------------------------------------------------------


def test_codes_keep_cosines_to_five_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded rows are the vectors again, a zero vector too; with and without numkong rows are scored alike."""
    vectors = np.concatenate([clustered(300, 384), np.zeros((1, 384), dtype=np.float32), np.eye(2, 384, dtype="f4")])
    encoded = quantization.encode(vectors)
    np.testing.assert_allclose(encoded.vectors(slice(None)), vectors, atol=1e-5)
    query = unit(np.random.default_rng(1).normal(size=384))
    np.testing.assert_allclose(encoded.cosines(np.arange(300), query), vectors[:300] @ query, atol=1e-5)
    wanted = Query.of(query, 10)
    through_kernels = quantization.approximate_scores(encoded.high, encoded.scale, wanted.high)
    monkeypatch.setattr(quantization, "_kernels", lambda: None)
    np.testing.assert_allclose(
        quantization.approximate_scores(encoded.high, encoded.scale, wanted.high), through_kernels, rtol=1e-5
    )
    assert len(quantization.approximate_scores(encoded.high[:0], encoded.scale[:0], wanted.high)) == 0


@pytest.mark.parametrize("dimension", [1, 48, 96, 97, 384])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 4_097])
def test_products_are_exact_for_any_number_of_rows(dimension: int, count: int) -> None:
    """Short rows are taken together, what is left over by itself; also rows that do not lie side by side."""
    random = np.random.default_rng(count)
    rows = random.integers(-127, 128, size=(2 * count, dimension), dtype=np.int8)
    query = random.integers(-127, 128, size=dimension, dtype=np.int8)
    for some in (rows, rows[::2]):
        exact = some.astype(np.int64) @ query.astype(np.int64)
        np.testing.assert_array_equal(quantization.dot_products(some, query), exact)
    several = random.integers(-127, 128, size=(3, dimension), dtype=np.int8)
    exact = several.astype(np.int64) @ rows.astype(np.int64).T
    np.testing.assert_array_equal(quantization.dot_products_of_many(rows, several), exact)


@hypothesis_settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.booleans()), max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 12)
)
def test_index_equals_brute_force(changes: list[tuple[int, bool]], seed: int, count: int) -> None:
    """After any additions, replacements and removals a search finds what comparing with every vector finds."""
    random = np.random.default_rng(seed)
    index, rows = FlatIndex(8), dict[int, Vectors]()
    for revision, (number, keep) in enumerate(changes, 1):
        if keep:
            rows[number] = unit(random.normal(size=8))
            index.add([number], [revision], quantization.encode(rows[number][None]))
            assert index.revision(number) == revision
        else:
            rows.pop(number, None)
            index.remove(number)
    query = unit(random.normal(size=8))
    expected = sorted((float(v @ query) for v in rows.values()), reverse=True)[:count]
    found = index.search(Query.of(query, count))
    assert len(index) == len(rows)
    np.testing.assert_allclose(found.cosines, expected, atol=1e-4)
    assert all(abs(float(rows[n] @ query) - cosine) < 1e-4 for n, cosine in zip(*found, strict=True))
    cosines = index.cosines(query, range(1, 91))
    assert cosines.keys() == rows.keys() & set(range(1, 91))
    assert all(abs(float(rows[n] @ query) - cosine) < 1e-4 for n, cosine in cosines.items())
    numbers, live = index.live()
    assert dict(zip(numbers.tolist(), live.scale.tolist(), strict=True)).keys() == rows.keys()


def filled(vectors: Vectors) -> ScopeIndex:
    """Return an index of a scope that holds these as the numbers from 1 on."""
    index = ScopeIndex(vectors.shape[1], (0.0, 0.08), (0, 1))
    for start in range(0, len(vectors), 64):
        part = [Change(n, v.tobytes(), n) for n, v in enumerate(vectors[start : start + 64], start + 1)]
        index.apply(Batch.of(part, index.since, vectors.shape[1]))
    return index


def test_floor_rises_with_the_store_and_stays_bounded() -> None:
    """Among more memories a chance neighbour comes nearer, so more is asked; a scope of one subject is not shut."""
    random = np.random.default_rng(0)
    mixed = unit(random.normal(size=(512, 64)))
    floors = [filled(mixed[:size]).floor for size in (8, 64, 512)]
    assert floors == sorted(floors)
    assert floors[0] < floors[2]
    alike = filled(unit(random.normal(size=64) + 0.1 * random.normal(size=(512, 64))))
    assert floors[-1] <= alike.floor <= expected_maximum((0.0, 0.08), 512) + 0.0501


def test_vectors_of_another_length_are_not_taken_in() -> None:
    """A vector that cannot be of this encoder makes its memory unsearchable, and harms no other."""
    good = unit(np.ones(8)).tobytes()
    batch = Batch.of([Change(1, good, 1), Change(2, b"1234", 2), Change(3, good, 3)], 0, 8)
    assert (batch.numbers, batch.removed, batch.since) == ([1, 3], [2], 3)


@given(st.integers(1, 4_000), st.integers(1, 600), st.integers(0, 2**32 - 1), st.booleans())
def test_the_highest_scores_are_among_those_chosen(size: int, count: int, seed: int, coarse: bool) -> None:
    """Whatever the scores, ties included, so many are chosen, and none that is left out is higher."""
    scores = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    if coarse:
        scores = np.round(scores)
    count = min(count, size)
    chosen = top_k(scores, count)
    assert len(set(chosen.tolist())) == len(chosen) == count
    left = np.delete(scores, chosen)
    assert len(left) == 0 or left.max() <= scores[chosen].min()


def test_of_many_scores_few_are_chosen() -> None:
    """What a sample tells keeps the choice near to what was wanted."""
    for seed in range(20):
        scores = np.random.default_rng(seed).standard_normal(40_000).astype(np.float32)
        assert len(top_k(scores, 500)) == 500


# -- the file --------------------------------------------------------------------------------------


def write_file(files: IndexFiles, vectors: Vectors, name: str = "x") -> tuple[IvfIndex, Header]:
    """Write vectors as the numbers from 1 on, and open the file."""
    rows, since = filled(vectors).rows()
    with files.draft(name) as draft:
        assert draft is not None
        header = ivf_writer.write(draft, rows, header_for(rows, FINGERPRINT, (0, 1), since), lambda: None)
    content = files.mapped(name)
    assert content is not None
    return IvfIndex(content), header


def recall_at_10(base: IvfIndex, vectors: Vectors, queries: Vectors) -> float:
    """Return the share of the true nearest ten that a search of the file finds."""
    found = 0
    for query in queries:
        truth = np.argsort(-(vectors @ query))[:10] + 1
        found += len(set(truth.tolist()) & set(base.search(Query.of(query, 10)).numbers.tolist()))
    return found / (10 * len(queries))


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_probes_are_calibrated_to_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """In groups, in a blur and with hardly any structure the nearest ten are found, for more work where need be."""
    for name, value in (("LEAST_ROWS", 150), ("LEAST_CANDIDATES", 50)):
        monkeypatch.setattr(ivf_calibration, name, value)
    vectors = clustered(3_000, 96, spread=spread)
    base, header = write_file(IndexFiles(tmp_path), vectors)
    queries = clustered(100, 96, seed=5, spread=spread)
    assert recall_at_10(base, vectors, queries) >= 0.97
    assert header.recall >= 0.98
    if spread < 1:
        assert header.nprobe < header.nlist / 3


def test_rows_of_the_file_keep_their_lists_until_they_are_half_as_many_again(tmp_path: Path) -> None:
    """A file that grows is written without being sorted anew, and sorted anew when it is half as large again."""
    vectors, files = clustered(1_000, WHOLE), IndexFiles(tmp_path)
    base, first = write_file(files, vectors[:400])
    for size, sorted_anew in ((550, False), (700, True)):
        index = ScopeIndex(WHOLE, UNRELATED, (0, 1), base)
        added = [Change(n, vectors[n - 1].tobytes(), n) for n in range(401, size + 1)]
        index.apply(Batch.of(added, index.since, WHOLE))
        rows, since = index.rows()
        with files.draft("y") as draft:
            assert draft is not None
            header = ivf_writer.write(draft, rows, header_for(rows, FINGERPRINT, (0, 1), since), lambda: None)
        assert (header.count, header.revision) == (size, size)
        assert (header.trained_on != first.trained_on) == sorted_anew
        content = files.mapped("y")
        assert content is not None
        written = IvfIndex(content)
        assert sorted(written.numbers.tolist()) == list(range(1, size + 1))
        assert recall_at_10(written, vectors[:size], vectors[:50]) >= 0.97


@pytest.mark.parametrize("count", [397, 398, 399, 400])
def test_rows_that_are_gone_are_not_found_beside_others_of_their_group(tmp_path: Path, count: int) -> None:
    """Rows are read in groups across lists: neither the neighbours of a gone row nor the file's end are mistaken."""
    vectors = clustered(count, WHOLE)
    base, header = write_file(IndexFiles(tmp_path), vectors)
    assert header.candidates >= count  # every row is looked at in full: then with only some of them
    random = np.random.default_rng(count)
    dropped = random.permutation(count)[: count // 2] + 1
    for full in (count, 100):
        base.header = header.__class__(**{**asdict(header), "candidates": full, "nprobe": header.nlist})
        gone = base.no_deletions()
        gone[base.rows_of(dropped)] = True
        for query in (*vectors[:20], *vectors[-20:]):
            found = base.search(Query.of(query, count), gone, count - len(dropped)).numbers.tolist()
            assert not set(found) & set(dropped.tolist())
            assert set(found) <= set(range(1, count + 1))
            near = base.search(Query.of(query, 5), gone, count - len(dropped)).numbers.tolist()
            truth = [n for n in (np.argsort(-(vectors @ query)) + 1).tolist() if n not in set(dropped.tolist())]
            assert near == truth[:5]


def test_many_rows_beside_a_file_are_searched_along_its_directions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came since the file was written is found as surely as what is in it; what was replaced or went is not."""
    monkeypatch.setattr(flat, "_PREFIXED_FROM", 256)
    vectors, later = clustered(2_000, 96), clustered(1_500, 96, seed=3)
    base, _ = write_file(IndexFiles(tmp_path), vectors)
    base.header = base.header.__class__(**{**asdict(base.header), "candidates": 200})
    index = ScopeIndex(96, UNRELATED, (0, 1), base)
    index.apply(Batch.of([Change(n, v.tobytes(), n) for n, v in enumerate(later, 2_001)], 2_000, 96))
    index.apply(Batch.of([Change(n, None, 4_000 + n) for n in range(2_001, 2_301)], 2_000, 96))
    there = {**dict(enumerate(vectors, 1)), **dict(enumerate(later[300:], 2_301))}
    numbers, rows = np.array(list(there)), np.array(list(there.values()))
    found = hits = 0
    for query in clustered(60, 96, seed=5):
        near = {number for number, _ in index.search(query, 10)}
        hits += len(near & set(numbers[np.argsort(-(rows @ query))[:10]].tolist()))
        found += len(near)
        assert near <= set(there)
    assert found == 600
    assert hits >= 0.97 * 600


def test_what_changed_meanwhile_is_left_out_of_the_next_file(tmp_path: Path) -> None:
    """Rows that changed after the revision up to which a file holds are in none of its parts: they may be forgotten."""
    vectors = clustered(120, WHOLE)
    base, _ = write_file(IndexFiles(tmp_path), vectors[:100])
    index = ScopeIndex(WHOLE, UNRELATED, (0, 1), base)
    index.apply(Batch.of([Change(n, vectors[n - 1].tobytes(), n) for n in range(101, 121)], 100, WHOLE))
    rows = without(index.rows()[0], {3, 77, 110, 5_000})
    numbers, _ = rows.gather(np.arange(rows.count))
    assert sorted(numbers.tolist()) == sorted(set(range(1, 121)) - {3, 77, 110})


def test_a_damaged_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    """Cut off, of another format, or with one byte changed anywhere: it does not open, or is not found whole."""
    files = IndexFiles(tmp_path)
    base, _ = write_file(files, clustered(300, WHOLE))
    good = (tmp_path / "x").read_bytes()
    assert base.is_intact(files.blocks("x"))
    for size in (0, 100, 5_000, len(good) - 1):
        (tmp_path / "cut").write_bytes(good[:size])
        content = files.mapped("cut")
        if content is not None:
            with pytest.raises(ValueError, match="index"):
                IvfIndex(content)
    random = np.random.default_rng(0)
    header_end = good.index(b"}") + 1
    for place in [0, 9, 20, *range(4_096, len(good), len(good) // 40), *random.integers(4_096, len(good), 20).tolist()]:
        if header_end <= place < 4_096:
            continue
        damaged = bytearray(good)
        damaged[place] ^= 0x41
        (tmp_path / "damaged").write_bytes(damaged)
        content = files.mapped("damaged")
        assert content is not None
        try:
            whole = IvfIndex(content).is_intact(files.blocks("damaged"))
        except ValueError:
            whole = False
        assert not whole, place


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """The folder and what is in it can be read by nobody else, and no name tells whose vectors they are."""
    files = IndexFiles(folder_of(tmp_path / "memory.db"))
    write_file(files, clustered(50, 8), files.name(Scope("acme", "secret"), FINGERPRINT))
    folder = tmp_path / "memory.db.index"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir())
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert "acme" not in path.name


def locked_bytes() -> int:
    """Return how much of this process's memory the kernel may not take."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck:"))


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what is locked")


@on_linux
def test_what_is_searched_stays_in_memory_while_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors of a file are locked piece by piece, up to a share of memory, and let go of with the file."""
    monkeypatch.setattr(index_files, "_PIECE", 1 << 16)
    files, vectors, before = IndexFiles(tmp_path), clustered(2_000, 96), locked_bytes()
    base, _ = write_file(files, vectors)
    assert len(list(base.lock_in_memory(files))) == -(-2 * 2_000 * 96 // (1 << 16))
    assert 2 * 2_000 * 96 <= locked_bytes() - before <= 2 * 2_000 * 96 + 8_192
    assert recall_at_10(base, vectors, vectors[:20]) >= 0.97
    another, _ = write_file(files, vectors, "y")
    monkeypatch.setattr(index_files, "_memory", lambda: 6 * 2_000 * 96 * 2)  # room for one, not for two
    assert list(another.lock_in_memory(files)) == []
    del base
    assert locked_bytes() == before
    assert list(another.lock_in_memory(files))


def test_where_nothing_may_be_locked_searches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a low limit, or a system without such a call, has the pages come and go."""
    monkeypatch.setattr(index_files, "_locked", lambda *_: False)
    vectors, files = clustered(500, WHOLE), IndexFiles(tmp_path)
    base, _ = write_file(files, vectors)
    assert list(base.lock_in_memory(files)) == []
    assert recall_at_10(base, vectors, vectors[:20]) >= 0.97


@pytest.mark.parametrize(("says", "expected"), [("max\n", 1 << 62), ("1048576\n", 1 << 20), (None, 1 << 62)])
def test_memory_is_what_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None, expected: int
) -> None:
    """A container's limit counts where it is below the machine's memory."""
    monkeypatch.setattr(index_files, "_LIMITS", (str(tmp_path / "limit"),))
    monkeypatch.setattr(os, "sysconf", lambda _: 1 << 31)
    if says is not None:
        (tmp_path / "limit").write_text(says)
    assert index_files._memory() == expected


# -- a scope, brought up to date -------------------------------------------------------------------


class Bench:
    """A source with the index of its scope on files, and what is true of it."""

    def __init__(self, folder: Path, source: TableSource | None = None, limits: Limits = SMALL) -> None:
        """Open the folder."""
        self.source = source or TableSource()
        self.files = IndexFiles(folder)
        self.indexes = IndexCache(self.source, self.files, limits, *workers())
        self.key = IndexKey(SCOPE, FINGERPRINT, WHOLE, UNRELATED)
        self.name = self.files.name(SCOPE, FINGERPRINT)

    def index(self) -> ScopeIndex:
        """Return the scope's index as a request gets it."""
        found = self.indexes.index(self.key, self.source.revision())
        assert isinstance(found, ScopeIndex)
        return found

    def settle(self) -> ScopeIndex:
        """Ask until everything is taken in and nothing is being written."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            index = self.index()
            cached = self.indexes._scopes[SCOPE]
            if not (cached.loading or cached.writing) and cached.version == self.source.revision():
                return index
            time.sleep(0.005)
        raise AssertionError("not settled")

    def check(self, queries: Vectors, least: float = 0.97) -> None:
        """Compare the scope's nearest ten with the truth."""
        index = self.settle()
        truth = {n for n, (_, vector) in self.source.rows.items() if vector is not None}
        assert len(index) == len(truth)
        hit, all_ = 0, 0
        for query in queries:
            found, expected = index.search(query, 10), self.source.exact(query, 10)
            assert {n for n, _ in found} <= truth
            assert all(abs(cosine - float(self._vector(n) @ query)) < 1e-4 for n, cosine in found)
            hit += sum(cosine > expected[-1][1] - 1e-4 for _, cosine in found)  # of equals any will do
            all_ += len(expected)
            known = index.cosines(query, [1, 2, 3, 999_999, *(n for n, _ in expected)])
            assert set(known) == {1, 2, 3, *(n for n, _ in expected)} & truth
        assert hit >= least * all_

    def _vector(self, number: int) -> Vectors:
        vector = self.source.rows[number][1]
        assert vector is not None
        return vector

    def base(self) -> IvfIndex | None:
        """Return the file as it is on disk."""
        content = self.files.mapped(self.name)
        return IvfIndex(content) if content is not None else None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Give an empty scope on a folder."""
    made = Bench(tmp_path / "index")
    yield made
    made.indexes.close()


def numbered(vectors: Vectors, start: int = 1) -> dict[int, Vectors | None]:
    """Return vectors by numbers."""
    return dict(enumerate(vectors, start))


def test_small_scopes_have_no_file(bench: Bench) -> None:
    """Below the limit everything is in memory and found exactly."""
    bench.source.put(numbered(clustered(150, WHOLE)))
    bench.check(clustered(20, WHOLE, seed=2), least=1.0)
    assert bench.base() is None


def test_a_large_scope_is_read_in_pieces_and_put_in_a_file(bench: Bench) -> None:
    """A request takes in no more than its share; the rest comes behind, and the bulk of it ends up in a file."""
    bench.source.put(numbered(clustered(2_000, WHOLE)))
    assert len(bench.index()) <= SMALL.inline
    bench.check(clustered(30, WHOLE, seed=2))
    base = bench.base()
    assert base is not None
    assert len(base) >= 2_000 - SMALL.loaded_rows
    assert bench.files._kept  # its vectors stay in memory
    assert len(bench.settle().flat) <= SMALL.loaded_rows


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_equal_brute_force(tmp_path: Path, seed: int) -> None:
    """Whatever comes, changes, goes and comes back, before and after restarts: what is found is what there is."""
    random = np.random.default_rng(seed)
    bench = Bench(tmp_path / "index")
    vectors = clustered(3_000, WHOLE, seed=seed)
    for _ in range(12):
        kind = random.integers(5)
        if kind <= 1:
            bench.source.put(numbered(vectors[random.integers(3_000, size=300)], int(random.integers(1, 1_500))))
        elif kind == 2 and bench.source.rows:
            gone = random.choice(list(bench.source.rows), size=min(200, len(bench.source.rows)), replace=False)
            bench.source.put(dict.fromkeys(gone.tolist()))
        elif kind == 3 and bench.source.rows:  # the memory changes, not its vector
            same = random.choice(list(bench.source.rows), size=min(100, len(bench.source.rows)), replace=False)
            bench.source.put({n: bench.source.rows[n][1] for n in same.tolist()})
        else:
            bench.indexes.close()
            bench = Bench(tmp_path / "index", bench.source)
        bench.check(vectors[random.integers(3_000, size=20)])
    bench.indexes.close()


def test_a_row_that_changes_gets_another_revision(bench: Bench) -> None:
    """Also where its vector stays the same and lies in the file; the others keep theirs."""
    bench.source.put(numbered(clustered(600, WHOLE)))
    before = bench.settle()
    known = {n: before.revision(n) for n in range(1, 601)}
    changed = {1: bench.source.rows[1][1], 2: unit(np.ones(WHOLE)), 600: bench.source.rows[600][1]}
    bench.source.put(changed)
    index = bench.settle()
    assert index is before
    assert {n for n in known if index.revision(n) != known[n]} == set(changed)
    assert all(index.revision(n) > known[n] for n in changed)
    assert len(index.flat) < 600


def test_a_restart_reads_only_what_changed_since(bench: Bench, tmp_path: Path) -> None:
    """The first request after a start finds what is in the file, without having read the table."""
    vectors = clustered(1_500, WHOLE)
    bench.source.put(numbered(vectors))
    bench.settle()
    bench.indexes.close()
    bench.source.put({1: None, 5_000: unit(np.ones(WHOLE))})
    asked: list[int] = []

    class Watched(TableSource):
        def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
            if threading.current_thread() is threading.main_thread():
                asked.append(since)
            return super().changes(scope, since, fingerprint, limit)

    watched = Watched()
    watched.rows, watched.at = bench.source.rows, bench.source.at
    again = Bench(
        tmp_path / "index", watched, Limits(inline=1_000, flat_rows=10_000, rewrite_share=1.0, loaded_rows=10_000)
    )
    index = again.index()
    assert len(index) == 1_500
    assert min(asked) >= 1_000
    assert index.search(unit(np.ones(WHOLE)), 1)[0][0] == 5_000
    assert 1 not in [n for n, _ in index.search(vectors[0], 10)]
    again.check(clustered(20, WHOLE, seed=3))
    again.indexes.close()


def test_the_table_of_a_large_memory_is_read_ahead_once(bench: Bench, tmp_path: Path) -> None:
    """A memory that wakes up large, with its file or without, reads once in order what is read here and there."""
    bench.source.put(numbered(clustered(100, WHOLE)))
    bench.settle()
    assert bench.source.pieces_read == 0  # it is small
    bench.source.put(numbered(clustered(800, WHOLE)))
    bench.settle()
    bench.indexes.close()
    assert bench.source.pieces_read == 3
    again = Bench(tmp_path / "index", bench.source)
    for _ in range(2):
        again.settle()
        deadline = time.monotonic() + PATIENCE_S
        while again.indexes.busy and time.monotonic() < deadline:
            time.sleep(0.005)
    assert again.base() is not None
    assert bench.source.pieces_read == 6
    again.indexes.close()


def cut(path: Path) -> None:
    """Cut the file off."""
    path.write_bytes(path.read_bytes()[:-100])


def lies_sound(bench: Bench) -> bool:
    """Whether a file is in use and intact; the background may remove a damaged one at any moment."""
    base = bench.base()
    try:
        return base is not None and base.is_intact(bench.files.blocks(bench.name))
    except FileNotFoundError:
        return False


def swap_planes(path: Path) -> None:
    """Change bytes in the middle, which opening does not look at."""
    content = bytearray(path.read_bytes())
    middle = len(content) * 3 // 4
    content[middle : middle + 2_000] = bytes(2_000)
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    """Put something else in its place."""
    path.write_bytes(b"not an index" * 1_000)


@pytest.mark.parametrize("damage", [cut, swap_planes, overwrite, Path.unlink, lambda p: p.write_bytes(b"")])
def test_damage_is_noticed_and_mended(bench: Bench, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Whatever happened to the file, after a while everything is found, and a sound file lies there again."""
    bench.source.put(numbered(clustered(800, WHOLE)))
    bench.settle()
    bench.indexes.close()
    damage(tmp_path / "index" / bench.name)
    again = Bench(tmp_path / "index", bench.source)
    deadline = time.monotonic() + PATIENCE_S
    again.settle()
    while not lies_sound(again) and time.monotonic() < deadline:
        time.sleep(0.01)
        again.settle()
    again.check(clustered(20, WHOLE, seed=2))
    assert lies_sound(again)
    again.indexes.close()


@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink, lambda p: p.write_bytes(b"")])
def test_a_file_that_is_cut_off_under_those_who_search_it_is_let_go_of(
    bench: Bench, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """To read what is not there any more would end the process: the next request notices, and all is found again."""
    bench.source.put(numbered(clustered(800, WHOLE)))
    bench.settle()
    assert bench.base() is not None
    damage(tmp_path / "index" / bench.name)
    bench.index().search(clustered(1, WHOLE)[0], 10)
    bench.settle()
    bench.check(clustered(20, WHOLE, seed=2))


@pytest.mark.parametrize("wrong", ["generation", "fingerprint", "ahead", "another table"])
def test_a_file_that_does_not_belong_to_the_table_is_not_used(bench: Bench, tmp_path: Path, wrong: str) -> None:
    """Rebuilt, of another encoder, newer than the table, or of another table: it is made again from the table."""
    vectors = clustered(1_600, WHOLE)
    bench.source.put(numbered(vectors[:800]))
    bench.settle()
    bench.indexes.close()
    other = TableSource()
    other.put(numbered(vectors[800:], 1))
    again = Bench(tmp_path / "index", other)
    if wrong == "generation":
        other.generation = 1
    elif wrong == "fingerprint":  # two encoders whose names collide in the file's name
        path = tmp_path / "index" / bench.name
        content = path.read_bytes()
        head = Header.of(content[:4_096])
        altered = Header(**{**{k: getattr(head, k) for k in head.__slots__}, "fingerprint": "other"})
        path.write_bytes(altered.to_bytes() + content[4_096:])
    elif wrong == "ahead":
        other.rows, other.at = dict(list(other.rows.items())[:300]), 300
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and len(again.settle().search(vectors[800], 1)) == 0:
        time.sleep(0.01)
    while time.monotonic() < deadline and again.settle().search(vectors[801], 1)[0][1] < 0.999:
        time.sleep(0.01)
    again.check(vectors[800:820])
    again.indexes.close()


def test_a_kill_while_saving_leaves_the_old_file(bench: Bench, tmp_path: Path) -> None:
    """What was being written when the process died is nobody's, and is cleared away by the next to write."""
    bench.source.put(numbered(clustered(800, WHOLE)))
    bench.settle()
    bench.indexes.close()
    unfinished = tmp_path / "index" / f"{bench.name}.unfinished"
    unfinished.write_bytes((tmp_path / "index" / bench.name).read_bytes()[:10_000])
    again = Bench(tmp_path / "index", bench.source)
    assert len(again.index()) >= 400
    bench.source.put(numbered(clustered(600, WHOLE, seed=9), 2_000))
    again.check(clustered(20, WHOLE, seed=2))
    assert not unfinished.exists()
    again.indexes.close()


def test_where_files_cannot_be_written_memory_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be made, or no folder at all, costs memory and not recall."""
    (tmp_path / "index").write_text("in the way")
    bench = Bench(tmp_path / "index")
    bench.source.put(numbered(clustered(600, WHOLE)))
    bench.check(clustered(20, WHOLE, seed=2), least=1.0)
    bench.indexes.close()
    assert "File exists" in caplog.text
    indexes = IndexCache(bench.source, None, SMALL, *workers())
    deadline = time.monotonic() + PATIENCE_S
    key = bench.key
    while len(indexes.index(key, bench.source.revision())) < 600 and time.monotonic() < deadline:  # type: ignore[arg-type]
        time.sleep(0.01)
    assert len(indexes.index(key, bench.source.revision())) == 600  # type: ignore[arg-type]
    indexes.close()


def all_bytes(folder: Path) -> bytes:
    """Return every byte of every file of a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def traces_of(vector: Vectors) -> list[bytes]:
    """Return the bytes by which a vector would be known in a file."""
    code = quantization.encode(vector[None])
    return [vector.tobytes(), code.high[0].tobytes(), code.low[0].tobytes()]


def test_a_forgotten_vector_is_in_no_file(bench: Bench, tmp_path: Path) -> None:
    """Forgetting takes the files away; what is written then, also by who had the row in memory, is without it."""
    secret = unit(np.random.default_rng(99).normal(size=WHOLE))
    bench.source.put({**numbered(clustered(800, WHOLE)), 7: secret})
    bench.settle()
    assert all(piece in all_bytes(tmp_path / "index") for piece in traces_of(secret)[1:])
    bench.source.put({7: None})
    assert bench.files.forget(SCOPE) == 1
    assert not any(piece in all_bytes(tmp_path / "index") for piece in traces_of(secret))
    deadline = time.monotonic() + PATIENCE_S
    while bench.base() is None and time.monotonic() < deadline:
        bench.settle()
        time.sleep(0.01)
    assert bench.base() is not None
    assert not any(piece in all_bytes(tmp_path / "index") for piece in traces_of(secret))
    bench.check(clustered(20, WHOLE, seed=2))


def test_what_was_forgotten_unseen_is_not_in_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is still in memory, and was forgotten before the file is begun, is left out of it."""
    secret = unit(np.random.default_rng(99).normal(size=WHOLE))
    bench = Bench(tmp_path / "index")
    bench.source.put({**numbered(clustered(350, WHOLE)), 7: secret})
    original = bench.files.draft

    def draft(name: str) -> AbstractContextManager[Draft | None]:
        bench.source.put({7: None})
        return original(name)

    monkeypatch.setattr(bench.files, "draft", draft)
    deadline = time.monotonic() + PATIENCE_S
    while bench.base() is None and time.monotonic() < deadline:
        bench.index()
        time.sleep(0.001)
    assert bench.base() is not None
    assert not any(piece in all_bytes(tmp_path / "index") for piece in traces_of(secret))
    bench.indexes.close()


def test_forgetting_while_a_file_is_written_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft that still holds the row is taken away with the files; it never comes in their place."""
    secret = unit(np.random.default_rng(99).normal(size=WHOLE))
    bench = Bench(tmp_path / "index")
    judging, forgotten = threading.Event(), threading.Event()
    original = ivf_calibration.calibrate

    def slowly(index: IvfIndex, rest: Callable[[], None]) -> Header:
        judging.set()
        assert forgotten.wait(10)
        return original(index, rest)

    monkeypatch.setattr(ivf_calibration, "calibrate", slowly)
    bench.source.put({**numbered(clustered(350, WHOLE)), 7: secret})
    deadline = time.monotonic() + 20
    while not judging.wait(0.01):
        assert time.monotonic() < deadline
        bench.index()
    bench.source.put({7: None})
    bench.files.forget(SCOPE)
    forgotten.set()
    while bench.indexes._scopes[SCOPE].writing:
        time.sleep(0.01)
    assert not any(piece in all_bytes(tmp_path / "index") for piece in traces_of(secret))
    assert bench.base() is None
    bench.check(clustered(20, WHOLE, seed=2), least=1.0)
    bench.indexes.close()


def test_two_processes_share_a_folder(bench: Bench, tmp_path: Path) -> None:
    """Each goes on with its own mapped file while the other writes; one at a time writes; both find everything."""
    bench.source.put(numbered(clustered(800, WHOLE)))
    other = Bench(tmp_path / "index", bench.source)
    bench.settle()
    other.settle()
    for start in (1_000, 1_500, 2_000):
        bench.source.put(numbered(clustered(300, WHOLE, seed=start), start))
        bench.check(clustered(5, WHOLE, seed=2))
        other.check(clustered(5, WHOLE, seed=3))
    with bench.files.draft(bench.name) as mine, other.files.draft(bench.name) as theirs:
        assert mine is not None
        assert theirs is None
    other.indexes.close()


def test_a_source_that_searches_by_itself_is_asked(bench: Bench) -> None:
    """A large scope of a database with an index of its own is searched there, with the same words for its answers."""
    bench.source.searches = True
    vectors = clustered(900, WHOLE)
    bench.source.put(numbered(vectors))
    deadline = time.monotonic() + PATIENCE_S
    index = bench.indexes.index(bench.key, bench.source.revision())
    while isinstance(index, ScopeIndex) and time.monotonic() < deadline:
        index = bench.indexes.index(bench.key, bench.source.revision())
        time.sleep(0.01)
    assert index is not None
    assert not isinstance(index, ScopeIndex)
    assert bench.base() is None
    bench.source.put({1_000: unit(np.ones(WHOLE))})
    index = bench.indexes.index(bench.key, bench.source.revision())
    assert index is not None
    assert index.search(unit(np.ones(WHOLE)), 1)[0][0] == 1_000
    assert index.revision(1_000) == bench.source.at
    assert index.cosines(vectors[0], [1, 77_777]).keys() == {1}
    assert index.floor > expected_maximum(UNRELATED, 100)


def test_a_scope_of_one_percent_is_searched_by_itself(tmp_path: Path) -> None:
    """Recall in a small scope beside a large one is exact, for it has an index of its own."""
    large, small = Bench(tmp_path / "index"), TableSource()
    large.source.put(numbered(clustered(2_000, WHOLE)))
    large.settle()
    small.put(numbered(clustered(20, WHOLE, seed=4), 10_000))
    bench = Bench(tmp_path / "index", small)
    bench.check(clustered(10, WHOLE, seed=5), least=1.0)
    large.indexes.close()
    bench.indexes.close()


def test_a_request_does_not_wait_for_a_load_or_a_build(tmp_path: Path) -> None:
    """While the source is slow to tell what changed, others are served from what is there."""
    held, asked = threading.Event(), threading.Event()

    class Slow(TableSource):
        def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
            if self.at > 100:
                asked.set()
                assert held.wait(10)
            return super().changes(scope, since, fingerprint, limit)

    bench = Bench(tmp_path / "index", Slow())
    bench.source.put(numbered(clustered(100, WHOLE)))
    bench.settle()
    bench.source.put(numbered(clustered(10, WHOLE, seed=8), 500))
    waits = threading.Thread(target=bench.index)
    waits.start()
    assert asked.wait(5)
    assert len(bench.index()) == 100  # it comes back although the other still waits
    held.set()
    waits.join(30)
    assert len(bench.settle()) == 110
    bench.indexes.close()


def test_memory_is_bounded_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a large scope is asked for meanwhile, no more of it is taken in than what may be in memory."""
    held, begun = threading.Event(), threading.Event()
    write = ivf_writer.write

    def slowly(*given: Any, **named: Any) -> Header:
        begun.set()
        assert held.wait(20)
        return write(*given, **named)

    monkeypatch.setattr(ivf_writer, "write", slowly)
    bench = Bench(tmp_path / "index")
    bench.source.put(numbered(clustered(3_000, WHOLE)))
    deadline = time.monotonic() + 20
    while not begun.wait(0.005):
        assert time.monotonic() < deadline
        bench.index()
    for _ in range(100):
        assert len(bench.index().flat) <= SMALL.loaded_rows + SMALL.inline
        time.sleep(0.002)
    held.set()
    bench.check(clustered(30, WHOLE, seed=2))
    assert len(bench.settle()) == 3_000
    bench.indexes.close()


def test_a_slow_disk_does_not_hold_a_request(tmp_path: Path) -> None:
    """A request takes in what it can in a moment; the rest, however little, comes behind it."""

    class Slow(TableSource):
        def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
            time.sleep(0.1)
            return super().changes(scope, since, fingerprint, limit)

    bench = Bench(tmp_path / "index", Slow())
    bench.source.put(numbered(clustered(140, WHOLE)))
    assert 0 < len(bench.index()) < 140
    assert len(bench.settle()) == 140
    bench.indexes.close()


def test_searching_goes_on_while_rows_change(bench: Bench) -> None:
    """Requests on several threads find what stays, whatever comes, goes and is written meanwhile; nothing fails."""
    stays = clustered(50, WHOLE, seed=1)
    bench.source.put(numbered(stays))
    bench.settle()
    stop, faults = threading.Event(), list[BaseException]()

    def search(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            while not stop.is_set():
                number = int(random.integers(50))
                index = bench.indexes.index(bench.key, bench.source.revision())
                assert index is not None
                found = dict(index.search(stays[number], 20))
                assert found.get(number + 1, 0) > 0.999
        except BaseException as fault:  # noqa: BLE001
            faults.append(fault)

    threads = [threading.Thread(target=search, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    more = clustered(2_000, WHOLE, seed=3)
    for start in range(0, 2_000, 100):
        bench.source.put(numbered(more[start : start + 100], 1_000 + start))
        bench.source.put(dict.fromkeys(range(1_000 + start, 1_000 + start + 30)))
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not faults, faults
    bench.check(clustered(10, WHOLE, seed=2))


def test_memories_of_a_store_are_found_through_its_file(tmp_path: Path) -> None:
    """Beside a real database: a large scope gets a file, the next process opens it, and forgetting takes it away."""
    with hashing_memory(tmp_path, deadline_ms=20_000) as memory:
        turns = []
        for number in range(260):
            turns.append(memory.begin(body(f"restart service number {number}"), options=Options(mode="write")))
            memory.finish(turns[-1], response(f"restarted {number}"))
        told = [{"trace_id": t.trace_id, "metric": "success", "value": True, "source": "code"} for t in turns]
        memory.feedback(told)
        files, asked = memory.store.index_files(), "restart service number 77"
        assert files is not None
        vector = memory.encoder.vector(asked, 5)
        assert vector is not None
        name = files.name(SCOPE, memory.encoder.fingerprint)
        recaller = Retriever(memory.store.recall, *workers(), files, SMALL)
        deadline = time.monotonic() + PATIENCE_S
        while not files.exists(name) and time.monotonic() < deadline:
            recaller.near(SCOPE, vector, memory.store.recall.revision(SCOPE), fingerprint=memory.encoder.fingerprint,
                          unrelated=UNRELATED, count=5)  # fmt: skip
            time.sleep(0.01)
        recaller.close()
        for _ in range(2):
            recaller = Retriever(memory.store.recall, *workers(), files, SMALL)
            hits = recaller.recall(SCOPE, asked, lambda: vector, fingerprint=memory.encoder.fingerprint)
            assert hits[0].memory.answer == "restarted 77"
            assert hits[0].cosine == pytest.approx(1, abs=1e-4)
            recaller.close()
        assert folder_of(tmp_path / "memory.db").is_dir()
        assert files.forget(SCOPE) == 1


def test_a_scope_is_brought_up_to_date_while_the_encoder_works() -> None:
    """What a request needs of the table it reads before it waits for its vector; another length of vector is heeded."""
    source, seen, reads = TableSource(), list[tuple[int, int]](), list[int]()
    source.put(numbered(clustered(30, WHOLE)))

    class Told(TableSource):
        def memories(self, scope: Scope, numbers: Iterable[int]) -> Mapping[int, MemoryRecord]:
            return {n: record(n) for n in numbers}

        def sample(self, scope: Scope, fingerprint: str, limit: int) -> list[tuple[str, bytes]]:
            return []

        def changes(self, scope: Scope, since: int, fingerprint: str, limit: int) -> list[Change]:
            reads.append(since)
            return super().changes(scope, since, fingerprint, limit)

    told = Told()
    told.rows, told.at = source.rows, source.at
    recaller = Retriever(told, *workers(), None, SMALL)

    def asked(query: Vectors) -> list[int]:
        def encoded() -> Vectors:
            seen.append((len(reads), len(query)))
            return query

        hits = recaller.recall(SCOPE, "task", encoded, fingerprint=FINGERPRINT, unrelated=UNRELATED)
        return [int(hit.memory.memory_id) for hit in hits]

    try:
        assert asked(unit(np.ones(WHOLE))) == []
        told.put({99: unit(np.ones(WHOLE))})
        before = len(reads)
        assert asked(unit(np.ones(WHOLE)))[0] == 99
        assert seen[-1] == (before + 1, WHOLE)  # it had read what came since when it began to wait
        assert len(reads) == before + 1
        told.put(dict.fromkeys(told.rows))
        told.put({7: unit(np.ones(8))})
        assert asked(unit(np.ones(8))) == [7]
    finally:
        recaller.close()


def record(number: int) -> MemoryRecord:
    """Return a memory of a number."""
    return MemoryRecord(str(number), "exemplar", "verified", SCOPE, f"task {number}", "done", "", 1, 0, 0, 0, 0.0)
