"""The present: whether the right answer to a text may be another one tomorrow, by its words.

Two degrees. `clock`: the text speaks of now, of the date, of the weather, of what is the latest. `state`: it asks
something that no word of it tells to be lasting: how something stands (is it open, who holds the office, how much is
it, where is my order), or what may as well be a rule. Lists and forms in the languages of `lexicon`: where they err on
one side the model is asked, so they are made to err there.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from optillm_memory.conversation.language import ENGLISH, plausible_languages
from optillm_memory.conversation.lexicon import LANGUAGES, compiled, fold

Degree = Literal["", "state", "clock"]
ENDS = 200  # characters of a text that are looked at from either end: what is asked stands there
# What pins a question to its date: then it is history. And a sum never changes.
_QUESTION_MARKS = ("?", "\u061f", "\u037e")
_YEAR = re.compile(r"(?<![\d.,])(?:1\d{3}|20[01]\d)(?![\d.,]\d|\d)")
_SUM = re.compile(r"\d\s?(?:[-+*/\u00d7\u00f7^=%]|[^\W\d_]{1,8}(?:\s[^\W\d_]{1,8})?)\s?\d")


def present_in_any(text: str) -> Degree:
    """Return in which degree a text asks about the present in any of the languages that it may be in."""
    found = {present(text, language) for language in plausible_languages(text)}
    return "clock" if "clock" in found else "state" if "state" in found else ""


@lru_cache(maxsize=4096)
def present(text: str, language: str) -> Degree:
    """Return in which degree a text asks about the present; a language without lists is read as English."""
    folded = fold(text if len(text) <= 2 * ENDS else f"{text[:ENDS]} {text[-ENDS:]}")
    language = language if language in LANGUAGES else ENGLISH

    def has(kind: str) -> bool:
        return compiled(language, kind).search(folded) is not None

    if has("now"):
        return "clock"
    if _YEAR.search(folded) or _SUM.search(folded) or has("lasting"):
        return ""
    if has("topics"):
        return "clock"
    if has("state"):
        return "state"
    asked = has("asks") or (language != ENGLISH and folded.endswith(_QUESTION_MARKS))
    return "state" if asked and not has("why") else ""
