"""`optillm_memory.testing` for users' own tests: its names, and the example of its docstring as it stands there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from optillm_memory import testing


def test_names_are_public_and_described() -> None:
    """What a user's test imports is one import away, and each has a docstring."""
    assert testing.__all__ == ["HostProcess", "RecordedRequest", "RecordingUpstream", "Reply", "echo", "tool_call"]
    assert all(getattr(testing, name).__doc__ for name in testing.__all__)


def test_import_needs_no_host() -> None:
    """Importing it loads no optillm, Flask, model library or client: a test that is skipped costs nothing."""
    heavy = ("torch", "transformers", "flask", "optillm", "openai", "httpx", "numpy")
    code = f"import sys, optillm_memory.testing; print([m for m in {heavy!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout == "[]\n"


@pytest.mark.host
def test_the_example_works(tmp_path: Path) -> None:
    """The test in the docstring passes as it is printed there."""
    text = testing.__doc__ or ""
    start, end = text.index("    from openai"), text.index("Both listen")
    names: dict[str, Any] = {}
    exec(textwrap.dedent(text[start:end]), names)
    names["test_the_agent_asks_through_memory"](tmp_path)
