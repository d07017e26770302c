"""Fixes: what an episode's steps show to have worked, and what speaks for and against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agents import DONE, ERROR, RIGHT, WRONG, Agent, attempt, chain, fixes, judge, mend, work
from builders import SCOPE, assistant, feedback, lexical_memory

from optillm_memory.conversation.actions import Action, action_of
from optillm_memory.conversation.observation import Result, read
from optillm_memory.learn.attempts import Attempt, inferred_id, message_of, shortened
from optillm_memory.learn.fixes import WINDOW, Fix, advice_evidence, demonstrated_fix, fix_status, mine, value_in
from optillm_memory.records import Scope

TRACEBACK = (
    "Traceback (most recent call last):\n  File \"app.py\"\nModuleNotFoundError: No module named 'yaml'\nExit code: 1"
)
DENIED = "fatal: unable to access: denied\nExit code: 128"


def mined(*attempts: Attempt) -> list[tuple[str, str, str, str]]:
    """Return (failing action, relation, what worked, step that worked) of what the steps of one branch show."""
    return [(f.action.text, f.relation, f.text, a.step_id) for f, a in mine(chain(*attempts))]


# -- mining ----------------------------------------------------------------------------------------


def test_the_next_success_of_the_same_intent_is_the_fix() -> None:
    """A like action of the same tool that worked mends the failing one, past others; a stranger does not."""
    wrong, right = attempt(WRONG, "failure"), attempt(RIGHT, "success")
    assert mined(wrong, right) == [(WRONG, "instead", RIGHT, RIGHT)]
    assert mined(wrong, attempt("ls", "success"), attempt("make", "failure"), right) == [
        (WRONG, "instead", RIGHT, RIGHT)
    ]
    twice = mined(wrong, attempt("git puhs origin main", "failure"), right)
    assert [(a, b) for a, _, b, _ in twice] == [(WRONG, RIGHT), ("git puhs origin main", RIGHT)]
    for stranger in (
        attempt("make all", "success"), attempt(RIGHT, "success", tool="other"), attempt(RIGHT, "failure"),
        attempt(RIGHT, "success", field="query"), attempt(" ", "success"),
    ):  # fmt: skip
        assert mined(wrong, stranger) == []
    assert mined(attempt(" ", "failure"), right) == mined(attempt(WRONG, "success"), right) == []
    assert mined(attempt(WRONG, "unknown"), right) == []
    ((fix, _),) = mine(chain(wrong, right))
    assert (fix.output, fix.signature) == (wrong.output, "sig")


def test_silence_is_success_only_where_nothing_like_it_is_tried_again() -> None:
    """A like action that printed nothing telling worked, unless the agent came back to it."""
    wrong, quiet = attempt(WRONG, "failure"), attempt(RIGHT, "unknown")
    assert mined(wrong, quiet, attempt("make all")) == [(WRONG, "instead", RIGHT, RIGHT)]
    again = attempt("git push -f origin main", "success")
    assert mined(wrong, quiet, again) == [(WRONG, "instead", again.action.text, again.step_id)]


@pytest.mark.parametrize(
    ("later", "output", "is_fix"),
    [
        ("python test_a.py", "", False), ("python3 -q test_a.py", "", False), ("python test_a.py", "OK", True),
        ("python test_a.py", "<returncode>0</returncode>\n<output>\n</output>", False),
        ("python test_a.py", "Exit code: 0\nStdout:\n\nStderr:\n", False),
        ("python test_a.py", "<returncode>0</returncode>\n<output>\nOK\n</output>", True),
        ("pytest test_a.py", "", True), ("python3 -m pytest test_a.py", "", True),
    ],
)  # fmt: skip
def test_a_test_file_without_what_runs_it_tests_nothing(later: str, output: str, *, is_fix: bool) -> None:
    """A file of tests that is run as a program prints nothing: that is no success of the tests."""
    failed = attempt("python -m pytest test_a.py", "failure", output="No module named pytest")
    found = mined(failed, attempt(later, "success", output=output), attempt("make all"))
    assert [text for _, _, text, _ in found] == [later] * is_fix


def test_a_search_in_a_file_is_no_way_to_run_it() -> None:
    """The same file in another program: to search in it is not what a failing program was for."""
    failed = attempt("python3 -m pytest test_a.py", "failure", output="No module named pytest")
    assert mined(failed, attempt('grep -n "lim" test_a.py', "success")) == []
    missing = attempt("rg -n lim test_a.py", "failure", output="rg: command not found")
    assert mined(missing, attempt("grep -n lim test_a.py", "success")) != []


def test_what_was_done_before_the_same_action_worked() -> None:
    """The same action that works after others needed them `first`; looking, failing and much else tell nothing."""
    wrong, right = attempt("python app.py", "failure"), attempt("python app.py", "success", step_id="again")
    pip, make = attempt("pip install yaml", "success"), attempt("export A=1")
    first = [("python app.py", "first", "pip install yaml", "again")]
    assert mined(wrong, pip, right) == first
    assert mined(wrong, attempt("cat app.py 2>/dev/null"), attempt("npm i x", "failure"), pip, right) == first
    assert mined(wrong, attempt("grep -rn yaml ."), attempt("rg yaml"), pip, right) == first
    assert mined(wrong, attempt("grep -rn yaml ."), right) == []
    assert mined(wrong, pip, make, right) == [("python app.py", "first", "pip install yaml && export A=1", "again")]
    for edit in (
        "cat > .env <<E\nA=1\nE",
        "sed -i s/a/b/ app.py",
        "echo A=1 > .env",
        "cd a && patch -p1 x",
        "python fix.py",
    ):
        assert mined(wrong, attempt(edit), make, right) == []
    assert mined(wrong, right) == mined(wrong, attempt("ls"), right) == []
    assert mined(wrong, pip, attempt("a"), attempt("b"), attempt("c"), right) == []
    again = attempt("python app.py", "failure", step_id="no")
    assert mined(wrong, pip, again, right) == []


def test_a_note_tells_what_other_tools_did() -> None:
    """A test that fails and passes after an edit is a note of the edit; no like test run is taken for a fix of it."""
    wrong = attempt("pytest -q test_app.py", "failure", basis="test_summary")
    right = replace(wrong, verdict="success", step_id="again")
    edit = attempt('{"path": "app.py", "text": "1 + 1"}', tool="edit", field="")
    note = 'edit: {"path": "app.py", "text": "1 + 1"}'
    assert mined(wrong, edit, right) == [("pytest -q test_app.py", "note", note, "again")]
    assert mined(wrong, attempt("pytest -q test_b.py", "success")) == []
    assert mined(replace(wrong, basis="exit_code"), attempt("pytest -q test_b.py", "success"))
    long = replace(edit, action=Action("edit", "", "x" * 5_000))
    ((_, relation, text, _),) = mined(wrong, long, right)
    assert (relation, len(text) < 1_100) == ("note", True)
    other = replace(edit, step_id="other", action=Action("edit", "", '{"path": "b.py"}'))
    failing = attempt('{"path": "c.py"}', "failure", tool="edit", field="")
    fixed = replace(failing, verdict="success", step_id="again")
    assert mined(failing, edit, other, fixed)[0][1] == "note"


def test_only_so_far_is_a_fix_looked_for() -> None:
    """What worked within the window is the fix; one step further on it is something else."""
    others = [attempt("make all", step_id=f"o{n}") for n in range(WINDOW)]
    wrong, right = attempt(WRONG, "failure"), attempt(RIGHT, "success")
    assert mined(wrong, *others[:-1], right) == [(WRONG, "instead", RIGHT, RIGHT)]
    assert mined(wrong, *others, right) == []


def test_a_fix_is_on_the_branch_of_its_failure() -> None:
    """What was done on another branch mends nothing here; of two branches after a failure the later one counts."""
    root, wrong = attempt("ls"), attempt(WRONG, "failure", parent_id="ls")
    right = attempt(RIGHT, "success", parent_id="ls")
    assert mine([root, wrong, right]) == []
    old = attempt("git push up", "success", parent_id=WRONG)
    new = attempt(RIGHT, "success", parent_id=WRONG)
    assert [f.text for f, _ in mine([root, wrong, old, new])] == [RIGHT]


def test_what_was_asked_for_at_once_is_no_answer_to_a_failure() -> None:
    """Of parallel calls none mends another; the same words in another folder are no other action."""
    wrong = attempt("cat a.py", "failure", asked_by="t1")
    beside, later = attempt("cat b.py", asked_by="t1"), attempt("cat c.py", asked_by="t2")
    assert mined(wrong, beside) == []
    assert mined(wrong, beside, later) == [("cat a.py", "instead", "cat c.py", "cat c.py")]
    assert mined(wrong, replace(beside, asked_by="")) != []
    here, there = (
        action_of("bash", '{"command": "make", "cwd": "/a"}'),
        action_of("bash", '{"command": "make", "cwd": "/b"}'),
    )
    failed = replace(attempt("make", "failure"), action=here)
    assert mined(failed, replace(attempt("make", "success", step_id="x"), action=there)) == []


def test_one_fix_is_one_memory_in_a_scope() -> None:
    """White space, folders and time limits do not split a fix; scope, error, relation and words do."""
    fix = Fix(Action("bash", "command", WRONG), "o", "sig", "instead", RIGHT)
    same = [
        replace(fix, action=Action("bash", "command", f" {WRONG}", '{"cwd": "/"}')),
        replace(fix, text=f"{RIGHT}\n"),
    ]
    assert {f.memory_id(SCOPE) for f in [fix, *same]} == {fix.memory_id(SCOPE)}
    others = [
        fix.memory_id(Scope("b")), replace(fix, signature="x").memory_id(SCOPE),
        replace(fix, text="x").memory_id(SCOPE), replace(fix, relation="first").memory_id(SCOPE),
        replace(fix, action=Action("b", "command", WRONG)).memory_id(SCOPE),
    ]  # fmt: skip
    assert len({*others, fix.memory_id(SCOPE)}) == 6


# -- demonstrations --------------------------------------------------------------------------------

FAILED = feedback(False, feedback_id="e", evidence={"command": WRONG, "exit_code": 1, "output": "boom"})
SHOWN = feedback(RIGHT, feedback_id="d", metric="demonstration", source="human")
BANG = feedback("bang", metric="error", feedback_id="x")
BROKE = attempt(WRONG, "failure")


@pytest.mark.parametrize(
    ("rows", "attempts", "answer", "expected"),
    [
        ([FAILED, SHOWN], [], None, ("shell", "", WRONG, "boom", "instead", RIGHT)),
        ([SHOWN], [BROKE], None, ("bash", "command", WRONG, BROKE.output, "instead", RIGHT)),
        ([FAILED, SHOWN], [BROKE], None, ("bash", "command", WRONG, "boom", "instead", RIGHT)),
        ([FAILED, SHOWN], [attempt("make", "failure")], None, ("bash", "command", WRONG, "boom", "instead", RIGHT)),
        ([replace(SHOWN, value="1\n2\n3"), FAILED], [], None, ("shell", "", WRONG, "boom", "note", "1\n2\n3")),
        ([BANG, SHOWN], [], "git psh", ("shell", "", "git psh", "bang", "instead", RIGHT)),
        ([SHOWN], [], "git psh", None),
        ([SHOWN], [attempt(WRONG, "success")], "git psh", None),
        ([FAILED], [attempt(WRONG, "failure")], None, None),
        ([FAILED, replace(SHOWN, value=f"{WRONG} ")], [], None, None),
        ([BANG, SHOWN], [], None, None),
    ],
)  # fmt: skip
def test_a_demonstration_on_a_failure_is_a_fix(rows: Any, attempts: Any, answer: Any, expected: Any) -> None:
    """What failed is the evidence's command, else the action that failed, else the answer; without failure no fix."""
    found = demonstrated_fix(rows, attempts, answer)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        fix, demonstration = found
        action = fix.action
        assert (action.tool, action.field, action.text, fix.output, fix.relation, fix.text) == expected
        assert demonstration.feedback_id == "d"


def test_a_demonstration_acts_and_is_withdrawn_with_it(tmp_path: Path) -> None:
    """The right command shown on a trace whose command failed is a verified fix until it is taken back."""
    for source, status in (("human", "verified"), ("llm", "candidate")):
        with lexical_memory(tmp_path / source) as memory:
            agent = Agent(memory)
            failing = agent.act(WRONG, ERROR)
            agent.close("I gave up.")
            said = {"metric": "demonstration", "source": source, "feedback_id": "shown"}
            judge(memory, failing, success=RIGHT, **said)
            assert fixes(memory) == [(WRONG, RIGHT, status)]
            judge(memory, failing, success=None, **said)
            assert fixes(memory) == []
            before = memory.store.derived()
            memory.rebuild()
            assert memory.store.derived() == before


def test_a_demonstration_for_an_episode_speaks_of_what_failed_in_it(tmp_path: Path) -> None:
    """Shown for the whole episode, before or after its traces, it mends the action that failed."""
    for early in (False, True):
        with lexical_memory(tmp_path / str(early)) as memory:
            said = {"episode_id": "e", "metric": "demonstration", "value": RIGHT, "source": "human"}
            if early:
                memory.feedback(said)
            work(memory, [(WRONG, ERROR)], episode_id="e")
            if not early:
                memory.feedback(said)
            assert fixes(memory) == [(WRONG, RIGHT, "verified")]


# -- statuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tallies", "status"),
    [
        ([(1, 0, 0, 0)], "verified"), ([(2, 1, 0, 0)], "verified"), ([(1, 1, 0, 0)], "quarantined"),
        ([(1, 2, 9, 0)], "quarantined"), ([(0, 0, 1, 0)], "candidate"), ([(0, 0, 1, 1)], "quarantined"),
        ([(0, 1, 1, 0)], "quarantined"), ([(0, 1, 2, 0)], "candidate"), ([(0, 0, 0, 3)], "withdrawn"),
        ([], "withdrawn"),
        ([(1, 1, 0, 0), (1, 0, 0, 0)], "verified"), ([(0, 5, 0, 0), (1, 0, 0, 0)], "verified"),
        ([(0, 0, 0, 5), (0, 0, 1, 0)], "candidate"),
    ],
)  # fmt: skip
def test_the_status_of_a_fix(tallies: Any, status: str) -> None:
    """Verified by more successes than failures in some environment, a candidate on inferred evidence alone."""
    assert fix_status(tallies) == status


def test_value_falls_with_failures_and_most_at_home() -> None:
    """A failure costs where it happened and little elsewhere; verified evidence weighs more than inferred."""
    assert value_in("a", {}) == pytest.approx(2 / 3)
    good = value_in("a", {"a": (2, 0, 0, 0)})
    assert value_in("a", {"a": (2, 0, 0, 0), "b": (0, 4, 0, 0)}) == pytest.approx(4 / 6)
    assert value_in("b", {"a": (2, 0, 0, 0), "b": (0, 4, 0, 0)}) == pytest.approx(2.5 / 7.5)
    assert (
        good
        > value_in("a", {"a": (0, 0, 2, 0)})
        > value_in("a", {"a": (0, 0, 2, 1)})
        > value_in("a", {"a": (0, 0, 2, 2)})
    )
    assert value_in("a", {"a": (0, 0, 0, 1)}) > value_in("a", {"a": (0, 1, 0, 0)})


def test_candidate_until_code_or_a_human_confirms_it(tmp_path: Path) -> None:
    """What the tools' output suggests is a candidate; verified success makes it act, taking that back unmakes it."""
    with lexical_memory(tmp_path) as memory:
        agent = mend(memory, success=None)
        last = agent.turns[-1]
        assert fixes(memory) == [(WRONG, RIGHT, "candidate")]
        judge(memory, last, source="llm")
        assert fixes(memory) == [(WRONG, RIGHT, "candidate")]
        for number, about in enumerate(({"trace_id": last.trace_id}, {"episode_id": last.episode_id})):
            said = {"metric": "success", "value": True, "source": "human", "feedback_id": f"f{number}", **about}
            memory.feedback(said)
            assert fixes(memory) == [(WRONG, RIGHT, "verified")]
            memory.feedback({"feedback_id": f"f{number}", "value": None})
            assert fixes(memory) == [(WRONG, RIGHT, "candidate")]
        judge(memory, last, success=False, feedback_id="no")
        assert fixes(memory) == [(WRONG, RIGHT, "candidate")]


def test_retracting_what_was_read_off_an_observation_unmakes_the_fix(tmp_path: Path) -> None:
    """Feedback that memory inferred can be taken back: the step's outcome is unknown, and its fix is gone."""
    with lexical_memory(tmp_path) as memory:
        agent = mend(memory)
        first = memory.trace(agent.turns[0].trace_id)
        (said,) = first["feedback"]
        assert (said["source"], said["value"], said["evidence"]["command"]) == ("inferred", False, WRONG)
        assert said["feedback_id"] == inferred_id(SCOPE, first["episode_id"], first["steps"][0]["step_id"])
        assert first["steps"][0]["verdict"] == "failure"
        memory.feedback({"feedback_id": said["feedback_id"], "value": None})
        after = memory.trace(agent.turns[0].trace_id)
        assert after["steps"][0]["verdict"] == "unknown"
        assert fixes(memory) == []
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before
        assert fixes(memory) == []


def test_the_same_words_in_another_episode_are_not_judged(tmp_path: Path) -> None:
    """Of two episodes that went alike each is judged by what it saw itself."""
    with lexical_memory(tmp_path) as memory:
        one, other = (Agent(memory, options={"episode_id": name}) for name in ("e1", "e2"))
        asked = [agent.answered(assistant(f"```bash\n{WRONG}\n```")) for agent in (one, other)]
        one.messages.append({"role": "user", "content": f"Observation:\n{ERROR}"})
        one.close()
        assert [memory.trace(t.trace_id)["outcome"]["verdict"] for t in asked] == ["failure", "unknown"]
        other.messages.append({"role": "user", "content": f"Observation:\n{ERROR}"})
        other.close()
        assert [memory.trace(t.trace_id)["outcome"]["verdict"] for t in asked] == ["failure", "failure"]


def test_feedback_that_waited_for_a_trace_without_steps_verifies(tmp_path: Path) -> None:
    """Success told before its trace is there, which brings no new step, verifies what the episode's steps show."""
    with lexical_memory(tmp_path) as memory:
        agent = mend(memory, success=None)
        agent.messages.append({"role": "user", "content": "thanks"})
        turn = agent.begin()
        said = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
        assert memory.feedback(said)[0].status == "pending"
        assert fixes(memory) == [(WRONG, RIGHT, "candidate")]
        agent.answered(assistant("You are welcome."), turn)
        assert fixes(memory) == [(WRONG, RIGHT, "verified")]


# -- followed advice -------------------------------------------------------------------------------


def test_advice_that_was_followed_is_evidence() -> None:
    """Doing what a fix said counts for or against it; other actions, silence and what tests say do not."""
    advice = {"t": [("fix-1", RIGHT)]}

    def said(verdict: Any, text: str = RIGHT, **fields: Any) -> list[tuple[str, bool]]:
        made = attempt(text, verdict, **{"trace_id": "t", **fields})
        return [(e.memory_id, e.success) for e in advice_evidence([made], advice)]

    assert said("success") == said("success", f"{RIGHT} ") == [("fix-1", True)]
    assert said("failure") == [("fix-1", False)]
    for other in (
        said("unknown"),
        said("failure", basis="test_summary"),
        said("success", "ls"),
        said("success", trace_id="u"),
    ):
        assert other == []


def test_following_confirms_or_weakens_a_fix(tmp_path: Path) -> None:
    """A fix that worked where it was told has more behind it; one that failed there as often is quarantined."""
    with lexical_memory(tmp_path) as memory:
        mend(memory, success=None)
        mend(memory, success=None)
        told = Agent(memory, "publish it now")
        told.act(WRONG, ERROR)
        turn = told.act(RIGHT, DONE)
        assert [i.suggestion for i in turn.injected] == [RIGHT]
        told.close(success=True)
        (fix,) = [m for m in memory.store.list_memories(None) if m.kind == "fix"]
        assert (fix.status, fix.successes, fix.used_successes) == ("verified", 1, 2)
    with lexical_memory(tmp_path / "b") as memory:
        mend(memory, success=None)
        mend(memory, success=None)
        for _ in range(2):
            work(memory, [(WRONG, ERROR), (RIGHT, DENIED)], task="publish it now")
        assert fixes(memory) == [(WRONG, RIGHT, "quarantined")]
        third = Agent(memory, "publish once more")
        third.act(WRONG, ERROR)
        assert third.begin().injected == ()


def test_a_followed_failure_is_inferred_even_where_the_episode_went_well(tmp_path: Path) -> None:
    """That an episode ended well says nothing against the fix that failed in it: its failure is not verified."""
    with lexical_memory(tmp_path) as memory:
        mend(memory)
        script = [(WRONG, ERROR), (RIGHT, DENIED), ("echo > log", "")]
        work(memory, script, task="publish it now", success=True)
        (fix,) = [m for m in memory.store.list_memories(None) if m.kind == "fix" and m.answer == RIGHT]
        assert (fix.status, fix.successes, fix.failures, fix.used_failures) == ("verified", 1, 0, 1)


def test_a_failure_in_one_environment_costs_there_only(tmp_path: Path) -> None:
    """A fix that fails under other tags stays verified, and is worth less there than where it worked."""
    with lexical_memory(tmp_path) as memory:
        mend(memory, tags={"os": "linux"})
        bad = [(WRONG, ERROR), (RIGHT, DENIED)]
        work(memory, bad, task="publish it now", tags={"os": "windows"})
        assert fixes(memory) == [(WRONG, RIGHT, "verified")]
        known = memory.store.fixes.known_fixes
        values = {
            name: known(SCOPE, "bash", "", environment=json.dumps(tags), episode_id="x")[0].value
            for name, tags in (("home", {"os": "linux"}), ("there", {"os": "windows"}), ("else", {}))
        }
        assert values["there"] < values["else"] < values["home"]


# -- what is kept of an observation ----------------------------------------------------------------


def test_the_error_is_told_as_it_was_printed() -> None:
    """The message has its names back; a bare exit code is named; success has none; long outputs keep their ends."""
    assert (
        message_of(read(ERROR, tool="bash", arguments=WRONG), ERROR)
        == "'pussh' is not a git command. See 'git --help'."
    )
    assert "No module named 'yaml'" in message_of(read(TRACEBACK, tool="bash", arguments="python app.py"), TRACEBACK)
    quiet = "Exit code: 3"
    framed = read(quiet, [Result("make test", DONE)], tool="bash", arguments="make")
    assert message_of(framed, quiet) == "exit code 3"
    assert message_of(read(DONE, tool="bash", arguments="make"), DONE) == ""
    assert shortened("x" * 4_000) == "x" * 4_000
    assert len(shortened(f"a{'x' * 9_000}b")) < 4_010
    assert shortened(f"a{'x' * 9_000}b")[0 :: len(shortened(f"a{'x' * 9_000}b")) - 1] == "ab"
