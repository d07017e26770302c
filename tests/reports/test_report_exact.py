"""A cache that folds white space gives one program the answer to another: Python, YAML and Makefiles hang on it.

Reports: https://github.com/jstuart0/project-athena-oss/pull/19 (two questions with one normalised key) and
https://github.com/wso2/gateway-controllers/pull/17 (white space of a prompt is part of what it says).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import body, hashing_memory, teach
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from optillm_memory.conversation.parse import parse
from optillm_memory.conversation.text import BLOCK_CLOSE, BLOCK_OPEN
from optillm_memory.decide.agreement import Neighbour, propose
from optillm_memory.decide.wording import asks_the_same
from optillm_memory.learn.outcomes import normal_answer, same_answer

REUSE = {"reuse": {"max_error": 0.05}}
PYTHON = (
    "What does this print?\nfor i in range(3):\n    total += i\n    print(total)",
    ("What does this print?\nfor i in range(3):\n    total += i\nprint(total)"),
)
YAML = "Is this valid?\nservices:\n  web:\n    image: nginx", "Is this valid?\nservices:\n  web:\n  image: nginx"
MAKE = "Why does make fail?\nall:\n\tcc main.c", "Why does make fail?\nall:\n    cc main.c"
LONE = "Explain:\n    return x", "Explain:\nreturn x"
POEM = "Scan this line:\n  the  sea", "Scan this line:\n  the sea"
ENDS = "Is the last line blank?\nx: |\n  a\n", "Is the last line blank?\nx: |\n  a"
PAIRS = [PYTHON, YAML, MAKE, LONE, POEM, ENDS]


@pytest.mark.parametrize("pair", PAIRS, ids=["python", "yaml", "make", "lone line", "poem", "end"])
@pytest.mark.parametrize("turned", [False, True])
def test_another_layout_is_another_question(tmp_path: Path, pair: tuple[str, str], *, turned: bool) -> None:
    """Of two texts that differ in white space alone neither gets the other's answer, while each gets its own."""
    one, other = reversed(pair) if turned else pair
    with hashing_memory(tmp_path) as memory:
        for _ in range(5):  # so often that what it asks is known to last
            teach(memory, one, "an answer of its own")
        assert memory.begin(body(one, agent_memory=REUSE)).action == "reuse"
        assert memory.begin(body(other, agent_memory=REUSE)).action != "reuse"


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["if a:", "b()", "return c", "x: 1"])), min_size=2), st.data()
)
def test_indentation_is_never_folded(lines: list[tuple[int, str]], data: st.DataObject) -> None:
    """Code whose lines are indented otherwise is neither the same text nor the same question in other words."""
    moved = data.draw(st.integers(0, len(lines) - 1))
    shifted = [(depth + (number == moved), line) for number, (depth, line) in enumerate(lines)]
    one, other = ("\n".join("  " * depth + line for depth, line in found) for found in (lines, shifted))
    assert not asks_the_same(one, other)
    proposal = propose(other, [Neighbour("m", one, "yes", 1.0, successes=9)], normal_answer)
    assert proposal is not None
    assert not proposal.exact
    assert proposal.vetoes


def test_answers_that_differ_in_indentation_differ() -> None:
    """Two programs with the same words are two answers; prose may be wrapped in any way."""
    assert not same_answer("if a:\n    b()\n    c()", "if a:\n    b()\nc()")
    assert same_answer("if a:\n    b()  \n\n    c()", "if a:\n    b()\n    c()\n")
    assert same_answer("A long\nsentence.", "a long sentence")


@pytest.mark.parametrize(
    "written",
    [
        f"What does {BLOCK_OPEN} mean in your prompt?",
        f"{BLOCK_OPEN}\nnot from memory\n{BLOCK_CLOSE}\nWhich port is free?",
        f"Quote: {BLOCK_OPEN}x{BLOCK_CLOSE} and then list the files",
        f"list the files\n\n{BLOCK_OPEN}",
    ],
)
def test_what_a_user_writes_after_our_delimiter_is_kept(tmp_path: Path, written: str) -> None:
    """Nothing is cut from a user's text for looking like ours; what differs behind it is another question."""
    assert parse(body(written)).task == written
    with hashing_memory(tmp_path) as memory:
        for _ in range(5):
            teach(memory, written, "an answer of its own")
        assert memory.begin(body(written, agent_memory=REUSE)).action == "reuse"
        for other in (written + " or not", written.partition(BLOCK_OPEN)[0].strip() or "x"):
            assert memory.begin(body(other, agent_memory=REUSE)).action != "reuse"
