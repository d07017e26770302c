"""A real optillm as a child process."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from optillm_memory.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

_POLL_S = 0.1
_STOP_S = 10.0
_TAIL_LINES = 30
# Variables that would make optillm choose another provider or another approach than the test wants, and
# keys that a test must not pass on.
_DROPPED_PREFIXES = ("OPTILLM_", "OPENAI_", "AZURE_", "CEREBRAS_")
_DROPPED_SUFFIX = "_API_KEY"


class HostProcess:
    """An optillm that can be started, stopped or killed, and started again on the same port and database.

        with HostProcess.serve(upstream.base_url, db=tmp_path / "memory.db") as host:
            client = OpenAI(base_url=host.base_url, api_key="alice")

    `serve` prepares an optillm with memory, `gunicorn` the same under a WSGI server, `plain` a stock one. As a context
    manager it starts on entering and stops on leaving. `start` raises HostError, with the end of the log, if the child
    exits or is not healthy in time.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None, port: int, log: Path) -> None:
        self.argv = list(argv)
        self.env = dict(env)
        self.cwd = cwd
        self.port = port
        self.log = log
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def serve(
        cls,
        upstream_url: str | None,
        *,
        db: Path,
        port: int | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> Self:
        """Prepare `optillm-memory serve` on a database.

        `env` holds settings (`OPTILLM_AGENT_MEMORY_…`); the caller's own settings and providers' keys are not passed
        on. Without an upstream URL `env` chooses the client, as in `{"OPTILLM_API_KEY": "optillm"}` for optillm's own
        inference. `extra_args` are optillm's. The log is beside the database unless `log` names a file.
        """
        command = [sys.executable, "-m", "optillm_memory.cli", "serve"]
        return cls._prepare(command, upstream_url, db=db, port=port, extra_args=extra_args, env=env, cwd=cwd, log=log)

    @classmethod
    def plain(
        cls,
        upstream_url: str | None,
        *,
        db: Path,
        cwd: Path,
        port: int | None = None,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Self:
        """Prepare stock optillm in `cwd`, where it looks for `optillm/plugins/*.py`.

        Raises HostError if the `optillm` command is not beside this interpreter.
        """
        script = shutil.which("optillm", path=str(Path(sys.executable).parent))
        if script is None:
            raise HostError(f"No optillm beside {sys.executable}: pip install 'optillm>=0.4'")
        return cls._prepare([script], upstream_url, db=db, port=port, extra_args=extra_args, env=env, cwd=cwd, log=log)

    @classmethod
    def gunicorn(
        cls,
        upstream_url: str,
        *,
        db: Path,
        workers: int = 2,
        threads: int = 64,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
    ) -> Self:
        """Prepare the app of `serve` under gunicorn, which must be installed; its workers share the database."""
        port = cls.free_port()
        app = f'optillm_memory.host.launcher:application("--base-url", "{upstream_url}")'
        served = ["--bind", f"127.0.0.1:{port}", "--workers", str(workers), "--threads", str(threads), app]
        return cls(
            argv=[sys.executable, "-m", "gunicorn", *served],
            env=child_environment(os.environ, db, env or {}),
            cwd=cwd,
            port=port,
            log=log or db.with_name(f"gunicorn-{port}.log"),
        )

    @classmethod
    def _prepare(
        cls,
        command: Sequence[str],
        upstream_url: str | None,
        *,
        db: Path,
        port: int | None,
        extra_args: Sequence[str],
        env: Mapping[str, str] | None,
        cwd: Path | None,
        log: Path | None,
    ) -> Self:
        port = cls.free_port() if port is None else port
        upstream = () if upstream_url is None else ("--base-url", upstream_url)
        return cls(
            argv=[*command, *upstream, "--port", str(port), *extra_args],
            env=child_environment(os.environ, db, env or {}),
            cwd=cwd,
            port=port,
            log=log or db.with_name(f"optillm-{port}.log"),
        )

    @staticmethod
    def free_port() -> int:
        """Return a loopback port on which nobody listens now."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    @property
    def base_url(self) -> str:
        """The URL for an OpenAI client."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs, else None."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self, timeout_s: float = 120) -> None:
        """Start the child and wait until it answers GET /health."""
        if self.pid is not None:
            raise HostError(f"optillm runs already on port {self.port}")
        if _listening(self.port):
            # Its /health would be mistaken for the child's.
            raise HostError(f"Port {self.port} is taken by another process")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self._child = subprocess.Popen(
                self.argv,
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_healthy(self._child, timeout_s)
        except BaseException:
            self.kill()
            raise

    def _wait_until_healthy(self, child: subprocess.Popen[bytes], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            status = child.poll()
            if status is not None:
                raise HostError(f"optillm ended with status {status} before it was healthy.\n{self._tail()}")
            if _healthy(self.port):
                return
            if time.monotonic() > deadline:
                raise HostError(f"optillm was not healthy within {timeout_s:g} s.\n{self._tail()}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the child with SIGTERM, or with SIGKILL if it takes too long; do nothing without one."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._child = None

    def kill(self) -> None:
        """End the child with SIGKILL, like a crash; do nothing without one."""
        if self._child is None:
            return
        self._child.kill()
        self._child.wait(_STOP_S)
        self._child = None

    def logs(self) -> str:
        """Return the log so far, earlier starts included."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""

    def _tail(self) -> str:
        lines = self.logs().splitlines()[-_TAIL_LINES:]
        return "\n".join(["The end of its log:", *lines]) if lines else "Its log is empty."

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def child_environment(base: Mapping[str, str], db: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the child's environment: `base` without providers' keys and optillm's settings, then `extra`.

    The client's key is `sk-test`, unless `extra` holds OPTILLM_API_KEY, which selects optillm's own inference.
    """
    env = {
        name: value
        for name, value in base.items()
        if not name.startswith(_DROPPED_PREFIXES) and not name.endswith(_DROPPED_SUFFIX)
    }
    if "OPTILLM_API_KEY" not in extra:
        env["OPENAI_API_KEY"] = "sk-test"
    env["OPTILLM_AGENT_MEMORY_DB"] = str(db)
    env["OPTILLM_AGENT_MEMORY_OPERATOR_KEY_FILE"] = str(db.with_name(f"{db.stem}.operator-key"))
    env["HF_HUB_OFFLINE"] = "1"
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["PYTHONUNBUFFERED"] = "1"  # so that the log is complete when the child is killed
    # An HTTP proxy of the machine must not be used for an upstream on the loopback.
    env["NO_PROXY"] = env["no_proxy"] = ",".join(
        filter(None, ["127.0.0.1,localhost", base.get("NO_PROXY") or base.get("no_proxy")])
    )
    checkout = Path(__file__).parents[2]
    if checkout.name not in {"site-packages", "dist-packages"}:
        # A child in another directory must import the same package as this process.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), base.get("PYTHONPATH")]))
    return {**env, **extra}


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()
