"""A request that the upstream takes without memory, and refuses with it, ended in an error that memory had made.

Reported of others: https://github.com/QwenLM/qwen-code/issues/3724 (the `reasoning_content` must be passed back with
every assistant turn, also with those that a proxy made up) and https://github.com/simular-ai/Agent-S/issues/70 (a model
whose roles must alternate gets none of its own); context lengths, content filters and bodies too large are of the kind.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from hosting import BOTH_LANES, JSON, Host, chunks_of

from optillm_memory.inject.refusals import FORMS as FORMS_OF_MEMORY
from optillm_memory.inject.refusals import REFUSED_FOR_S, Refusals
from optillm_memory.records import Scope
from optillm_memory.testing.upstream import Reply, tool_call

pytestmark = pytest.mark.host
LANES = BOTH_LANES

TASK, ANSWER = "Which file holds the retry limit of the nightly uploader?", "It is in uploader.toml."
FOLLOW_UP = "And which one holds its log level?"
BLOCK = "<agent_memory"
TOOLS = [{"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}]
SAID = "I would have to look."
ONCE = {"x-should-retry": "false"}  # the host's client makes no second try of its own
SOON = {"retry-after-ms": "10"}  # it makes two more, at once


def error(status: int, message: str, code: Any = None, **headers: str) -> Reply:
    """Return an error in OpenAI's form."""
    said = {"message": message, "type": "invalid_request_error", "param": "messages", "code": code}
    return Reply(status=status, body={"error": said}, headers=headers)


KINDS = {
    "context": error(400, "This model's maximum context length is 8192 tokens.", "context_length_exceeded"),
    "filter": error(400, "The response was filtered: the prompt triggered the content policy.", "content_filter"),
    "reasoning": error(400, "The `reasoning_content` in the thinking mode must be passed back to the API."),
    "alternation": error(400, "Conversation roles must alternate user/assistant/user/assistant/...", 400),
    "earlier-turns": error(400, "Assistant turns are only accepted as the last message.", "invalid_value"),
    "too-large": Reply(status=413, body={"message": "Request size limit exceeded"}),
    "unprocessable": Reply(status=422, body={"detail": [{"loc": ["body", "messages", 1], "msg": "unexpected"}]}),
    "status-200": Reply(body={"error": {"message": "Provider returned error", "code": 400}, "choices": None}),
}
FORMS = {"turns": "turns", "history": "block", "tools": "block"}
EACH = [*((kind, False) for kind in KINDS), ("context", True), ("status-200", True)]  # streamed or not


def form_in(request: Mapping[str, Any]) -> str:
    """Return in which form memory stands in a prompt; empty where it does not."""
    text = json.dumps(request["messages"])
    return "block" if BLOCK in text else "turns" if ANSWER in text else ""


@dataclass
class Picky:
    """An upstream that refuses prompts with memory in some forms, and answers others: with a call where it may."""

    refusal: Reply
    forms: tuple[str, ...] = ("turns", "block")
    otherwise: Reply | None = None

    def __call__(self, request: JSON) -> Reply:
        """Refuse or answer."""
        if form_in(request) in self.forms:
            return self.refusal
        if self.otherwise is not None:
            return self.otherwise
        calls = [tool_call("bash", {"command": "ls -la"})] if request.get("tools") else []
        return Reply(content=None if calls else SAID, tool_calls=calls)


@pytest.fixture(scope="module")
def taught(module_host: Host) -> dict[str, str]:
    """Give a namespace in which the task's answer is in memory, for tests that say nothing of it and end at once."""
    memory = {"namespace": "taught"}
    module_host.teach(TASK, ANSWER, memory=memory)
    return memory


@pytest.fixture
def known(host: Host, namespace: dict[str, str]) -> dict[str, str]:
    """Give a namespace in which the task's answer is in memory."""
    host.teach(TASK, ANSWER, memory=namespace)
    host.upstream.clear()
    return namespace


@pytest.fixture
def model() -> str:
    """Give a model's name that nothing is known of yet."""
    return named()


def named() -> str:
    """Return a new model's name."""
    return f"m{uuid.uuid4().hex}"


def body_of(form: str, *, stream: bool = False) -> JSON:
    """Return a request that gets memory in this form, in a conversation of its own."""
    messages: list[JSON] = [{"role": "user", "content": TASK}]
    if "history" in form:
        messages = [{"role": "user", "content": f"Good morning, {uuid.uuid4().hex}."}, *messages]
    return {"messages": messages, "stream": stream, **({"tools": TOOLS} if "tools" in form else {})}


def asked(host: Host, body: JSON, model: str, memory: JSON | None = None) -> httpx.Response:
    """Forget what came before, send a request and return the raw response.

    A plain one without memory is answered by optillm, or, where memory takes the direct lane, by the upstream itself.
    """
    host.upstream.clear()
    if memory is None and host.is_direct and "-" not in model:
        return host.http.post(f"{host.upstream.base_url}/chat/completions", json={**body, "model": model})
    return host.post({**body, "model": model, **({} if memory is None else {"agent_memory": memory})})


def choices_of(response: httpx.Response) -> Any:
    """Return what was answered, streamed or not."""
    assert response.status_code == 200, response.text
    if response.headers["Content-Type"].startswith("text/event-stream"):
        return [chunk["choices"] for chunk in chunks_of(response)]
    return response.json()["choices"]


def trace_of(host: Host, response: httpx.Response) -> JSON:
    """Return what was recorded of a response, once its metadata say the same."""
    host.settle()
    shown = host.get(f"traces/{response.headers['X-Agent-Memory-Trace-Id']}")
    assert response.headers["X-Agent-Memory-Action"] == shown["action"]
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        metadata = response.json()["agent_memory"]
        assert (metadata["action"], metadata["skipped"]) == (shown["action"], shown["skipped"])
        assert metadata.get("extra_calls", 0) == shown["extra_calls"]
        assert [i["memory_id"] for i in metadata["injected"]] == [i["memory_id"] for i in shown["injected"]]
    return shown


def reasons(shown: Mapping[str, Any]) -> list[str]:
    """Return why something was left out."""
    return [item["reason"] for item in shown["skipped"]]


def assert_went_on_as_sent(shown: JSON) -> None:
    """Check that a trace tells of a refusal, the one extra call, and nothing injected."""
    assert reasons(shown).count("refused_with_memory") == 1
    assert (shown["action"], shown["extra_calls"], shown["injected"], shown["error"]) == ("plain", 1, [], None)


def blamed(host: Host, memory: Mapping[str, str]) -> int:
    """Return how often the namespace's memories were found wrong where they were used."""
    found = [m for m in host.get("memories", limit=1000)["data"] if m["scope"]["namespace"] == memory["namespace"]]
    assert found
    return sum(m["used_failures"] for m in found)


# -- the matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_of_memory_is_not_the_clients(
    host: Host, taught: dict[str, str], model: str, kind: str, form: str, *, stream: bool
) -> None:
    """The client gets the answer without memory at one extra call, and the refused form is not tried again."""
    refused = FORMS[form]
    body = body_of(form, stream=stream)
    host.upstream.reply = Picky(KINDS[kind], (refused,))
    alone = asked(host, body, model)
    (as_sent,) = host.upstream.requests
    found = asked(host, body, f"agent_memory-{model}", taught)
    assert choices_of(found) == choices_of(alone)
    with_memory, again = host.upstream.requests
    assert form_in(with_memory.json) == refused
    assert again.json["messages"] == body["messages"]
    assert list(again.json.items()) == list(as_sent.json.items())
    shown = trace_of(host, found)
    assert_went_on_as_sent(shown)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_refused_is_not_tried_again_nor_blamed(
    host: Host, known: dict[str, str], model: str, kind: str, form: str
) -> None:
    """The form that was refused goes out no more with that model, the other one and other models go on."""
    refused = FORMS[form]
    host.upstream.reply = Picky(KINDS[kind], (refused,))
    shown = trace_of(host, asked(host, body_of(form), f"agent_memory-{model}", known))
    assert_went_on_as_sent(shown)
    told = {"trace_id": shown["trace_id"], "metric": "success", "value": False, "source": "code"}
    assert host.tell(told)["status"] == "applied"
    assert blamed(host, known) == 0

    later = body_of(form)
    after = asked(host, later, f"agent_memory-{model}", known)
    assert after.status_code == 200
    (sent,) = host.sent
    if refused == "block":
        assert sent["messages"] == later["messages"]
        assert "refused_before" in reasons(trace_of(host, after))
        asked(host, body_of("turns"), f"agent_memory-{model}", known)
        assert [form_in(r) for r in host.sent] == ["turns"]
    else:
        assert form_in(sent) == "block"
        assert trace_of(host, after)["action"] == "inject"
    host.upstream.reply = Picky(KINDS[kind], ())
    asked(host, body_of(form), f"agent_memory-{named()}", known)
    assert [form_in(r) for r in host.sent] == [refused]


@pytest.mark.parametrize(("form", "stream"), [("turns", False), ("turns", True), ("tools", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_anyway_is_the_same_error(
    host: Host, taught: dict[str, str], model: str, kind: str, form: str, *, stream: bool
) -> None:
    """Where the upstream refuses the client's own prompt too, the client sees that error, after one extra call."""
    host.upstream.reply = lambda _request: KINDS[kind]
    body = body_of(form, stream=stream)
    alone = asked(host, body, model)
    (as_sent,) = host.upstream.requests
    found = asked(host, body, f"agent_memory-{model}", taught)
    assert found.status_code == alone.status_code
    if kind == "status-200" and not stream:
        ours = {"id", "agent_memory"}
        assert {k: v for k, v in found.json().items() if k not in ours} == {
            k: v for k, v in alone.json().items() if k not in ours
        }
    else:
        assert found.content == alone.content
    assert [form_in(r.json) for r in host.upstream.requests] == [FORMS[form], ""]
    assert list(host.sent[-1].items()) == list(as_sent.json.items())
    host.settle()
    shown = host.get(f"traces/{found.headers['X-Agent-Memory-Trace-Id']}")
    assert (shown["action"], shown["extra_calls"], shown["injected"]) == ("plain", 1, [])


@pytest.mark.parametrize("form", ["turns", "tools"])
@pytest.mark.parametrize("kind", ["context", "status-200"])
def test_a_clients_own_mistake_does_not_turn_memory_off(
    host: Host, taught: dict[str, str], model: str, kind: str, form: str
) -> None:
    """A request that is refused with memory and without says nothing of memory: the next one gets it as before."""
    host.upstream.reply = lambda _request: KINDS[kind]
    asked(host, body_of(form), f"agent_memory-{model}", taught)
    host.upstream.reply = Picky(KINDS[kind], ())
    found = asked(host, body_of(form), f"agent_memory-{model}", taught)
    assert [form_in(r) for r in host.sent] == [FORMS[form]]
    assert trace_of(host, found)["action"] == "inject"


@pytest.mark.parametrize("form", ["turns", "tools"])
def test_a_clients_own_mistake_leaves_the_conversation_as_it_was(
    host: Host, known: dict[str, str], model: str, form: str
) -> None:
    """After a request that is refused anyway the conversation's next prompt starts with the one before it."""
    host.upstream.reply = Picky(KINDS["context"], (), otherwise=Reply("It may be in settings."))
    body = body_of(form)
    first = asked(host, body, f"agent_memory-{model}", known)
    before = host.prompt
    answers = host.upstream.reply
    body["messages"] += [choices_of(first)[0]["message"], {"role": "user", "content": FOLLOW_UP}]
    host.upstream.reply = lambda _request: KINDS["context"]
    refused = asked(host, {**body, "max_tokens": 10**9}, f"agent_memory-{model}", known)
    assert refused.status_code == (400 if host.is_direct else 500)
    host.upstream.reply = answers
    asked(host, body, f"agent_memory-{model}", known)
    assert json.dumps(host.prompt[: len(before)]) == json.dumps(before)


def test_an_upstream_that_wants_neither_form(host: Host, taught: dict[str, str], model: str) -> None:
    """Each form costs one extra call once; then requests of either kind go out as they came."""
    host.upstream.reply = Picky(KINDS["context"])
    forms = []
    for form in ("turns", "turns", "turns", "tools", "history"):
        response = asked(host, body_of(form), f"agent_memory-{model}", taught)
        assert response.status_code == 200
        forms.append([form_in(r.json) for r in host.upstream.requests])
    assert forms == [["turns", ""], ["block", ""], [""], [""], [""]]


def test_many_at_once(host: Host, taught: dict[str, str], model: str) -> None:
    """Requests that are refused at the same time are all answered, each at one extra call at most."""
    host.upstream.reply = replace_delay(Picky(KINDS["alternation"]), 0.2)
    with ThreadPoolExecutor(8) as pool:
        body = {**body_of("turns"), "model": f"agent_memory-{model}", "agent_memory": taught}
        responses = list(pool.map(lambda _: host.post(body), range(8)))
    assert [choices_of(r)[0]["message"]["content"] for r in responses] == [SAID] * 8
    assert len(host.sent) <= 16
    assert all(trace_of(host, r)["extra_calls"] <= 1 for r in responses)


def replace_delay(picky: Picky, delay_s: float) -> Picky:
    """Return an upstream that takes its time to refuse."""
    return replace(picky, refusal=replace(picky.refusal, delay_s=delay_s))


@pytest.mark.parametrize(
    "fields", [{"mode": "read"}, {"reuse": {"max_error": 0.1}}, {"approach": "auto"}], ids=json.dumps
)
def test_whatever_was_asked_of_memory(host: Host, taught: dict[str, str], model: str, fields: JSON) -> None:
    """With memory read only, with reuse considered first and with the approach left to the policy it is the same."""
    host.upstream.reply = Picky(KINDS["reasoning"])
    body = body_of("history")
    found = asked(host, body, f"agent_memory-{model}", {**taught, **fields})
    assert choices_of(found)[0]["message"]["content"] == SAID
    assert [form_in(r.json) for r in host.upstream.requests] == ["block", ""]
    assert host.prompt == body["messages"]
    assert found.json()["agent_memory"]["extra_calls"] == 1


@pytest.mark.parametrize(
    "refusal",
    [
        {"error": {"message": "Provider returned error", "code": "400"}, "choices": []},
        {"error": {"message": "too long", "status": 413}},
        {"id": "x", "object": "error", "error": {"message": "too long", "code": 422}, "choices": None, "usage": None},
    ],
    ids=["no-choices", "no-field", "other-object"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_other_bodies_that_say_so(
    host: Host, taught: dict[str, str], model: str, refusal: JSON, *, stream: bool
) -> None:
    """A body with status 200 and an error in it is a refusal in each of the shapes that gateways give it."""
    host.upstream.reply = Picky(Reply(body=refusal))
    body = body_of("turns", stream=stream)
    alone = asked(host, body, model)
    found = asked(host, body, f"agent_memory-{model}", taught)
    assert choices_of(found) == choices_of(alone)
    assert len(host.sent) == 2
    assert_went_on_as_sent(trace_of(host, found))


# -- errors that memory has no part in ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "form", "headers"),
    [
        *((status, "turns", ONCE) for status in (401, 402, 403, 404, 408, 409, 410, 429, 500, 502, 503, 529)),
        *((status, "tools", SOON) for status in (401, 404, 408, 429, 503)),
    ],
)
def test_other_errors_cost_no_call(
    host: Host, taught: dict[str, str], model: str, status: int, form: str, headers: dict[str, str]
) -> None:
    """Who asks, how often, and the upstream's own faults: as many calls as without memory, and the same error."""
    said = {"error": {"message": "no; HTTP 400 and a BadRequestError are not what this is", "code": status}}
    host.upstream.reply = lambda _request: Reply(status=status, body=said, headers=headers)
    body = body_of(form)
    alone = asked(host, body, model)
    calls = len(host.sent)
    found = asked(host, body, f"agent_memory-{model}", taught)
    assert (found.status_code, found.content) == (alone.status_code, alone.content)
    assert [form_in(r.json) for r in host.upstream.requests] == [FORMS[form]] * calls
    assert calls == (
        3 if not host.is_direct and headers is SOON and status in (408, 409, 429, 500, 502, 503, 529) else 1
    )
    host.upstream.reply = Picky(KINDS["context"], ())
    again = asked(host, body_of(form), f"agent_memory-{model}", taught)
    assert trace_of(host, again)["action"] == "inject"


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_other_errors_behind_an_approach_cost_no_call(
    host: Host, taught: dict[str, str], model: str, status: int
) -> None:
    """Wrapped or before an approach in a pipeline, an error that memory has no part in is as it is without."""
    said = {"error": {"message": "overloaded: the last of 3 providers said HTTP 400 BadRequestError", "code": status}}
    host.upstream.reply = lambda _request: Reply(status=status, body=said, headers=ONCE)
    alone = asked(host, body_of("turns"), f"re2-{model}")
    for name in ("agent_memory-re2", "agent_memory&re2"):
        found = asked(host, body_of("turns"), f"{name}-{model}", taught)
        assert (found.status_code, found.content) == (alone.status_code, alone.content)
        assert len(host.sent) == 1, name


@pytest.mark.parametrize("status", [429, 503])
def test_an_error_on_the_second_call_is_the_clients(
    host: Host, taught: dict[str, str], model: str, status: int
) -> None:
    """Where the call as sent meets a limit it fares as without memory: the host's tries, and then that error."""
    host.upstream.reply = Picky(KINDS["context"], otherwise=Reply(status=status, headers=SOON))
    alone = asked(host, body_of("turns"), model)
    calls = len(host.sent)
    found = asked(host, body_of("turns"), f"agent_memory-{model}", taught)
    assert (found.status_code, found.content) == (alone.status_code, alone.content)
    assert [form_in(r.json) for r in host.upstream.requests] == ["turns", *[""] * calls]


# -- behind approaches, with several choices --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["agent_memory-re2", "agent_memory-moa", "agent_memory&re2", "agent_memory&moa"])
def test_behind_an_approach(host: Host, taught: dict[str, str], model: str, name: str, kind: str) -> None:
    """An approach that memory wraps, or stands before, answers as it does alone."""
    host.upstream.reply = Picky(KINDS[kind])
    alone = asked(host, body_of("turns"), f"{name[-3:].strip('&-')}-{model}")
    usual = len(host.sent)
    found = asked(host, body_of("turns"), f"{name}-{model}", taught)
    assert [c["message"]["content"] for c in choices_of(found)] == [c["message"]["content"] for c in choices_of(alone)]
    forms = [form_in(r) for r in host.sent]
    assert forms[0]
    assert forms[-usual:] == [""] * usual == [f for f in forms if not f]
    assert_went_on_as_sent(trace_of(host, found))
    if "&" in name:
        asked(host, body_of("turns"), f"{name}-{model}", taught)
        assert [form_in(r) for r in host.sent] == [""] * usual  # a block was all that it could try


@pytest.mark.parametrize("kind", ["context", "status-200"])
def test_beside_and_after_an_approach(host: Host, taught: dict[str, str], kind: str) -> None:
    """Beside another approach, and after one, memory's own call is made once more as it was without memory."""
    picky = Picky(KINDS[kind])
    host.upstream.reply = picky
    found = asked(host, body_of("turns"), f"agent_memory|re2-{named()}", taught)
    assert [c["message"]["content"] for c in choices_of(found)] == [SAID, SAID]
    assert sorted(form_in(r) for r in host.sent) in (["", "", "block"], ["", "", "turns"])
    assert_went_on_as_sent(trace_of(host, found))
    rereads = "Read the question again"
    host.upstream.reply = lambda request: Reply(TASK) if rereads in json.dumps(request) else picky(request)
    found = asked(host, body_of("turns"), f"re2&agent_memory-{named()}", taught)
    assert [c["message"]["content"] for c in choices_of(found)] == [SAID]
    assert [form_in(r) for r in host.sent] == ["", "turns", ""]
    assert host.prompt == [{"role": "user", "content": TASK}]
    assert_went_on_as_sent(trace_of(host, found))


@pytest.mark.parametrize("name", ["agent_memory-re2", "agent_memory-moa", "agent_memory&re2"])
def test_behind_an_approach_streamed(host: Host, taught: dict[str, str], model: str, name: str) -> None:
    """A streamed answer of an approach is the one that it gives alone."""
    host.upstream.reply = Picky(KINDS["alternation"])
    alone = asked(host, body_of("turns", stream=True), f"{name[-3:].strip('&-')}-{model}")
    found = asked(host, body_of("turns", stream=True), f"{name}-{model}", taught)
    said = ["".join(c[0]["delta"].get("content") or "" for c in choices_of(r) if c) for r in (alone, found)]
    assert said == [SAID, SAID]
    assert_went_on_as_sent(trace_of(host, found))


@pytest.mark.parametrize("name", ["re2", "moa"])
@pytest.mark.parametrize("way", ["agent_memory-", "agent_memory&"])
@pytest.mark.parametrize("kind", ["context", "status-200"])
def test_an_approach_that_is_refused_anyway(
    host: Host, taught: dict[str, str], model: str, kind: str, way: str, name: str
) -> None:
    """What an approach makes of an upstream that refuses everything is what the client sees."""
    host.upstream.reply = lambda _request: KINDS[kind]
    alone = asked(host, body_of("turns"), f"{name}-{model}")
    usual = len(host.sent)
    found = asked(host, body_of("turns"), f"{way}{name}-{model}", taught)
    assert found.status_code == alone.status_code
    if alone.status_code == 200:
        assert [c["message"]["content"] for c in choices_of(found)] == [
            c["message"]["content"] for c in choices_of(alone)
        ]
    else:
        assert found.content == alone.content
    assert len(host.sent) <= 2 * usual


def test_an_approach_that_copes_is_left_alone(host: Host, taught: dict[str, str], model: str) -> None:
    """Where an approach finds another way around a refusal (of `n`, here), memory stays and nothing is run twice."""

    def no_n(request: JSON) -> Reply:
        return error(400, "`n` must be 1") if request.get("n", 1) > 1 else Reply(SAID)

    host.upstream.reply = no_n
    alone = asked(host, body_of("turns"), f"moa-{model}")
    usual = len(host.sent)
    found = asked(host, body_of("turns"), f"agent_memory-moa-{model}", taught)
    assert choices_of(found)[0]["message"]["content"] == choices_of(alone)[0]["message"]["content"]
    assert len(host.sent) == usual
    assert trace_of(host, found)["action"] == "inject"


@pytest.mark.parametrize(("kind", "stream"), EACH)
def test_two_choices(host: Host, taught: dict[str, str], model: str, kind: str, *, stream: bool) -> None:
    """With `n = 2` both choices come of the one extra call."""
    host.upstream.reply = Picky(KINDS[kind])
    body = {**body_of("tools", stream=stream), "n": 2}
    alone = asked(host, body, model)
    found = asked(host, body, f"agent_memory-{model}", taught)
    assert choices_of(found) == choices_of(alone)
    assert [form_in(r) for r in host.sent] == ["block", ""]
    assert [r["n"] for r in host.sent] == [2, 2]
    assert_went_on_as_sent(trace_of(host, found))


@pytest.mark.parametrize("name", ["agent_memory-re2", "agent_memory&re2"])
def test_two_choices_behind_an_approach(host: Host, taught: dict[str, str], model: str, name: str) -> None:
    """With `n = 2` the approach runs twice; what the first run learned serves the second."""
    host.upstream.reply = Picky(KINDS["filter"])
    found = asked(host, {**body_of("turns"), "n": 2}, f"{name}-{model}", taught)
    assert [c["message"]["content"] for c in choices_of(found)] == [SAID, SAID]
    assert [form_in(r) for r in host.sent].count("") == 2
    assert sum(map(bool, map(form_in, host.sent))) == 1
    assert_went_on_as_sent(trace_of(host, found))


# -- conversations and agents ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "turns") for kind in KINDS), ("alternation", "tools"), ("status-200", "tools")]
)
def test_a_conversation_with_earlier_insertions(
    host: Host, known: dict[str, str], model: str, kind: str, form: str
) -> None:
    """Where what stands from before is refused, this and all later prompts of the conversation go out as sent."""
    host.upstream.reply = Picky(KINDS[kind], (), otherwise=Reply("It may be in settings."))
    body = body_of(form)
    messages = body["messages"]
    first = asked(host, body, f"agent_memory-{model}", known)
    assert form_in(host.sent[0]) == FORMS[form]
    episode = first.json()["agent_memory"]["episode_id"]
    host.upstream.reply = Picky(KINDS[kind], otherwise=Reply("It may be in settings."))
    prompts = []
    for number in range(4):
        messages += [choices_of(first)[0]["message"], {"role": "user", "content": f"{FOLLOW_UP} ({number})"}]
        found = asked(host, {**body, "messages": messages}, f"agent_memory-{model}", known)
        assert choices_of(found)[0]["message"]["content"] == "It may be in settings."
        assert [form_in(r) for r in host.sent] == ([FORMS[form], ""] if number == 0 else [""])
        assert found.json()["agent_memory"]["episode_id"] == episode
        if number == 0:
            assert_went_on_as_sent(trace_of(host, found))
        prompts.append(host.prompt)
        assert host.prompt == messages
    for before, after in itertools.pairwise(prompts):
        assert json.dumps(after[: len(before)]) == json.dumps(before)


@pytest.mark.parametrize("form", ["turns", "tools"])
def test_a_conversation_whose_first_prompt_was_refused(
    host: Host, known: dict[str, str], model: str, form: str
) -> None:
    """What went out as sent stays so: the later prompts of the conversation start with it, byte for byte."""
    host.upstream.reply = Picky(KINDS["reasoning"], (FORMS[form],), otherwise=Reply("It may be in settings."))
    body = body_of(form)
    messages, prompts = body["messages"], []
    for number in range(3):
        found = asked(host, {**body, "messages": messages}, f"agent_memory-{model}", known)
        assert len(host.sent) == (2 if number == 0 else 1)
        assert host.prompt == messages
        prompts.append(host.prompt)
        messages = [*messages, choices_of(found)[0]["message"], {"role": "user", "content": TASK}]
    for before, after in itertools.pairwise(prompts):
        assert json.dumps(after[: len(before)]) == json.dumps(before)


FAULTY = "touch --quick out/x/f"
FAULT = "touch: unrecognized option '--quick'\nTry 'touch --help' for more information.\n\nExit code: 1"


def fail_once(host: Host, memory: JSON) -> None:
    """Let an agent try what does not work, in an episode of its own."""
    messages: list[JSON] = [{"role": "user", "content": "Prepare a release."}]
    for _ in range(2):
        host.upstream.reply = lambda r: "Finished." if r["messages"][-1]["role"] == "tool" else faulty()
        answered = host.chat(messages, memory=memory, tools=TOOLS)
        messages += [
            answered["choices"][0]["message"],
            {"role": "tool", "tool_call_id": "call_1", "content": FAULT},
        ]
    host.settle()


def faulty() -> Reply:
    """Return an answer that asks for what is known to fail."""
    return Reply(content=None, tool_calls=[tool_call("bash", {"command": FAULTY})])


@pytest.mark.parametrize(("kind", "stream"), EACH)
def test_the_guards_second_call_is_refused(
    host: Host, namespace: dict[str, str], model: str, kind: str, *, stream: bool
) -> None:
    """Where the upstream refuses the guard's advice, the first answer goes out and no third call is made."""
    fail_once(host, namespace)
    body = {"messages": [{"role": "user", "content": "Sort holiday photographs"}], "tools": TOOLS, "stream": stream}
    host.upstream.reply = Picky(KINDS[kind], otherwise=faulty())
    alone = asked(host, body, model)
    found = asked(host, body, f"agent_memory-{model}", namespace)
    assert choices_of(found) == choices_of(alone)
    assert [form_in(r) for r in host.sent] == ["", "block"]
    shown = trace_of(host, found)
    assert (shown["action"], shown["extra_calls"], shown["injected"], shown["error"]) == ("plain", 1, [], None)


def test_a_refusal_and_then_a_known_failure(host: Host, known: dict[str, str], model: str) -> None:
    """A request never costs more than one extra call: after a refusal the guard makes none."""
    fail_once(host, known)
    host.upstream.reply = Picky(KINDS["context"], otherwise=faulty())
    found = asked(host, body_of("tools"), f"agent_memory-{model}", known)
    assert json.loads(choices_of(found)[0]["message"]["tool_calls"][0]["function"]["arguments"])["command"] == FAULTY
    assert [form_in(r) for r in host.sent] == ["block", ""]
    assert_went_on_as_sent(trace_of(host, found))


def test_what_an_agent_is_told_of_an_error(host: Host, namespace: dict[str, str], model: str) -> None:
    """A block beside a tool's result is refused like any other, and the agent goes on."""
    fail_once(host, namespace)
    call = {"role": "assistant", "content": None, "tool_calls": [tool_call("bash", {"command": FAULTY})]}
    told = {"role": "tool", "tool_call_id": "call_1", "content": FAULT}
    body = {"messages": [{"role": "user", "content": "Sort my letters"}, call, told], "tools": TOOLS}
    host.upstream.reply = Picky(KINDS["unprocessable"], otherwise=Reply(SAID))
    found = asked(host, body, f"agent_memory-{model}", namespace)
    assert choices_of(found)[0]["message"]["content"] == SAID
    assert host.prompt == body["messages"]
    assert [form_in(r) for r in host.sent] in (["block", ""], [""])
    assert trace_of(host, found)["extra_calls"] == len(host.sent) - 1


def test_a_refusal_is_forgotten_after_a_while() -> None:
    """A model may take a form again that it refused ten minutes ago, but not in the conversation that it refused."""
    refusals, scope = Refusals(), Scope("local", "n")
    refusals.note(scope, "e", "m", ["turns"], 1000.0)
    assert refusals.forms(scope, "other", "m", 1001.0) == {"turns"}
    assert refusals.forms(scope, "other", "m", 1000.0 + REFUSED_FOR_S) == frozenset()
    assert refusals.forms(scope, "e", "m", 1001.0 + REFUSED_FOR_S) == FORMS_OF_MEMORY
    assert refusals.forms(scope, "other", "m2", 1001.0) == frozenset()
    assert refusals.forms(Scope("another"), "e", "m", 1001.0) == frozenset()


def test_a_caller_with_a_key_of_its_own(host: Host, model: str) -> None:
    """Where the host makes a client for the caller's own key, a refusal is mended with that client."""
    key, memory = f"sk-{uuid.uuid4().hex}", {"namespace": "own-key"}
    host.teach(TASK, ANSWER, memory=memory, key=key)
    host.upstream.clear()
    host.upstream.reply = Picky(KINDS["context"])
    body = {**body_of("turns"), "model": f"agent_memory-{model}", "agent_memory": memory}
    assert choices_of(host.post(body, key=key))[0]["message"]["content"] == SAID
    assert [form_in(r) for r in host.sent] == ["turns", ""]
    assert {r.headers["authorization"] for r in host.upstream.requests} == {f"Bearer {key}"}
