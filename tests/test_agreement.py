"""Proposals: what verified neighbours would answer, how sure they are, and what in the wording speaks against it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.decide.agreement import NEAREST, Neighbour, Proposal, propose
from optillm_memory.decide.present import present_in_any
from optillm_memory.decide.wording import LONGEST, asks_the_same, is_misspelt, wording
from optillm_memory.learn.outcomes import normal_answer

# Worded differently, with one answer; none has a number, a name, a negation or a word of time.
TASKS = [
    "how do i top up my card",
    "is there a way to put money on my card",
    "i would like to add funds to the card",
    "where can i load my card with money",
    "what is the way to charge my card up with money",
    "please tell me how to fill my card",
]


def support(texts: list[str], answer: str = "top_up", cosine: float = 0.8) -> list[Neighbour]:
    """Return verified neighbours with one answer, each a little further away than the one before."""
    return [Neighbour(f"{answer}-{i}", text, answer, cosine - i / 100) for i, text in enumerate(texts)]


def proposed(query: str, neighbours: list[Neighbour]) -> Proposal:
    """Return the proposal, which there must be."""
    proposal = propose(query, neighbours, normal_answer)
    assert proposal is not None
    return proposal


def vetoes(query: str, *texts: str) -> tuple[str, ...]:
    """Return what speaks against answering a request as these tasks were answered."""
    return proposed(query, support(list(texts))).vetoes


def test_without_neighbours_there_is_no_proposal() -> None:
    """An empty memory would answer nothing."""
    assert propose("how do i top up my card", [], normal_answer) is None


def test_a_proposal_says_what_it_rests_on() -> None:
    """The answer is the agreed one as the nearest has it, and in its normal form; the nearest memory comes first."""
    near = [Neighbour("b", TASKS[1], "Top_up.", 0.9), Neighbour("a", TASKS[2], "top_up", 0.8)]
    proposal = proposed(TASKS[0], [*support(["how do i close my account"], "close", 0.3), *reversed(near)])
    assert (proposal.answer, proposal.key) == ("Top_up.", "top_up")
    assert proposal.memory_ids == ("b", "a")


def test_the_same_text_is_an_exact_repeat() -> None:
    """To the letter: white space and Unicode form, too, make another text, for in code they change what it says."""
    known = support(["Where is the café at the corner?"])
    assert proposed("Where is the café at the corner?", known).exact
    for other in (
        "Where is  the café at the corner?",
        "Where is the cafe\u0301 at the corner?",
        "Where is the café, at",
    ):
        assert not proposed(other, known).exact


def test_an_exact_repeat_has_its_own_answer() -> None:
    """What was verified for this very text counts, whatever the majority nearby says."""
    own = Neighbour("own", "how do i top up my card", "other", 1.0)
    proposal = proposed(own.text, [own, *support(TASKS[1:], cosine=0.99)])
    assert (proposal.answer, proposal.exact, proposal.vetoes) == ("other", True, ())


@pytest.mark.parametrize(
    ("others", "veto"),
    [
        ([Neighbour("two", "which one", "B", 1.0)], "conflict"),
        ([Neighbour("two", "which one", "A", 1.0, failed=True)], "failed"),
    ],
)
def test_an_exact_repeat_that_is_disputed_is_vetoed(others: list[Neighbour], veto: str) -> None:
    """One text with two verified answers has none, and one that has failed since is not served."""
    assert proposed("which one", [Neighbour("one", "which  one", "A", 1.0), *others]).vetoes == (veto,)


@pytest.mark.parametrize(
    ("asked", "known", "veto"),
    [
        ("Track order 48231", "Track order 48213", "veto_numbers"),
        ("Remind me at 7pm", "Remind me at 7am", "veto_numbers"),
        ("What was my bill in June?", "What was my bill in January?", "veto_numbers"),
        ("Send the invoice to Sam", "Send the invoice to Sarah", "veto_names"),
        ("Which plans don't include calls?", "Which plans include calls?", "veto_negation"),
        ("How much is delivery over fifty?", "How much is delivery under fifty?", "veto_scope"),
        ("How do I unlock my card?", "How do I lock my card?", "veto_words"),
        ("Move data from MySQL to Postgres", "Move data from Postgres to MySQL", "veto_order"),
        ("What's the weather like tomorrow?", "What's the weather like tomorrow?!", "time_dependent"),
        ("How much did I spend last month?", "How much did I spend last month", "time_dependent"),
    ],
)
def test_thin_support_is_the_same_question_or_none(asked: str, known: str, veto: str) -> None:
    """With one verified task, a word that can change the answer is a veto, and so is a question about time."""
    assert veto in vetoes(asked, known)


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ("hi, how do I add a user to the workspace please", "How do I add a user to the workspace?"),
        ("Good morning team! How do I add users to the workspace?", "How do I add a user to the workspace?"),
        ("in the workspace, how do I add a user", "How do I add a user in the workspace?"),
        ("What is 1,500 divided by 2?", "what's 1500 divided by two"),
        ("Do you offer a vegitarian set menu?", "Do you offer a vegetarian set menu?"),
        ("Is there step-free acess at the station?", "Is there step-free access at the station?"),
        ("I do not see the invoice", "I don't see the invoice"),
    ],
)
def test_thin_support_allows_for_what_says_nothing(asked: str, known: str) -> None:
    """Greetings, fillers, plurals, a phrase's place, ways to write a number and slips leave a question the same."""
    assert asks_the_same(asked, known)
    assert vetoes(asked, known) == ()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("statment", "statement", True),
        ("perscription", "prescription", True),
        ("emergancy", "emergency", True),
        ("adress", "address", True),
        ("contact", "contract", False),
        ("country", "county", False),
        ("employer", "employee", False),
        ("included", "excluded", False),
        ("increase", "decrease", False),
        ("angle", "angel", False),
        ("prescribe", "proscribe", False),
        ("lock", "unlock", False),
        ("word", "word", True),
    ],
)
def test_slips_are_told_from_other_words(one: str, other: str, *, same: bool) -> None:
    """Two spellings of a word are one word; two words that differ by a letter are not, whichever comes first."""
    assert is_misspelt(one, other) == is_misspelt(other, one) == same


def test_thick_support_need_not_be_the_same_question() -> None:
    """Three verified tasks that agree allow for other words; two do not."""
    assert vetoes("can you say how money gets on a card", *TASKS[:3]) == ()
    assert vetoes("can you say how money gets on a card", *TASKS[:2]) != ()


@pytest.mark.parametrize(
    ("asked", "veto"),
    [
        ("how do i top up my card by 500", "veto_numbers"),
        ("how do i not top up my card", "veto_negation"),
        ("how do i top up a card at the Lloyds branch", "veto_names"),
        ("how do i top up my card after a payment", "veto_scope"),
        ("how do i top up my card today", "time_dependent"),
    ],
)
def test_thick_support_vetoes_what_none_of_it_has(asked: str, veto: str) -> None:
    """Where the tasks are alike in numbers, names, negation, scope or time, a request that differs is vetoed."""
    assert vetoes(asked, *TASKS[:4]) == (veto,)


def test_thick_support_shows_what_does_not_matter() -> None:
    """Where the numbers of the tasks differ among themselves, another number is no objection."""
    tasks = [f"{task} with {amount} pounds" for task, amount in zip(TASKS, (10, 20, 30, 45), strict=False)]
    assert vetoes("i want to put 500 pounds on my card", *tasks) == ()


@pytest.mark.parametrize("asked", ["how do i top up my card after a payment", "how do i top up my card today"])
def test_scope_and_time_lower_the_score_of_broad_support(asked: str) -> None:
    """With six tasks that agree, words of scope and time are no veto any more; they cost some of the score."""
    plain = proposed("how do i top up my card payment", support(TASKS))
    told = proposed(asked, support(TASKS))
    assert told.vetoes == ()
    assert told.score < plain.score


def test_number_and_negation_stay_vetoes_of_broad_support() -> None:
    """Six tasks that agree do not outweigh a number or a negation that none of them has."""
    assert vetoes("how do i top up my card by 500", *TASKS) == ("veto_numbers",)
    assert vetoes("how do i never top up my card", *TASKS) == ("veto_negation",)


def test_what_is_lacking_is_a_veto_too() -> None:
    """A request without the number that all the tasks have in common asks for something else."""
    assert vetoes("how do i top up my card", *(f"{task} by 500" for task in TASKS)) == ("veto_numbers",)


def test_texts_that_are_too_long_are_not_compared() -> None:
    """Beyond the limit nothing is proposed for serving, neither for a long request nor on long tasks."""
    long = "word " * LONGEST
    assert "too_long" in vetoes(long, "word")
    assert "too_long" in vetoes("word", long)


def test_a_rival_lowers_the_score() -> None:
    """The nearer a task with another answer, the less sure is the proposal."""
    rivals = [support(["how do i close my account"], "close", cosine)[0] for cosine in (0.2, 0.6, 0.75)]
    scores = [proposed(TASKS[0], [*support(TASKS[1:4]), rival]).score for rival in rivals]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_what_was_seen_often_is_no_further_evidence() -> None:
    """The same task with the same answer counts once, and does not make thin support thick."""
    once = support(["how do i close my account"])
    often = [Neighbour(f"again-{i}", "How do I close my  account", "top_up", 0.7) for i in range(5)]
    assert proposed("close it", [*once, *often]).vetoes == proposed("close it", once).vetoes != ()


def test_value_weighs_neighbours() -> None:
    """What has failed before has less of a say."""
    good = Neighbour("good", "how do i close my account", "close", 0.8, value=0.9)
    bad = Neighbour("bad", "how do i open my account", "open", 0.8, value=0.2)
    assert proposed("what about my account", [bad, good]).answer == "close"


WORDS = st.sampled_from(
    ["card", "money", "London", "not", "500", "today", "all", "how", "cafe\u0301", "C++", "don't", "\u2019"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join) | st.text(max_size=20)
NEIGHBOURS = st.lists(
    st.builds(
        Neighbour,
        memory_id=st.uuids().map(str),
        text=TEXTS,
        answer=st.sampled_from(["a", "A.", "b", "c"]),
        cosine=st.floats(-1, 1),
        value=st.floats(0, 1),
        failed=st.booleans(),
    ),
    max_size=NEAREST,
    unique_by=lambda n: n.memory_id,
)


@given(TEXTS, NEIGHBOURS, st.randoms(use_true_random=False))
def test_any_neighbours_give_one_proposal(query: str, neighbours: list[Neighbour], chance: random.Random) -> None:
    """Whatever the texts, a proposal is scored within [0, 1], does not depend on their order, and names its own."""
    proposal = propose(query, neighbours, normal_answer)
    shuffled = list(neighbours)
    chance.shuffle(shuffled)
    assert propose(query, shuffled, normal_answer) == proposal
    if proposal is None:
        assert not neighbours
        return
    assert 0 <= proposal.score <= 1
    answers = {n.memory_id: normal_answer(n.answer) for n in neighbours}
    assert {answers[memory_id] for memory_id in proposal.memory_ids} == {proposal.key}


@given(TEXTS, TEXTS)
def test_a_difference_is_mutual(one: str, other: str) -> None:
    """Two texts ask the same in either order; a text with words asks the same as itself."""
    assert asks_the_same(one, other) == asks_the_same(other, one)
    assert asks_the_same(one, one) == bool(wording(one).tokens)


@pytest.mark.parametrize(
    ("text", "depends"),
    [
        ("What time is it now?", True),
        ("What\u2019s the latest version?", True),
        ("Wie wird das Wetter heute?", True),
        ("now that I have paid, what is next?", False),
        ("How do I renew my passport?", False),
    ],
)
def test_questions_about_today(text: str, *, depends: bool) -> None:
    """Words of time tell which answers go stale."""
    assert (present_in_any(text) == "clock") == depends
