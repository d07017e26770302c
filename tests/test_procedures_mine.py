"""Mining: of a solved episode's steps those that mattered, each argument bound to where its value came from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from agents import calling, result
from builders import assistant
from hypothesis import given
from hypothesis import strategies as st

from optillm_memory.learn.procedures.mine import (
    SAY,
    STEPS_MOST,
    Procedure,
    ProcedureStep,
    RunStep,
    folded,
    mined,
    run_of,
)
from optillm_memory.learn.procedures.values import Slot, digest_of, found_by_shape, leaves, parsed, shape_of, stands_in

JSON = dict[str, Any]
GET, CANCEL, BOOK = "get_order", "cancel_order", "book_flight"
NOT_FOUND = '{"error": {"code": 404, "message": "order not found"}}'


def user(text: Any) -> JSON:
    """Return a user message."""
    return {"role": "user", "content": text}


def acting(tool: str, arguments: Any, observation: Any = "ok", call_id: str = "") -> list[JSON]:
    """Return a call with its result; a mapping is JSON."""
    given = arguments if isinstance(arguments, str) else json.dumps(arguments)
    name = call_id or f"call-of-{tool}-{abs(hash(given))}"
    call = {"id": name, "type": "function", "function": {"name": tool, "arguments": given}}
    shown = observation if isinstance(observation, str) else json.dumps(observation)
    return [calling(call), result(name, shown)]


def mine(*messages: JSON | list[JSON]) -> Procedure | None:
    """Return the procedure of a conversation."""
    flat = [m for item in messages for m in (item if isinstance(item, list) else [item])]
    return mined(*run_of(flat))


def tools(procedure: Procedure | None) -> list[str]:
    """Return the tools of a procedure, questions as `?`."""
    return [step.tool or "?" for step in procedure.steps] if procedure else []


def slots(procedure: Procedure | None, tool: str) -> dict[str, tuple[str, str]]:
    """Return where the arguments of a tool's first step come from, by name."""
    assert procedure is not None
    return {s.name: (s.kind, s.origin) for s in next(step for step in procedure.steps if step.tool == tool).slots}


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_is_calls_results_and_replies() -> None:
    """Calls with their results and text turns with a reply are steps, in order; the rest is what was said."""
    messages = [
        {"role": "system", "content": "You help."},
        user("Cancel order A1"),
        *acting(GET, {"id": "A1"}, {"status": "open"}),
        assistant("Shall I cancel it?"),
        user("Yes please"),
        *acting(CANCEL, {"id": "A1"}, "done"),
        assistant("It is cancelled."),
    ]
    texts, steps = run_of(messages)
    assert texts == ["Cancel order A1", "Yes please"]
    assert [(s.tool, s.effect, s.told) for s in steps] == [
        (GET, "reads", 1), (SAY, "unknown", 1), (CANCEL, "writes", 2),
    ]  # fmt: skip
    assert steps[1].observation == "Yes please"


def test_the_last_call_has_no_observation() -> None:
    """The call with which an episode ended is a step; one that was never answered in its middle is none."""
    call = {"id": "s", "type": "function", "function": {"name": "submit", "arguments": '{"answer": "4211"}'}}
    lost = {"id": "l", "type": "function", "function": {"name": "delete_it", "arguments": "{}"}}
    _, steps = run_of([user("count them"), calling(lost), user("and?"), *acting("count_rows", {}), calling(call)])
    assert [s.tool for s in steps] == ["count_rows", "submit"]
    assert tools(mine(user("count"), acting("count_rows", {"of": "lines"}, {"n": "4211"}), calling(call))) == [
        "count_rows", "submit",
    ]  # fmt: skip


def test_a_text_agent_s_commands_are_steps() -> None:
    """Fenced commands whose output comes as a user message are steps, and their output is nothing the user said."""
    messages = [
        user("What is the largest file?"),
        assistant("```bash\ndu -a | sort -n\n```"),
        user("<output>\n12 ./big.bin\n</output>\nExit code: 0"),
        assistant("It is big.bin"),
    ]
    texts, steps = run_of(messages)
    assert texts == ["What is the largest file?"]
    assert [(s.arguments, s.effect, s.failed) for s in steps] == [("du -a | sort -n", "reads", False)]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "assistant", "tool_calls": "none"}],
        [{"role": "assistant", "tool_calls": [None, 7, {"function": None}, {"function": {}}]}],
        [{"role": "tool", "tool_call_id": "x", "content": "stray"}],
        [assistant("a"), assistant("b"), user("c"), user("d")],
        [user("\x00\ud800"), calling({"id": "c", "function": {"name": "\x00", "arguments": "\ud800"}})],
    ],
)
def test_no_conversation_makes_a_run_fail(messages: list[JSON]) -> None:
    """Whatever a client sends, there is a run, and mining it raises nothing."""
    mined(*run_of(messages))


# -- what is kept ----------------------------------------------------------------------------------


def test_failed_and_repeated_steps_are_dropped() -> None:
    """A call that failed and one that was made before are no part of the way; the same tool for another value is."""
    wrong = acting(CANCEL, {"order_id": "#9999"}, NOT_FOUND)
    look = acting(GET, {"order_id": "#1234"}, {"order_id": "#1234", "refund": "card_77"})
    found = mine(
        user("cancel #1234"), wrong, look, acting(GET, {"order_id": "#1234"}, {"refund": "card_77"}, "again"),
        acting(CANCEL, {"order_id": "#1234", "refund": "card_77"}),
    )  # fmt: skip
    assert tools(found) == [GET, CANCEL]
    assert slots(found, CANCEL) == {"order_id": ("step", f"{GET}:order_id"), "refund": ("step", f"{GET}:refund")}


def test_only_what_a_change_rests_on_is_kept() -> None:
    """Looks whose values are not used later are dropped, however many; those that others rest on stay."""
    found = mine(
        user("cancel the flight of mia_li_3668"),
        acting("get_weather", {"city": "Paris"}, {"sky": "grey"}),
        acting("get_user", {"user_id": "mia_li_3668"}, {"reservations": ["NO6JO3", "4WQ150"]}),
        acting("get_reservation", {"reservation_id": "4WQ150"}, {"payment": {"id": "credit_card_4421"}}),
        acting("list_airports", {}, ["JFK"]),
        acting("cancel_reservation", {"reservation_id": "4WQ150", "payment_id": "credit_card_4421"}),
        acting("get_weather", {"city": "Rome"}, {"sky": "blue"}),
    )
    assert tools(found) == ["get_user", "get_reservation", "cancel_reservation"]
    assert slots(found, "get_user") == {"user_id": ("user", r"[a-z]+_[a-z]+_\d{4}")}
    assert slots(found, "get_reservation") == {"reservation_id": ("step", "get_user:reservations[]")}
    assert slots(found, "cancel_reservation") == {
        "reservation_id": ("step", "get_user:reservations[]"), "payment_id": ("step", "get_reservation:payment.id"),
    }  # fmt: skip


def test_the_question_before_a_change_is_kept() -> None:
    """What the user agreed to stands before the change; other talk of the dialogue does not."""
    found = mine(
        user("hi"), assistant("How can I help?"), user("cancel #1234"), assistant("Cancel #1234: yes or no?"),
        user("yes"), acting(CANCEL, {"order_id": "#1234"}), assistant("Anything else?"), user("no, thanks"),
    )  # fmt: skip
    assert tools(found) == ["?", CANCEL]


@pytest.mark.parametrize("ask", ["Soll ich #1234 stornieren?", "¿Cancelo #1234?", "#1234 を取り消しますか?", "OK?"])
def test_a_confirmation_is_known_in_any_language(ask: str) -> None:
    """That it was asked and answered is what counts, not the words."""
    found = mine(user("#1234"), assistant(ask), user("はい"), acting(CANCEL, {"order_id": "#1234"}))
    assert tools(found) == ["?", CANCEL]


def test_a_look_between_the_question_and_the_change_does_not_hide_it() -> None:
    """An agent that calculates a price after the user's yes was still told to go on."""
    found = mine(
        user("cancel #1234"), assistant("Cancel it?"), user("yes"), acting("calculate", {"expression": "3 + 4"}, "7"),
        acting(CANCEL, {"order_id": "#1234"}),
    )  # fmt: skip
    assert tools(found) == ["?", CANCEL]


def test_without_a_change_the_last_look_is_the_way() -> None:
    """An episode that changed nothing keeps its last look and what that rests on."""
    found = mine(
        user("Which seat has mia_li_3668?"),
        acting("list_airports", {}, ["JFK"]),
        acting("get_user", {"user_id": "mia_li_3668"}, {"reservations": ["4WQ150"]}),
        acting("get_reservation", {"id": "4WQ150"}, {"seat": "12A"}),
    )
    assert tools(found) == ["get_user", "get_reservation"]


def test_earlier_results_that_were_handed_in_are_dropped() -> None:
    """Of several submits the last one stands: those before it were not the right one."""
    found = mine(
        user("How many?"),
        acting("sql", {"query": "SELECT count(*) FROM a"}, "[(4211,)]"),
        acting("submit", {"answer": "17"}, "wrong"),
        acting("sql", {"query": "SELECT count(*) FROM b"}, "[(4212,)]"),
        acting("submit", {"answer": "4212"}, "right"),
    )
    assert tools(found) == ["sql", "submit"]
    assert found is not None
    assert json.loads(found.steps[0].arguments) == {"query": "SELECT count(*) FROM b"}
    assert json.loads(found.steps[1].arguments) == {"answer": "4212"}


def test_a_list_that_is_gone_through_is_a_loop() -> None:
    """Calls that come again for other values of the same origin are one step that repeats, without their values."""
    orders = ["#W1111", "#W2222", "#W3333"]
    found = mine(
        user("Cancel all of mia_li_3668"),
        acting("get_user", {"user_id": "mia_li_3668"}, {"orders": orders}),
        *[acting(CANCEL, {"order_id": order}) for order in orders],
    )
    assert found is not None
    assert tools(found) == ["get_user", CANCEL, CANCEL, CANCEL]
    user_step, loop = folded(found.steps)
    assert (user_step.repeats, user_step.tool) == (False, "get_user")
    assert (loop.repeats, loop.tool, loop.arguments, loop.observed) == (True, CANCEL, "", "")


def test_calls_of_other_origins_are_no_loop() -> None:
    """The same tool with values from elsewhere, or without any, is another step; questions in a row are one."""
    once = ProcedureStep(CANCEL, (Slot("id", "step", "get_user:ids[]"),), writes=True)
    other = ProcedureStep(CANCEL, (Slot("id", "step", "get_one:id"),), writes=True)
    free = ProcedureStep("think", (Slot("thought", "free"),))
    assert [s.tool for s in folded([once, once, other, free, free])] == [CANCEL, CANCEL, "think", "think"]
    assert len(folded([ProcedureStep(SAY), ProcedureStep(SAY), once])) == 2


def test_ids_as_keys_are_values() -> None:
    """Objects whose keys are ids are lists by another name: the keys are bound, and no path names one."""
    items = {"9523456873": {"price": 5.25, "name": "red lamp"}, "1421289881": {"price": 7, "name": "blue lamp"}}
    found = mine(
        user("I want the blue lamp"),
        acting("list_items", {}, {"variants": items}),
        acting("order_item", {"item_id": "1421289881", "color": "blue lamp"}),
    )
    assert slots(found, "order_item") == {
        "item_id": ("step", "list_items:variants{}"), "color": ("step", "list_items:variants{}.name"),
    }  # fmt: skip


def test_names_as_keys_are_values() -> None:
    """A key that is a name the user wrote is data, whatever else the object holds; a field of that look is none."""
    found = mine(
        user("Pay Alice what Bob owes her"),
        acting(
            "get_accounts", {"of": "Alice"}, {"Owner": "x", "Alice": {"Account": "A7731"}, "Bob": {"Account": "B1"}}
        ),
        acting("pay_it", {"to": "A7731", "notes": {"Bob": "A7731"}}),
    )
    assert slots(found, "pay_it")["to"] == ("step", "get_accounts:{}.Account")
    assert "notes{}" in slots(found, "pay_it")
    assert all("Alice" not in s.origin + s.name for step in (found.steps if found else ()) for s in step.slots)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("mia_li_3668", "user"), ("MIA_LI_3668", "user"), ("economy", "constant"), (3, "constant"), (True, "constant"),
        ("no", "constant"), (1234.5, "user"), ("x" * 41, "free"), ("y" * 5_000, "free"), ("", "constant"),
        ("Zürich", "user"), ("東京都心部", "user"),
    ],
)  # fmt: skip
def test_where_a_value_comes_from(value: Any, kind: str) -> None:
    """A telling value is bound to the user's words; what stands nowhere is a constant if it is short, else free."""
    asked = user("Send 1234.5 to mia_li_3668 in Zürich and 東京都心部, no, 3, true")
    found = mine(asked, acting("send_it", {"value": value}))
    assert slots(found, "send_it")["value"][0] == kind


def test_the_latest_observation_is_the_source() -> None:
    """A value that several results show is bound to the last one before it, and to no later one."""
    found = mine(
        user("go on"),
        acting("get_one", {}, {"id": "A7731"}),
        acting("get_two", {}, {"other": {"id": "A7731"}}),
        acting("update_it", {"id": "A7731"}),
        acting("get_three", {}, {"late": "A7731"}),
    )
    assert tools(found) == ["get_two", "update_it"]
    assert slots(found, "update_it") == {"id": ("step", "get_two:other.id")}


def test_nested_arguments_are_bound_leaf_by_leaf() -> None:
    """Lists and objects in arguments are bound by their paths, the same path once."""
    flights = [{"number": "HAT136", "date": "2024-05-16"}, {"number": "HAT039", "date": "2024-05-16"}]
    found = mine(
        user("Book for 2024-05-16"),
        acting("search_flights", {"date": "2024-05-16"}, [[{"flight": {"no": f["number"]}} for f in flights]]),
        acting(BOOK, {"flights": flights, "insurance": "no", "passengers": [{"first": None}]}),
    )
    assert slots(found, BOOK) == {
        "flights[].number": ("step", "search_flights:[][].flight.no"),
        "flights[].date": ("user", r"\d{4}\-\d{2}\-\d{2}"),
        "insurance": ("constant", "no"),
    }


def test_the_caller_s_goal_is_what_values_are_bound_to() -> None:
    """With a goal that the caller said, arguments are bound to it."""
    _, steps = run_of([user("go"), *acting(CANCEL, {"order_id": "#W5544"})])
    found = mined(["cancel #W5544"], steps)
    assert found is not None
    assert found.texts == ("cancel #W5544",)
    assert found.steps[0].slots == (Slot("order_id", "user", shape_of("#W5544")),)


def test_sql_and_shell_are_read_by_their_text() -> None:
    """A query that looks and a command that looks keep their arguments; what changes something does not."""
    looks = mine(user("count"), acting("execute_sql", {"query": "SELECT 1"}, "[(1,)]"))
    assert looks is not None
    assert [(s.writes, s.arguments) for s in looks.steps] == [(False, '{"query": "SELECT 1"}')]
    writes = mine(user("clean"), acting("bash", {"command": "rm -r build"}, ""))
    assert writes is not None
    assert [(s.writes, s.arguments) for s in writes.steps] == [(True, "")]


def test_talk_alone_is_no_procedure() -> None:
    """An episode without actions, and one whose actions all failed, teach none."""
    assert mine(user("hello"), assistant("hi"), user("bye")) is None
    assert mine(user("x"), acting(CANCEL, {}, NOT_FOUND), assistant("?"), user("never mind")) is None
    assert mined([], []) is None


def test_a_long_search_is_no_procedure() -> None:
    """What took more steps than anyone would follow is not kept; with as many as are allowed it is."""
    many = [RunStep(f"update_{n}", "{}", "ok", effect="writes") for n in range(STEPS_MOST + 1)]
    assert mined(["x"], many) is None
    assert len((mined(["x"], many[:-1]) or Procedure((), ())).steps) == STEPS_MOST


# -- odd inputs ------------------------------------------------------------------------------------


NESTED = "[" * 100_000
WHOLE = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "null", "NaN", "[1, 2", '{"a": NaN}', NESTED, NESTED + "]" * 100_000, WHOLE,
        '{"a":' * 900 + "1" + "}" * 900,
        "1" * 10_000, '"\\ud800"', '{"\\ud800": "\\u0000"}', "\ud800", "\x00", '{"": {"": ""}}', "[[[[]]]]",
        '{"</agent_memory>": "<agent_memory>"}', '{"a": 1e999}', "-", "[1e400]", '{"a.b": {"c[]": 7}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["arguments", "observation"])
def test_no_arguments_and_no_observation_make_mining_fail(text: str, place: str) -> None:
    """Broken, deep, empty and odd JSON is bound like any other, or not at all; what comes of it can be stored."""
    given = text if place == "arguments" else '{"id": "A7731"}'
    shown = text if place == "observation" else '{"id": "A7731"}'
    steps = [RunStep("get_it", given, shown, effect="reads"), RunStep("update_it", given, shown, effect="writes")]
    found = mined([text], steps)
    assert found is not None
    again = json.loads(json.dumps([step.as_json() for step in found.steps]))
    assert tuple(map(ProcedureStep.of_json, again)) == found.steps


@pytest.mark.parametrize("depth", range(930, 1_000, 3))
def test_what_is_just_not_too_deep(depth: int) -> None:
    """At every depth around the one that Python's JSON gives up at, an observation has a digest."""
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        text = opened * depth + "1" + closed * depth
        assert digest_of(text) == digest_of(text)
        assert mined(["x"], [RunStep("get_it", text, text, effect="reads")]) is not None


def test_huge_observations_are_mined_in_time() -> None:
    """Hundreds of arguments and as many long results are bound within seconds: each result is read once."""
    shown = json.dumps({"rows": [{"id": f"row_{n}", "text": "x" * 40} for n in range(3_000)]})
    given = json.dumps({"ids": [f"other_{n}" for n in range(400)], "last": "row_500"})
    steps = [RunStep(f"get_{n}", json.dumps({"n": n}), shown, effect="reads") for n in range(40)]
    started = time.process_time()
    found = mined(["x " * 50_000] * 20, [*steps, RunStep("update_it", given, "ok", effect="writes")])
    assert time.process_time() - started < 10
    assert tools(found) == ["get_39", "update_it"]
    assert slots(found, "update_it")["last"] == ("step", "get_39:rows[].id")


def test_equal_observations_have_one_digest() -> None:
    """JSON is compared by its value, text by its words."""
    assert digest_of('{"a": 1, "b": [2]}') == digest_of('{ "b":[2],"a":1 }')
    assert digest_of("a  b\n") == digest_of("a b")
    assert digest_of("[1, 2]") != digest_of("[2, 1]")


LEAF = st.none() | st.booleans() | st.integers() | st.text(max_size=6)
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@given(TREE)
def test_every_leaf_has_a_path(value: Any) -> None:
    """Each text, number and switch of a JSON value is told once, besides keys that are data."""

    def count(tree: Any) -> int:
        if isinstance(tree, Mapping):
            by_id = bool(tree) and all(any(c.isdigit() for c in key) for key in tree)
            return sum(map(count, tree.values())) + by_id * len(tree)
        if isinstance(tree, Sequence) and not isinstance(tree, str):
            return sum(map(count, tree))
        return int(tree is not None)

    assert len(list(leaves(value))) == count(value)
    assert parsed(json.dumps(value)) == value


@given(st.text(max_size=30))
def test_a_value_has_the_shape_of_its_own(text: str) -> None:
    """A value is found by its own shape, in a text where it stands by itself."""
    import re

    assert re.fullmatch(shape_of(text), text) is not None


def test_values_are_found_by_shape() -> None:
    """Other values of the same look are found, the latest text first, and words are not."""
    texts = ["order #W1234567 of mia_li_3668", "no, #W7654321, please"]
    assert found_by_shape(shape_of("#W0000000"), texts) == ["#W7654321", "#W1234567"]
    assert found_by_shape(shape_of("yusuf_rossi_9620"), texts) == ["mia_li_3668"]


@pytest.mark.parametrize(
    ("value", "text", "there"),
    [
        ("cat", "a cat.", True), ("cat", "concat", False), ("Cat", "the CAT sat", True), ("cat", "concat cat", True),
        ("", "x", True), ("4", "14 4", True), ("#4", "a#4", True), ("İ", "İstanbul İ", True),
    ],
)  # fmt: skip
def test_whether_a_value_stands_in_a_text(value: str, text: str, there: bool) -> None:
    """A value stands in a text as words of its own, whatever its case."""
    assert stands_in(value, text) is there


def test_what_made_a_refused_call_work_belongs_to_it() -> None:
    """What was done between a call that failed and the same call that worked is kept; before and after it is not."""
    refused = acting("get_account", {"id": "A1234567"}, "Error: access denied, call verify_identity first")
    worked = acting("get_account", {"id": "A1234567"}, {"id": "A1234567", "state": "locked"})
    around = [acting("get_hours", {"city": "Graz"}), acting("get_weather", {"city": "Graz"})]
    verified = acting("verify_identity", {}, "Identity verified.")
    asked = user("what is the state of A1234567?")
    assert tools(mine(asked, around[0], refused, verified, worked)) == ["verify_identity", "get_account"]
    assert tools(mine(asked, around[0], verified, worked)) == ["get_account"]
    other = acting("get_account", {"id": "A7654321"}, "Error: not found")
    assert tools(mine(asked, other, around[1], worked)) == ["get_account"]
