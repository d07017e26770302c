"""Procedures of agents of many kinds, from their first solved episode to the next request that is like it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import assistant, body, hashing_memory, response
from trajectories import Dialogue, block_in, cancelling, procedures, tools_of, user, warm

from optillm_memory import Memory, Turn

JSON = dict[str, Any]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Give a memory with an encoder."""
    with hashing_memory(tmp_path) as opened:
        yield opened


def kinds(turn: Turn) -> list[str]:
    """Return the kinds of what stands in a turn's prompt."""
    return [item.kind for item in turn.injected]


# -- SQL -------------------------------------------------------------------------------------------


def queried(memory: Memory, question: str, *queries: tuple[str, str], answer: str = "", good: bool = True) -> Dialogue:
    """Let an agent query a database and hand in an answer, which ends the episode."""
    talk = Dialogue(memory)
    talk.ask(question)
    for query, shown in queries:
        talk.act("execute_sql", {"query": query}, shown)
    call = {
        "id": f"call_{id(talk):016x}",
        "type": "function",
        "function": {"name": "submit", "arguments": json.dumps({"answer": answer})},
    }
    talk.answer({"role": "assistant", "content": None, "tool_calls": [call]})
    talk.judge(good)
    memory.settle()
    return talk


PUPILS = "How many pupils of the school of music have passed the exam in the last term?"


def test_a_question_that_comes_again_gets_the_query_that_answered_it(memory: Memory) -> None:
    """The wrong query is left out, the last submit is in, and the agent's own instructions make no likeness."""
    wrong, right = (
        ("SELECT pupil", "Error: no such column pupil\nexit code: 1"),
        ("SELECT count(*) FROM pupils", "[(4211,)]"),
    )
    queried(memory, PUPILS, wrong, right, answer="4211")
    queried(memory, "Which teachers live in Vienna?", ("SELECT name FROM teachers", "[('Ada',)]"), answer="Ada")
    text = block_in(Dialogue(memory).ask(PUPILS).messages)
    assert '1. execute_sql(query: always "SELECT count(*) FROM pupils")' in text
    assert '2. submit(answer: always "4211")' in text
    assert "SELECT pupil" not in text
    assert "Ada" not in text


def test_newest_evidence_is_shown(memory: Memory) -> None:
    """Where the same question was answered by another query later, that one is shown, unless it was a failure."""
    queried(memory, PUPILS, ("SELECT count(*) FROM pupils", "[(4211,)]"), answer="4211")
    queried(memory, PUPILS, ("SELECT sum(n) FROM terms", "[(17,)]"), answer="17")
    queried(memory, PUPILS, ("SELECT 0", "[(0,)]"), answer="0", good=False)
    text = block_in(Dialogue(memory).ask(PUPILS).messages)
    assert "SELECT sum(n) FROM terms" in text
    assert "count(*)" not in text
    assert "SELECT 0" not in text


# -- shell commands in text ------------------------------------------------------------------------

MANUAL = "You work in a shell.\nAnswer with exactly one command in a code block.\nYou have {} steps left.\n"


def shelled(memory: Memory, task: str, *commands: tuple[str, str], steps: int = 9) -> Turn:
    """Let a text agent run commands, whose output comes in messages of the user, and say that it went well."""
    said: list[JSON] = [user(MANUAL.format(steps) + task)]
    for command, output in commands:
        turn = memory.begin(body(*said))
        made = assistant(f"Let me see.\n```bash\n{command}\n```")
        memory.finish(turn, response(made))
        memory.store.flush()
        said += [made, user(f"<output>\n{output}\n</output>\nExit code: 0")]
    turn = memory.begin(body(*said))
    memory.finish(turn, response("That is it."))
    memory.store.flush()
    memory.feedback({"episode_id": turn.episode_id, "metric": "success", "value": True, "source": "code"})
    memory.settle()
    return turn


TASKS = {
    "Find the largest file below the folder of the pictures": [("du -a pics | sort -n | tail -1", "12 pics/big.png")],
    "Count the lines of code in all Python sources": [("cat *.py | wc -l", "4211")],
    "Tell which process listens on the port of the web server": [("ps aux | grep 8080", "root 1 httpd")],
    "Print the names of all users whose shell is fish": [("grep fish /etc/passwd | cut -d: -f1", "ada")],
}


def test_a_text_agent_s_manual_makes_no_likeness(memory: Memory) -> None:
    """What all requests of the agent share counts for nothing: the task in it decides, whatever its counter says."""
    for number, (task, commands) in enumerate(TASKS.items()):
        shelled(memory, task, *commands, steps=number)
    assert len(procedures(memory)) == len(TASKS)
    memory.encoder.encode([""])
    for other in ("Compress the archive of last year", "Restart the mail server"):
        for _ in range(2):
            turn = memory.begin(body(user(MANUAL.format(7) + other)))
            assert "procedure" not in kinds(turn)
            memory.encoder.encode([""])
    for task, ((command, _),) in TASKS.items():
        turn = memory.begin(body(user(MANUAL.format(5) + task)))
        assert kinds(turn) == ["procedure"], task
        assert json.dumps(command) in block_in(turn.messages)


def test_a_format_reminder_is_no_task(memory: Memory) -> None:
    """What the harness says in the middle of a run gets neither an exemplar nor a procedure."""
    task, commands = next(iter(TASKS.items()))
    shelled(memory, task, *commands)
    said = [user(MANUAL.format(3) + "Compress the archive of last year"), assistant("I would like to help you.")]
    for reminder in ("Please answer with exactly one command in a code block.", "You have 2 steps left.", "go on"):
        turn = memory.begin(body(*said, user(reminder)))
        assert (kinds(turn), turn.messages) == ([], turn.sent)


# -- customers -------------------------------------------------------------------------------------

WISHES = {
    "de": (
        "Guten Tag, ich habe es mir anders überlegt und möchte die Bestellung {order} stornieren, die ich gestern bei "
        "Ihnen aufgegeben habe, und mein Geld für alle Artikel darin zurück. Meine Kundennummer ist {name}."
    ),
    "ja": (
        "こんにちは。気が変わったので、昨日そちらのお店で注文した {order} をキャンセルして、"
        "すべての商品の代金を返金していただきたいです。"
        "どうぞよろしくお願いいたします。ユーザー番号は {name} です。"
    ),
    "ar": (
        "مرحبا، لقد غيرت رأيي وأريد إلغاء الطلب {order} الذي قدمته في متجركم أمس "
        "واسترداد أموالي عن جميع المنتجات الموجودة فيه من فضلكم. رقم المستخدم الخاص بي هو {name}."
    ),
}


@pytest.mark.parametrize("language", WISHES)
def test_customers_write_in_any_language(memory: Memory, language: str) -> None:
    """The way to a goal is found in the language in which it was asked for, with nothing of the other customer."""
    wish = WISHES[language]
    cancelling(memory, "mia_li_3668", "#W5544333", asked=wish.format(name="mia_li_3668", order="#W5544333"))
    warm(memory)
    turn = Dialogue(memory).ask(wish.format(name="eva_doe_5678", order="#W1111222"))
    assert kinds(turn) == ["procedure"]
    text = block_in(turn.messages)
    assert "get_user(user_id: from the user)" in text
    assert not [v for v in ("mia_li", "5544333") if v in text]


def booked(memory: Memory, wish: str, cabin: str, bag: str) -> None:
    """Let a customer have a flight booked in a cabin, with a bag of an id."""
    talk = Dialogue(memory)
    talk.act("book_flight", {"cabin": cabin, "bag_id": bag}, {"booked": True}, talk.ask(wish))
    talk.answer("Booked.")
    talk.judge()


KINDS = [
    "Please book me a seat on the plane to Rome on Monday morning, the cheapest that you can find",
    "My grandmother wants to visit us at Christmas with her dog; arrange her journey from Oslo",
    "Twelve colleagues must get from Lima to our yearly conference and back within three days",
]


@pytest.mark.parametrize("count", [2, 3])
def test_a_word_of_three_kinds_of_task_is_spelled_out(memory: Memory, count: int) -> None:
    """A plain word that came in three kinds of goal is one of the trade; of two it may be one customer's, like ids."""
    for number, wish in enumerate(KINDS[:count]):
        booked(memory, wish, "economy", f"B{number}7731")
    warm(memory)
    turn = Dialogue(memory).ask(KINDS[0] + ", please")
    text = block_in(turn.messages)
    assert ('cabin: always "economy"' in text) is (count == 3)
    assert "7731" not in text


def test_several_solved_ways_are_one(memory: Memory) -> None:
    """Of several customers' ways what most have in common is offered, with the evidence said."""
    for n in range(4):
        cancelling(memory, f"user_{'abcd'[n]}_{n}{n}{n}{n}", f"#W{n}{n}{n}{n}333")
    warm(memory)
    assert {tuple(tools_of(p)) for p in procedures(memory)} == {("get_user", "get_order", "?", "cancel_order")}
    text = block_in(cancelling(memory, "eva_doe_5678", "#W1111222", judged=None).turns[0].messages)
    assert re.search("verified in [34] episodes", text)
    assert text.count("| ") == 4


def test_ids_as_keys_and_nested_results(memory: Memory) -> None:
    """An id that was the key of an object is told by where it stood, and so is a value deep inside."""
    variants = {
        "9523456873": {"options": {"color": "red"}, "price": 5},
        "1421289881": {"options": {"color": "blue"}, "price": 7},
    }
    wish = "I would like to exchange the lamp that I ordered for one in {}, as long as you have it in stock"
    for chosen, color in (("1421289881", "blue"), ("9523456873", "red")):  # what one alone chose would tell nothing
        talk = Dialogue(memory)
        asked = talk.ask(wish.format(color))
        talk.act("get_product", {"name": "desk lamp"}, {"product": {"variants": variants}}, asked)
        talk.answer(f"Exchange it for the {color} one?")
        talk.act("exchange_item", {"item": {"id": chosen, "reason": "colour"}}, {"ok": True}, talk.ask("yes"))
        talk.answer("Done.")
        talk.judge()
    warm(memory)
    text = block_in(Dialogue(memory).ask(wish.format("green")).messages)
    assert "exchange_item(item.id: from step 1's `product.variants{}`, item.reason: your choice" in text
    assert "1421289881" not in text


def test_a_legacy_agent_s_calls_are_steps(memory: Memory) -> None:
    """Calls in the form of `function_call` are mined like any other."""
    said: list[JSON] = [user("Cancel my order #W5544333 and tell me when that is done, will you?")]
    made = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "cancel_order", "arguments": '{"id": "#W5544333"}'},
    }
    turn = memory.begin(body(*said, functions=[{"name": "cancel_order"}]))
    memory.finish(turn, response(made))
    memory.store.flush()
    said += [made, {"role": "function", "name": "cancel_order", "content": "ok"}]
    turn = memory.begin(body(*said, functions=[{"name": "cancel_order"}]))
    memory.finish(turn, response("It is cancelled."))
    memory.store.flush()
    memory.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"})
    assert [tools_of(p) for p in procedures(memory)] == [["cancel_order"]]
