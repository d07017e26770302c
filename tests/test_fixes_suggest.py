"""Suggestions from mended actions: what is repeated, what carries over, what is left alone, and how sure they are."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optillm_memory.learn.suggest import Calibrator, Example, FixBook, Suggestion, normal

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
    assert book.examples == (INSTALL, PUSH)


def test_leaving_one_out_is_never_having_seen_it() -> None:
    """`without` gives what a book without the example gives."""
    examples = [*many(6), PUSH]
    for index, example in enumerate(examples):
        left = FixBook(examples).best(example.action, example.output, without=index)
        never = FixBook(examples[:index] + examples[index + 1 :]).best(example.action, example.output)
        assert (left is None) == (never is None)
        if left and never:
            assert left[0] == never[0]


def test_nothing_is_made_worse() -> None:
    """A word twice in a row, or a quotation left open, is no correction."""
    book = FixBook([INSTALL])
    assert told(book, "pip install --user foo", INSTALL.output) != "pip install --user --user foo"
    book = FixBook([Example('say hi"', "say: extra character at the end", "say hi")])
    assert told(book, 'say "hi"', "say: extra character at the end") != 'say "hi'


def test_a_calibrator_learns_and_stays_monotone() -> None:
    """Many wrong labels lower the confidence, many right ones raise it, none changes nothing, and it always rises."""
    start = Calibrator()
    shares = [0.5, 0.7, 0.9] * 30
    low, high = start.fitted(shares, [False] * 90), start.fitted(shares, [True] * 90)
    assert low(0.7) < start(0.7) < high(0.7)
    assert start.fitted([], [])(0.3) == pytest.approx(start(0.3))
    for calibrator in (start, low, high, start.fitted([0.1, 0.9], [True, False])):
        values = [calibrator(share / 20) for share in range(21)]
        assert values == sorted(values)
        assert 0 <= values[0] < values[-1] <= 1
    with pytest.raises(ValueError, match="labels"):
        start.fitted([0.5], [])


def test_rehearsals_tell_right_from_wrong() -> None:
    """A kind of repair that carries over rehearses right; fixes that share nothing do not."""
    shares, right = FixBook(many(10)).cross_validate(100)
    assert (len(shares), sum(right)) == (10, 10)
    assert len(FixBook(many(10)).cross_validate(4)[0]) == 4
    strange = [Example(f"frob {'abcdefgh'[n] * 4}", "frob: failed", f"zap {n * 7919 % 10007}") for n in range(8)]
    assert not any(FixBook(strange).cross_validate(8)[1])


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


def test_a_large_book_answers_quickly() -> None:
    """Five hundred examples are asked in well under 50 ms once it is warm, and a small book is ready at once."""
    book = FixBook(many(500), calibrator=Calibrator())
    taken = []
    for n in range(21):
        started = time.process_time()
        assert book.suggest(f"boat y{n}a it", f"unknown verb 'y{n}a'. Did you mean 'y{n}b'?") is not None
        taken.append(time.process_time() - started)
    assert sorted(taken)[10] < 0.25


@pytest.mark.parametrize("text", [":" * 20_000, "'" * 20_000, "a/" * 10_000, "did you mean 'x'?\n" * 1_200])
def test_hostile_texts_are_bounded(text: str) -> None:
    """20 kB of anything neither breaks a book nor holds it up."""
    started = time.process_time()
    book = FixBook([*ALL, Example(text, "no", "git push"), Example("git push", text, text)])
    for action, output in ((text, "no"), ("git psh", text), (text, text)):
        book.suggest(action, output)
    assert time.process_time() - started < 10
