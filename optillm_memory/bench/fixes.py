"""`bench fixes`: how often memory suggests the right correction of a failing action, and how calibrated it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optillm_memory.bench.report import quantile
from optillm_memory.bench.rows import read_rows, text_field
from optillm_memory.errors import InvalidField
from optillm_memory.learn.suggest import Calibrator, Candidate, Example, FixBook, best, kind_of, normal

FIX_CASES = Path(__file__).with_name("fix_cases.jsonl")
FOLDS = 10
WANTED = 0.95
_BINS = 10
_EVERY = 20  # results after which the calibrator of the stream is fitted again
_TIMED = 500  # rows that are timed


@dataclass(frozen=True, slots=True)
class Row:
    """A failing command with its output and the acceptable corrections, best first; `group` is for scoring."""

    command: str
    output: str
    fix: tuple[str, ...]
    group: str | None = None

    def example(self) -> Example:
        """Return the row as memory stores it: with its best correction."""
        return Example(self.command, self.output, self.fix[0])

    def accepts(self, action: str) -> bool:
        """Tell whether an action is one of the acceptable corrections, white space aside."""
        return normal(action) in {normal(fix) for fix in self.fix}


@dataclass(frozen=True, slots=True)
class Answer:
    """The suggestion for a row: its confidence (0 if there was none) and whether it was right."""

    confidence: float
    right: bool


def load_rows(path: Path | None = None) -> list[Row]:
    """Read rows from a JSONL file with `command`, `output`, `fix` and optionally `group`; the default is ours.

    `fix` is a text or a list of texts. Further fields and empty lines are ignored. Raises InvalidField, naming the
    field with its file and line, for a bad row and a file without rows, and OSError where the file cannot be read.
    """
    return [_row(row, place) for row, place in read_rows(path or FIX_CASES)]


def run(rows: Sequence[Row], *, tick: Callable[[int], None] = lambda _done: None) -> dict[str, Any]:
    """Measure suggestions for rows; return the figures, those of the stream under `stream`.

    Leave-one-out: each row is predicted from all the others. The calibrator of its confidence is fitted to rows of
    other groups only, so the figures tell how far a confidence can be trusted with errors of a kind not seen before.
    Rows without a group are grouped by program and error. Stream: row i is predicted from the rows before it, with a
    calibrator fitted to their results. `replay`, the baseline, repeats the nearest example's correction unchanged.
    `learn_ms` is the time to learn a row in the stream. Ticks twice per row.
    """
    answers, replayed = _leave_one_out(rows, tick)
    streamed, stream_replayed, taken, learned = _stream(rows, tick)
    return {
        "rows": len(rows),
        **figures(answers),
        "top1_learnable": _learnable(answers, rows),
        "ms_p50": _milliseconds(rows),
        "replay": _share(replayed),
        "stream": {
            **figures(streamed),
            "top1_learnable": _learnable(streamed, rows),
            "ms_p50": round(quantile(taken, 0.5), 2),
            "learn_ms_p50": round(quantile(learned, 0.5), 2),
            "learn_ms_mean": round(sum(learned) / len(learned), 2),
            "replay": _share(stream_replayed),
        },
    }


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return `top1`, `answered`, `coverage_at_95` and `calibration_error` of answers."""
    return {
        "top1": top1(answers),
        "answered": _share([a.confidence > 0 for a in answers]),
        "coverage_at_95": coverage(answers),
        "calibration_error": calibration_error(answers),
    }


def top1(answers: Sequence[Answer]) -> float:
    """Return the share of right answers."""
    return _share([a.right for a in answers])


def _learnable(answers: Sequence[Answer], rows: Sequence[Row]) -> float | None:
    groups = Counter(row.group for row in rows)
    kept = [a for a, row in zip(answers, rows, strict=True) if groups[row.group] > 1]
    return top1(kept) if kept and None not in groups else None


def coverage(answers: Sequence[Answer], wanted: float = WANTED) -> float:
    """Return the largest share of rows, in the order of decreasing confidence, of which at least `wanted` are right.

    Equal confidences are included together or not at all.
    """
    ordered = sorted(answers, key=lambda a: -a.confidence)
    most = right = 0
    for taken, answer in enumerate(ordered, start=1):
        right += answer.right
        last = taken == len(ordered) or ordered[taken].confidence < answer.confidence
        if last and answer.confidence > 0 and right >= wanted * taken:
            most = taken
    return round(most / len(answers), 4) if answers else 0.0


def calibration_error(answers: Sequence[Answer]) -> float:
    """Return the expected calibration error of the suggestions, over ten bins of equal count (Naeini et al. 2015)."""
    ordered = sorted((a for a in answers if a.confidence > 0), key=lambda a: a.confidence)
    total = 0.0
    for number in range(_BINS):
        part = ordered[number * len(ordered) // _BINS : (number + 1) * len(ordered) // _BINS]
        total += abs(sum(a.confidence - a.right for a in part))
    return round(total / len(ordered), 4) if ordered else 0.0


def _leave_one_out(rows: Sequence[Row], tick: Callable[[int], None]) -> tuple[list[Answer], list[bool]]:
    book = FixBook(row.example() for row in rows)
    found: list[list[Candidate]] = []
    replayed: list[bool] = []
    for index, row in enumerate(rows):
        found.append(book.candidates(row.command, row.output, without=index))
        nearest = book.nearest(row.command, row.output, without=index)
        replayed.append(nearest is not None and row.accepts(book.examples[nearest].fix))
        tick(index + 1)
    folds = _folds(rows)
    calibrators = [_calibrator(rows, found, folds, fold) for fold in range(FOLDS)]
    answers = [
        _answer(row, best(candidates, calibrators[fold]), calibrators[fold])
        for row, candidates, fold in zip(rows, found, folds, strict=True)
    ]
    return answers, replayed


def _folds(rows: Sequence[Row]) -> list[int]:
    """Return the fold of each row; rows of a group are in the same one."""
    names = [row.group if row.group is not None else kind_of(row.command, row.output) for row in rows]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [order[name] % FOLDS for name in names]


def _calibrator(
    rows: Sequence[Row], found: Sequence[Sequence[Candidate]], folds: Sequence[int], fold: int
) -> Calibrator:
    features, right = [], []
    for row, candidates, own in zip(rows, found, folds, strict=True):
        if own != fold and (first := best(candidates, Calibrator())) is not None:
            features.append(first.features)
            right.append(row.accepts(first.made))
    return Calibrator().fitted(features, right)


def _answer(row: Row, candidate: Candidate | None, calibrator: Calibrator) -> Answer:
    if candidate is None:
        return Answer(0.0, right=False)
    return Answer(calibrator(candidate.features), row.accepts(candidate.made))


def _stream(
    rows: Sequence[Row], tick: Callable[[int], None]
) -> tuple[list[Answer], list[bool], list[float], list[float]]:
    book = FixBook()
    answers: list[Answer] = []
    replayed: list[bool] = []
    features: list[tuple[float, ...]] = []
    right: list[bool] = []
    taken: list[float] = []
    learned: list[float] = []
    for index, row in enumerate(rows):
        started = time.perf_counter()
        found = book.best(row.command, row.output)
        taken.append(1000 * (time.perf_counter() - started))
        answers.append(_answer(row, found, book.calibrator))
        if found is not None:
            features.append(found.features)
            right.append(answers[-1].right)
            if len(right) < _EVERY or len(right) % _EVERY == 0:
                book.calibrator = Calibrator().fitted(features, right)
        nearest = book.nearest(row.command, row.output)
        replayed.append(nearest is not None and row.accepts(book.examples[nearest].fix))
        started = time.perf_counter()
        book.learn(book.add(row.example()))
        learned.append(1000 * (time.perf_counter() - started))
        tick(len(rows) + index + 1)
    return answers, replayed, taken, learned


def _milliseconds(rows: Sequence[Row]) -> float:
    # A suggestion from a book of all rows that has learned them, as in a server that has been up for a while.
    book = FixBook(row.example() for row in rows)
    sample = rows[:: max(1, len(rows) // _TIMED)]
    for row in sample:
        book.suggest(row.command, row.output)
    taken = []
    for row in sample:
        started = time.perf_counter()
        book.suggest(row.command, row.output)
        taken.append(1000 * (time.perf_counter() - started))
    return round(quantile(taken, 0.5), 2)


def _share(values: Iterable[bool]) -> float:
    kept = list(values)
    return round(sum(kept) / len(kept), 4) if kept else 0.0


def _row(row: dict[str, Any], place: str) -> Row:
    fix = row.get("fix")
    fixes = [fix] if isinstance(fix, str) else fix
    if not isinstance(fixes, list) or not fixes or not all(isinstance(f, str) and f.strip() for f in fixes):
        raise InvalidField("fix", f"must be a text or a list of texts, none empty, in {place}, but is {fix!r:.80}")
    group = row.get("group")
    if group is not None and not isinstance(group, str):
        raise InvalidField("group", f"must be a text in {place}, but is {group!r:.80}")
    return Row(text_field(row, "command", place), text_field(row, "output", place, empty=True), tuple(fixes), group)
