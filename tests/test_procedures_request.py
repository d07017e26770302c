"""Procedures in a request: offered once where they fit, to nobody else, and never in the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import hashing_memory, response, settings
from trajectories import POLICY, WISH, Dialogue, block_in, cancelling, procedures, warm

from optillm_memory import Memory, Turn
from optillm_memory.conversation.options import Options
from optillm_memory.host.failopen import FailOpen
from optillm_memory.recall.encoder import HashingEncoder
from optillm_memory.store.maintenance.selection import Selection

ASKED = WISH.format(name="eva_doe_5678", order="#W1111222")
FOREIGN = ("mia_li_3668", "#W5544333", "5544333", "Mia")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Give a memory that knows how an order is cancelled."""
    with hashing_memory(tmp_path) as opened:
        cancelling(opened, "mia_li_3668", "#W5544333")
        warm(opened)
        yield opened


def kinds(turn: Turn) -> list[str]:
    """Return the kinds of what stands in a turn's prompt."""
    return [item.kind for item in turn.injected]


def reasons(turn: Turn) -> list[str]:
    """Return why something was left out of a turn's prompt."""
    return [str(item["reason"]) for item in turn.skipped]


def asked(memory: Memory, text: str = ASKED, **fields: Any) -> Turn:
    """Return the first request of a new conversation."""
    return Dialogue(memory, **fields).ask(text)


def set_status(memory: Memory, status: str) -> None:
    """Set the status of every procedure."""
    memory.store.write(
        lambda tx: tx.db.execute(
            "UPDATE memories SET status = ?, revision = ? WHERE kind = 'procedure'", (status, tx.counters.revision())
        )
    ).result(10)


# -- offering --------------------------------------------------------------------------------------


def test_a_request_like_a_solved_one_gets_the_way(memory: Memory) -> None:
    """The steps stand in one block at the end of the user's message, with sources for values, and no value."""
    talk = Dialogue(memory)
    turn = talk.ask(ASKED)
    assert kinds(turn) == ["procedure"]
    assert turn.injected[0].memory_id == procedures(memory)[0].memory_id
    assert turn.messages[0] == POLICY
    text = turn.messages[1]["content"]
    assert text.startswith(ASKED)
    assert text.splitlines()[-1].startswith("</agent_memory")
    steps = [line for line in text.splitlines() if line.startswith("| ")]
    assert steps == [
        "| 1. get_user(user_id: from the user)",
        "| 2. get_order(order_id: from step 1's `orders[]`; for each)",
        "| 3. ask the user to confirm, and wait for the reply",
        "| 4. cancel_order(order_id: from step 2's `order_id`, refund_to: your choice)",
    ]
    assert not [value for value in FOREIGN if value in text]
    memory.finish(turn, response("one moment"))
    memory.settle()
    shown = memory.trace(turn.trace_id)
    assert [(i["kind"], i["memory_id"]) for i in shown["injected"]] == [("procedure", turn.injected[0].memory_id)]
    assert "agent_memory" not in str(memory.store.trace(turn.trace_id, None))


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "You have 3 steps left.",
        "Please answer in the required format.",
        "thanks, bye",
        "",
        "\x00",
        "x" * 50_000,
        "Bitte sagen Sie mir, wann Ihr Geschäft am Samstag geöffnet ist.",
    ],
)
def test_another_request_gets_nothing(memory: Memory, text: str) -> None:
    """What asks for something else, or for nothing, is left alone."""
    turn = asked(memory, text)
    assert kinds(turn) == []
    assert turn.messages == turn.sent


@pytest.mark.parametrize("where", ["one", "each its own"])
def test_it_is_offered_once_and_stands_where_it_stood(memory: Memory, tmp_path: Path, where: str) -> None:
    """Later requests of the conversation repeat the block at its place, whichever process answers, and get no other."""
    talk = Dialogue(memory)
    sent: list[Any] = []
    steps: list[Callable[[], Turn]] = [
        lambda: talk.act("get_user", {"user_id": "eva_doe_5678"}, {"orders": ["#W1111222"]}, talk.ask(ASKED)),
        lambda: talk.answer("Shall I cancel #W1111222?"),
        lambda: talk.act("cancel_order", {"order_id": "#W1111222"}, "ok", talk.ask("yes, and " + ASKED)),
        lambda: talk.answer("Done."),
        lambda: talk.answer("Bye.", talk.ask(ASKED)),
    ]
    for number, step in enumerate(steps):
        turn = step()
        assert turn.messages[: len(sent)] == sent
        assert str(turn.messages).count("<agent_memory") == 1
        assert kinds(turn) == ["procedure"], number
        sent = turn.messages
        if where == "each its own" and number % 2:
            memory.store.flush()
            talk.memory = Memory(settings(tmp_path, encoder="hashing"))
            assert talk.memory.encoder.wait(10) == "ready"
    assert len({t.episode_id for t in talk.turns}) == 1
    again = talk.turns[0]
    assert [p.position for p in again.fresh] == [1]
    if talk.memory is not memory:
        talk.memory.close()


def test_it_is_offered_when_the_goal_becomes_clear(memory: Memory) -> None:
    """A dialogue that began with a greeting gets it with the turn that says what is wanted, less what is done."""
    talk = Dialogue(memory)
    talk.answer("Who are you?", talk.ask("hello"))
    talk.act("get_user", {"user_id": "eva_doe_5678"}, {"orders": ["#W1111222"]}, talk.ask("I am eva_doe_5678"))
    assert kinds(talk.turns[-1]) == []
    talk.answer("What can I do?")
    turn = talk.ask(ASKED)
    assert kinds(turn) == ["procedure"]
    assert "| 1. get_order(order_id: from get_user's `orders[]`; for each)" in block_in(turn.messages)


def test_a_conversation_is_not_offered_its_own_way(memory: Memory) -> None:
    """An episode that goes on after its success is not told what it did."""
    memory.forget(Selection(memory_id=procedures(memory)[0].memory_id))
    talk = cancelling(memory, "mia_li_3668", "#W5544333", options={"episode_id": "own"})
    warm(memory)
    assert kinds(talk.ask(ASKED)) == []
    assert kinds(asked(memory)) == ["procedure"]


def test_the_caller_s_goal_is_what_is_looked_for(memory: Memory) -> None:
    """With `agent_memory.goal` the words of the messages do not count."""
    assert kinds(asked(memory, "go on", options={"goal": ASKED})) == ["procedure"]
    assert kinds(asked(memory, ASKED, options={"goal": "find out what the weather will be"})) == []


# -- word for word ---------------------------------------------------------------------------------


def by(name: str) -> dict[str, Any]:
    """Return the keyword that names the end user, as the host finds it in a request."""
    return {"options": Options(end_user=name)}


def looked(memory: Memory, text: str, *, judged: bool = True, **keywords: Any) -> Dialogue:
    """Let an agent look something up for a single message."""
    talk = Dialogue(memory, **keywords)
    talk.act("get_order", {"order_id": "#W7654321"}, {"total": 4211}, talk.ask(text))
    talk.answer("It is 4211.")
    if judged:
        talk.judge()
    memory.settle()
    return talk


QUESTION = "What did I pay for the big red lamp that I bought last week?"


def test_the_same_request_again_gets_the_very_call(memory: Memory) -> None:
    """A question in the same words by the same user is given the call that answered it."""
    looked(memory, QUESTION, keywords=by("u1"))
    text = block_in(asked(memory, QUESTION, keywords=by("u1")).messages)
    assert '| 1. get_order(order_id: always "#W7654321")' in text
    assert "the same request" in text


@pytest.mark.parametrize(
    ("text", "name"),
    [(QUESTION, "u2"), (QUESTION, ""), (QUESTION + "?", "u1"), (QUESTION.replace("red", "blue"), "u1")],
)
def test_no_other_request_gets_it(memory: Memory, text: str, name: str) -> None:
    """Another user, and other words, see no value of it."""
    looked(memory, QUESTION, keywords=by("u1"))
    warm(memory)
    assert "W7654321" not in str(asked(memory, text, keywords=by(name)).messages)


def test_a_dialogue_is_never_repeated_word_for_word(memory: Memory) -> None:
    """Where the user wrote twice, the same first words do not give the call away."""
    talk = Dialogue(memory)
    talk.answer("Which one?", talk.ask(QUESTION))
    talk.act("get_order", {"order_id": "#W7654321"}, {"total": 1}, talk.ask("the red one"))
    talk.answer("1.")
    talk.judge()
    warm(memory)
    again = Dialogue(memory)
    again.answer("Which one?", again.ask(QUESTION))
    assert "W7654321" not in str(again.messages) + str(again.ask("the red one").messages)


# -- whom it is not for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"keywords": {"tenant": "other"}},
        {"options": {"namespace": "other"}},
        {"options": {"user_id": "other"}},
        {"options": {"agent_id": "other"}},
        {"fields": {"tools": []}},
        {"messages": [{"role": "system", "content": "You are another agent."}]},
    ],
)
def test_nobody_else_gets_it(memory: Memory, other: dict[str, Any]) -> None:
    """Another tenant, namespace, user or agent, other tools, and other instructions get nothing."""
    warm(memory, **{key: value for key, value in other.items() if key != "messages"})
    assert kinds(asked(memory, **other)) == []


def test_a_user_of_a_scope_has_procedures_of_its_own(memory: Memory) -> None:
    """What was learned for a user is offered to that user."""
    cancelling(memory, "ben_roe_1234", "#W9988777", options={"user_id": "u9"})
    warm(memory, options={"user_id": "u9"})
    assert kinds(asked(memory, options={"user_id": "u9"})) == ["procedure"]


@pytest.mark.parametrize("options", [{"mode": "off"}, {"mode": "write"}, {"max_items": 0}, {"token_budget": 20}])
def test_what_the_caller_switches_off(memory: Memory, options: dict[str, Any]) -> None:
    """With memory off or only writing, with no items, and with too small a budget nothing is inserted."""
    turn = asked(memory, options=options)
    assert kinds(turn) == []
    assert turn.messages == turn.sent
    assert ("over_budget" in reasons(turn)) is ("token_budget" in options)


def test_reading_alone_is_enough(memory: Memory) -> None:
    """With mode `read` the way is offered, and nothing is recorded."""
    before = memory.store.stats()["traces"]
    talk = Dialogue(memory, options={"mode": "read"})
    talk.answer("yes", talk.ask(ASKED))
    assert kinds(talk.turns[0]) == ["procedure"]
    assert memory.store.stats()["traces"] == before


def test_a_held_out_episode_goes_without(tmp_path: Path) -> None:
    """In the holdout nothing is inserted, what would have been is recorded, and no use is counted."""
    with hashing_memory(tmp_path, holdout=1.0) as memory:
        cancelling(memory, "mia_li_3668", "#W5544333")
        warm(memory)
        talk = cancelling(memory, "ben_roe_1234", "#W9988777", judged=False)
        turn = talk.turns[0]
        assert (turn.action, kinds(turn), [i.kind for i in turn.withheld]) == ("holdout", [], ["procedure"])
        assert turn.messages == turn.sent
        assert "<agent_memory" not in str([t.messages for t in talk.turns])
        assert [(p.used_successes, p.used_failures) for p in procedures(memory)] == [(0, 0)]


def test_a_prompt_that_was_refused_gets_none_again(memory: Memory) -> None:
    """Where the upstream took the prompt without memory only, the episode goes on without, and so does the model."""
    talk = Dialogue(memory)
    turn = memory.refused(talk.ask(ASKED))
    assert turn.messages == turn.sent
    talk.answer("Who are you?", turn)
    assert kinds(talk.ask(ASKED)) == []
    assert kinds(asked(memory)) == []
    assert kinds(asked(memory, fields={"model": "another"})) == ["procedure"]


def test_a_wrapped_approach_gets_it_as_text(memory: Memory) -> None:
    """Where an approach keeps the text of the last message alone, the block stands in it."""
    turn = asked(memory, keywords={"text_only": True})
    assert kinds(turn) == ["procedure"]
    assert str(turn.messages[-1]["content"]).splitlines()[-1].startswith("</agent_memory")


# -- what was found wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["quarantined", "retired", "withdrawn", "candidate"])
def test_what_no_longer_stands_is_not_offered(memory: Memory, status: str) -> None:
    """Only what is verified is offered."""
    set_status(memory, status)
    assert kinds(asked(memory)) == []
    set_status(memory, "verified")
    assert kinds(asked(memory)) == ["procedure"]


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("how", ["forgotten", "quarantined", "retired", "retracted"])
def test_what_no_longer_stands_is_not_inserted_again(memory: Memory, tmp_path: Path, how: str, reopen: bool) -> None:
    """A conversation that has the block loses it once the procedure is forgotten or found wrong."""
    taught = cancelling(memory, "ben_roe_1234", "#W9988777", judged=None)
    for record in procedures(memory):
        memory.forget(Selection(memory_id=record.memory_id))
    taught.judge(feedback_id="f1")
    warm(memory)
    talk = Dialogue(memory)
    talk.act("get_user", {"user_id": "eva_doe_5678"}, {"orders": ["#W1111222"]}, talk.ask(ASKED))
    assert kinds(talk.begin()) == ["procedure"]
    if how == "forgotten":
        memory.forget(Selection(episode_id=taught.turns[0].episode_id))
    elif how == "retracted":
        taught.judge(None, feedback_id="f1")
    else:
        set_status(memory, how)
    if reopen:
        memory.store.flush()
        talk.memory = Memory(settings(tmp_path, encoder="none"))
    turn = talk.begin()
    assert (kinds(turn), turn.messages) == ([], turn.sent)
    if reopen:
        talk.memory.close()


def test_a_way_that_fails_where_it_is_followed_is_not_offered(memory: Memory) -> None:
    """After enough failures of the episodes that had it, it is left out; successes bring it back."""
    record = procedures(memory)[0]

    def used(right: int, wrong: int) -> list[str]:
        memory.store.write(
            lambda tx: tx.db.execute(
                "UPDATE memories SET used_successes = ?, used_failures = ?, revision = ? WHERE memory_id = ?",
                (right, wrong, tx.counters.revision(), record.memory_id),
            )
        ).result(10)
        return kinds(asked(memory))

    assert used(0, 2) == ["procedure"]
    assert used(0, 20) == []
    assert used(20, 20) == ["procedure"]


def test_what_harms_is_retired_by_its_uplift(memory: Memory) -> None:
    """Where episodes with it fail and held-out ones do not, the procedure is retired, and not offered any more."""
    (record,) = procedures(memory)

    def expose(tx: Any) -> None:
        for n in range(400):
            held = n % 2
            tx.db.execute(
                "INSERT INTO exposures(memory_id, scope_id, episode_id, created_at, held_out, share, success) "
                "VALUES (?, 1, ?, ?, ?, 0.5, ?)",
                (record.memory_id, f"x{n}", float(n), held, held),
            )
        tx.procedures.refresh(record.memory_id)

    memory.store.write(expose).result(10)
    assert [p.memory_id for p in procedures(memory, "retired")] == [record.memory_id]
    assert kinds(asked(memory)) == []


# -- never in the way ------------------------------------------------------------------------------


class Stuck(HashingEncoder):
    """An encoder that takes its time once it is told to."""

    waits = threading.Event()
    go_on = threading.Event()

    def encode(self, keys: Any) -> Any:
        """Encode, later."""
        if self.waits.is_set():
            self.go_on.wait(30)
        return np.asarray(super().encode(keys))


def test_a_slow_encoder_leads_to_no_offer_and_no_failure(tmp_path: Path) -> None:
    """A request waits for the goal's vector no longer than its deadline, and goes out as it is."""
    Stuck.waits.clear()
    Stuck.go_on.clear()
    with Memory(settings(tmp_path, deadline_ms=200), encoder=Stuck) as memory:
        assert memory.encoder.wait(10) == "ready"
        cancelling(memory, "mia_li_3668", "#W5544333")
        warm(memory)
        Stuck.waits.set()
        started = time.monotonic()
        turn = asked(memory)
        assert time.monotonic() - started < 3
        assert (kinds(turn), turn.messages) == ([], turn.sent)
        memory.finish(turn, response("ok"))
        Stuck.go_on.set()
        memory.settle()
        assert kinds(asked(memory)) == ["procedure"]


def test_without_an_encoder_there_is_no_offer(tmp_path: Path) -> None:
    """Lexical memories learn procedures and offer none, but record every request."""
    with Memory(settings(tmp_path)) as memory:
        cancelling(memory, "mia_li_3668", "#W5544333")
        memory.settle()
        assert len(procedures(memory)) == 1
        assert kinds(asked(memory)) == []


@pytest.mark.parametrize("broken", ["lines", "changed"])
def test_a_fault_in_reading_procedures_fails_open(memory: Memory, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Whatever fails there, the request is made as it came, recorded, and the next one is served again."""
    fail_open = FailOpen(5.0)
    cancelling(memory, "ben_roe_1234", "#W9988777")
    memory.settle()
    set_status(memory, "verified")  # something to read
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> None:
            raise OSError("the disk is gone")

        patch.setattr(memory.store.procedures, broken, fails)
        talk = Dialogue(memory)
        turn, fault = fail_open.call(lambda: talk.ask(ASKED))
        assert fault == "OSError"
        assert turn is None
        plain = memory.new_turn({"model": "m", "messages": talk.messages})
        assert fail_open.quietly(lambda: memory.finish(plain, response("ok"))) == ""
    warm(memory)
    assert kinds(asked(memory)) == ["procedure"]
    memory.settle()
    assert memory.trace(plain.trace_id)["task"] == ASKED


def test_what_cannot_be_read_back_is_no_way(memory: Memory) -> None:
    """A row whose content is not what this release writes leads to no offer; the request goes on."""
    memory.store.write(
        lambda tx: tx.db.execute(
            "UPDATE memories SET answer = '{\"steps\": []}', revision = ? WHERE kind = 'procedure'",
            (tx.counters.revision(),),
        )
    ).result(10)
    assert kinds(asked(memory)) == []


def test_many_at_once_get_the_same(memory: Memory) -> None:
    """Requests of many threads while others are judged are all served, and see whole procedures."""
    found: list[list[str]] = []
    faults: list[BaseException] = []

    def ask_often() -> None:
        try:
            found.extend(kinds(asked(memory)) for _ in range(10))
        except BaseException as fault:  # noqa: BLE001 - told below
            faults.append(fault)

    threads = [threading.Thread(target=ask_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for n in range(5):
        cancelling(memory, f"user_{n}_{n}{n}{n}{n}", f"#W{n}{n}{n}{n}333")
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert found == [["procedure"]] * 60
