"""The code blocks of the documentation: Python runs and prints what it says, shell names what exists, JSON parses."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from readme_parts import PAGES, ROOT, route_list

from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.cli.commands import main
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream, Reply, tool_call

SHELL_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md"]
KEY = "sk-example"
SERVER = "http://127.0.0.1:8000"
# What may stand first in a line of shell, besides what is checked more closely below.
TOOLS = {"cog", "export", "mkdocs", "mypy", "optillm", "pip", "pre-commit", "python3", "ruff", "pytest"}


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return each code block in a language with the output that is shown below it, if any."""
    pattern = rf"^```{language}\n(.*?)^```$(?:\n```text\n(.*?)^```$)?"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
NEED_A_SERVER = [page for page in WITH_PYTHON if any(SERVER in code for code, _ in blocks(page, "python"))]


def run_page(page: Path, names: dict[str, Any], replaced: tuple[str, str] = ("", "")) -> None:
    """Run a page's Python blocks one after the other; each must print what stands below it, but for ids."""
    shown = 0
    for code, output in blocks(page, "python"):
        printed = io.StringIO()
        source = code.replace(*replaced) if replaced[0] else code
        with contextlib.redirect_stdout(printed):
            exec(compile(source, page.name, "exec"), names)
        assert without_ids(printed.getvalue()) == without_ids(output), f"{page.name}:\n{code}"
        shown += bool(output)
    assert shown, f"{page.name} shows no output"


def without_ids(text: str) -> str:
    """Return a text with the ids taken out: they are new in each run."""
    return re.sub(r"\b(mem|fix|proc|fb|ep|chatcmpl)-[0-9a-f]{16,}|\bcall_[0-9a-f]{16,}", r"\1-", text)


def answer(request: dict[str, Any]) -> str:
    """Answer as a model that knows the queues only from examples in its prompt."""
    return "lost_parcel" if any(m["role"] == "assistant" for m in request["messages"]) else "returns"


def test_there_is_code_to_run() -> None:
    """The front page, the tour and the pages of agents and Python have code to run; the first two need a server."""
    assert {page.name for page in WITH_PYTHON} >= {"README.md", "getting-started.md", "agents.md", "python-api.md"}
    assert {page.name for page in NEED_A_SERVER} == {"README.md", "getting-started.md"}


@pytest.mark.host
@pytest.mark.parametrize("page", NEED_A_SERVER, ids=lambda p: p.name)
def test_python_blocks_run_against_a_server(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's tour works as it is printed, with the real OpenAI client, a real optillm and the real encoder."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    env = {"OPTILLM_AGENT_MEMORY_HOLDOUT": "0"}  # so that the tour shows the same to everyone
    with (
        RecordingUpstream(answer) as upstream,
        HostProcess.serve(upstream.base_url, db=tmp_path / "m.db", env=env) as server,
    ):
        wait_for_encoder(server.base_url, KEY)
        names: dict[str, Any] = {"__name__": page.stem}
        try:
            run_page(page, names, (SERVER, server.base_url.removesuffix("/v1")))
        finally:
            if "client" in names:
                names["client"].close()


@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if p not in NEED_A_SERVER], ids=lambda p: p.name)
def test_python_blocks_run_by_themselves(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python runs as it is printed, with a stand-in for the reader's own LLM call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_ENCODER", "hashing")  # needs no weights and no time to load
    monkeypatch.setenv("OPTILLM_AGENT_MEMORY_HOLDOUT", "0")

    def call_your_llm(messages: list[dict[str, Any]]) -> dict[str, Any]:
        assert messages
        return {"choices": [{"message": {"role": "assistant", "content": "lost_parcel"}, "finish_reason": "stop"}]}

    run_page(page, {"__name__": page.stem, "call_your_llm": call_your_llm})


@pytest.mark.host
def test_the_loop_with_the_sdk_reports_its_episode(tmp_path: Path) -> None:
    """The loop of the agents' page works with the real client: the tool is called, the outcome is its episode's."""
    (source,) = (code for code, _ in blocks(ROOT / "docs" / "agents.md", "python") if "def solve" in code)
    names: dict[str, Any] = {"__name__": "agents"}
    exec(compile(source, "agents.md", "exec"), names)

    def act(request: dict[str, Any]) -> Any:
        called = request["messages"][-1]["role"] == "tool"
        return "Done." if called else Reply(content=None, tool_calls=[tool_call("look", {"at": "it"})])

    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    with (
        RecordingUpstream(act) as upstream,
        HostProcess.serve(upstream.base_url, db=tmp_path / "m.db") as server,
        names["OpenAI"](base_url=server.base_url, api_key=KEY) as client,
    ):
        solved = names["solve"](client, "run-17", "look at it", tools, lambda call: f"seen by {call.name}", bool)
        headers = {"Authorization": f"Bearer {KEY}"}
        found = httpx.get(f"{server.base_url}/agent_memory/traces", headers=headers, timeout=30).json()["data"]
    assert solved is True
    assert upstream.requests[-1].json["messages"][-1]["content"] == "seen by look"
    assert [(trace["episode_id"], trace["outcome"]["verdict"]) for trace in found] == [("run-17", "success")] * 2


def test_json_blocks_parse() -> None:
    """What is shown as JSON is JSON."""
    found = [code for page in PAGES for code, _ in blocks(page, "json")]
    assert found
    for code in found:
        json.loads(code)


# -- shell ------------------------------------------------------------------------------------------


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in a page's shell blocks, and of our own commands within its prose."""
    text = page.read_text(encoding="utf-8")
    for code, _ in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((n for n, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
                yield words[:end]
                words = words[end + 1 :]
    for inline in re.findall(r"`((?:optillm-memory|python -m benchmarks|pytest|curl) [^`]+)`", text):
        yield shlex.split(inline)


@pytest.mark.parametrize("page", SHELL_PAGES, ids=lambda p: p.name)
def test_shell_blocks_name_what_exists(page: Path, pytestconfig: pytest.Config) -> None:
    """Every command, option and route in a page's shell blocks exists; other programs are well-known ones."""
    for line in shell_lines(page):
        words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), line))
        name = words[0].removeprefix(".venv/bin/") if words else "export"
        if name == "optillm-memory":
            check_command(words[1:], page)
        elif words[:3] == ["python", "-m", "benchmarks"]:
            check_research(words[3:])
        elif name == "curl":
            check_request(words[1:])
        else:
            assert name in TOOLS or (ROOT / name).exists(), f"{page.name}: {words}"
        for word in words[1:]:
            if name == "pytest" and word.startswith("--agent-memory"):
                assert hasattr(pytestconfig.option, word.split("=")[0][2:].replace("-", "_")), word


def check_command(words: list[str], page: Path) -> None:
    """Fail where a command, or one of the options given to it, is none of ours."""
    command: click.Command = main
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0].isupper():  # NAME stands for any of them
            return
        assert rest[0] in command.commands, f"{page.name}: optillm-memory {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    known = {name for p in command.params for name in [*p.opts, *p.secondary_opts]} | {"--help", "--version"}
    if command.name != "serve":  # whose options are optillm's
        for word in rest:
            assert not word.startswith("-") or word.split("=")[0] in known, f"{page.name}: {' '.join(words)}"


def check_research(words: list[str]) -> None:
    """Fail where `python -m benchmarks` has no such bench, or that has no such option."""
    names = [] if not words or words[0].isupper() else words[:1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *names, "--help"], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"python -m benchmarks {' '.join(words)}: {done.stderr}"
    for word in words[1:]:
        assert not word.startswith("--") or word in done.stdout, words


def check_request(words: list[str]) -> None:
    """Fail where a request is for none of our routes."""
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    url = next(word for word in words if word.startswith("http://"))
    path = url.removeprefix(SERVER).partition("?")[0]
    patterns = [re.sub(r"\{\w+\}", "[^/]+", p) for m, p, _ in route_list() if m == method]
    assert any(re.fullmatch(pattern, path) for pattern in patterns), f"{method} {path}"
