"""`python -m benchmarks ann`: our own vector index beside faiss, usearch and hnswlib, each in processes of its own.

All index the same vectors and answer the same questions, one at a time. Each is set to the least effort at which it
finds as much as ours does; where none is enough it is left at its best. The contestants take turns, so that a machine
that is busy is busy for all of them, and what counts is the ratio of their times.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.ann_indexes import KINDS, PACKAGES, Vectors, version_of
from benchmarks.ann_worker import NEAREST, Contestant, Figures, recall_of, running
from optillm_memory.bench.records import Records
from optillm_memory.bench.report import quantile, report

QUERIES, ROUNDS = 400, 5
_TUNED_ON = 200  # questions that the effort is chosen on; the figures are of all
_SAME_RECALL = 0.005  # so much lower a recall counts as the same
_CHANGES, _CHANGED_SHARE = 1_000, 0.01  # rows inserted, and deleted: so many, or this share of all
_KNOWN = 20  # deleted rows that are looked for on disk
_RATIO = 1.3  # of our time and of our memory, within which a library replaces ours
SIMD = ("all", "avx2")


class Questions(NamedTuple):
    """What is asked, and what the nearest rows are."""

    queries: Vectors
    nearest: NDArray[np.int64]
    inserted: Vectors  # rows that come later, numbered from the number of records on
    deleted: NDArray[np.int64]
    nearest_after: NDArray[np.int64]  # with what was inserted and without what was deleted


def questions(records: Records, count: int = QUERIES) -> Questions:
    """Draw questions and changes, and compare each question with every row."""
    changes = min(_CHANGES, int(records.size * _CHANGED_SHARE))
    asked = np.stack([vector for _, vector in records.queries(count)])
    some = records.block(0)[:changes]  # what comes later is like what is there
    blends = np.sqrt(np.float32(0.8)) * some + np.sqrt(np.float32(0.2)) * some[::-1]
    inserted = np.asarray(blends / np.linalg.norm(blends, axis=1, keepdims=True), dtype=np.float32)
    nearest = nearest_of(asked, records.blocks(), NEAREST)
    after = nearest_of(asked, chain(records.blocks(), [(records.size, inserted)]), 4 * NEAREST)
    # Half of what is deleted would be found otherwise, the rest is anything.
    rng = np.random.default_rng(5)
    hit = rng.permutation(np.unique(nearest))[: changes // 2]
    deleted = np.unique(np.concatenate([hit, rng.integers(records.size, size=changes - len(hit))]))
    after = np.stack([row[~np.isin(row, deleted)][:NEAREST] for row in after])
    return Questions(asked, nearest, inserted, deleted, after)


def nearest_of(asked: Vectors, blocks: Iterable[tuple[int, Vectors]], count: int) -> NDArray[np.int64]:
    """Return the numbers of the `count` rows nearest to each question, best first, by comparing with every row."""
    best = np.full((len(asked), count), -2.0, dtype=np.float32)
    numbers = np.full((len(asked), count), -1, dtype=np.int64)
    for start, block in blocks:
        scores = np.hstack([best, asked @ block.T])
        named = np.hstack([numbers, np.broadcast_to(np.arange(start, start + len(block)), (len(asked), len(block)))])
        order = np.argpartition(-scores, count, axis=1)[:, :count]
        best, numbers = np.take_along_axis(scores, order, 1), np.take_along_axis(named, order, 1)
    return np.take_along_axis(numbers, np.argsort(-best, axis=1), 1)


# -- the whole -------------------------------------------------------------------------------------


def run(
    sizes: Sequence[int], names: Sequence[str], *, seed: int = 0, count: int = QUERIES, rounds: int = ROUNDS,
    simd: Sequence[str] = SIMD, say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Return for each size and each contestant that is installed what was measured, and the verdict on each.

    Times are of single queries in milliseconds, memory beyond that of the process without an index, in MB:
    `private_mb` is what the kernel cannot take back, `rss_mb` has the mapped pages too. Figures of one set of
    instructions are prefixed by its name, `changed_` are with 1 % inserted and 1 % deleted. `ratio` is the median time
    in relation to ours in the same rounds.
    """
    figures: dict[str, Any] = {}
    present = [name for name in names if version_of(name) is not None]
    for name in set(names) - set(present):
        say(f"{name} is not installed: pip install {PACKAGES[name.partition('-')[0]]}")
    for size in sizes:
        say(f"{size} rows: the true neighbours of {count} questions")
        asked = questions(Records(size, seed), count)
        with tempfile.TemporaryDirectory(prefix="optillm-memory-ann-") as path:
            folder = Path(path)
            found: dict[str, Figures] = {}
            for name in present:
                say(f"{size} rows: {name}: build")
                (folder / name).mkdir()
                with running([name], folder) as (contestant,):
                    found[name] = contestant.do("build", size, seed)
            for kind in simd:
                say(f"{size} rows: questions, instructions: {kind}")
                _ask(found, folder, asked, kind, rounds)
            say(f"{size} rows: inserts and deletes")
            _change(found, folder, asked, size, seed, rounds, say)
        figures[str(size)] = {
            name: {key: round(value, 4) for key, value in {**own, **_ratios(own, found.get("ours", own))}.items()}
            for name, own in found.items()
        }
    figures["verdict"] = verdict({size: figures[size] for size in map(str, sizes)})
    return figures


def _ask(found: dict[str, Figures], folder: Path, asked: Questions, simd: str, rounds: int) -> None:
    """Open all contestants in fresh processes, have each find as much as ours does, and ask them in turns."""
    for name in found:
        _out_of_page_cache(folder / name)
    with running(list(found), folder, simd) as contestants:
        for each in contestants:
            own = found[each.name]
            own[f"{simd}_masked"] = float(each.do("masked"))
            own |= {f"{simd}_{key}": value for key, value in each.do("open", asked.queries[0], writable=False).items()}
        target = 1.0
        some = slice(_TUNED_ON)
        for each in contestants:
            own = found[each.name]
            if simd == "all" or "effort" not in own:
                own["effort"] = each.do("tune", asked.queries[some], asked.nearest[some], target - _SAME_RECALL)
            each.do("set_effort", int(own["effort"]))
            if each.name == "ours":
                target = recall_of(each.do("ask", asked.queries[some])[1], asked.nearest[some])
        _turns(found, contestants, asked.queries, asked.nearest, rounds, f"{simd}_")


def _change(
    found: dict[str, Figures], folder: Path, asked: Questions, size: int, seed: int, rounds: int,
    say: Callable[[str], object],
) -> None:  # fmt: skip
    known = asked.deleted[:_KNOWN]
    vectors = _rows(Records(size, seed), known)
    with running(list(found), folder) as contestants:
        patterns = {}
        for each in contestants:
            each.do("open", asked.queries[0], writable=True)
            each.do("set_effort", int(found[each.name]["effort"]))
            patterns[each.name] = each.do("stored", known, vectors)
            found[each.name] |= each.do("change", asked.inserted, asked.deleted, size)
        _turns(found, contestants, asked.queries, asked.nearest_after, rounds, "changed_", asked.deleted)
        for each in contestants:
            say(f"{size} rows: {each.name}: forgetting")
            found[each.name] |= each.do("forget", patterns[each.name])


def _turns(
    found: dict[str, Figures], contestants: Sequence[Contestant], queries: Vectors, nearest: NDArray[np.int64],
    rounds: int, prefix: str, deleted: NDArray[np.int64] | None = None,
) -> None:  # fmt: skip
    """Ask all contestants the same questions in turns, the first round not counted."""
    times: dict[str, list[float]] = {each.name: [] for each in contestants}
    for number in range(rounds + 1):
        for each in contestants:
            part, answers = each.do("ask", queries)
            times[each.name] += part if number else []
            if number == 0:
                own = found[each.name]
                own[f"{prefix}recall_at_10"] = recall_of(answers, nearest)
                if deleted is not None:
                    own["deleted_but_found"] = len(set(deleted.tolist()).intersection(*[set().union(*answers)]))
    for each in contestants:
        own = found[each.name]
        own |= {f"{prefix}p{share}_ms": quantile(times[each.name], share / 100) for share in (50, 99)}
        own |= {f"{prefix}{key}": value for key, value in each.do("memory").items()}


def _ratios(theirs: Mapping[str, float], ours: Mapping[str, float]) -> Figures:
    """Return the median times in relation to ours."""
    keys = [key for key in theirs if key.endswith("p50_ms")]
    return {key.replace("p50_ms", "ratio"): theirs[key] / max(ours[key], 1e-9) for key in keys}


def verdict(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, str]:
    """Return for each library why it does not replace ours; `replaces ours` where nothing speaks against it."""
    reasons: dict[str, list[str]] = {}
    for size, found in figures.items():
        ours = found.get("ours")
        for name, theirs in found.items():
            if name == "ours" or ours is None:
                continue
            why = reasons.setdefault(name, [])
            for key in [key for key in theirs if key.endswith("_ratio")]:
                kind = key.removesuffix("_ratio")
                if theirs[f"{kind}_recall_at_10"] < ours[f"{kind}_recall_at_10"] - 2 * _SAME_RECALL:
                    why.append(f"{size}, {kind}: finds {theirs[f'{kind}_recall_at_10']:.3f} at most")
                if theirs[key] > _RATIO:
                    why.append(f"{size}, {kind}: {theirs[key]:.1f} times our time")
            if theirs["changed_rss_mb"] > _RATIO * ours["changed_rss_mb"]:
                why.append(f"{size}: {theirs['changed_rss_mb'] / ours['changed_rss_mb']:.1f} times our memory")
            if theirs["left_after_purge"]:
                why.append(f"{size}: deleted rows stay on disk")
            elif theirs["left_after_save"] and theirs["purge_cpu_s"] > _RATIO * ours["purge_cpu_s"]:
                why.append(f"{size}: {theirs['purge_cpu_s']:.0f} CPU s to forget, ours {ours['purge_cpu_s']:.0f}")
    return {name: "; ".join(why) or "replaces ours" for name, why in reasons.items()}


_COLUMNS = {
    "p50 / p99 ms": ("all_p50_ms", "all_p99_ms"), "AVX2": ("avx2_p50_ms", "avx2_p99_ms"),
    "changed": ("changed_p50_ms", "changed_p99_ms"), "recall@10": ("all_recall_at_10",),
    "RSS MB, changed": ("all_rss_mb", "changed_rss_mb"), "private MB while purged": ("purge_private_mb",),
    "build s / CPU s": ("build_s", "build_cpu_s"),
    "bytes a row": ("bytes_per_row",), "open s / first ms": ("all_open_s", "all_first_ms"),
    "insert / delete ms": ("insert_ms", "delete_ms"),
    "left of 20: saved / purged": ("left_after_save", "left_after_purge"),
    "purge s / CPU s": ("purge_s", "purge_cpu_s"),
}  # fmt: skip


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table, one line for each size and contestant."""
    lines = [f"| rows | index | {' | '.join(_COLUMNS)} |", f"|---|---|{'---|' * len(_COLUMNS)}"]
    for size, found in figures.items():
        if size == "verdict":
            continue
        for name, own in found.items():
            cells = {
                column: " / ".join(f"{own[key]:.3g}" if key in own else "-" for key in keys)
                for column, keys in _COLUMNS.items()
            }
            if not own.get("avx2_masked", 1.0):
                cells["AVX2"] += " (not masked)"
            lines.append(f"| {int(size):,} | {name} | {' | '.join(cells.values())} |")
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in figures["verdict"].items())])


def _rows(records: Records, numbers: NDArray[np.int64]) -> Vectors:
    """Return the vectors of some records."""
    found = {}
    for start, block in records.blocks():
        for number in numbers[(numbers >= start) & (numbers < start + len(block))].tolist():
            found[number] = block[number - start]
    return np.stack([found[number] for number in numbers.tolist()])


def _out_of_page_cache(folder: Path) -> None:
    """Have the kernel let go of what it keeps of the files, so that they are read from disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command("ann")
@click.option("--rows", "sizes", type=int, multiple=True, default=(100_000,), show_default=True, help="Rows; repeat.")
@click.option("--index", "names", type=click.Choice(list(KINDS)), multiple=True, default=tuple(KINDS),
              help="A contestant; repeat. All that are installed by default.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of the vectors and questions.")
@click.option("--rounds", default=ROUNDS, show_default=True, help="Times that all questions are asked.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures to this file as JSON.")
def ann(sizes: tuple[int, ...], names: tuple[str, ...], seed: int, rounds: int, output: Path | None) -> None:
    """Compare our own vector index with faiss, usearch and hnswlib."""
    started = time.perf_counter()
    figures = run(
        sizes, names, seed=seed, rounds=rounds,
        say=lambda text: click.echo(f"{time.perf_counter() - started:6.0f} s  {text}", err=True),
    )  # fmt: skip
    versions = {name: version_of(name) or "not installed" for name in names}
    settings = {"rows": list(sizes), "seed": seed, "rounds": rounds, "queries": QUERIES, "contestants": versions}
    if output is not None:
        output.write_text(json.dumps(report(figures, settings), indent=2) + "\n", encoding="utf-8")
    click.echo(table(figures))


if __name__ == "__main__":
    ann()
