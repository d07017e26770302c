"""Record the table: run real tools in a scratch project and write what an agent would have been shown.

    python tests/observations/record.py

writes `observations.jsonl` beside this file. It needs the tools of `cases.py` (a case whose tool is not installed is
left out and named), jest from npm, and a PostgreSQL server, which runs as `nobody` where the recording runs as root.
The printed text is kept as it is, but for the scratch folder, the home folder, the tools' own prefixes and the user's
name, which become neutral ones.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cases import CODED, PLAIN
from project import PROJECT

HERE = Path(__file__).resolve().parent
LIMIT = 3.0  # seconds for the one command that is meant to run out of time
PROGRAM = {
    "view": "cat", "shell": "bash", "unittest": "python", "java": "javac", "junit": "javac", "maven": "mvn",
    "slow": "sleep",
    "read_file": "cat", "http_request": "curl", "web_search": "python", "mcp": "python", "jest": "npx",
}  # fmt: skip
STANDS_FOR = {
    "read_file": "import json, sys; print(open(json.loads(sys.argv[1])['path']).read(), end='')",
    "http_request": (
        "import json, sys, urllib.request, urllib.error\n"
        "try: answer = urllib.request.urlopen(json.loads(sys.argv[1])['url'])\n"
        "except urllib.error.HTTPError as error: answer = error\n"
        "print(json.dumps({'status': answer.status, 'body': answer.read().decode()}))"
    ),
    "web_search": (
        "import json, sys; q = json.loads(sys.argv[1])['query']\n"
        "print(json.dumps({'results': [{'title': q + ' - how to fix it', 'url': 'https://example.org/1', 'snippet':"
        " 'Error: ' + q + ' means that the call failed. Traceback (most recent call last) shows where.'}]}))"
    ),
    "mcp": (
        "import json, sys; a = json.loads(sys.argv[1])\n"
        "def call(): return str(a['a'] / a['b']) if a['name'] == 'divide' else 'x is the 24th letter'\n"
        "try: text, bad = call(), False\n"
        "except Exception as error: text, bad = f'{type(error).__name__}: {error}', True\n"
        "print(json.dumps({'content': [{'type': 'text', 'text': text}], 'isError': bad})); sys.exit(bad)"
    ),
}


def wrappings() -> list[Callable[[str, str, str, int], str]]:
    """Return the ways in which agents show a result: (command, stdout, stderr, exit code) → text."""
    return [
        lambda _, out, err, code: json.dumps({"exit_code": code, "stdout": out, "stderr": err}),
        lambda _, out, err, code: f"{out}{err}\n[exit code {code}]",
        lambda _, out, err, code: f"<returncode>{code}</returncode>\n<output>\n{out}{err}</output>",
        lambda _, out, err, code: f"Exit code: {code}\nWall time: 0.4 seconds\nOutput:\n{out}{err}",
        lambda _, out, err, code: json.dumps({"returncode": code, "output": out + err}, indent=2),
        lambda _, out, err, code: f"{out}{err}\n(exit code {code})",
        lambda c, out, err, code: json.dumps({"result": {"exitCode": code, "command": c, "output": out + err}}),
        lambda _, out, err, code: f"Process exited with code {code}\nOutput:\n{out}{err}",
        lambda _, out, err, code: json.dumps([{"type": "text", "text": f"{out}{err}\nexit status {code}"}]),
        lambda c, out, err, code: f"CompletedProcess(args={c!r}, returncode={code}, stdout={out!r}, stderr={err!r})",
        lambda _, out, err, code: f"{out}{err}$? = {code}",
        lambda c, out, err, code: f"Command {'failed' if code else 'ended'} with exit code {code}: {c}\n{out}{err}",
        lambda _, out, err, code: f"stdout:\n{out}\nstderr:\n{err}\nexit_code: {code}",
        lambda _, out, err, code: json.dumps({"status": "ok" if not code else "error", "metadata": {"exit_code": code},
                                              "output": out + err}),
        lambda _, out, err, code: f"{out}{err}\n[Command finished with exit code {code}]",
    ]  # fmt: skip


class Site(http.server.SimpleHTTPRequestHandler):
    """A small local site: the project's files, and one address that is broken."""

    def do_GET(self) -> None:
        """Serve a file, or a fault as services word it."""
        if self.path != "/broken":
            return super().do_GET()
        body = b'{"error": {"code": "internal", "message": "worker 17 lost its database"}}'
        self.send_response(500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def site(root: Path) -> Iterator[str]:
    """Serve the project on this machine; yield its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@contextlib.contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """Run a PostgreSQL server for the recording where there is one; yield what its clients need to know."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    lower = ["runuser", "-u", "nobody", "--"] if os.getuid() == 0 else []
    shutil.chown(folder, "nobody") if lower else None
    quiet = partial(subprocess.run, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    control = [*lower, str(found[-1].with_name("pg_ctl")), "-D", str(folder / "data"), "-w"]
    quiet([*lower, str(found[-1]), "-D", str(folder / "data"), "-U", "dev", "-A", "trust"])
    quiet([*control, "-o", f"-k {folder} -c listen_addresses=", "start"])
    try:
        yield {"PGHOST": str(folder), "PGUSER": "dev", "PGDATABASE": "postgres"}
    finally:
        quiet([*control, "-m", "immediate", "stop"])
        shutil.rmtree(folder, ignore_errors=True)


def prepare(root: Path, env: dict[str, str]) -> None:
    """Lay out the project: its files, a repository with a conflict, a database, jest, compiled tests."""
    for name, text in PROJECT.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "ok.json").write_text('{"items": [1, 2], "errors": []}\n')
    (root / "tmp").mkdir()
    script = """
    mkdir repo && cd repo && git init -q -b main && echo one > a.txt && git add . && git commit -qm 'first'
    git checkout -q -b clash && echo two > a.txt && git commit -qam 'fix: TypeError: bad operand'
    git checkout -q main && echo three > a.txt && git commit -qam 'say "fatal: no such file" when a file is lost'
    cd ..; sqlite3 db < sql/schema.sql; javac -cp $JUNIT -d jt java/*Test.java
    cd jest && npm install --silent --no-audit --no-fund jest@29
    """
    subprocess.run(["bash", "-c", script], cwd=root, env=env, check=False, capture_output=True)


def run(command: str, tool: str, root: Path, env: dict[str, str], *, merged: bool) -> tuple[str, str, int | None]:
    """Run one command line for real; return its output, its error output (when not merged) and its exit status."""
    argv = [sys.executable, "-c", STANDS_FOR[tool], command] if tool in STANDS_FOR else ["bash", "-c", command]
    limit = LIMIT if tool == "slow" else 300
    error = subprocess.STDOUT if merged else subprocess.PIPE
    try:
        done = subprocess.run(
            argv, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=error, timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"Command timed out after {limit:g} seconds", "", None
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr or b""))
    return out, err, done.returncode if done.returncode >= 0 else 128 - done.returncode


def label(truth: str, code: int | None) -> str:
    """Return the row's verdict: what the case says of itself, or else the exit status."""
    named = {"?": "unknown", "+": "success", "-": "failure"}
    return named[truth] if truth else "success" if code == 0 else "failure"


def main() -> None:
    """Record every case and write the table."""
    jars = ":".join(str(p) for n in ("junit4", "hamcrest-core") for p in Path("/usr/share/java").glob(f"{n}.jar"))
    who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER")
           for key, value in (("NAME", "dev"), ("EMAIL", "dev@example.org"))}  # fmt: skip
    rows = []
    root = Path(tempfile.mkdtemp(prefix="project"))
    with site(root) as url, postgres() as database:
        env = {
            **{k: v for k, v in os.environ.items() if k not in ("CI", "PYTHONPATH", "FORCE_COLOR", "PIP_FIND_LINKS")},
            **who, **database, "TMPDIR": str(root / "tmp"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "URL": url, "JUNIT": jars, "TERM": "dumb",
            "LC_ALL": "C.UTF-8", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_PAGER": "cat", "PYTHONDONTWRITEBYTECODE": "1",
            "NPM_CONFIG_UPDATE_NOTIFIER": "false", "NPM_CONFIG_LOGS_MAX": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore", "GOFLAGS": "-mod=mod", "GOPROXY": "off", "CARGO_NET_OFFLINE": "true",
            "RUST_BACKTRACE": "0", "MAVEN_OPTS": "-Djansi.mode=strip",
        }  # fmt: skip
        prepare(root, env)
        # From here on no settings of this machine's own show in what the tools print.
        env |= {
            "NPM_CONFIG_USERCONFIG": os.devnull,
            "PIP_CONFIG_FILE": os.devnull,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        neutral = {
            str(root): "/home/dev/project", database.get("PGHOST", "\0"): "/run/postgresql",
            sys.prefix: "/home/dev/venv", sys.base_prefix: "/usr", str(Path.home()): "/home/dev",
            url.rpartition(":")[2]: "8000",
        }  # fmt: skip

        def clean(text: str) -> str:
            for old in sorted(neutral, key=len, reverse=True):
                text = text.replace(old, neutral[old])
            return re.sub(rf"\b{re.escape(getpass.getuser())}\b(?=@|:| {re.escape(getpass.getuser())}\b)", "dev", text)

        ways = wrappings()
        for number, (tool, command, truth) in enumerate([*PLAIN, *CODED]):
            if not shutil.which(PROGRAM.get(tool, tool), path=env["PATH"]):
                print(f"left out: {tool}: {command}")
                continue
            coded = number >= len(PLAIN)
            real = command.replace("$URL", url) if tool in STANDS_FOR else command
            out, err, code = run(real, tool, root, env, merged=not coded)
            shown = out
            if coded and code is not None:
                shown = ways[number % len(ways)](command, clean(out), clean(err), code)
            told, verdict = command.replace("$URL", url).replace("$JUNIT", "lib/junit4.jar"), label(truth, code)
            if not shown.strip():
                verdict = "unknown"  # nothing was shown, so nothing can be read
            digest = hashlib.blake2b(f"{command}|{coded}".encode(), digest_size=4).hexdigest()
            rows.append({
                "id": f"{tool}-{digest}", "tool": tool, "command": clean(told), "observation": clean(shown),
                "exit_code": code,
                "verdict": verdict, "split": "develop" if int(digest, 16) % 2 else "held_out",
            })  # fmt: skip
    with (HERE / "observations.jsonl").open("w", encoding="utf-8") as table:
        table.writelines(json.dumps(row) + "\n" for row in rows)
    shutil.rmtree(root, ignore_errors=True)
    print(f"{len(rows)} rows of {len({row['tool'] for row in rows})} tools")


if __name__ == "__main__":
    main()
