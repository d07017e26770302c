"""The closed loop through a real optillm: ask, say how it went, and be answered better in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hosting import BOTH_LANES, KEY, LEAN, MODEL, QUIET, Host, running, served, until

from optillm_memory.bench.stream import wait_for_encoder
from optillm_memory.testing.host import HostProcess
from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = pytest.mark.host
LANES = BOTH_LANES

TASK = "How do I raise the retry limit of the nightly uploader?"
REWORDED = "What is the way to increase the nightly uploader's retry limit?"
ANSWER = "Set retry_limit in uploader.toml."


def cli(db: Path, *arguments: str) -> Any:
    """Run a command of `optillm-memory` with --json on a database file; return what it printed."""
    command = [sys.executable, "-m", "optillm_memory.cli", *arguments, "--db", str(db), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **QUIET}, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ask_with_openai(host: Host, text: str, model: str = MODEL, **options: Any) -> tuple[Any, dict[str, str], Any]:
    """Ask with the real OpenAI client; return the completion, its headers, and its field `agent_memory`."""
    with host.openai() as client:
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": text}], **options
        )
    completion = raw.parse()
    return completion, {k.lower(): v for k, v in raw.headers.items()}, (completion.model_extra or {})["agent_memory"]


def test_memory_outlives_the_process(upstream: RecordingUpstream, db: Path, tmp_path: Path) -> None:
    """What was verified in one process is injected in the next, however the plugin is loaded and selected."""
    env = {**QUIET, "OPTILLM_AGENT_MEMORY_ENCODER": "auto"}
    upstream.reply = lambda _request: ANSWER
    with running(HostProcess.serve(upstream.base_url, db=db, env=env), upstream, db) as first:
        completion, headers, metadata = ask_with_openai(first, TASK)
        assert completion.choices[0].message.content == ANSWER
        assert completion.id == metadata["trace_id"] == headers["x-agent-memory-trace-id"]
        assert metadata["action"] == headers["x-agent-memory-action"] == "plain"
        assert first.prompt == [{"role": "user", "content": TASK}]
        feedback = {"trace_id": completion.id, "metric": "success", "value": True, "source": "human"}
        assert first.tell(feedback, key="sk-test")["status"] == "applied"

    subprocess.run([sys.executable, "-m", "optillm_memory.cli", "install", str(tmp_path)], check=True, timeout=60)
    turns = [{"role": "user", "content": TASK}, {"role": "assistant", "content": ANSWER}]
    with running(HostProcess.plain(upstream.base_url, db=db, cwd=tmp_path, env=env), upstream, db) as second:
        assert wait_for_encoder(second.process.base_url, "sk-test") == "ready"
        # The memory was made before the first encoder was there: its vector comes behind the requests.
        assert until(lambda: bool(second.get("memories", key="sk-test", query=REWORDED)["data"]))
        completion, headers, metadata = ask_with_openai(second, REWORDED)
        assert second.prompt == [*turns, {"role": "user", "content": REWORDED}]
        assert metadata["action"] == headers["x-agent-memory-action"] == "inject"
        (item,) = metadata["injected"]
        assert item["kind"] == "exemplar"
        assert item["memory_id"].startswith("mem-")
        assert item["tokens"] > 0
        assert item["score"] > 0

    env |= {**LEAN, "OPTILLM_AGENT_MEMORY_ENCODER": "none"}
    third = HostProcess.serve(upstream.base_url, db=db, extra_args=["--approach", "agent_memory"], env=env)
    with running(third, upstream, db) as host:
        _, _, metadata = ask_with_openai(host, TASK, model="some-model")
        assert host.sent[-1]["model"] == "some-model"
        assert host.prompt == [*turns, {"role": "user", "content": TASK}]
        assert metadata["action"] == "inject"
        assert {"reason": "encoder_none_recall_is_lexical"} in metadata["skipped"]
    upstream.reply = lambda _request: "ok"


def test_streaming_names_the_trace(host: Host) -> None:
    """A streamed answer carries the trace id in its chunks and in the header, and takes feedback by it."""
    with host.openai() as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "stream this"}], stream=True
        )
        ids = {chunk.id for chunk in raw.parse()}
    assert ids == {raw.headers["X-Agent-Memory-Trace-Id"]}
    feedback = {"trace_id": ids.pop(), "metric": "score", "value": 1, "source": "code"}
    assert host.tell(feedback, key="sk-test")["status"] == "applied"


def test_feedback_changes_the_very_next_request(host: Host, namespace: dict[str, str]) -> None:
    """Acknowledged feedback acts on the next request at once, and its retraction unmakes the memory at once."""
    host.upstream.reply = lambda _request: ANSWER
    trace_id = host.chat(TASK, memory=namespace)["id"]
    success = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code", "feedback_id": trace_id}
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"
    assert host.tell(success) == {"feedback_id": trace_id, "status": "applied"}
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"
    assert host.prompt[1] == {"role": "assistant", "content": ANSWER}
    assert host.tell(success)["status"] == "duplicate"
    assert host.tell({"feedback_id": trace_id, "value": None})["status"] == "retracted"
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"
    assert len(host.prompt) == 1
    assert host.tell(success)["status"] == "duplicate"
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"


def test_demonstration_after_a_failure(host: Host, namespace: dict[str, str]) -> None:
    """The right answer sent after a failure is what the next request is shown, not the wrong one."""
    host.upstream.reply = lambda _request: "I do not know."
    trace_id = host.chat(TASK, memory=namespace)["id"]
    told = [
        {"trace_id": trace_id, "metric": "success", "value": False, "source": "code"},
        {"trace_id": trace_id, "metric": "demonstration", "value": ANSWER, "source": "code"},
    ]
    assert [receipt["status"] for receipt in host.tell(told)] == ["applied", "applied"]
    host.chat(TASK, memory=namespace)
    assert [m["content"] for m in host.prompt] == [TASK, ANSWER, TASK]


def test_a_models_word_alone_is_inert(host: Host, namespace: dict[str, str]) -> None:
    """Success by source `llm` makes a candidate that is listed but not injected, until a human confirms it."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "llm"})
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"
    own = [m for m in host.get("memories")["data"] if m["scope"]["namespace"] == namespace["namespace"]]
    assert [m["status"] for m in own] == ["candidate"]
    host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "human"})
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"


def test_feedback_sent_along_with_a_later_request(host: Host, namespace: dict[str, str]) -> None:
    """Feedback in the field `agent_memory` is acknowledged in the response and acts on the request after it."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    item = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code", "feedback_id": f"f-{trace_id}"}
    other = host.chat("Unrelated: name a colour.", memory={**namespace, "feedback": [item]})
    assert other["agent_memory"]["feedback"] == [{"feedback_id": f"f-{trace_id}", "status": "applied"}]
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"


def test_feedback_waits_for_its_trace(host: Host, namespace: dict[str, str]) -> None:
    """Feedback for an episode that has not been seen is pending, and applied when its trace arrives."""
    early = {"episode_id": f"ep-{namespace['namespace']}", "metric": "success", "value": True, "source": "code"}
    headers = {"X-Agent-Memory-Namespace": namespace["namespace"]}
    response = host.route("POST", "feedback", json=early, headers=headers)
    assert response.json()["status"] == "pending"
    host.chat(TASK, memory={**namespace, "episode_id": early["episode_id"]})
    host.settle()
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"


def test_feedback_for_a_trace_that_never_comes_is_kept(host: Host) -> None:
    """Feedback on an unknown trace id is acknowledged as pending, and as a duplicate when sent again."""
    unknown = {"trace_id": "chatcmpl-" + "0" * 32, "metric": "comment", "value": "hm", "source": "human"}
    assert host.tell({**unknown, "feedback_id": "never"})["status"] == "pending"
    assert host.tell({**unknown, "feedback_id": "never"})["status"] == "duplicate"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"verdict": True}, "feedback.verdict"),
        ({"metric": "sucess"}, "feedback.metric"),
        ({"metric": None}, "feedback.metric"),
        ({"value": "yes"}, "feedback.value"),
        ({"metric": "score", "value": 1.5}, "feedback.value"),
        ({"source": "inferred"}, "feedback.source"),
        ({"episode_id": "both"}, "feedback.trace_id"),
        ({"trace_id": None}, "feedback.trace_id"),
        ({"trace_id": 7}, "feedback.trace_id"),
        ({"value": None}, "feedback.feedback_id"),
        ({"evidence": {"exit": 1}}, "feedback.evidence.exit"),
        ({"evidence": {"exit_code": "1"}}, "feedback.evidence.exit_code"),
        ({"occurred_at": "yesterday"}, "feedback.occurred_at"),
        ({"occurred_at": 1e13}, "feedback.occurred_at"),
    ],
)
def test_bad_feedback_names_the_field(host: Host, changes: dict[str, Any], param: str) -> None:
    """A wrong or unknown field is refused with 400 in OpenAI's shape, and the field is named."""
    good = {"trace_id": "chatcmpl-x", "metric": "success", "value": True, "source": "code"}
    response = host.route("POST", "feedback", json={**good, **changes})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("content", "param"), [("[]", "feedback"), ("7", "feedback"), ("{", "feedback"), ("", "")])
def test_feedback_that_is_no_object(host: Host, content: str, param: str) -> None:
    """What is no JSON object and no list of them gets 400, not 500."""
    response = host.route("POST", "feedback", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert param in (response.json()["error"]["param"] or "")


def test_a_bad_list_is_refused_whole(host: Host, namespace: dict[str, str]) -> None:
    """One bad item in a list refuses all of it, names the item, and leaves the good one without effect."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    good = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}
    response = host.route("POST", "feedback", json=[good, {**good, "metric": "x"}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "feedback[1].metric")
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"


def test_feedback_over_a_megabyte(host: Host) -> None:
    """Feedback over 1 MB gets 413, and just under it 202."""
    item = {"trace_id": "chatcmpl-y", "metric": "comment", "value": "x" * 1_000_001, "source": "human"}
    response = host.route("POST", "feedback", json=item)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert host.tell({**item, "value": "x" * 999_000})["status"] == "pending"


def test_another_scope_gets_nothing(host: Host, namespace: dict[str, str]) -> None:
    """A memory is injected for its own key, namespace and user alone."""
    mine = {**namespace, "user_id": "u1"}
    host.teach(TASK, ANSWER, memory=mine)
    assert host.chat(TASK, memory=mine)["agent_memory"]["action"] == "inject"
    for memory, key in (
        ({**mine, "user_id": "u2"}, KEY),
        (namespace, KEY),
        ({**mine, "agent_id": "a"}, KEY),
        ({**mine, "namespace": "other"}, KEY),
        (mine, "bob"),
        (mine, None),
    ):
        assert host.chat(TASK, memory=memory, key=key)["agent_memory"]["action"] == "plain", (memory, key)
        assert host.prompt == [{"role": "user", "content": TASK}]


def test_another_key_cannot_speak_of_my_trace(host: Host, namespace: dict[str, str]) -> None:
    """Another key's feedback has no effect on my trace, which it cannot read either; the operator may do both."""
    trace_id = host.chat(TASK, memory=namespace)["id"]
    item = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}
    assert host.tell(item, key="mallory")["status"] == "pending"
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"
    assert host.route("GET", f"traces/{trace_id}", key="mallory").status_code == 404
    assert host.tell(item, key=None)["status"] == "applied"
    assert host.get(f"traces/{trace_id}", key=None)["outcome"] == {"verdict": "success", "verified": True}
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"


def test_routes_show_traces_and_memories(host: Host, namespace: dict[str, str]) -> None:
    """The routes list and show what was asked, answered, told and learned, to its caller alone."""
    trace_id = host.teach(TASK, ANSWER, memory=namespace)
    used = host.chat(TASK, memory=namespace)["agent_memory"]
    host.settle()
    shown = host.get(f"traces/{trace_id}")
    assert (shown["task"], shown["answer"], shown["action"]) == (TASK, ANSWER, "plain")
    assert [m["content"] for m in shown["messages"]] == [TASK, ANSWER]
    assert [(f["metric"], f["value"], f["source"]) for f in shown["feedback"]] == [("success", True, "code")]
    assert [t["trace_id"] for t in host.get("traces", limit=1)["data"]] == [used["trace_id"]]
    assert trace_id in {t["trace_id"] for t in host.get("traces", text="nightly uploader", limit=1000)["data"]}
    memory_id = used["injected"][0]["memory_id"]
    memory = host.get(f"memories/{memory_id}")
    assert (memory["task"], memory["answer"], memory["status"]) == (TASK, ANSWER, "verified")
    (hit,) = host.get("memories", query=TASK, namespace=namespace["namespace"])["data"]
    assert hit["memory_id"] == memory_id
    assert hit["cosine"] == pytest.approx(1, abs=1e-3)
    assert host.get("memories", query=TASK, namespace="other")["data"] == []
    for path in (f"memories/{memory_id}", f"traces/{trace_id}"):
        assert host.route("GET", path, key="mallory").status_code == 404
    assert host.get("traces", key="mallory")["data"] == host.get("memories", key="mallory")["data"] == []


def test_routes_refuse_what_is_not_there(host: Host) -> None:
    """An unknown trace or memory is 404 and a bad limit 400, in OpenAI's shape."""
    for path in ("traces/chatcmpl-none", "memories/mem-none"):
        response = host.route("GET", path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    for limit in ("0", "-1", "many", "1001"):
        response = host.route("GET", "traces", params={"limit": limit})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


def test_stats_ready_and_rebuild(host: Host, namespace: dict[str, str]) -> None:
    """Stats count without telling texts, ready writes, and rebuild (the operator's alone) keeps every memory."""
    host.teach(TASK, ANSWER, memory=namespace)
    host.chat("another's question", key="bob")
    host.settle()
    before = host.get("stats", key=None)
    assert before["encoder"] == "ready"
    assert before["traces"] > host.get("stats")["traces"] > 0  # a caller's own are some of all
    assert before["lost"] == 0
    assert host.get("ready") == {"status": "ready", "encoder": "ready"}
    assert host.route("POST", "rebuild").status_code == 403
    rebuilt = host.route("POST", "rebuild", key=None).json()
    assert rebuilt["traces"] == before["traces"]
    after = host.get("stats", key=None)
    assert after["memories_by_status"].get("verified") == before["memories_by_status"]["verified"]
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"


def test_commands_work_on_the_same_file(host: Host, namespace: dict[str, str]) -> None:
    """Each command reads or changes the file of a running server, and the server's next request knows of it."""
    asked = host.chat(TASK, memory=namespace)
    host.settle()
    trace_id = asked["id"]
    assert cli(host.db, "stats")["traces"] == host.get("stats", key=None)["traces"]
    assert cli(host.db, "traces", "--limit", "1")[0]["trace_id"] == trace_id
    assert cli(host.db, "show", trace_id)["task"] == TASK
    (receipt,) = cli(host.db, "feedback", trace_id, "--success", "--source", "code", "--feedback-id", trace_id)
    assert receipt == {"feedback_id": trace_id, "status": "applied"}
    used = host.chat(TASK, memory=namespace)["agent_memory"]
    assert used["action"] == "inject"
    memory_id = used["injected"][0]["memory_id"]
    assert memory_id in {m["memory_id"] for m in cli(host.db, "memories", "--limit", "1000")}
    assert cli(host.db, "show", memory_id)["answer"] == f"echo: {TASK}"
    recalled = cli(host.db, "recall", TASK, "--namespace", namespace["namespace"])
    assert [m["memory_id"] for m in recalled] == [memory_id]
    assert cli(host.db, "rebuild")["traces"] == host.get("stats", key=None)["traces"]
    assert host.chat(TASK, memory=namespace)["agent_memory"]["injected"][0]["memory_id"] == memory_id
    (receipt,) = cli(host.db, "feedback", "--retract", trace_id)
    assert receipt["status"] == "retracted"
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"


def test_holdout_in_a_second_process_on_the_same_file(host: Host, namespace: dict[str, str]) -> None:
    """A process that holds out every episode sends nothing of a memory that it knows, and records the propensity."""
    host.teach(TASK, ANSWER, memory=namespace)
    with served(host.upstream, host.db, env={"OPTILLM_AGENT_MEMORY_HOLDOUT": "1"}) as other:
        held = other.chat(TASK, memory=namespace)
        assert held["agent_memory"]["action"] == "holdout"
        assert held["agent_memory"]["injected"] == []
        assert other.prompt == [{"role": "user", "content": TASK}]
        assert other.chat("Name a colour.", memory=namespace)["agent_memory"]["action"] == "plain"
        other.settle()
        shown = host.get(f"traces/{held['id']}")
        assert (shown["held_out"], shown["propensity"]) == (True, 1.0)
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "inject"
