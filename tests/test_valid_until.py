"""What was reported with `valid_until` holds until then: after it, it is neither injected nor served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optillm_memory import InvalidField, Memory, Scope
from optillm_memory.recall.encoder import HashingEncoder
from optillm_memory.settings import Settings

NOW = 1_800_000_000.0
TASK = "Which promotion code does the shop take?"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock that stands at `NOW`."""
    return Clock()


@pytest.fixture
def memory(tmp_path: Path, clock: Clock) -> Iterator[Memory]:
    """Yield a memory that goes by the clock."""
    settings = Settings(db=str(tmp_path / "memory.db"), holdout=0.0, reuse_audit=0.0)
    with Memory(settings, encoder=HashingEncoder, clock=clock) as opened:
        opened.encoder.wait(30)
        yield opened


def answered(memory: Memory, answer: str = "BF26", **feedback: Any) -> str:
    """Have a task answered and verified; return the trace's id."""
    turn = memory.begin({"messages": [{"role": "user", "content": TASK}]})
    message = {"role": "assistant", "content": answer}
    memory.finish(turn, {"id": turn.trace_id, "choices": [{"finish_reason": "stop", "message": message}]})
    memory.settle()
    memory.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code", **feedback})
    return turn.trace_id


def said(memory: Memory) -> list[str]:
    """Return the answers that recall has."""
    return [hit.memory.answer for hit in memory.recall(TASK, scope=Scope("local"))]


def test_a_memory_is_used_until_then_and_not_after(memory: Memory, clock: Clock) -> None:
    """Up to the moment it is recalled and put in the prompt; from it on it is neither."""
    answered(memory, valid_until=NOW + 100)
    assert said(memory) == ["BF26"]
    assert memory.begin({"model": "m", "messages": [{"role": "user", "content": TASK}]}).action == "inject"
    clock.now = NOW + 100
    assert said(memory) == []
    assert memory.begin({"model": "m", "messages": [{"role": "user", "content": TASK}]}).action == "plain"


def test_it_is_not_served_after_it(memory: Memory, clock: Clock) -> None:
    """An exact repeat is answered from memory while the answer holds, and by the model afterwards."""
    answered(memory, valid_until=NOW + 100)
    body = {"messages": [{"role": "user", "content": TASK}], "agent_memory": {"reuse": {"max_error": 0.05}}}
    assert memory.begin(body).action == "reuse"
    clock.now = NOW + 101
    assert memory.begin(body).action == "plain"


def test_what_stands_in_a_conversation_goes_with_it(memory: Memory, clock: Clock) -> None:
    """A conversation in which it was injected does not get it again once it no longer holds."""
    answered(memory, valid_until=NOW + 100)
    body = {"model": "m", "messages": [{"role": "user", "content": TASK}], "agent_memory": {"episode_id": "e"}}
    turn = memory.begin(body)
    memory.finish(turn, {"id": turn.trace_id, "choices": [{"message": {"role": "assistant", "content": "BF26"}}]})
    memory.settle()
    assert memory.begin(body).action == "inject"
    clock.now = NOW + 101
    assert memory.begin(body).action == "plain"


def test_the_latest_evidence_says_until_when(memory: Memory, clock: Clock) -> None:
    """Reported anew without an end it holds on; a retraction of that brings the earlier end back."""
    answered(memory, valid_until=NOW + 100)
    clock.now = NOW + 50
    trace_id = answered(memory, feedback_id="again")
    clock.now = NOW + 200
    assert said(memory) == ["BF26"]
    memory.feedback({"trace_id": trace_id, "feedback_id": "again", "value": None})
    assert said(memory) == []


def test_it_outlasts_a_rebuild(memory: Memory, clock: Clock) -> None:
    """Derived again from the log a memory has the same end."""
    answered(memory, valid_until="2027-01-15T08:01:40Z")
    before = memory.memories()[0]
    assert before.valid_until == NOW + 100
    memory.rebuild()
    assert memory.memories()[0].valid_until == before.valid_until
    clock.now = NOW + 101
    assert said(memory) == []


def test_the_same_feedback_with_another_end_is_refused(memory: Memory) -> None:
    """An id stands for one content: another end under it is no duplicate."""
    trace_id = answered(memory, feedback_id="one", valid_until=NOW + 100)
    again = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code", "feedback_id": "one"}
    assert memory.feedback({**again, "valid_until": NOW + 100})[0].status == "duplicate"
    with pytest.raises(InvalidField, match="used before"):
        memory.feedback({**again, "valid_until": NOW + 200})


@pytest.mark.parametrize("value", ["soon", True, -1, NOW * 1000, float("nan"), [], "9999999-01-01"])
def test_a_moment_that_is_none_is_refused(memory: Memory, value: Any) -> None:
    """What is neither a Unix time in seconds nor ISO 8601 is refused with the field's name."""
    with pytest.raises(InvalidField, match="valid_until"):
        memory.feedback({"trace_id": "t", "metric": "success", "value": True, "source": "code", "valid_until": value})
