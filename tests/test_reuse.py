"""Reuse: what memory answers by itself, what it refuses to, and what becomes of an answer that was wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import SCOPE, ask, assistant, body, hashing_memory, lexical_memory, response, teach, tell
from builders import settings as configured
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory import Memory, Scope, Turn
from optillm_memory.background.threads import start_thread
from optillm_memory.conversation.parse import parse
from optillm_memory.conversation.partition import partition_of
from optillm_memory.decide.calibration import WRONG
from optillm_memory.decide.gate import Gate, Label
from optillm_memory.decide.gate_updater import Change, GateUpdater
from optillm_memory.errors import InvalidField
from optillm_memory.learn.forms import form_named
from optillm_memory.recall.encoder import HashingEncoder
from optillm_memory.request import reuse

REUSE = {"agent_memory": {"reuse": {"max_error": 0.05}}}
TASK = "Which port does the metrics exporter listen on?"
ANSWER = "Port 9400."


def wanting(task: str = TASK, **fields: Any) -> dict[str, Any]:
    """Return a request that allows reuse."""
    return body(task, **{**REUSE, **fields})


def considered(memory: Memory, request: Mapping[str, Any]) -> Turn:
    """Take a request to its end: as memory answers it, or with another answer."""
    turn = memory.begin(request)
    memory.finish(turn, turn.reused() if turn.action == "reuse" else response("no idea"))
    memory.store.flush()
    return turn


def reason(turn: Turn) -> str:
    """Return the gate's reason."""
    return turn.decision.reason if turn.decision else str(turn.skipped[0]["reason"])


def test_an_exact_repeat_is_answered_from_memory(tmp_path: Path) -> None:
    """A task that was verified once is answered again without a model call, with no tokens used."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = considered(memory, wanting(TASK))
        assert (turn.action, reason(turn)) == ("reuse", "exact")
        completion = turn.reused()
        assert completion["choices"][0]["message"]["content"] == ANSWER
        assert completion["usage"]["total_tokens"] == 0
        why = memory.why(turn.trace_id)
        assert (why["action"], why["proposal"]["served"], why["proposal"]["answer"]) == ("reuse", True, ANSWER)


def test_nobody_who_did_not_ask_gets_a_reused_answer(tmp_path: Path) -> None:
    """Without `reuse.max_error` the gate only learns: the proposal is in the log, with its label."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = ask(memory, TASK, "Port 1.")
        assert turn.action != "reuse"
        memory.settle()
        tell(memory, turn, value=False)
        tell(memory, turn, ANSWER, metric="demonstration")
        proposal = memory.why(turn.trace_id)["proposal"]
        assert (proposal["reason"], proposal["served"], proposal["correct"]) == ("shadow", False, True)


def test_feedback_may_come_before_the_proposal(tmp_path: Path) -> None:
    """A label needs a proposal and feedback, in whichever order the two arrive."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = memory.begin(body(TASK))
        tell(memory, turn, "Port 9.", metric="demonstration")
        memory.finish(turn, response("Port 1."))
        memory.settle()
        assert memory.why(turn.trace_id)["proposal"]["correct"] is False


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another"},
        {"temperature": 0.7},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "system", "content": "Be rude."}, {"role": "user", "content": TASK}]},
        {"messages": [{"role": "user", "content": "Hi"}, assistant("Hello"), {"role": "user", "content": TASK}]},
    ],
    ids=["model", "sampling", "format", "system prompt", "history"],
)
def test_what_shapes_the_answer_must_be_equal(tmp_path: Path, other: dict[str, Any]) -> None:
    """Another model, sampling setting, format, system prompt or history is another question."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        assert reason(considered(memory, {**wanting(), **other})) == "no_neighbours"
        assert considered(memory, wanting(user="someone", stream=True)).action == "reuse"  # this shapes nothing


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tools": [{"type": "function", "function": {"name": "run"}}]}, "reuse_tools"),
        ({"n": 2}, "reuse_several_choices"),
        ({"logprobs": True}, "reuse_unsupported_option"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": TASK}]}]}, "reuse_not_words"),
    ],
    ids=["tools", "choices", "logprobs", "parts"],
)
def test_what_is_no_plain_question_is_refused_with_a_reason(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    """What asks for more than an answer in words goes to the model."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = considered(memory, {**wanting(), **fields})
        assert turn.action != "reuse"
        assert [s["reason"] for s in turn.skipped if s["reason"].startswith("reuse_")] == [why]


def test_evidence_of_a_model_is_not_enough(tmp_path: Path) -> None:
    """An answer that only a model has judged is not reused."""
    with hashing_memory(tmp_path) as memory:
        tell(memory, ask(memory, TASK, ANSWER), source="llm")
        assert considered(memory, wanting()).action != "reuse"


def test_another_scope_has_its_own_answers(tmp_path: Path) -> None:
    """What one caller verified answers no other caller."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        turn = memory.begin(wanting(), tenant="somebody else")
        assert reason(turn) == "no_neighbours"


def test_a_held_out_episode_is_not_answered_from_memory(tmp_path: Path) -> None:
    """The holdout is without memory in every respect."""
    with hashing_memory(tmp_path, holdout=1.0) as memory:
        teach(memory, TASK, ANSWER)
        assert reason(considered(memory, wanting())) == "holdout"


def test_without_an_encoder_nothing_is_reused(tmp_path: Path) -> None:
    """Where there is no encoder the reason says so."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        assert reason(considered(memory, wanting())) == "reuse_no_encoder"


def test_the_episodes_own_answer_is_not_its_evidence(tmp_path: Path) -> None:
    """An episode is not answered with what it said itself."""
    with hashing_memory(tmp_path) as memory:
        field = {"episode_id": "one", **REUSE["agent_memory"]}
        tell(memory, ask(memory, {**wanting(), "agent_memory": field}, ANSWER))
        assert reason(memory.begin({**wanting(), "agent_memory": field})) == "no_neighbours"
        assert memory.begin({**wanting(), "agent_memory": {**field, "episode_id": "two"}}).action == "reuse"


def test_an_audited_hit_goes_to_the_model(tmp_path: Path) -> None:
    """A share of the hits is answered by the model all the same; a verdict on its answer is one on the hit."""
    with hashing_memory(tmp_path, reuse_audit=1.0) as memory:
        teach(memory, TASK, ANSWER)
        turn = considered(memory, wanting())
        assert (turn.action != "reuse", reason(turn)) == (True, "audit")
        tell(memory, turn, "Port 9500.", metric="demonstration")
        assert reason(considered(memory, wanting())) in ("quarantined", "conflict")


def test_a_reuse_that_was_wrong_is_not_repeated(tmp_path: Path) -> None:
    """One verified failure of a reused answer takes its memory out of reuse, until it is verified again."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        wrong = considered(memory, wanting())
        tell(memory, wrong, value=False, feedback_id="wrong")
        assert reason(considered(memory, wanting())) == "quarantined"
        teach(memory, TASK, ANSWER)
        assert considered(memory, wanting()).action == "reuse"


def test_a_retraction_lifts_the_quarantine(tmp_path: Path) -> None:
    """Feedback that is taken back has no effect any more."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        wrong = considered(memory, wanting())
        tell(memory, wrong, value=False, feedback_id="wrong")
        tell(memory, wrong, value=None, feedback_id="wrong")
        assert considered(memory, wanting()).action == "reuse"


def test_a_demonstration_on_a_reused_answer_is_learned(tmp_path: Path) -> None:
    """Who shows the right answer to a wrong reuse teaches it; the reused answer itself teaches nothing."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        right = considered(memory, wanting())
        tell(memory, right)
        (known,) = memory.store.list_memories(None)
        assert known.successes == 1
        wrong = considered(memory, wanting())
        tell(memory, wrong, "Port 9500.", metric="demonstration")
        assert {m.answer: m.status for m in memory.store.list_memories(None)}["Port 9500."] == "verified"
        assert considered(memory, wanting()).action != "reuse"  # two verified answers to one question


def test_a_failure_since_the_last_success_is_respected(tmp_path: Path) -> None:
    """An exact repeat is served on a verified success with no failure since."""
    with hashing_memory(tmp_path) as memory:
        teach(memory, TASK, ANSWER)
        teach(memory, TASK, ANSWER)
        tell(memory, ask(memory, TASK, ANSWER), value=False)
        assert reason(considered(memory, wanting())) == "failed"


def test_similar_tasks_are_served_once_their_error_is_proven(tmp_path: Path) -> None:
    """With labels enough the gate opens for tasks that nobody has asked before, and audits some."""
    chance = random.Random(0)
    kinds = ["refund", "invoice", "password", "parcel", "voucher"]
    opening = [
        "please help me with",
        "i have a question about",
        "what do i do about",
        "can you look into",
        "any news on",
    ]
    closing = ["for my account", "from my order", "in the app", "on your website", "as a new customer", "for a friend"]
    reasons: list[str] = []
    with hashing_memory(tmp_path, reuse_audit=0.1) as memory:
        for _ in range(900):
            kind = chance.choice(kinds)
            who = chance.choice("abcdefgh") + chance.choice("xyzuvw")
            text = f"{chance.choice(opening)} the {kind} {kind} {kind} {chance.choice(closing)} {who}"
            turn = memory.begin(wanting(text))
            reasons.append(reason(turn))
            memory.finish(turn, turn.reused() if turn.action == "reuse" else response(f"desk {kind}"))
            if turn.action == "reuse":
                assert turn.reused()["choices"][0]["message"]["content"] == f"desk {kind}"
            else:
                tell(memory, turn)
        assert reasons.index("above_threshold") > 50
        assert reasons[-200:].count("above_threshold") > 100
        assert "audit" in reasons
        memory.settle()
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before


def test_a_request_that_reads_slowly_undoes_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that one request reads while feedback comes and another takes it are read again, not taken."""
    text = "please help me with the refund refund refund for my account"
    with hashing_memory(tmp_path) as memory:
        for who in "abcdef":
            teach(memory, f"{text} {who}x", "desk refund")
        turn = memory.begin(wanting(f"{text} zx"))
        memory.finish(turn, response("desk of another kind"))
        memory.settle()
        read = memory.store.proposals.gate_changes

        def slowly(scope: Scope, since: int) -> tuple[int, list[Change]]:
            monkeypatch.undo()
            found = read(scope, since)
            tell(memory, turn)
            memory.begin(wanting("a request that is quicker"))
            return found

        monkeypatch.setattr(memory.store.proposals, "gate_changes", slowly)
        memory.begin(wanting("a request that is slow"))
        gate = memory._reuse.gate(SCOPE, memory.store.recall.revision(SCOPE))
        assert [verdict for _, verdict in gate.logs[""].rows].count(WRONG) == 1


def test_no_other_request_takes_a_neighbour_that_disagrees_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one request looks at its neighbours another empties the cache: the one that disagrees still counts."""
    monkeypatch.setattr("optillm_memory.request.reuse.NEAREST", 3)
    monkeypatch.setattr("optillm_memory.request.reuse._EXEMPLARS_KEPT", 0)
    with hashing_memory(tmp_path) as memory:
        for number in range(4):
            teach(memory, f"what is the capital of country number {number}", f"city {number}")
        teach(memory, TASK, ANSWER)
        teach(memory, TASK, "Port 9500.")
        look = reuse._answers

        def while_another_asks(*given: Any) -> bool:
            monkeypatch.setattr(reuse, "_answers", look)
            memory.begin(wanting("what is the capital of country number 7"))
            return look(*given)

        monkeypatch.setattr(reuse, "_answers", while_another_asks)
        assert reason(memory.begin(wanting())) == "conflict"
        assert reuse._answers is look


def test_labels_of_another_encoders_scores_do_not_count(tmp_path: Path) -> None:
    """A threshold holds for the scores of one encoder: with another one the gate starts anew."""

    class Other(HashingEncoder):
        fingerprint = "other"

    text = "please help me with the refund refund refund for my account"
    with hashing_memory(tmp_path) as memory:
        for who in "abcdef":
            teach(memory, f"{text} {who}x", "desk refund")
        turn = memory.begin(wanting(f"{text} zx"))
        memory.finish(turn, response("desk of another kind"))
        memory.settle()
        tell(memory, turn)
        rows = memory._reuse.gate(SCOPE, memory.store.recall.revision(SCOPE)).logs[""].rows
        assert len(rows) > 1
    with Memory(configured(tmp_path), encoder=Other) as memory:
        assert memory.encoder.wait(10) == "ready"
        assert memory._reuse.gate(SCOPE, memory.store.recall.revision(SCOPE)).logs == {}
    with hashing_memory(tmp_path) as memory:
        assert memory._reuse.gate(SCOPE, memory.store.recall.revision(SCOPE)).logs[""].rows == rows


LABELS = st.lists(
    st.builds(
        Label,
        score=st.floats(0.2, 1),
        correct=st.sampled_from([True, True, True, True, False, None]),
        partition=st.sampled_from(["p", "q"]),
    ),
    min_size=120,
    max_size=260,
)


@settings(deadline=None, max_examples=30)
@given(LABELS, st.randoms(use_true_random=False))
def test_the_gate_does_not_depend_on_the_order_of_arrival(labels: list[Label], chance: random.Random) -> None:
    """Labels that come late, change or are taken back leave the gate that a fold in the order of requests gives."""
    updater = GateUpdater(start_thread)
    rows = [Change(f"{i:04d}", label, served=label.correct is None) for i, label in enumerate(labels)]
    arriving = sorted(rows, key=lambda row: int(row.trace_id) + chance.choice([0, 0, 0, 5, 90]))
    for change in arriving:
        updater.take(updater.since, 0, [replace(change, label=replace(change.label, correct=None))])
        if chance.random() < 0.2:
            updater.take(
                updater.since, 0, [replace(change, label=replace(change.label, correct=not change.label.correct))]
            )
    chance.shuffle(arriving)
    for start in range(0, len(arriving), 40):
        updater.take(updater.since, 0, arriving[start : start + 40])
    whole = Gate(labels)
    assert {name: book.rows for name, book in updater.gate.logs.items()} == {
        name: book.rows for name, book in whole.logs.items()
    }


def test_the_partition_ignores_what_shapes_nothing() -> None:
    """Transport and bookkeeping make no other partition; a key's order neither."""
    plain = body(TASK, temperature=0, seed=1)
    same = {**body(TASK, seed=1, temperature=0), "stream": True, "user": "u", "metadata": {"a": "b"}, "top_p": None}
    assert partition_of(plain, parse(plain)) == partition_of(same, parse(same))


def test_answers_are_compared_in_their_form() -> None:
    """`number` looks at the last number, `json` at the value; an own function that fails falls back to the text."""
    number, value = form_named("number"), form_named("json")
    assert number("It is 1,200.50 dollars") == number("so: 1200.5")
    assert number("none") != number("some")
    assert value('{"a": 1, "b": [2]}') == value('```json\n{"b": [2], "a": 1}\n```')
    assert value("no json.") == "no json"
    assert form_named("json:loads")("Not JSON.") == "not json"
    with pytest.raises(InvalidField, match="no module:function"):
        form_named("nothing:here")
