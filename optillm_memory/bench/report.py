"""What every bench hands out: its figures, and the settings, versions and machine they were got with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optillm_memory.store.sqlite.connection import sqlite_version

_PACKAGES = ("optillm-memory", "optillm", "openai", "sentence-transformers", "torch", "transformers", "numpy")


def report(figures: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as flat keys, with what they were got with beside them."""
    versions = {"python": platform.python_version(), "sqlite": sqlite_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"cores": os.cpu_count(), "system": platform.system(), "processor": platform.machine()}
    return {**figures, "settings": dict(settings), "versions": versions, "machine": machine}


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a report to a file as JSON, where one was named."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
