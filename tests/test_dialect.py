"""What an error is in a tool's own dialect is learned from what follows, and unlearned with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builders import SCOPE, assistant, body, lexical_memory, response

from optillm_memory import Memory
from optillm_memory.conversation.actions import Action
from optillm_memory.learn.dialect import LEAST_EPISODES, Reply, form_of, is_error

NOPE = "Hm, the library has no book called '{}'."
FORM = form_of(NOPE.format("x")).key  # type: ignore[union-attr]


def call(text: str) -> Action:
    """Return a call of the lending tool."""
    return Action("lend", "book", text)


def replies(count: int, *, corrected: bool = True, form: str = FORM) -> list[Reply]:
    """Return what one call in each of so many episodes got, and whether it was corrected."""
    after = call("the hobbit") if corrected else None
    return [Reply(f"e{n}", call("teh hobit"), form, after, "", False) for n in range(count)]


def test_a_form_is_a_short_message_in_words() -> None:
    """Names and numbers do not split it; data, long texts and single words are no message."""
    one, other = form_of(NOPE.format("a")), form_of(NOPE.format("b"))
    assert one is not None
    assert other is not None
    assert one.key == other.key
    for text in ("", "[1, 2]", '{"a": 1}', "done", "word " * 100, "a\nb\nc\nd", "17.5"):
        assert form_of(text) is None


def test_a_corrected_call_far_more_often_than_not_makes_an_error() -> None:
    """Enough episodes, a high share, and more than after the tool's other results."""
    assert is_error(FORM, replies(LEAST_EPISODES + 2))
    assert not is_error(FORM, replies(LEAST_EPISODES - 1))
    assert not is_error(FORM, replies(12, corrected=False))
    assert not is_error(FORM, [*replies(6), *[Reply(f"x{n}", call("a"), FORM) for n in range(6)]])
    same = [Reply(f"e{n}", call("teh hobit"), FORM, call("teh hobit"), "", False) for n in range(12)]
    assert not is_error(FORM, same)
    again = [Reply(f"e{n}", call("teh hobit"), FORM, call("the hobit"), FORM, False) for n in range(12)]
    assert not is_error(FORM, again)
    failing = [Reply(f"e{n}", call("teh hobit"), FORM, call("the hobit"), "", True) for n in range(12)]
    assert not is_error(FORM, failing)
    # A tool that is always called several times in a row with like arguments says nothing by that.
    others = [Reply(f"o{n}", call("dune 1"), "", call("dune 2"), "", False) for n in range(20)]
    assert not is_error(FORM, [*replies(12), *others])


def lends(memory: Memory, episode: str, *books: tuple[str, str]) -> Any:
    """Run an episode that asks for books one after the other, with what the tool said; return its last turn."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"Lend me a book for {episode}"}]
    turn = None
    for number, (book, said) in enumerate((*books, ("", ""))):
        turn = memory.begin(body(messages=messages, agent_memory={"episode_id": episode}))
        if not book:
            break
        made = {"name": "lend", "arguments": json.dumps({"book": book})}
        asked = {**assistant(""), "tool_calls": [{"id": f"{episode}-{number}", "type": "function", "function": made}]}
        memory.finish(
            turn, {**response(""), "choices": [{"index": 0, "message": asked, "finish_reason": "tool_calls"}]}
        )
        messages += [asked, {"role": "tool", "tool_call_id": f"{episode}-{number}", "content": said}]
    assert turn is not None
    memory.finish(turn, response("done"))
    memory.feedback({"episode_id": episode, "metric": "success", "value": True, "source": "code"})
    return turn


def fixes(memory: Memory) -> list[tuple[str, str]]:
    """Return what fixes are known."""
    memory.settle()
    known = memory.store.fixes.known_fixes(SCOPE, "lend", "", environment="{}", episode_id="")
    return sorted((f.action, f.text) for f in known)


def test_a_dialect_is_learned_from_the_log_and_a_rebuild_learns_the_same(tmp_path: Path) -> None:
    """After some episodes the message is an error, in earlier episodes too, and its fix is suggested at once."""
    with lexical_memory(tmp_path) as memory:
        for n in range(LEAST_EPISODES):
            assert fixes(memory) == []
            lends(memory, f"e{n}", ("teh hobit", NOPE.format("teh hobit")), ("the hobbit", '{"lent": true}'))
        lends(memory, "more", ("teh hobit", NOPE.format("teh hobit")), ("the hobbit", '{"lent": true}'))
        assert fixes(memory) == [("teh hobit", "the hobbit")]
        assert memory.store.fixes.dialect(SCOPE, "lend") == {FORM}
        assert memory.store.fixes.dialect(SCOPE, "other") == frozenset()
        turn = lends(memory, "last", ("teh hobit", NOPE.format("teh hobit")))
        assert [i.suggestion for i in turn.injected] == ["the hobbit"]
        memory.rebuild()
        assert fixes(memory) == [("teh hobit", "the hobbit")]
        # Where it is no longer followed by a corrected call, it is no error any more.
        for n in range(LEAST_EPISODES * 2):
            lends(memory, f"x{n}", ("dune", NOPE.format("dune")))
        assert memory.store.fixes.dialect(SCOPE, "lend") == frozenset()
        assert fixes(memory) == []
