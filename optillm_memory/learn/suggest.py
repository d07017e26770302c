"""Placeholder until the ranking is in: the simplest program of the most similar example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optillm_memory.learn.cases import Case
from optillm_memory.learn.edits import apply
from optillm_memory.learn.induce import induce


@dataclass(frozen=True, slots=True)
class Example:
    action: str
    output: str
    fix: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Suggestion:
    action: str
    confidence: float
    support: tuple[int, ...]


class FixBook:
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def suggest(self, action: str, output: str, *, min_confidence: float = 0.0) -> Suggestion | None:
        words = set((action + " " + output).split())
        best = None
        for i, e in enumerate(self.examples):
            other = set((e.action + " " + e.output).split())
            score = len(words & other) / max(len(words | other), 1)
            if e.action == action:
                score += 1
            for p in induce(Case(e.action, e.output), e.fix)[:3]:
                made = apply(p, Case(action, output))
                if made and (best is None or score > best[0]):
                    best = (score, made, i)
                    break
        if best is None or best[0] < 0.3:
            return None
        return Suggestion(best[1], min(0.9, best[0]), (best[2],))
