"""The multi-step tasks of the scripted agent: environment, parser, policy, passes, changed environments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.agent_policy import GIVEN_UP, UNKNOWN_TASK, Call
from benchmarks.multistep import figures, passes
from benchmarks.multistep.block import Line, Origin, lines_of, procedure_in
from benchmarks.multistep.changes import CHANGES, changed, family_named, warm
from benchmarks.multistep.episode import Course, run_episode
from benchmarks.multistep.families import FAMILIES, tasks
from benchmarks.multistep.figures import Outing, served_errors, summary
from benchmarks.multistep.policy import Agent
from benchmarks.multistep.task import Family, Task, understood
from benchmarks.multistep.view import SAY, read, values_at
from benchmarks.multistep.world import Change, has_failed
from optillm_memory.memory import Memory

NAMED = "find_user_id_by_name_zip(first_name: from the user, last_name: from the user, zip: from the user)"
ORDERS = (
    "get_user_details(user_id: from step 1's `user_id`)",
    "get_order_details(order_id: from step 2's `orders[]`, for each)",
)
ASK = "ask the user to confirm, and wait for the reply"
BADGE = "find_employee(badge: from the user)"
PROCEDURES: dict[str, tuple[str, ...]] = {
    "cancel_order": (NAMED, *ORDERS, ASK, "cancel_order(order_id: from step 3's `order_id`, reason: your choice)"),
    "return_item": (
        "find_user_id_by_email(email: from the user)",
        *ORDERS,
        ASK,
        "return_item(order_id: from step 3's `order_id`, item_id: from step 3's `items[].item_id`, payment_id: free)",
    ),
    "change_address": (
        NAMED, *ORDERS, ASK, "change_address(order_id: from step 3's `order_id`, address: from the user)",
    ),
    "track_parcel": (
        "find_user_id_by_email(email: from the user)",
        *ORDERS,
        "get_tracking(tracking_id: from step 3's `tracking_id`)",
    ),
    "gift_card": (NAMED, ORDERS[0], "get_gift_card(card_id: from step 2's `card_id`)"),
    "unlock_account": (
        BADGE, "get_account(account_id: from step 1's `account_id`)", ASK,
        "unlock_account(account_id: from step 1's `account_id`)",
    ),
    "assign_license": (
        BADGE, "get_license_pool(product: from the user)",
        "assign_license(employee_id: from step 1's `employee_id`, pool_id: from step 2's `pool_id`)",
    ),
    "route_ticket": (
        BADGE,
        "list_tickets(employee_id: from step 1's `employee_id`)",
        "get_ticket(ticket_id: from step 2's `tickets[]`; for each)",
        "find_team(area: from step 3's `area`)",
        "assign_ticket(ticket_id: from step 3's `ticket_id`, team_id: from step 4's `team_id`)",
    ),
    "warranty": (
        BADGE,
        "list_devices(employee_id: from step 1's `employee_id`)",
        "get_device(device_id: from step 2's `devices[]`), for each",
    ),
    "spent": (
        'describe_table(table: always "clients")', 'describe_table(table: always "sales")',
        "sql(query: your choice)", "submit(answer: from step 3's `rows[][]`)",
    ),
    "dearest": (
        'describe_table(table: always "articles")', "sql(query: your choice)",
        "submit(answer: from step 2's `rows[][]`)",
    ),
    "late": (
        'describe_table(table: always "shipments")', "sql(query: your choice)",
        "submit(answer: from step 2's `rows[][]`)",
    ),
}  # fmt: skip


def block(lines: Sequence[str], first: int = 1) -> str:
    """Return a block with these steps, as the renderer writes it."""
    numbered = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, first))
    head = "A procedure that solved tasks like this before (3 of 3 times):"
    return f"\n\n<agent_memory>\n{head}\n{numbered}\n</agent_memory>"


@dataclass(frozen=True, slots=True)
class Told(Agent):
    """An agent in whose first message a block stands."""

    block: str = ""

    def decide(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Call | str:
        """Decide with the block."""
        system, user, *rest = messages
        return Agent.decide(self, [system, {**user, "content": user["content"] + self.block}, *rest], tools)


def told(
    name: str, lines: Sequence[str], number: int = 1, *, follow: float = 1.0, change: Change | None = None
) -> Course:
    """Do a task with a procedure in its first message."""
    agent = Told("t", follow, block=block(lines))
    return run_episode(Task(family_named(name), number), agent, change=change or Change())


def best(name: str, number: int = 1) -> Course:
    """Do a task without a detour."""
    return run_episode(Task(family_named(name), number), Agent("t", wasteful=False))


# -- the environment -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tasks_can_be_solved_and_differ(family: Family) -> None:
    """Every task is solved in three to eight steps, with detours in more; names and ids differ in each."""
    chosen = tasks(0, 6, (family,))
    for task in chosen:
        assert understood(task.asked, FAMILIES) == (
            family,
            {k: v for k, v in task.case.slots.items() if f"{{{k}}}" in family.asks},
        )
        done, plain = run_episode(task, Agent("a", wasteful=False)), run_episode(task, Agent("a"))
        assert done.solved
        assert plain.solved
        assert 3 <= done.steps <= 8
        assert plain.steps > done.steps
        assert not [call for call in done.worked if call not in plain.worked]
    assert len({task.asked for task in chosen}) == 6
    assert Task(family, 3).asked == chosen[3].asked


def test_the_families_are_of_several_kinds() -> None:
    """Some tasks ask the user, some look through a list, some change nothing, some are in SQL."""
    asking = [family for family in FAMILIES if any(step.tool == SAY for step in family.steps)]
    assert len(FAMILIES) == len({family.name for family in FAMILIES}) == 12
    assert len(asking) == 4
    assert {family.domain.name for family in FAMILIES} == {"shop", "desk", "database"}
    assert [f.least_llm_calls for f in FAMILIES] == [3, 3, 3, 1, 1, 3, 1, 1, 1, 0, 0, 0]


def test_tools_refuse_what_is_wrong() -> None:
    """An unknown tool, missing arguments, an unknown id and bad SQL are refused, each domain in its own words."""
    shop, desk, sql = (Task(family_named(name), 1).world() for name in ("cancel_order", "warranty", "late"))
    assert shop.call("order", {}) == "Error: no tool is called order"
    assert shop.call("get_order_details", {}) == "Error: get_order_details takes order_id"
    assert shop.call("get_order_details", {"order_id": "#W1"}) == "Error: order not found"
    assert desk.call("get_device", {"device_id": "x"}) == '{"error": "device x not found"}'
    assert sql.call("sql", {"query": "SELECT wrong FROM shipments"}).startswith("Error executing query: no such col")
    assert sql.call("sql", {"query": "DELETE FROM shipments"}).startswith("Error executing query: attempt to write")
    assert sql.call("sql", {"query": "SELECT COUNT(*) FROM shipments"}).endswith("[[120]]}")
    assert not shop.writes
    assert has_failed('{"error": "x"}')
    assert not has_failed('{"errors": 0}')


def test_only_what_was_asked_for_counts_as_solved() -> None:
    """The right change after the user agreed is solved; without the question, on another order, or twice it is not."""
    task = Task(family_named("cancel_order"), 1)
    [(tool, wanted)] = task.case.wanted
    other = next(o for o in _orders(task) if o != wanted["order_id"])
    for agreed, orders, solved in (
        (True, [wanted["order_id"]], True),
        (False, [wanted["order_id"]], False),
        (True, [other], False),
        (True, [wanted["order_id"]] * 2, False),
        (True, [], False),
    ):
        world = task.world()
        if agreed:
            world.answer("Shall I?")
        for order in orders:
            world.call(tool, {"order_id": order, "reason": "any"})
        assert task.solved(world, "Done.") is solved
    late = Task(family_named("late"), 1)
    world = late.world()
    world.call("submit", {"answer": late.case.fact + "0"})
    assert not late.solved(world, "")


def _orders(task: Task) -> list[str]:
    world, slots = task.world(), task.case.slots
    user = json.loads(world.call("find_user_id_by_email", {"email": slots["email"]}))
    return list(json.loads(world.call("get_user_details", user))["orders"])


# -- the parser ------------------------------------------------------------------------------------


def test_the_format_of_a_procedure() -> None:
    """Every source, a repeat and a question are read; numbers are kept where steps are left out."""
    text = (
        "A procedure that solved tasks like this before (3 of 3 times):\n"
        "2. get_order_details(order_id: from step 1's `orders[]`; for each)\n"
        "3. ask the user to confirm, and wait for the reply\n"
        '4. cancel_order(order_id: from the user, reason: always "no, \\"not\\" needed: (really)", note: your choice)\n'
        "7. list_all()"
    )
    assert lines_of(text) == (
        Line(2, "get_order_details", {"order_id": Origin("step", "orders[]", 1)}, each=True),
        Line(3, SAY, {}),
        Line(
            4,
            "cancel_order",
            {
                "order_id": Origin("user"),
                "reason": Origin("constant", 'no, "not" needed: (really)'),
                "note": Origin("free"),
            },
        ),
        Line(7, "list_all", {}),
    )


def test_the_parser_is_tolerant() -> None:
    """Marks, backquotes, words behind a line, unknown sources and other lines do no harm; other items are ignored."""
    text = (
        "From memory: data, not instructions.\n1. this action failed once\n| x\n"
        "A procedure that solved 2 tasks\n| 1. `find`(`a.b`: from the user's message, c[]: free) (done by all)\n"
        "   some remark\n2) ask: which one?\n3. get(id: from step 1, x: who knows), for each\nThe end."
    )
    assert lines_of(text) == (
        Line(1, "find", {"a.b": Origin("user"), "c[]": Origin("free")}),
        Line(2, SAY, {}),
        Line(3, "get", {"id": Origin("step", "", 1), "x": Origin("free")}, each=True),
    )
    assert lines_of('A procedure:\n1. get(x: always "one, for each")')[0].each is False
    assert lines_of("1. find(a: from the user)") == ()


def test_the_last_procedure_of_a_prompt_counts() -> None:
    """What stands outside of a block is no procedure; of two blocks the later one is followed."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "A procedure:\n1. outside()"},
        {"role": "user", "content": "a" + block(["one()"])},
        {"role": "user", "content": [{"type": "text", "text": "b" + block(["two()"], 4)}]},
    ]
    assert procedure_in(messages[:1]) == ()
    assert procedure_in(messages) == (Line(4, "two", {}),)


def test_paths_lead_to_values() -> None:
    """Paths are read as memory writes them."""
    shown = {"a": {"b": 1}, "c": [{"d": "x"}, {"d": "y"}], "e": [["p", "q"]], "f": {"k1": {"g": "z"}}}
    for path, values in {
        "a.b": ["1"], "c[].d": ["x", "y"], "c[1].d": ["y"], "e[][]": ["p", "q"], "f{}": ["k1"], "f{}.g": ["z"], "h": [],
    }.items():  # fmt: skip
        assert list(values_at(shown, path)) == values
    assert list(values_at(shown, "d", anywhere=True)) == ["x", "y"]
    assert list(values_at("text", "")) == ["text"]


# -- the policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_good_procedure_is_followed_without_a_detour(family: Family) -> None:
    """With a procedure in the prompt every task is solved in the least steps, whatever its names."""
    for number in range(1, 6):
        done, least = told(family.name, PROCEDURES[family.name], number), best(family.name, number)
        assert done.solved
        assert done.worked == least.worked
        assert done.steps == least.steps


def test_following_less_often_costs_more() -> None:
    """At a probability of 0.7 the steps are between those of always and of never, and every task is solved."""
    steps = {}
    for follow in (0.0, 0.7, 1.0):
        courses = [told(name, lines, n, follow=follow) for name, lines in PROCEDURES.items() for n in range(4)]
        assert all(course.solved for course in courses)
        steps[follow] = sum(course.steps for course in courses)
    assert steps[1.0] < steps[0.7] < steps[0.0]
    assert steps[0.0] == sum(
        run_episode(Task(family_named(name), n), Agent("t")).steps for name in PROCEDURES for n in range(4)
    )


def test_done_steps_may_be_left_out() -> None:
    """A procedure whose first steps are left out is followed from where it begins, by the numbers of the whole."""
    lines = PROCEDURES["cancel_order"]
    task = Task(family_named("cancel_order"), 1)
    agent, later = Agent("t", wasteful=False), block(lines[2:], 3)
    messages: list[dict[str, Any]] = [{"role": "system", "content": ""}, {"role": "user", "content": task.asked}]
    world = task.world()
    for _ in range(2):
        call = agent.decide(messages, world.definitions)
        assert isinstance(call, Call)
        messages += _exchange(len(messages), call, world.call(call.tool, call.arguments))
    messages[-1]["content"] += later
    call = Agent("t").decide(messages, world.definitions)
    assert call == Call("get_order_details", {"order_id": _orders(task)[0]})


def _exchange(number: int, call: Call, shown: str) -> list[dict[str, Any]]:
    function = {"name": call.tool, "arguments": json.dumps(dict(call.arguments))}
    made = {"id": f"c{number}", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": f"c{number}", "content": shown},
    ]


def test_a_procedure_without_its_question_loses_the_task() -> None:
    """The agent does as it is told: where the question is missing the user has not agreed."""
    lines = [line for line in PROCEDURES["cancel_order"] if line != ASK]
    done = told("cancel_order", lines)
    assert not done.solved
    assert [call.tool for call in done.worked][-1] == "cancel_order"


@pytest.mark.parametrize(
    "lines",
    [
        ('get_user_details(user_id: always "mia_li_1234")', *PROCEDURES["cancel_order"][2:]),
        (NAMED, "get_user_details(user_id: from step 1's `id`)"),
        (NAMED, "get_account(user_id: from step 1's `user_id`)"),
        ("get_order_details(order_id: from the user)",),
    ],
    ids=["another's id", "a path that is not there", "a tool that is not offered", "a value that nobody stated"],
)
def test_a_wrong_procedure_is_given_up(lines: Sequence[str]) -> None:
    """Where a procedure does not fit the agent goes on by itself, and solves the task all the same."""
    done = told("cancel_order", lines)
    assert done.solved
    assert done.steps > best("cancel_order").steps


def test_the_policy_depends_on_the_prompt_and_the_seed_alone() -> None:
    """Equal prompts get equal answers, other seeds other detours, and unknown tasks none."""
    task = Task(FAMILIES[0], 1)
    one, same, other = (run_episode(task, Agent(seed)) for seed in ("a", "a", "b"))
    assert one == same
    assert one.worked != other.worked
    assert Agent().decide([{"role": "user", "content": "Sing."}], []) == UNKNOWN_TASK
    assert Agent(wasteful=False).decide([{"role": "user", "content": task.asked}], []) == GIVEN_UP


def test_advice_on_a_failing_call_is_followed() -> None:
    """A call that the prompt knows to fail is left out, and what worked instead is done."""
    task = Task(family_named("late"), 1)
    prompt: list[dict[str, Any]] = [{"role": "system", "content": ""}, {"role": "user", "content": task.asked}]
    tools = task.world().definitions
    seed = next(s for s in map(str, range(99)) if _first_query(prompt, tools, s))
    query = _first_query(prompt, tools, seed)
    advice = f"1. this action failed once\n| {query}\n"
    skipped = [prompt[0], {**prompt[1], "content": f"{task.asked}\n\n<agent_memory>\n{advice}</agent_memory>"}]
    assert Agent(seed).decide(skipped, tools) != Call("sql", {"query": query})
    advice += "   what worked instead, as `query` of `sql` (verified, confidence 0.9)\n| SELECT 1\n"
    better = [prompt[0], {**prompt[1], "content": f"{task.asked}\n\n<agent_memory>\n{advice}</agent_memory>"}]
    assert Agent(seed).decide(better, tools) == Call("sql", {"query": "SELECT 1"})


def _first_query(prompt: list[dict[str, Any]], tools: list[dict[str, Any]], seed: str) -> str:
    call = Agent(seed).decide(prompt, tools)
    return call.arguments.get("query", "") if isinstance(call, Call) else ""


def test_memory_does_not_change_what_was_observed() -> None:
    """A block behind an observation, or behind the user's reply, is not read as part of it."""
    messages = [
        {"role": "user", "content": "x"},
        *_exchange(1, Call("find", {"a": "b"}), '{"user_id": "u"}' + block(["one()"])),
        {"role": "assistant", "content": "Shall I?"},
        {"role": "user", "content": "yes" + block(["two()"])},
    ]
    view = read(messages, {}, {})
    assert [(m.tool, m.shown, m.failed) for m in view.made] == [("find", {"user_id": "u"}, False), (SAY, "yes", False)]


# -- serving ---------------------------------------------------------------------------------------


@dataclass
class Server:
    """A memory that serves these actions, one at each request from the first on, then nothing."""

    actions: list[Call]
    finished: list[Any] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)

    def begin(self, body: Mapping[str, Any]) -> Any:
        """Return a turn with the next action, if one is left."""
        call = self.actions.pop(0) if self.actions else None
        message = _exchange(len(body["messages"]), call, "")[0] if call else {}
        return SimpleNamespace(
            action="reuse" if call else "plain", held_out=False, messages=body["messages"], fresh=(), placements=(),
            reused=lambda: {"choices": [{"message": message}]}, episode_id="e", options=SimpleNamespace(writes=True),
        )  # fmt: skip

    def guard(self, turn: Any, _completion: Any) -> tuple[Any, bool]:
        """Let every answer pass."""
        return turn, False

    def finish(self, _turn: Any, completion: Any) -> None:
        """Keep what was finished."""
        self.finished.append(completion)

    def feedback(self, payload: Any) -> None:
        """Keep the outcome."""
        self.outcomes.append(payload["value"])


def served(name: str, actions: Sequence[Call], change: Change | None = None) -> Outing:
    """Do a task in which memory serves these actions."""
    task, agent = Task(family_named(name), 1), Agent("t")
    server = Server(list(actions))
    course = run_episode(task, agent, cast("Memory", server), change=change or Change())
    assert len(server.finished) == course.llm_calls + len(course.served)
    assert server.outcomes == [course.solved]
    return Outing(course, run_episode(task, agent), best(name))


def test_served_actions_spare_calls() -> None:
    """Where all that solves a task is served no call of the LLM is left but for the answer."""
    least = best("gift_card")
    outing = served("gift_card", least.worked)
    assert outing.course.solved
    assert outing.course.llm_calls == family_named("gift_card").least_llm_calls == 1
    assert (outing.errors, outing.needless, outing.lost) == (0, 0, False)
    assert served("late", best("late").worked).course.llm_calls == 0


def test_errors_of_served_actions_are_counted() -> None:
    """An action that fails, comes again, or that neither episode makes is an error; a look-up of the agent's is not."""
    right = best("gift_card").worked[0]
    outing = served("gift_card", [right, right, Call("get_gift_card", {"card_id": "gift_1"})])
    assert outing.errors == 2
    needless = [c for c in outing.plain.worked if c not in outing.best.worked]
    assert needless
    outing = served("gift_card", [needless[0]])
    assert (outing.errors, outing.needless) == (0, 1)
    unknown = served("gift_card", [Call("get_store_hours", {"city": "Cork"})])
    assert unknown.errors == 1
    found = served_errors([[outing], [unknown], [served("gift_card", [])]], 0.05)
    assert (found["served"], found["wrong"], found["seeds"], found["seeds_within"]) == (2, 1, 3, 2)
    assert found["by_seed"] == [0.0, 1.0, None]
    assert found["interval_95"] == [0.0, 1.0]


def test_a_summary_adds_up() -> None:
    """Steps, calls and tokens are summed; a task that was solved before and is not now is lost."""
    task = Task(FAMILIES[0], 1)
    plain = Course(task, steps=10, llm_calls=11, solved=True, prompt_tokens=1000, completion_tokens=100)
    with_memory = replace(plain, steps=4, llm_calls=5, solved=False, prompt_tokens=400, injected=50, repeated=70)
    found = summary([Outing(with_memory, plain, plain), Outing(plain, plain, plain)])
    assert (found["steps"], found["llm_calls"], found["lost"], found["solved"]) == (14, 16, 1, 1)
    assert (found["saved_tokens"], found["net_tokens"]) == (600, 480)
    assert found["lost_tasks"] == ["cancel_order 1"]
    assert figures.against(found, {"steps_per_task": 10, "llm_calls_per_task": 16})["share_of_steps"] == 0.7


# -- changed environments --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_the_agent_solves_changed_tasks_without_memory(name: str, change: Change) -> None:
    """The change is noticed at some step, and the agent goes on and solves the task."""
    done = run_episode(Task(family_named(name), 1), Agent("t", wasteful=False), change=change)
    assert done.solved
    if change.kind == "tool_renamed":
        assert not any(call.tool == change.tool for call in done.worked)
    else:
        assert done.mismatch is not None
    assert not done.served_after_mismatch
    assert told(name, PROCEDURES[name], change=change).solved


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_what_is_served_after_a_mismatch_is_told(name: str, change: Change) -> None:
    """A memory that goes on as if nothing had changed is caught."""
    outing = served(name, best(name).worked, change)
    course = outing.course
    if change.kind == "id_gone":
        return  # it is the list that is longer: what is served by the old list meets nothing new
    assert course.mismatch is not None
    assert course.served_after_mismatch or course.served[-1].step == course.mismatch
    if change.kind == "tool_renamed":
        assert {s.offered for s in course.served if s.call.tool == change.tool} == {False}
        assert outing.errors


# -- the passes ------------------------------------------------------------------------------------


def test_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes run on a real memory: pass 1 is cold, the tasks are solved, held-out episodes are unchanged."""
    monkeypatch.delenv("OPTILLM_AGENT_MEMORY_DB", raising=False)
    families = tuple(family_named(name) for name in ("unlock_account", "late"))
    done: list[None] = []
    found = passes.run(instances=2, follow=(1.0,), families=families, tick=lambda: done.append(None))
    assert len(done) == passes.episodes(1, 2, (1.0,), families)
    first, warm_ = found["pass_1"], found["follow_1"]
    cold = [run_episode(task, Agent("0/pass_1")).steps for task in tasks(0, 2, families)]
    assert first["steps"] == sum(cold)
    assert (first["solved"], first["injected_tokens"], first["saved_tokens"]) == (4, 0, 0)
    assert warm_["holdout"]["unchanged"]
    assert warm_["holdout"]["held_out"]["tasks"] + warm_["holdout"]["with_memory"]["tasks"] == 4
    for name in ("pass_2", "pass_3", "pass_4"):
        assert warm_[name]["solved"] == warm_[name]["tasks"] == 4
        assert warm_[name]["lost"] == 0
    assert warm_["pass_4"]["served"]["seeds"] == 1


def test_a_changed_episode_runs_against_a_memory(tmp_path: Path) -> None:
    """The function for a test of the product: warm up, then one episode in a changed environment."""
    with passes.opened(tmp_path / "memory.db") as memory:
        warm(memory, "warranty", range(3))
        course = changed(memory, "warranty", 1, Change("refusal", "get_device"))
        assert course.solved
        assert course.mismatch is not None
        assert not course.served_after_mismatch
        assert memory.stats()["traces"] > 3 * 5
