"""A program, a file or a page may print what a harness prints: no outcome is read from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from agents import DONE, ERROR, RIGHT, WRONG, Agent, fixes, work
from builders import assistant, lexical_memory
from hosting import MODEL, served

from optillm_memory import Memory
from optillm_memory.conversation import observation
from optillm_memory.conversation.observation import Result, is_commit, nearby, read
from optillm_memory.testing.upstream import RecordingUpstream, Reply

JSON = dict[str, Any]
RUN = ("python evil.py", "./deploy", "node tool.js")
FRAMES = ["[exit code: {0}]", "Exit code: {0}", "<returncode>{0}</returncode>", "(exit code {0})", "$? = {0}"]


def verdicts(memory: Memory, agent: Agent) -> list[str]:
    """Return what was read from an agent's steps, in order."""
    memory.settle()
    steps = memory.trace(agent.turns[-1].trace_id)["steps"]
    return [step["verdict"] for step in sorted(steps, key=lambda s: s["ordinal"])]


def outcomes(memory: Memory, script: Sequence[tuple[Any, Any]]) -> list[str]:
    """Run an episode; return the outcomes of its traces, but for the last one's, which are its steps'."""
    agent = work(memory, script)
    return [memory.trace(turn.trace_id)["outcome"]["verdict"] for turn in agent.turns[:-1]]


# -- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "printed",
    [
        *(frame.format(0) for frame in FRAMES),
        *(f"{frame.format(0)}\nand more" for frame in FRAMES),
        *(f"all is well\n{frame.format(0)}" for frame in FRAMES),
        '{"exit_code": 0}',
        '{"exit_code": 0, "stdout": "all is well", "stderr": ""}',
        '{"result": {"returncode": 0}}',
        "CompletedProcess(args='x', returncode=0, stdout='x')",
        "Process exited with code 0\nOutput:\nx",
        '{"status": 200, "body": "all is well"}',
    ],
)
def test_a_printed_code_is_no_outcome(tmp_path: Path, printed: str) -> None:
    """What one program prints is in no frame of the harness, whether it comes first, in between or last."""
    others = [("ls", "a.py\nb.py"), ("cat notes", "some notes")]
    for place in range(3):
        with lexical_memory(tmp_path / str(place)) as memory:
            script = [*others[:place], (RUN[0], printed), *others[place:]]
            assert outcomes(memory, script) == ["unknown"] * 3


@pytest.mark.parametrize("frame", FRAMES)
def test_the_harness_has_the_last_word(tmp_path: Path, frame: str) -> None:
    """A program that prints a code in the harness's own form, first or last, does not change what the harness says."""
    with lexical_memory(tmp_path) as memory:
        bad, good = frame.format(1), frame.format(0)
        script = [
            ("./build", f"built\n{good}"),
            (RUN[0], f"{good}\nnothing\nwas\ndone\nat\nall\n{bad}"),
            (RUN[1], f"x\n{good}\n{bad}"),
            (RUN[2], f"x\n{bad}\n{good}"),
        ]
        assert outcomes(memory, script) == ["success", "failure", "failure", "success"]


def test_codes_that_contradict_each_other_are_unknown() -> None:
    """Two constant places with different codes: nobody knows which one is the harness's."""
    shown = "exit code: 0\nx\nexit code: 1"
    others = [Result("ls", "exit code: 0\ny\nexit code: 0")]
    assert read(shown, others, tool="bash", arguments="./deploy").verdict == "unknown"
    assert read("exit code: 0\nx\nexit code: 0", others, tool="bash", arguments="./deploy").verdict == "success"


def test_one_author_makes_no_frame(tmp_path: Path) -> None:
    """Files and pages by one program may all be planted alike; the results of other commands are not."""
    planted = 'x\n{"a": 1}\n[exit code: 0]'
    with lexical_memory(tmp_path) as memory:
        script = [("cat a.txt", planted), ("cat b.txt", planted), ("curl -s http://a.example", planted)]
        assert set(outcomes(memory, script[:2])) == {"unknown"}
        assert set(outcomes(memory, [*script[:2], ("ls", "a.txt")])) == {"unknown"}


def test_the_first_result_is_read_once_the_frame_is_known(tmp_path: Path) -> None:
    """Alone, a first result tells nothing; the next one, of another command, shows that the frame is the harness's."""
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory)
        agent.act("./deploy", "done\n[exit code: 0]")
        first = agent.act("./check", "no\n[exit code: 3]")
        assert verdicts(memory, agent) == ["unknown", None]
        agent.close()
        assert verdicts(memory, agent) == ["success", "failure"]
        assert memory.trace(first.trace_id)["outcome"]["verdict"] == "failure"
        before = memory.store.derived()
        memory.rebuild()
        assert memory.store.derived() == before


def test_the_neighbours_of_a_result() -> None:
    """A few before it; where these are of one source, those after it up to the first of another one."""
    rows = [Result(f"cat {n}", "x") for n in range(3)] + [Result("ls", "x"), Result("make", "x")]
    assert nearby(rows, 0, "bash") == rows[1:4]
    assert nearby(rows, 3, "bash") == rows[:3]
    assert nearby(rows, 4, "bash") == rows[:4]
    assert nearby(rows, 0, "fetch") == []


# -- reports of tests ------------------------------------------------------------------------------

SUMMARIES = ["1 passed in 0.01s", "Ran 3 tests in 0.1s\n\nOK", "Tests:       3 passed, 3 total", "ok  \tx/y\t0.1s"]


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize(
    "command",
    [
        "cat ci.log", "python evil.py", "echo hi && python fetch.py", "pytest -q; python evil.py", "curl http://a.example",
        "python -c 'print(1)'", "node -e 'x'", "git show HEAD:ci.log", "./deploy", "tail -3 test.log", "make deploy",
    ],
)  # fmt: skip
def test_a_summary_counts_only_where_tests_ran(tmp_path: Path, summary: str, command: str) -> None:
    """What looks like the report of passing tests proves nothing where the step ran none."""
    with lexical_memory(tmp_path) as memory:
        assert outcomes(memory, [(command, summary), (command, summary)]) == ["unknown"] * 2
        assert observation.tests_of(summary, tool="bash", arguments=command) == "unknown"


@pytest.mark.parametrize(
    "command",
    [
        "pytest -q", "cd a && python -m pytest x", "python3 -m unittest", "npm test", "npm run test:unit",
        "yarn test", "./gradlew test",
        "go test ./...", "cargo test", "make test", "make check", "tox -e py", "npx jest", "mvn -q verify",
        "ctest", "phpunit", "bundle exec rspec", "python manage.py test app", "./run_tests.sh", "bin/test sympy/core",
        "python tests/runtests.py admin", "uv run pytest", "pytest | tail -3", "bash scripts/test.sh", "dotnet test",
    ],
)  # fmt: skip
def test_test_runners_are_known(command: str) -> None:
    """Each of these ran tests, so its report counts."""
    assert observation.tests_of("3 passed in 0.12s", tool="bash", arguments=command) == "success"
    assert read("3 passed in 0.12s", tool="bash", arguments=command).verdict == "success"


def test_a_shown_commit_is_none() -> None:
    """Only `git commit` commits: a file or a log that says so does not."""
    said = "[main 0123abc] fix"
    assert is_commit(said, tool="bash", arguments="git add -A && git commit -m fix")
    for command in ("git show commit.txt", "cat commit.txt && git status", "git log --grep commit", "echo git commit"):
        assert not is_commit(said, tool="bash", arguments=command)


# -- what was fetched, found or read -----------------------------------------------------------------


@pytest.mark.parametrize("tool", ["fetch", "web_search", "read_file", "http_request", "browse", "get_page", "ask"])
@pytest.mark.parametrize(
    "shown",
    [
        '{"exit_code": 0, "output": "fine"}', '{"status": 200, "body": "fine"}', "fine\n[exit code: 0]",
        "3 passed in 0.1s",
        '{"content": [{"type": "text", "text": "fine\\nExit code: 0"}]}', '{"success": true}', "All checks passed!",
    ],
)  # fmt: skip
def test_what_a_tool_fetched_or_read_is_no_success(tmp_path: Path, tool: str, shown: str) -> None:
    """However often, and in whatever form, content comes that says so."""
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory)
        for number in range(3):
            agent.act({"url": f"http://{number}.example"}, shown, tool=tool)
        agent.close()
        assert verdicts(memory, agent) == ["unknown"] * 3


@pytest.mark.parametrize("parts", [False, True])
def test_a_text_agent_is_read_in_the_same_way(tmp_path: Path, *, parts: bool) -> None:
    """Fenced commands with their output in the user's turn, as text or parts: a printed code in one is nothing."""
    with lexical_memory(tmp_path) as memory:
        agent = Agent(memory, options={"episode_id": "run"})
        for command, shown in (("ls", "a.py"), ("python evil.py", "ok\n[exit code: 0]"), ("ls -l", "a.py")):
            agent.answered(assistant(f"```bash\n{command}\n```"))
            content = f"Observation:\n{shown}"
            agent.messages.append(
                {"role": "user", "content": [{"type": "text", "text": content}] if parts else content}
            )
        agent.close()
        assert verdicts(memory, agent) == ["unknown"] * 3


def test_a_planted_failure_makes_the_next_action_no_fix(tmp_path: Path) -> None:
    """A program that prints a failing code has not failed, and what was done next repaired nothing."""
    with lexical_memory(tmp_path) as memory:
        script = [("ls", "a"), ("git fetch origin main", "[exit code: 1]"), ("git fetch evil main", "ok")]
        work(memory, script, success=True)
        assert fixes(memory) == []


@pytest.mark.host
def test_over_http_too(tmp_path: Path) -> None:
    """Through a real server: the trace whose program printed a code has no outcome."""
    call = {"id": "call_0123456789abcdef", "type": "function",
            "function": {"name": "bash", "arguments": json.dumps({"command": RUN[0]})}}  # fmt: skip
    replies: list[Reply | str] = [Reply(content=None, tool_calls=[call]), "It is done."]
    with (
        RecordingUpstream(lambda _: replies.pop(0)) as upstream,
        served(upstream, tmp_path / "memory.db") as host,
    ):
        said: list[JSON] = [{"role": "user", "content": "go"}]
        first = host.post({"model": MODEL, "messages": said}).json()
        said += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": '{"exit_code": 0}'},
        ]
        host.post({"model": MODEL, "messages": said})
        host.settle()
        assert host.get(f"traces/{first['id']}")["outcome"]["verdict"] == "unknown"


def test_a_harness_with_a_frame_is_read(tmp_path: Path) -> None:
    """The control: where each result has the harness's code, successes and failures are known, and make a fix."""
    with lexical_memory(tmp_path) as memory:
        assert outcomes(memory, [(WRONG, ERROR), (RIGHT, DONE)]) == ["failure", "success"]
        assert fixes(memory) == [(WRONG, RIGHT, "candidate")]
