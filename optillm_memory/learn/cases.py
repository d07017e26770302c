"""A case: a failing action and its output, with the parts that edit programs refer to."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import cached_property

_TOKEN = re.compile(r"""(?:'[^'\n]{0,2000}'|"[^"\n]{0,2000}"|\\.|[^\s'"\\])+|\S""")
_QUOTED = re.compile(
    r"""(?<![\w])(?:'((?:[^'\n]|(?<=\w)'(?=\w)){1,200})'|"([^"\n]{1,200})"|`([^`'\n]{1,200})[`'])(?!\w)"""
)
_WORD = re.compile(r"[\w.+@%~/:-]+")
_SUGGESTION = re.compile(
    r"did you mean|you meant|most similar|similar (?:command|choice)|perhaps you|candidates are|instead|closest",
    re.IGNORECASE,
)
ERROR_WORD = re.compile(
    r"\b(?:unknown|unrecogni[sz]ed|invalid|illegal|ambiguous|undefined|missing|error|fatal|cannot|can't|not|no such)\b",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"\s(?:&&|\|\||;|\|)\s")
_ASSIGNMENT = re.compile(r"\w{1,50}=")
_LINES, _CHARS, _WORDS, _POOL, _FAULTS = 200, 12_000, 1_500, 400, 80
WRAPPERS = frozenset(("sudo", "env", "time", "nohup", "command"))
CLOSE = 0.5
_LONG_WORD = 60


class Case:
    """One failing action with its output; each part is computed when it is first needed."""

    def __init__(self, action: str, output: str, vocabulary: Vocabulary | None = None) -> None:
        """Take the action's text and its output (a long output is shortened in the middle)."""
        self.action = action
        if len(output) > _CHARS:
            output = output[: _CHARS // 2] + "\n" + output[-_CHARS // 2 :]
        self.output = output
        self.vocabulary = vocabulary

    @cached_property
    def tokens(self) -> list[str]:
        """The action's words; a quoted text is one word, an unbalanced quote is part of a word."""
        return tokenize(self.action)

    @cached_property
    def head(self) -> int:
        """The index of the program's name, after `sudo` and the like and after assignments."""
        for index, token in enumerate(self.tokens):
            if token not in WRAPPERS and not _ASSIGNMENT.match(token):
                return index
        return 0

    @property
    def program(self) -> str:
        """The program's name without its folder."""
        return posixpath.basename(self.tokens[self.head]) if self.tokens else ""

    @cached_property
    def arguments(self) -> list[int]:
        """Indices of the words after the program's name that start with no dash."""
        return [i for i in range(self.head + 1, len(self.tokens)) if not self.tokens[i].startswith("-")]

    @cached_property
    def lines(self) -> list[str]:
        """The output's lines."""
        return self.output.splitlines()[:_LINES]

    @cached_property
    def words(self) -> list[str]:
        """The output's words, in order."""
        return _words(self.output)[:_WORDS]

    @cached_property
    def quoted(self) -> list[str]:
        """The quoted texts of the output, each once."""
        return list(dict.fromkeys(next(g for g in m.groups() if g) for m in _QUOTED.finditer(self.output)))[:12]

    @cached_property
    def named(self) -> list[tuple[int, str]]:
        """The words of the action that may be wrong, the likeliest first: (index, part of the word).

        Words quoted in the output come first, then those in a line with an error, then those that no working action
        had, then those elsewhere in the output (a usage text repeats the correct words).
        """
        quoted, in_error_lines, mentioned = set(self.quoted), self._in_error_lines, set(self.words)
        known = set(self.vocabulary.words(self.program, first=False)) if self.vocabulary else set()
        programs = set(self.vocabulary.words("", first=True)) if self.vocabulary else set()
        found: list[tuple[float, int, str]] = []
        for index, token in enumerate(self.tokens[:_FAULTS]):
            parts = [p for p in _parts(token) if len(p) > 1 and any(c.isalnum() for c in p)]
            part = next((p for p in parts if p in quoted or p in in_error_lines), None)
            part = part or next((p for p in parts if p in mentioned), None)
            strange = index == self.head and bool(programs) and self.program not in programs
            if part is None and not strange and (index <= self.head or token.startswith("-") or not parts):
                continue
            part = part or token
            score = 3.0 * (part in quoted) + 2.0 * (part in in_error_lines) - 1.0 * (part in mentioned)
            score += 0.5 * (part not in known) - 0.5 * token.startswith("-")
            score += 1.0 if strange else -1.5 * (index <= self.head)
            found.append((-score, index, part))
        return [(index, part) for _, index, part in sorted(found)]

    @cached_property
    def _in_error_lines(self) -> set[str]:
        lines = [line for line in self.lines[:40] if ERROR_WORD.search(line)][:4]
        return {w for line in lines for w in _words(line)}

    @cached_property
    def suggested(self) -> list[str]:
        """Words that the output suggests: after "did you mean" and the like, and on the indented lines that follow."""
        found: list[str] = []
        for number, line in enumerate(self.lines):
            match = _SUGGESTION.search(line)
            if not match:
                continue
            rest = line[match.end() :]
            found += [next(g for g in m.groups() if g) for m in _QUOTED.finditer(rest)] or [
                w.strip(".?!,")
                for w in _WORD.findall(rest.partition(":")[2] or rest)[-1:]
                if ":" in rest or "?" in rest
            ]
            for after in self.lines[number + 1 : number + 12]:
                words = after.split()
                if not words and found:
                    break
                if len(words) == 1:
                    found.append(words[0].strip("`'\""))
                elif words:
                    break
        known = set(self.tokens)
        return [w for w in dict.fromkeys(found) if w and w not in known and w.lower() not in ("this", "these")][:12]

    @cached_property
    def proposals(self) -> list[list[str]]:
        """Whole commands in the output, on a line of their own or quoted, as lists of words."""
        found: list[str] = []
        for line in self.lines:
            found += [g for m in _QUOTED.finditer(line) if (g := next(x for x in m.groups() if x)).count(" ")]
            text = line.strip()
            lowered = text.lower()
            for lead in ("run ", "use ", "try ", "usage: "):
                if lowered.startswith(lead):
                    text = text[len(lead) :]
            if line[:1] in " \t" and text.count(" ") and re.match(r"[\w./-]+ ", text):
                found.append(text)
        split = [words for text in dict.fromkeys(found) if (words := tokenize(text))]
        # Commands of the failing program come first: the program suggests them instead.
        split.sort(key=lambda words: posixpath.basename(words[0]) != self.program)
        return split[:6]

    def after(self, keyword: str) -> str | None:
        """Return the word that follows a keyword in the output."""
        return self._following.get(keyword.lower())

    @cached_property
    def _following(self) -> dict[str, str]:
        following: dict[str, str] = {}
        for word, after in zip(self.words, self.words[1:], strict=False):
            following.setdefault(word.lower(), after)
        return following

    def near(self, word: str, where: str) -> str | None:
        """Return the most similar word among those that the output suggests, all of its words, or known words.

        `where` is suggested, output or known; `any` takes the best of the three, with a bonus for suggested words and
        for words known of the same program.
        """
        key = (word, where)
        if key not in self._near:
            found = max(self._near_words(word, where), key=lambda pair: pair[1], default=None)
            self._near[key] = found[0] if found else None
        return self._near[key]

    def _near_words(self, word: str, where: str) -> Iterator[tuple[str, float]]:
        if where == "any":
            for source in ("suggested", "output", "known"):
                yield from self._near_words(word, source)
        elif where == "suggested":
            yield from most_similar(word, self.suggested, 0.3)
        elif where == "output":
            yield from most_similar(word, self._pool, 0.05)
        elif self.vocabulary is not None:
            first = bool(self.tokens) and word == self.tokens[self.head]
            yield from most_similar(word, self.vocabulary.words(self.program, first=first), 0.15)
            if not first:
                yield from most_similar(word, self.vocabulary.words("", first=False), 0.0)

    @cached_property
    def _pool(self) -> list[str]:
        bare = (w.lstrip("-") for w in self.words)
        return list(dict.fromkeys(w for w in (*self.words, *bare) if w))[:_POOL]

    @cached_property
    def _near(self) -> dict[tuple[str, str], str | None]:
        return {}


class Vocabulary:
    """Words of actions that worked: program names, and the words that followed each of them."""

    def __init__(self, actions: Iterable[str] = ()) -> None:
        """Count the words of actions that worked."""
        self._programs: Counter[str] = Counter()
        self._after: dict[str, Counter[str]] = {}
        for action in actions:
            self.add(action)

    def add(self, action: str) -> None:
        """Count the words of one more action that worked."""
        for program, after in _program_words(action):
            self._programs[program] += 1
            for name in (program, ""):
                self._after.setdefault(name, Counter()).update(after)

    def words(self, program: str, *, first: bool) -> Sequence[str]:
        """Return the known program names, or the words known to follow one (any, for the empty name)."""
        return tuple(self._programs) if first else tuple(self._after.get(program, ()))

    def without(self, action: str) -> Vocabulary:
        """Return a copy of the vocabulary without one of the actions that it counted."""
        other = Vocabulary()
        other._programs, other._after = self._programs, self._after
        for program, after in _program_words(action):
            other._programs = _subtracted(other._programs, [program])
            other._after = {**other._after, program: _subtracted(other._after.get(program, Counter()), after)}
            other._after[""] = _subtracted(other._after.get("", Counter()), after)
        return other


def tokenize(text: str) -> list[str]:
    """Split an action into words; a quoted text is one word, unless quotation marks are unbalanced."""
    return _TOKEN.findall(text) if balanced(text) else text.split()


def balanced(text: str) -> bool:
    """Whether the quotation marks of a text are balanced."""
    return text.count("'") % 2 == 0 and text.count('"') % 2 == 0


def most_similar(word: str, pool: Sequence[str], bonus: float) -> Iterator[tuple[str, float]]:
    """Yield the most similar other word of the pool with its similarity plus a bonus, if one is close.

    The similarity is difflib's ratio, plus 0.1 for the same letters and 0.05 for the same first letter.
    """
    best, best_ratio = None, CLOSE
    matcher = SequenceMatcher(autojunk=False)
    lowered = word[:_LONG_WORD].lower()
    matcher.set_seq2(lowered)
    letters = sorted(lowered)
    for other in pool:
        if other == word or not other or len(other) > _LONG_WORD:
            continue
        # The ratio's cheap upper bound first.
        if 2 * min(len(other), len(lowered)) / (len(other) + len(lowered)) + 0.15 <= best_ratio:
            continue
        matcher.set_seq1(other.lower())
        if matcher.quick_ratio() + 0.15 <= best_ratio:
            continue
        ratio = matcher.ratio()
        if ratio < CLOSE:
            continue
        ratio += 0.1 * (sorted(other.lower()) == letters) + 0.05 * (lowered[:1] == other[:1].lower())
        if best is None or ratio > best_ratio:
            best, best_ratio = other, ratio
    if best is not None:
        yield best, best_ratio + bonus


def _parts(token: str) -> list[str]:
    bare = token.strip("'\"")
    return [token, bare, *re.split(r"[:=,]", bare)]


def _words(text: str) -> list[str]:
    return [w for w in (w.rstrip(".:-").strip(":.,") for w in _WORD.findall(text)) if w]


def _program_words(action: str) -> Iterator[tuple[str, list[str]]]:
    for part in _OPERATOR.split(action):
        case = Case(part, "")
        if case.tokens:
            yield case.program, [case.tokens[index] for index in case.arguments[:2]]


def _subtracted(counts: Counter[str], words: Iterable[str]) -> Counter[str]:
    fewer = Counter(counts)
    fewer.subtract(words)
    return +fewer


def _host(text: str) -> str | None:
    match = re.match(r"[a-z][a-z0-9+.-]{1,20}://([^/\s]{1,300})", text)
    return match.group(1) if match else None


# Transformations of a word without further literals.
TRANSFORMS: dict[str, Callable[[str], str | None]] = {
    "same": lambda t: t,
    "dirname": lambda t: posixpath.dirname(t.rstrip("/")) or None,
    "dirname_of_file": lambda t: posixpath.dirname(t) or None,
    "basename": lambda t: posixpath.basename(t.rstrip("/")) or None,
    "without_slash": lambda t: t.rstrip("/") or None,
    "without_extension": lambda t: posixpath.splitext(t)[0] or None,
    "quoted": lambda t: f"'{t}'" if "'" not in t else None,
    "double_quoted": lambda t: f'"{t}"' if '"' not in t else None,
    "unquoted": lambda t: t.strip("'\"`"),
    "host": _host,
    "parent_domain": lambda t: t.partition(".")[2] or None,
    "bare": lambda t: t.lstrip("./-"),
    "escaped": lambda t: t.replace("'", "\\'").replace('"', '\\"'),
    "lower": str.lower,
}
