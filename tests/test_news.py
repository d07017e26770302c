"""A fix is a small edit of the same intent, and a suggestion carries no values of other people's episodes."""

from __future__ import annotations

import pytest

from optillm_memory.conversation.actions import Action
from optillm_memory.inject.advice import Advice, as_advice
from optillm_memory.learn.intents import is_document, same_intent
from optillm_memory.request.news import News

NO_PYTEST = "/usr/bin/python: No module named pytest"


def shell(text: str) -> Action:
    """Return a shell command as an action."""
    return Action("bash", "command", text)


@pytest.mark.parametrize(
    ("failed", "later", "error", "same"),
    [
        ("git psuh", "git push", "", True),
        ("python -m pytest a/test_b.py", "bin/test a/test_b.py", NO_PYTEST, True),
        ("cd /x && python -m pytest a/test_b.py 2>&1 | tail -5", "bin/test a/test_b.py", NO_PYTEST, True),
        ("pytest a/test_b.py -q", "cargo test a/test_b.py", "bash: pytest: command not found", True),
        ("make all", "bin/test a/test_b.py", "make: command not found", False),
        ("pytest a/test_b.py", "cat a/test_b.py", "bash: pytest: command not found", False),
        ("python app.py", "sed -i s/a/b/ app.py", "NameError: a", False),
        ("python app.py", "python debug.py", "NameError: a", False),
        ("python ap.py", "python app.py", "can't open file 'ap.py': No such file or directory", True),
        ("git commit", "cat > a.py <<'E'\nprint()\nE", "", False),
        ("SELECT a FROM t", "SHOW TABLES", "Unknown column 'a'", False),
        ("SELECT a FROM t WHERE b = 1", "SELECT c FROM t WHERE b = 1", "Unknown column 'a'", True),
    ],
)
def test_another_try_at_the_same(failed: str, later: str, error: str, same: bool) -> None:
    """Words alike, or the same objects under another program where the program was at fault."""
    assert same_intent(shell(failed), shell(later), error) is same


def test_a_text_of_its_own_is_no_fix() -> None:
    """Heredocs, long scripts and passages to be replaced are documents; commands and short queries are not."""
    assert is_document(shell("cat <<EOF > a\nb\nEOF"))
    assert is_document(shell("\n".join("print(1)" for _ in range(12))))
    assert is_document(shell("x" * 700))
    assert is_document(Action("edit", "", '{"path": "a.py", "old_str": "a\\nb\\nc", "new_str": "d"}'))
    assert not is_document(shell("git push --force"))
    assert not is_document(Action("find", "", '{"name": "x", "city": "y"}'))


@pytest.mark.parametrize(
    ("action", "output", "text", "fits"),
    [
        ("git psuh origin main", "git: 'psuh' is not a git command", "git push origin main", True),
        ("python -m pytest a/test_b.py", NO_PYTEST, "bin/test a/test_b.py", True),  # `bin/test` is a constant here
        ("python -m pytest a/test_b.py", NO_PYTEST, "bin/test c/test_d.py", False),  # another's file
        ("SELECT a FROM t", "Unknown column 'a'", "SELECT b FROM t", True),  # `b` is short
        ("SELECT name FROM t", "Unknown column 'name'", "SELECT customer_secret FROM t", False),
        ("SELECT name FROM t", "Unknown column 'name'", "SELECT surname FROM t", True),  # the conversation has it
        ("curl x", "curl: (6) Could not resolve host: x", "curl https://ann.example.com/7Q2", False),
        ("git push", "rejected", "git push " + "x" * 700, False),
        ("git push", "rejected", "git push", False),
    ],
)
def test_no_value_of_another_episode_is_told(action: str, output: str, text: str, fits: bool) -> None:
    """Words of the action, its error and the conversation, plain vocabulary and constants may be told; no others."""
    messages = [{"role": "user", "content": "The columns are surname and age."}]
    news = News(messages, shell(action), output, lambda words: set(words) <= {"bin/test"})
    assert news.is_fit(text) is fits


def test_what_served_the_same_goal_may_be_told_with_its_values() -> None:
    """Where the goal is equal word for word, its values are those of this task."""
    news = News([], shell("SELECT name FROM t"), "Unknown column 'name'", lambda _: False)
    assert not news.is_fit("SELECT surname FROM t")
    assert news.is_fit("SELECT surname FROM t", same_goal=True)


def test_a_name_in_the_error_of_another_episode_is_no_constant() -> None:
    """What was done first is told with what many tasks name, but not with what the error was about there."""
    news = News([], shell("python reproduce.py"), "No module named 'second_app'", lambda _: True)
    assert news.is_fit("mkdir first_app", first_against="No module named 'yaml'")
    assert not news.is_fit("mkdir first_app", first_against="No module named 'first_app'")
    assert news.is_fit("mkdir second_app", first_against="No module named 'first_app'")
    assert news.is_fit("mkdir first_app", first_against="No module named 'first_app'", same_goal=True)


@pytest.mark.parametrize("length", [10, 300, 600])
def test_an_item_is_short(length: int) -> None:
    """With its heading no item is above 1,200 characters, however long the action, the error and the fix."""
    advice = Advice("fix-1", "bash", "command", "a" * 5_000, 3, "e" * 300, "f" * length, confidence=0.9)
    rendering = as_advice([advice], max_items=3, token_budget=2_000)
    assert rendering.injected
    assert len(rendering.payload) <= 1_200
    long = Advice("fix-2", "bash", "command", "a", 1, "e", "f" * 601)
    assert as_advice([long], max_items=3, token_budget=2_000).over_budget == ("fix-2",)
