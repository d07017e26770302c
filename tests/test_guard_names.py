"""The guard on other names: what failed for a reason of its form is warned of, what failed for its names is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from agents import DONE, RIGHT, WRONG, Agent, calling, mend, work
from builders import lexical_memory, response

from optillm_memory import Memory, Turn
from optillm_memory.decide.guard import same_but_for_names


@pytest.mark.parametrize(
    ("action", "known", "places"),
    [
        ("git pussh origin dev", "git pussh origin main", [3]),
        ("touch --parents a/b", "touch --parents c/d", [2]),
        ("git pussh origin main", "git pussh origin main", None),  # nothing differs
        ("git push -f dev", "git push -n dev", None),  # a flag is no name
        ("ls a b c", "ls d e f", None),  # too much differs
        ("make a", "ls a", None),  # another program
        ("ls a", "ls a b", None),
        ("", "", None),
    ],
)
def test_what_differs_in_names_alone(action: str, known: str, places: list[int] | None) -> None:
    """Two actions are alike where the program, the flags and most words are the same."""
    assert same_but_for_names(action, known) == places


def about_to(memory: Memory, command: str, **options: str) -> tuple[Turn, bool]:
    """Let an agent in an episode of its own be about to run a command."""
    return memory.guard(Agent(memory, f"a task for {command}", {}, dict(options)).begin(), response(calling(command)))


def test_other_names_are_warned_of_with_the_fix_for_them(tmp_path: Path) -> None:
    """A mistyped command with another branch is stopped, and the advice has that branch in it."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        turn, again = about_to(memory, WRONG.replace("main", "next"))
        assert again
        assert [i.suggestion for i in turn.injected] == [RIGHT.replace("main", "next")]
        assert not about_to(memory, WRONG.replace("main", "next"), namespace="elsewhere")[1]
        assert not about_to(memory, RIGHT.replace("main", "next"))[1]


def test_an_error_about_a_name_says_nothing_of_others(tmp_path: Path) -> None:
    """That one file was not there does not speak against reading another, nor this one in another conversation."""
    with lexical_memory(tmp_path) as memory:
        missing = "cat: notes.txt: No such file or directory\nExit code: 1"
        work(memory, [("cat notes.txt", missing), ("cat docs/notes.txt", "text\nExit code: 0")], success=True)
        assert not about_to(memory, "cat todo.txt")[1]
        assert not about_to(memory, "cat notes.txt")[1]


def test_a_form_that_has_worked_is_not_warned_of(tmp_path: Path) -> None:
    """Where the same form worked with another name, the failure was not the form's."""
    with lexical_memory(tmp_path) as memory:
        refused = "error: the server refused\nExit code: 1"
        work(memory, [("deploy it north", refused), ("deploy it --retry north", DONE)], success=True)
        assert about_to(memory, "deploy it south")[1]
        work(memory, [("show the plan", "west\nExit code: 0"), ("deploy it west", DONE)], success=True)
        assert not about_to(memory, "deploy it south")[1]
