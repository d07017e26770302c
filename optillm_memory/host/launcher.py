"""The launcher: stock optillm with the plugin; all of optillm's own options are passed on."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optillm_memory.errors import HostError
from optillm_memory.host.install import FILE_NAME, install
from optillm_memory.host.runtime import checked_settings

if TYPE_CHECKING:
    import flask


def serve(arguments: Sequence[str]) -> None:
    """Run optillm with these arguments until it ends.

    Plugins in the working directory (or in `--plugins-dir`, which optillm 0.4.0 itself ignores) are loaded too. Raises
    InvalidField for a wrong setting, and HostError if the plugin cannot be imported: memory would be off unnoticed.
    """
    with _prepared(arguments) as server:
        # Sent by service managers; as an orderly exit it lets the writer finish its queue.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        server.main()


def application(*arguments: str) -> flask.Flask:
    """Return the app that `serve` would run with these arguments, for a WSGI server with workers of its own.

        gunicorn --workers 2 --threads 32 'optillm_memory.host.launcher:application("--base-url", "http://…/v1")'

    Host and port are the server's; `--host` only tells memory whether callers come from this machine alone. Raises what
    `serve` raises.
    """
    with _prepared(arguments) as server:
        server.app.run = lambda *_args, **_given: None  # the last that optillm's main does
        try:
            server.main()
        finally:
            del server.app.run
    app: flask.Flask = server.app
    return app


@contextlib.contextmanager
def _prepared(arguments: Sequence[str]) -> Iterator[Any]:
    """Give optillm's server module, with the plugin and the arguments where it looks for them."""
    checked_settings()
    server = importlib.import_module("optillm.server")
    try:
        importlib.import_module("optillm_memory.host.plugin")
    except Exception as error:
        raise HostError(f"the plugin cannot be imported: {type(error).__name__}: {error}") from error
    before = sys.argv
    with tempfile.TemporaryDirectory(prefix="optillm-memory-") as folder:
        path = install(Path(folder))
        for other in _own_plugins(arguments):
            if other.name != FILE_NAME:
                (path.parent / other.name).symlink_to(other)
        server.server_config["plugins_dir"] = folder
        sys.argv = ["optillm", *arguments]
        try:
            yield server
        finally:
            sys.argv = before


def _own_plugins(arguments: Sequence[str]) -> list[Path]:
    directory = Path.cwd()
    for index, argument in enumerate(arguments):
        if argument.startswith("--plugins-dir="):
            directory = Path(argument.partition("=")[2])
        elif argument == "--plugins-dir" and index + 1 < len(arguments):
            directory = Path(arguments[index + 1])
    return sorted((directory / "optillm" / "plugins").resolve().glob("*.py"))
