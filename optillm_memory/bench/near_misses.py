"""`bench near-misses`: whether `b` gets `a`'s answer, where the two are alike and where they only look it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optillm_memory.bench.local import Upstream, Way, ask, empty_memory, remembering, run, tell
from optillm_memory.bench.stream import oracle
from optillm_memory.bench.tasks import Task
from optillm_memory.errors import InvalidField
from optillm_memory.memory import Memory

PAIRS = Path(__file__).with_name("near_misses.jsonl")
SHADOW, SEED = Way("shadow", {}), Way("seed", {"mode": "write"})


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions; `same_answer` where one's answer is the other's."""

    a: str
    b: str
    same_answer: bool
    category: str


def load_pairs(path: Path | None = None) -> list[Pair]:
    """Read pairs from a JSONL file with `a`, `b`, `same_answer` and perhaps `category`; without a path, our own.

    Raises InvalidField, naming the line, for a row that is not of this shape.
    """
    file = path or PAIRS
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            a, b, same = row["a"], row["b"], row["same_answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidField("row", f"{file}, line {number}: needs a, b and same_answer ({error!r})") from error
        pairs.append(Pair(str(a), str(b), bool(same), str(row.get("category", ""))))
    if not pairs:
        raise InvalidField("file", f"{file} holds no rows")
    return pairs


def measure(
    pairs: Sequence[Pair],
    traffic: Sequence[Task],
    *,
    max_error: float,
    seed: int,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the shares served among pairs that differ and that do not, after other traffic and without any.

    The gate learns from the traffic in shadow; then each `a` is put into memory, verified with an answer of its own,
    and each `b` is asked with `reuse`. The gate learns nothing from the pairs.
    """
    say("encoding the questions")
    encoder = remembering([t.input for t in traffic] + [q for p in pairs for q in (p.a, p.b)])
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
        tell(memory, turn, Task(pair.a, answer), right=True)
    way = Way("gate", {"mode": "read", "reuse": {"max_error": max_error}})
    refusing: Upstream = lambda _request: ""  # noqa: E731
    served: Counter[tuple[bool, str]] = Counter()
    reasons: Counter[str] = Counter()
    asked = Counter((pair.same_answer, pair.category) for pair in pairs)
    for number, pair in enumerate(pairs):
        turn, answer, _ = ask(memory, pair.b, refusing, way)
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
