"""Endings: what a session shows of its own success makes a candidate, and never more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, call, calling
from builders import ask, assistant, body, lexical_memory

from optillm_memory import Memory, Scope
from optillm_memory.learn.endings import Ending, ending_of, may_end
from optillm_memory.learn.procedures.mine import run_of
from optillm_memory.store.maintenance.erase import forget
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.tables.procedures import ProcedureTable

RED = "E   assert 1 == 2\n===== 1 failed, 3 passed in 0.12s ====="
GREEN = "....\n===== 4 passed in 0.10s ====="
COMMIT = "[main 3f2c1ab] Fix the sum\n 1 file changed, 1 insertion(+)"
User = str
Act = tuple[Any, str]


def session(*turns: User | Act | dict[str, Any]) -> list[dict[str, Any]]:
    """Return messages: a text is the user's, a pair an action with its result, a message itself."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "user", "content": turn})
        elif isinstance(turn, tuple):
            made = calling(turn[0] if isinstance(turn[0], dict) and "function" in turn[0] else call(turn[0]))
            messages += [made, {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": turn[1]}]
        else:
            messages.append(turn)
    return messages


def ending(*turns: Any) -> Ending:
    """Return how a session ended."""
    messages = session(*turns)
    return ending_of(*run_of(messages), messages[-1])


DONE = assistant("It is done.")
SUBMIT = call({"answer": "42"}, tool="submit")
ASKED = ("Book the flight.", (call({"flight": "HAT1"}, tool="book_flight"), '{"ok": true}'), assistant("Booked."))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("fix it", ("pytest -q", RED), ("sed -i s/1/2/ a.py", ""), ("pytest -q", GREEN), DONE), "tests_passed"),
        (("fix it", ("pytest -q", RED), ("pytest -q", GREEN), ("git commit -am x", COMMIT), DONE), "tests_passed"),
        (("fix it", ("go test .", "FAIL\texample.com/a\t0.1s"), ("go test .", "ok  \texample.com/a\t0.1s"), DONE),
         "tests_passed"),
        (("fix it", ("sed -i s/1/2/ a.py", ""), ("git commit -am 'Fix the sum'", COMMIT), DONE), "committed"),
        (("what is it?", (call({"query": "SELECT 1"}, tool="sql"), "[[42]]"), (SUBMIT, "accepted")), ""),
        (("what is it?", (call({"query": "SELECT 1"}, tool="sql"), "[[42]]"), calling(SUBMIT)), ""),
        (("what is it?", (call({"query": "SELECT 1"}, tool="sql"), "[[42]]"), (SUBMIT, "accepted"), DONE), "submitted"),
        (("fix it", ("pytest -q", RED), ("pytest -q", GREEN), calling("echo MINI_SWE_AGENT_FINAL_OUTPUT")),
         "tests_passed"),
        (("fix it", ("pytest -q", RED), ("pytest -q", GREEN), assistant("```bash\nsubmit\n```")), "tests_passed"),
        ((*ASKED, "Thank you so much!", assistant("You are welcome.")), "thanks"),
        ((*ASKED, "Perfect, that works. Thanks a lot for your help, have a great day!", DONE), "thanks"),
        ((*ASKED, "No, that's all. Thank you.", DONE), "thanks"),
        ((*ASKED, "Super, vielen Dank!", DONE), "thanks"),
        ((*ASKED, "Merci beaucoup", DONE), "thanks"),
        ((*ASKED, "¡Perfecto! Muchas gracias.", DONE), "thanks"),
        ((*ASKED, "Спасибо большое!", DONE), "thanks"),
        ((*ASKED, "非常感谢", DONE), "thanks"),
        ((*ASKED, "ありがとうございます。", DONE), "thanks"),
    ],
)  # fmt: skip
def test_what_shows_that_it_went_well(turns: Any, expected: str) -> None:
    """The last test run green after a red one, a commit, a result handed in, thanks; nothing while it goes on."""
    found = ending(*turns)
    assert found == (Ending("success", expected) if expected else Ending())


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("fix it", ("pytest -q", GREEN), ("pytest -q", RED), DONE), "tests_failed"),
        (("fix it", ("pytest -q", RED), ("git commit -am x", COMMIT), DONE), "tests_failed"),
        (("fix it", ("pytest -q", RED), ("ls", "a"), calling(SUBMIT)), "tests_failed"),
        (("what?", ("ls", "a"), (SUBMIT, "Your answer is wrong."), DONE), "rejected"),
        (("fix it", ("ls", "a"), assistant("I'm unable to find the cause of this.")), "gave_up"),
        (("fix it", ("pytest -q", RED), ("pytest -q", GREEN), assistant("I could not fix all of it.")), "gave_up"),
        (("fix it", ("ls", "a"), assistant("Ich konnte den Fehler leider nicht beheben.")), "gave_up"),
        ((*ASKED, "That's wrong, I asked for Friday.", DONE), "complaint"),
        ((*ASKED, "Thanks, but it still does not work", DONE), "complaint"),
        ((*ASKED, "Danke, aber es funktioniert immer noch nicht.", DONE), "complaint"),
        ((*ASKED, "ça ne marche pas", DONE), "complaint"),
        ((*ASKED, "还是不行", DONE), "complaint"),
    ],
)
def test_what_shows_that_it_went_wrong(turns: Any, expected: str) -> None:
    """The last test run red, a refused result, giving up, and a complaint even where it is polite."""
    assert ending(*turns) == Ending("failure", expected)


@pytest.mark.parametrize(
    "turns",
    [
        ("fix it", ("pytest -q", GREEN), DONE),  # it was green before
        ("fix it", ("cat log.txt", RED), ("cat log2.txt", GREEN), DONE),  # somebody else's tests
        ("fix it", ("git log", COMMIT), DONE),
        ("fix it", ("git commit -am x", "nothing to commit, working tree clean"), DONE),
        ("fix it", ("git commit -am x", COMMIT), ("git push", "fatal: no remote\nExit code: 128"), DONE),
        ("fix it", ("pytest -q", RED), ("pytest -q", GREEN)),  # it goes on
        ("fix it", ("pytest -q", RED), ("pytest -q", GREEN), calling("ls")),
        ("fix it", ("ls", "a"), assistant("```bash\npytest\n```")),
        (
            "fix it",
            ("ls", "a"),
            calling("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && git diff"),
        ),  # nobody took it yet
        (*ASKED, "Thanks! Now cancel the other one.", DONE),
        (*ASKED, "Thank you. I would like a window seat, too.", DONE),
        (*ASKED, "Thanks, can you tell me the price?", DONE),
        (*ASKED, "Thank you for checking. My reservation id is ABC123.", DONE),
        (*ASKED, "No thanks, I don't want that.", DONE),
        (*ASKED, "Yes, please proceed.", DONE),
        (*ASKED, "ok", DONE),
        (*ASKED, "Thanks!", (call({"flight": "HAT2"}, tool="book_flight"), '{"ok": true}'), DONE),  # it was done after
        ("Thank you for your help. My screen is broken.", ("ls", "a"), DONE),  # the task itself
        ("Thanks!", DONE),
        ("fix it", DONE),
        ("fix it",),
    ],
)
def test_what_shows_nothing(turns: Any) -> None:
    """Where in doubt the ending is unknown."""
    assert ending(*turns) == Ending()


def test_only_words_alone_and_a_result_can_end_a_session() -> None:
    """The look at each step is a look at one message."""
    assert may_end(DONE)
    assert may_end(calling(SUBMIT))
    assert not may_end(calling("ls"))
    assert not may_end(assistant("```bash\nls\n```"))
    assert not may_end(assistant(""))
    assert not may_end({"role": "user", "content": "x"})


# -- candidates ------------------------------------------------------------------------------------


def procedures(memory: Memory) -> list[tuple[str, str]]:
    """Return (status, ending) of the procedures that are listed."""
    found = [m for m in memory.store.list_memories(None) if m.kind == "procedure" and m.status != "withdrawn"]
    return [(m.status, json.loads(m.answer).get("ending", "")) for m in found]


def repaired(memory: Memory, name: str = "one", *, close: bool = True) -> Agent:
    """Run an episode in which tests went from red to green, without a report."""
    agent = Agent(memory, "make the tallies right", options={"episode_id": name})
    agent.act("pytest -q", RED)
    agent.act("sed -i s/1/2/ tallies.py", "")
    agent.act("pytest -q", GREEN)
    if close:
        agent.close("All tests pass now.")
    return agent


def same_as_rebuilt(memory: Memory) -> bool:
    """Whether what is derived is what a rebuild makes of the log."""
    memory.settle()
    before = memory.store.derived()
    memory.rebuild()
    return before == memory.store.derived()


def test_a_session_that_ended_well_makes_a_candidate(tmp_path: Path) -> None:
    """It is listed and counted, offered to nobody, and the same after a rebuild."""
    with lexical_memory(tmp_path) as memory:
        repaired(memory)
        assert procedures(memory) == [("candidate", "tests_passed")]
        assert memory.store.stats()["memories_by_status"]["candidate"] >= 1
        assert same_as_rebuilt(memory)
        assert procedures(memory) == [("candidate", "tests_passed")]
        turn = memory.begin(
            {**repaired(memory, "two").body(), "messages": Agent(memory, "make the tallies right").messages}
        )
        assert "procedure" not in [i.kind for i in turn.injected]
        (stored,) = [p for p in memory.store.procedures.changed(turn.scope, 0) if p.episode_id == "one"]
        assert not stored.stands


def test_a_report_makes_it_verified_and_takes_it_back(tmp_path: Path) -> None:
    """Success by code verifies it, a retraction makes it a candidate again, a failure unmakes it."""
    with lexical_memory(tmp_path) as memory:
        repaired(memory)
        said = {"episode_id": "one", "metric": "success", "value": True, "source": "code", "feedback_id": "f"}
        memory.feedback({**said, "source": "llm", "feedback_id": "model"})
        assert procedures(memory) == [("candidate", "tests_passed")]
        memory.feedback(said)
        assert procedures(memory) == [("verified", "")]
        assert same_as_rebuilt(memory)
        memory.feedback({"feedback_id": "f", "value": None})
        assert procedures(memory) == [("candidate", "tests_passed")]
        assert same_as_rebuilt(memory)
        memory.feedback({**said, "value": False, "feedback_id": "g"})
        assert procedures(memory) == []
        assert same_as_rebuilt(memory)


def test_a_session_that_goes_on_has_not_ended(tmp_path: Path) -> None:
    """The candidate goes when the user complains or the agent acts again, and comes with the user's thanks."""
    with lexical_memory(tmp_path) as memory:
        agent = repaired(memory, close=False)
        assert procedures(memory) == []
        agent.close()
        assert procedures(memory) == [("candidate", "tests_passed")]
        agent.messages.append({"role": "user", "content": "It still does not work."})
        agent.close("Sorry, let me see.")
        assert procedures(memory) == []
        assert same_as_rebuilt(memory)
        agent.messages.append({"role": "user", "content": "Oh, it does. Thank you!"})
        agent.act("git status", "clean")
        assert procedures(memory) == []
        agent.close("Fine.")
        agent.messages.append({"role": "user", "content": "Thank you!"})
        agent.close("You are welcome.")
        assert procedures(memory) == [("candidate", "thanks")]
        assert same_as_rebuilt(memory)


def test_what_nobody_ended_is_not_looked_at_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an agent acts, and for a one-shot request, no conversation is read again."""
    read: list[str] = []
    conversation = ProcedureTable.conversation

    def counted(table: ProcedureTable, scope: Scope, episode_id: str) -> Any:
        read.append(episode_id)
        return conversation(table, scope, episode_id)

    monkeypatch.setattr(ProcedureTable, "conversation", counted)
    with lexical_memory(tmp_path) as memory:
        agent = repaired(memory, close=False)
        for text in ("what is the capital of Peru?", "and of Chile?"):
            ask(memory, body(text, agent_memory={"episode_id": "shots"}))
        assert read == []
        agent.close()
        assert read == ["one"]


def test_a_candidate_goes_with_its_episode(tmp_path: Path) -> None:
    """Nothing of a session that was forgotten is left in its procedure."""
    with lexical_memory(tmp_path) as memory:
        repaired(memory)
        forget(memory.store, Selection(episode_id="one"))
        assert procedures(memory) == []
        assert b"tallies" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
