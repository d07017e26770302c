"""Steps: what an agent did and saw, read off the conversation that it repeats, shortens, edits and goes back in."""

from __future__ import annotations

import itertools
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from agents import DONE, ERROR, JSON, RIGHT, TOOLS, WRONG, Agent, call, calling, fixes, judge, result, results
from builders import NOW, assistant, body, lexical_memory
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlite_utils import Database

from optillm_memory.conversation.parse import Conversation, parse
from optillm_memory.conversation.steps import command_in
from optillm_memory.inject.advice import Advice, as_advice
from optillm_memory.records import Step
from optillm_memory.store.sqlite.migrations import migrations

SYSTEM = {"role": "system", "content": "You act."}
FENCED = "I look first.\n```bash\nls src\n```"


def steps(*messages: Any) -> tuple[Step, ...]:
    """Return the steps of a conversation."""
    return parse(body(*messages)).steps


def seen(*messages: Any) -> list[tuple[str, str, str | None]]:
    """Return (tool, arguments, observation) of the steps of a conversation."""
    return [(s.tool, s.arguments, s.observation) for s in steps(*messages)]


def ids(*messages: Any) -> list[tuple[str, str]]:
    """Return (id, parent) of the steps of a conversation."""
    return [(s.step_id, s.parent_id) for s in steps(*messages)]


def named(command: str, call_id: str) -> JSON:
    """Return an answer with one call under this id."""
    return calling(call(command, call_id))


# -- where steps are -------------------------------------------------------------------------------


def test_tool_calls_are_steps_on_one_branch() -> None:
    """Each call is a step with its result, its parent is the step before it, and the last one waits."""
    one, two, three = calling("make"), calling("ls"), calling("pwd")
    found = steps("go", one, *results(one, "built"), two, *results(two, "a.py"), three)
    assert [(s.ordinal, s.tool, s.arguments, s.observation) for s in found] == [
        (0, "bash", '{"command": "make"}', "built"), (1, "bash", '{"command": "ls"}', "a.py"),
        (2, "bash", '{"command": "pwd"}', None),
    ]  # fmt: skip
    assert [s.parent_id for s in found] == ["", found[0].step_id, found[1].step_id]
    assert len({s.step_id for s in found}) == 3


def test_legacy_function_calls_are_steps() -> None:
    """A `function_call` has the next function message as its result, up to the next answer."""
    made = {"role": "assistant", "content": None, "function_call": {"name": "run", "arguments": "{}"}}
    shown = {"role": "function", "name": "run", "content": "3 lines"}
    assert seen("go", made, shown, made, assistant("hm"), shown) == [("run", "{}", "3 lines"), ("run", "{}", None)]
    assert len({s.step_id for s in steps("go", made, shown, made, shown)}) == 2


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        (FENCED, "ls src"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("<execute>ls src</execute>", "ls src"),
        ("First <bash>\nls src\n</bash> then I see.", "ls src"),
    ],
)
@pytest.mark.parametrize(
    "shown",
    ["Observation: a.py", "Observation 3:\na.py", "Output (exit code 1):\na.py", "Output of the command:\na.py",
     "<output>a.py</output>", "<returncode>0</returncode>", "[output]\na.py", '{"exit_code": 0, "stdout": "a.py"}',
     "a.py\nExit code: 1"],
)  # fmt: skip
def test_a_command_in_the_text_and_its_observation_are_a_step(answer: str, command: str, shown: str) -> None:
    """Where an agent has no tools its fenced or tagged command and the user turn after it are a step."""
    assert seen("go", assistant(answer), shown) == [("shell", command, shown)]
    conversation = parse(body("list the sources", assistant(answer), shown))
    assert conversation.task == "list the sources"
    assert conversation.ends_with_observation
    assert not conversation.ends_with_user
    assert [s.observation for s in conversation.observed] == [shown]


@pytest.mark.parametrize(
    "said",
    ["And what does -l do?", "Thanks!", "Output is too long: show me less", "Results matter: explain them",
     "Observation is the key here, right?", "result of that would be bad: why do you say so?",
     "The command exited with code 2. What does that mean?", "I got an error: no such file", ""],
)  # fmt: skip
def test_talk_about_code_is_no_observation(said: str) -> None:
    """Where an assistant only shows code, what the user says next is the user's, and nothing was done."""
    conversation = parse(body("how do I list files?", assistant(FENCED), said))
    assert conversation.steps == ()
    assert conversation.task == said
    assert conversation.ends_with_user
    assert conversation.observed == ()


@pytest.mark.parametrize(
    "answer",
    ["No command.", "```bash\nls\n```\nor\n```bash\nls -l\n```", "```json\n{}\n```", "```bash\n\n```",
     "<execute>ls</execute> <execute>pwd</execute>", "<run>never closed", "Use `ls`."],
)  # fmt: skip
def test_an_answer_with_no_or_several_commands_is_no_action(answer: str) -> None:
    """One command is an action; none, two, or a block that is no command are not, whatever comes after."""
    assert command_in(answer) is None
    assert seen("go", assistant(answer), "Observation: x") == []
    assert seen(assistant(FENCED)) == seen("go", "Observation: x", assistant(FENCED)) == []


# -- which result belongs to which call ------------------------------------------------------------


def test_parallel_calls_have_their_own_results() -> None:
    """Results come in any order; calls of one answer are new together, and one without a result waits."""
    answer = calling(call("ls", "a"), call("pwd", "b"), call("id", "c"))
    messages: list[Any] = ["go", answer, result("c", "root"), result("a", "x.py")]
    assert [s.observation for s in steps(*messages)] == ["x.py", None, "root"]
    assert [s.call_id for s in parse(body(*messages)).observed] == ["a", "c"]
    assert parse(body(*messages, assistant("ok"))).observed == ()
    assert parse(body("go")).observed == ()


def test_an_id_that_is_used_again_names_another_step() -> None:
    """Equal ids in later answers, in one answer, and missing ids each keep their own result."""
    one, two = named("ls", "call_0"), named("ls", "call_0")
    found = steps("go", one, result("call_0", "a"), two, result("call_0", "b"), result("call_0", "late"))
    assert [s.observation for s in found] == ["a", "b"]
    assert found[0].step_id != found[1].step_id
    unanswered = steps("go", one, two, result("call_0", "b"))
    assert [s.observation for s in unanswered] == [None, "b"]
    both = calling(call("ls", "x"), call("pwd", "x"))
    assert [s.observation for s in steps("go", both, result("x", "1"), result("x", "2"))] == ["1", "2"]
    for call_id in ("", "call-1-0"):
        bare = calling({**call("ls"), "id": call_id}, {**call("pwd"), "id": call_id and "call-1-1"})
        shown = [result(call_id, "1"), result(call_id and "call-1-1", "2")]
        assert [s.observation for s in steps("go", bare, *shown)] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], ""),
        ([], ""),
        (None, ""),
        (7, ""),
        ("plain", "plain"),
    ],
)
def test_results_of_every_shape_are_read_and_marked(tmp_path: Path, content: Any, text: str) -> None:
    """Text parts, images, null and nonsense are results; an insertion goes to the end of what was there."""
    answer = named("ls", "c")
    assert [s.observation for s in steps("go", answer, result("c", content))] == [text]
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory)
        agent.act("ls", content)
        assert agent.begin().messages == agent.messages


def test_what_memory_said_is_no_observation() -> None:
    """A client that sends back what the ledger knows is not taken to have seen it; what only looks like it stays."""
    item = Advice("fix-1", "bash", "command", WRONG, 1, "the error", RIGHT)
    block = str(as_advice([item], max_items=1, token_budget=800).payload)
    sent = {"messages": [{"role": "user", "content": "go"}, named("ls", "c"), result("c", f"x.py\n\n{block}")]}
    assert [s.observation for s in parse(sent, [block]).steps] == ["x.py"]
    assert [s.observation for s in parse(sent).steps] == [f"x.py\n\n{block}"]


# -- the same step in every request ----------------------------------------------------------------


def loop(count: int) -> list[JSON]:
    """Return an agent's conversation of so many steps."""
    said: list[JSON] = [SYSTEM, {"role": "user", "content": "go"}]
    for number in range(count):
        said += [named(f"step {number}", f"call_{number:032x}"), result(f"call_{number:032x}", f"saw {number} " * 50)]
    return said


def test_a_step_keeps_its_id_whatever_else_is_changed() -> None:
    """Dropped and shortened messages, another system prompt and truncated observations leave ids as they were."""
    said = loop(6)
    before = dict(ids(*said))
    summary = {"role": "user", "content": "Summary: three steps were done."}
    edited = [{**SYSTEM, "content": "It is Tuesday."}, *said[1:]]
    short = [{**m, "content": "saw…"} if m["role"] == "tool" else m for m in said]
    for changed in (edited, short, said[2:], [SYSTEM, summary, *said[8:]], said[:-1]):
        found = ids(*changed)
        assert found
        assert {i for i, _ in found} <= set(before)
    assert ids(*edited) == ids(*short) == list(before.items())
    assert [i for i, _ in ids(SYSTEM, summary, *said[8:])] == list(before)[3:]


def test_a_branch_has_another_parent_and_no_mixture() -> None:
    """After an edited message or another answer the steps are new, and hang on the last one that both have."""
    said = loop(4)
    trunk = ids(*said)
    again = [*said[:6], named("other", "call_x"), result("call_x", "z")]
    assert ids(*again)[:2] == trunk[:2]
    (new, parent) = ids(*again)[2]
    assert new not in dict(trunk)
    assert parent == trunk[1][0]
    shown = ["go", assistant(FENCED), "Output:\na.py"]
    one, other = steps(*shown), steps("go on", *shown[1:])
    assert one[0].step_id != other[0].step_id
    assert one[0].made != other[0].made


def test_a_loop_of_twelve_requests_stores_each_step_once(tmp_path: Path) -> None:
    """Every step is there once with its first observation and its maker, and memory finds the episode by its calls."""
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory)
        for number in range(11):
            agent.act(f"step {number}", f"saw {number}\nExit code: 0")
            if number == 5:  # the agent shortens what it saw, and drops what it did first
                for message in agent.messages[:-1]:
                    if message["role"] == "tool":
                        message["content"] = "…"
                del agent.messages[2:6]
        last = agent.close()
        assert {t.episode_id for t in agent.turns} == {last.episode_id}
        kept = memory.trace(last.trace_id)["steps"]
        assert sorted(s["observation"] for s in kept) == sorted(f"saw {n}\nExit code: 0" for n in range(11))
        assert sorted(s["made_by"] for s in kept) == sorted(t.trace_id for t in agent.turns[:-1])
        assert [s["parent_id"] for s in kept].count("") == 1
        assert memory.store.stats()["steps"] == 11
        assert memory.store.lost == 0


def test_numbered_calls_of_two_episodes_do_not_collide(tmp_path: Path) -> None:
    """Clients that count their calls give two episodes the same ids: both are recorded, and judged apart."""
    with lexical_memory(tmp_path) as memory:
        for scope in ({"episode_id": "e1"}, {"episode_id": "e2"}, {"episode_id": "e1", "namespace": "n"}):
            agent = Agent(memory, options=scope)
            agent.act(WRONG, ERROR, call_id="call_0")
            agent.act(RIGHT, DONE, call_id="call_1")
            agent.close()
            outcomes = [memory.trace(t.trace_id)["outcome"]["verdict"] for t in agent.turns]
            assert outcomes == ["failure", "success", "unknown"]
        assert memory.store.lost == 0
        assert memory.store.stats()["traces"] == 9
        last = memory.trace(agent.turns[0].trace_id)
        (said,) = last["feedback"]
        judge(memory, agent.turns[0], success=None, feedback_id=said["feedback_id"])
        assert memory.trace(agent.turns[0].trace_id)["outcome"]["verdict"] == "unknown"
        first = [t["outcome"]["verdict"] for t in memory.store.traces(None)]
        assert sorted(first) == ["failure"] * 2 + ["success"] * 3 + ["unknown"] * 4


def test_a_conversation_from_elsewhere_is_recorded_and_teaches_nothing(tmp_path: Path) -> None:
    """The first request of an episode may hold a history whose answers nobody here gave: it is a client's word."""
    with lexical_memory(tmp_path) as memory:
        one, two = calling(WRONG), calling(RIGHT)
        said = [SYSTEM, {"role": "user", "content": "go"}, one, *results(one, ERROR), two, *results(two, DONE)]
        agent = Agent(memory, messages=said)
        turn = agent.close()
        assert memory.trace(turn.trace_id)["outcome"]["verdict"] == "unknown"
        assert [s["made_by"] for s in memory.trace(turn.trace_id)["steps"]] == [None, None]
        judge(memory, turn)
        assert fixes(memory) == []


# -- properties ------------------------------------------------------------------------------------

KEYS = ["role", "content", "tool_calls", "function_call", "function", "name", "arguments", "id", "tool_call_id", "text"]
JUNK = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[JSON]:
    """Draw a well-formed agent's conversation: answers with calls or a command, and results for most of them."""
    said: list[JSON] = [{"role": "user", "content": "go"}]
    for number in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["calls", "text", "words"]))
        if kind == "calls":
            made = [
                call(draw(st.sampled_from(["ls", "pwd"])), f"c{number}-{i}") for i in range(draw(st.integers(1, 3)))
            ]
            said.append(calling(*made))
            said += [result(c["id"], f"r{c['id']}") for c in draw(st.permutations(made)) if draw(st.integers(0, 4))]
        else:
            said.append(assistant(FENCED if kind == "text" else "hm"))
            said.append({"role": "user", "content": f"Output:\n{number}" if kind == "text" else "go on"})
    return said


@hypothesis_settings(max_examples=150, deadline=None)
@given(conversations(), st.data())
def test_what_was_a_step_stays_that_step(said: list[JSON], data: st.DataObject) -> None:
    """A conversation cut short has the first of its steps; one without its beginning the last of its calls."""
    whole = steps(*said)
    assert len({s.step_id for s in whole}) == len(whole)
    assert [s.parent_id for s in whole] == ["", *(s.step_id for s in whole)][: len(whole)]
    cut = data.draw(st.integers(0, len(said)))
    head = steps(*said[:cut])
    assert [(s.step_id, s.parent_id) for s in head] == [(s.step_id, s.parent_id) for s in whole][: len(head)]
    for short, full in zip(head, whole, strict=False):
        assert short.observation in (None, full.observation)
    tail = [s.step_id for s in steps(*said[cut:]) if s.call_id.startswith("c")]
    named_ones = [s.step_id for s in whole if s.call_id.startswith("c")]
    assert tail == named_ones[len(named_ones) - len(tail) :]


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.lists(JUNK, max_size=5), st.dictionaries(st.sampled_from(KEYS), JUNK))
def test_nonsense_is_no_reason_to_fail(junk: list[Any], message: JSON) -> None:
    """Whatever a client sends is read without an error, and every step has a name."""
    conversation: Conversation = parse({"messages": [*junk, {"role": "assistant", **message}, *junk]})
    assert all(s.step_id for s in conversation.steps)


# -- hostile sizes ---------------------------------------------------------------------------------


def unanswered(count: int) -> list[JSON]:
    """Return calls that are never answered."""
    return [calling(call("ls", f"c{n}")) for n in range(count)]


def work_of(body: JSON) -> int:
    """Return how many lines of Python are run to read a request."""
    count = 0

    def traced(*_: Any) -> Any:
        nonlocal count
        count += 1
        return traced

    before = sys.gettrace()
    sys.settrace(traced)
    try:
        parse(body)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "make",
    [
        lambda n: [SYSTEM, *itertools.chain(*((named(f"echo {i}", f"c{i}"), result(f"c{i}", "x" * 20_000))
                                              for i in range(n)))],
        unanswered,
        lambda n: list(itertools.chain(*((assistant(FENCED), {"role": "user", "content": f"Output:\n{i}"})
                                         for i in range(n)))),
    ],
    ids=["steps", "unanswered", "text"],
)  # fmt: skip
def test_twice_the_steps_are_twice_the_work(make: Callable[[int], Sequence[JSON]]) -> None:
    """Each further step costs as much as the one before: nothing is looked at over again."""
    small, large = (work_of({"messages": list(make(count)), "tools": TOOLS}) for count in (150, 300))
    assert small > 1_000
    assert large < 2.1 * small


@pytest.mark.parametrize(
    "messages",
    [
        [assistant("<run>" * 200_000), {"role": "user", "content": "</run>"}],
        [assistant("```bash\nls\n" * 100_000), {"role": "user", "content": "x"}],
        [assistant("```bash\nls\n```"), {"role": "user", "content": "output " * 200_000}],
    ],
    ids=["tags", "fences", "words"],
)
def test_a_text_made_to_hold_us_up_does_not(messages: Sequence[JSON]) -> None:
    """A pattern that looked at the rest of a text from each of its places would take hours for these."""
    started = time.process_time()
    parse({"messages": list(messages), "tools": TOOLS})
    assert time.process_time() - started < 30


# -- a database from before ------------------------------------------------------------------------


def test_a_database_from_before_steps_had_ids_keeps_them(tmp_path: Path) -> None:
    """A file of the first schema is brought up: its steps stay in order on one branch.

    Which answer asked for them is not known, so they teach nothing.
    """
    path = tmp_path / "memory.db"
    db = Database(sqlite3.connect(path))
    migrations.apply(db, stop_before="m002_steps_attempts_and_fixes")
    db.execute("INSERT INTO scopes VALUES (1, 'local', 'default', '', '')")
    db.execute(
        "INSERT INTO traces VALUES (1, 't1', 1, 'e1', ?, 'm', 'none', 'plain', 0, 1.0, 'publish', 'k', 'f', '[]', "
        "'done', 'stop', NULL, '[]', 1, 1, 1.0, 1.0, '{}')",
        [NOW],
    )
    for ordinal, (command, shown) in enumerate([(WRONG, ERROR), (RIGHT, DONE)]):
        db.execute(
            "INSERT INTO steps VALUES (1, 'e1', ?, ?, 'bash', ?, ?, 't1')",
            [f"z{9 - ordinal}", ordinal, json.dumps({"command": command}), shown],
        )
    db.conn.commit()
    db.close()
    with lexical_memory(tmp_path) as memory:
        kept = memory.trace("t1")["steps"]
        assert [(s["call_id"], s["parent_id"], s["observation"]) for s in kept] == [
            ("z9", "", ERROR),
            ("z8", "z9", DONE),
        ]
        assert memory.rebuild()["traces"] == 1
        assert fixes(memory) == []
        Agent(memory).act("ls", "x")
        assert memory.store.lost == 0
