"""The guard's second call waited for a provider's limits, 16 s and three calls, while the first answer had been there.

Reported of others: https://github.com/openai/openai-python/issues/1102 (the client waits for `retry-after`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import httpx
import pytest
from hosting import BOTH_LANES, JSON, MODEL, Host, chunks_of

from optillm_memory.host.sse import StreamAccumulator
from optillm_memory.testing.upstream import Answer, Reply, tool_call

pytestmark = pytest.mark.host
LANES = BOTH_LANES

BLOCK = "<agent_memory"
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]
TASK = "Sort holiday photographs"
FAULTY, SOUND = "touch --quick out/x/f", "touch out/x/f"
FAULT = "touch: unrecognized option '--quick'\nTry 'touch --help' for more information."
LIMIT_S = 30.0
AT_ONCE_S = 6.0  # for what does not even have to be waited for, on a busy machine


def acting(command: str) -> Reply:
    """Return an answer that asks for a command."""
    return Reply(content=None, tool_calls=[tool_call("bash", {"command": command})])


def _always(reply: Reply, _request: JSON) -> Reply:
    return reply


def fail(host: Host, memory: JSON, command: str, output: str) -> None:
    """Let an agent try a command that fails with this output, after one that works, in an episode of its own."""
    messages: list[JSON] = [{"role": "user", "content": f"Prepare release {uuid.uuid4().hex}."}]
    for tried, told in (("date", "Monday\n\nExit code: 0"), (command, f"{output}\n\nExit code: 1")):
        wanted = acting(tried)
        host.upstream.reply = partial(_always, wanted)
        answer = host.chat(messages, memory=memory, tools=TOOLS)["choices"][0]["message"]
        call_id = answer["tool_calls"][0]["id"]
        messages += [answer, {"role": "tool", "tool_call_id": call_id, "content": told}]
    host.upstream.reply = lambda _: "Finished."
    host.chat(messages, memory=memory, tools=TOOLS)
    host.settle()
    host.upstream.clear()


def ask(host: Host, memory: JSON, *, stream: bool = False, messages: Any = None) -> tuple[httpx.Response, float]:
    """Send an agent's request; return the raw response and the seconds that it took."""
    host.upstream.clear()
    body = {"model": MODEL, "messages": messages or [{"role": "user", "content": TASK}], "tools": TOOLS}
    started = time.perf_counter()
    response = host.post({**body, "stream": stream, "agent_memory": memory})
    return response, time.perf_counter() - started


def commands_in(response: httpx.Response) -> list[str]:
    """Return the commands that an answer asks for, streamed or not."""
    assert response.status_code == 200, response.text
    if response.headers["Content-Type"].startswith("text/event-stream"):
        accumulator = StreamAccumulator()
        for chunk in chunks_of(response):
            accumulator.add(chunk)
        said = [choice["message"] for choice in accumulator.completion()["choices"]]
    else:
        said = [choice["message"] for choice in response.json()["choices"]]
    return [json.loads(c["function"]["arguments"])["command"] for m in said for c in m.get("tool_calls") or []]


def advised(request: Mapping[str, Any]) -> bool:
    """Whether a prompt holds what memory says of an action."""
    return BLOCK in json.dumps(request["messages"])


def second(answer: Answer) -> Any:
    """Return an upstream that asks for what is known to fail, and answers so where it is warned."""
    return lambda request: answer if advised(request) else acting(FAULTY)


def answering(answer: Reply) -> Any:
    """Return an upstream that always answers so."""
    return lambda _request: answer


def assert_first_went_out(host: Host, response: httpx.Response) -> None:
    """Check that the first answer went out after two calls, and that the trace says no more than that."""
    assert commands_in(response) == [FAULTY]
    assert [advised(request) for request in host.sent] == [False, True]
    host.settle()
    shown = host.get(f"traces/{response.headers['X-Agent-Memory-Trace-Id']}")
    assert (shown["extra_calls"], shown["action"], shown["injected"], shown["error"]) == (1, "plain", [], None)
    assert response.headers["X-Agent-Memory-Action"] == "plain"


def test_the_guard_is_at_work(host: Host, namespace: dict[str, str]) -> None:
    """Where the second answer is there in time and is better, it goes out: what follows is no idle test."""
    fail(host, namespace, FAULTY, FAULT)
    host.upstream.reply = second(acting(SOUND))
    response, _ = ask(host, namespace)
    assert commands_in(response) == [SOUND]
    assert [advised(request) for request in host.sent] == [False, True]
    assert response.json()["agent_memory"]["extra_calls"] == 1


@pytest.mark.parametrize(
    ("status", "stream"), [*((status, False) for status in (400, 401, 408, 409, 429, 500, 503, 529)), (429, True)]
)
def test_a_limit_on_the_second_call_is_not_waited_for(
    host: Host, namespace: dict[str, str], status: int, *, stream: bool
) -> None:
    """With `retry-after: 8` on the second call the first answer goes out at once, after two calls."""
    fail(host, namespace, FAULTY, FAULT)
    host.upstream.reply = second(Reply(status=status, headers={"retry-after": "8", "x-should-retry": "true"}))
    response, seconds = ask(host, namespace, stream=stream)
    assert_first_went_out(host, response)
    assert seconds < AT_ONCE_S
    time.sleep(0.1)
    assert len(host.sent) == 2


@pytest.mark.parametrize(
    ("late", "stream"),
    [
        (Reply(hang=True), False),
        (Reply(content=None, tool_calls=[tool_call("bash", {"command": SOUND})], delay_s=9.0), True),
    ],
    ids=["hangs", "slow"],
)
def test_a_second_call_that_takes_too_long(host: Host, namespace: dict[str, str], late: Reply, *, stream: bool) -> None:
    """Where the second answer hangs, or takes far longer than the first, the first goes out and no more comes of it."""
    fail(host, namespace, FAULTY, FAULT)
    host.upstream.reply = second(late)
    response, seconds = ask(host, namespace, stream=stream)
    assert_first_went_out(host, response)
    assert seconds < LIMIT_S
    host.upstream.reply = lambda _request: acting(SOUND)
    again, seconds = ask(host, namespace)
    assert commands_in(again) == [SOUND]
    assert seconds < AT_ONCE_S


def test_a_second_answer_may_take_as_long_as_the_first(host: Host, namespace: dict[str, str]) -> None:
    """A model that thinks for a second and a half is given that time again."""
    fail(host, namespace, FAULTY, FAULT)
    calls = [tool_call("bash", {"command": SOUND})]
    host.upstream.reply = second(Reply(content=None, tool_calls=calls, delay_s=1.5))
    response, _ = ask(host, namespace)
    assert commands_in(response) == [SOUND]


def choice(message: Any) -> JSON:
    """Return a completion with one choice."""
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]}


GARBAGE: dict[str, Reply] = {
    "nothing": Reply(body={}),
    "no-choices": Reply(body={"choices": []}),
    "null-choices": Reply(body={"choices": None, "usage": None}),
    "text-for-choices": Reply(body={"choices": "none"}),
    "number-for-choices": Reply(body={"choices": 7}),
    "text-for-a-choice": Reply(body=choice("touch")),
    "null-choice": Reply(body=choice(None)),
    "null-message": Reply(body=choice({"index": 0, "message": None, "finish_reason": "stop"})),
    "text-for-a-message": Reply(body=choice({"index": 0, "message": SOUND, "finish_reason": "stop"})),
    "empty": Reply(content=""),
    "null": Reply(content=None),
    "text-for-calls": Reply(body=choice({"index": 0, "message": {"role": "assistant", "tool_calls": "ls"}})),
    "call-without-function": Reply(body=choice({"index": 0, "message": {"role": "assistant", "tool_calls": [{}]}})),
    "an-error": Reply(body={"error": {"message": "overloaded", "code": 529}}),
    "text-for-an-error": Reply(body={"error": "overloaded", "choices": None}),
    "not-gzip": Reply(content=SOUND, headers={"Content-Encoding": "gzip"}),
    "the-same": acting(FAULTY),
}


@pytest.mark.parametrize(
    ("answer", "stream"), [*((answer, False) for answer in GARBAGE), ("null-choices", True), ("not-gzip", True)]
)
def test_a_second_answer_that_is_none(host: Host, namespace: dict[str, str], answer: str, *, stream: bool) -> None:
    """Whatever comes in place of a second answer, the first one goes out as it came."""
    fail(host, namespace, FAULTY, FAULT)
    host.upstream.reply = second(GARBAGE[answer])
    response, seconds = ask(host, namespace, stream=stream)
    assert_first_went_out(host, response)
    assert seconds < AT_ONCE_S


def test_an_agent_goes_on_after_it(host: Host, namespace: dict[str, str]) -> None:
    """The conversation whose second call failed goes on from its first answer, with nothing of the advice in it."""
    fail(host, namespace, FAULTY, FAULT)
    host.upstream.reply = second(Reply(status=503, headers={"retry-after": "8"}))
    messages: list[JSON] = [{"role": "user", "content": TASK}]
    response, _ = ask(host, namespace, messages=messages)
    assert_first_went_out(host, response)
    first = response.json()
    told = {"role": "tool", "tool_call_id": "call_1", "content": "Exit code: 0"}
    messages += [first["choices"][0]["message"], told]
    host.upstream.reply = lambda _request: "Finished."
    response, _ = ask(host, namespace, messages=messages)
    assert host.prompt == messages
    assert response.json()["agent_memory"]["episode_id"] == first["agent_memory"]["episode_id"]


# -- a state of the world elsewhere, and a fault of the action ------------------------------------------

STATES = {
    "cat": ("cat notes/plan.txt", "cat: notes/plan.txt: No such file or directory"),
    "ls": ("ls out", "ls: cannot access 'out': No such file or directory"),
    "cd": ("cd build && make", "bash: line 1: cd: build: No such file or directory"),
    "script": ("./run.sh", "bash: ./run.sh: No such file or directory"),
    "python-file": ("python3 train.py", "python3: can't open file '/a/train.py': [Errno 2] No such file or directory"),
    "python-open": (
        "python3 load.py",
        (
            'Traceback (most recent call last):\n  File "load.py", line 1, in <module>\n    open("data.csv")\n'
            "FileNotFoundError: [Errno 2] No such file or directory: 'data.csv'"
        ),
    ),
    "node": ("node read.js", "Error: ENOENT: no such file or directory, open 'settings.json'"),
    "node-module": ("node app.js", "Error: Cannot find module '/home/a/app.js'\n    at Module._resolveFilename"),
    "go": ("go run main.go", "panic: open config.yaml: no such file or directory"),
    "rust": ("target/debug/app", 'Error: Os { code: 2, kind: NotFound, message: "No such file or directory" }'),
    "cargo": ("cargo build", "error: could not find `Cargo.toml` in `/home/a` or any parent directory"),
    "make": ("make install", "make: *** No rule to make target 'install'.  Stop."),
    "makefile": ("make", "make: *** No targets specified and no makefile found.  Stop."),
    "npm": ("npm run build", 'npm ERR! Missing script: "build"'),
    "java": ("java -jar app.jar", "Error: Unable to access jarfile app.jar"),
    "powershell": ("Get-Content a.txt", "Get-Content : Cannot find path 'C:\\work\\a.txt' because it does not exist."),
    "german": ("rm a.txt", "rm: das Entfernen von 'a.txt' ist nicht möglich: Datei oder Verzeichnis nicht gefunden"),
    "french": ("rm a.txt", "rm: impossible de supprimer 'a.txt': Aucun fichier ou dossier de ce type"),
    "japanese": ("rm a.txt", "rm: 'a.txt' を削除できません: そのようなファイルやディレクトリはありません"),
    "permission": ("cat /etc/shadow", "cat: /etc/shadow: Permission denied"),
    "exists": ("mkdir out", "mkdir: cannot create directory 'out': File exists"),
    "git-here": ("git status", "fatal: not a git repository (or any of the parent directories): .git"),
    "git-branch": ("git checkout dev", "error: pathspec 'dev' did not match any file(s) known to git"),
    "docker": ("docker stop web", "Error response from daemon: No such container: web"),
    "port": ("python3 -m http.server", "OSError: [Errno 98] Address already in use"),
    "table": ("sqlite3 a.db 'select * from users'", "Error: in prepare, no such table: users"),
    "grep": ("grep x dir", "grep: dir: Is a directory"),
    "tar": ("tar xf a.tgz", "tar: a.tgz: Cannot open: No such file or directory\ntar: Error is not recoverable"),
    "unzip": ("unzip a.zip", "unzip:  cannot find or open a.zip, a.zip.zip or a.zip.ZIP."),
}
FAULTS = {
    "option": (FAULTY, FAULT),
    "short-option": ("ls -j", "ls: invalid option -- 'j'\nTry 'ls --help' for more information."),
    "flag": ("docker run --al x", "unknown flag: --al\nSee 'docker run --help'."),
    "argument": ("cargo test --fast", "error: unexpected argument '--fast' found"),
    "choice": ("pip config sett", 'ERROR: Need an action (debug, edit, get, list, set, unset) to perform: "sett"'),
    "subcommand": ("git pussh", "git: 'pussh' is not a git command. See 'git --help'."),
    "syntax": ("for f in *; echo $f", "bash: -c: line 1: syntax error near unexpected token `echo'"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_the_world_elsewhere_costs_no_call(host: Host, namespace: dict[str, str], state: str) -> None:
    """What was missing, there already or forbidden in another episode says nothing of this one: no second call."""
    command, output = STATES[state]
    fail(host, namespace, command, output)
    host.upstream.reply = lambda request: acting("pwd" if advised(request) else command)
    response, _ = ask(host, namespace)
    assert commands_in(response) == [command]
    assert [advised(request) for request in host.sent] == [False]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_action_is_asked_again(host: Host, namespace: dict[str, str], fault: str) -> None:
    """What the program does not know it will not know in another episode either: one second call."""
    command, output = FAULTS[fault]
    fail(host, namespace, command, output)
    host.upstream.reply = lambda request: acting("pwd" if advised(request) else command)
    response, _ = ask(host, namespace)
    assert commands_in(response) == ["pwd"]
    assert [advised(request) for request in host.sent] == [False, True]


def test_another_directory_of_the_same_episode(host: Host, namespace: dict[str, str]) -> None:
    """After a change of directory the file may be there: no second call, though it was missing in this very episode."""
    command = "cat plan.txt"
    missing = "cat: plan.txt: No such file or directory\n\nExit code: 1"
    messages: list[JSON] = [{"role": "user", "content": TASK}]
    for number, (act, output) in enumerate([(command, missing), ("cd notes", "Exit code: 0"), (command, "")]):
        call = tool_call("bash", {"command": act}, f"call_{number}")
        host.upstream.reply = answering(Reply(content=None, tool_calls=[call]))
        response, _ = ask(host, namespace, messages=messages)
        assert len(host.sent) == 1
        assert commands_in(response) == [act]
        told = {"role": "tool", "tool_call_id": f"call_{number}", "content": output}
        messages = [*messages, response.json()["choices"][0]["message"], told]
        host.settle()
