"""A reasoning model's thoughts fill the budget, and the same answer after other thoughts counts as another one.

Reports: https://github.com/QwenLM/Qwen-Agent/issues/640 and https://github.com/NousResearch/hermes-agent/pull/12361
(thoughts leak into what is stored and sent again; tags that are not closed, or whose beginning is missing).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import body, hashing_memory, lexical_memory, teach
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.conversation.text import without_thoughts
from optillm_memory.learn.outcomes import same_answer

TASK = "How do I rotate the signing keys of the gateway?"
ANSWER = "Run `gateway keys rotate` and restart the edge."
LONG = "Let me weigh it. " * 800
FORMS = {
    "think": "<think>{}</think>\n\n{}",
    "thinking": "<thinking>\n{}\n</thinking>\n{}",
    "thought": "<thought>{}</thought>{}",
    "capitals": "<THINK>{}</THINK>\n{}",
    "twice": "<think>{0}</think>\n<think>{0}</think>\n{1}",
    "begun in the prompt": "{}</think>\n\n{}",
    "kimi": "\u25c1think\u25b7{}\u25c1/think\u25b7{}",
    "mistral": "[THINK]{}[/THINK]{}",
    "harmony": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
}


@pytest.mark.parametrize("form", FORMS)
def test_thoughts_are_taken_off(form: str) -> None:
    """However a model marks its thoughts, what is left is its answer."""
    assert without_thoughts(FORMS[form].format("I wonder", ANSWER)) == ANSWER


@pytest.mark.parametrize("form", FORMS)
def test_an_exemplar_holds_the_answer_alone(tmp_path: Path, form: str) -> None:
    """An exemplar is stored, injected and served without thoughts, and so fits the budget whatever was thought."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, FORMS[form].format(LONG, ANSWER))
        (record,) = memory.store.list_memories(None)
        assert record.answer == ANSWER
        turn = memory.begin(body(TASK))
        assert [m["content"] for m in turn.messages] == [TASK, ANSWER, TASK]
        served = memory.begin(body(TASK, agent_memory={"reuse": {"max_error": 0.05}}))
        assert served.reused()["choices"][0]["message"]["content"] == ANSWER


def test_the_same_answer_after_other_thoughts_is_the_same(tmp_path: Path) -> None:
    """Two thoughts with one answer are one exemplar with two successes, and no conflict."""
    assert same_answer(f"<think>a</think>{ANSWER}", f"<think>b</think>\n{ANSWER}")
    with lexical_memory(tmp_path) as memory:
        for thought in ("first this", "rather that", ""):
            teach(memory, TASK, f"<think>{thought}</think>\n{ANSWER}" if thought else ANSWER)
        (record,) = memory.store.list_memories(None)
        assert (record.successes, record.failures) == (3, 0)


def test_the_log_keeps_what_was_said(tmp_path: Path) -> None:
    """The trace holds the answer as it came, thoughts and all: it is the log."""
    with lexical_memory(tmp_path) as memory:
        turn = teach(memory, TASK, f"<think>hm</think>{ANSWER}")
        assert memory.trace(turn.trace_id)["answer"] == f"<think>hm</think>{ANSWER}"


@pytest.mark.parametrize(
    "text",
    [
        "Wrap it in `<think>` and `</think>` tags.",
        "```xml\n<think>\nkept, for it is in a fence\n</think>\n```",
        "Use the <thinking> element:\n\n```html\n<thinking>x</thinking>\n```\nThat is all.",
        "I think <b>so</b>.",
        "",
    ],
)
def test_an_answer_about_such_marks_is_left_alone(text: str) -> None:
    """Marks in the middle of a line, or in a code fence, are what the answer is about."""
    assert without_thoughts(text) == text


@given(
    st.text(alphabet=st.characters(exclude_characters="<>[]|\u25c1\u25b7"), max_size=80), st.sampled_from(sorted(FORMS))
)
def test_a_text_without_marks_is_never_changed(text: str, form: str) -> None:
    """Nothing is taken from an answer that has no marks, and marked thoughts go without a trace of them."""
    assert without_thoughts(text) == text
    if "<" in FORMS[form][:1] and text.strip():
        assert "wondering" not in without_thoughts(FORMS[form].format("wondering", text))
