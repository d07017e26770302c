"""Freshness: what was switched off is not inserted again, and of two results for one task the later one holds."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from agents import DONE, ERROR, RIGHT, WRONG, Agent, mend, work
from builders import NOW, ask, assistant, body, hashing_memory, lexical_memory, teach, tell, trace
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory import Memory, Turn
from optillm_memory.learn.conflicts import superseded
from optillm_memory.learn.procedures.mine import ProcedureStep
from optillm_memory.learn.procedures.offer import Solved, offer
from optillm_memory.learn.procedures.values import Slot
from optillm_memory.store.maintenance.erase import forget
from optillm_memory.store.maintenance.selection import Selection

TASK = "Which rate of VAT applies to printed books?"


def later(memory: Memory, first: Turn) -> Turn:
    """Begin the second request of a conversation whose first was answered."""
    return memory.begin({**body(*first.sent, assistant("an answer"), "and in Austria?"), "agent_memory": {}})


def test_an_exemplar_that_is_quarantined_is_not_inserted_again(tmp_path: Path) -> None:
    """It stays at its place in the conversation while it is verified, and goes as soon as it is not."""
    with lexical_memory(tmp_path) as memory:
        taught = teach(memory, TASK, "19 percent")
        first = ask(memory, TASK)
        assert [i.kind for i in first.injected] == ["exemplar"]
        again = later(memory, first)
        assert [i.memory_id for i in again.injected] == [i.memory_id for i in first.injected]
        assert again.messages != again.sent
        tell(memory, taught, value=False, feedback_id="wrong")
        assert later(memory, first).messages == again.sent
        memory.rebuild()
        assert later(memory, first).messages == again.sent
        memory.feedback({"feedback_id": "wrong", "value": None})
        assert later(memory, first).messages == again.messages


def test_an_exemplar_whose_evidence_was_taken_back_is_not_inserted_again(tmp_path: Path) -> None:
    """What is withdrawn has no row after a rebuild, and what is a candidate has one: neither is inserted."""
    with lexical_memory(tmp_path) as memory:
        taught = ask(memory, TASK, "19 percent")
        tell(memory, taught, feedback_id="right")
        first = ask(memory, TASK)
        assert first.injected
        tell(memory, taught, source="llm")
        memory.feedback({"feedback_id": "right", "value": None})
        assert [m.status for m in memory.store.list_memories(None)] == ["candidate"]
        assert later(memory, first).messages == later(memory, first).sent
        for _ in range(2):
            memory.rebuild()
            assert not later(memory, first).injected


def test_an_exemplar_that_is_superseded_stays_where_it_stands(tmp_path: Path) -> None:
    """A conversation keeps its prompt when a newer answer is verified; no other gets the old one."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        first = ask(memory, TASK)
        before = later(memory, first).messages
        teach(memory, TASK, "16 percent")
        assert later(memory, first).messages == before
        assert "19 percent" not in str(memory.begin(body(TASK)).messages)


def test_a_fix_stays_while_it_may_be_suggested(tmp_path: Path) -> None:
    """An unverified fix, which says so, stands in the next request; quarantined, it goes."""
    with lexical_memory(tmp_path) as memory:
        for _ in range(2):
            mend(memory, success=None)
        agent = Agent(memory, "push the branch", options={"episode_id": "later"})
        agent.act(WRONG, ERROR)
        agent.act("git status", DONE)
        assert [i.kind for i in agent.turns[-1].injected] == ["fix"]
        assert [i.kind for i in agent.begin().injected] == ["fix"]
        for number in range(3):
            work(memory, [(WRONG, ERROR), (RIGHT, ERROR)], episode_id=f"bad {number}")
        assert {m.status for m in memory.store.list_memories(None) if m.kind == "fix"} == {"quarantined"}
        assert not agent.begin().injected


def test_that_an_action_failed_before_is_no_memory_and_stays(tmp_path: Path) -> None:
    """A note on a failure without a fix has no row among the memories: it stays at its place."""
    with lexical_memory(tmp_path) as memory:
        assert memory.store.episodes.unusable(memory.begin(body("x")).scope, ["failure-0a", "fix-0b"]) == {"fix-0b"}


# -- of two results for one task the later one holds -----------------------------------------------


def statuses(memory: Memory) -> dict[str, str]:
    """Return the status of every memory by its answer."""
    return {m.answer: m.status for m in memory.store.list_memories(None)}


def same_as_rebuilt(memory: Memory) -> bool:
    """Whether what is derived is what a rebuild makes of the log."""
    memory.settle()
    before = memory.store.derived()
    memory.rebuild()
    return before == memory.store.derived()


BOTH = pytest.mark.parametrize("opened", [lexical_memory, hashing_memory])


@BOTH
def test_the_earlier_answer_is_superseded(tmp_path: Path, opened: Any) -> None:
    """It is listed as such, not recalled, and the gate still sees that there was another answer."""
    with opened(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        teach(memory, f" {TASK}\n", "16 percent")
        assert statuses(memory) == {"19 percent": "superseded", "16 percent": "verified"}
        assert [h.memory.answer for h in memory.recall(TASK)] == ["16 percent"]
        assert memory.store.stats()["memories_by_status"] == {"superseded": 1, "verified": 1}
        scope = memory.begin(body("x")).scope
        seen = memory.store.proposals.exemplars(scope, range(10))
        assert sorted(e.record.answer for e in seen.values()) == ["16 percent", "19 percent"]
        assert same_as_rebuilt(memory)


@BOTH
def test_it_is_back_when_the_later_one_is_retracted_or_fails(tmp_path: Path, opened: Any) -> None:
    """Whatever ends the later one brings the earlier one back; what brings it back ends that again."""
    with opened(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        other = ask(memory, TASK, "16 percent")
        for end in ({"feedback_id": "right", "value": None}, None):
            tell(memory, other, feedback_id="right" if end else "again")
            assert statuses(memory)["19 percent"] == "superseded"
            if end:
                memory.feedback(end)
            else:
                tell(memory, other, value=False)
            assert statuses(memory)["19 percent"] == "verified"
            assert [h.memory.answer for h in memory.recall(TASK)] == ["19 percent"]
            assert same_as_rebuilt(memory)


def test_it_is_back_when_the_later_one_is_forgotten(tmp_path: Path) -> None:
    """Deleting the trace that superseded it is as if it had never been."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        other = teach(memory, TASK, "16 percent")
        forget(memory.store, Selection(trace_id=other.trace_id))
        assert statuses(memory) == {"19 percent": "verified"}
        assert same_as_rebuilt(memory)


def test_answers_that_agree_support_each_other(tmp_path: Path) -> None:
    """The same answer again, in other case or with a full stop, is more support and no conflict."""
    with lexical_memory(tmp_path) as memory:
        for answer in ("16 percent", "16 Percent.", "16 percent"):
            teach(memory, TASK, answer)
        assert [(m.status, m.successes) for m in memory.store.list_memories(None)] == [("verified", 3)]


@pytest.mark.parametrize(
    "other",
    [
        {"request": body("Which rate of VAT applies to printed posters?")},  # another task
        {"request": body({"role": "system", "content": "In Austria."}, TASK)},  # another frame
        {"request": body(TASK, agent_memory={"namespace": "austria"})},  # another scope
    ],
)
def test_only_the_same_task_in_the_same_frame_and_scope_is_in_conflict(tmp_path: Path, other: Any) -> None:
    """What differs in the question, the instructions or the scope stands side by side."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, "19 percent")
        tell(memory, ask(memory, other["request"], "16 percent"))
        assert set(statuses(memory).values()) == {"verified"}


def test_long_tasks_that_differ_in_the_middle_are_not_the_same(tmp_path: Path) -> None:
    """The key of a task is of its ends; what stands between them counts, too."""
    with lexical_memory(tmp_path) as memory:
        for middle in ("red", "green"):
            teach(memory, f"{'begin ' * 200}{middle}{' end' * 200}", middle)
        assert set(statuses(memory).values()) == {"verified"}


def test_what_keeps_being_verified_stands_beside_the_other_with_dates(tmp_path: Path) -> None:
    """Two answers that are verified in turn are both shown, in a block that dates them."""
    with lexical_memory(tmp_path) as memory:
        for answer in ("19 percent", "16 percent", "19 percent", "16 percent"):
            teach(memory, TASK, answer)
        assert set(statuses(memory).values()) == {"verified"}
        prompt = str(memory.begin(body(TASK)).messages)
        assert "19 percent" in prompt
        assert "16 percent" in prompt
        assert prompt.count("verified answer (2") == 2
        assert same_as_rebuilt(memory)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(verdicts: list[tuple[int, bool]], chance: Random) -> None:
    """Whichever feedback comes first, the same answers are superseded."""
    states = []
    traces = [trace(TASK, f"answer {a}", created_at=NOW + n, episode_id=f"e{n}") for n, (a, _) in enumerate(verdicts)]
    for _ in range(2):
        order = list(range(len(verdicts)))
        chance.shuffle(order)
        with tempfile.TemporaryDirectory() as folder, lexical_memory(Path(folder)) as memory:
            memory.store.write(lambda tx: [tx.add_trace(made) for made in traces]).result()
            for n in order:
                said = {"metric": "success", "source": "code", "feedback_id": f"f{n}", "occurred_at": NOW}
                memory.feedback({**said, "trace_id": traces[n].trace_id, "value": verdicts[n][1]})
            states.append(statuses(memory))
            assert same_as_rebuilt(memory)
    assert states[0] == states[1]


@given(st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1))
def test_the_latest_stands_and_what_came_back_stands_beside_it(verified: dict[int, list[int]]) -> None:
    """The one that was verified last is never superseded; one that was verified once, earlier, always is."""
    gone = superseded({k: [float(t) for t in times] for k, times in verified.items()})
    latest = max(verified, key=lambda k: (max(verified[k]), str(k)))
    assert latest not in gone
    assert {k for k, times in verified.items() if k != latest and len(times) == 1} <= gone


# -- procedures ------------------------------------------------------------------------------------


def solution(number: int, seen: str, **fields: Any) -> Solved:
    """Return a solved episode of the same goal that ended with a look."""
    step = ProcedureStep("sql_query", (Slot("query", "constant", "x"),), arguments='{"query": "x"}', observed=seen)
    made = Solved(f"proc-{number}", f"e{number}", 1.0, (step,), at=float(number), equal=True)
    return replace(made, **fields)


@pytest.mark.parametrize(
    ("results", "support"),
    [
        (["four", "five"], ["e1"]),  # the later one
        (["four", "four", "five"], ["e2"]),  # however many there were before
        (["four", "five", "five"], ["e1", "e2"]),  # those that agree support each other
        (["four", "four"], ["e0", "e1"]),
        (["four", "five", "four"], ["e0", "e2"]),
        (["four", "five", "four", "five"], ["e0", "e1", "e2", "e3"]),  # both keep being verified
        (["", "five"], ["e0", "e1"]),  # a result that is not known is in conflict with none
    ],
)
def test_the_later_procedure_supersedes_where_results_conflict(results: list[str], support: list[str]) -> None:
    """What is offered for the same goal rests on those whose result holds, and says what the latest did."""
    known = [solution(number, seen) for number, seen in enumerate(results)]
    found = offer(known, ())
    assert found is not None
    assert list(found.support) == support
    assert found.memory_id == f"proc-{len(results) - 1}"
    again = offer(known[::-1], ())
    assert again is not None
    assert sorted(again.support) == support


def test_of_a_result_that_was_handed_in_the_argument_counts() -> None:
    """The same reply to another answer is another result."""
    made = [
        solution(n, "accepted", steps=(ProcedureStep("submit", arguments=json.dumps({"answer": answer})),))
        for n, answer in enumerate(("four", "five"))
    ]
    steps = [replace(s.steps[0], slots=(Slot("answer", "constant", "x"),), observed="accepted") for s in made]
    found = offer([replace(s, steps=(step,)) for s, step in zip(made, steps, strict=True)], ())
    assert found is not None
    assert found.support == ("e1",)


def test_goals_that_are_only_similar_are_in_no_conflict() -> None:
    """Another goal has a result of its own."""
    found = offer([solution(n, str(n), equal=False) for n in range(2)], ())
    assert found is None or len(found.support) > 1
