"""A case: a failing action and its output, with the parts that edit programs refer to."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import cached_property, lru_cache

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
_KEYWORD = re.compile(r"(?<![\w'\"-])[A-Z]{2,20}(?![\w'\"-])")
_IDENTIFIER = re.compile(r"(?<![\w'\"%])[A-Za-z_]\w{2,60}")
_FEW_KNOWN, _RAREST = 150, 5
_LINES, _CHARS, _WORDS, _POOL, _FAULTS = 200, 12_000, 1_500, 400, 80
WRAPPERS = frozenset(("sudo", "env", "time", "nohup", "command"))
CLOSE = 0.5
_LONG_WORD, _PAIRED = 60, 5
_CLAUSES = frozenset(
    (
        *("where", "join", "inner", "left", "right", "full", "cross", "on", "group", "order", "having", "limit"),
        *("union", "set", "values", "natural", "using", "as"),
    )
)


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

    @cached_property
    def is_query(self) -> bool:
        """Whether the action is in a language of keywords, as SQL is: its first word and another one are such."""
        words = _KEYWORD.findall(self.action[:2_000])
        return len(words) > 1 and self.action.lstrip().startswith(words[0])

    @property
    def program(self) -> str:
        """The program's name without its folder."""
        return posixpath.basename(self.tokens[self.head]) if self.tokens else ""

    @cached_property
    def arguments(self) -> list[int]:
        """Indices of the words after the program's name that start with no dash."""
        return [i for i in range(self.head + 1, len(self.tokens)) if not self.tokens[i].startswith("-")]

    @cached_property
    def rest(self) -> str:
        """The words after the program's name."""
        return " ".join(self.tokens[self.head + 1 :])

    @cached_property
    def rest_words(self) -> frozenset[str]:
        """The names in the words after the program's name."""
        return frozenset(re.findall(r"\w{2,}", self.rest))

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
        vocabulary = self.vocabulary
        strange_program = (
            vocabulary is not None and vocabulary.knows_programs and not vocabulary.knows(self.program, "", first=True)
        )
        found: list[tuple[float, int, str]] = []
        for index, token in enumerate(self.tokens[:_FAULTS]):
            parts = [p for p in _parts(token) if len(p) > 1 and any(c.isalnum() for c in p)]
            part = next((p for p in parts if p in quoted or p in in_error_lines), None)
            part = part or next((p for p in parts if p in mentioned), None)
            strange = index == self.head and strange_program
            if part is None and not strange and (index <= self.head or token.startswith("-") or not parts):
                continue
            part = part or token
            score = 3.0 * (part in quoted) + 2.0 * (part in in_error_lines) - 1.0 * (part in mentioned)
            known = vocabulary is not None and vocabulary.knows(part, self.program, first=False)
            score += 0.5 * (not known) - 0.5 * token.startswith("-")
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

    @cached_property
    def identifiers(self) -> list[str]:
        """The names in the action that the output quotes, as they stand there or by their last parts."""
        found: dict[str, None] = {}
        for text in self.quoted[:4]:
            parts = text.split(".")
            for start in range(min(len(parts), 3)):
                name = ".".join(parts[start:])
                if re.fullmatch(r"[A-Za-z_][\w.]*", name) and occurrences(name).search(self.action):
                    found[name] = None
                    break
            if len(parts) == 1 and re.fullmatch(r"\w+", text) and f"{text}." in self.action:
                found[text] = None
        return list(found)[:3]

    def clause(self, keyword: str) -> str | None:
        """Return the name by which what follows a keyword is called: its alias, or itself without its folder."""
        match = re.search(rf"(?<!\w){keyword}\s+([\w.`]+)(?:\s+(?:AS\s+)?(\w+))?", self.action, re.IGNORECASE)
        if match is None:
            return None
        alias = match[2]
        return alias if alias and not alias.isupper() and alias.lower() not in _CLAUSES else match[1].strip("`")

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

    def depends_on(self, words: frozenset[str]) -> bool:
        """Whether the case so far was read with the help of one of these known words."""
        if any(near in words for near in self._near.values()):
            return True
        return any(token in words or not words.isdisjoint(_parts(token)) for token in self.tokens[:_FAULTS])

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
            yield from most_similar(word, self.vocabulary.resembling(word, self.program, first=first), 0.15)
            if not first:
                yield from most_similar(word, self.vocabulary.resembling(word, "", first=False), 0.0)

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
        self._pools: dict[str | None, _Pool] = {None: _Pool()}  # under None: the programs
        self._less: dict[str | None, Counter[str]] = {}
        for action in actions:
            self.add(action)

    def add(self, action: str) -> None:
        """Count the words of one more action that worked."""
        for pool, words in _pooled(action).items():
            self._pools.setdefault(pool, _Pool()).add(words)

    def words(self, program: str, *, first: bool) -> Sequence[str]:
        """Return the known program names, or the words known to follow one (any, for the empty name)."""
        pool = self._pools.get(None if first else program)
        return tuple(w for w in pool.counts if self.knows(w, program, first=first)) if pool else ()

    def knows(self, word: str, program: str, *, first: bool) -> bool:
        """Whether a word is a known program, or is known to follow one."""
        name = None if first else program
        pool = self._pools.get(name)
        less = self._less.get(name)
        return pool is not None and pool.counts.get(word, 0) > (less.get(word, 0) if less else 0)

    def resembling(self, word: str, program: str, *, first: bool) -> Sequence[str]:
        """Return those of the known words that a word may be a misspelling of; all of them where they are few."""
        pool = self._pools.get(None if first else program)
        if pool is None:
            return ()
        return [w for w in pool.resembling(word) if self.knows(w, program, first=first)]

    @property
    def knows_programs(self) -> bool:
        """Whether any action was counted."""
        pool, less = self._pools[None], self._less.get(None)
        return len(pool.counts) > 0 if not less else any(n > less.get(w, 0) for w, n in pool.counts.items())

    def without(self, *actions: str) -> Vocabulary:
        """Return a view of the vocabulary without actions that it counted."""
        other = Vocabulary()
        other._pools = self._pools
        other._less = {name: Counter(counts) for name, counts in self._less.items()}
        for action in actions:
            for pool, words in _pooled(action).items():
                other._less.setdefault(pool, Counter()).update(words)
        return other

    def only_of(self, action: str) -> frozenset[str]:
        """Return the words that are known from this action alone."""
        return frozenset(
            word
            for pool, words in _pooled(action).items()
            for word, n in Counter(words).items()
            if self._pools[pool].counts[word] <= n
        )


class _Pool:
    """Counted words with an index of their pairs of letters, by which similar ones are found."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._with: dict[str, list[str]] = {}
        self._short: list[str] = []  # a short word and its misspelling may share no two letters in a row

    def add(self, words: Iterable[str]) -> None:
        for word in words:
            if word not in self.counts:
                if len(word) <= _PAIRED:
                    self._short.append(word)
                for pair in _pairs(word):
                    self._with.setdefault(pair, []).append(word)
            self.counts[word] += 1

    def resembling(self, word: str) -> Iterable[str]:
        if len(self.counts) <= _FEW_KNOWN:
            return self.counts
        rarest = sorted((p for p in _pairs(word) if p in self._with), key=lambda p: len(self._with[p]))[:_RAREST]
        short = self._short[-_FEW_KNOWN:] if len(word) < _PAIRED else []
        return dict.fromkeys((*(w for pair in rarest for w in self._with[pair][:_FEW_KNOWN]), *short))


def tokenize(text: str) -> list[str]:
    """Split an action into words; a quoted text is one word, unless quotation marks are unbalanced."""
    return _TOKEN.findall(text) if balanced(text) else text.split()


@lru_cache(maxsize=4096)
def occurrences(name: str, *, bare: bool = False) -> re.Pattern[str]:
    """Return the pattern of a name in code, not as part of a longer one; `bare`: nor after a dot."""
    before = r"(?<![\w.])" if bare or "." in name else r"(?<!\w)"
    return re.compile(rf"{before}{re.escape(name)}(?!\w)")


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
    pairs = [lowered[i : i + 2] for i in range(len(lowered) - 1)] if len(lowered) >= _PAIRED else []
    for other in pool:
        if other == word or not other or len(other) > _LONG_WORD:
            continue
        # The ratio's cheap upper bound first.
        if 2 * min(len(other), len(lowered)) / (len(other) + len(lowered)) + 0.15 <= best_ratio:
            continue
        low = other.lower()
        if pairs and not any(pair in low for pair in pairs):
            continue  # half of the letters in order without any two in a row are no likeness
        matcher.set_seq1(low)
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


def _pooled(action: str) -> dict[str | None, list[str]]:
    """Return an action's words by the pool in which they are counted: programs, and what follows each (and any)."""
    pools: dict[str | None, list[str]] = {}
    for part in _OPERATOR.split(action):
        case = Case(part, "")
        if case.tokens:
            after = [case.tokens[index] for index in case.arguments[:2]]
            if case.is_query:
                after += [w for w in _IDENTIFIER.findall(part) if not w.isupper()]
            pools.setdefault(None, []).append(case.program)
            pools.setdefault(case.program, []).extend(after)
            pools.setdefault("", []).extend(after)
    return pools


def _pairs(word: str) -> set[str]:
    low = word[:_LONG_WORD].lower()
    return {low[i : i + 2] for i in range(len(low) - 1)} or {low}


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
    "without_comma": lambda t: t.rstrip(",;") or None,
    "last_part": lambda t: t.rpartition(".")[2] or None,
    "without_first_part": lambda t: t.partition(".")[2] or None,
    "first_part": lambda t: t.partition(".")[0] or None,
}
