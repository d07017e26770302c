"""The guard: an action that is known to fail is not done again unwarned, and a fix is told where its error is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agents import DONE, ERROR, JSON, RIGHT, WRONG, Agent, call, calling, mend, mistyped, result, results, work
from builders import NOW, assistant, body, lexical_memory, response, settings

from optillm_memory import Memory, Scope
from optillm_memory.conversation.text import BLOCK_BEGIN
from optillm_memory.decide.guard import known_to_fail
from optillm_memory.inject.place import strip
from optillm_memory.inject.render import MARK
from optillm_memory.records import PastAttempt, Step, Verdict

DAY = 86_400.0
PARSED = "parsed it\nExit code: 0"


def past(verdict: Verdict = "failure", at: float = NOW, **fields: Any) -> PastAttempt:
    """Return an earlier try of an action."""
    values = {
        "episode_id": "e0",
        "step_id": "s0",
        "basis": "exit_code",
        "message": "no",
        "output": "",
        "signature": "x",
    }
    return PastAttempt(verdict=verdict, at=at, **{**values, **fields})


def here(*step_ids: str) -> list[Step]:
    """Return the steps of the conversation that asks."""
    return [Step("c", n, "bash", "{}", "out", step_id=i) for n, i in enumerate(step_ids)]


def failing(tries: list[PastAttempt], steps: list[Step] | None = None, *, now: float = NOW) -> list[float]:
    """Return when the failures were that speak against an action in episode `e1`."""
    found = known_to_fail(tries, steps or [], episode_id="e1", now=now, expiry_s=7 * DAY)
    return [p.at for p in found]


# -- what speaks against an action -----------------------------------------------------------------


def test_failures_speak_until_it_worked() -> None:
    """Failures since the last success count, latest first, in whatever order they come; unknown tries do not."""
    one, two = past(), past(at=NOW + 2)
    assert failing([]) == failing([past("unknown")]) == failing([past("success")]) == []
    assert failing([one, two]) == failing([two, one]) == [NOW + 2, NOW]
    assert failing([one, past("success", NOW + 1), two]) == [NOW + 2]
    assert failing([two, past("success", NOW + 3)]) == []
    assert failing([one, past("unknown", NOW + 9)]) == [NOW]


def test_failures_expire() -> None:
    """After the days that were set a failed action may be tried again."""
    assert failing([past()], now=NOW + 7 * DAY) == [NOW]
    assert failing([past()], now=NOW + 7 * DAY + 1) == []
    assert failing([past(), past(at=NOW + DAY)], now=NOW + 7 * DAY + 1) == [NOW + DAY]


@pytest.mark.parametrize(
    "fields",
    [{"basis": "test_summary"}, {"basis": "compiler"}, {"basis": "http"}, {"signature": "http|503"},
     {"signature": "Tool|timeout|x"}, {"signature": "curl|7"}],
)  # fmt: skip
def test_what_may_pass_the_next_time_is_not_blamed(fields: JSON) -> None:
    """Tests and builds that failed, servers and time limits say nothing of the action."""
    assert failing([past(**fields)]) == []
    assert failing([past(**fields), past(at=NOW - 1)]) == [NOW - 1]


def test_another_state_is_another_try() -> None:
    """After a failure of its own an episode may repeat the action once it did something else, and not before."""
    own = past(episode_id="e1", step_id="mine")
    assert failing([own], here("a", "mine")) == [NOW]
    assert failing([own], here("mine", "b")) == []
    assert failing([own, past(at=NOW - 1)], here("mine", "b")) == []
    assert failing([past(step_id="mine")], here("mine", "b")) == [NOW]
    assert failing([own], here("a", "b")) == failing([own]) == [NOW]


# -- through a memory ------------------------------------------------------------------------------


def about_to(memory: Memory, command: Any, agent: Agent | None = None, **keywords: Any) -> tuple[Agent, bool, Any]:
    """Let an agent be about to do something; return it, whether to ask again, and the turn."""
    agent = agent or Agent(memory, "publish it now", **keywords)
    turn, again = memory.guard(agent.begin(), response(calling(command)))
    return agent, again, turn


def test_a_repeated_failure_is_stopped_with_what_worked(tmp_path: Path) -> None:
    """Another episode that is about to repeat a failing action is told what failed, how often, and what worked."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        mend(memory, task="publish it again")
        agent, again, turn = about_to(memory, WRONG)
        assert again
        told = turn.messages[-1]["content"]
        assert told.startswith("publish it now\n\n" + BLOCK_BEGIN)
        assert "failed 2 times" in told
        assert f"{MARK}{WRONG}\n" in told
        assert f"{MARK}{RIGHT}\n" in told
        assert "verified" in told
        assert turn.action == "inject"
        assert [(i.kind, i.suggestion) for i in turn.injected] == [("fix", RIGHT)]
        assert turn.messages[:-1] == agent.messages[:-1]
        assert memory.guarded(turn, response(calling(RIGHT)))
        assert memory.guarded(turn, response("I cannot."))
        for bad in (calling(WRONG), calling(call({"command": f"{WRONG} ", "description": "x"})), calling(RIGHT, WRONG)):
            assert not memory.guarded(turn, response(bad))
        assert not memory.guarded(turn, response(""))
        assert not memory.guarded(turn, {})
        assert not memory.guarded(turn, response("one", "two"))


@pytest.mark.parametrize(
    "answer",
    [calling(RIGHT), calling(WRONG.replace("git", "hg")), assistant(f"```bash\n{WRONG}\n```"), assistant(""),
     {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "other", "arguments": "{"}}]}],
)  # fmt: skip
def test_other_answers_go_out(tmp_path: Path, answer: JSON) -> None:
    """Another action, words, and calls that are no JSON are not asked for again."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        turn = Agent(memory).begin()
        assert memory.guard(turn, response(answer)) == (turn, False)


def test_one_of_several_calls_is_enough(tmp_path: Path) -> None:
    """An answer is asked for again where one of its calls repeats a failure, and only that one is named."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        turn = Agent(memory).begin()
        told, again = memory.guard(turn, response(calling("ls -la", call({"timeout": 3, "command": "ls"}), WRONG)))
        assert again
        assert len(told.injected) == 1
        assert "ls -la" not in told.messages[-1]["content"]
        assert memory.guard(turn, response(calling(WRONG), calling(WRONG))) == (turn, False)
        assert memory.guard(turn, {"choices": []}) == memory.guard(turn, {}) == (turn, False)


def test_without_a_fix_the_failure_alone_is_told(tmp_path: Path) -> None:
    """What failed and was never mended is told as such; its repetition in the same conversation is, too."""
    with lexical_memory(tmp_path) as memory:
        work(memory, [(WRONG, ERROR)])
        agent, again, turn = about_to(memory, WRONG)
        assert again
        (item,) = turn.injected
        assert (item.kind, item.suggestion) == ("failure", None)
        assert item.memory_id.startswith("failure-")
        assert "worked" not in turn.messages[-1]["content"].partition("instructions")[2]
        agent.act(WRONG, ERROR)
        assert about_to(memory, WRONG, agent)[1]
        agent.act("git fetch", "")
        assert not about_to(memory, WRONG, agent)[1]


def test_what_had_to_come_first_and_has_come_is_no_reason_to_warn(tmp_path: Path) -> None:
    """The action that failed for want of another is not held back after that other was done, nor told of itself."""
    app, pip = "python app.py", "pip install yaml"
    trace = (
        "Traceback (most recent call last):\n  File \"a\"\nModuleNotFoundError: No module named 'yaml'\nExit code: 1"
    )
    with lexical_memory(tmp_path) as memory:
        work(memory, [(app, trace), (pip, DONE), (app, trace)], success=True)
        work(memory, [(app, trace), (pip, DONE), (app, DONE)], success=True)
        work(memory, [(app, trace)])
        _, again, turn = about_to(memory, app)
        assert again
        assert [i.suggestion for i in turn.injected] == [pip]
        assert "the same action after this" in turn.messages[-1]["content"]
        prepared = Agent(memory, "start it")
        prepared.act(pip, DONE)
        assert not about_to(memory, app, prepared)[1]


def test_a_suggestion_to_do_the_same_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is suggested is the failing action itself, or was tried here, only the failure is told."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        (known,) = memory.store.fixes.known_fixes(Scope("local"), "bash", "", environment="{}", episode_id="")
        proposed = [f" {WRONG}"]
        monkeypatch.setattr(memory._adviser, "_suggested", lambda *_: [(known, proposed[0], 0.9)])
        agent, again, turn = about_to(memory, WRONG)
        assert again
        assert [(i.kind, i.suggestion) for i in turn.injected] == [("failure", None)]
        agent.act(WRONG, ERROR)
        assert agent.begin().injected == ()
        proposed[0] = RIGHT
        assert [i.suggestion for i in agent.begin().injected] == [RIGHT]


def test_a_fix_of_little_worth_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fix whose value is near nothing in this environment is still an example like others."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        known = memory.store.fixes.known_fixes
        worthless = lambda *a, **k: [replace(f, value=0.001) for f in known(*a, **k)]  # noqa: E731
        monkeypatch.setattr(memory.store.fixes, "known_fixes", worthless)
        assert about_to(memory, WRONG)[1]


def test_settings_of_the_guard(tmp_path: Path) -> None:
    """`off` says nothing, `advise` says it in the next request where it is not settled by then, modes are kept."""
    with lexical_memory(tmp_path, guard="off") as memory:
        mend(memory)
        assert not about_to(memory, WRONG)[1]
    with lexical_memory(tmp_path, guard="retry") as memory:
        for mode in ("write", "off"):
            turn = memory.begin({**Agent(memory).body(), "agent_memory": {"mode": mode}})
            assert memory.guard(turn, response(calling(WRONG))) == (turn, False)
        tight = memory.begin({**Agent(memory).body(), "agent_memory": {"token_budget": 70}})
        told, again = memory.guard(tight, response(calling(WRONG)))
        assert not again
        assert told.skipped[-1]["reason"] == "over_budget"
    with lexical_memory(tmp_path, guard="advise") as memory:
        for output, expected in ((ERROR, 1), ("?", 1), (DONE, 0)):
            agent, again, turn = about_to(memory, WRONG, options={"mode": "read"})
            assert (again, turn.injected) == (False, ())
            agent.answered(calling(call(WRONG, "c1")), turn)
            agent.messages.append(result("c1", output))
            later = agent.begin()
            assert [i.suggestion for i in later.injected] == [RIGHT] * expected
            assert str(later.messages[-1]).count(WRONG) == expected
            assert agent.begin().injected == (later.injected if output == ERROR else ())


def test_days_of_the_setting(tmp_path: Path) -> None:
    """With a clock further on than the days that were set the action goes out."""
    now = [NOW]
    with Memory(settings(tmp_path, guard_expiry_days=2.0), clock=lambda: now[0]) as memory:
        mend(memory)
        now[0] += 2 * DAY - 5
        assert about_to(memory, WRONG)[1]
        now[0] += 10
        assert not about_to(memory, WRONG)[1]


def test_another_scope_and_environment_know_nothing(tmp_path: Path) -> None:
    """Neither failures nor fixes of another tenant, namespace, user, agent or (failures) environment are told."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        others: list[JSON] = [{"keywords": {"tenant": "t"}}]
        others += [{"options": {k: "x"}} for k in ("namespace", "user_id", "agent_id")]
        for other in others:
            agent, again, _ = about_to(memory, WRONG, **other)
            assert not again, other
            agent.act(WRONG, ERROR)
            assert agent.begin().injected == (), other
        assert not about_to(memory, WRONG, options={"tags": {"os": "x"}})[1]
        assert about_to(memory, WRONG)[1]
        assert memory.store.fixes.past_attempts(Scope("none"), "x", environment="{}") == []


def test_a_held_out_episode_gets_neither(tmp_path: Path) -> None:
    """Held-out episodes get no fix and no retry; their action says holdout where there was something to say."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
    with lexical_memory(tmp_path, holdout=1.0) as memory:
        agent, again, turn = about_to(memory, WRONG, options={"episode_id": "e"})
        assert (again, turn.action, turn.injected, turn.messages) == (False, "holdout", (), agent.messages)
        assert about_to(memory, RIGHT, agent)[2].action == "plain"
        agent.act(WRONG, ERROR)
        held = agent.begin()
        assert (held.action, held.injected, held.messages) == ("holdout", (), agent.messages)
        agent.options["token_budget"] = 1
        assert (agent.begin().action, agent.begin().held_out) == ("plain", True)
        agent.answered(calling("ls"), held)
        assert memory.trace(held.trace_id)["action"] == "holdout"
        assert about_to(memory, WRONG, Agent(memory, options={"token_budget": 1}))[2].action == "plain"


# -- advice on results -----------------------------------------------------------------------------


def test_the_fix_is_told_at_the_error(tmp_path: Path) -> None:
    """The next request after the error holds the fix with other words, at its tail, and every later one does again."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        agent = Agent(memory, "record the change")
        agent.act("git comit -m x", mistyped("comit", "commit"))
        turn = agent.begin()
        assert [i.suggestion for i in turn.injected] == ["git commit -m x"]
        assert turn.messages[:-1] == agent.messages[:-1]
        assert turn.messages[-1]["content"].startswith(mistyped("comit", "commit") + "\n\n" + BLOCK_BEGIN)
        agent.answered(calling(call("git commit -m x", "c1")), turn)
        agent.messages.append(result("c1", DONE))
        later = agent.begin()
        assert later.messages[: len(turn.messages)] == turn.messages
        assert [i.suggestion for i in later.injected] == [None]


def test_a_fix_that_is_told_twice_is_followed_twice(tmp_path: Path) -> None:
    """Where one fix mends two actions of a conversation the later suggestion counts as well as the first."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        agent = Agent(memory)
        for word, meant in (("comit", "commit"), ("fecth", "fetch")):
            agent.act(f"git {word}", mistyped(word, meant))
            turn = agent.act(f"git {meant}", DONE)
            assert [i.suggestion for i in turn.injected] == [f"git {meant}"]
        agent.close()
        told = {i.memory_id for t in agent.turns for i in t.injected}
        assert len(told) == 1
        assert memory.memory(told.pop()).used_successes == 2


def test_a_request_that_comes_again_later_counts_its_failure_once(tmp_path: Path) -> None:
    """What is recorded of the very step that is asked about is not one more failure of it."""
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory)
        agent.act(WRONG, ERROR)
        agent.close()
        mend(memory)
        agent.messages.pop()
        again = agent.begin()
        assert "failed 2 times" in again.messages[-1]["content"]


def test_several_failing_results_of_one_request(tmp_path: Path) -> None:
    """Each failing result gets its fix, in one block; what this conversation has tried is not proposed to it."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        work(memory, [("npm instal", "x: npm: command not found\nExit code: 127"), ("npm install", DONE)], success=True)
        agent = Agent(memory)
        answer = calling(WRONG, "ls", "git comit -m x")
        turn = agent.answered(answer)
        agent.messages += results(answer, ERROR, "a.py", mistyped("comit", "commit"))
        turn = agent.begin()
        told = str(turn.messages[-1]["content"])
        assert (told.count(BLOCK_BEGIN), told.count("this action failed")) == (1, 2)
        assert {i.suggestion for i in turn.injected} == {RIGHT, "git commit -m x"}
        tried = Agent(memory)
        tried.act(RIGHT, "fatal: unable to access: denied\nExit code: 128")
        tried.act(WRONG, ERROR)
        assert RIGHT not in [i.suggestion for i in tried.begin().injected]


@pytest.mark.parametrize("content", [[{"type": "text", "text": ERROR}], ERROR])
@pytest.mark.parametrize("interrupted", [False, True])
def test_results_of_every_shape_take_advice(tmp_path: Path, content: Any, interrupted: bool) -> None:
    """Text parts get the block as one more part, also where the user spoke between the call and its result."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        answer = calling(WRONG)
        words = [{"role": "user", "content": "hurry"}] if interrupted else []
        request = body("go", answer, *words, *results(answer, content), tools=[])
        turn = memory.begin(request)
        assert [i.suggestion for i in turn.injected] == [RIGHT]
        assert strip(turn.messages, turn.placements) == request["messages"]
        if isinstance(content, list):
            assert turn.messages[-1]["content"][:-1] == content


def test_the_same_request_again_is_told_the_same_once(tmp_path: Path) -> None:
    """A client that sends a request again gets the block that it got, and no second one from the guard."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        agent = Agent(memory, options={"episode_id": "e"})
        turn, again = memory.guard(agent.begin(), response(calling(WRONG)))
        assert again
        memory.finish(turn, response(calling(RIGHT)))
        repeated = agent.begin()
        assert repeated.messages == turn.messages
        after, again = memory.guard(repeated, response(calling(WRONG)))
        assert not again
        assert after.messages == turn.messages
        assert after.skipped[-1] == {"reason": "advised_already"}


def test_advice_and_guard_of_one_request_are_one_block_within_the_budget(tmp_path: Path) -> None:
    """A fix at the error and a warning on the answer to it stand together, come again, and share the tokens."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        agent = Agent(memory, "record the change")
        agent.act("git comit -m x", mistyped("comit", "commit"))
        turn, again = memory.guard(agent.begin(), response(calling(WRONG)))
        assert again
        assert len(turn.placements) == len(turn.fresh) == 1
        assert strip(turn.messages, turn.placements) == agent.messages
        assert {i.suggestion for i in turn.injected} == {"git commit -m x", RIGHT}
        agent.answered(calling(call(RIGHT, "c9")), turn)
        agent.messages.append(result("c9", DONE))
        assert agent.begin().messages[: len(turn.messages)] == turn.messages
        tight = Agent(memory, "record the change", options={"token_budget": 110 + turn.injected[0].tokens})
        tight.act("git comit -m x", mistyped("comit", "commit"))
        first = tight.begin()
        assert first.injected
        assert not memory.guard(first, response(calling(WRONG)))[1]
