"""Affinity of failing cases: similarity of the program, the form of the action, and the output."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from itertools import pairwise

from optillm_memory.learn.cases import ERROR_WORD, Case, balanced

_MOST_WORDS = 120  # of an output
_BOTH_PROPOSE, _SAME_FAULT = 2.0, 1.0
_WORD = re.compile(r"[a-z]{2,}")
_TOKEN = re.compile(r"\w+|#")
_MASK = re.compile(r"""'[^'\n]{1,200}'|"[^"\n]{1,200}"|`[^`'\n]{1,200}[`']|[\w.~/+-]*/[\w.~/+-]*|\d+""")


class Features:
    """The features of a case that decide its affinity to another."""

    def __init__(self, case: Case) -> None:
        own = set(re.findall(r"\w+", case.action[:4_000].lower()))
        text = case.output[:3_000].lower()
        self.empty = not text.strip()
        self.words = set(list(dict.fromkeys(w for w in _WORD.findall(text) if w not in own))[:_MOST_WORDS])
        # The first line with an error, without quoted texts, paths, numbers and words of the action.
        lines = [line.strip() for line in case.lines if line.strip()]
        salient = next((line for line in lines if ERROR_WORD.search(line)), lines[0] if lines else "")
        self.line = set(_TOKEN.findall(_MASK.sub(" # ", salient[:400].lower()))) - own - {"#"}
        self.program = case.program
        self.rest = set(case.tokens[case.head + 1 :])
        self.shape = [_kind(token) for token in case.tokens[case.head :]]
        self.subcommand = case.tokens[case.arguments[0]] if case.arguments else ""
        self.fault = case.named[0][0] - case.head if case.named else None
        self.proposes = bool(case.suggested)
        self.faults = set(case.quoted[:3])
        self.quoted = bool(case.named) and case.named[0][1] in case.quoted
        self._case = case

    @cached_property
    def keys(self) -> list[str]:
        """What cases of a high affinity are likely to share, for an index."""
        found = [f"w {w}" for w in self.words] + [f"l {w}" for w in self.line] + [f"q {w}" for w in self.faults]
        found += [f"r {w}" for w in self.rest] + [f"p {self.program}", f"s {self.program} {self.subcommand}"]
        return [*found, f"h {' '.join(self.shape[:12])}", f"t {' '.join(sorted(self.traits))}"]

    @cached_property
    def traits(self) -> set[str]:
        """Unusual properties of the action's form."""
        tokens = self._case.tokens
        found = {"unbalanced": not balanced(self._case.action), "repeats": repeats(self._case.action)}
        found |= {"operator": "operator" in self.shape, "address": "address" in self.shape, "alone": len(tokens) == 1}
        found |= {f"head {kind}": self.shape[:1] == [kind] for kind in ("here", "path", "dotted")}
        if tokens:
            found |= {
                "folder": tokens[-1].endswith("/"),
                "symbol": not tokens[0][0].isalnum() and tokens[0][0] not in "./~",
            }
        return {name for name, there in found.items() if there}

    def affinity(self, other: Features, words: Mapping[str, float], line: Mapping[str, float]) -> float:
        """Return the affinity to another case: a weighted sum of similarities, about 12 for the same case again.

        `words` and `line` are the IDF weights of output words and of words in error lines.
        """
        same = self.program == other.program
        silent = self.empty and other.empty
        alike = 3.0 * _overlap(self.words, other.words, words) + 2.0 * _overlap(self.line, other.line, line)
        alike += 2.0 * same + 1.0 * (same and silent) + 1.5 * _jaccard(self.rest, other.rest)
        alike += 1.0 * (bool(self.subcommand) and self.subcommand == other.subcommand)
        alike += 1.0 * (self.shape == other.shape) + 0.5 * (self.fault == other.fault)
        alike += _SAME_FAULT * _jaccard(self.faults, other.faults)
        alike += _BOTH_PROPOSE * (self.proposes and other.proposes)
        alike += 0.5 * (self.quoted == other.quoted) + (2.5 if silent else 1.5) * _jaccard(self.traits, other.traits)
        return alike


def _kind(token: str) -> str:
    if not any(c.isalnum() for c in token):
        return "path" if token in ("/", ".", "~") else "operator"
    if token.startswith(("-", "./")):
        return "flag" if token[0] == "-" else "here"
    for sign, kind in (("://", "address"), ("/", "path"), (".", "dotted")):
        if sign in token:
            return kind
    return "quoted" if token[0] in "\"'" else "word" if token.isalpha() else "other"


class Rarity:
    """Inverse document frequencies of words, counted set by set; the empty word stands for unseen ones."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._sets = 0
        self._kept: dict[str, float] = {}
        self._at = 0

    def add(self, words: Collection[str]) -> None:
        """Count one more set."""
        self._counts.update(words)
        self._sets += 1

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each word; brought up to date when the sets have grown by a tenth."""
        if self._at == 0 or self._sets > 1.1 * self._at:
            total = self._at = max(self._sets, 1)
            self._kept = {word: math.log(1 + total / n) for word, n in self._counts.items()}
            self._kept[""] = math.log(1 + total)
        return self._kept


def _overlap(a: set[str], b: set[str], rarity: Mapping[str, float]) -> float:
    both = a & b
    if not both:
        return 0.0
    unseen = rarity[""]
    common = sum([rarity.get(w, unseen) for w in both])
    return common / (common + sum([rarity.get(w, unseen) for w in a ^ b]))


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def repeats(action: str) -> bool:
    """Whether a word occurs twice in a row in an action."""
    words = action.split()
    return any(a == b for a, b in pairwise(words))
