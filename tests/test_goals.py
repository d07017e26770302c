"""Goals: what the user wants, in the user's words, without the lines that all conversations of an agent share."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.conversation.goal import (
    KEY_LENGTH,
    SharedLines,
    goal_of,
    line_key,
    line_keys,
    own_utterances,
    utterances,
)
from optillm_memory.conversation.options import GOAL_LIMIT, parse_options
from optillm_memory.errors import InvalidField

MANUAL = "You are a shell agent.\nAnswer with one command in a code block.\nYou have 3 steps left."


def known(*conversations: str | list[str]) -> SharedLines:
    """Return the shared lines after conversations, each a text or the texts of its user."""
    counts: dict[str, int] = {}
    for texts in conversations:
        for key in line_keys([texts] if isinstance(texts, str) else texts):
            counts[key] = counts.get(key, 0) + 1
    return SharedLines(len(conversations), counts)


def user(text: Any) -> dict[str, Any]:
    """Return a user message."""
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    """Return an assistant message."""
    return {"role": "assistant", "content": text}


# -- utterances ------------------------------------------------------------------------------------


def test_results_of_actions_are_not_what_the_user_wrote() -> None:
    """Tool results and the output of fenced commands are left out, whatever role they come in; parts are joined."""
    messages = [
        {"role": "system", "content": "You act."},
        user([{"type": "text", "text": "Delete the old logs"}, {"type": "text", "text": "of last year"}]),
        said("```bash\nls\n```"),
        user("<output>\na.log\n</output>"),
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "rm", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
        user("   "),
        user("And the ones of May, too"),
    ]
    assert utterances(messages) == ["Delete the old logs\nof last year", "And the ones of May, too"]


@pytest.mark.parametrize("content", [None, 7, [], [{"type": "image_url"}], [None], {}])
def test_messages_without_a_text_say_nothing(content: Any) -> None:
    """Whatever stands in the place of a text, there is no goal in it."""
    assert utterances([user(content)]) == []


# -- lines -----------------------------------------------------------------------------------------


def test_a_counter_makes_no_other_line() -> None:
    """Lines that differ in numbers and white space alone are one; others are not."""
    assert line_key("You have 3 steps  left.") == line_key(" You have 12 steps left. ")
    assert line_key("You have 3 steps left.") != line_key("You have 3 tries left.")
    assert len(line_key("x")) == KEY_LENGTH
    assert line_keys(["a\n\na\nb", "b\nc"]) == [line_key("a"), line_key("b"), line_key("c")]


@pytest.mark.parametrize(
    "line", ["\ud800 lonely", "naïve Ünïcode", "\x00", "١٢٣ steps", "日本語のタスク", "a" * 100_000]
)
def test_any_line_has_a_key(line: str) -> None:
    """No text makes a key fail: surrogates, NUL, other digits, other scripts, long lines."""
    assert len(line_key(line)) == KEY_LENGTH


# -- before anything is known ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["instructions", "example", "output-format", "rules", "IMPORTANT", "system_prompt", "policy", "tools"]
)
def test_sections_that_say_how_to_work_are_guessed_at_first(tag: str) -> None:
    """While fewer than three conversations are known, tag-delimited instructions and examples are no part of a goal."""
    text = f'<{tag} lang="en">\nAlways say please.\n</{tag}>\nRename the branch'
    assert goal_of([text], SharedLines()) == "Rename the branch"
    assert goal_of([text], known("x", "y")) == "Rename the branch"


def test_a_section_that_is_all_there_is_stays() -> None:
    """A message of nothing but a section is the goal itself; so is what no closing tag delimits."""
    whole = "<rules>be kind</rules>"
    assert goal_of([whole], SharedLines()) == whole
    assert goal_of(["<task>sort it</task>"], SharedLines()) == "<task>sort it</task>"
    assert goal_of(["<rules>sort it"], SharedLines()) == "<rules>sort it"


def test_many_open_tags_take_no_time() -> None:
    """A text of nothing but opening tags is searched in time that grows slowly."""
    started = time.process_time()
    own_utterances(["<rules>" * 3_000], SharedLines())
    assert time.process_time() - started < 5


# -- when the agent is known -----------------------------------------------------------------------


def test_lines_of_three_conversations_are_the_agent_s() -> None:
    """What stands in three conversations is no part of a goal, its counter aside; the task's own lines are."""
    shared = known(*(f"{MANUAL.replace('3', str(n))}\nTask: free {n} disks of {name}" for n, name in enumerate("abc")))
    text = f"{MANUAL.replace('3', '77')}\nTask: rotate the keys"
    assert goal_of([text], shared) == "Task: rotate the keys"


def test_two_conversations_are_not_enough() -> None:
    """A line of two conversations may be a task that was asked twice."""
    shared = known(MANUAL + "\nfree the disk", MANUAL + "\nfree the disk", MANUAL + "\nrotate the keys")
    assert goal_of([MANUAL + "\nfree the disk"], shared) == "free the disk"


def test_a_line_of_few_among_many_is_no_agent_s() -> None:
    """What stands in three of a thousand conversations is a task that is asked now and then."""
    shared = known(*["free the disk"] * 3, *(f"task {chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(400)))
    assert not shared.holds(line_key("free the disk"))
    assert known(*["free the disk"] * 3).holds(line_key("free the disk"))


def test_a_task_of_one_line_that_recurs_stays_a_task() -> None:
    """Where every line of a request is shared, those that are shared least are what is asked."""
    tasks = ["free the disk"] * 4 + ["rotate the keys"] * 5
    shared = known(*(f"{MANUAL}\n{task}" for task in tasks))
    assert goal_of([f"{MANUAL}\nfree the disk"], shared) == "free the disk"
    assert goal_of([f"{MANUAL}\nrotate the keys"], shared) == "rotate the keys"
    assert goal_of(["free the disk"], known(*["free the disk"] * 5)) == "free the disk"


def test_a_dialogue_s_goal_grows_with_what_the_user_says() -> None:
    """Utterances follow each other, the latest last; those of nothing but shared lines are left out."""
    shared = known(*(["hello, it is me", f"do {name}", "thank you"] for name in ("this", "that", "something")))
    texts = ["hello, it is me", "cancel my flight", "thank you", "and the hotel, too"]
    assert own_utterances(texts, shared) == ["cancel my flight", "and the hotel, too"]
    assert goal_of(texts, shared) == "cancel my flight\nand the hotel, too"


@pytest.mark.parametrize(
    ("manual", "task"),
    [
        ("Sie sind ein Kundenberater.\nAntworten Sie höflich.", "Bitte stornieren Sie meine Buchung"),
        ("あなたはエージェントです。\n一度に一つのコマンド。", "ディスクを空けてください"),
        ("أنت وكيل.\nأجب بأمر واحد.", "احذف السجلات القديمة"),
        ("Você é um agente.\r\nResponda com SQL.", "Quantos alunos há na turma B?"),
    ],
)
def test_goals_in_any_language(manual: str, task: str) -> None:
    """No rule asks which language the agent or its user speaks."""
    shared = known(*(f"{manual}\n{task} {name}" for name in ("eins", "zwei", "drei")))
    assert goal_of([f"{manual}\n{task}"], shared).strip() == task


def test_nothing_written_has_no_goal() -> None:
    """No utterance, or none with a line, is no goal, known agent or not."""
    assert goal_of([], SharedLines()) == goal_of([], known("a", "b", "c")) == ""
    assert goal_of(["\n\n"], known("a", "b", "c")) == ""


LINES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4).map("\n".join)


@given(st.lists(LINES, max_size=6), st.lists(LINES, max_size=4))
def test_a_goal_is_of_lines_that_were_written(seen: list[str], texts: list[str]) -> None:
    """Whatever is known, a goal has no line that the user did not write; it is empty only where nothing was."""
    goal = goal_of(texts, known(*seen))
    written = {line.strip() for text in texts for line in text.split("\n")}
    assert {line.strip() for line in goal.split("\n")} <= written | {""}
    assert bool(goal.strip()) == any(text.strip() for text in texts)


# -- what the caller says --------------------------------------------------------------------------


def test_the_caller_may_say_the_goal() -> None:
    """`agent_memory.goal` is taken from the body and from a header, without white space around it."""
    assert parse_options({"goal": "  cancel the booking "}, now=0).goal == "cancel the booking"
    assert parse_options(None, {"X-Agent-Memory-Goal": "cancel"}, now=0).goal == "cancel"
    assert parse_options(None, now=0).goal == ""


@pytest.mark.parametrize("goal", [7, ["a"], {"a": 1}, "x" * (GOAL_LIMIT + 1), "\ud800"])
def test_a_goal_that_is_no_text_is_refused(goal: Any) -> None:
    """A goal of another type, one that is too long, and one that is no Unicode are refused by name."""
    with pytest.raises(InvalidField, match="goal"):
        parse_options({"goal": goal}, now=0)


@pytest.mark.parametrize("tools", [[], "x", {"other": []}, {"allow": "bash"}, {"allow": [7]}, {"never": ["x"] * 1_001}])
def test_lists_of_tools_are_checked(tools: Any) -> None:
    """`agent_memory.tools` holds lists of names under three keys and nothing else."""
    with pytest.raises(InvalidField, match="tools"):
        parse_options({"tools": tools}, now=0)


def test_lists_of_tools_are_taken() -> None:
    """The three lists are taken from the body, and as JSON from a header."""
    tools = {"read_only": ["sql"], "allow": ["get"], "never": ["rm"]}
    wanted = {key: tuple(names) for key, names in tools.items()}
    assert parse_options({"tools": tools}, now=0).tools == wanted
    assert parse_options(None, {"X-Agent-Memory-Tools": json.dumps(tools)}, now=0).tools == wanted
