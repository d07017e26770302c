"""Isolation of the peers: no telemetry, no connection to other machines, no installation of packages."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Each peer's own switch, and those of the libraries below them.
QUIET: Mapping[str, str] = {
    "MEM0_TELEMETRY": "False",
    "ANONYMIZED_TELEMETRY": "False",  # chromadb
    "CHROMA_OTEL_COLLECTION_ENDPOINT": "",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OTEL_SDK_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "PIP_NO_INDEX": "1",
    "OPENAI_API_KEY": "none",  # some require one although they get a client
}
_INSTALLS = re.compile(r"\b(pip3?|uv|conda|apt(-get)?)\b.*\b(install|download)\b", re.DOTALL)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a peer's process: without telemetry, and with a temporary home."""
    home = {"HOME": str(folder), "MEM0_DIR": str(folder / "mem0"), "XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, **QUIET, **home}


def watch() -> Counter[str]:
    """Refuse connections to other machines, and installers, from now on; return the counts of refusals.

    This covers calls through Python. Native code inside a peer is only covered by its switches.
    """
    refused: Counter[str] = Counter()

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "socket.connect" and _is_outside(given[1]):
            refused["connections"] += 1
            raise ConnectionRefusedError("a bench's peer speaks to this machine only")
        if event == "socket.getaddrinfo" and _is_outside((given[0],)):
            refused["connections"] += 1
            raise ConnectionRefusedError("a bench's peer speaks to this machine only")
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn") and _installs(given):
            refused["installs"] += 1
            raise PermissionError("a bench's peer installs nothing")

    sys.addaudithook(hook)
    return refused


def _is_outside(address: Any) -> bool:
    host = address[0] if isinstance(address, tuple) else None  # a path: a socket of this machine
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name


def _installs(given: tuple[Any, ...]) -> bool:
    words = (part for item in given[:2] for part in (item if isinstance(item, (list, tuple)) else [item]))
    return _INSTALLS.search(" ".join(_text(word) for word in words)) is not None


def _text(word: Any) -> str:
    return word.decode(errors="replace") if isinstance(word, bytes) else str(word)
