"""Pytest plugin, loaded by its entry point into other people's sessions: options and a check, and nothing else.

It imports only what pytest has imported anyway; the reporter is imported in sessions that ask for a report.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ENV_PREFIX = "OPTILLM_AGENT_MEMORY_"
OPTION_PREFIX = "--agent-memory-"
OPTIONS = {
    "url": "report the session's result to the optillm with agent memory at this URL",
    "trace": "the trace that the session tests: the `id` of the response",
    "episode": "the episode that the session tests, instead of a trace",
    "namespace": "the namespace of the trace or episode",
}
# The target of the session that reports. A pytest started by its tests inherits the other variables, and must not
# report on the same target as well.
REPORTS = "PYTEST_AGENT_MEMORY_REPORTS"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; each has a variable of the same name."""
    group = parser.getgroup("agent-memory", "agent memory: report the session's result as feedback")
    for name, help_ in OPTIONS.items():
        group.addoption(OPTION_PREFIX + name, metavar=name.upper(), help=f"{help_} ({ENV_PREFIX}{name.upper()})")


def pytest_configure(config: pytest.Config) -> None:
    """Register the reporter if a report is asked for; workers of xdist leave it to their controller."""
    if hasattr(config, "workerinput"):
        return
    chosen = _chosen(config, os.environ)
    about = chosen.get("trace") or chosen.get("episode") or ""
    if (about or "url" in chosen) and os.environ.get(REPORTS) != about:
        from optillm_memory.adapters.pytest_report import Reporter  # noqa: PLC0415 - other sessions do not pay for it

        config.pluginmanager.register(Reporter(config, chosen, about), "agent_memory_reporter")


def _chosen(config: pytest.Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the options that are set; the command line outranks the environment."""
    options = {name: str(config.getoption(f"agent_memory_{name}", None) or "").strip() for name in OPTIONS}
    variables = {name: environ.get(ENV_PREFIX + name.upper(), "").strip() for name in OPTIONS}
    if options["trace"] or options["episode"]:
        variables["trace"] = variables["episode"] = ""
    return {name: options[name] or variables[name] for name in OPTIONS if options[name] or variables[name]}
