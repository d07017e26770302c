"""Word agreement: how far two texts speak of the same thing by their words, in whatever language.

Where an encoder cannot tell related texts from unrelated ones, because it does not know the language or because their
cosine is neither high nor low, the words have to agree too. Compared are content words (stems without function words;
in Chinese and Japanese pairs of characters) and character trigrams, both weighed by how rare they are (IDF).
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import snowballstemmer
import stopwordsiso

from optillm_memory.conversation.language import ENGLISH, language_of
from optillm_memory.conversation.lexicon import LANGUAGES, compiled, fold
from optillm_memory.recall.ranking import all_words, words

# Trigram likeness that a text needs by the number of content words that it shares: chosen on paraphrases and unrelated
# requests in 12 languages, where 2 % of the unrelated ones pass.
_LIKENESS = (0.5, 0.3, 0.05)
_STEM = 6  # characters of a stem that count: inflection that a stemmer leaves stands after them
_HEBREW_PREFIXES = "ובלמשהכ"
_TERMS_MOST = 400
_UNIT = "u0"  # how the terms begin that stand for content words
_ASCII_WORD = re.compile("[A-Za-z0-9]+")
_STEMMERS = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fi": "finnish",
    "fr": "french", "hi": "hindi", "hu": "hungarian", "id": "indonesian", "it": "italian", "nl": "dutch",
    "no": "norwegian", "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish",
    "tr": "turkish",
}  # fmt: skip


class Agreement(NamedTuple):
    """How many content words two texts share, and their trigram likeness in [0, 1]."""

    shared: int
    likeness: float

    @property
    def holds(self) -> bool:
        """Whether the texts likely speak of the same thing."""
        return self.likeness >= _LIKENESS[min(self.shared, len(_LIKENESS) - 1)]


def agreements(query: str, texts: Sequence[str]) -> list[Agreement]:
    """Return how far each text agrees with a query; how rare a word is, is counted in the texts themselves."""
    language = language_of(query)
    asked, asked_grams = units(query, language), _trigrams(query)
    grams = [_trigrams(text) for text in texts]
    frequency = Counter(gram for found in grams for gram in found)
    weight = {gram: math.log((len(texts) + 1) / (frequency[gram] + 0.5)) ** 2 for gram in {*frequency, *asked_grams}}
    length = math.sqrt(sum(weight[gram] for gram in asked_grams)) or 1.0
    found = []
    for text, its_grams in zip(texts, grams, strict=True):
        its_length = math.sqrt(sum(weight[gram] for gram in its_grams)) or 1.0
        likeness = sum(weight[gram] for gram in asked_grams & its_grams) / (length * its_length)
        found.append(Agreement(len(asked & units(text, language)), likeness))
    return found


def terms(text: str, most: int = _TERMS_MOST) -> list[str]:
    """Return what stands for a text in a full-text index: its words, and its content words where it is not English."""
    language = language_of(text)
    if language == ENGLISH:
        return words(text, most)
    # As digests, for a tokenizer may cut a script's marks off its letters.
    found = [hashlib.blake2b(unit.encode(), digest_size=6).hexdigest() for unit in sorted(units(text, language))]
    return [*words(text, most), *(f"{_UNIT}{digest}" for digest in found[:most])]


def words_looked_for(query: Sequence[str]) -> Callable[[str], set[str]]:
    """Return what gives those of a text's terms that can be among a query's.

    Most queries have nothing but words: then no text's language matters, which takes longest to find out.
    """
    return _words_and_terms if any(term.startswith(_UNIT) for term in query) else all_words


def _words_and_terms(text: str) -> set[str]:
    return {*all_words(text), *terms(text)}


def shares_words(query: str, texts: Iterable[str]) -> bool:
    """Whether any of some texts has a content word of a query."""
    language = language_of(query)
    asked = units(query, language)
    return any(not asked.isdisjoint(units(text, language)) for text in texts)


@lru_cache(maxsize=8192)
def units(text: str, language: str) -> frozenset[str]:
    """Return the content words of a text, as far as they are compared."""
    found: set[str] = set()
    for word in _words(fold(text)):
        if _is_written_without_spaces(word):
            found |= {word[i : i + 2] for i in range(len(word) - 1) if not _carries_nothing(word[i : i + 2], language)}
        elif len(word) > 1 and not _is_function_word(word, language):
            found.add(_stem(word, language))
    return frozenset(found)


@lru_cache(maxsize=8192)
def _trigrams(text: str) -> frozenset[str]:
    return frozenset(
        padded[i : i + 3] for padded in (f" {word} " for word in _words(fold(text))) for i in range(len(padded) - 2)
    )


def _words(text: str) -> list[str]:
    # Letters, numbers and marks: in many scripts vowels are marks.
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def _is_written_without_spaces(word: str) -> bool:
    return any("\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" for c in word)


def _carries_nothing(pair: str, language: str) -> bool:
    if language == "ja":  # hiragana is grammar for the most part
        return any("\u3040" <= c <= "\u309f" for c in pair)
    return any(c in _fillers(language) for c in pair) or pair in _function_words(language)


def _is_function_word(word: str, language: str) -> bool:
    if word in _function_words(language) or word in _fillers(language):
        return True
    return language in LANGUAGES and compiled(language, "asks").fullmatch(word) is not None


@lru_cache(maxsize=64)
def _function_words(language: str) -> frozenset[str]:
    return (
        frozenset(fold(word) for word in stopwordsiso.stopwords(language))
        if stopwordsiso.has_lang(language)
        else frozenset()
    )


@lru_cache(maxsize=64)
def _fillers(language: str) -> frozenset[str]:
    return frozenset(fold(word) for word in LANGUAGES[language].fillers) if language in LANGUAGES else frozenset()


@lru_cache(maxsize=8192)
def _stem(word: str, language: str) -> str:
    if language == "ko":  # particles follow the noun in the same word
        return word[:2]
    if language == "he":
        return (word[1:] if len(word) > 3 and word[0] in _HEBREW_PREFIXES else word)[:4]  # noqa: PLR2004
    return str(_own.stemmer(language).stemWord(word))[:_STEM] if language in _STEMMERS else word[: _STEM - 1]


class _Stemmers(threading.local):
    """A thread's own: a stemmer keeps the word that it works on, so two threads with one spoil each other's."""

    def __init__(self) -> None:
        self._by_language: dict[str, Any] = {}

    def stemmer(self, language: str) -> Any:
        if language not in self._by_language:
            self._by_language[language] = snowballstemmer.stemmer(_STEMMERS[language])
        return self._by_language[language]


_own = _Stemmers()
