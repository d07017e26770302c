"""Served actions: what a request gets of them, what keeps them from it, and what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acting import (
    LOOKS,
    NOTE,
    ORDER,
    PARCEL,
    REUSE,
    SERVING,
    SYSTEM,
    TOOLS,
    Run,
    Way,
    run,
    task_of,
    tool,
    warm,
    way_of,
    woken,
)
from builders import hashing_memory, lexical_memory, settings
from hosting import until

from optillm_memory import Memory, Turn
from optillm_memory.conversation.options import parse_options
from optillm_memory.decide.actions import NextAction
from optillm_memory.decide.declared import as_declared
from optillm_memory.errors import InvalidField
from optillm_memory.learn.procedures.effects import asks_to_write, effect_of
from optillm_memory.records import new_trace_id
from optillm_memory.request.permission import refusal_of

BOTH = [(ORDER, {"order_id": "W0000007"}), (PARCEL, {"parcel_id": "PX-0000007"})]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memory]:
    """Give a memory whose gate is open for the look-ups of one task; tests read from it and record nothing."""
    with hashing_memory(tmp_path_factory.mktemp("known")) as memory:
        warm(memory)
        yield memory


def reading(**options: Any) -> dict[str, Any]:
    """Return options by which memory may serve and records nothing."""
    return {**SERVING, "mode": "read", **options}


def asking(number: int, system: str = SYSTEM) -> list[dict[str, Any]]:
    """Return the messages of a first request."""
    return [{"role": "system", "content": system}, {"role": "user", "content": task_of(number)}]


def first(memory: Memory, options: Mapping[str, Any], *, number: int = 7, **fields: Any) -> Turn:
    """Return the turn of an episode's first request."""
    body = {
        "model": "m",
        "messages": asking(number),
        "tools": TOOLS,
        "agent_memory": dict(options),
        **fields,
    }
    return memory.begin(body)


def reason(turn: Turn) -> str:
    """Return why a request was, or was not, answered from memory."""
    return turn.decision.reason if turn.decision else next(s["reason"] for s in reversed(turn.skipped))


# -- what is served --------------------------------------------------------------------------------


def test_an_action_is_served_in_the_hosts_form(known: Memory) -> None:
    """The completion is a tool call with valid arguments, no tokens are used, and the metadata tells its procedures."""
    turn = first(known, reading())
    assert (turn.action, reason(turn)) == ("reuse", "above_threshold")
    completion = turn.reused()
    (choice,) = completion["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert completion["id"] == turn.trace_id
    assert completion["object"] == "chat.completion"
    assert completion["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert (choice["index"], choice["finish_reason"]) == (0, "tool_calls")
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", None)
    assert (call["type"], call["function"]["name"]) == ("function", ORDER)
    assert json.loads(call["function"]["arguments"]) == {"order_id": "W0000007"}
    metadata = turn.metadata()
    assert (metadata["action"], metadata["injected"]) == ("reuse", [])
    assert metadata["reuse"]["served"] is True
    assert metadata["reuse"]["reason"] == "above_threshold"
    assert 0 < metadata["reuse"]["threshold"] <= metadata["reuse"]["score"] <= 1
    procedures = {m.memory_id: m for m in known.memories(limit=100)}
    assert len(metadata["reuse"]["memory_ids"]) > 5
    assert {procedures[name].kind for name in metadata["reuse"]["memory_ids"]} == {"procedure"}


def test_every_call_has_an_id_of_its_own(known: Memory) -> None:
    """Ids of calls are fresh for each request, and the same where its completion is made again."""
    turns = [first(known, reading()) for _ in range(3)]
    ids = [turn.reused()["choices"][0]["message"]["tool_calls"][0]["id"] for turn in turns]
    assert len(set(ids)) == 3
    assert all(name.startswith("call_") and len(name) <= 40 for name in ids)
    assert turns[0].reused() == turns[0].reused()


def test_a_whole_episode_is_served(tmp_path: Path) -> None:
    """Memory makes both look-ups, the LLM the rest; `why` shows each action with its procedures and how it went."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        done = run(memory)
        assert (done.served, done.llm_calls, done.reasons[-1]) == (BOTH, 1, "reuse_no_action")
        why = memory.why(done.turns[0].trace_id)
        assert why["action"] == "reuse"
        proposal = why["proposal"]
        assert (proposal["served"], proposal["correct"], proposal["reason"]) == (True, True, "above_threshold")
        made = NextAction.of_text(proposal["answer"])
        assert (made.tool, json.loads(made.arguments)) == BOTH[0]
        assert proposal["memory_ids"] == list(done.turns[0].metadata()["reuse"]["memory_ids"])
        trace = memory.trace(done.turns[0].trace_id)
        assert (trace["finish_reason"], trace["prompt_tokens"], trace["completion_tokens"]) == ("tool_calls", 0, 0)


def test_a_similar_goal_gets_its_own_values(known: Memory) -> None:
    """Another order of the same kind is looked up by its own number."""
    turn = first(known, reading(), number=1234567)
    assert turn.action == "reuse"
    assert turn.next_action is not None
    assert json.loads(turn.next_action.arguments) == {"order_id": "W1234567"}


def test_the_setting_declares_tools(tmp_path: Path) -> None:
    """Tools may be declared read-only, or allowed by name, in the settings; `never` wins over both."""
    plain = {"reuse": REUSE}
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        assert reason(first(memory, plain)) == "tool_not_declared"
    for values, wanted in (
        ({"read_only_tools": f"x, {ORDER} ,{PARCEL}"}, "above_threshold"),
        ({"allowed_tools": ORDER}, "above_threshold"),
        ({"read_only_tools": PARCEL}, "tool_not_declared"),
        ({"allowed_tools": ORDER, "never_tools": f"{PARCEL},{ORDER}"}, "tool_forbidden"),
    ):
        with hashing_memory(tmp_path, **values) as memory:
            assert reason(first(woken(memory), plain)) == wanted
            assert reason(first(memory, {**plain, "tools": {"never": [ORDER]}})) == "tool_forbidden"


# -- what keeps it from being served ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        ({}, "tool_not_declared"),
        ({"read_only": [PARCEL]}, "tool_not_declared"),
        ({"allow": [ORDER]}, "above_threshold"),
        ({"allow": [ORDER], "never": [ORDER]}, "tool_forbidden"),
        ({"read_only": [ORDER], "never": [ORDER]}, "tool_forbidden"),
        ({"read_only": [ORDER.upper()]}, "tool_not_declared"),
    ],
)
def test_only_declared_tools_are_served(known: Memory, tools: Mapping[str, Any], why: str) -> None:
    """A tool must be declared read-only or allowed by its exact name; forbidden is stronger than allowed."""
    turn = first(known, {**reading(), "tools": tools})
    assert reason(turn) == why
    assert (turn.action == "reuse") is (why == "above_threshold")


HINT = {"annotations": {"readOnlyHint": True}}


@pytest.mark.parametrize(
    ("offered", "served"),
    [
        (tool(ORDER, **HINT), True),
        ({"type": "function", "function": {"name": ORDER, "parameters": {}, **HINT}}, True),
        ({"type": "function", "name": ORDER, "parameters": {}, **HINT}, True),
        (tool(ORDER, annotations={"readOnlyHint": False}), False),
        (tool(ORDER, annotations={"readOnlyHint": "true"}), False),
        (tool(ORDER, annotations=["readOnlyHint"]), False),
        (tool(ORDER, readOnlyHint=True), False),
    ],
)
def test_the_hint_of_mcp_declares_a_tool(known: Memory, offered: dict[str, Any], *, served: bool) -> None:
    """`readOnlyHint` in a tool's annotations declares it, beside its function or in it; nothing else does."""
    options = {"reuse": REUSE, "mode": "read"}
    turn = first(known, options, tools=[offered, tool(PARCEL, **HINT), tool(NOTE)])
    assert (turn.action == "reuse", reason(turn)) == (served, "above_threshold" if served else "tool_not_declared")
    forbidden = {**options, "tools": {"never": [ORDER]}}
    assert first(known, forbidden, tools=[offered, tool(PARCEL), tool(NOTE)]).action != "reuse"


ONLY = {"type": "function", "function": {"name": ORDER}}
OTHER = {"type": "function", "function": {"name": PARCEL}}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tool_choice": "auto"}, "above_threshold"),
        ({"tool_choice": "required"}, "above_threshold"),
        ({"tool_choice": None, "n": None}, "above_threshold"),
        ({"tool_choice": ONLY}, "above_threshold"),
        ({"tool_choice": OTHER}, "unsupported_option"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [ONLY]}}}, "above_threshold"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [OTHER]}}}, "unsupported_option"),
        ({"tool_choice": {"type": "allowed_tools"}}, "unsupported_option"),
        ({"tool_choice": "none"}, "unsupported_option"),
        ({"n": 1}, "above_threshold"),
        ({"n": 2}, "unsupported_option"),
        ({"logprobs": True}, "unsupported_option"),
        ({"modalities": ["text", "audio"]}, "unsupported_option"),
        ({"functions": [{"name": ORDER}]}, "unsupported_option"),
    ],
)
def test_a_request_may_want_another_answer(known: Memory, fields: dict[str, Any], why: str) -> None:
    """Where a tool call is excluded, or another one is asked for, or more than one answer, the LLM answers."""
    assert reason(first(known, reading(), **fields)) == why


def test_a_tool_must_be_offered(known: Memory) -> None:
    """An agent with other tools is another agent; where nothing but the form differs, the names decide."""
    fewer = first(known, reading(), tools=TOOLS[1:])
    assert (fewer.action, fewer.proposal) == ("plain", None)
    assert {"reason": "reuse_no_action"} in fewer.skipped
    custom = first(known, reading(), tools=[{"type": "custom", "custom": {"name": ORDER}}, *TOOLS[1:]])
    assert custom.action != "reuse"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"order_number": {"type": "string"}}},
        {"properties": {"order_id": {}, "shop": {}}, "required": ["order_id", "shop"]},
        {"properties": {"order_id": {"enum": ["W1"]}}},
    ],
    ids=["renamed", "one more", "other values"],
)
def test_arguments_must_be_declared(known: Memory, schema: dict[str, Any]) -> None:
    """A tool that kept its name and has other arguments now is called by the LLM."""
    changed = {"type": "function", "function": {"name": ORDER, "parameters": schema}}
    assert reason(first(known, reading(), tools=[changed, *TOOLS[1:]])) == "arguments_not_declared"


@pytest.mark.parametrize("approach", ["moa", "re2", "agent_memory-anything"])
def test_wrapped_approaches_act_by_themselves(known: Memory, approach: str) -> None:
    """An approach is given no results of tools, so that what a served action shows would be lost on it."""
    body = {"model": "m", "messages": asking(7), "tools": TOOLS, "agent_memory": reading()}
    assert reason(known.begin(body, approach=approach)) == "unsupported_approach"
    assert known.begin(body, approach="none").action == "reuse"


def test_of_an_auto_approach_the_arm_decides(tmp_path: Path) -> None:
    """Requests with tools go to an arm without an approach, so that actions are served there."""
    with hashing_memory(tmp_path, arms="moa@default, none@default") as memory:
        warm(memory)
        assert reason(first(memory, {**SERVING, "approach": "auto"})) == "above_threshold"


def test_without_leave_nothing_is_served(known: Memory) -> None:
    """Actions are served to those who ask for actions; who asks for answers alone gets none."""
    for options in ({}, {"reuse": {"max_error": 0.5}}, {"reuse": {"max_error": 0.5, "actions": False}}):
        turn = first(known, {"mode": "read", "tools": LOOKS, **options})
        assert turn.action != "reuse"
        assert turn.decision is None


def test_an_equal_goal_does_not_bypass_the_gate(tmp_path: Path) -> None:
    """A goal that comes again word for word is evidence for the score, and no exact repeat."""
    with hashing_memory(tmp_path) as memory:
        reasons = [reason for _ in range(4) for reason in run(memory).reasons]
        assert set(reasons) == {"reuse_no_action", "not_calibrated"}
        turn = first(memory, SERVING)
        assert turn.proposal is not None
        assert turn.proposal.exact is False
        warm(memory, 8)
        assert reason(first(memory, SERVING)) == "above_threshold"
        strict = {**SERVING, "reuse": {"max_error": 0.01, "actions": True}}
        assert reason(first(memory, strict)) == "not_calibrated"


def test_below_the_threshold_the_llm_acts(tmp_path: Path) -> None:
    """What is proven of actions that solved episodes agree on is not served where they do not."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        assert reason(first(memory, SERVING, number=8)) == "above_threshold"
        for tried in (way_of(8)[0], way_of(8)[1], (NOTE, "W0000008"), (ORDER, "the latest one")):
            run(memory, 8, options={"mode": "write"}, way=[tried])
        assert until(lambda: first(memory, SERVING, number=8).action != "reuse")
        turn = first(memory, SERVING, number=8)
        assert (turn.action, reason(turn)) == ("inject", "below_threshold")
        assert turn.metadata()["reuse"]["score"] < turn.metadata()["reuse"]["threshold"]


def test_the_holdout_keeps_out(tmp_path: Path) -> None:
    """A held-out episode is served nothing, and told so; what would have been served is in the log."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
    with hashing_memory(tmp_path, holdout=1.0) as memory:
        done = run(woken(memory))
        assert (done.served, done.reasons) == ([], ["holdout", "holdout", "reuse_no_action"])
        proposal = memory.why(done.turns[0].trace_id)["proposal"]
        assert (proposal["served"], proposal["reason"], proposal["correct"]) == (False, "holdout", True)


def test_audited_actions_are_the_llms(tmp_path: Path) -> None:
    """A share of what could be served is asked of the LLM all the same, and labelled by what it did."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
    with hashing_memory(tmp_path, reuse_audit=1.0) as memory:
        proposal = _audited(woken(memory), way_of(7))
        assert (proposal["served"], proposal["correct"]) == (False, True)
        # What an audit finds wrong counts as a served action that was wrong.
        proposal = _audited(memory, [(NOTE, "W0000007")])
        assert (proposal["served"], proposal["correct"]) == (False, False)
        assert reason(first(memory, SERVING)) == "quarantined"


def _audited(memory: Memory, way: Way) -> Any:
    """Return the first action that is audited: where the gate is far from its limit two of five are."""
    turns = (turn for _ in range(100) for turn in run(memory, way=way).turns if turn.decision is not None)
    return memory.why(next(turn for turn in turns if reason(turn) == "audit").trace_id)["proposal"]


@pytest.mark.parametrize(
    ("given", "options", "fields"),
    [
        ({"tenant": "somebody else"}, {}, {}),
        ({}, {"namespace": "elsewhere"}, {}),
        ({}, {"user_id": "u2"}, {}),
        ({}, {"agent_id": "a2"}, {}),
        ({}, {}, {"tools": [*TOOLS, tool(NOTE) | {"function": {"name": "other_tool"}}]}),
        ({}, {}, {"messages": asking(7, "You are a poet.")}),
    ],
    ids=["tenant", "namespace", "user", "agent", "tools", "instructions"],
)
def test_another_scope_or_agent_gets_nothing(
    known: Memory, given: dict[str, Any], options: dict[str, Any], fields: dict[str, Any]
) -> None:
    """What one scope's agent learned is served to no other scope and to no agent with other tools."""
    body = {"model": "m", "messages": asking(7), "tools": TOOLS, "agent_memory": reading(**options), **fields}
    turn = known.begin(body, **given)
    assert (turn.action, turn.proposal) == ("plain", None)


def test_another_end_user_gets_no_other_users_values(tmp_path: Path) -> None:
    """An equal goal of another user is no equal goal: a value that came from nowhere stays with its user."""
    fixed: Way = [(ORDER, "latest of the desk")]
    plain, serving = parse_options({}, now=0), parse_options(reading(), now=0)
    body = {"model": "m", "messages": asking(7), "tools": TOOLS}
    with hashing_memory(tmp_path) as memory:
        warm(memory, 12, None, way=fixed, keywords={"options": replace(plain, end_user="anna")})
        assert memory.begin(body, options=replace(serving, end_user="anna")).action == "reuse"
        assert memory.begin(body, options=replace(serving, end_user="bert")).proposal is None
        assert memory.begin(body, options=serving).proposal is None


@pytest.mark.parametrize("mode", ["off", "write"])
def test_modes_without_reading_serve_nothing(known: Memory, mode: str) -> None:
    """Where memory is off, or only writes, it does not act."""
    turn = first(known, {**SERVING, "mode": mode})
    assert (turn.action, turn.proposal) == ("plain", None)


def test_reading_alone_serves_and_records_nothing(tmp_path: Path) -> None:
    """In mode `read` actions are served, and neither they nor their outcome are recorded."""
    with hashing_memory(tmp_path) as memory:
        warm(memory)
        before = memory.stats()["traces"]
        assert run(memory, options=reading(), success=None).served == BOTH
        assert memory.stats()["traces"] == before


def test_without_an_encoder_nothing_is_served(tmp_path: Path) -> None:
    """How near goals are is the encoder's to say."""
    with lexical_memory(tmp_path) as memory:
        warm(memory)
        assert run(memory).served == []


def test_nothing_follows_a_mismatch_or_a_failure(known: Memory) -> None:
    """After an observation of another shape, and after a refusal, the rest of the episode is the LLM's."""

    def after(observation: str | dict[str, str] | list[str]) -> Run:
        def world(name: str, arguments: Mapping[str, Any]) -> Any:
            return observation if name == ORDER else {"parcel_id": arguments["parcel_id"], "city": "Rome"}

        return run(known, options=reading(), world=world, success=None)

    assert after({"order_id": "W0000007", "status": "shipped", "parcel_id": "PX-1112223"}).served[1:] == [
        (PARCEL, {"parcel_id": "PX-1112223"})
    ]
    others: list[Any] = [{"id": "W0000007"}, "Error: order not found", {"error": "access denied"}, "", []]
    for observation in others:
        done = after(observation)
        assert (done.served, done.llm_calls) == (BOTH[:1], 2)


# -- what asks to write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "writes"),
    [
        ("run_sql", {"query": "SELECT a FROM t"}, False),
        ("run_sql", {"query": "SELECT a FROM t WHERE b = 'into the wild'"}, False),
        ("run_sql", {"query": "-- all of them\nSELECT a FROM t"}, False),
        ("run_sql", {"query": "PRAGMA table_info(t)"}, False),
        ("run_sql", {"query": "PRAGMA user_version;"}, False),
        ("run_sql", {"query": "DELETE FROM t"}, True),
        ("query_sql", {"query": "-- look\nDELETE FROM t"}, True),
        ("query_db", {"query": "/* look */ UPDATE t SET a = 1"}, True),
        ("query_db", {"q": "DELETE FROM t"}, True),
        ("query_db", {"q": "```sql\nDROP TABLE t\n```"}, True),
        ("query_db", {"statements": ["SELECT 1", "INSERT INTO t VALUES (1)"]}, True),
        ("run_sql", {"query": "SELECT a INTO b FROM t"}, True),
        ("run_sql", {"query": "SELECT 1; DROP TABLE t"}, True),
        ("run_sql", {"query": "PRAGMA user_version(7)"}, True),
        ("run_sql", {"query": "PRAGMA journal_mode = WAL"}, True),
        ("run_sql", {"query": "WITH x AS (DELETE FROM t RETURNING a) SELECT a FROM x"}, True),
        ("bash", {"command": "ls -l | head"}, False),
        ("bash", {"command": "rm -r out"}, True),
        ("bash", {"command": "ls > out.txt"}, True),
        ("run", {"cmd": "git push"}, True),
        ("get_order", {"order_id": "W1"}, False),
        ("cancel_order", {"order_id": "W1"}, True),
        ("search_help", {"topic": "delete my account"}, False),
    ],
)
def test_what_a_call_asks_for(name: str, arguments: dict[str, Any], *, writes: bool) -> None:
    """SQL and shell commands are read, wherever they stand in the arguments; of other calls the name counts."""
    given = json.dumps(arguments)
    assert asks_to_write(name, given) is writes
    if name.endswith("sql") or name == "bash":
        assert effect_of(name, given) == ("writes" if writes else "reads")


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("run_sql", {"query": "SELECT a FROM t"}, ""),
        ("run_sql", {"query": "UPDATE t SET a = 1"}, "changes_state"),
        ("bash", {"command": "cat a.txt"}, ""),
        ("bash", {"command": "rm a.txt"}, "changes_state"),
        ("cancel_order", {"order_id": "W1"}, "changes_state"),
        ("get_order", {"order_id": "W1"}, ""),
        ("other", {}, "tool_not_declared"),
    ],
)
def test_a_tool_that_only_reads_may_be_asked_to_write(
    tmp_path: Path, name: str, arguments: dict[str, Any], why: str
) -> None:
    """A tool of many uses that is declared read-only is refused what writes; one that is allowed by name is not."""
    given, action = settings(tmp_path), NextAction(name, json.dumps(arguments))

    def refusal(**tools: list[str]) -> str:
        with lexical_memory(tmp_path) as memory:
            turn = memory.new_turn({"messages": [], "agent_memory": {"tools": tools}})
        return refusal_of(turn, given, action)

    assert refusal(read_only=["run_sql", "bash", "cancel_order", "get_order"]) == why
    assert refusal(allow=[name]) == ""
    assert refusal(allow=[name], never=[name]) == "tool_forbidden"


# -- arguments as they are declared ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "declared", "wanted"),
    [
        ({"a": "7"}, {"type": "integer"}, {"a": 7}),
        ({"a": "7.5"}, {"type": "number"}, {"a": 7.5}),
        ({"a": "true"}, {"type": "boolean"}, {"a": True}),
        ({"a": 7}, {"type": "string"}, {"a": "7"}),
        ({"a": True}, {"type": "string"}, {"a": "true"}),
        ({"a": "7.5"}, {"type": "integer"}, {"a": "7.5"}),
        ({"a": "true"}, {"type": "integer"}, {"a": "true"}),
        ({"a": "7"}, {"type": ["integer", "null"]}, {"a": "7"}),
        ({"a": "7"}, {}, {"a": "7"}),
        ({"a": "7"}, True, {"a": "7"}),
        ({"a": "7"}, {"type": "integer", "enum": [7, 8]}, {"a": 7}),
        ({"a": "9"}, {"type": "integer", "enum": [7, 8]}, None),
        ({"b": "7"}, {"type": "integer"}, None),
        ({}, {}, {}),
    ],
)
def test_arguments_have_the_declared_types(given: dict[str, Any], declared: Any, wanted: Any) -> None:
    """A value has the type that its argument declares; what the schema does not allow does not fit."""
    found = as_declared(given, {"type": "object", "properties": {"a": declared}})
    assert repr(found) == repr(wanted)


@pytest.mark.parametrize("schema", [None, {}, {"properties": {}}, {"properties": []}, "x", {"required": ["a"]}])
def test_a_schema_that_says_nothing_fits(schema: Any) -> None:
    """Where no arguments are declared every call fits."""
    assert as_declared({"a": 1}, schema) == {"a": 1}


def test_what_is_required_must_be_there() -> None:
    """A call without a required argument does not fit."""
    schema = {"properties": {"a": {}, "b": {}}, "required": ["b"]}
    assert as_declared({"a": 1}, schema) is None
    assert as_declared({"b": 1}, schema) == {"b": 1}


def test_a_number_is_served_as_a_number(tmp_path: Path) -> None:
    """A number that the user wrote is served as one, where the tool declares it so."""
    numbers = {"properties": {"order_id": {"type": "integer"}}}
    offered = [{"type": "function", "function": {"name": ORDER, "parameters": numbers}}, *TOOLS[1:]]

    def one(memory: Memory, number: int, options: Mapping[str, Any]) -> Turn:
        task = f"Please find out for me where my order {number} is at the moment"
        messages = [{"role": "user", "content": task}]
        turn = memory.begin({"model": "m", "messages": messages, "tools": offered, "agent_memory": options})
        function = {"name": ORDER, "arguments": json.dumps({"order_id": number})}
        call = {"id": f"call_{new_trace_id()}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        memory.finish(turn, {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
        memory.settle()
        memory.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"})
        return turn

    with hashing_memory(tmp_path) as memory:
        for number in range(1234501, 1234520):
            one(memory, number, {"mode": "readwrite"})
        turn = one(memory, 7654321, SERVING)
        assert turn.next_action is not None
        assert json.loads(turn.next_action.arguments) == {"order_id": 7654321}
        assert memory.why(turn.trace_id)["proposal"]["correct"] is True


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param", "told"),
    [
        ({"reuse": {}}, "agent_memory.reuse", "max_error"),
        ({"reuse": {"actions": True}}, "agent_memory.reuse", "max_error"),
        ({"reuse": True}, "agent_memory.reuse", "max_error"),
        ({"reuse": {"max_error": 0.0, "actions": True}}, "agent_memory.reuse", "between 0 and 1"),
        ({"reuse": {"max_error": float("nan")}}, "agent_memory.reuse", "between 0 and 1"),
        ({"reuse": {"max_error": True}}, "agent_memory.reuse", "between 0 and 1"),
        ({"reuse": {"max_error": 0.1, "actions": "yes"}}, "agent_memory.reuse.actions", "true or false"),
        ({"reuse": {"max_error": 0.1, "actions": 1}}, "agent_memory.reuse.actions", "true or false"),
        ({"reuse": {"max_error": 0.1, "action": True}}, "agent_memory.reuse.action", "unknown key"),
        ({"tools": {"readonly": ["a"]}}, "agent_memory.tools.readonly", "read_only"),
        ({"tools": ["a"]}, "agent_memory.tools", "read_only"),
        ({"tools": {"allow": "a"}}, "agent_memory.tools.allow", "list"),
        ({"tools": {"never": [""]}}, "agent_memory.tools.never", "text"),
        ({"tools": {"never": [7]}}, "agent_memory.tools.never", "text"),
    ],
)
def test_errors_of_options_name_the_field(options: dict[str, Any], param: str, told: str) -> None:
    """What is wrong with an option is said with the name of the very field."""
    with pytest.raises(InvalidField, match=told) as caught:
        parse_options(options, now=0)
    assert caught.value.param == param


def test_options_may_come_as_headers() -> None:
    """Both fields are taken as JSON from headers; the body has precedence."""
    headers = {"X-Agent-Memory-Reuse": json.dumps(REUSE), "x-agent-memory-tools": json.dumps(LOOKS)}
    options = parse_options(None, headers, now=0)
    assert options.reuse == REUSE
    assert options.tools == {"read_only": (ORDER, PARCEL)}
    assert parse_options({"tools": {"never": ["a"]}}, headers, now=0).tools == {"never": ("a",)}
    with pytest.raises(InvalidField, match="JSON"):
        parse_options(None, {"X-Agent-Memory-Tools": "get_order"}, now=0)
    assert parse_options({"reuse": {"max_error": 0.1}}, now=0).reuse == {"max_error": 0.1, "actions": False}


# -- what is stored --------------------------------------------------------------------------------


def test_secrets_of_a_request_are_not_stored_with_its_proposal(tmp_path: Path) -> None:
    """An action holds values of the request, which are stored as everything else is: without secrets."""
    secret = "sk-" + "a1B2c3D4e5F6g7H8i9J0"

    def world(name: str, arguments: Mapping[str, Any]) -> Any:
        value = next(iter(arguments.values()))
        key = secret if value == "W0000099" else f"PX-{value[1:]}"
        return {"order_id": value, "parcel_id": key} if name == ORDER else {"city": "Rome"}

    def episode(memory: Memory, number: int, key: Callable[[int], str]) -> Run:
        way: Way = [way_of(number)[0], (PARCEL, key(number))]
        return run(memory, number, world=world, way=way)

    with hashing_memory(tmp_path) as memory:
        for number in range(1, 13):
            episode(memory, number, lambda n: f"PX-{n:07d}")
        done = episode(memory, 99, lambda _: secret)
        assert done.turns[1].next_action is not None
        assert secret in done.turns[1].next_action.arguments
        proposal = memory.why(done.turns[1].trace_id)["proposal"]
        assert secret not in json.dumps(proposal)
        assert proposal["correct"] is True
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert secret.encode() not in data
