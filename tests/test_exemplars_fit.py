"""Exemplars only where they fit: where they come from, and that what an agent always writes counts for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agents import DONE, Agent
from builders import FRAME, ask, body, feedback, hashing_memory, lexical_memory, teach, tell, trace

from optillm_memory import Memory
from optillm_memory.learn.exemplars import learn

INSTRUCTIONS = (
    "You are a data analyst of the shipping department.\n"
    "Write the answer as one SQL statement, and nothing else, without comments.\n"
    "The tables are orders, customers, parcels and carriers; each has a numeric id.\n"
    "Never change the data, and never use a table that is not listed above.\n"
)
SAME, OTHER = "Which parcels were lost in transit last week?", "How many holidays does Anna have left?"


def asked(task: str) -> str:
    """Return a request as the agent writes it: its instructions, and then the task."""
    return f"{INSTRUCTIONS}\nTask: {task}"


def known_agent(memory: Memory, task: str = SAME, answer: str = "SELECT 1") -> None:
    """Teach one task, and let the agent ask a few others, so that its lines are known."""
    teach(memory, asked(task), answer)
    for other in ("Name the heaviest customer.", "Compare both carriers by price.", "Find duplicate rows."):
        ask(memory, asked(other), "I do not know")


def found(memory: Memory, request: str, **fields: Any) -> list[str]:
    """Return the kinds of what a request gets."""
    return [item.kind for item in memory.begin(body(request, **fields)).injected]


@pytest.mark.parametrize("opened", [hashing_memory, lexical_memory])
def test_shared_instructions_make_no_two_requests_alike(tmp_path: Path, opened: Any) -> None:
    """Nine tenths of both requests are the same text, and they have nothing to do with each other."""
    with opened(tmp_path) as memory:
        known_agent(memory)
        assert found(memory, asked(OTHER)) == []


@pytest.mark.parametrize("opened", [hashing_memory, lexical_memory])
@pytest.mark.parametrize("task", [SAME, "Which parcels were lost in transit last month?"])
def test_what_fits_is_found_below_shared_instructions(tmp_path: Path, opened: Any, task: str) -> None:
    """The same task, and one like it, still get the exemplar."""
    with opened(tmp_path) as memory:
        known_agent(memory)
        assert found(memory, asked(task)) == ["exemplar"]


def test_the_one_that_fits_goes_first(tmp_path: Path) -> None:
    """Of several exemplars the one whose task alone is most similar has the highest score."""
    with hashing_memory(tmp_path) as memory:
        known_agent(memory)
        teach(memory, asked("Which parcels were lost in transit on the way to Spain?"), "SELECT 2")
        injected = memory.begin(body(asked(SAME))).injected
        best = max(injected, key=lambda item: item.score)
        assert memory.memory(best.memory_id).answer == "SELECT 1"
        assert best.score <= 1


def test_where_nothing_is_shared_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-liners are not even looked at, and texts of several lines that differ keep their scores."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, SAME, "SELECT 1")
        teach(memory, "A poem\nabout parcels that were lost", "roses")
        reads: list[str] = []
        lines = memory.store.procedures.lines

        def counted(*asked_for: Any) -> Any:
            reads.append("read")
            return lines(*asked_for)

        monkeypatch.setattr(memory.store.procedures, "lines", counted)
        hits = {h.memory.memory_id: h.score for h in memory.recall(SAME)}
        (item,) = memory.begin(body(SAME)).injected
        assert item.score == hits[item.memory_id]
        assert reads == []
        two = "A poem\nabout parcels that were lost"
        hits = {h.memory.memory_id: h.score for h in memory.recall(two)}
        injected = memory.begin(body(two)).injected
        assert [i.score for i in injected] == [hits[i.memory_id] for i in injected]
        assert injected


def test_a_slow_encoder_leaves_it_to_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the goals' vectors do not come in time, the words of the goals decide."""
    with hashing_memory(tmp_path) as memory:
        known_agent(memory)
        ask_for = memory.encoder.ask
        whole = asked(SAME).split()

        def slow(key: str, timeout_s: float, **options: Any) -> Any:
            pending = ask_for(key, timeout_s, **options)
            if key.split() != whole and "Task:" in key and "analyst" not in key:
                pending._found = None
            return pending

        monkeypatch.setattr(memory.encoder, "ask", slow)
        assert found(memory, asked(SAME)) == ["exemplar"]
        assert found(memory, asked(OTHER)) == []


# -- where exemplars come from ---------------------------------------------------------------------


def test_a_step_that_worked_makes_no_exemplar(tmp_path: Path) -> None:
    """Inferred success of an agent's action is no evidence that its message answers the task."""
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory, "publish the branch")
        agent.act("git push origin main", DONE)
        agent.close()
        shown = memory.store.list_memories(None)
        assert [m for m in shown if m.kind == "exemplar"] == []
        tell(memory, agent.turns[-1], source="llm")
        assert [m for m in memory.store.list_memories(None) if m.kind == "exemplar"] == []


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("source", ["code", "human", "llm", "inferred"])
def test_what_is_not_verified_teaches_of_one_shot_requests_alone(one_shot: bool, source: Any) -> None:
    """A model's praise makes a candidate of an answer to a task, and nothing of a turn in a dialogue."""
    learned = learn(trace(one_shot=one_shot, frame=FRAME), [feedback(source=source)], (), closing=None)
    assert learned.outcome.verdict == "success"
    assert bool(learned.evidence) is (one_shot or source in ("code", "human"))
