"""Word lists by language: words of time, state, negation and scope, which can change an answer.

The data is in `lexicon.json`. Each entry is a regular expression over folded text, in lower case; `@` is the
beginning of a question. In languages written without spaces, or with joined words, entries match anywhere;
elsewhere they match whole words.
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

    `now` words refer to the present, `topics` to what changes daily; `state` forms ask about a state; `lasting` ones
    (rules, facts, how-to) cancel `topics` and `state`, and `why` does where there is no `state`. `asks` are question
    words. `negations` and `scopes` are words that change the meaning of a question. `fillers`, which are no patterns,
    carry no content.
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
_START = r"^\W*(?:\w+[,!.:]\s)?"  # the beginning of a question
_POINTS = re.compile("[\u0307\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0640]")
_LETTERS = str.maketrans("\u0131\u0623\u0625\u0622\u0649\u0629\u2019", "i\u0627\u0627\u0627\u064a\u0647'")


def fold(text: str) -> str:
    """Return a text in the normal form of the lists: case-folded, without vowel points, variant letters unified."""
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
