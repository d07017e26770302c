"""The examples run as a user would run them, against a real optillm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hosting import LEAN, QUIET

from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = pytest.mark.host
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "OPENAI_API_KEY": "sk-example"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_remembers_across_a_restart() -> None:
    """The quickstart's second answer, after the restart, is asked with the exemplar of the first session."""
    with RecordingUpstream(lambda _request: "returns") as upstream:
        output = _run("quickstart.py", "--model", "some-model", "--upstream", upstream.base_url)
        asked = upstream.requests
    assert "memory: plain, 0 exemplars" in output
    assert "memory: inject, 1 exemplars" in output
    assert [m["content"] for m in asked[0].json["messages"]] == ["Which queue does this go to? 'My parcel never came.'"]
    assert {"role": "assistant", "content": "lost_parcel"} in asked[1].json["messages"]


def test_stream_of_own_data_compares_with_and_without(tmp_path: Path) -> None:
    """A labelled file streams through a running server: copying the nearest exemplar beats no memory."""
    things = ("lamp", "sofa") * 4
    rows = [{"input": f"I want my {t} back {n}", "output": f"return_{t}"} for n, t in enumerate(things)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    def copy_last_exemplar(request: dict[str, Any]) -> str:
        answers = [m["content"] for m in request["messages"] if m["role"] == "assistant"]
        return answers[-1] if answers else "no idea"

    with RecordingUpstream(copy_last_exemplar) as upstream:
        env = {**QUIET, **LEAN}
        with HostProcess.serve(upstream.base_url, db=tmp_path / "m.db", env=env) as server:
            wait_for_encoder(server.base_url, "sk-example")
            output = _run("stream_your_data.py", str(data), "--url", server.base_url, "--model", "m")
    without, with_memory = output.splitlines()
    assert "without memory  accuracy 0.000" in without
    assert float(with_memory.split()[3].rstrip(",")) >= 0.5
