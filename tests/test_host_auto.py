"""Approach `auto` through the real host: the policy learns which arm pays, and says what it believes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hosting import BOTH_LANES, JSON, MODEL, Host, on_lane, served

from optillm_memory.testing.upstream import RecordingUpstream, Reply, tool_call

pytestmark = pytest.mark.host
LANES = BOTH_LANES

ENV = {
    "OPTILLM_AGENT_MEMORY_ARMS": "none@default, none@small=0.1, re2@default, gone@default",
    "OPTILLM_AGENT_MEMORY_WARMUP_SHARE": "0.6",
    "OPTILLM_AGENT_MEMORY_HOLDOUT": "0",
    "OPTILLM_AGENT_MEMORY_ENCODER": "hashing",
    "OPTILLM_AGENT_MEMORY_DEADLINE_MS": "20000",  # a decision that is late on a busy machine would not be made
}
AUTO = {"approach": "auto"}
UPSTREAM_MODEL = MODEL.removeprefix("agent_memory-")
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}]


def by_model(request: JSON) -> str:
    """Answer rightly as the small model alone."""
    return "right" if request["model"] == "small" else "wrong"


def tell(host: Host, completion: JSON) -> None:
    """Report how an answer did."""
    right = completion["choices"][0]["message"]["content"] == "right"
    host.tell({"trace_id": completion["id"], "metric": "success", "value": right, "source": "code"})


def test_the_policy_learns_and_goes_on_after_a_restart(upstream: RecordingUpstream, tmp_path: Path) -> None:
    """Arms are tried, the one that pays comes to answer, what the upstream is asked fits, and the log holds it all."""
    upstream.reply = by_model
    memory = {**AUTO, "namespace": "learning"}
    with served(upstream, tmp_path / "memory.db", env=ENV) as host:
        arms: list[str] = []
        for number in range(60):
            upstream.clear()
            completion = host.chat(f"How many parts has order number {number}?", memory=memory)
            shown = completion["agent_memory"]["policy"]
            arms.append(shown["arm"])
            assert {"reason": "no_such_approach", "arm": "gone@default"} in completion["agent_memory"]["skipped"]
            assert 0 < shown["propensity"] <= 1
            approach, model = shown["arm"].split("@")
            asked = host.sent[-1]
            assert asked["model"] == (UPSTREAM_MODEL if model == "default" else model)
            assert ("Read the question again" in str(asked["messages"])) == (approach == "re2")
            assert (completion["agent_memory"]["approach"], completion["agent_memory"]["model"]) == (
                approach,
                asked["model"],
            )
            tell(host, completion)
        counts = Counter(arms)
        assert set(counts) == {"none@default", "none@small", "re2@default"}  # the host has no approach `gone`
        assert counts["none@small"] > 20
        believed = host.get("policy", namespace="learning")
        assert believed["choices"] == len(arms)
        assert max(believed["all"], key=lambda arm: believed["all"][arm]["utility"]) == "none@small"
        assert believed["all"]["none@small"]["rewards"] == pytest.approx(counts["none@small"], abs=1)
        why = host.get(f"traces/{completion['id']}/why")
        assert why["policy"]["arm"] == arms[-1]
        assert sum(why["policy"]["probabilities"].values()) == pytest.approx(1)
        assert why["policy"]["reward"] in (0, 1)
        assert host.get("policy", namespace="another")["choices"] == 0
        assert host.get("policy", key="sk-somebody-else", namespace="learning")["choices"] == 0
    with served(upstream, tmp_path / "memory.db", env={**ENV, "OPTILLM_AGENT_MEMORY_WARMUP_SHARE": "0.01"}) as host:
        again = host.get("policy", namespace="learning")
        assert (again["choices"], again["all"]) == (believed["choices"], believed["all"])
        later = [host.chat(f"Is order {n} paid?", memory=memory)["agent_memory"]["policy"] for n in range(8)]
        assert [p["arm"] for p in later].count("none@small") >= 6
        assert later[0]["reason"] == "better"


@pytest.fixture(scope="module")
def auto(lane: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a server with arms of which the words-only one comes first."""
    env = {**ENV, "OPTILLM_AGENT_MEMORY_ARMS": "re2@default, none@small", "OPTILLM_AGENT_MEMORY_WARMUP_SHARE": "0"}
    env |= on_lane(lane)
    with RecordingUpstream() as upstream, served(upstream, tmp_path_factory.mktemp("auto") / "m.db", env=env) as host:
        yield host


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": TOOLS},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    ],
    ids=["tools", "response_format", "n", "image"],
)
def test_what_an_approach_cannot_carry_goes_to_a_plain_arm(auto: Host, extra: JSON) -> None:
    """Requests with more than words in them are answered by an arm of approach `none`, whole."""
    auto.upstream.clear()
    auto.upstream.reply = lambda _request: "ok"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Look it up."}], "agent_memory": AUTO, **extra}
    completion = auto.post(body).json()
    assert completion["agent_memory"]["policy"]["arm"] == "none@small"
    for key in extra.keys() - {"messages"}:
        assert auto.sent[-1][key] == extra[key]
    plain = auto.chat("Look it up.", memory=AUTO)
    assert plain["agent_memory"]["policy"] == {"arm": "re2@default", "propensity": 1.0, "reason": "default"}


def test_an_episode_keeps_its_arm(auto: Host) -> None:
    """The second request of a conversation goes the way of the first, and is no choice of its own."""
    auto.upstream.reply = lambda _request: Reply(content=None, tool_calls=[tool_call("run", {})])
    first = {"role": "user", "content": "Start the job."}
    body = {"model": MODEL, "messages": [first], "tools": TOOLS, "agent_memory": {**AUTO, "namespace": "episodes"}}
    message = auto.post(body).json()["choices"][0]["message"]
    auto.upstream.reply = lambda _request: "done"
    result = {"role": "tool", "tool_call_id": "call_1", "content": "started"}
    second = auto.post({**body, "messages": [first, message, result]}).json()
    assert second["agent_memory"]["policy"] == {"arm": "none@small"}
    auto.settle()
    assert auto.get("policy", namespace="episodes")["choices"] == 1


def test_a_verified_answer_comes_before_the_arms(auto: Host) -> None:
    """The ladder's first rung is reuse: where memory answers, no arm is chosen."""
    auto.teach("Write the German word for a lease.", "Mietvertrag")
    auto.upstream.clear()
    completion = auto.chat("Write the German word for a lease.", memory={**AUTO, "reuse": {"max_error": 0.05}})
    assert completion["agent_memory"]["action"] == "reuse"
    assert auto.sent == []


@pytest.mark.parametrize("mode", ["write", "read", "off"])
def test_other_modes_take_the_default(auto: Host, mode: str) -> None:
    """Where memory is not consulted the default arm answers; what is not recorded is no choice; off is off."""
    auto.upstream.clear()
    auto.upstream.reply = lambda _request: "ok"
    memory = {**AUTO, "mode": mode, "namespace": f"mode-{mode}"}
    completion = auto.chat("What does the house cost?", memory=memory)
    assert ("Read the question again" in str(auto.sent[-1])) == (mode != "off")
    if mode != "off":
        assert completion["agent_memory"]["policy"]["arm"] == "re2@default"
    auto.settle()
    assert auto.get("policy", namespace=f"mode-{mode}")["choices"] == 0


def test_without_arms_auto_is_a_plain_request(host: Host, namespace: dict[str, str]) -> None:
    """Nothing set, nothing chosen, and the response says so."""
    completion = host.chat("What is the time of the meeting?", memory={**namespace, **AUTO})
    assert completion["agent_memory"]["approach"] == "none"
    assert {"reason": "no_arms"} in completion["agent_memory"]["skipped"]
    assert host.get("policy", **namespace)["arms"] == []
