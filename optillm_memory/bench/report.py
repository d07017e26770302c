"""A bench's report: its figures with the settings, versions and machine; printed, written to a file, or both."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from optillm_memory.conversation.printable import printable
from optillm_memory.store.sqlite.library import sqlite_version

_PACKAGES = ("optillm-memory", "optillm", "openai", "sentence-transformers", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Output:
    """Where a report goes: as JSON to the file of `--output`, as text or (`--json`) JSON to standard output."""

    path: Path | None = None
    as_json: bool = False

    def write(self, figures: Mapping[str, Any], settings: Mapping[str, Any], text: str | None = None) -> None:
        """Write and print the figures; `text` is how people read them (the default is `columns`)."""
        whole = json.dumps(report(figures, settings), indent=2, sort_keys=True)
        if self.path is not None:
            self.path.write_text(f"{whole}\n", encoding="utf-8")
        click.echo(whole if self.as_json else printable(columns(figures) if text is None else text))


def report(figures: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as keys of one object, together with the settings, versions and machine."""
    versions = {"python": platform.python_version(), "sqlite": sqlite_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"cores": os.cpu_count(), "system": platform.system(), "processor": processor()}
    return {**figures, "settings": dict(settings), "versions": versions, "machine": machine}


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not name it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def columns(figures: Mapping[str, Any], indent: str = "") -> str:
    """Return names and values in two columns; a group of figures is indented below its name."""
    width = max((len(name) for name in figures), default=0)
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{name}")
            lines += [columns(value, f"{indent}  ")] if value else []
        else:
            shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple)) else value
            lines.append(f"{indent}{name:{width}}  {shown}")
    return "\n".join(lines)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
