"""What it taught: outcomes from feedback, exemplars from outcomes, the same whatever order things came in."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import NOW, SCOPE, ask, body, examples, feedback, hit, lexical_memory, response, teach, tell, trace
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory import Feedback, Memory, Scope
from optillm_memory.inject.render import as_block
from optillm_memory.learn.exemplars import exemplar_id, learn, status
from optillm_memory.learn.outcomes import effective, outcome, same_answer
from optillm_memory.records import Injected, Outcome, Trace
from optillm_memory.store import fold
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.transaction import Transaction

FAILS = replace(feedback(), feedback_id="fb-2", value=False)
SHOWN = feedback("ls -la", feedback_id="fb-3", metric="demonstration", source="human")


# -- outcomes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_feedback", "expected"),
    [
        ([], Outcome("unknown")),
        ([feedback()], Outcome("success", verified=True)),
        ([FAILS], Outcome("failure", verified=True)),
        ([feedback(source="llm")], Outcome("success")),
        ([feedback(source="inferred")], Outcome("success")),
        ([feedback("fine", metric="comment")], Outcome("unknown")),
        ([feedback("boom", metric="error")], Outcome("failure", verified=True)),
        ([feedback(0.5, metric="score")], Outcome("success", verified=True)),
        ([feedback(0.49, metric="score")], Outcome("failure", verified=True)),
        ([SHOWN], Outcome("failure", verified=True)),
        ([replace(SHOWN, value=" LS. ")], Outcome("success", verified=True)),
        ([feedback(), replace(FAILS, source="human")], Outcome("failure", verified=True)),
        ([feedback(), replace(FAILS, source="llm")], Outcome("success", verified=True)),
        ([feedback(source="llm"), replace(FAILS, source="inferred")], Outcome("failure")),
        ([feedback(), replace(FAILS, occurred_at=NOW + 1)], Outcome("failure", verified=True)),
        ([FAILS, feedback(occurred_at=NOW + 1)], Outcome("success", verified=True)),
    ],
)
def test_outcome_follows_from_feedback(given_feedback: list[Feedback], expected: Outcome) -> None:
    """The latest word of each source counts, code and human outrank the rest, and disagreement is a failure."""
    assert outcome(effective(given_feedback), "ls") == expected
    assert outcome(effective(given_feedback[::-1]), "ls") == expected


def test_a_retraction_counts_whichever_came_first() -> None:
    """Retracted feedback does not stand, before or after its retraction, and others do."""
    retraction = feedback(None)
    assert effective([feedback(), retraction, FAILS]) == effective([retraction, FAILS, feedback()]) == [FAILS]


def test_answers_are_compared_without_regard_to_form() -> None:
    """Case, white space and a full stop do not make another answer; words do."""
    assert same_answer("It is  42.\n", "it is 42")
    assert not same_answer("it is 42", "it is not 42")


# -- exemplars -------------------------------------------------------------------------------------


def learned(
    own: list[Feedback], of_episode: list[Feedback] | None = None, *, closes: bool = False, **fields: Any
) -> list[tuple[str, bool, bool]]:
    """Return (answer, success, verified) of the evidence that a trace gives."""
    made = trace(**fields)
    found = learn(made, own, of_episode or [], closing=made if closes else None)
    return [(e.answer, e.success, e.verified) for e in found.evidence]


def test_success_makes_an_exemplar_and_failure_counts_against_it() -> None:
    """A verified answer is evidence for itself, a failed one against itself, silence is nothing."""
    assert learned([feedback()]) == [("ls", True, True)]
    assert learned([FAILS]) == [("ls", False, True)]
    assert learned([feedback(source="llm")]) == [("ls", True, False)]
    assert learned([]) == []
    assert learned([feedback("hm", metric="comment")]) == []


def test_a_demonstration_teaches_the_right_answer() -> None:
    """What was shown becomes an exemplar, and counts against the answer that it corrects; the best source speaks."""
    assert learned([SHOWN]) == [("ls", False, True), ("ls -la", True, True)]
    assert learned([replace(SHOWN, value="LS")]) == [("ls", True, True)]
    assert learned([SHOWN], answer=None) == [("ls -la", True, True)]
    guessed = replace(SHOWN, feedback_id="fb-4", source="llm", value="dir", occurred_at=NOW + 9)
    assert ("dir", True, False) not in learned([SHOWN, guessed])


def test_reuse_and_injected_text_teach_nothing() -> None:
    """An answer that came from memory is no new evidence, and a block that an answer repeats is not learned."""
    assert learned([feedback()], action="reuse") == []
    block = str(as_block([hit()], max_items=1, token_budget=999).payload)
    assert learned([feedback()], answer=block) == []
    assert learned([feedback()], answer=f"ls {block}") == []  # what it says without the block is not what was verified
    assert learned([feedback()], task="") == []


def test_feedback_on_an_episode_speaks_for_its_last_answer() -> None:
    """The closing trace gives evidence; the others only have an outcome; feedback on a trace itself outranks it."""
    shared = [feedback(trace_id=None, episode_id="ep-1")]
    assert learned([], shared, closes=True) == [("ls", True, True)]
    assert learned([], shared, closes=False) == []
    shown = [replace(SHOWN, trace_id=None, episode_id="ep-1", value="LS")]
    for said in (shared, shown):
        calling = learn(trace(answer=None), [], said, closing=trace())
        assert calling.outcome == Outcome("success", verified=True)
        assert calling.evidence == ()
    assert learned([FAILS], shared, closes=True) == [("ls", False, True)]


def test_same_task_and_answer_are_one_exemplar_in_a_scope() -> None:
    """Form does not split a memory; another scope, frame, task or answer does."""
    one = exemplar_id(SCOPE, "f", "List files", "ls")
    assert one == exemplar_id(SCOPE, "f", "list  files", "LS.")
    others = [(Scope("b"), "f", "list files", "ls"), (SCOPE, "g", "list files", "ls"), (SCOPE, "f", "list", "ls")]
    assert one not in {exemplar_id(*other) for other in others}


@pytest.mark.parametrize(
    ("right", "wrong", "any_right", "expected"),
    [(1, 0, 1, "verified"), (2, 1, 2, "verified"), (1, 1, 1, "quarantined"), (0, 0, 1, "candidate"),
     (0, 3, 1, "candidate"), (0, 1, 0, "withdrawn")],
)  # fmt: skip
def test_status_follows_from_the_evidence(right: int, wrong: int, any_right: int, expected: str) -> None:
    """Only more verified successes than failures make a memory act."""
    assert status(right, wrong, any_right) == expected


# -- through a memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["llm", "inferred"])
def test_unverified_is_inert(tmp_path: Path, source: Any) -> None:
    """A success that only a model vouches for makes a candidate, which is kept and never injected."""
    with lexical_memory(tmp_path) as memory:
        turn = ask(memory, "restart the nginx server", "systemctl restart nginx")
        memory.feedback([feedback(trace_id=turn.trace_id, source=source)])
        (candidate,) = memory.store.list_memories(None)
        assert candidate.status == "candidate"
        assert memory.begin(body("restart the nginx server")).action == "plain"
        assert memory.recall("restart the nginx server") == []
        tell(memory, turn, feedback_id="fb-code")
        assert memory.begin(body("restart the nginx server")).action == "inject"


def test_a_failed_memory_is_quarantined_and_a_retraction_brings_it_back(tmp_path: Path) -> None:
    """As many verified failures as successes silence a memory at the very next request; taking one back undoes it."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "restart the nginx server", "reboot now")
        again = ask(memory, "Restart the nginx server", "reboot now", options=None)
        tell(memory, again, value=False, feedback_id="wrong")
        assert memory.store.list_memories(None)[0].status == "quarantined"
        assert memory.recall("restart the nginx server") == []
        assert tell(memory, again, value=None, feedback_id="wrong").status == "retracted"
        assert memory.store.list_memories(None)[0].status == "verified"
        assert len(memory.recall("restart the nginx server")) == 1


def test_what_was_injected_is_never_learned(tmp_path: Path) -> None:
    """A model that repeats the injected block, and a client that sends it back, add nothing of it to memory."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "restart the nginx server", "systemctl restart nginx")
        asked = {"agent_memory": {"episode_id": "e"}}
        turn = memory.begin(body("restart the nginx server", **asked), text_only=True)
        sent = turn.messages[-1]["content"]
        assert "systemctl" in sent
        memory.finish(turn, {"choices": [{"message": {"role": "assistant", "content": f"done {sent}"}}]})
        memory.store.flush()
        tell(memory, turn)
        again = memory.begin(body(sent.replace("restart the nginx", "stop the apache", 1), **asked))
        memory.finish(again, response("apachectl stop"))
        memory.store.flush()
        tell(memory, again)
        kept = memory.store.list_memories(None)
        assert {m.task for m in kept} == {"restart the nginx server", "stop the apache server"}
        assert not [m for m in kept if "agent_memory" in m.task + m.answer]


def test_an_episodes_feedback_may_come_before_its_traces(tmp_path: Path) -> None:
    """Feedback on an episode that is not known yet waits for it, with and without a scope, and can be retracted."""
    with lexical_memory(tmp_path) as memory:
        said = {"episode_id": "e-1", "metric": "success", "value": True, "source": "code", "feedback_id": "early"}
        assert memory.feedback(said)[0].status == "pending"
        turn = ask(memory, body("restart the nginx server", agent_memory={"episode_id": "e-1"}), "reboot")
        assert memory.trace(turn.trace_id)["outcome"]["verdict"] == "success"
        assert [f["feedback_id"] for f in memory.trace(turn.trace_id)["feedback"]] == ["early"]
        assert memory.store.list_memories(None)[0].status == "verified"
        assert memory.feedback({"feedback_id": "early", "value": None})[0].status == "retracted"
        assert memory.trace(turn.trace_id)["outcome"]["verdict"] == "unknown"
        assert memory.store.list_memories(None)[0].status == "withdrawn"


# -- the order of arrival --------------------------------------------------------------------------

Event = Callable[[Transaction], Any]
SAID: list[tuple[str, list[Any]]] = [
    ("success", [True, False]),
    ("score", [0.2, 0.9]),
    ("demonstration", ["ls", "ls -a", "kill"]),
    ("error", ["x"]),
]


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """Draw traces of a few episodes and scopes, feedback on them, and retractions of some of it."""
    scopes = (SCOPE, Scope("local", "other"))
    traces: list[tuple[Trace, list[Injected]]] = []
    for number in range(draw(st.integers(1, 5))):
        made = trace(
            draw(st.sampled_from(["list files", "List  files", "stop it"])),
            draw(st.sampled_from(["ls", "LS.", "kill", None])),
            trace_id=f"t{number}",
            scope=(scope := scopes[draw(st.integers(0, 1))]),
            episode_id=f"e{draw(st.integers(0, 1))}-{scope.namespace}",
            created_at=NOW + draw(st.integers(0, 2)),
            action=draw(st.sampled_from(["plain", "inject", "reuse"])),
        )
        used = [
            exemplar_id(scope, made.frame, task, answer) for task, answer in [("list files", "ls"), ("stop it", "kill")]
        ]
        chosen = draw(st.sets(st.sampled_from(used))) if made.action == "inject" else set()
        traces.append((made, [Injected(m, "exemplar", 1.0, 1) for m in sorted(chosen)]))
    said = [_feedback(draw, number, [t for t, _ in traces]) for number in range(draw(st.integers(0, 8)))]
    retracted = [replace(f, value=None) for f in said if draw(st.integers(0, 3)) == 0]
    return [*(_arrival(*t) for t in traces), *(_submission(f) for f in [*said, *retracted])]


def _feedback(draw: st.DrawFn, number: int, traces: list[Trace]) -> Feedback:
    about = draw(st.sampled_from(traces))
    of_episode = draw(st.booleans())
    metric, values = draw(st.sampled_from(SAID))
    return feedback(
        draw(st.sampled_from(values)),
        feedback_id=f"f{number}",
        metric=metric,
        source=draw(st.sampled_from(["code", "human", "llm"])),
        trace_id=None if of_episode else about.trace_id,
        episode_id=about.episode_id if of_episode else None,
        occurred_at=NOW + draw(st.integers(0, 3)),
        valid_until=draw(st.sampled_from([None, NOW + 5, NOW + 9])),
    )


def _arrival(made: Trace, used: list[Injected]) -> Event:
    def arrive(tx: Transaction) -> None:
        tx.add_trace(made, injected=used)
        fold.trace_arrived(tx, made)

    return arrive


def _submission(item: Feedback) -> Event:
    return lambda tx: fold.feedback_arrived(tx, "local", None, item, received_at=NOW)


def state(path: Path, events: list[Event]) -> tuple[list[Any], list[Any]]:
    """Return the derived state after these events, and again after a rebuild."""
    store = SqliteStore(path)
    try:
        store.write(lambda tx: [event(tx) for event in events]).result(10)
        live = comparable(store)
        store.write(fold.rebuild).result(10)
        return live, comparable(store)
    finally:
        store.close()


def comparable(store: SqliteStore) -> list[Any]:
    """Return the derived state without the numbers that scopes happen to have."""
    with store._readers.borrow() as db:
        names = dict(db.execute("SELECT id, namespace FROM scopes"))
        words = db.execute(
            "SELECT memory_id, memories_fts.words FROM memories_fts JOIN memories ON number = memories_fts.rowid "
            "ORDER BY 1"
        ).fetchall()
    rows = [(r[0], names[r[1]], *r[2:]) if len(r) > 4 else r for r in store.derived()]
    return [*rows, *((name, re.sub(r"\bs\d+x", "", said)) for name, said in words)]


@settings(max_examples=examples(40), deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter_and_rebuild_agrees(events: list[Event], random: Any) -> None:
    """Any order of the same traces, feedback and retractions leaves the same memories, and so does a rebuild."""
    shuffled = list(events)
    random.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as folder:
        first, first_rebuilt = state(Path(folder) / "a.db", events)
        second, second_rebuilt = state(Path(folder) / "b.db", shuffled)
    assert first == first_rebuilt == second == second_rebuilt


def test_rebuild_equals_the_live_state_of_a_memory(tmp_path: Path) -> None:
    """Folding the whole log again through the public call gives what was there, and recall still works."""
    with lexical_memory(tmp_path) as memory:
        _a_day(memory)
        before = memory.store.derived()
        assert before
        assert memory.rebuild()["traces"] == 6
        assert memory.store.derived() == before
        assert memory.begin(body("restart the nginx server")).action == "inject"


def _a_day(memory: Memory) -> None:
    teach(memory, "restart the nginx server", "systemctl restart nginx")
    tell(memory, ask(memory, "restart the nginx server", "reboot"), value=False)
    shown = ask(memory, "tail the syslog", "cat syslog")
    tell(memory, shown, value="tail -f /var/log/syslog", metric="demonstration", source="human")
    tell(memory, ask(memory, "count the words of a file", "wc -w"), source="llm")
    taken_back = ask(memory, "show free disk space", "df -h")
    tell(memory, taken_back, feedback_id="oops")
    tell(memory, taken_back, value=None, feedback_id="oops")
    ask(memory, "nobody says anything about this", "silence")
