"""The log of an agent's steps alone decides what is known: in whatever order it came, live and after a rebuild."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agents import DONE, ERROR, RIGHT, WRONG, Agent, call, calling, fixes, mend, mistyped, result, work
from builders import NOW, assistant, examples, feedback, lexical_memory, response, trace
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory import Feedback, Scope
from optillm_memory.conversation.actions import Action, action_of
from optillm_memory.conversation.observation import read
from optillm_memory.conversation.parse import Conversation, answer_prefixes, parse
from optillm_memory.learn.attempts import inferred_id
from optillm_memory.learn.fixes import Fix
from optillm_memory.records import Injected, Trace
from optillm_memory.store import fold
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables import steps as store_steps
from optillm_memory.store.transaction import Transaction

Event = Callable[[Transaction], Any]
SCOPES = (Scope("local"), Scope("local", "other"))
APP = "python app.py"
TRACEBACK = (
    "Traceback (most recent call last):\n  File \"app.py\"\nModuleNotFoundError: No module named 'y'\nExit code: 1"
)
FAILED_TEST = "FAILED test_app.py::test_sum - assert 1 == 2\n=== 1 failed in 0.02s ===\nExit code: 1"
PASSED_TEST = "=== 1 passed in 0.02s ===\nExit code: 0"
PAIRS = [(WRONG, ERROR), (RIGHT, DONE), (RIGHT, "?"), (APP, TRACEBACK), ("pip install y", DONE), (APP, DONE)]


@st.composite
def episodes(draw: st.DrawFn, number: int) -> tuple[list[Event], list[Trace], list[str]]:
    """Draw an episode: its requests in order, its traces, and the ids of what is read off its steps."""
    scope = SCOPES[draw(st.integers(0, 1))]
    episode_id = f"e{number}"
    said: list[Any] = [{"role": "user", "content": f"task {number}"}]
    events: list[Event] = []
    traces: list[Trace] = []
    for place in range(draw(st.integers(2, 5))):
        pairs = draw(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=2))
        calls = [call(command, f"call_{place}_{i}") for i, (command, _) in enumerate(pairs)]
        answer = calling(*calls)
        made = trace(
            f"task {number}", None, trace_id=f"t{number}-{place}", scope=scope, episode_id=episode_id,
            created_at=NOW + 10 * place + number, tags=draw(st.sampled_from([{}, {"os": "x"}])),
        )  # fmt: skip
        told = [Injected(MENDS.memory_id(scope), "fix", 1.0, 1, RIGHT)] if draw(st.booleans()) else []
        events.append(_request(made, parse({"messages": list(said)}), answer, told))
        traces.append(made)
        said += [answer, *(result(c["id"], shown) for c, (_, shown) in zip(calls, pairs, strict=True))]
    closing = trace(f"task {number}", "done", trace_id=f"t{number}-end", scope=scope, episode_id=episode_id,
                    created_at=NOW + 90 + number)  # fmt: skip
    events.append(_request(closing, parse({"messages": list(said)}), assistant("done"), []))
    names = [inferred_id(scope, episode_id, s.step_id) for s in parse({"messages": said}).steps]
    return events, [*traces, closing], names


_SIGNATURE = read(ERROR, tool="bash", arguments=WRONG).signature
assert _SIGNATURE is not None
MENDS = Fix(Action("bash", "command", WRONG), "", _SIGNATURE.key, "instead", RIGHT)


def _request(made: Trace, conversation: Conversation, answer: Any, told: list[Injected]) -> Event:
    prefixes = answer_prefixes(conversation, {"choices": [{"message": answer}]})

    def arrive(tx: Transaction) -> None:
        assert tx.add_trace(made, prefixes=prefixes, injected=told)
        fresh = tx.steps.add(tx.scopes.number(made.scope), made.episode_id, made.trace_id, conversation.steps)
        fold.trace_arrived(tx, made)
        fold.steps_arrived(tx, made, fresh, received_at=NOW)

    return arrive


@st.composite
def logs(draw: st.DrawFn) -> list[list[Event]]:
    """Draw a few episodes and what is said of them: lists whose own order is kept, in any order to each other."""
    drawn = [draw(episodes(number)) for number in range(draw(st.integers(1, 3)))]
    traces = [t for _, found, _ in drawn for t in found]
    said: list[Feedback] = []
    for number in range(draw(st.integers(0, 6))):
        about = draw(st.sampled_from(traces))
        metric, value = draw(st.sampled_from([("success", True), ("success", False), ("demonstration", RIGHT)]))
        whole = draw(st.booleans())
        source = draw(st.sampled_from(["code", "human", "llm"]))
        said.append(
            feedback(
                value, feedback_id=f"f{number}", metric=metric, source=source, occurred_at=NOW + number,
                trace_id=None if whole else about.trace_id, episode_id=about.episode_id if whole else None,
            )
        )  # fmt: skip
    taken_back = [replace(f, value=None) for f in said if draw(st.integers(0, 2)) == 0]
    for _, _, names in drawn:
        drawn_names = sorted(draw(st.sets(st.sampled_from(names), max_size=2)))
        taken_back += [feedback(None, feedback_id=name, trace_id=None) for name in drawn_names]
    return [*(events for events, _, _ in drawn), *([_saying(f)] for f in [*said, *taken_back])]


def _saying(item: Feedback) -> Event:
    return lambda tx: fold.feedback_arrived(tx, "local", None, item, received_at=NOW)


def state(path: Path, events: list[Event]) -> tuple[list[Any], list[Any]]:
    """Return what is known after these events, and again after a rebuild."""
    store = SqliteStore(path)
    try:
        for event in events:
            store.write(event).result(10)
        live = known(store)
        store.write(fold.rebuild).result(10)
        return live, known(store)
    finally:
        store.close()


def known(store: SqliteStore) -> list[Any]:
    """Return memories, outcomes, attempts, fixes and their evidence, without the numbers that scopes happen to have."""
    with store._readers.borrow() as db:
        names = dict(db.execute("SELECT id, namespace FROM scopes"))
        attempts = db.execute("SELECT * FROM attempts ORDER BY scope_id, episode_id, step_id").fetchall()
        told = db.execute(
            "SELECT memory_id, fixes.scope_id, action, output, text FROM fixes JOIN memories USING (memory_id) "
            "WHERE status <> 'withdrawn'"
        ).fetchall()
    rows = [tuple(names.get(v, v) if i < 2 and len(r) > 3 else v for i, v in enumerate(r)) for r in store.derived()]
    rows += [(names[r[0]], *r[1:]) for r in attempts] + [(r[0], names[r[1]], *r[2:]) for r in told]
    return sorted(rows, key=repr)


@pytest.mark.slow
@settings(max_examples=examples(30), deadline=None)
@given(logs(), st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter_and_rebuild_agrees(parts: list[list[Event]], random: Any) -> None:
    """Episodes, feedback and retractions in any order leave the same fixes and outcomes, and so does a rebuild."""
    waiting = [list(part) for part in parts]
    mixed: list[Event] = []
    while any(waiting):
        mixed.append(random.choice([part for part in waiting if part]).pop(0))
    with tempfile.TemporaryDirectory() as folder:
        first, first_rebuilt = state(Path(folder) / "a.db", [event for part in parts for event in part])
        second, second_rebuilt = state(Path(folder) / "b.db", mixed)
    assert first == first_rebuilt
    assert second == second_rebuilt
    assert first == second


def test_a_rebuild_reads_every_step_however_long_the_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an episode's first steps say of an action is known after a rebuild too, though mining looks back so far."""
    monkeypatch.setattr(store_steps, "STEPS_MOST", 2)
    with lexical_memory(tmp_path) as memory:
        agent = work(memory, [(WRONG, ERROR), ("ls", "a"), ("pwd", "b"), ("make", "c"), (RIGHT, DONE)])
        key = action_of("bash", f'{{"command": "{WRONG}"}}').key
        before = memory.store.fixes.past_attempts(Scope("local"), key, environment="{}")
        assert [p.verdict for p in before] == ["failure"]
        memory.rebuild()
        assert memory.store.fixes.past_attempts(Scope("local"), key, environment="{}") == before
        assert len(memory.trace(agent.turns[-1].trace_id)["steps"]) == 5


def test_reading_attempts_writes_nothing(tmp_path: Path) -> None:
    """What observations tell is written by `interpret`; to read it changes nothing, also where it is not there yet."""

    def read(tx: Transaction, episode_id: str) -> tuple[int, int, int]:
        tx.db.execute("DELETE FROM attempts")
        before = tx.db.total_changes
        known = len(tx.steps.attempts(Scope("local"), episode_id))
        written = tx.db.total_changes - before
        tx.steps.interpret(Scope("local"), episode_id)
        return known, written, len(tx.steps.attempts(Scope("local"), episode_id))

    with lexical_memory(tmp_path) as memory:
        agent = work(memory, [(WRONG, ERROR), (RIGHT, DONE)])
        memory.settle()
        episode_id = agent.turns[-1].episode_id
        assert memory.store.write(lambda tx: read(tx, episode_id)).result(10) == (0, 0, 2)


def test_a_day_of_agents_is_the_same_after_a_rebuild(tmp_path: Path) -> None:
    """Through the public calls: mined, followed, judged and taken back, a rebuild gives what was there."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        mend(memory, success=False, task="again")
        work(memory, [(APP, TRACEBACK), ("pip install y", DONE), (APP, DONE)], success=True, task="start it")
        agent = Agent(memory, "publish it now")
        agent.act(WRONG, ERROR)
        agent.act(RIGHT, DONE)
        agent.close(success=True)
        assert fixes(memory) == [(WRONG, RIGHT, "verified"), (APP, "pip install y", "verified")]
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
        again = Agent(memory, "and once more")
        again.act(WRONG, ERROR)
        assert [i.suggestion for i in again.begin().injected] == [RIGHT]


def test_a_test_that_an_edit_mended_leaves_a_note_and_no_blame(tmp_path: Path) -> None:
    """A test run that fails and passes after an edit tells of the edit at the same failure; to run it is no fault."""
    edit = {"path": "app.py", "text": "1 + 1"}
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory)
        agent.act("pytest -q", FAILED_TEST)
        agent.act(edit, "ok", tool="edit")
        agent.act("pytest -q", PASSED_TEST)
        agent.close(success=True)
        note = f"edit: {json.dumps(edit)}"
        assert fixes(memory) == [("pytest -q", note, "verified")]
        later = Agent(memory, "test it again")
        turn = later.begin()
        assert memory.guard(turn, response(calling("pytest -q"))) == (turn, False)
        later.act("pytest -q", FAILED_TEST)
        told = later.begin()
        assert [i.suggestion for i in told.injected] == [note]
        assert "what was done before it worked" in told.messages[-1]["content"]


def test_a_fix_that_nothing_shows_any_more_is_gone(tmp_path: Path) -> None:
    """Where its only origin is taken back, that it was followed elsewhere does not keep a fix."""
    with lexical_memory(tmp_path) as memory:
        first = mend(memory)
        agent = Agent(memory, "publish it now")
        turn = agent.begin()
        agent.answered(calling(call("git comit -m x", "call_1")), turn)
        agent.messages.append(result("call_1", mistyped("comit", "commit")))
        agent.act("git commit -m x", DONE)
        agent.close()
        (fix_id,) = {i.memory_id for i in agent.turns[1].injected}
        assert memory.memory(fix_id).used_successes == 1
        (said,) = memory.trace(first.turns[0].trace_id)["feedback"]
        memory.feedback({"feedback_id": said["feedback_id"], "value": None})
        assert memory.memory(fix_id).status == "withdrawn"
        assert {e["role"] for e in memory.described(fix_id)["fix"]["evidence"]} == {"followed"}
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
        assert WRONG not in [task for task, _, _ in fixes(memory)]
