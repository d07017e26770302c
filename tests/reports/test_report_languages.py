"""An English encoder finds all texts of another language alike: every unrelated request is given something from memory.

Reports: https://github.com/BerriAI/litellm/issues/12234 and https://github.com/zilliztech/GPTCache/issues/694 (a cache
that trusts one similarity answers unrelated and opposite questions). The texts in `data` were written by others than
those who chose the floors; they were not looked at for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import ask, body, hashing_memory, tell

from optillm_memory import Memory, Scope, Settings
from optillm_memory.conversation.language import language_of
from optillm_memory.conversation.lexicon import LANGUAGES, compiled
from optillm_memory.decide.agreement import Neighbour, propose
from optillm_memory.decide.gate import Gate, Label
from optillm_memory.decide.present import present_in_any
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.encoder import REFERENCE, Encoder, HashingEncoder, load_encoder
from optillm_memory.recall.language_floors import LanguageFloors
from optillm_memory.recall.relevance_floor import spread_of

DATA = Path(__file__).parent / "data"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "languages.json").read_text(encoding="utf-8"))
QUESTIONS: dict[str, list[dict[str, str]]] = json.loads((DATA / "present.json").read_text(encoding="utf-8"))
FEW = 3
REUSE = {"reuse": {"max_error": 0.05}}


def taught(memory: Memory, language: str, count: int) -> None:
    """Teach the first memories of a language, in a namespace of its own."""
    namespace = f"{language}-{count}"
    turns = [
        ask(memory, body(item["task"], agent_memory={"namespace": namespace}), item["answer"])
        for item in CASES[language]["memories"][:count]
    ]
    memory.feedback([{"trace_id": t.trace_id, "metric": "success", "value": True, "source": "code"} for t in turns])


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memory]:
    """Give a memory on the real encoder that knows the first few and all 50 tasks of each language."""
    db = tmp_path_factory.mktemp("languages") / "memory.db"
    with Memory(Settings(db=str(db), holdout=0.0)) as found:
        assert found.encoder.wait(120) == "ready"
        for language in CASES:
            taught(found, language, FEW)
            taught(found, language, 50)
        yield found


def given_something(memory: Memory, language: str, count: int, queries: list[str]) -> int:
    """Return how many of the queries recall anything."""
    scope = Scope("local", f"{language}-{count}")
    return sum(bool(memory.recall(query, scope=scope)) for query in queries)


def test_unrelated_requests_get_nothing(memory: Memory) -> None:
    """Of 20 unrelated requests a language at most 2 are given something, over all languages at most 2 %."""
    found = {name: given_something(memory, name, 50, case["unrelated"]) for name, case in CASES.items()}
    assert max(found.values()) <= 2, found
    assert sum(found.values()) <= 0.02 * 20 * len(CASES), found


def test_unrelated_requests_get_nothing_from_the_first_few_memories(memory: Memory) -> None:
    """With three memories in a language hardly any unrelated request is given something, either."""
    found = {name: given_something(memory, name, FEW, case["unrelated"]) for name, case in CASES.items()}
    assert sum(found.values()) <= 0.02 * 20 * len(CASES), found


def test_related_requests_get_what_belongs_to_them(memory: Memory) -> None:
    """Of requests with the same intent and up to half of the words, half get the right memory, in English 85 %."""
    right = {}
    for name, case in CASES.items():
        scope = Scope("local", f"{name}-50")
        wanted = [(item["query"], case["memories"][item["memory"]]["task"]) for item in case["related"]]
        right[name] = sum(any(h.memory.task == task for h in memory.recall(q, scope=scope)) for q, task in wanted)
    assert right["en"] >= 0.85 * 20, right
    assert sum(right.values()) >= 0.5 * 20 * len(CASES), right


def test_the_encoder_is_trusted_where_it_tells_texts_apart() -> None:
    """A language's own pairs decide: the floor is the encoder's where they lie apart, and none where all are alike."""
    encoder = load_encoder("auto")
    assert encoder is not None
    real: Encoder = encoder
    texts = {name: [item["task"] for item in case["memories"]] for name, case in CASES.items()}

    class Source:
        def __init__(self, found: list[str], spread: bool) -> None:
            vectors = HashingEncoder().encode(found) if spread else real.encode(found)
            self.rows = list(zip(found, [v.tobytes() for v in vectors], strict=True))

        def sample(self, scope: Scope, fingerprint: str, limit: int) -> list[tuple[str, bytes]]:
            assert (scope, fingerprint) == (Scope("t"), "f")
            return self.rows[:limit]

    unrelated = spread_of(encoder.encode(REFERENCE))
    for name in ("de", "ru", "ja"):
        alike = LanguageFloors(Source(texts[name], spread=False)).floor(Scope("t"), name, "f", 1, unrelated)
        assert alike is None, name
        apart = LanguageFloors(Source(texts[name], spread=True)).floor(Scope("t"), name, "f", 1, (0.1, 0.1))
        assert apart is not None, name
    few = LanguageFloors(Source(texts["de"][:3], spread=True)).floor(Scope("t"), "de", "f", 1, (0.1, 0.1))
    assert few is None


# -- the present -----------------------------------------------------------------------------------


def test_questions_about_the_present_are_never_served(tmp_path: Path) -> None:
    """Taught and asked again, no question about the present is answered from memory; of timeless ones 80 % are."""
    served = {}
    with hashing_memory(tmp_path) as memory:
        for kind, items in QUESTIONS.items():
            asked = items[:: len(items) // 100]
            turns = [ask(memory, item["text"], f"answer {number}") for number, item in enumerate(asked)]
            for turn in turns:
                tell(memory, turn)
            again = [memory.begin(body(item["text"], agent_memory=REUSE)) for item in asked]
            served[kind] = [item["text"] for item, turn in zip(asked, again, strict=True) if turn.action == "reuse"]
            assert len(asked) >= 100
    assert served["present"] == []
    assert len(served["timeless"]) >= 80


def test_all_questions_are_told_apart() -> None:
    """Of 448 questions about the present none reads as lasting, of as many timeless ones nine in ten do."""
    missed = [q for q in QUESTIONS["present"] if not present_in_any(q["text"])]
    doubted = [q for q in QUESTIONS["timeless"] if present_in_any(q["text"])]
    assert missed == []
    assert len(doubted) <= 0.1 * len(QUESTIONS["timeless"])


def test_a_question_that_may_be_about_the_present_is_served_once_it_has_shown_that_it_is_not() -> None:
    """How something stands is served after five verified answers; what speaks of now never is."""
    for text, late in (("Who signs off the travel expenses?", True), ("What is the weather like?", False)):
        for successes, served in ((1, False), (4, False), (5, late)):
            known = Neighbour("m", text, "an answer", 1.0, successes=successes)
            proposal = propose(text, [known], normal_answer)
            assert proposal is not None
            assert (proposal.vetoes == ()) is served, (text, successes)


# -- what turns a question round -------------------------------------------------------------------

OPPOSITES = {
    "ru": ("Как включить автоплатёж на карте?", "Как отключить автоплатёж на карте?"),
    "zh": ("如何开启自动续费功能", "如何关闭自动续费功能"),
    "ja": ("自動更新を有効にする方法", "自動更新を無効にする方法"),
    "es": ("¿Cómo activar el pago automático?", "¿Cómo desactivar el pago automático?"),
    "de": ("Kann ich mit Rabatt kündigen?", "Kann ich ohne Rabatt kündigen?"),
    "pl": ("Jak włączyć powiadomienia o płatności?", "Jak wyłączyć powiadomienia o płatności?"),
    "tr": ("Bildirimleri açmak istiyorum", "Bildirimleri kapatmak istiyorum"),
    "ko": ("자동 결제를 등록하는 방법", "자동 결제를 해지하는 방법"),
    "he": ("איך להפעיל את החיוב האוטומטי", "איך לבטל את החיוב האוטומטי"),
    "ar": ("كيف يمكن تفعيل الدفع التلقائي", "كيف يمكن تعطيل الدفع التلقائي"),
    "hi": ("ऑटो भुगतान चालू करने का तरीका", "ऑटो भुगतान बंद करने का तरीका"),
    "fr": ("Comment activer le paiement automatique ?", "Comment désactiver le paiement automatique ?"),
}


@pytest.mark.parametrize("language", OPPOSITES)
def test_an_opposite_question_meets_a_veto(language: str) -> None:
    """However near and however often verified in other words, an answer is not given to the opposite question."""
    one, other = OPPOSITES[language]
    assert language_of(one) == language_of(other) == language
    wordings = [one, f"{one} ", one.rstrip("?\u061f") + " ...", f"- {one}"]
    for asked, known in ((other, wordings), (other, wordings[:1])):
        neighbours = [Neighbour(f"m{n}", text, "an answer", 0.99, successes=9) for n, text in enumerate(known)]
        proposal = propose(asked, neighbours, normal_answer)
        assert proposal is not None
        assert proposal.vetoes, asked


UNKNOWN = {
    "ka": "როგორ შევცვალო პაროლი",
    "th": "เปลี่ยนรหัสผ่านอย่างไร",
    "fi": "Miten vaihdan verkkopankin salasanan uuteen?",
    "vi": "Làm thế nào để đổi mật khẩu ngân hàng của tôi?",
    "el": "Πώς αλλάζω τον κωδικό πρόσβασης;",
    "uk": "Як змінити пароль до особистого кабінету?",
}


@pytest.mark.parametrize("language", UNKNOWN)
def test_in_a_language_without_lists_only_what_is_settled_is_served(language: str) -> None:
    """Where nobody knows what turns a question round, only the very same text is served, once it is settled."""
    text = UNKNOWN[language]
    assert language_of(text) == language
    assert language not in LANGUAGES
    for asked, successes, served in ((text, 1, False), (text, 5, True), (f"{text} x", 9, False)):
        proposal = propose(asked, [Neighbour("m", text, "an answer", 1.0, successes=successes)], normal_answer)
        assert proposal is not None
        assert (proposal.vetoes == ()) is served


def test_what_is_proven_in_english_says_nothing_of_another_language() -> None:
    """A gate that is open for English is closed for German, and the other way round, until that one has labels."""
    proposal = propose(
        "how do i top up", [Neighbour(f"m{n}", f"top up {n}", "a", 0.99) for n in range(9)], normal_answer
    )
    assert proposal is not None
    sure = type(proposal)(**{f: getattr(proposal, f) for f in proposal.__slots__} | {"score": 1.0, "vetoes": ()})
    labels = [Label(1.0, correct=True, partition="p") for _ in range(400)]
    for known, unknown in (("p", "p-de"), ("p-de", "p"), ("p-de", "q-ru")):
        gate = Gate([Label(item.score, item.correct, known) for item in labels])
        assert gate.decide(sure, known, 0.05).serve
        assert gate.decide(sure, unknown, 0.05).reason == "not_calibrated"


def test_every_list_compiles_and_covers_its_language() -> None:
    """Each pattern is one; each language has all its lists, and knows its own questions."""
    for language, lists in LANGUAGES.items():
        for kind in ("now", "topics", "state", "why", "lasting", "asks"):
            assert getattr(lists, kind), (language, kind)
            compiled(language, kind)
    assert {"en", "de", "es", "fr", "pl", "tr", "ru", "ar", "he", "hi", "ja", "ko", "zh"} == set(LANGUAGES)
