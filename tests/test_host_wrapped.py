"""Every approach and plugin that optillm 0.4.0 ships, wrapped: memory in its prompts, its calls in the trace."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hosting import COMPLETE, JSON, Host, chunks_of, served

from optillm_memory.testing.upstream import RecordingUpstream, Reply

pytestmark = pytest.mark.host

TAUGHT, ANSWER = "Which file holds the retry limit of the nightly uploader?", "It is in uploader.toml."
TASK = "Which file holds the retry limit of the hourly uploader?"
FINAL = "It is in retries.toml. The final answer is 42."
DRAFT = "It may be in settings.ini. The final answer is 7."
CODE = "```python\nanswer = 6 * 7\nprint(answer)\n```"

# Every approach that runs with no hub, key or network: (fewest inner calls, what the scripted upstream leads it to).
RUNS: dict[str, tuple[int, str | re.Pattern[str]]] = {
    "mcts": (6, re.compile(f"{re.escape(DRAFT)}|{re.escape(FINAL)}")),  # it picks one of its rollouts at random
    "bon": (4, FINAL),
    "moa": (3, FINAL),
    "rto": (3, FINAL),
    "z3": (2, FINAL),
    "self_consistency": (5, FINAL),
    "pvg": (17, FINAL),
    "rstar": (15, "42"),
    "cot_reflection": (1, FINAL),
    "plansearch": (4, FINAL),
    "leap": (5, FINAL),
    "re2": (1, FINAL),
    "cepo": (10, FINAL),
    "mars": (10, re.compile(f"<think>.*</think>\\s*{re.escape(FINAL)}", re.DOTALL)),
    "coc": (1, "42"),
    "deepthink": (5, FINAL),
    "executecode": (2, FINAL),
    "genselect": (2, FINAL),
    "json": (1, FINAL),  # a plain call where no schema is asked for
    "majority_voting": (1, FINAL),
    "mcp": (1, FINAL),  # a plain call where no server is configured
    "memory": (2, FINAL),
    "proxy": (1, FINAL),  # a plain call where no provider is configured
    "readurls": (0, TASK),  # it turns a query into a longer one, and calls no model
    "router": (1, FINAL),  # a plain call where its classifier cannot be fetched from the hub
    "spl": (2, FINAL),
}
SKIPPED = {
    "compact": "fetches tiktoken's tables over the network",
    "deep_research": "searches the web with Chrome",
    "longcepo": "cannot be imported as 0.4.0 loads it",
    "privacy": "fetches a model of spaCy over the network",
    "web_search": "searches the web with Chrome",
}


class Script:
    """Answers every prompt of optillm's approaches in the shape that it asks for, and counts the tokens by itself."""

    def __init__(self) -> None:
        """Start with nothing asked."""
        self.usages: list[tuple[int, int]] = []
        self._numbers = itertools.count(1)

    def __call__(self, request: JSON) -> JSON:
        """Answer with the first candidate worse than the others, and with a usage of its own."""
        number = next(self._numbers)
        prompt, completion = 100 + number, 7 * number
        self.usages.append((prompt, completion))
        texts = [DRAFT, *[FINAL] * (request["n"] - 1)] if (request.get("n") or 1) > 1 else [answer_to(request)]
        return {
            "id": f"chatcmpl-{number}", "object": "chat.completion", "created": 1, "model": request["model"],
            "choices": [
                {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                for i, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }  # fmt: skip


def answer_to(request: JSON) -> str:
    """Return the one answer to a prompt."""
    said = [str(message["content"]) for message in request["messages"]]
    asked, whole = said[-1], "\n".join(said)
    liked = FINAL in "\n".join(said[-2:])
    shapes = {
        "Rate the above response:": "9" if liked else "2",  # bon
        "Respond with only a number": "0.9" if liked else "0.1",  # mcts
        "BEST CANDIDATE: [number]": "BEST CANDIDATE: 2\n\nREASONING: it is right",  # genselect
        "Refined query:": f"{TASK} Be exact.",  # pvg
        "determine if it contains few-shot": f'<output>[{{"question": "{TAUGHT}", "answer": "{ANSWER}"}}]</output>',
        "<YES/NO>#": f"YES#{ANSWER}",  # memory
        "Score: [Your numerical score": f"Score: {9 if liked else 1}\nExplanation: it is",  # pvg
        "Rating: [[": f"Rating: [[{int(liked)}]]",  # cepo
        "will be automatically executed": CODE,  # executecode
        "Store the final result in a variable": CODE,  # coc
        "<output>": f"<thinking>I look.</thinking>\n<output>{FINAL}</output>",  # cot_reflection, leap
    }
    if asked.startswith("Based on the code execution output"):
        return FINAL
    return next((text for shape, text in shapes.items() if shape in whole), FINAL)


@pytest.fixture(scope="module")
def module_host(upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start the host with a home of its own: plugins write their configuration there, or read what someone wrote."""
    home = tmp_path_factory.mktemp("home")
    with served(upstream, home / "memory.db", env={"HOME": str(home), **COMPLETE}) as host:
        yield host


@pytest.fixture(scope="module")
def taught(module_host: Host) -> dict[str, str]:
    """Give a namespace in which a task's verified answer is in memory."""
    memory = {"namespace": "wrapped"}
    module_host.teach(TAUGHT, ANSWER, memory=memory)
    return memory


@pytest.fixture
def script(host: Host) -> Script:
    """Give the script that the upstream answers by."""
    host.upstream.reply = scripted = Script()
    return scripted


def trace_of(host: Host, answered: Mapping[str, Any]) -> JSON:
    """Return the trace of a response."""
    host.settle()
    return host.get(f"traces/{answered['agent_memory']['trace_id']}")


def text_of(answered: Mapping[str, Any]) -> str:
    """Return the text of a response's only choice."""
    (choice,) = answered["choices"]
    return str(choice["message"]["content"])


def assert_recorded(host: Host, script: Script, shown: JSON) -> None:
    """Check that a trace holds each request that the upstream received, with the tokens it counted and a time."""
    calls = shown["calls"]
    assert len(calls) == len(host.sent)
    assert sorted((c["prompt_tokens"], c["completion_tokens"]) for c in calls) == script.usages
    assert shown["prompt_tokens"] == sum(p for p, _ in script.usages)
    assert shown["completion_tokens"] == sum(c for _, c in script.usages)
    prompts = sorted(json.dumps([m["content"] for m in r["messages"]]) for r in host.sent)
    assert sorted(json.dumps([m["content"] for m in c["messages"]]) for c in calls) == prompts
    assert all(c["latency_ms"] > 0 and c["error"] is None and c["model"] == "m" for c in calls)
    assert all(set(c["answers"]) for c in calls)


@pytest.mark.parametrize("approach", RUNS)
def test_wrapped(host: Host, taught: dict[str, str], script: Script, approach: str) -> None:
    """The approach's first prompt holds what memory knows, its answer is its own, its calls are in the trace."""
    fewest, expected = RUNS[approach]
    answered = host.chat(TASK, model=f"agent_memory-{approach}-m", memory=taught)
    metadata = answered["agent_memory"]
    assert (metadata["approach"], metadata["action"]) == (approach, "inject")
    assert metadata["calls"] == len(host.sent) >= fewest
    assert re.fullmatch(re.escape(expected) if isinstance(expected, str) else expected, text_of(answered))
    if fewest:
        assert all(text in json.dumps(host.sent[0]["messages"]) for text in (TAUGHT, ANSWER, TASK))
    assert_recorded(host, script, trace_of(host, answered))


def test_the_table_is_complete() -> None:
    """Whatever optillm 0.4.0 ships is in the table: run, or skipped with a reason."""
    if importlib.metadata.version("optillm") != "0.4.0":
        pytest.skip("the table is of optillm 0.4.0")
    spec = importlib.util.find_spec("optillm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    shipped = set()
    for node in ast.walk(ast.parse((package / "server.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "known_approaches":
            shipped |= set(ast.literal_eval(node.value))
    for plugin in (package / "plugins").glob("*.py"):
        shipped |= set(re.findall(r'^SLUG = "(\w+)"', plugin.read_text(), re.MULTILINE))
    assert {*RUNS, *SKIPPED, "none"} == shipped
    assert not set(RUNS) & set(SKIPPED)


@pytest.mark.parametrize(("approach", "reason"), SKIPPED.items())
def test_skipped(host: Host, taught: dict[str, str], approach: str, reason: str) -> None:
    """What does not run here fails alone as it does wrapped; what would reach out is not tried."""
    if "cannot be imported" not in reason:
        pytest.skip(reason)
    alone = host.post({"model": f"{approach}-m", "messages": [{"role": "user", "content": TASK}]})
    body = {"model": f"agent_memory-{approach}-m", "messages": [{"role": "user", "content": TASK}]}
    wrapped = host.post({**body, "agent_memory": taught})
    assert (wrapped.status_code, wrapped.content) == (alone.status_code, alone.content) == (500, alone.content)
    assert host.sent == []


def test_exemplars_are_flattened_with_the_conversation(host: Host, taught: dict[str, str], script: Script) -> None:
    """An approach takes the exemplar as an earlier exchange of the conversation, in the host's own form of it."""
    host.chat(TASK, model="agent_memory-rto-m", memory=taught)
    flat = f"User: {TAUGHT}\nAssistant: {ANSWER}\nUser: {TASK}"
    assert [m["content"] for m in host.sent[0]["messages"]] == ["", flat]
    assert len(script.usages) == 3


@pytest.mark.parametrize("text", ["Assistant: it is", "a User: b Assistant: c", "User:", "ends with Assistant:", " x "])
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream": True}], ids=json.dumps)
def test_answers_are_cut_as_alone(host: Host, taught: dict[str, str], text: str, fields: JSON) -> None:
    """Where the host cuts an approach's answer at a conversation tag, the wrapped one is cut there and nowhere else."""
    host.upstream.reply = lambda _request: text
    body = {"messages": [{"role": "user", "content": TASK}], **fields}
    alone = host.post({"model": "rto-m", **body})
    wrapped = host.post({"model": "agent_memory-rto-m", **body, "agent_memory": taught})
    if "stream" in fields:
        said = ["".join(c["choices"][0]["delta"].get("content") or "" for c in chunks_of(r)) for r in (alone, wrapped)]
    else:
        said = [r.json()["choices"] for r in (alone, wrapped)]
    assert said[0] == said[1]


@pytest.mark.parametrize(("approach", "calls"), [("bon", 5), ("moa", 3), ("re2", 1)])
def test_streamed(host: Host, taught: dict[str, str], script: Script, approach: str, calls: int) -> None:
    """A streamed answer of a wrapped approach is the same text, and its calls are in the trace."""
    body = {"model": f"agent_memory-{approach}-m", "messages": [{"role": "user", "content": TASK}], "stream": True}
    response = host.post({**body, "agent_memory": taught})
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks_of(response)) == FINAL
    assert len(host.sent) <= calls
    host.settle()
    assert_recorded(host, script, host.get(f"traces/{response.headers['X-Agent-Memory-Trace-Id']}"))


def test_three_choices(host: Host, taught: dict[str, str], script: Script) -> None:
    """`n = 3` runs the approach three times, and the one trace holds the calls of all three."""
    answered = host.chat(TASK, model="agent_memory-moa-m", memory=taught, n=3)
    assert [c["message"]["content"] for c in answered["choices"]] == [FINAL] * 3
    assert answered["agent_memory"]["calls"] == len(host.sent) == 9
    assert_recorded(host, script, trace_of(host, answered))


def test_a_pipelines_own_calls_are_not_memorys(host: Host, taught: dict[str, str], script: Script) -> None:
    """Before or beside another approach memory makes none or one call: the other's calls are its own."""
    answered = host.chat(TASK, model="agent_memory&moa-m", memory=taught)
    assert (text_of(answered), len(host.sent)) == (FINAL, 3)
    assert all(ANSWER in json.dumps(request["messages"]) for request in host.sent)
    assert trace_of(host, answered)["calls"] == []
    host.upstream.clear()
    answered = host.chat(TASK, model="agent_memory|moa-m", memory=taught)
    assert [c["message"]["content"] for c in answered["choices"]] == [FINAL, FINAL]
    assert len(host.sent) == 4
    assert "calls" not in answered["agent_memory"]
    assert trace_of(host, answered)["calls"] == []
    assert len(script.usages) == 7


def test_a_refused_call_is_recorded_too(host: Host, taught: dict[str, str], script: Script) -> None:
    """Where the upstream knows no `n`, moa asks one by one: the refused call is in the trace with its error."""
    refusal = Reply(status=400)
    host.upstream.reply = lambda request: refusal if (request.get("n") or 1) > 1 else script(request)
    answered = host.chat(TASK, model="agent_memory-moa-m", memory=taught)
    assert text_of(answered) == FINAL
    shown = trace_of(host, answered)
    refused, *others = shown["calls"]
    assert refused["error"].startswith("BadRequestError")
    assert (refused["prompt_tokens"], refused["answers"]) == (0, [])
    assert len(others) == len(script.usages) == len(host.sent) - 1 == 5
    assert shown["completion_tokens"] == sum(c for _, c in script.usages)


def test_an_upstream_error_passes_as_alone(host: Host, taught: dict[str, str], script: Script) -> None:
    """An error amid an approach reaches the client as without memory, and the trace has what came before."""
    body = {"messages": [{"role": "user", "content": TASK}]}
    failing = Reply(status=500, headers={"x-should-retry": "false"})
    host.upstream.reply = lambda request: script(request) if len(request["messages"]) == 2 else failing
    alone = host.post({"model": "rto-m", **body})
    wrapped = host.post({"model": "agent_memory-rto-m", **body, "agent_memory": taught})
    assert (wrapped.status_code, wrapped.content) == (alone.status_code, alone.content) == (500, alone.content)
    host.settle()
    shown = host.get(f"traces/{wrapped.headers['X-Agent-Memory-Trace-Id']}")
    first, second = shown["calls"]
    assert (first["error"], first["answers"]) == (None, [FINAL])
    assert "500" in second["error"]
    assert "500" in shown["error"]
    assert (shown["prompt_tokens"], shown["completion_tokens"]) == script.usages[-1]


def test_requests_at_once_keep_their_calls_apart(host: Host, taught: dict[str, str], script: Script) -> None:
    """Approaches that run at the same time, in threads of their own, each have their own calls in their trace."""
    answered: dict[str, JSON] = {}

    def ask(approach: str, number: int) -> None:
        said = f"{TASK} I am caller {number}."
        answered[str(number)] = host.chat(said, model=f"agent_memory-{approach}-m", memory=taught)

    approaches = ["moa", "rstar", "cepo", "rto", "moa", "mars"]
    threads = [threading.Thread(target=ask, args=pair[::-1]) for pair in enumerate(approaches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    total = 0
    for number in range(len(approaches)):
        shown = trace_of(host, answered[str(number)])
        prompts = json.dumps([call["messages"] for call in shown["calls"]])
        assert set(re.findall(r"I am caller (\d)", prompts)) == {str(number)}
        assert len(shown["calls"]) == answered[str(number)]["agent_memory"]["calls"]
        total += len(shown["calls"])
    assert total == len(host.sent) == len(script.usages)
