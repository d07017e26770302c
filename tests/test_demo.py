"""The demo's own run, small: a real model behind a real optillm, across a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from openai import OpenAI

from optillm_memory.bench.stream import Result, ask, send_feedback, wait_for_encoder
from optillm_memory.bench.tasks import Task
from optillm_memory.cli.commands import main
from optillm_memory.demo.run import KEY, curve
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.weights import smollm2_directory

pytestmark = [pytest.mark.host, pytest.mark.model]


def test_demo_runs_to_its_end(tmp_path: Path) -> None:
    """The demo asks every task it says, restarts in between, and writes figures that add up."""
    out = tmp_path / "demo.json"
    done = CliRunner().invoke(main, ["demo", "--baseline", "1", "--session", "6", "--again", "2", "--output", str(out)])
    assert done.exit_code == 0, done.output
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert {name: part["requests"] for name, part in figures["parts"].items()} == {
        "without memory": 1,
        "session 1": 6,
        "session 2": 6,
        "again": 2,
        "again, reuse": 2,
    }
    assert figures["parts"]["without memory"]["injected"] == 0
    after = figures["parts"]["session 2"]
    assert after["injected"] + after["held_out"] > 0
    assert [point[0] for point in figures["curve"]] == [12]
    assert "learning curve" in done.output
    ladder = figures["parts"]["again, reuse"]
    assert ladder["llm_calls"] == 2 - ladder["served"]
    assert figures["parts"]["again"]["served"] == 0
    uplift = figures["uplift"]
    assert uplift["with_memory"]["episodes"] + uplift["without_memory"]["episodes"] <= 12
    assert "uplift" in done.output


def test_a_small_model_answers_better_because_of_what_it_was_shown(tmp_path: Path) -> None:
    """SmolLM2 cannot know a made-up label; after one demonstration it gives it for the same request reworded."""
    import httpx

    task = Task("Please cancel my order for the blue kettle.", "cancel_order")
    env = {"OPTILLM_API_KEY": KEY, "OPTILLM_AGENT_MEMORY_HOLDOUT": "0"}
    with HostProcess.serve(None, db=tmp_path / "memory.db", env=env) as server:
        wait_for_encoder(server.base_url, KEY)
        model = f"agent_memory-{smollm2_directory()}"
        headers = {"Authorization": f"Bearer {KEY}"}
        with (
            OpenAI(base_url=server.base_url, api_key=KEY, timeout=120) as client,
            httpx.Client(base_url=f"{server.base_url}/agent_memory", headers=headers, timeout=30) as routes,
        ):
            trace_id, before, action = ask(client, model, task.input, {"namespace": "default"})
            assert (action, before.strip() == task.output) == ("plain", False)
            send_feedback(routes, trace_id, task, right=False, demonstrate=True)
            _, after, action = ask(
                client, model, "Please cancel my order for the red kettle.", {"namespace": "default"}
            )
    assert (action, after.strip()) == ("inject", task.output)


def test_curve_is_the_accuracy_of_each_block() -> None:
    """The learning curve gives one point a block, over the parts in order."""
    first, second = Result(right=[True] * 6 + [False] * 6), Result(right=[True] * 12 + [False])
    assert curve([first, second], block=12) == [(12, 0.5), (24, 1.0)]
