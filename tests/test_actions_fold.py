"""Labels of actions: what the log makes of proposed and served ones, in any order of arrival, and after a restart."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from acting import NOTE, ORDER, PARCEL, SERVING, Run, Way, labels, run, tell, warm, way_of, woken
from builders import SCOPE, hashing_memory

from optillm_memory import Memory, Turn
from optillm_memory.decide.actions import action_partition
from optillm_memory.decide.calibration import WRONG
from optillm_memory.decide.gate import Gate, Label
from optillm_memory.store.maintenance.selection import Selection

SHADOW: dict[str, Any] = {}
BOTH = [ORDER, PARCEL]


def refusing(name: str, arguments: Mapping[str, Any]) -> Any:
    """Return what the tools show once the first one refuses: the note does the work then."""
    return "Error: access denied" if name == ORDER else "Sent." if name == NOTE else {"parcel_id": "", "city": "Rome"}


def served(done: Run) -> list[str]:
    """Return the tools that memory called."""
    return [name for name, _ in done.served]


def correct(memory: Memory, turn: Turn) -> bool | None:
    """Return the label of a turn's action."""
    found: bool | None = memory.why(turn.trace_id)["proposal"]["correct"]
    return found


def value_of(memory: Memory) -> list[tuple[str, float]]:
    """Return status and value of the procedures."""
    found = memory.memories(limit=1000)
    return sorted((m.status, m.value) for m in found if m.kind == "procedure")


# -- shadow ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback_first", [False, True])
@pytest.mark.parametrize("on", ["episode", "last trace", "first trace"])
def test_labels_come_whichever_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str, *, feedback_first: bool
) -> None:
    """A proposal is labelled when it and the outcome are there, wherever in the episode the outcome is reported."""
    with hashing_memory(tmp_path) as memory:
        run(memory, options=SHADOW)
        worker, waiting = memory._shadow._worker, list[Callable[[], None]]()
        if feedback_first:
            monkeypatch.setattr(worker, "do", waiting.append)
        done = run(memory, options=SHADOW, success=None)
        turn = done.turns[0 if on == "first trace" else -1]
        target = {"episode_id": turn.episode_id} if on == "episode" else {"trace_id": turn.trace_id}
        memory.feedback({**target, "metric": "success", "value": True, "source": "code"})
        monkeypatch.undo()
        for work in waiting:
            worker.do(work)
        memory.settle()
        assert labels(memory) == [True, True]
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
        assert labels(memory) == [True, True]


def test_a_retraction_takes_the_labels_back(tmp_path: Path) -> None:
    """Labels stand while the outcome does; a failed episode tells nothing of what was only proposed."""
    with hashing_memory(tmp_path) as memory:
        run(memory, options=SHADOW)
        done = run(memory, options=SHADOW, success=None)
        for value, found in ((True, True), (None, None), (False, None)):
            tell(memory, done, value, feedback_id="one" if value is not False else "two")
            assert [correct(memory, turn) for turn in done.turns[:2]] == [found, found]
        tell(memory, done, None, feedback_id="two")
        tell(memory, done, True, feedback_id="three")
        assert labels(memory) == [True, True]
        memory.rebuild()
        assert labels(memory) == [True, True]


def test_evidence_that_verifies_nothing_labels_nothing(tmp_path: Path) -> None:
    """What a model or an inference says of an episode labels no action."""
    with hashing_memory(tmp_path) as memory:
        run(memory, options=SHADOW)
        done = run(memory, options=SHADOW, success=None)
        tell(memory, done, True, source="llm")
        assert labels(memory) == [None, None]
        tell(memory, done, True, source="human")
        assert labels(memory) == [True, True]


def test_the_same_proposal_is_labelled_once(tmp_path: Path) -> None:
    """While an agent does something else first, one and the same proposal makes one label."""
    with hashing_memory(tmp_path) as memory:
        run(memory, options=SHADOW)
        done = run(memory, options=SHADOW, way=[(NOTE, "W0000007"), *way_of(7)])
        assert labels(memory) == [True]  # after the note nothing goes along with what is known
        assert correct(memory, done.turns[0]) is True


def test_a_wrong_proposal_is_labelled_wrong(tmp_path: Path) -> None:
    """Where the episode was solved otherwise, and what solved it showed something else, the proposal was wrong."""
    with hashing_memory(tmp_path) as memory:
        run(memory, options=SHADOW)
        done = run(memory, options=SHADOW, way=[(NOTE, "W0000007")])
        assert correct(memory, done.turns[0]) is False
        stored = memory.store.procedures.changed(SCOPE, 0)
        assert [s.misled for s in stored] == [0.0, 0.0]  # nobody acted on it
        memory.rebuild()
        assert correct(memory, done.turns[0]) is False


# -- served ----------------------------------------------------------------------------------------


def test_a_served_action_that_fails_is_wrong_at_once(tmp_path: Path) -> None:
    """Its own observation is enough: no feedback is waited for, and no procedure of before is followed any more."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        failed = run(memory, world=refusing, way=[*way_of(7), (NOTE, "W0000007")], success=None)
        assert served(failed) == [ORDER]
        assert failed.llm_calls == 3  # the parcel, the note and the answer are the LLM's
        assert correct(memory, failed.turns[0]) is False
        again = run(memory, success=None)
        assert (served(again), again.reasons[0]) == ([], "quarantined")
        other = run(memory, 8, success=None)  # of another order, but the same procedures
        assert served(other) == []
    with hashing_memory(tmp_path) as memory:
        assert served(run(woken(memory), success=None)) == []
        memory.rebuild()
        assert correct(memory, failed.turns[0]) is False
        assert served(run(woken(memory), success=None)) == []


def test_newer_evidence_lifts_it(tmp_path: Path) -> None:
    """Once the LLM has solved the task again, the way in which it did so is followed."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        run(memory, world=refusing, way=[(NOTE, "W0000007")])
        solved = run(memory, way=way_of(7))
        assert served(solved) == []
        assert solved.reasons[0] == "quarantined"
        assert served(run(memory)) == BOTH


def test_a_served_action_is_judged_with_its_episode(tmp_path: Path) -> None:
    """A failed episode makes what was served in it wrong, a retraction unmakes that."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        done = run(memory, success=None)
        assert served(done) == BOTH
        assert [correct(memory, turn) for turn in done.turns[:2]] == [None, None]
        tell(memory, done, False, feedback_id="one")
        assert [correct(memory, turn) for turn in done.turns[:2]] == [False, False]
        assert served(run(memory, success=None)) == []
        tell(memory, done, None, feedback_id="one")
        assert [correct(memory, turn) for turn in done.turns[:2]] == [None, None]
        assert served(run(memory, success=None)) == BOTH
        tell(memory, done, True, feedback_id="two")
        assert [correct(memory, turn) for turn in done.turns[:2]] == [True, True]


def test_episodes_with_served_actions_teach_no_procedure(tmp_path: Path) -> None:
    """What memory did itself is no evidence of how the task is done, whatever its outcome."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        before = value_of(memory)
        for _ in range(5):
            assert served(run(memory)) == BOTH
        assert value_of(memory) == before
        memory.rebuild()
        assert value_of(memory) == before


def test_a_wrong_action_costs_its_procedure_value(tmp_path: Path) -> None:
    """The procedure that a wrong action rested on is worth less than the others of its kind."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        done = run(memory, world=refusing, way=[(NOTE, "W0000007")], success=None)
        first = done.turns[0].metadata()["reuse"]["memory_ids"][0]
        stored = {s.memory_id: s.misled for s in memory.store.procedures.changed(SCOPE, 0)}
        assert stored[first] == pytest.approx(done.turns[0].created_at)
        assert sum(misled > 0 for misled in stored.values()) == 1


def test_wrong_labels_close_the_gate(tmp_path: Path) -> None:
    """Where what is served turns out wrong often, a gate that was open closes, also after a restart."""
    with hashing_memory(tmp_path) as memory:
        warm(memory, 20)
        assert served(run(memory)) == BOTH
        reasons: list[str] = []
        for _ in range(45):
            reasons += run(memory, success=False).reasons
            run(memory)  # newer evidence, so that it is served again
        assert "closed" in reasons
        assert reasons[-3:-1] == ["closed", "closed"]
        assert served(run(memory, success=None)) == []
        state = gate_of(memory)
        assert state[0].count(WRONG) >= 12
    with hashing_memory(tmp_path) as memory:
        assert gate_of(memory) == state
        memory.rebuild()
        assert gate_of(memory) == state


def gate_of(memory: Memory) -> tuple[list[int], dict[str, Any]]:
    """Return the verdicts of all labels of actions, and the labels by partition."""
    logs = memory._reuse.gate(SCOPE, memory.store.recall.revision(SCOPE)).logs
    rows = {name: log.rows for name, log in logs.items()}
    return [verdict for name, found in rows.items() if "-" in name for _, verdict in found], rows


def test_a_gate_of_actions_opens_and_closes() -> None:
    """The labels of an agent's tools are pooled, until those of one contradict them."""
    gate, one, two = Gate(), action_partition("f", "a"), action_partition("f", "b")
    for _ in range(200):
        gate.add(Label(0.9, correct=True, partition=one))
    for _ in range(30):
        gate.add(Label(0.9, correct=True, partition=two))
    assert gate._proven(one, 0.05)[0] is not None
    assert gate._proven(two, 0.05) == (gate._proven(two, 0.05)[0], False, True)
    assert gate._proven(action_partition("g", "a"), 0.05) == (None, False, True)  # another agent
    for _ in range(20):
        gate.add(Label(0.9, correct=False, partition=two))
    assert gate._proven(two, 0.05)[:2] == (None, True)


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    """Outcomes that come late and in any order leave the labels that a rebuild gives."""
    chance = random.Random(3)
    with hashing_memory(tmp_path) as memory:
        warm(memory, 8)
        runs = [
            run(memory, chance.choice((7, 8)), options=chance.choice((SERVING, SHADOW)), success=None)
            for _ in range(12)
        ]
        chance.shuffle(runs)
        for number, done in enumerate(runs):
            tell(memory, done, chance.random() < 0.8, feedback_id=f"f{number}")
        for number in (1, 4, 7):
            tell(memory, runs[number], None, feedback_id=f"f{number}")
        found, before = labels(memory), memory.store.derived()
        assert {True, None} <= set(found)
        memory.rebuild()
        assert labels(memory) == found
        assert memory.store.derived() == before


def test_what_was_served_of_a_forgotten_episode_is_gone(tmp_path: Path) -> None:
    """Forgetting the episodes that an action was copied from takes the copy out of the log, byte by byte."""
    fixed: Way = [(ORDER, "zanzibar-quokka")]

    def quiet(_name: str, _arguments: Mapping[str, Any]) -> Any:
        return {"status": "shipped"}

    with hashing_memory(tmp_path) as memory:
        taught = [run(memory, options=SHADOW, way=fixed, world=quiet) for _ in range(14)]
        done = run(memory, world=quiet)
        assert done.served == [(ORDER, {"order_id": "zanzibar-quokka"})]
        for one in taught:
            memory.forget(Selection(episode_id=one.turns[0].episode_id))
        assert memory.why(done.turns[0].trace_id)["proposal"] is None
        tell(memory, done, True)
        memory.rebuild()
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert b"zanzibar" not in data
