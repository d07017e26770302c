"""Suggestions from mended actions: what is repeated, what carries over, what is left alone, and how sure they are."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optillm_memory.learn.suggest import FEATURES, Calibrator, Example, FixBook, Suggestion, normal

PUSH = Example("git puhs", "git: 'puhs' is not a git command.\n\nThe most similar command is\n\tpush\n", "git push")
INSTALL = Example("pip install foo", "ERROR: could not install: [Errno 13] Permission denied", "pip install --user foo")
SCRIPT = Example("./build.sh", "", "chmod +x build.sh && ./build.sh")
TOUCH = Example("touch /p/q", "touch: cannot touch '/p/q': No such file or directory", "mkdir -p /p && touch /p/q")
ALL = [PUSH, INSTALL, SCRIPT, TOUCH]
TEXTS = st.text(max_size=60)


def many(count: int) -> list[Example]:
    """Return examples of one kind with different words."""
    return [
        Example(f"boat x{n}a task{n}", f"unknown verb 'x{n}a'. Did you mean 'x{n}b'?", f"boat x{n}b task{n}")
        for n in range(count)
    ]


def told(book: FixBook, action: str, output: str) -> str | None:
    """Return the suggested action alone."""
    suggestion = book.suggest(action, output)
    return suggestion.action if suggestion else None


@pytest.mark.parametrize("example", ALL, ids=lambda e: e.action)
def test_one_example_mends_the_same_failure_again(example: Example) -> None:
    """The same failure again yields its fix from a single example, with a confidence that is decent but not blind."""
    suggestion = FixBook([example]).suggest(example.action, example.output)
    assert suggestion is not None
    assert suggestion.action == example.fix
    assert 0.6 <= suggestion.confidence <= 0.8
    assert suggestion.support == (0,)


def test_the_nearest_of_several_mends_its_own_failure() -> None:
    """With other examples beside it, each failure still yields its own fix, and rests on its own example first."""
    book = FixBook(ALL)
    for index, example in enumerate(ALL):
        suggestion = book.suggest(example.action, example.output)
        assert suggestion is not None
        assert (suggestion.action, suggestion.support[0]) == (example.fix, index)


@pytest.mark.parametrize(
    ("action", "output", "wanted"),
    [
        ("git stauts", "git: 'stauts' is not a git command.\n\nThe most similar command is\n\tstatus\n", "git status"),
        ("kubectl gte pods", 'error: unknown command "gte"\n\nDid you mean this?\n\tget\n\tset\n', "kubectl get pods"),
        ("pip install bar", INSTALL.output, "pip install --user bar"),
        ("./run.py", "", "chmod +x run.py && ./run.py"),
        ("touch /x/y/z", "touch: cannot touch '/x/y/z': No such file or directory", "mkdir -p /x/y && touch /x/y/z"),
    ],
)
def test_a_fix_carries_over_to_other_words(action: str, output: str, wanted: str) -> None:
    """What mended one action mends a like one with that one's own words, another tool's too."""
    assert told(FixBook(ALL), action, output) == wanted


@pytest.mark.parametrize("example", ALL, ids=lambda e: e.action)
def test_an_unrelated_failure_is_left_alone(example: Example) -> None:
    """One example says nothing of an action that failed in another way."""
    unrelated = [
        ("make all", "make: *** No rule to make target 'all'. Stop."),
        ("python main.py", "Traceback (most recent call last):\nValueError: invalid literal for int()"),
        ("wc -l x y z", ""),
    ]
    for action, output in unrelated:
        assert FixBook([example]).suggest(action, output) is None


def test_an_empty_book_and_an_empty_action_yield_nothing() -> None:
    """Without examples, and without an action, there is nothing to say."""
    assert FixBook([]).suggest("ls", "no") is None
    assert FixBook([]).nearest("ls", "no") is None
    assert FixBook([]).calibrator == Calibrator()
    assert FixBook(ALL).suggest("  ", "no") is None


def test_the_least_confidence_is_kept() -> None:
    """A suggestion that is less sure than wanted is not made."""
    book = FixBook([PUSH])
    suggestion = book.suggest(PUSH.action, PUSH.output)
    assert suggestion is not None
    assert book.suggest(PUSH.action, PUSH.output, min_confidence=suggestion.confidence) == suggestion
    assert book.suggest(PUSH.action, PUSH.output, min_confidence=suggestion.confidence + 0.01) is None


def test_a_fix_that_is_little_believed_gives_way() -> None:
    """Of two fixes of the same failure the believed one is suggested, and doubt lowers the confidence."""
    doubted = Example(PUSH.action, PUSH.output, "git log", weight=0.1)
    for examples in ([doubted, PUSH], [PUSH, doubted]):
        assert told(FixBook(examples), PUSH.action, PUSH.output) == PUSH.fix
    alone = FixBook([doubted]).suggest(PUSH.action, PUSH.output)
    assert alone is not None
    assert alone.confidence <= 0.1


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, float("nan")])
def test_a_weight_is_a_share(weight: float) -> None:
    """A weight outside of (0, 1] is refused."""
    with pytest.raises(ValueError, match="weight must be in"):
        Example("a", "b", "c", weight=weight)


def test_more_agreeing_examples_make_surer() -> None:
    """Examples of the same kind add to the confidence of what they agree on."""
    action, output = "boat lanch it", "unknown verb 'lanch'. Did you mean 'launch'?"
    few, more = (FixBook(many(n)).suggest(action, output) for n in (1, 12))
    assert few is not None
    assert more is not None
    assert more.action == "boat launch it"
    assert more.confidence > few.confidence
    assert more.confidence > 0.8
    assert len(more.support) > 1


def test_what_is_added_counts_at_once() -> None:
    """A book that an example was added to says the same as one that had it from the start."""
    book = FixBook([INSTALL])
    assert told(book, PUSH.action, PUSH.output) is None
    book.add(PUSH)
    assert book.suggest(PUSH.action, PUSH.output) == FixBook([INSTALL, PUSH]).suggest(PUSH.action, PUSH.output)
    assert list(book.examples) == [INSTALL, PUSH]


def test_leaving_one_out_is_never_having_seen_it() -> None:
    """`without` gives what a book without the example gives."""
    examples = [*many(6), PUSH]
    for index, example in enumerate(examples):
        left = FixBook(examples).best(example.action, example.output, without=index)
        never = FixBook(examples[:index] + examples[index + 1 :]).best(example.action, example.output)
        assert (left is None) == (never is None)
        if left and never:
            assert left.made == never.made


def test_nothing_is_made_worse() -> None:
    """A word twice in a row, or a quotation left open, is no correction."""
    book = FixBook([INSTALL])
    assert told(book, "pip install --user foo", INSTALL.output) != "pip install --user --user foo"
    book = FixBook([Example('say hi"', "say: extra character at the end", "say hi")])
    assert told(book, 'say "hi"', "say: extra character at the end") != 'say "hi'


def features(votes: float) -> list[float]:
    """Return the features of a candidate with these log odds of its votes, and nothing else for or against it."""
    return [votes, *[0.0] * (len(FEATURES) - 2), 1.0]


def test_a_calibrator_learns_and_stays_monotone() -> None:
    """Many wrong labels lower the confidence, many right ones raise it, none changes nothing, and it always rises."""
    start = Calibrator()
    some = [features(v) for v in (0.0, 0.8, 2.0)] * 30
    low, high = start.fitted(some, [False] * 90), start.fitted(some, [True] * 90)
    assert low(some[1]) < start(some[1]) < high(some[1])
    assert start.fitted([], [])(some[0]) == pytest.approx(start(some[0]))
    for calibrator in (start, low, high, start.fitted([some[0], some[2]], [True, False])):
        values = [calibrator(features(votes / 2)) for votes in range(-10, 11)]
        assert values == sorted(values)
        assert 0 <= values[0] < values[-1] <= 1
    with pytest.raises(ValueError, match="labels"):
        start.fitted([some[0]], [])


def test_rehearsals_tell_right_from_wrong() -> None:
    """A kind of repair that carries over rehearses right; fixes that share nothing do not."""
    book = FixBook(many(10))
    assert [book.rehearse(n)[1] for n in range(10)] == [[True]] * 10
    strange = FixBook(Example(f"frob {'abcdefgh'[n] * 4}", "frob: failed", f"zap {n * 7919 % 10007}") for n in range(8))
    assert not any(any(strange.rehearse(n)[1]) for n in range(8))


def test_what_is_learned_ahead_changes_no_answer() -> None:
    """A book that learned its examples when they came says the same as one that works them out when asked."""
    lazy, ahead = FixBook(many(12)), FixBook(many(12))
    for n in range(12):
        ahead.learn(n)
    case = "boat lanch it", "unknown verb 'lanch'. Did you mean 'launch'?"
    assert ahead.suggest(*case) == lazy.suggest(*case)
    assert lazy.suggest(*case, among=[]) is None
    only = lazy.suggest(*case, among=[3])
    assert only is not None
    assert only.support == (3,)


@pytest.mark.parametrize(
    ("known", "failing", "wanted"),
    [
        (  # a column of two tables gets the name of its table, or its alias
            [
                ("SELECT id, a FROM cats JOIN dogs ON cats.id = dogs.id", "Column 'id' in field list is ambiguous",
                 "SELECT cats.id, a FROM cats JOIN dogs ON cats.id = dogs.id"),
                ("SELECT no FROM bills b JOIN rows r ON b.no = r.no", "Column 'no' in field list is ambiguous",
                 "SELECT b.no FROM bills b JOIN rows r ON b.no = r.no"),
                ("SELECT ref FROM notes JOIN pages ON notes.ref = pages.ref WHERE n > 1 GROUP BY ref",
                 "Column 'ref' in field list is ambiguous",
                 "SELECT notes.ref FROM notes JOIN pages ON notes.ref = pages.ref WHERE n > 1 GROUP BY notes.ref"),
            ],
            ("SELECT key, MAX(n) FROM items JOIN prices ON items.key = prices.key GROUP BY key",
             "Column 'key' in field list is ambiguous"),
            "SELECT items.key, MAX(n) FROM items JOIN prices ON items.key = prices.key GROUP BY items.key",
        ),
        (  # a database that is not there is left out
            [
                ("SELECT a FROM zoo.cats", "Unknown database 'zoo'", "SELECT a FROM cats"),
                ("SELECT b FROM shop.bills WHERE c = 1", "Unknown database 'shop'", "SELECT b FROM bills WHERE c = 1"),
            ],
            ("SELECT n FROM lake.boats ORDER BY n", "Unknown database 'lake'"),
            "SELECT n FROM boats ORDER BY n",
        ),
        (  # what cannot be named is all asked for
            [
                ("SELECT a, b FROM cats WHERE c = 1", "Unknown column 'a' in 'field list'",
                 "SELECT * FROM cats WHERE c = 1"),
                ("SELECT size FROM boats", "Unknown column 'size' in 'field list'", "SELECT * FROM boats"),
                ("SELECT x, y FROM rows LIMIT 3", "Unknown column 'y' in 'field list'", "SELECT * FROM rows LIMIT 3"),
            ],
            ("SELECT colour, price FROM items ORDER BY price", "Unknown column 'colour' in 'field list'"),
            "SELECT * FROM items ORDER BY price",
        ),
    ],
)  # fmt: skip
def test_queries_are_mended_by_their_names(known: Any, failing: tuple[str, str], wanted: str) -> None:
    """What was done to the names of some queries is done to those of another."""
    assert told(FixBook(Example(*row) for row in known), *failing) == wanted


def test_no_keyword_is_misplaced() -> None:
    """A query with brackets left open or a keyword where none can be is no correction."""
    book = FixBook([Example("SELECT year FROM t", "Unknown column 'year'", "SELECT YEAR(year) FROM t")])
    for query in ("SELECT SUM(a) FROM year", "SELECT a FROM t WHERE year"):
        for found in book.candidates(query, "Unknown column 'year'"):
            assert found.made.count("(") == found.made.count(")")
            assert "(FROM" not in found.made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=4), TEXTS, TEXTS)
def test_any_texts_give_a_probability(examples: list[tuple[str, str, str]], action: str, output: str) -> None:
    """Whatever the texts, a suggestion is deterministic, changes the action, and has a confidence within [0, 1]."""
    book = [Example(*texts) for texts in [*examples, (PUSH.action, output, PUSH.fix)]]
    for asked in (action, PUSH.action):
        suggestion = FixBook(book).suggest(asked, output)
        assert suggestion == FixBook(book).suggest(asked, output)
        if suggestion is not None:
            assert isinstance(suggestion, Suggestion)
            assert 0 <= suggestion.confidence <= 1
            assert normal(suggestion.action) != normal(asked)
            assert all(0 <= index < len(book) for index in suggestion.support)


def test_a_large_book_learns_and_answers_quickly() -> None:
    """The time to learn an example and to ask does not grow with the book."""
    book, learned, asked = FixBook(), [], []
    for n, example in enumerate(many(1_200)):
        started = time.process_time()
        book.learn(book.add(example))
        learned.append(time.process_time() - started)
        if n % 40 == 39:
            started = time.process_time()
            assert book.suggest(f"boat y{n}a it", f"unknown verb 'y{n}a'. Did you mean 'y{n}b'?") is not None
            asked.append(time.process_time() - started)
    assert sorted(learned)[600] < 0.06
    assert sorted(asked)[15] < 0.05
    assert sum(learned[-200:]) < 4 * sum(learned[200:400]) + 0.2


@pytest.mark.parametrize("text", [":" * 20_000, "'" * 20_000, "a/" * 10_000, "did you mean 'x'?\n" * 1_200])
def test_hostile_texts_are_bounded(text: str) -> None:
    """20 kB of anything neither breaks a book nor holds it up."""
    started = time.process_time()
    book = FixBook([*ALL, Example(text, "no", "git push"), Example("git push", text, text)])
    for action, output in ((text, "no"), ("git psh", text), (text, text)):
        book.suggest(action, output)
    assert time.process_time() - started < 10
