"""Time dependence: whether the right answer to a text may change with time, by the words of the text.

Two degrees. `clock`: the text mentions now, the date, the weather, the latest of something. `state`: it asks about a
state (is it open, who holds the office, how much is it, where is my order), and no word shows that the answer lasts.
The word lists of `lexicon` are made to err on the side of time dependence: then the model answers.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from optillm_memory.conversation.language import ENGLISH, plausible_languages
from optillm_memory.conversation.lexicon import LANGUAGES, compiled, fold

Degree = Literal["", "state", "clock"]
ENDS = 200  # characters read at each end of a text: the question is there
_QUESTION_MARKS = ("?", "\u061f", "\u037e")
# A past year makes the question one of history; the result of a sum never changes.
_YEAR = re.compile(r"(?<![\d.,])(?:1\d{3}|20[01]\d)(?![\d.,]\d|\d)")
_SUM = re.compile(r"\d\s?(?:[-+*/\u00d7\u00f7^=%]|[^\W\d_]{1,8}(?:\s[^\W\d_]{1,8})?)\s?\d")


def present_in_any(text: str) -> Degree:
    """Return the highest degree of time dependence over the languages that a text may be in."""
    found = {present(text, language) for language in plausible_languages(text)}
    return "clock" if "clock" in found else "state" if "state" in found else ""


@lru_cache(maxsize=4096)
def present(text: str, language: str) -> Degree:
    """Return the degree of time dependence of a text; a language without lists is read as English."""
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
