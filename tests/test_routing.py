"""Routing in one process: choices and rewards in the log, what a policy makes of them, and what arms can answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optillm_memory.conversation.options import Options
from optillm_memory.decide.policy_updater import Row
from optillm_memory.memory import Memory
from optillm_memory.records import Arm, Scope
from optillm_memory.request.deadline import Deadline
from optillm_memory.request.route import can_answer, chance, length_of
from optillm_memory.request.turn import Turn

ARMS = "none@default, none@small=0.1, moa@default=2"
WORDS, PLAIN = Arm("moa@m", "moa", "m"), Arm("none@m", "none", "m")
SCOPE = Scope("local")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Give a memory with three arms, all tried in the warm-up, on an encoder that needs no weights."""
    with opened(tmp_path) as made:
        yield made


def opened(tmp_path: Path, **settings: Any) -> Memory:
    """Open the memory of a test."""
    made = Memory.open(
        tmp_path / "memory.db", **{"encoder": "hashing", "arms": ARMS, "warmup_share": 1.0, "holdout": 0.0, **settings}
    )
    made.encoder.wait(20)
    return made


def ask(memory: Memory, text: str, tokens: int = 100, **field: Any) -> Turn:
    """Ask for a task by approach `auto` and record an answer that took so many tokens."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    turn = memory.begin({**body, "agent_memory": {"approach": "auto", **field}})
    answer = {"index": 0, "message": {"role": "assistant", "content": "so"}, "finish_reason": "stop"}
    memory.finish(turn, {"choices": [answer], "usage": {"prompt_tokens": tokens, "completion_tokens": 0}})
    return turn


def tell(memory: Memory, value: Any, **about: Any) -> str:
    """Give feedback; return its id."""
    said = {"metric": "success", "source": "code", "value": value, **about}
    return memory.feedback(said)[0].feedback_id


def rewards(memory: Memory) -> dict[str, tuple[float | None, int]]:
    """Return (reward, tokens) by the trace that a choice began with."""
    memory.settle()
    _, rows = memory.store.decisions.choices(SCOPE, -1, memory.encoder.fingerprint)
    return {row.trace_id: (row.reward, row.tokens) for row in rows}


def test_a_choice_is_logged_with_all_that_the_policy_saw(memory: Memory) -> None:
    """The log holds the arm, the probabilities, the request's length, and by its vector its cluster."""
    turn = ask(memory, "how long is a piece of string")
    assert turn.choice is not None
    memory.settle()
    _, (row,) = memory.store.decisions.choices(SCOPE, -1, memory.encoder.fingerprint)
    assert (row.trace_id, row.chosen.arm) == (turn.trace_id, turn.arm)
    assert row.chosen.probabilities == pytest.approx(dict.fromkeys(turn.choice.probabilities, 1 / 3))
    assert row.chosen.situation.length == turn.length == len("how long is a piece of string")
    assert row.chosen.situation.vector is not None
    _, (blind,) = memory.store.decisions.choices(SCOPE, -1, "another encoder")
    assert blind.chosen.situation.vector is None


def test_the_latest_verified_outcome_of_the_episode_is_the_reward(memory: Memory) -> None:
    """Whichever trace it is told of, later outcomes count, unverified ones do not, and a retraction undoes."""
    first = ask(memory, "start the job", episode_id="job")
    second = ask(memory, "and now finish it", tokens=400, episode_id="job")
    assert second.choice is None
    assert second.arm == first.arm
    assert rewards(memory) == {first.trace_id: (None, 500)}
    tell(memory, True, trace_id=first.trace_id, source="llm")
    assert rewards(memory)[first.trace_id][0] is None
    tell(memory, False, trace_id=first.trace_id)
    assert rewards(memory)[first.trace_id][0] == 0
    later = tell(memory, True, trace_id=second.trace_id)
    assert rewards(memory)[first.trace_id][0] == 1
    tell(memory, None, trace_id=second.trace_id, feedback_id=later)
    assert rewards(memory)[first.trace_id][0] == 0


def test_feedback_may_come_before_the_request_is_in_the_log(memory: Memory) -> None:
    """What waits for an episode is its reward as soon as there is one."""
    tell(memory, True, episode_id="early")
    turn = ask(memory, "what did i say", episode_id="early")
    assert rewards(memory) == {turn.trace_id: (1.0, 100)}


def test_rebuild_brings_back_rewards_and_beliefs(memory: Memory, tmp_path: Path) -> None:
    """The policy is a fold over the log: emptied and folded again, or in another process, it believes the same."""
    for number in range(30):
        turn = ask(memory, f"task number {number}")
        tell(memory, number % 3 > 0, trace_id=turn.trace_id)
    memory.settle()
    before, report = memory.store.derived(), memory.policy()
    assert len({memory.why(trace_id)["policy"]["arm"] for trace_id in rewards(memory)}) == 3
    memory.rebuild()
    assert memory.store.derived() == before
    assert memory.policy() == report
    memory.close()
    with opened(tmp_path) as again:
        assert again.policy() == report


def test_a_request_that_reads_slowly_undoes_no_reward(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices that one request reads while feedback comes and another takes it are read again, not taken."""
    turn = ask(memory, "how long is a piece of string")
    memory.settle()
    read = memory.store.decisions.choices

    def slowly(scope: Scope, since: int, fingerprint: str) -> tuple[int, list[Row]]:
        monkeypatch.undo()
        found = read(scope, since, fingerprint)
        tell(memory, True, trace_id=turn.trace_id)
        memory.policy()
        return found

    monkeypatch.setattr(memory.store.decisions, "choices", slowly)
    memory.policy()
    assert memory.policy()["all"][turn.arm]["rewards"] == pytest.approx(1, abs=0.01)


def test_a_report_is_of_one_moment(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned while a report is made is in all of it, or in none of it."""
    turn = ask(memory, "sort the list of numbers")
    memory.settle()
    read = memory.store.decisions.task_of

    def while_another_asks(scope: Scope, trace_id: str) -> str:
        monkeypatch.undo()
        tell(memory, True, trace_id=turn.trace_id)
        memory.policy()
        return read(scope, trace_id)

    monkeypatch.setattr(memory.store.decisions, "task_of", while_another_asks)
    report = memory.policy()
    assert report["clusters"][0]["arms"][turn.arm]["rewards"] == report["all"][turn.arm]["rewards"] == 0


def test_beliefs_stay_in_their_scope(memory: Memory) -> None:
    """What one scope's arms earned says nothing to another."""
    turn = ask(memory, "mine", namespace="mine")
    tell(memory, True, trace_id=turn.trace_id)
    assert memory.policy(Scope("local", "mine"))["choices"] == 1
    assert memory.policy()["choices"] == memory.policy(Scope("other", "mine"))["choices"] == 0


def test_cost_is_tokens_at_the_arms_price(memory: Memory) -> None:
    """A thousand tokens of an arm cost its price."""
    for number in range(40):
        ask(memory, f"question {number}", tokens=3000)
    memory.settle()
    report = memory.policy()["all"]
    assert {name: arm["cost"] for name, arm in report.items()} == pytest.approx(
        {"none@default": 3.0, "none@small": 0.3, "moa@default": 6.0}, abs=0.01
    )


def test_an_arm_that_left_the_settings_is_forgotten(memory: Memory, tmp_path: Path) -> None:
    """Arms come and go; an episode whose arm is gone gets a new one, and old rows do no harm."""
    turns = [ask(memory, f"question {number}", episode_id=f"e{number}") for number in range(12)]
    gone = next(turn for turn in turns if turn.arm == "none@small")
    memory.close()
    with opened(tmp_path, arms="none@default, re2@default") as changed:
        report = changed.policy()
        assert (report["choices"], set(report["all"])) == (12, {"none@default", "re2@default"})
        assert ask(changed, "go on", episode_id=gone.episode_id).arm in report["all"]


def test_the_model_default_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """Whatever model the default arm names, `default` in another arm is the request's own."""
    with opened(tmp_path, arms="none@small, none@default") as memory:
        models = {turn.arm: turn.model for turn in (ask(memory, f"question {n}") for n in range(12))}
    assert models == {"none@small": "small", "none@default": "m"}


def test_rebuild_leaves_nothing_that_the_log_does_not_say(memory: Memory) -> None:
    """A reward that no outcome stands for is gone after a rebuild."""
    turn = ask(memory, "what is this worth")
    memory.settle()
    stray = ("stray", 1, 1.0, 5, 5.0, 10**6)
    memory.store.write(lambda tx: tx.db.execute("INSERT INTO rewards VALUES (?, ?, ?, ?, ?, ?)", stray)).result(10)
    memory.rebuild()
    assert [row[0] for row in memory.store.derived() if row[0] == "stray"] == []
    assert rewards(memory) == {turn.trace_id: (None, 100)}


@pytest.mark.parametrize(
    ("extra", "able"),
    [
        ({}, True),
        ({"n": 1, "tools": [], "temperature": 0}, True),
        ({"tools": [{}]}, False),
        ({"functions": [{}]}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"n": 3}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, False),
    ],
)
def test_approaches_are_given_words_alone(extra: dict[str, Any], able: bool) -> None:
    """An approach gets what it can carry; a plain call gets all; what the host does not have is never chosen."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **extra}
    turn = Turn.plain(body, tenant="t", options=Options(), approach="none", now=0.0, deadline=Deadline())
    assert can_answer(WORDS, turn, None) == can_answer(WORDS, turn, {"moa"}) == able
    assert can_answer(PLAIN, turn, set())
    assert not can_answer(WORDS, turn, {"bon"})


def test_where_no_arm_can_answer_the_request_is_plain(tmp_path: Path) -> None:
    """Tools are not lost on approaches that cannot carry them: in any mode, the request goes as it came."""
    with opened(tmp_path, arms="moa@small, re2@default") as memory:
        for mode in ("readwrite", "write"):
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}
            turn = memory.begin({**body, "agent_memory": {"approach": "auto", "mode": mode}})
            assert (turn.approach, turn.model, turn.arm, turn.choice) == ("none", "m", "", None)
            assert [s["reason"] for s in turn.skipped].count("no_arm_can_answer") == 1


def test_chances_are_spread_and_repeat() -> None:
    """A request's chance is its own, the same in any process, and not to be known without the salt."""
    chances = [chance(f"t{number}", b"salt") for number in range(2000)]
    assert chances == [chance(f"t{number}", b"salt") for number in range(2000)]
    assert all(0 <= c < 1 for c in chances)
    for part in range(10):
        assert sum(part / 10 <= c < (part + 1) / 10 for c in chances) == pytest.approx(200, abs=60)
    assert chance("t1", b"other") != chances[1]


@pytest.mark.parametrize(
    ("messages", "length"),
    [
        ([{"content": "four"}, {"content": [{"type": "text", "text": "six6"}, {"type": "image_url"}]}], 8),
        ([{"content": None}, "no message", {"role": "user"}], 0),
        (None, 0),
    ],
)
def test_lengths_are_of_all_words(messages: Any, length: int) -> None:
    """What costs tokens counts, in whatever form it comes; what is malformed counts nothing."""
    assert length_of({"messages": messages}) == length
