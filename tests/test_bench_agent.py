"""The bench of a scripted agent: its policy, its sandbox, its tasks, its figures, and one run through a real server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import agent_sandbox
from benchmarks.agent import scripted
from benchmarks.agent_figures import Episode, Pass, figures, repeated, uplift
from benchmarks.agent_policy import (
    DONE,
    GIVEN_UP,
    UNKNOWN_TASK,
    AgentTask,
    Call,
    Tip,
    bash,
    decide,
    failed_in,
    filled,
    goals_of,
    python,
    tips_in,
    tries_in,
    understood,
    write,
)
from benchmarks.agent_sandbox import TOOLS, Sandbox
from benchmarks.agent_tasks import TASKS
from benchmarks.cli import main
from optillm_memory.bench.report import report
from optillm_memory.errors import HostError
from optillm_memory.inject.advice import Advice, as_advice

FAILED, WORKED = "bash: no\nExit code: 1", "Exit code: 0"
PUSH = AgentTask(
    "push",
    "Push `%branch%`.",
    (bash("git pussh %branch%", "git push %branch%", "git push origin %branch%"), python("print(1")),
    "true",
)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """Give a sandbox beside whose folder there is a file."""
    (tmp_path / "outside.txt").write_text("kept")
    (tmp_path / "box").mkdir()
    return Sandbox(tmp_path / "box")


def prompt(*turns: tuple[Call, str], asked: str = "Push `main`.") -> list[dict[str, Any]]:
    """Return a conversation in which these calls were made, with these observations."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "x"}, {"role": "user", "content": asked}]
    for number, (call, observation) in enumerate(turns):
        function = {"name": call.tool, "arguments": json.dumps(call.arguments)}
        made = {"id": f"c{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": None, "tool_calls": [made]})
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": observation})
    return messages


def block(*items: Advice) -> str:
    """Return the block that memory itself would put at the end of a message."""
    rendered = as_advice(items, max_items=9, token_budget=9_999).payload
    assert isinstance(rendered, str)
    return f"\n\n{rendered}"


def advice(action: str, fix: str | None, *, tool: str = "bash", relation: str = "instead") -> Advice:
    """Return one item of advice."""
    field = {"bash": "command", "python": "code"}.get(tool, "")
    return Advice("fix-1", tool, field, action, 2, "it was wrong\nExit code: 0", fix, relation, fix is not None, 0.9)


def next_call(messages: list[dict[str, Any]], task: AgentTask = PUSH) -> str:
    """Return the text of the next call, or the closing answer."""
    decision = decide(messages, TOOLS, [task])
    return decision if isinstance(decision, str) else decision.text


def shell(command: str) -> Call:
    """Return a shell call."""
    return Call("bash", {"command": command})


# -- the policy ------------------------------------------------------------------------------------


def test_candidates_are_tried_in_order_until_one_works() -> None:
    """Without advice the agent tries its candidates, then those of the next goal, then answers that it is done."""
    turns: list[tuple[Call, str]] = []
    for expected, observation in (
        ("git pussh main", FAILED),
        ("git push main", FAILED),
        ("git push origin main", WORKED),
        ("print(1", WORKED),
    ):
        decision = decide(prompt(*turns), TOOLS, [PUSH])
        assert isinstance(decision, Call)
        assert decision.text == expected
        turns.append((decision, observation))
    assert decide(prompt(*turns), TOOLS, [PUSH]) == DONE


def test_names_come_from_the_prompt() -> None:
    """What the request names is what the agent uses, and a request of another kind is not understood."""
    assert next_call(prompt(asked="Push `topic/x`.")) == "git pussh topic/x"
    assert next_call(prompt(asked="Pull `main`.")) == UNKNOWN_TASK
    assert understood("Push `a`, then `b`.", [PUSH]) is None


def test_an_equal_prompt_gets_an_equal_answer() -> None:
    """The agent keeps nothing between requests: asked for a later and again for an earlier prompt, it says the same."""
    early, late = prompt(), prompt((shell("git pussh main"), FAILED))
    assert [next_call(p) for p in (early, late, early, late)] == ["git pussh main", "git push main"] * 2


def test_advice_on_the_last_failure_is_followed() -> None:
    """If something worked instead of the call that just failed, it is done next, whatever the next candidate is."""
    told = FAILED + block(advice("git  pussh main", "git push --all origin"))
    messages = prompt((shell("git pussh main"), told))
    assert next_call(messages) == "git push --all origin"
    assert next_call(prompt((shell("git pussh main"), FAILED))) == "git push main"


def test_advice_on_what_is_about_to_be_done_is_followed() -> None:
    """Where the prompt says that the next candidate fails, what worked instead is done without trying it."""
    asked = "Push `main`." + block(advice("git pussh main", "git push origin main"))
    assert next_call(prompt(asked=asked)) == "git push origin main"


def test_advice_is_followed_once() -> None:
    """Advice that failed here is not followed again: the agent goes on with its candidates."""
    told = FAILED + block(advice("git pussh main", "git shove main"))
    messages = prompt((shell("git pussh main"), told), (shell("git shove main"), FAILED))
    assert next_call(messages) == "git push main"


def test_a_warning_without_a_fix_leads_to_the_next_candidate() -> None:
    """A call that is only known to fail is skipped, and tried last if every other candidate failed too."""
    asked = "Push `main`." + block(advice("git pussh main", None))
    assert next_call(prompt(asked=asked)) == "git push main"
    failed = [(shell(c), FAILED) for c in ("git push main", "git push origin main")]
    assert next_call(prompt(*failed, asked=asked)) == "git pussh main"
    assert next_call(prompt(*failed, (shell("git pussh main"), FAILED), asked=asked)) == GIVEN_UP


def test_other_advice_is_ignored() -> None:
    """Advice on another action, and items of another shape, change nothing."""
    exemplar = "\n\n<agent_memory>\nFrom memory\n1. task\n| git pussh main\n   verified answer\n| rm x\n</agent_memory>"
    asked = "Push `main`." + block(advice("git pussh dev", "git push origin dev")) + exemplar
    assert next_call(prompt(asked=asked)) == "git pussh main"


def test_what_had_to_come_first_is_done_before_the_same_action() -> None:
    """Advice of an action that had to come first is followed by that action and the failed one behind it."""
    asked = "Push `main`." + block(advice("git pussh main", "git init", relation="first"))
    assert next_call(prompt(asked=asked)) == "git init && git pussh main"


def test_code_keeps_its_lines() -> None:
    """Advice of several lines, and of a file to write, is followed to the letter."""
    task = AgentTask("two", "Do `%it%`.", (python("x = %it%"), write("text", "/%it%")), "true")
    code = "if 1:\n    x = 7\n\nprint(x)"
    asked = "Do `7`." + block(advice("x = 7", code, tool="python"))
    decision = decide(prompt(asked=asked), TOOLS, [task])
    assert decision == Call("python", {"code": code})
    path = json.dumps({"content": "text", "path": "/7"})
    better = json.dumps({"content": "text", "path": "seven"})
    asked = "Do `7`." + block(advice(path, better, tool="write_file"))
    decision = decide(prompt((Call("python", {"code": "x = 7"}), WORKED), asked=asked), TOOLS, [task])
    assert decision == Call("write_file", {"content": "text", "path": "seven"})


def test_a_tool_that_is_not_offered_is_not_used() -> None:
    """The agent calls only the tools of the request."""
    assert decide(prompt(), [tool for tool in TOOLS if tool["function"]["name"] != "bash"], [PUSH]) == GIVEN_UP


def test_tips_are_read_in_both_shapes() -> None:
    """Items are read with the error on the first line or after the fix, and with no fix at all."""
    text = (
        "output\n<agent_memory>\nFrom memory: some header.\n"
        "1. this action failed 2 times: git: 'pussh' is not a git command\n| git pussh\n"
        "   what worked instead, as `command` of `bash` (verified, confidence 0.93)\n| git push\n"
        "2. this action failed once\n| a\n| b\n   the error was\n| bad\n</agent_memory>"
    )
    assert tips_in(text) == [Tip("git pussh", "git push", "bash"), Tip("a\nb")]
    assert tips_in("1. this action failed once\n| a") == []


def test_memory_does_not_change_what_was_observed() -> None:
    """A failure stays a failure where the block behind it quotes an exit code of its own."""
    assert tries_in(prompt((shell("x"), FAILED + block(advice("x", None)))))[0].failed
    assert failed_in("Error: no such file")
    assert not failed_in("Exit code: 1 is printed here\nExit code: 0")


def test_every_call_of_the_upstream_has_its_own_id() -> None:
    """The scripted upstream answers equal prompts with equal calls under ids of their own, as providers do."""
    request = {"messages": prompt(asked="Undo the last commit, but keep its changes."), "tools": TOOLS}
    first, second = (scripted(dict(request)).tool_calls[0] for _ in range(2))
    assert first["function"] == second["function"]
    assert first["id"] != second["id"]


# -- the sandbox and the tasks ---------------------------------------------------------------------


def test_calls_are_really_executed(sandbox: Sandbox) -> None:
    """Shell, Python and file writing act in the folder, and show output and exit code as an agent sees them."""
    assert sandbox.run(Call("write_file", {"path": "a.txt", "content": "one"})) == "Wrote 3 characters to a.txt"
    assert sandbox.run(shell("cat a.txt; ls nothing; exit 3")).startswith("onels: ")
    assert sandbox.run(shell("exit 3")) == "Exit code: 3"
    assert sandbox.run(Call("python", {"code": "print(open('a.txt').read())"})) == "one\nExit code: 0"
    assert failed_in(sandbox.run(Call("browse", {"url": "x"})))
    assert sandbox.solved("test -f a.txt")
    assert not sandbox.solved("test -f b.txt")


def test_nothing_is_written_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    """A file is refused where its path leads out of the folder: absolutely, upwards, or through a link."""
    (sandbox.folder / "link").symlink_to(tmp_path)
    for path in (str(tmp_path / "outside.txt"), "../outside.txt", "link/outside.txt"):
        observation = sandbox.run(Call("write_file", {"path": path, "content": "changed"}))
        assert observation == f"Error: permission denied: '{path}' is outside the working directory"
    assert (tmp_path / "outside.txt").read_text() == "kept"


def test_the_environment_is_the_sandboxs_own(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's environment is passed on but its path."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    box = Sandbox(sandbox.folder)
    assert "sk-secret" not in box.run(shell("env"))
    assert box.run(shell('echo "$HOME"; pwd')) == f"{sandbox.folder}\n{sandbox.folder}\nExit code: 0"
    assert os.environ["PATH"] in box.run(shell('echo "$PATH"'))


def test_what_hangs_is_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command past the time limit is killed with its children and shown as a failure."""
    monkeypatch.setattr(agent_sandbox, "TIMEOUT_S", 0.3)
    started = time.monotonic()
    observation = sandbox.run(shell("echo begun; sleep 60 & sleep 60"))
    assert time.monotonic() - started < 10
    assert observation == "begun\nError: the command timed out after 0.3 s\nExit code: 124"


def test_a_setup_that_fails_is_told(sandbox: Sandbox) -> None:
    """A task whose setup fails ends the bench with the reason, in place of a wrong figure."""
    with pytest.raises(HostError, match="setup failed with 4"):
        sandbox.prepare("exit 4")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_tasks_are_real(task: AgentTask, tmp_path: Path) -> None:
    """Every candidate but the last really fails, the last really works, and the check tells solved from not."""
    for number, names in enumerate(task.names):
        (tmp_path / str(number)).mkdir()
        box = Sandbox(tmp_path / str(number))
        box.prepare(filled(task.setup, names) or ":")
        goals = goals_of(task, names)
        assert understood(filled(task.asks, names), TASKS) == goals
        assert sum(len(goal) - 1 for goal in goals) >= 2
        assert not box.solved(filled(task.check, names))
        for goal in goals:
            shown = [box.run(call) for call in goal]
            assert [failed_in(text) for text in shown] == [True] * (len(goal) - 1) + [False], shown
        assert box.solved(filled(task.check, names))


def test_there_are_tasks_enough() -> None:
    """There are at least forty kinds, at least half of them have other names in pass 2, and some have several goals."""
    assert len({task.name for task in TASKS}) == len(TASKS) >= 40
    assert 2 * sum(len(task.names) > 1 for task in TASKS) >= len(TASKS)
    assert sum(len(task.goals) > 1 for task in TASKS) >= 5


# -- the figures -----------------------------------------------------------------------------------


def episode(task: str, failed: str = "", *, held_out: bool = False, solved: bool = True, advised: int = 0) -> Episode:
    """Return an episode with one failed action for each letter, and one that worked."""
    kinds = [f"{task} {kind}" for kind in failed]
    return Episode(
        task, steps=len(kinds) + 1, failed=kinds, held_out=held_out, solved=solved, advised_failed=advised, llm_calls=1
    )


def test_figures_count_what_fell() -> None:
    """The falls are shares of pass 1's own failures and steps; lost tasks are named; the holdout has its interval."""
    first = Pass([episode("a", "xyzv", advised=1), episode("b", "x")], 7, 1.0)
    second = Pass([episode("a", "x"), episode("b", "n", solved=False)], 4, 1.0)
    third = Pass([episode("a", ""), episode("b", "x", held_out=True)], 4, 1.0)
    found = figures(first, second, third, share=0.5)
    assert found["pass_1"]["failed_actions"] == 5
    assert found["pass_1"]["repeated_failing_actions"] == 0
    assert (found["pass_2"]["failed_actions"], found["pass_2"]["repeated_failing_actions"]) == (2, 1)
    assert found["fall_in_repeated_failing_actions"] == 0.75  # one of four; the advised one is not its own
    assert found["fall_in_steps"] == 0.333  # four after six
    assert found["tasks_lost"] == ["b"]
    assert found["holdout"]["held_out"]["fall_in_repeated_failing_actions"] == 0.0
    assert found["holdout"]["with_memory"]["fall_in_repeated_failing_actions"] == 1.0
    assert found["holdout"]["uplift"] == {"repeated_failing_actions": -1.0, "steps": -1.0, "solved": 0.0}
    assert found["holdout"]["interval_95"]["steps"] == [-1.0, -1.0]


def test_a_failure_twice_in_one_episode_is_repeated() -> None:
    """An action that fails a second time in its own episode counts as repeated, though no pass knew it."""
    assert repeated(episode("a", "xxy"), frozenset()) == 1
    assert repeated(episode("a", "xxy"), frozenset({"a x", "a y"})) == 3


def test_uplift_has_an_interval_that_knows_chance() -> None:
    """Equal sides give an interval around zero, a clear difference one that leaves zero out; an empty side none."""
    often = [episode("a", "xyz" if i % 2 else "xy") for i in range(40)]
    seldom = [episode("a", "x" if i % 2 else "") for i in range(40)]
    alike, clear = (uplift(side, often, lambda e: len(e.failed)) for side in (often, seldom))
    assert alike is not None
    assert clear is not None
    assert alike[0] == 0
    assert alike[1][0] < 0 < alike[1][1]
    assert clear[0] == -2.0
    assert clear[1][0] < -2 < clear[1][1] < -1
    assert uplift([], often, lambda e: e.steps) is None


# -- all of it -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.host
@pytest.mark.usefixtures("lean_hosts")
def test_bench_agent_through_a_real_server(tmp_path: Path) -> None:
    """Four tasks through a real server: all solved, fewer failures after a restart, none fewer in the holdout."""
    out = tmp_path / "agent.json"
    done = CliRunner().invoke(
        main, ["agent", "--part", "shell", "--limit", "4", "--holdout", "1", "--output", str(out)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(report({}, {})) < set(found)
    one, two, held = found["pass_1"], found["pass_2"], found["holdout"]["held_out"]
    assert one["solved"] == two["solved"] == held["solved"] == one["tasks"] == 4
    assert one["failed_actions"] >= 12
    assert one["llm_calls"] == one["steps"] + 4
    assert two["llm_calls"] == two["steps"] + 4 + two["extra_llm_calls"]
    assert two["repeated_failing_actions"] < one["failed_actions"] - one["failed_advised_actions"]
    assert two["steps"] < one["steps"] - one["failed_advised_actions"]
    # Every episode of the third run is held out: it fails as often as at first, and its responses say why.
    assert held["repeated_failing_actions"] == 12
    assert held["seen_in_responses"] == 4
    assert found["holdout"]["with_memory"]["tasks"] == 0
    assert found["holdout"]["uplift"]["steps"] is None
