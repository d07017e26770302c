"""The parts of a text's wording that can change its answer: numbers, names, negations, scope words, order, time.

Fillers, tenses and persons are English only: in another language fewer words count as fillers, so that two texts are
less often equal. Negations and scope words of other languages are in `lexicon`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from optillm_memory.conversation.language import ENGLISH, language_of
from optillm_memory.conversation.lexicon import LANGUAGES, compiled, fold
from optillm_memory.recall.ranking import STOP_WORDS

LONGEST = 8_000
_ROTATIONS = 8


def _list(text: str) -> list[str]:
    return text.split()


def _words(text: str) -> frozenset[str]:
    return frozenset(_list(text))


_NEGATIONS = _words(
    "not no never none neither nor nothing nobody without unable cannot nicht kein keine nie pas jamais nunca"
)
_SCOPES = _words(
    "only all every each except before after under over above below between more less most least maximum minimum until "
    "since within unless if both either or first last next other another always off out down up than how when where "
    "who whose why"
)
# Those that reverse a question even where many tasks have the same answer.
STRONG = _words(
    "only all except before after under over above below more less most least maximum minimum until unless off out"
)
_TENSES = {"was": "#past", "were": "#past", "did": "#past", "had": "#past", "will": "#will"}
_FILLERS = _words(
    "hi hello hey um uh er erm yeah ok okay well thanks thank wondering actually basically kindly also got whats hows "
    "should s m re ve d ll"
)
_IGNORED = (STOP_WORDS | _FILLERS) - _NEGATIONS - _SCOPES - _TENSES.keys()
_DIRECTIONS = _words("from to into onto by than over under before after")
_PERSONS = {"i": "i", "me": "i", "my": "i", "we": "i", "us": "i", "our": "i", "you": "you", "your": "you"}
_DATES = _words(
    "monday tuesday wednesday thursday friday saturday sunday january february april june july august september "
    "october november december weekday weekdays weekend weekends"
)
_NUMBER_WORDS = {
    **{w: str(n) for n, w in enumerate(_list("two three four five six seven eight nine ten eleven twelve"), 2)},
    **{w: str(10 * n) for n, w in enumerate(_list("twenty thirty forty fifty sixty seventy eighty ninety"), 2)},
}
# Often incidental ("I paid last week"): verified tasks can show that it does not matter.
_RELATIVE_TIME = re.compile(
    r"\b(?:yesterday|ago|recently|(?:this|last|next|past) "
    r"(?:second|minute|hour|morning|afternoon|evening|night|week|weekend|month|quarter|year))\b"
)
_TOKEN = re.compile(
    r"\d[\d.,:/]*(?:\s?[ap]\.?m\b\.?|[^\W\d_]+)?"  # a number with its unit: 2,700  9:15  7 am  23kg
    r"|[^\W\d_]+(?:'[^\W\d_]+)*[+#]*"  # a word: don't  C++
    r"|(?<![^\W\d_])-(?=\s?\d)|[+*=<>^%$€£¥@~|\\]"  # signs that change a meaning
)
_GREETING = re.compile(
    r"\s*(?:hi|hello|hey|dear|(?:good )?(?:morning|afternoon|evening))\b(?: (?:team|there|all|everyone|folks))?"
    r"\s*[,.!:-]+\s*",
    re.IGNORECASE,
)
_DOUBLED = re.compile(r"([^\W\d_])\1")
_VOWELS = frozenset("aeiou")
# Shorter words may be other words rather than misspellings.
_MISSPELT_FROM, _SWAPPED_FROM, _EQUAL_START = 6, 8, 3
_SENTENCE_END = re.compile(r"[.?!:;\n]\s*[\"'(]*$")


@dataclass(frozen=True, slots=True)
class Wording:
    """The parts of a text's wording that can change its answer."""

    numbers: frozenset[str]
    names: frozenset[str]
    negations: frozenset[str]
    scopes: frozenset[str]
    tokens: frozenset[str]
    order: tuple[str, ...]
    directions: frozenset[tuple[str, str]]
    times: frozenset[str]
    persons: tuple[str, ...]
    layout: tuple[str, ...] = ()  # the indentation of each line, if any is indented: code depends on it


def asks_the_same(one: str, other: str) -> bool:
    """Whether two texts are the same question except for fillers, plurals and the place of a phrase."""
    return max(len(one), len(other)) <= LONGEST and difference(wording(one), wording(other)) == ""


@lru_cache(maxsize=4096)
def wording(text: str) -> Wording:
    """Return the parts of a text's wording that can change its answer."""
    language = language_of(text)
    layout = _layout(text)
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    if greeting := _GREETING.match(text):
        text = text[greeting.end() :]
    found = [(m.group().casefold(), m.group(), m.start()) for m in _TOKEN.finditer(text)]
    numbers: set[str] = set()
    negations: set[str] = set()
    scopes: set[str] = set()
    order: list[str] = []
    directions: set[tuple[str, str]] = set()
    persons: list[str] = []
    pending: list[str] = []
    for token in (part for folded, _, _ in found for part in _parts(folded)):
        if token in _PERSONS:
            persons.append(_PERSONS[token])
        if token in _DIRECTIONS:
            pending.append(token)
        if token in _NEGATIONS:
            negations.add("not")
        elif token in _SCOPES or token in _TENSES:
            scopes.add(_TENSES.get(token, token))
        elif token not in _IGNORED:
            stem = _number(token) or _singular(token)
            if stem[0].isdigit() or token in _DATES or not stem[0].isalpha():
                numbers.add(stem)
            order.append(stem)
            directions |= {(word, stem) for word in pending}
            pending.clear()
    if language in LANGUAGES and language != ENGLISH:
        negations |= {"not"} if _found(language, "negations", text) else set()
        scopes |= _found(language, "scopes", text)
    return Wording(
        numbers=frozenset(numbers),
        names=_names(text, found),
        negations=frozenset(negations),
        scopes=frozenset(scopes),
        tokens=frozenset(order),
        order=tuple(order),
        directions=frozenset(directions),
        times=frozenset(["time"] if _RELATIVE_TIME.search(_folded(text)) else ()),
        persons=tuple(persons),
        layout=layout,
    )


def _layout(text: str) -> tuple[str, ...]:
    if "\n" not in text:
        return ()
    indents = tuple(line[: len(line) - len(line.lstrip())] for line in text.splitlines() if line.strip())
    return indents if any(indents) else ()


def _found(language: str, kind: str, text: str) -> set[str]:
    """Return the words of a language's list that occur in a text."""
    return {m.group().strip() for m in compiled(language, kind).finditer(fold(text[:LONGEST]))}


def _folded(text: str) -> str:
    return " ".join(text[:LONGEST].casefold().replace("\u2019", "'").split())


def difference(one: Wording, other: Wording) -> str:
    """Return the veto by which two texts are not the same question word for word; empty where they are."""
    other = _respelt(other, one)
    named = (one.tokens ^ other.tokens) & (one.names | other.names)
    addressed = set(one.persons) == set(other.persons) == {"i", "you"} and one.persons != other.persons
    ordered = _rotated(one.order, other.order) and one.directions == other.directions and not addressed
    reasons = {
        "veto_layout": one.layout != other.layout,
        "veto_numbers": one.numbers != other.numbers,
        "veto_names": bool(named),
        "veto_negation": one.negations != other.negations,
        "veto_scope": one.scopes != other.scopes,
        "veto_words": one.tokens != other.tokens or not one.tokens,
        "veto_order": not ordered,
    }
    return next((reason for reason, found in reasons.items() if found), "")


def _respelt(text: Wording, other: Wording) -> Wording:
    """Return a wording with misspelt words spelt as in the other one."""
    mine, others = text.tokens - other.tokens, other.tokens - text.tokens
    if not mine or len(mine) != len(others) or (mine | others) & (text.numbers | other.numbers):
        return text
    spelt = {word: meant for word in mine for meant in others if is_misspelt(word, meant)}
    if not spelt or len(set(spelt.values())) < len(spelt):
        return text
    return replace(
        text,
        tokens=frozenset(spelt.get(word, word) for word in text.tokens),
        order=tuple(spelt.get(word, word) for word in text.order),
        names=frozenset(spelt.get(word, word) for word in text.names),
        directions=frozenset((way, spelt.get(word, word)) for way, word in text.directions),
    )


def is_misspelt(one: str, other: str) -> bool:
    """Whether two words are likely two spellings of one word.

    A letter is doubled or not (adress); in longer words two letters are swapped, or an inner vowel is missing or
    replaced (statment, emergancy). Other consonants (contact, contract), beginnings and endings make another word.
    """
    one, other = (_DOUBLED.sub(r"\1", word) for word in (one, other))
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(short) < _MISSPELT_FROM or short[-1] != long[-1]:
        return False
    if len(short) < len(long):
        return at >= _EQUAL_START and long[at] in _VOWELS and short[at:] == long[at + 1 :]
    if len(short) < _SWAPPED_FROM or at == 0:
        return False
    swapped = short[at] == long[at + 1] and short[at + 1] == long[at] and short[at + 2 :] == long[at + 2 :]
    vowels = {short[at], long[at]} <= _VOWELS and at >= _EQUAL_START and short[at + 1 :] == long[at + 1 :]
    return swapped or vowels


def _rotated(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether a phrase was only moved to the front or to the end."""
    if len(one) != len(other) or not one:
        return False
    starts = [i for i, token in enumerate(other) if token == one[0]]
    # A text of one word over and over would be compared in square time.
    return any(list(one) == [*other[i:], *other[:i]] for i in starts[:_ROTATIONS])


def _names(text: str, found: Sequence[tuple[str, str, int]]) -> frozenset[str]:
    """Return the tokens with a capital that is not explained by their place in the sentence."""
    words = [(folded, raw, start) for folded, raw, start in found if raw[0].isalpha()]
    capital = [w for w in words if w[1][0].isupper()]
    if len(words) > 2 and 2 * len(capital) > len(words):  # noqa: PLR2004 - a title, or someone who shouts
        return frozenset()
    names = set()
    for folded, raw, start in capital:
        initial = start == 0 or _SENTENCE_END.search(text[max(start - 4, 0) : start]) is not None
        if not initial or (len(raw) > 1 and raw.isupper()):
            names |= {_singular(p) for p in _parts(folded) if p not in _IGNORED and p not in _PERSONS}
    return frozenset(names)


def _parts(token: str) -> list[str]:
    """Split a contraction: isn't gives `not`, child's gives `child`."""
    if "'" not in token:
        return ["not"] if token in ("cannot", "cant", "dont", "doesnt", "didnt", "isnt", "wont") else [token]
    if token.endswith("n't"):
        return ["not"]
    head, _, tail = token.partition("'")
    return [head, tail] if tail in ("ll", "ve", "re", "m", "d") else [head if tail == "s" else token.replace("'", "")]


def _number(token: str) -> str:
    """Return the normal form of a number; empty for another token."""
    if token in _NUMBER_WORDS:
        return _NUMBER_WORDS[token]
    if not token[0].isdigit():
        return ""
    token = re.sub(r",(?=\d{3}(?!\d))", "", re.sub(r"[\s.]+(?=[ap]\b|[ap]\.?m)|(?<=[ap])\.|[.,:/]+$", "", token))
    return re.sub(r"\.0+(?!\d)", "", token).rstrip(".,:/")


def _singular(token: str) -> str:
    if len(token) > 3 and token.endswith("s") and not token.endswith(("ss", "us", "is")):  # noqa: PLR2004
        return token[:-3] + "y" if token.endswith("ies") else token[:-1]
    return token
