"""`bench trajectories`: every figure on small runs worked out by hand, and the replay that they come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from optillm_memory.bench.in_process import bench_encoder
from optillm_memory.bench.shares import lines, mean, ratio, share
from optillm_memory.bench.trajectories import figures as all_figures
from optillm_memory.bench.trajectories import replay as replaying
from optillm_memory.bench.trajectories.actions import canonical_action, changes_state, failed
from optillm_memory.bench.trajectories.baseline import Frequent
from optillm_memory.bench.trajectories.figures import actions, figures
from optillm_memory.bench.trajectories.following import by_arguments, by_tool, common
from optillm_memory.bench.trajectories.injections import fixes, foreign, injected, item_lengths
from optillm_memory.bench.trajectories.procedures import eligible, procedures
from optillm_memory.bench.trajectories.replay import Asking, Episode, Insertion, Replayed, replay
from optillm_memory.bench.trajectories.runs import SAY, Run, acts_of, load_runs
from optillm_memory.bench.trajectories.served import Served, is_right
from optillm_memory.bench.trajectories.show import as_text, sample
from optillm_memory.bench.trajectories.values import Values, request_text, values_in
from optillm_memory.cli import main
from optillm_memory.errors import InvalidField
from optillm_memory.learn.procedures.mine import ProcedureStep
from optillm_memory.learn.procedures.offer import Offer
from optillm_memory.learn.procedures.values import Slot
from optillm_memory.records import Injected, Placement

Messages = list[dict[str, Any]]
CONFIRM = ProcedureStep(SAY)


@pytest.fixture(autouse=True)
def spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the encoder that needs no weights."""
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "hashing")


def user(text: str) -> dict[str, Any]:
    """Return what a user says."""
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    """Return a text turn of the agent."""
    return {"role": "assistant", "content": text}


def call(tool: str, observation: Any = "ok", **arguments: Any) -> Messages:
    """Return a tool call with its result."""
    function = {"name": tool, "arguments": json.dumps(arguments)}
    result = observation if isinstance(observation, str) else json.dumps(observation)
    return [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]


def run(number: int, messages: Sequence[Any], *, family: str = "f", resolved: bool = True, tools: Any = ()) -> Run:
    """Return a recorded run; lists among the messages are calls with their results."""
    flat: Messages = []
    for message in messages:
        flat += message if isinstance(message, list) else [message]
    return Run(number, f"task-{number}", family, resolved, "m", tools, flat, acts_of(flat))


def rows(file: Path, *runs: Mapping[str, Any]) -> Path:
    """Write rows to a file."""
    file.write_text("\n".join(json.dumps(row) for row in runs))
    return file


def insertion(made_for: Run, index: int, payload: Any, *items: Injected, tasks: tuple[str, ...] = ()) -> Insertion:
    """Return an insertion at a message."""
    form: Any = "block" if isinstance(payload, str) else "turns"
    return Insertion(made_for, index, Placement("anchor", index - 1, form, payload, items), tasks)


def fix(suggestion: str | None) -> Injected:
    """Return a fix in a prompt."""
    return Injected("mem-1", "fix", 0.9, 10, suggestion)


def offer(*steps: ProcedureStep, done: int = 0, support: tuple[str, ...] = ("0",)) -> Offer:
    """Return a procedure as it is offered."""
    return Offer(steps, done, support, 0.9)


def slot(name: str, kind: Any, origin: str = "") -> Slot:
    """Return a slot."""
    return Slot(name, kind, origin)


# -- actions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "one", "other"),
    [
        ("sql", {"query": "SELECT  a\n FROM t ;"}, {"query": "SELECT a FROM t"}),
        ("book", {"to": "Rome", "from": "Bern"}, {"from": "Bern", "to": "Rome"}),
        ("book", {"who": {"b": "x  y", "a": 1}}, {"who": {"a": 1, "b": "x y"}}),
        ("bash", {"command": "cd /testbed && ./bin/test a.py | head -20"}, {"command": "bin/test a.py"}),
        ("bash", {"command": "cd '/a b'; cd c && ls"}, {"command": "ls"}),
        ("bash", {"command": "/usr/bin/python3 ./x.py | cat | tail -n 5;"}, {"command": "python3 x.py"}),
        ("run", {"cmd": ".venv/bin/python -m pytest"}, {"cmd": "python -m pytest"}),
    ],
)
def test_equal_actions_have_one_canonical_form(tool: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    """White space, the order of arguments, a final `;` and what wraps a command make no other action."""
    assert canonical_action(tool, json.dumps(one)) == canonical_action(tool, json.dumps(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("bash", '{"command": "grep a f | wc -l"}'), ("bash", '{"command": "grep a f"}')),
        (("bash", '{"command": "head -20 f"}'), ("bash", '{"command": "head f"}')),
        (("bash", '{"command": "find . -name x"}'), ("bash", '{"command": "find / -name x"}')),
        (("read", '{"path": "./x"}'), ("read", '{"path": "x"}')),
        (("sql", '{"query": "a"}'), ("bash", '{"query": "a"}')),
        (("t", '{"a": 1}'), ("t", '{"a": "1"}')),
        (("t", "not json"), ("t", "no json")),
    ],
)
def test_different_actions_stay_different(one: tuple[str, str], other: tuple[str, str]) -> None:
    """What does other work, of another tool or with other values, is another action; only shells have `./`."""
    assert canonical_action(*one) != canonical_action(*other)


@pytest.mark.parametrize(
    ("tool", "arguments", "changes"),
    [
        ("cancel_reservation", {"id": "A"}, True),
        ("bookFlight", {}, True),
        ("transfer_to_human_agents", {}, True),
        ("get_update_history", {}, False),
        ("order_status", {}, False),
        ("calculate", {"expression": "1"}, False),
        ("submit", {}, False),
        ("editor", {"command": "view", "path": "x"}, False),
        ("str_replace_editor", {"command": "view", "path": "x"}, False),
        ("str_replace_editor", {"command": "create", "path": "x"}, True),
        ("sql", {"query": "select * from t"}, False),
        ("sql", {"query": "SHOW TABLES"}, False),
        ("sql", {"query": "UPDATE t SET a = 1"}, True),
        ("query", {"q": "DROP TABLE t"}, True),
        ("bash", {"command": "grep -n 'a > b' f 2>/dev/null 2>&1"}, False),
        ("bash", {"command": "sed -n '1,5p' f | head"}, False),
        ("bash", {"command": "sed -i s/a/b/ f"}, True),
        ("bash", {"command": "cat <<'EOF' > x.py\nprint(1)\nEOF"}, True),
        ("bash", {"command": "cd x && rm -r y"}, True),
        ("bash", {"command": "git status"}, False),
        ("bash", {"command": "git checkout x"}, True),
    ],
)
def test_changes_of_state_are_told_by_name_and_text(tool: str, arguments: dict[str, Any], *, changes: bool) -> None:
    """Verbs in tools' names, SQL and shell commands tell what changes state."""
    assert changes_state(tool, json.dumps(arguments)) is changes


@pytest.mark.parametrize(
    ("observation", "wrong"),
    [
        ("<returncode>1</returncode>\n<output>\n</output>", True),
        ("<returncode>0</returncode>\n<output>\nError: none\n</output>", False),
        ('{"error": "no such user"}', True),
        ('{"error": null, "rows": []}', False),
        ("Error: user not found", True),
        ("Error executing query: Table 'x' doesn't exist", True),
        ("/bin/bash: line 3: foo: command not found\n", True),
        ("Observation:\n---\nNameError Traceback (most recent call last)", True),
        ("ValueError: bad", True),
        ("[('errors', 3)]", False),
        ("", False),
    ],
)
def test_failures_are_told_by_their_observation(observation: str, *, wrong: bool) -> None:
    """An exit code, an error field or an error at the beginning is a failure; the word elsewhere is none."""
    assert failed(observation) is wrong


# -- runs ----------------------------------------------------------------------------------------------


def test_rows_are_runs_of_a_family(tmp_path: Path) -> None:
    """The family is the expression's group in the id, or the first user message; empty lines are left out."""
    row = {"id": "7-1", "resolved": True, "messages": [user("Hi"), says("Hello")]}
    file = rows(tmp_path / "runs.jsonl", row, {**row, "id": "8-1", "resolved": False, "messages": [user("Bye")]})
    file.write_text(file.read_text().replace("\n", "\n\n"))
    found = load_runs(file, r"(\d+)-")
    assert [(r.number, r.name, r.family, r.resolved, r.model) for r in found] == [
        (0, "7-1", "7", True, "agent"), (1, "8-1", "8", False, "agent"),
    ]  # fmt: skip
    assert [r.family for r in load_runs(file)] == ["Hi", "Bye"]
    assert [r.family for r in load_runs(file, "nothing")] == ["7-1", "8-1"]
    assert [r.answered for r in found] == [[1], []]
    assert len(load_runs(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"resolved": True}, "messages"),
        ({"resolved": True, "messages": ["x"]}, "messages"),
        ({"resolved": "yes", "messages": [user("x")]}, "resolved"),
        ({"resolved": True, "messages": [user("x")], "tools": {"a": 1}}, "tools"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    """What is wrong in a row is said with its field and line."""
    good = {"resolved": True, "messages": [user("x")]}
    with pytest.raises(InvalidField, match="line 2") as raised:
        load_runs(rows(tmp_path / "runs.jsonl", good, row))
    assert field in str(raised.value)
    with pytest.raises(InvalidField, match="no regular expression"):
        load_runs(rows(tmp_path / "runs.jsonl", good), "(")


def test_actions_are_calls_with_their_results_and_text_turns_with_a_reply() -> None:
    """Results go to calls by id, else by place; a closing message is no action."""
    calls = [
        {"id": "b", "function": {"name": "two", "arguments": "{}"}},
        {"id": "a", "function": {"name": "one", "arguments": {"x": 1}}},
        {"id": "", "function": {"name": "three", "arguments": ""}},
    ]
    messages: Messages = [
        user("go"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "of one"},
        {"role": "tool", "tool_call_id": "b", "content": "of two"},
        {"role": "tool", "content": "of three"},
        says("Shall I?"),
        user("yes"),
        says("Done."),
    ]
    found = acts_of(messages)
    assert [(a.index, a.tool, a.observation) for a in found] == [
        (1, "two", "of two"), (1, "one", "of one"), (1, "three", "of three"), (5, SAY, "yes"),
    ]  # fmt: skip
    assert found[1].key == 'one {"x": 1}'
    assert run(0, messages).last_call == 1
    assert run(0, [user("a"), says("b"), user("c")]).last_call == 1
    assert run(0, [user("a"), says("b")]).last_call == -1


# -- shares --------------------------------------------------------------------------------------------


def test_shares_have_counts_and_intervals() -> None:
    """The interval of a share is Wilson's, that of a mean the normal one; nothing to count is no share."""
    assert share("s", 8, 10) == {"s": 0.8, "s_count": "8/10", "s_interval": [0.4902, 0.9433]}
    assert share("s", 0, 10)["s_interval"] == [0.0, 0.2775]
    assert share("s", 0, 0) == {"s": None, "s_count": "0/0", "s_interval": None}
    assert mean("m", [0.5, 1.0, 0.0, 0.5]) == {"m": 0.5, "m_count": 4, "m_interval": [0.0999, 0.9001]}
    assert mean("m", [1.0]) == {"m": 1.0, "m_count": 1, "m_interval": None}
    assert mean("m", []) == {"m": None, "m_count": 0, "m_interval": None}
    assert ratio("r", [(1, 10), (1, 10)]) == {"r": 0.1, "r_count": "2/20", "r_interval": [0.1, 0.1]}
    assert ratio("r", [(0, 10), (2, 10)])["r_interval"] == [0.0, 0.296]
    assert lines({**share("s", 8, 10), **mean("m", []), "n": 3, "s_count_of": 1}) == {
        "s": "0.8000 (8/10, 0.4902 to 0.9433)", "m": "none (0)", "n": 3, "s_count_of": 1,
    }  # fmt: skip


# -- following -----------------------------------------------------------------------------------------

BOOKING = run(
    0,
    [
        user("I am mia_li_3668, cancel ABC123 please"),
        call(
            "get_user",
            {"id": "mia_li_3668", "reservations": ["ABC123", "XYZ789"], "tier": "gold"},
            user_id="mia_li_3668",
        ),
        call("get_reservation", {"flights": [{"no": "HAT001"}]}, reservation_id="XYZ789"),
        says("Shall I cancel XYZ789?"),
        user("Yes"),
        call("cancel", reservation_id="XYZ789", reason="other", note="as asked"),
        says("Done."),
    ],
)


@pytest.mark.parametrize(
    ("name", "found", "right"),
    [
        ("user_id", slot("user_id", "user", r"[a-z]+_[a-z]+_\d{4}"), True),
        ("user_id", slot("user_id", "user", r"\d{4}"), False),  # of another shape
        ("user_id", slot("user_id", "constant", "mia_li_3668"), True),
        ("user_id", slot("user_id", "constant", '"mia_li_3668"'), True),
        ("user_id", slot("user_id", "constant", "other"), False),
        ("user_id", slot("user_id", "free"), True),
        ("user_id", slot("user_id", "step", "get_user:id"), False),  # it came after
        ("user_id", slot("other", "user", ""), False),  # an argument that the step does not know
        ("reservation_id", slot("reservation_id", "step", "get_user:reservations[]"), True),
        ("reservation_id", slot("reservation_id", "step", "get_user:tier"), False),  # not its path
        ("reservation_id", slot("reservation_id", "step", "get_reservation:reservations[]"), False),  # not its tool
        ("reservation_id", slot("reservation_id", "user", ""), False),  # the user said another one
    ],
)
def test_arguments_are_bound_to_what_came_before(name: str, found: Slot, *, right: bool) -> None:
    """A value counts where it stands before the action, as the slot says: in the user's words, or at a path."""
    tool = {"user_id": "get_user", "reservation_id": "get_reservation"}[name]
    act = next(a for a in BOOKING.acts if a.tool == tool)
    assert by_arguments(BOOKING)(ProcedureStep(tool, (found,)), act) is right
    assert by_tool(ProcedureStep(tool, (found,)), act)


def test_a_missing_and_an_unknown_argument_are_wrong() -> None:
    """An action has all arguments of a step that are not free, and no others."""
    follows, act = by_arguments(BOOKING), BOOKING.acts[-1]
    known = (slot("reservation_id", "step", "get_user:reservations[]"), slot("reason", "constant", "other"))
    assert not follows(ProcedureStep("cancel", known), act)
    assert follows(ProcedureStep("cancel", (*known, slot("note", "free"))), act)
    assert follows(ProcedureStep("cancel", (*known, slot("note", "free"), slot("more", "free"))), act)
    assert not follows(ProcedureStep("cancel", (*known, slot("note", "free"), slot("more", "user"))), act)
    assert follows(CONFIRM, next(a for a in BOOKING.acts if a.tool == SAY))
    assert not follows(CONFIRM, act)


def test_the_longest_common_subsequence_keeps_the_order() -> None:
    """Steps count that come in their order, each once."""

    def steps(*tools: str) -> list[ProcedureStep]:
        return [ProcedureStep(tool) for tool in tools]

    assert common(steps("get_user", "get_reservation", SAY, "cancel"), BOOKING.acts, by_tool) == 4
    assert common(steps("cancel", "get_user", SAY), BOOKING.acts, by_tool) == 2
    assert common(steps("get_user", "get_user"), BOOKING.acts, by_tool) == 1
    assert common([], BOOKING.acts, by_tool) == common(steps("get_user"), [], by_tool) == 0


# -- procedures ----------------------------------------------------------------------------------------

LOOK = ProcedureStep("look", (slot("q", "user", ""),))
CANCEL = ProcedureStep("cancel", (slot("id", "step", "look:id"),), writes=True)


def solved(number: int, **fields: Any) -> Run:
    """Return a run that looks up what the user named, asks, and cancels it."""
    messages = [
        user(f"cancel order n{number}"),
        call("look", {"id": f"R{number}99"}, q=f"n{number}"),
        says("Sure?"),
        user("yes"),
        call("cancel", id=f"R{number}99"),
        says("Done."),
    ]
    return run(number, messages, **fields)


def test_procedures_are_scored_on_eligible_runs() -> None:
    """Each figure is what it is by hand, for offers that are right, partly right, late, of another family, and none."""
    runs = [
        solved(0), solved(1), solved(2), solved(3), solved(4), solved(5, resolved=False), solved(6, family="other"),
        solved(7, family="other"),
    ]  # fmt: skip
    episodes = [Episode(r) for r in runs]
    deleting = ProcedureStep("delete_user", (slot("id", "free"),))
    episodes[0].offers = [(1, offer(deleting))]  # not eligible: of no figure
    episodes[1].offers = [(1, offer(LOOK, CONFIRM, CANCEL)), (3, offer(deleting))]  # only the first is scored
    episodes[2].offers = [(3, offer(LOOK, CONFIRM, CANCEL, deleting, done=1, support=("0", "1", "6", "x")))]
    episodes[3].offers = [(7, offer(CANCEL))]  # after its last action
    episodes[5].offers = [(1, offer(LOOK)), (3, offer(deleting, support=("6",)))]
    episodes[7].offers = [(1, offer(CANCEL, LOOK, support=("0",)))]
    assert [e.run.number for e in eligible(episodes)] == [1, 2, 3, 4, 5, 7]
    found = procedures(episodes, runs)
    assert (found["eligible"], found["eligible_resolved"]) == (6, 5)
    assert found["procedure_known_count"] == "3/6"  # 1, 2 and 5
    assert found["procedure_support"] == round((1 + 1 + 0.5 + 1 + 0 + 0) / 6, 4)
    assert found["procedure_support_count"] == 6
    # 1: all three; 2: two of three; 3: none of one; 7: one of two
    assert found["procedure_tools"] == round((1 + 2 / 3 + 0 + 1 / 2) / 4, 4)
    assert found["procedure_actions"] == found["procedure_tools"]
    assert found["misleading_steps_count"] == "1/5"  # run 2 deleted nobody
    assert found["state_changing_recall_count"] == "3/4"  # of run 3 it came too late


def test_an_argument_from_elsewhere_lowers_the_actions_alone() -> None:
    """By tool the step was made, by tool and arguments it was not."""
    runs = [solved(0), solved(1)]
    episodes = [Episode(r) for r in runs]
    wrong = ProcedureStep("cancel", (slot("id", "user", ""),), writes=True)
    episodes[1].offers = [(1, offer(LOOK, CONFIRM, wrong))]
    found = procedures(episodes, runs)
    assert (found["procedure_tools"], found["procedure_actions"]) == (1.0, 0.6667)


def test_a_step_that_repeats_stands_for_all_of_its_tool() -> None:
    """A loop offered once covers each change; a single step one."""
    messages = [
        user("all of them"),
        call("cancel", id="a"),
        call("cancel", id="b"),
        call("cancel", "Error: no", id="c"),
    ]
    runs = [run(0, messages), run(1, messages), run(2, messages)]
    episodes = [Episode(r) for r in runs]
    loop = ProcedureStep("cancel", (slot("id", "free"),), writes=True, repeats=True)
    episodes[1].offers = [(1, offer(loop))]
    episodes[2].offers = [(1, offer(ProcedureStep("cancel")))]
    assert procedures(episodes, runs)["state_changing_recall_count"] == "3/4"


def test_the_baseline_offers_the_most_frequent_steps() -> None:
    """They stand in their usual order, without what was done; their arguments come from where they came from."""
    frequent, bound = Frequent(arguments=False), Frequent(arguments=True)
    for number in range(3):
        for counted in (frequent, bound):
            counted.add(solved(number))
    rare = run(9, [user("x"), call("rare", q="x")])
    frequent.add(rare)
    assert [s.tool for s in frequent.steps(3, [])] == ["look", SAY, "cancel"]
    assert [s.tool for s in frequent.steps(9, [])] == ["look", "rare", SAY, "cancel"]
    assert [s.tool for s in frequent.steps(2, solved(4).acts[:2])] == [SAY, "cancel"]
    steps = bound.steps(3, [])
    assert steps == [LOOK, CONFIRM, ProcedureStep("cancel", CANCEL.slots)]
    runs = [solved(0), solved(1)]
    episodes = [Episode(r) for r in runs]
    episodes[1].offers = [(1, offer(ProcedureStep("delete"), CANCEL, LOOK))]
    found = procedures(episodes, runs)
    assert (found["baseline_tools"], found["baseline_actions"], found["procedure_tools"]) == (1.0, 1.0, 0.3333)


# -- injections ----------------------------------------------------------------------------------------


def test_injected_requests_tokens_and_kinds_are_counted() -> None:
    """Requests and tokens are shares of all episodes'; a reminder is what three families heard."""
    reminder = "I did not understand. You have {} steps left."
    runs = [
        run(n, [user(f"task {n}"), says("?"), user(reminder.format(n)), says("!")], family=str(n)) for n in range(3)
    ]
    episodes = [Episode(runs[0], 2, 1, 100, 20), Episode(runs[1], 3, 0, 80, 0)]
    turns = [user("a"), says("b"), user(reminder.format(9)), says("done")]
    exemplar, procedure = Injected("mem-2", "exemplar", 0.5, 9), Injected("mem-3", "procedure", 0.5, 9)
    insertions = [
        insertion(runs[0], 1, turns, exemplar, exemplar, tasks=("a", reminder.format(9))),
        insertion(runs[1], 1, f"1. look\n| {reminder.format(3)}", procedure),
        insertion(runs[1], 3, f"1. this action failed\n| {reminder.format(3)}", fix("x")),
    ]
    found = injected(Replayed(episodes, insertions), runs)
    assert (found["requests"], found["injected_requests_count"]) == (5, "1/5")
    assert found["injected_token_share_count"] == "20/200"
    assert [found[k] for k in ("exemplars", "fixes", "failures", "procedures")] == [2, 1, 0, 1]
    assert found["reminders_injected"] == 2
    assert found["longest_item_chars"] == len(insertions[2].text) - len("1. ")
    assert injected(Replayed(episodes, insertions), runs[:2])["reminders_injected"] == 0


def test_the_items_of_a_block_are_measured_each() -> None:
    """A block's heading is no item's; a block that is written otherwise counts whole."""
    block = "<agent_memory>\nFrom memory.\n1. one\n| x\n2. three\n</agent_memory>"
    assert item_lengths(insertion(BOOKING, 1, block, fix("x"), fix("y"))) == [
        len("one\n| x\n"),
        len("three\n</agent_memory>"),
    ]
    assert item_lengths(insertion(BOOKING, 1, block, fix("x"))) == [len(block)]
    assert item_lengths(insertion(BOOKING, 1, [user("four"), says("by"), user("a"), says("b")], fix("x"))) == [6, 2]


def test_a_fix_is_followed_if_it_is_among_the_next_three_actions() -> None:
    """The suggestion replaces a text of the failed call, or all of its arguments; only resolved runs count."""
    messages = [
        user("push"), call("bash", "Error: psuh", command="git psuh", timeout=9), call("bash", command="ls"),
        call("bash", command="pwd"), call("bash", command="cd /x && git push", timeout=9),
        call("bash", command="late", timeout=9),
    ]  # fmt: skip
    pushed = run(0, messages)
    lost = run(1, messages, resolved=False)
    made = [
        insertion(pushed, 3, "", fix("git push")),
        insertion(pushed, 3, "", fix("late"), fix(None)),
        insertion(pushed, 1, "", fix("git psuh")),  # before any action: nothing to replace
        insertion(pushed, 3, "", fix(json.dumps({"command": "git push"}))),
        insertion(lost, 3, "", fix("git push")),
    ]
    assert fixes(made)["fix_followed_count"] == "2/5"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to mia.li@example.com.", {"mia.li@example.com"}),
        ("see https://example.com/a?b=1, or", {"https://example.com/a?b=1"}),
        (
            "in /testbed/django/db.py and django/db/models.py or and/or",
            {"/testbed/django/db.py", "django/db/models.py"},
        ),
        ("on 2024-05-20 or 5/20/2024 at 10:00, 123 or 12345, 2023", {"2024-05-20", "5/20/2024", "12345", "2023"}),
        ("HAT030 get_user, abc12 ab1", {"HAT030", "get_user", "abc12"}),
        ("with Mia Li Smith. In it", {"Mia Li", "Li Smith"}),
        ("nothing of anyone", set()),
    ],
)
def test_values_are_what_belongs_to_somebody(text: str, found: set[str]) -> None:
    """Addresses, paths, dates, numbers, tokens with digits and names are values; ordinary words are not."""
    assert values_in(text) == found


def test_a_value_is_foreign_if_only_another_run_has_it() -> None:
    """What the request, its tool schemas or three families hold is not foreign, nor what no run holds."""
    tools = [{"type": "function", "function": {"name": "find_zone_9"}}]
    other = run(
        0,
        [user("I am Omar Rossi"), call("look", {"seat": "window", "id": "RES777"}, q="zone_1 find_zone_9")],
        family="a",
    )
    many = [run(n, [user("SHARED99")], family=f"m{n}") for n in range(2, 5)]
    own = run(1, [user("I am Mia Li, RES888 with the WINDOW"), *call("look", q="zone_5")], family="b", tools=tools)
    plain = run(1, [user("x")], family="b")
    values = Values([other, own, *many])

    def found(text: str, index: int = 1) -> set[str]:
        return values.foreign(text, own, request_text(own, index))

    assert found("Omar Rossi sits at the | window, id RES777 in zone_1") == {"Omar Rossi", "RES777", "zone_1"}
    assert values.foreign("find_zone_9", plain, request_text(plain, 1)) == {"find_zone_9"}
    assert found("Mia Li, RES888, SHARED99, find_zone_9, UNKNOWN77") == set()
    assert found("windows") == set()  # not the word `window`
    assert found("zone_5") == set()  # its own
    assert values.foreign("a window", plain, request_text(plain, 1)) == {"window"}


def test_a_value_on_several_lines_is_found_in_a_quoted_block() -> None:
    """The mark of quoted lines and white space do not hide a value."""
    other = run(0, [user("x"), call("python", code="print(total)\n  print(rest)")], family="a")
    own = run(1, [user("y"), says("z")], family="b")
    figures_of = foreign([insertion(own, 1, "1. code\n| print(total)\n|   print(rest)", fix("x"))], [other, own])
    assert figures_of["foreign_values"] == 1
    assert figures_of["foreign_by_kind"] == {"fix": 1}
    assert figures_of["foreign_examples"] == ["fix: print(total) print(rest)"]


def test_names_of_tools_are_told_apart() -> None:
    """Where a log has no schemas, a rare tool's name counts, and is said to be one."""
    runs = [run(0, [user("x"), call("send_gift_card")], family="a"), run(1, [user("y"), says("z")], family="b")]
    item = Injected("mem-3", "procedure", 0.5, 9)
    found = foreign([insertion(runs[1], 1, "1. send_gift_card", item)], runs)
    assert (found["foreign_values"], found["foreign_tool_names"]) == (1, 1)


# -- served actions ------------------------------------------------------------------------------------


def query(text: str, rows_found: str) -> Messages:
    """Return a query with its result."""
    return call("sql", rows_found, query=text)


def test_a_served_action_is_right_if_the_run_made_it_or_it_saw_the_same() -> None:
    """Equal to a later successful action, or the verified observation of the step that solved the task."""
    counted = "SELECT count(*) FROM t"
    again = query(counted, "Error: gone")
    first = run(0, [user("how many"), query(counted, "[(2,)]"), again, query("SELECT 3", "[(3,)]")])
    lost = run(1, [user("how many"), query("SELECT 4", "[(2,)]")], resolved=False)
    other = run(2, [user("else"), query("SELECT count(*) FROM t", "[(9,)]")], family="other")
    now = run(
        3,
        [
            user("how many"),
            query("SHOW TABLES", "t"),
            query("SELECT x", "Error: x"),
            query("SELECT count(a) FROM t", "[(2,)]"),
            call("submit", "done"),
        ],
    )  # fmt: skip
    runs = [first, lost, other, now]

    def right(text: str, index: int = 1) -> bool:
        return is_right(Served(index, (canonical_action("sql", json.dumps({"query": text})),)), now, runs)

    assert right("SHOW TABLES;")
    assert not right("SHOW TABLES", 3)  # earlier, not later
    assert not right("SELECT x")  # it failed
    assert right("SELECT count(*) FROM t")  # of the family's run, not of the later one of another
    assert not right("SELECT 3")
    assert not right("SELECT 4")  # not verified
    one, two = now.acts[0].key, canonical_action("sql", '{"query": "SELECT 3"}')
    assert is_right(Served(1, (one,)), now, runs)
    assert not is_right(Served(1, (one, two)), now, runs)


def test_coverage_is_of_eligible_and_precision_of_resolved_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served to a family that was never solved is counted apart; serves in resolved runs are judged."""
    monkeypatch.setattr(all_figures, "_LAST", 2)
    runs = [run(n, [user("q"), query("SELECT 1", "1")], family="a", resolved=n != 2) for n in range(4)]
    runs.append(run(4, [user("r"), query("SELECT 2", "2")], family="b"))
    episodes = [Episode(r) for r in runs]
    right, wrong = Served(1, (runs[0].acts[0].key,)), Served(1, ("sql {}",))
    for number, served in ((1, right), (2, wrong), (4, wrong)):
        episodes[number].served = served
    found = actions(episodes, runs)
    assert found["action_coverage_count"] == "2/3"
    assert found["action_coverage_last_2_count"] == "1/2"
    assert found["action_precision_count"] == "1/2"
    assert found["action_served_unsolved_count"] == "1/2"


# -- the replay ----------------------------------------------------------------------------------------


class ScriptedMemory:
    """A memory that does as it is told, and keeps what it was asked."""

    def __init__(self, folder: Path, served: Mapping[tuple[str, int], Messages]) -> None:
        """Serve actions, by episode and number of messages."""
        self.settings = SimpleNamespace(db=str(folder / "memory.db"))
        self.served = served
        self.begun: list[dict[str, Any]] = []
        self.finished: list[tuple[Any, Any]] = []
        self.reported: list[dict[str, Any]] = []
        Path(self.settings.db).write_bytes(b"x" * 1000)
        Path(f"{self.settings.db}-wal").write_bytes(b"x" * 500)

    def begin(self, body: dict[str, Any]) -> Any:
        """Serve an action where it is asked for and there is one."""
        self.begun.append(body)
        field = body["agent_memory"]
        served = self.served.get((field["episode_id"], len(body["messages"])))
        turn = SimpleNamespace(action="plain", placements=(), fresh=(), offer=None, skipped=({"reason": "nothing"},))
        if served and "reuse" in field:
            turn.action, turn.reused = "reuse", lambda: {"choices": [{"message": served[0]}]}
        return turn

    def finish(self, turn: Any, completion: Mapping[str, Any]) -> None:
        """Keep what a request was answered with."""
        self.finished.append((turn.action, completion["choices"][0]["message"]))

    def feedback(self, item: dict[str, Any]) -> None:
        """Keep an outcome."""
        self.reported.append(item)

    def stats(self) -> dict[str, int]:
        """Say that every memory has its vector."""
        return {"memories_without_vector": 0}

    def settle(self) -> None:
        """Wait for nothing."""

    def close(self) -> None:
        """Close nothing."""


def scripted(monkeypatch: pytest.MonkeyPatch, memory: ScriptedMemory) -> ScriptedMemory:
    """Let the replay use a memory."""

    @replaying_context
    def opened(_encoder: Any) -> Iterator[ScriptedMemory]:
        yield memory

    monkeypatch.setattr(replaying, "empty_memory", opened)
    return memory


def replaying_context(function: Any) -> Any:
    """Return a function as a context manager."""
    import contextlib

    return contextlib.contextmanager(function)


def test_requests_are_the_messages_before_each_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes with its episode and tools, and its answer and outcome are the log's."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    recorded = [
        run(0, [user("a"), call("look", q="a"), says("b")], tools=tools),
        run(1, [user("c"), says("d")], resolved=False),
    ]
    memory = scripted(monkeypatch, ScriptedMemory(tmp_path, {}))
    result = replay(recorded, bench_encoder(), Asking())
    assert [len(body["messages"]) for body in memory.begun] == [1, 3, 1]
    assert [body["agent_memory"] for body in memory.begun] == [{"episode_id": "0"}] * 2 + [{"episode_id": "1"}]
    assert [body.get("tools") for body in memory.begun] == [tools, tools, None]
    assert [message for _, message in memory.finished] == [recorded[0].messages[1], says("b"), says("d")]
    assert memory.reported == [
        {"episode_id": "0", "metric": "success", "value": True, "source": "code"},
        {"episode_id": "1", "metric": "success", "value": False, "source": "code"},
    ]
    assert (result.db_bytes, result.wal_peak_bytes, result.skipped["nothing"]) == (1000, 500, 3)
    assert [e.requests for e in result.episodes] == [2, 1]
    assert len(result.begin_ms) == 3
    assert len(result.learn_ms) == 2


@pytest.mark.parametrize(("outcomes", "reported"), [(0.0, 0), (0.3, 30), (1.0, 100)])
def test_a_share_of_the_outcomes_is_reported(
    outcomes: float, reported: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ones depends on the seed alone."""
    recorded = [run(n, [user("c"), says("d")]) for n in range(100)]
    found = []
    for _ in range(2):
        memory = scripted(monkeypatch, ScriptedMemory(tmp_path, {}))
        replay(recorded, bench_encoder(), Asking(outcomes, seed=3))
        found.append([item["episode_id"] for item in memory.reported])
    assert found[0] == found[1]
    assert abs(len(found[0]) - reported) <= 12 * (0 < outcomes < 1)


def test_a_served_action_is_taken_where_the_log_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the model is asked instead, as the log has it; after the first serve no action is asked for."""
    messages = [user("a"), query("SELECT 1", "1"), query("SELECT 2", "2"), says("done")]
    recorded = [run(0, messages), run(1, messages)]
    same, other = query("SELECT 1;", "1"), query("SELECT 9", "9")
    memory = scripted(monkeypatch, ScriptedMemory(tmp_path, {("0", 1): same, ("1", 3): other, ("1", 5): same}))
    result = replay(recorded, bench_encoder(), Asking(actions=True, max_error=0.1, read_only=("sql",)))
    asked = [("reuse" in body["agent_memory"], len(body["messages"])) for body in memory.begun]
    assert asked == [(True, 1), (False, 3), (False, 5), (True, 1), (True, 3), (False, 3), (False, 5)]
    assert memory.begun[0]["agent_memory"]["reuse"] == {"max_error": 0.1, "actions": True}
    assert memory.begun[0]["agent_memory"]["tools"] == {"read_only": ["sql"]}
    assert memory.finished[0] == ("reuse", same[0])
    assert [action for action, _ in memory.finished[1:]] == ["plain"] * 5
    assert [m for _, m in memory.finished[3:]] == [recorded[1].messages[i] for i in recorded[1].answered]
    served = [e.served for e in result.episodes]
    assert served == [Served(1, ('sql {"query": "SELECT 1"}',)), Served(3, ('sql {"query": "SELECT 9"}',))]
    assert [e.requests for e in result.episodes] == [3, 3]
    assert actions(result.episodes, recorded)["action_precision_count"] == "1/2"
    # Only what went to a model has a prompt.
    assert result.episodes[0].prompt_tokens < result.episodes[1].prompt_tokens


def test_insertions_and_offers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is new in a prompt is counted once, its tokens with every request; an offer counts if it was injected."""
    recorded = [run(0, [user("a"), says("b"), user("c"), says("d")])]
    memory = scripted(monkeypatch, ScriptedMemory(tmp_path, {}))
    item = Injected("mem-3", "procedure", 0.5, 9)
    placement = Placement("anchor", 0, "block", "12345678", (item,))
    made = offer(LOOK)
    turns = [
        SimpleNamespace(action="inject", placements=(placement,), fresh=(placement,), offer=made, skipped=()),
        SimpleNamespace(action="inject", placements=(placement,), fresh=(), offer=made, skipped=()),
    ]
    monkeypatch.setattr(memory, "begin", lambda _body: turns.pop(0))
    (episode,) = (result := replay(recorded, bench_encoder(), Asking())).episodes
    assert episode.offers == [(1, made)]
    assert (episode.injected_requests, episode.injected_tokens) == (1, 4)
    assert [i.text for i in result.insertions] == ["12345678"]


def fixing(number: int) -> Run:
    """Return a run in which a mistyped command fails and is corrected."""
    messages = [
        user(f"publish branch number {number}"),
        call(
            "bash",
            "<returncode>1</returncode>\ngit: 'psuh' is not a git command. See 'git --help'.",
            command="git psuh",
        ),
        call("bash", "<returncode>0</returncode>\nEverything up-to-date", command="git push"),
        says("Done."),
    ]
    return run(number, messages, family=str(number))


def test_a_real_memory_is_replayed() -> None:
    """A fix learned from the first runs is injected in later ones, and is what the agent did next."""
    runs = [fixing(number) for number in range(4)]
    replayed = replay(runs, bench_encoder(), Asking())
    found = figures(replayed, runs)
    assert found["requests"] == 12
    assert found["fixes"] >= 2
    assert found["fix_followed"] == 1.0
    assert found["injected_requests_count"] == f"{found['fixes']}/12"
    assert 0 < found["injected_token_share"] < 1
    assert found["longest_item_chars"] > 0
    assert found["db_bytes"] > 0
    assert found["begin_p99_ms"] >= found["begin_p50_ms"] > 0
    assert found["learn_p99_ms"] > 0
    assert found["procedure_known_count"] == "0/0"
    assert found["foreign_values"] == 0
    (shown,) = sample(replayed.insertions, 1, seed=0)
    assert shown["kinds"] == "fix"
    assert "git push" in shown["injected"]
    text = as_text([shown])
    assert text.index("'psuh' is not") < text.index("--- injected: fix") < text.rindex('bash({"command": "git push"})')
    assert len(sample(replayed.insertions, 99, seed=0)) == len(replayed.insertions)


NAMED = (
    "requests", "episodes", "injected_requests", "injected_token_share", "exemplars", "fixes", "procedures",
    "reminders_injected", "fix_followed", "procedure_known", "procedure_support", "procedure_tools",
    "procedure_actions", "baseline_tools", "baseline_actions", "misleading_steps", "state_changing_recall",
    "foreign_values", "action_coverage", "action_coverage_last_500", "action_precision", "action_served_unsolved",
    "begin_p50_ms", "begin_p99_ms", "learn_p99_ms", "db_bytes", "wal_peak_bytes", "longest_item_chars",
)  # fmt: skip


def test_the_command_prints_every_figure_and_shows_injections(tmp_path: Path) -> None:
    """Text has the figures and then the injections in context, JSON both in one object."""
    written = [{"id": f"t-{r.number}", "resolved": True, "messages": r.messages} for r in map(fixing, range(3))]
    file, out = rows(tmp_path / "runs.jsonl", *written), tmp_path / "out.json"
    arguments = ["bench", "trajectories", "--data", str(file), "--family", r"t-(\d+)", "--show", "1", "--limit", "3"]
    done = CliRunner().invoke(main, [*arguments, "--json", "--output", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert set(NAMED) <= found.keys()
    assert len(found["shown"]) == 1
    assert found["settings"] == {
        "data": "runs.jsonl", "family": r"t-(\d+)", "outcomes": 1.0, "actions": False, "max_error": 0.05,
        "read_only": [], "limit": 3, "seed": 0,
    }  # fmt: skip
    shown = CliRunner().invoke(main, arguments).stdout
    assert shown.startswith("episodes")
    assert "fix_followed" in shown
    assert "--- what the agent did next" in shown


def test_the_command_names_a_bad_file(tmp_path: Path) -> None:
    """A row without an outcome is a message, not a traceback."""
    file = rows(tmp_path / "runs.jsonl", {"messages": [user("x")]})
    done = CliRunner().invoke(main, ["bench", "trajectories", "--data", str(file)])
    assert done.exit_code == 1
    assert "resolved: must be true or false" in done.output
