"""Word lists by language, for what a text's words tell about its answer: time, state, negation, scope.

They stand in `lexicon.json`. Each entry is a regular expression over folded text, in small letters; `@` is the
beginning of a question. In languages written without spaces, or with words grown together, entries are found anywhere;
elsewhere they are whole words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import lru_cache
from importlib import resources
from typing import NamedTuple


class Lexicon(NamedTuple):
    """A language's lists.

    `now` words speak of the present, `topics` of what changes from day to day; `state` forms ask how something stands;
    `lasting` ones (rules, facts, how-to) take `topics` and `state` back, and `why` does where there is no `state`.
    `asks` are the words by which a text is a question. `negations` and `scopes` are words that turn a question round.
    `fillers`, which are no patterns, carry no subject.
    """

    now: list[str]
    topics: list[str]
    state: list[str]
    why: list[str]
    lasting: list[str]
    asks: list[str]
    negations: list[str]
    scopes: list[str]
    fillers: list[str]


NO_BOUNDARIES = frozenset(("ar", "he", "hi", "ja", "ko", "zh"))
LANGUAGES = {
    language: Lexicon(**lists)
    for language, lists in json.loads(
        resources.files(__package__).joinpath("lexicon.json").read_text(encoding="utf-8")
    ).items()
}
_START = r"^\W*(?:\w+[,!.:]\s)?"  # where a question begins
_POINTS = re.compile("[\u0307\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0640]")
_LETTERS = str.maketrans("\u0131\u0623\u0625\u0622\u0649\u0629\u2019", "i\u0627\u0627\u0627\u064a\u0647'")


def fold(text: str) -> str:
    """Return a text in the form of the lists: no case, no vowel points, one form of each letter, single spaces."""
    return " ".join(_folded(text).split())


@lru_cache(maxsize=256)
def compiled(language: str, kind: str) -> re.Pattern[str]:
    """Return a list of a language as one pattern over folded text."""
    words = "|".join(getattr(LANGUAGES[language], kind)) or "(?!)"
    # Escapes stay as they are: folded, `\\W` would be `\\w`.
    folded = re.sub(r"\\.|[^\\]+", lambda m: m.group() if m.group()[0] == "\\" else _folded(m.group()), words)
    folded = folded.replace("@", _START)
    return re.compile(folded if language in NO_BOUNDARIES else rf"(?<!\w)(?:{folded})(?!\w)")


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold())
    return unicodedata.normalize("NFC", _POINTS.sub("", text)).translate(_LETTERS)
