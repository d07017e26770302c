"""How it is said: hits are rendered within their budget, put in at one place, and can be taken out again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import assistant, hit
from hypothesis import example, given
from hypothesis import strategies as st

from optillm_memory.conversation.identity import prefix_hashes
from optillm_memory.conversation.text import BLOCK_CLOSE, BLOCK_OPEN, without_insertions
from optillm_memory.inject.place import place, still_anchored, strip
from optillm_memory.inject.render import MARK, as_block, as_turns, estimate_tokens
from optillm_memory.records import Message, Placement

ANY_TEXT = st.text(st.characters(), max_size=60)
HITS = [hit(f"task {n}", f"answer {n}", score=1 - n / 10) for n in range(6)]


def said(turns: list[Message] | str) -> list[str]:
    """Return the texts of rendered turns."""
    assert isinstance(turns, list)
    return [str(turn["content"]) for turn in turns]


# -- rendering -------------------------------------------------------------------------------------


def test_turns_put_the_most_similar_last() -> None:
    """The best hit stands nearest to the request, and each is a user turn with its answer."""
    rendering = as_turns(HITS, max_items=2, token_budget=1_000)
    assert said(rendering.payload) == ["task 1", "answer 1", "task 0", "answer 0"]
    assert [t["role"] for t in rendering.payload if isinstance(t, dict)] == ["user", "assistant"] * 2
    assert [i.memory_id for i in rendering.injected] == [h.memory.memory_id for h in HITS[:2]]


def test_a_block_is_delimited_and_datamarked() -> None:
    """Every line of a memory carries the mark, between one opening and one closing delimiter; the best is last."""
    text = as_block([hit("one\ntwo", "three\u2028four\x0bfive"), HITS[0]], max_items=2, token_budget=1_000).payload
    assert isinstance(text, str)
    assert text.startswith(BLOCK_OPEN)
    assert text.endswith(BLOCK_CLOSE)
    for line in ("one", "two", "three", "four", "five", "task 0", "answer 0"):
        assert MARK + line in text.split("\n")
    assert text.index("task 0") < text.index("one")


@pytest.mark.parametrize("render", [as_turns, as_block])
@pytest.mark.parametrize("limits", [{"max_items": 0, "token_budget": 1_000}, {"max_items": 5, "token_budget": 0}])
def test_limits_of_zero_render_nothing(render: Any, limits: dict[str, int]) -> None:
    """With no items or no tokens allowed nothing is said, not even a header."""
    rendering = render(HITS, **limits)
    assert not rendering.payload
    assert rendering.injected == ()
    assert len(rendering.over_budget) == (len(HITS) if limits["max_items"] else 0)


@pytest.mark.parametrize("render", [as_turns, as_block])
def test_a_memory_that_does_not_fit_is_left_out_whole(render: Any) -> None:
    """A long memory is named as over budget, never cut, and makes way for a shorter one."""
    long = hit("long", "word " * 500)
    rendering = render([long, HITS[0]], max_items=5, token_budget=200)
    assert rendering.over_budget == (long.memory.memory_id,)
    assert [i.memory_id for i in rendering.injected] == [HITS[0].memory.memory_id]
    assert "word word" not in str(rendering.payload)


@given(
    st.lists(st.tuples(st.text(max_size=200), st.text("ab <\n|", max_size=400)), max_size=6),
    st.integers(0, 300),
    st.integers(0, 4),
)
@example([("t", "a\n" * 100)], 230, 1)
@example([("t", BLOCK_OPEN * 40)], 260, 1)
def test_rendering_keeps_its_limits(texts: list[tuple[str, str]], budget: int, items: int) -> None:
    """What is injected is never estimated above the budget, nor more than the items allowed."""
    hits = [hit(task, answer) for task, answer in texts]
    turns, block = (render(hits, max_items=items, token_budget=budget) for render in (as_turns, as_block))
    assert sum(estimate_tokens(t) for t in said(turns.payload)) <= budget
    assert not block.payload or estimate_tokens(str(block.payload)) <= budget
    for rendering in (turns, block):
        assert len(rendering.injected) <= items
        assert sum(i.tokens for i in rendering.injected) <= budget


@given(ANY_TEXT, st.sampled_from([BLOCK_CLOSE, BLOCK_OPEN, "</AGENT_memory >", "</agent_memory\n>"]), ANY_TEXT)
def test_a_quoted_text_cannot_close_the_block(before: str, forged: str, after: str) -> None:
    """A memory that holds the delimiter opens and closes nothing, in the task or in the answer."""
    text = as_block([hit(before + forged + after, after + forged)], max_items=1, token_budget=10_000).payload
    assert isinstance(text, str)
    assert text.lower().count(BLOCK_OPEN[:-1]) == 1
    assert text.lower().count(BLOCK_CLOSE[:-1]) == 1
    assert without_insertions(f"request\n\n{text}", [text]) == "request"


# -- placement -------------------------------------------------------------------------------------

CONTENT: st.SearchStrategy[Any] = st.one_of(
    ANY_TEXT, st.none(), st.lists(ANY_TEXT.map(lambda t: {"type": "text", "text": t}), max_size=3)
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": CONTENT}),
    min_size=1,
    max_size=5,
)
TURNS = st.lists(ANY_TEXT, max_size=2).map(
    lambda texts: [m for t in texts for m in ({"role": "user", "content": t}, assistant(t))]
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list[Placement]]:
    """Draw messages and placements anywhere in them."""
    messages = draw(MESSAGES)
    positions = draw(st.lists(st.integers(0, len(messages) - 1), max_size=4))
    return messages, [_placement(draw, position) for position in positions]


def _placement(draw: st.DrawFn, position: int) -> Placement:
    block = draw(st.booleans())
    payload: Any = draw(st.text(min_size=1, max_size=20) if block else TURNS)
    return Placement("", position, "block" if block else "turns", payload)


@given(conversations())
def test_strip_undoes_place(drawn: tuple[list[Message], list[Placement]]) -> None:
    """Whatever was put in can be taken out again to the byte, and the client's own messages are never touched."""
    messages, placements = drawn
    before = json.dumps(messages)
    assert strip(place(messages, placements), placements) == messages
    assert json.dumps(messages) == before


@given(conversations())
def test_what_stands_before_an_insertion_is_unchanged(drawn: tuple[list[Message], list[Placement]]) -> None:
    """Messages before the first insertion stay as they were sent, so that the provider's cache holds."""
    messages, placements = drawn
    first = min((p.position for p in placements), default=len(messages))
    assert place(messages, placements)[:first] == messages[:first]


def test_forms_are_placed_where_they_belong() -> None:
    """Turns go before their message, a block to the end of its text, or as one more part of a message of parts."""
    turns = Placement("", 0, "turns", [{"role": "user", "content": "t"}, assistant("a")])
    block = Placement("", 0, "block", "B")
    assert place([{"role": "user", "content": "q"}], [turns, block]) == [
        {"role": "user", "content": "t"},
        assistant("a"),
        {"role": "user", "content": "q\n\nB"},
    ]
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert place([{"role": "user", "content": parts}], [block])[0]["content"] == [*parts, {"type": "text", "text": "B"}]
    assert place([{"role": "user", "content": None}], [block])[0]["content"] == "B"


def test_a_placement_stands_only_while_its_surroundings_do() -> None:
    """A later request gets the same insertion; an edited or shortened conversation does not."""
    first: list[Message] = [{"role": "user", "content": "q"}]
    placement = Placement(prefix_hashes(first)[0], 0, "block", "B")
    later = [*first, assistant("a"), {"role": "user", "content": "q2"}]
    assert still_anchored([placement], prefix_hashes(later)) == [placement]
    edited = [{"role": "user", "content": "Q"}, *later[1:]]
    assert still_anchored([placement], prefix_hashes(edited)) == []
    assert still_anchored([placement], ()) == []
