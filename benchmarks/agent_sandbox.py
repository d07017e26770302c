"""The agent's tools: a fresh folder for each task, with a real shell, a real Python and files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from openai.types.chat import ChatCompletionFunctionToolParam

from benchmarks.agent_policy import Call
from optillm_memory.errors import HostError

TIMEOUT_S = 10.0
NEEDED = ("bash", "git")


def tool(name: str, does: str, **fields: str) -> ChatCompletionFunctionToolParam:
    """Return a tool's definition in OpenAI's form, with text fields that are all required."""
    properties = {field: {"type": "string", "description": help_} for field, help_ in fields.items()}
    parameters: dict[str, object] = {"type": "object", "properties": properties, "required": list(fields)}
    return {"type": "function", "function": {"name": name, "description": does, "parameters": parameters}}


TOOLS = [
    tool("bash", "Run a shell command in the working directory.", command="The command line."),
    tool("python", "Run Python code in the working directory.", code="The code."),
    tool("write_file", "Write a file.", path="Where, from the working directory.", content="All of it."),
]


def missing() -> list[str]:
    """Return the programs that the tasks need and that are missing."""
    return [name for name in NEEDED if shutil.which(name) is None]


class Sandbox:
    """A folder in which calls are really executed, with its own environment; the caller removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._env = environment(self.folder)

    def prepare(self, script: str) -> None:
        """Run a task's setup. Raises HostError if it fails."""
        text, code = self._run(["bash", "-e", "-c", script])
        if code:
            raise HostError(f"a task's setup failed with {code}: {text}")

    def solved(self, check: str) -> bool:
        """Whether a task's check, a shell script, exits 0."""
        return self._run(["bash", "-c", check])[1] == 0

    def run(self, call: Call) -> str:
        """Execute a call; return the observation as an agent formats it."""
        if call.tool == "bash":
            return _shown(*self._run(["bash", "-c", call.arguments.get("command", "")]))
        if call.tool == "python":
            return _shown(*self._run([sys.executable, "-c", call.arguments.get("code", "")]))
        if call.tool == "write_file":
            return self._write(call.arguments.get("path", ""), call.arguments.get("content", ""))
        return f"Error: no tool is called {call.tool!r}"

    def _write(self, path: str, content: str) -> str:
        try:
            file = (self.folder / path).resolve()
            if not file.is_relative_to(self.folder):
                return f"Error: permission denied: '{path}' is outside the working directory"
            file.write_text(content, encoding="utf-8")
        except (OSError, ValueError) as error:
            return f"Error: {str(error).replace(str(self.folder) + os.sep, '')}"
        return f"Wrote {len(content)} characters to {path}"

    def _run(self, argv: list[str]) -> tuple[str, int | None]:
        child = subprocess.Popen(
            argv, cwd=self.folder, env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            printed, _ = child.communicate()
            return printed.decode("utf-8", "replace"), None
        return printed.decode("utf-8", "replace"), child.returncode


def environment(home: Path) -> dict[str, str]:
    """Return a sandbox's environment: this Python first on the path, English messages, a git identity, nothing else."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    git: Mapping[str, str] = {
        "GIT_AUTHOR_NAME": "Agent", "GIT_AUTHOR_EMAIL": "agent@example.com",
        "GIT_COMMITTER_NAME": "Agent", "GIT_COMMITTER_EMAIL": "agent@example.com",
        "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0", "GIT_PAGER": "cat",
        "GIT_CEILING_DIRECTORIES": str(home.parent),
    }  # fmt: skip
    plain = {"HOME": str(home), "PATH": path, "LC_ALL": "C.UTF-8", "TERM": "dumb", "TMPDIR": str(home)}
    return {**plain, **git, "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _shown(printed: str, code: int | None) -> str:
    text = printed.rstrip("\n")
    if code is None:
        return f"{text}\nError: the command timed out after {TIMEOUT_S:g} s\nExit code: 124".lstrip("\n")
    return f"{text}\nExit code: {code}".lstrip("\n")
