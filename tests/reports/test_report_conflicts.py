"""Of two verified answers to one question both are recalled, undated, and the outdated one stands last.

Report: https://github.com/mem0ai/mem0/issues/5576 (old and new facts coexist, and searches return both).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from builders import ask, body, hit, lexical_memory, settings, teach, tell
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory import Memory
from optillm_memory.inject.render import as_block
from optillm_memory.learn.conflicts import without_superseded

TASK = "Which rate of VAT applies to printed books?"
SAME = [
    "Which rate of VAT applies to printed books?",
    "which rate of vat applies to printed books",
    "Which rate of VAT applies to printed books ?",
]


class Clock:
    """A clock that is set by hand."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        """Return the time, a minute later with each look."""
        self.now += 60
        return self.now


def timed_memory(tmp_path: Path) -> Memory:
    """Open a memory whose clock is set by hand, with its encoder ready."""
    memory = Memory(settings(tmp_path, encoder="hashing"), clock=Clock())
    assert memory.encoder.wait(10) == "ready"
    return memory


def prompt(memory: Memory, task: str, *, text_only: bool = False) -> str:
    """Return what goes upstream for a task."""
    return str(memory.begin(body(task), text_only=text_only).messages)


@pytest.mark.parametrize("later", SAME)
@pytest.mark.parametrize("text_only", [False, True], ids=["turns", "block"])
def test_the_later_answer_is_shown_alone(tmp_path: Path, later: str, *, text_only: bool) -> None:
    """19 % and then 16 %: only the latter goes into the prompt, as turns and as a block, and again after a rebuild."""
    with timed_memory(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        teach(memory, later, "16 percent")
        for _ in range(2):
            said = prompt(memory, TASK, text_only=text_only)
            assert "16 percent" in said
            assert "19 percent" not in said
            memory.rebuild()


def test_what_is_verified_again_is_the_later_one(tmp_path: Path) -> None:
    """An old answer that was verified once more since is the newer evidence."""
    with timed_memory(tmp_path) as memory:
        for answer in ("19 percent", "16 percent", "19 percent"):
            teach(memory, TASK, answer)
        said = prompt(memory, TASK)
        assert "19 percent" in said
        assert "16 percent" not in said


def test_the_earlier_one_is_back_when_the_later_one_fails(tmp_path: Path) -> None:
    """A later answer that turned out wrong, or whose feedback was taken back, hides nothing."""
    with timed_memory(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        turn = ask(memory, TASK, "16 percent")
        tell(memory, turn, feedback_id="later")
        assert "19 percent" not in prompt(memory, TASK)
        memory.feedback({"feedback_id": "later", "value": None})
        assert "19 percent" in prompt(memory, TASK)


def test_answers_to_different_questions_stand_side_by_side(tmp_path: Path) -> None:
    """Alike questions with different answers are no conflict: they are what examples are for."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "Which rate of VAT applies to printed books?", "7 percent")
        teach(memory, "Which rate of VAT applies to printed posters?", "19 percent")
        said = prompt(memory, "Which rate of VAT applies to printed maps?")
        assert "7 percent" in said
        assert "19 percent" in said


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8, unique=True), st.randoms())
def test_one_answer_to_a_question_is_left_whatever_the_order(pairs: list[tuple[int, int]], chance: object) -> None:
    """However many answers there are, the latest of each question is left, and no other."""
    del chance
    hits = [hit(f"the question {'abc'[q]} of mine", f"answer {a}", memory_id=f"m{q}{a}") for q, a in pairs]
    times = {f"m{q}{a}": float(number) for number, (q, a) in enumerate(pairs)}
    kept = {h.memory.memory_id for h in without_superseded(hits, lambda ids: {i: (times[i],) for i in ids})}
    latest = dict(pairs)
    assert kept == {f"m{q}{a}" for q, a in latest.items()}


def test_a_block_tells_when_an_answer_was_given() -> None:
    """What stands in a block has its date: a reader sees which of two is older."""
    text = as_block([hit(created_at=1_767_225_600.0)], max_items=1, token_budget=999).payload
    assert "2026-01-01" in str(text)
    assert list(itertools.islice(str(text).splitlines(), 1)) == ["<agent_memory>"]
