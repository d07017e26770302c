"""Word agreement in less work: what is left out of it changes no result."""

from __future__ import annotations

import random
import sys
import threading
import unicodedata
from collections import Counter

import pytest

from optillm_memory.conversation import language
from optillm_memory.recall import word_agreement
from optillm_memory.recall.ranking import all_words
from optillm_memory.recall.word_agreement import agreements, shares_words, terms, units, words_looked_for

TEXTS = [
    "restart the web server",
    "how do I restart nginx?",
    "delete all log files older than 3 days",
    "Wie starte ich den Webserver neu?",
    "Webserver starten",
    "как перезапустить сервер",
    "サーバーを再起動する",
    "user_id=42; SELECT * FROM t WHERE x > 1",
    "",
    "...",
]


@pytest.mark.parametrize("query", TEXTS)
def test_texts_share_words_as_their_agreement_says(query: str) -> None:
    """Whether any text shares a word of a query is what the agreements of all of them say."""
    for texts in ([text] for text in TEXTS):
        assert shares_words(query, texts) == any(found.shared for found in agreements(query, texts))
    others = [text for text in TEXTS if text != query]
    assert shares_words(query, others) == any(found.shared for found in agreements(query, others))
    assert not shares_words(query, [])


@pytest.mark.parametrize("query", TEXTS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_query_finds_in_a_text_what_all_terms_of_the_text_hold(query: str, text: str) -> None:
    """What is looked for in a text holds every term of the query that the text has, in whatever languages they are."""
    asked = terms(query)
    whole = {*all_words(text), *terms(text)}
    assert {term for term in asked if term in words_looked_for(asked)(text)} == whole & set(asked)


def test_words_alone_need_no_language_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a query has nothing but words no text's language is asked for; where it has more, it is."""
    asked: list[str] = []

    def in_english(text: str) -> str:
        asked.append(text)
        return "en"

    monkeypatch.setattr(word_agreement, "language_of", in_english)
    assert words_looked_for(["restart", "server"])("restart it") == {"restart", "it"}
    assert asked == []
    words_looked_for(["u0123456789ab"])("restart it")
    assert asked == ["restart it"]


def test_ascii_text_is_taken_apart_as_any_other() -> None:
    """The short ways for ASCII count the same letters of the same scripts, and find the same words."""
    chance = random.Random(0)
    for _ in range(500):
        text = "".join(chr(chance.randrange(128)) for _ in range(chance.randrange(40)))
        letters = Counter(unicodedata.name(c).partition(" ")[0] for c in text if c.isalpha())
        assert language._scripts(text) == letters
        apart = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
        assert word_agreement._words(text) == apart.split()


def test_threads_do_not_spoil_each_others_words() -> None:
    """No thread fails because another one asks for the stems of other words of the same language."""
    letters = "bcdfghjklmnprstwz"
    starts = [f"{a}{b}{c}" for a in letters for b in letters for c in ("kot", "prac", "malow", "poszuk")]
    found: list[bool] = []

    def ask(ending: str) -> None:  # other words on each thread: what was stemmed once is remembered
        found.append(bool(units(" ".join(f"{start}owan{ending}" for start in starts), "pl")))

    assert units("zapisywanie", "pl")  # the stemmer is there
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(ending,)) for ending in ("ie", "ia", "iem", "iach", "iu", "iami")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == [True] * len(threads)
