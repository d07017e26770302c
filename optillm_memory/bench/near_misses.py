"""`bench near-misses`: whether `b` gets the answer to `a`, if they mean the same and if they only look alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optillm_memory.bench.in_process import Upstream, Variant, ask, cached_encoder, empty_memory, run, send_feedback
from optillm_memory.bench.rows import read_rows, text_field
from optillm_memory.bench.stream import oracle
from optillm_memory.bench.tasks import Task
from optillm_memory.errors import InvalidField
from optillm_memory.memory import Memory

PAIRS = Path(__file__).with_name("near_misses.jsonl")
SHADOW, SEED = Variant("shadow", {}), Variant("seed", {"mode": "write"})


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions; `same_answer` if one is answered by the answer to the other."""

    a: str
    b: str
    same_answer: bool
    category: str


def load_pairs(path: Path | None = None) -> list[Pair]:
    """Read pairs from a JSONL file with `a`, `b`, `same_answer` and optionally `category`; the default is ours.

    Raises InvalidField, naming the line, for a row that is not of this shape, and OSError.
    """
    return [_pair(row, place) for row, place in read_rows(path or PAIRS)]


def _pair(row: Mapping[str, Any], place: str) -> Pair:
    if not isinstance(same := row.get("same_answer"), bool):
        raise InvalidField("same_answer", f"must be true or false in {place}, but is {same!r:.80}")
    category = str(row.get("category", ""))
    return Pair(text_field(row, "a", place), text_field(row, "b", place), same, category)


def measure(
    pairs: Sequence[Pair],
    traffic: Sequence[Task],
    *,
    max_error: float,
    seed: int,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the shares served among pairs with the same answer and with different answers, with and without traffic.

    The gate learns from the traffic in shadow mode; then each `a` is stored with a verified answer of its own, and
    each `b` is asked with `reuse`. The gate learns nothing from the pairs.
    """
    say("encoding the questions")
    encoder = cached_encoder([t.input for t in traffic] + [q for p in pairs for q in (p.a, p.b)])
    upstream = oracle(0.7, traffic, seed)
    figures: dict[str, Any] = {}
    for name, before in (("", traffic), ("uncalibrated_", ())):
        with empty_memory(encoder, reuse_audit=0.0) as memory:
            run(memory, before, upstream, SHADOW, tick=tick)
            memory.settle()
            figures |= {name + key: value for key, value in _served(memory, pairs, max_error).items()}
    return figures


def _served(memory: Memory, pairs: Sequence[Pair], max_error: float) -> dict[str, Any]:
    for number, pair in enumerate(pairs):
        answer = f"answer {number}"
        turn, _, _ = ask(memory, pair.a, lambda _request, answer=answer: answer, SEED)  # type: ignore[misc]
        send_feedback(memory, turn, Task(pair.a, answer), right=True)
    variant = Variant("gate", {"mode": "read", "reuse": {"max_error": max_error}})
    refusing: Upstream = lambda _request: ""  # noqa: E731
    served: Counter[tuple[bool, str]] = Counter()
    reasons: Counter[str] = Counter()
    asked = Counter((pair.same_answer, pair.category) for pair in pairs)
    for number, pair in enumerate(pairs):
        turn, answer, _ = ask(memory, pair.b, refusing, variant)
        reasons[turn.decision.reason if turn.decision else "not_considered"] += 1
        # Where `b` is the `a` of another pair, it is rightly answered with that one's answer.
        served[pair.same_answer, pair.category] += answer == f"answer {number}"
    return {
        "differing_served": _share(served, asked, same=False),
        "same_served": _share(served, asked, same=True),
        "reasons": dict(reasons),
        "by_category": {
            category: round(served[same, category] / count, 4) for (same, category), count in sorted(asked.items())
        },
    }


def _share(served: Mapping[tuple[bool, str], int], asked: Mapping[tuple[bool, str], int], *, same: bool) -> float:
    total = sum(count for (alike, _), count in asked.items() if alike == same)
    return round(sum(count for (alike, _), count in served.items() if alike == same) / total, 4) if total else 0.0
