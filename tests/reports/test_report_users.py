"""One user was given what another was told: small letters in `bearer`, UTF-8 headers and OpenAI's `user` were not read.

Public reports: https://github.com/kubestellar/console/issues/7374 (the scheme `bearer` in small letters) and
https://github.com/BerriAI/litellm/pull/30339 (header values in UTF-8).
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosting import JSON, MODEL, Host, served, until

from optillm_memory.conversation.options import Options, identified, parse_options
from optillm_memory.testing.upstream import RecordingUpstream

TASK = "Which locker holds my spare keys for the boathouse?"
ANSWER = "Locker seventeen, behind the canoe rack."
REUSE = {"max_error": 0.05}
OFF = {"OPTILLM_AGENT_MEMORY_IDENTIFY_USERS": "off"}
NAMES = ("ann", "Ännchen", "Åsa à", "王小明", "👩‍🚀 Zoë", "ann@example.org", "x" * 200)
Headers = Mapping[str, str] | list[tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def unmapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start a host that takes no one's `user` for a user_id."""
    with (
        RecordingUpstream() as upstream,
        served(upstream, tmp_path_factory.mktemp("off") / "memory.db", env=OFF) as host,
    ):
        yield host


def ask(
    host: Host,
    memory: Mapping[str, Any],
    *,
    headers: Headers | None = None,
    key: bytes = b"Bearer alice",
    **fields: Any,
) -> httpx.Response:
    """Ask for the task; headers may be given as the bytes that go over the wire."""
    raw = (
        [(n.encode(), v.encode()) for n, v in headers.items()] if isinstance(headers, Mapping) else list(headers or ())
    )
    body = {"model": MODEL, "messages": [{"role": "user", "content": TASK}], "agent_memory": dict(memory), **fields}
    given = [(b"Content-Type", b"application/json"), *([(b"Authorization", key)] if key else []), *raw]
    url = f"{host.process.base_url}/chat/completions"
    return host.http.post(url, content=json.dumps(body), headers=given)


def answered(response: httpx.Response) -> JSON:
    """Return the metadata of an answer that came."""
    assert response.status_code == 200, response.text
    found: JSON = response.json()["agent_memory"]
    return found


def teach(host: Host, memory: Mapping[str, Any], **given: Any) -> str:
    """Have the task answered and verified for someone."""
    before, host.upstream.reply = host.upstream.reply, lambda _request: ANSWER
    try:
        response = ask(host, memory, **given)
        assert response.status_code == 200, response.text
        trace_id: str = response.json()["id"]
    finally:
        host.upstream.reply = before
    # The operator may speak of every trace, whoever asked.
    told = host.tell({"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}, key=None)
    assert told["status"] == "applied"
    assert until(lambda: host.get("stats", key=None)["memories_without_vector"] == 0)
    host.upstream.clear()
    return trace_id


def is_told(host: Host, metadata: JSON) -> bool:
    """Whether the answer was used in any way: injected, or served."""
    return metadata["action"] != "plain" or any(ANSWER in str(sent["messages"]) for sent in host.sent)


def scope_of(host: Host, response: httpx.Response) -> JSON:
    """Return the scope in which a request was recorded."""
    host.settle()
    trace = host.get(f"traces/{response.json()['id']}", key=None)
    found: JSON = trace["scope"]
    return found


# -- whose key ---------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize(
    "value",
    [b"bearer alice", b"BEARER  alice", b"bEaReR\talice", b"Bearer \t alice"],
    ids=["small", "capitals", "tab", "mixed space"],
)
def test_a_key_is_a_key_however_its_scheme_is_written(host: Host, namespace: dict[str, str], value: bytes) -> None:
    """A scheme in any letters, with any white space, names the tenant that `Bearer key` names: it is told the same."""
    teach(host, namespace)
    assert is_told(host, answered(ask(host, namespace, key=value)))
    host.upstream.clear()
    assert not is_told(host, answered(ask(host, {"namespace": f"{namespace['namespace']}-2"}, key=value)))
    host.upstream.clear()
    assert not is_told(host, answered(ask(host, namespace, key=value.replace(b"alice", b"mallory"))))


@pytest.mark.host
@pytest.mark.parametrize("value", [b"bearer eve", b"BEARER  eve", b"bearer\teve"])
def test_a_key_never_makes_the_operator(host: Host, namespace: dict[str, str], value: bytes) -> None:
    """Who gives a key sees its own traces alone on every route, whatever the letters of the scheme."""
    trace_id = teach(host, namespace)
    base, headers = f"{host.process.base_url}/agent_memory", [(b"Authorization", value)]
    assert host.http.get(f"{base}/traces", headers=headers).json()["data"] == []
    assert host.http.get(f"{base}/memories", headers=headers).json()["data"] == []
    assert host.http.get(f"{base}/traces/{trace_id}", headers=headers).status_code == 404
    assert host.http.get(f"{base}/traces/{trace_id}/why", headers=headers).status_code == 404
    assert host.http.delete(f"{base}/traces/{trace_id}", headers=headers).status_code == 404
    assert host.http.delete(f"{base}/namespaces/{namespace['namespace']}", headers=headers).status_code == 404
    assert host.http.post(f"{base}/rebuild", headers=headers, json={}).status_code == 403
    wrong = {"trace_id": trace_id, "metric": "success", "value": False, "source": "human"}
    assert host.http.post(f"{base}/feedback", headers=headers, json=wrong).json()["status"] != "applied"
    assert host.get(f"traces/{trace_id}", key=None)["outcome"]["verdict"] == "success"


# -- names in headers --------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["user_id", "agent_id", "namespace"])
def test_a_header_in_utf8_names_what_the_field_names(host: Host, key: str, name: str) -> None:
    """A name sent as UTF-8 in a header is the one that the body's field names, in both directions."""
    if key == "namespace":
        name = f"{name[:150]} {uuid.uuid4().hex}"
    rest = {} if key == "namespace" else {"namespace": uuid.uuid4().hex}
    header = [(f"X-Agent-Memory-{key.replace('_', '-').title()}".encode(), name.encode())]
    by_field, by_header = ask(host, {**rest, key: name}), ask(host, rest, headers=header)
    assert scope_of(host, by_field) == scope_of(host, by_header)
    assert scope_of(host, by_header)[key] == name
    teach(host, {**rest, key: name})
    assert is_told(host, answered(ask(host, rest, headers=header)))


@pytest.mark.host
@pytest.mark.parametrize("name", ["ann", "Ännchen", "王小明"])
def test_a_header_in_utf8_narrows_the_routes(host: Host, namespace: dict[str, str], name: str) -> None:
    """Feedback and recall under a header in UTF-8 find what was taught under the body's field."""
    trace_id = teach(host, {**namespace, "user_id": name})
    url = f"{host.process.base_url}/agent_memory"
    headers = [(b"Authorization", b"bearer alice"), (b"X-Agent-Memory-User-Id", name.encode())]
    headers.append((b"X-Agent-Memory-Namespace", namespace["namespace"].encode()))
    said = {"trace_id": trace_id, "metric": "comment", "value": "thanks", "source": "human"}
    assert host.http.post(f"{url}/feedback", headers=headers, json=said).json()["status"] == "applied"
    found = host.http.get(f"{url}/memories", headers=headers, params={"query": TASK}).json()["data"]
    assert [memory["answer"] for memory in found] == [ANSWER]


@pytest.mark.host
def test_a_header_that_is_no_utf8_is_still_a_name(host: Host, namespace: dict[str, str]) -> None:
    """A name sent in Latin-1 is read as such, and breaks nothing."""
    asked = ask(host, namespace, headers=[(b"X-OpenWebUI-User-Id", "Jürgen".encode("latin-1"))])
    assert answered(asked)["action"] == "plain"
    assert scope_of(host, asked)["user_id"] == "Jürgen"


# -- who asks, by the fields of others -----------------------------------------------------------------

WAYS: Mapping[str, Callable[[str], JSON]] = {
    "user": lambda who: {"user": who},
    "safety_identifier": lambda who: {"safety_identifier": who},
    "Open WebUI": lambda who: {"headers": [(b"X-OpenWebUI-User-Id", who.encode())]},
    "LiteLLM": lambda who: {"headers": [(b"x-litellm-end-user-id", who.encode())]},
}


@pytest.mark.host
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["ann", "Ännchen 👩‍🚀"])
def test_one_user_is_not_told_what_another_was(host: Host, namespace: dict[str, str], way: str, name: str) -> None:
    """Who is named by a field or header of others gets a memory of their own: nothing is injected or served across."""
    given = WAYS[way]
    memory = {**namespace, "reuse": REUSE}
    teach(host, namespace, **given(name))
    for other in ({}, given(f"{name}2"), given(name.upper() if name.isascii() else name[:-2])):
        assert not is_told(host, answered(ask(host, memory, **other))), other
    # Their own it is: served where they let it, injected where not.
    assert answered(ask(host, memory, **given(name)))["action"] == "reuse"
    own = ask(host, namespace, **given(name))
    assert answered(own)["action"] == "inject"
    assert scope_of(host, own)["user_id"] == name
    # And the same whichever way the name comes.
    for others_way in WAYS.values():
        assert answered(ask(host, namespace, **others_way(name)))["action"] == "inject"


@pytest.mark.host
@pytest.mark.parametrize("way", WAYS)
def test_an_explicit_user_id_wins(host: Host, namespace: dict[str, str], way: str) -> None:
    """With a `user_id` memory is that one's whatever `user` says, and yet no answer is reused across `user` values."""
    given = WAYS[way]
    memory = {**namespace, "user_id": "team"}
    taught = ask(host, memory, **given("ann"))
    assert scope_of(host, taught)["user_id"] == "team"
    teach(host, memory, **given("ann"))
    assert answered(ask(host, memory, **given("bob")))["action"] == "inject"
    for other in ({}, given("bob"), given("Ann")):
        assert answered(ask(host, {**memory, "reuse": REUSE}, **other))["action"] != "reuse", other
    assert answered(ask(host, {**memory, "reuse": REUSE}, **given("ann")))["action"] == "reuse"
    header = [(b"X-Agent-Memory-User-Id", b"team")]
    by_header = given("bob")
    by_header = {**by_header, "headers": [*by_header.get("headers", []), *header]}
    assert scope_of(host, ask(host, namespace, **by_header))["user_id"] == "team"


@pytest.mark.host
@pytest.mark.parametrize("way", WAYS)
def test_the_setting_turns_the_mapping_off(unmapped: Host, namespace: dict[str, str], way: str) -> None:
    """Without the mapping all share what is injected, and still no answer is reused across different users."""
    given = WAYS[way]
    teach(unmapped, namespace, **given("ann"))
    for other in ({}, given("bob"), given("ann")):
        asked = ask(unmapped, namespace, **other)
        assert answered(asked)["action"] == "inject", other
        assert scope_of(unmapped, asked)["user_id"] == ""
    for other in ({}, given("bob")):
        assert answered(ask(unmapped, {**namespace, "reuse": REUSE}, **other))["action"] != "reuse", other
    assert answered(ask(unmapped, {**namespace, "reuse": REUSE}, **given("ann")))["action"] == "reuse"


PAIRS: tuple[tuple[JSON, JSON], ...] = (
    ({"user": "ann"}, {"user": "bob"}),
    ({"user": 17}, {"user": 18}),
    ({"user": 17}, {}),
    ({"safety_identifier": "gateway", "user": "ann"}, {"safety_identifier": "gateway", "user": "bob"}),
    ({"safety_identifier": "ann", "user": "x"}, {"safety_identifier": "bob", "user": "x"}),
    ({"user": "a" * 10_000 + "1"}, {"user": "a" * 10_000 + "2"}),
    ({"user": "ann"}, {"user": "Ann"}),
    ({"user": "ann"}, {"user": ""}),
)


@pytest.mark.host
@pytest.mark.parametrize(("one", "other"), PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "unmapped"])
def test_never_reused_across_different_users(
    host: Host, unmapped: Host, namespace: dict[str, str], one: JSON, other: JSON, mapped: bool
) -> None:
    """An answer that one was given is served to no one whose `user` or `safety_identifier` differs."""
    asked = host if mapped else unmapped
    memory = {**namespace, **({"user_id": "team"} if mapped else {}), "reuse": REUSE}
    teach(asked, memory, **one)
    assert answered(ask(asked, memory, **one))["action"] == "reuse"
    assert answered(ask(asked, memory, **other))["action"] != "reuse"


# -- odd values --------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(0, 17, -1.5, True, None, [], ["ann"], {}, {"id": "ann"}, "", " ", "\t\n", "x" * 10_000, "👩‍🚀" * 100),
    *("a\u0000b", "\u202eevil", "\ufeff", "ann\r\nX-Agent-Memory-User-Id: bob", "../../etc/passwd", "' OR 1=1 --"),
)


@pytest.mark.host
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("name", ["user", "safety_identifier"])
def test_odd_values_reach_the_upstream_as_sent(host: Host, namespace: dict[str, str], name: str, value: Any) -> None:
    """Whatever stands in `user`, the request is answered and recorded, and the upstream gets it as it was sent."""
    asked = ask(host, namespace, **{name: value})
    assert asked.status_code == 200, asked.text
    assert name in host.sent[-1]
    assert host.sent[-1][name] == value
    assert type(host.sent[-1][name]) is type(value)
    host.upstream.clear()
    scope = scope_of(host, asked)
    assert len(scope["user_id"]) <= 200
    assert answered(ask(host, {**namespace, "reuse": REUSE}, **{name: value}))["action"] in ("plain", "inject")


@pytest.mark.host
@pytest.mark.parametrize("name", ["user", "safety_identifier"])
def test_a_lone_surrogate_is_treated_as_without_memory(host: Host, namespace: dict[str, str], name: str) -> None:
    """A `user` that is no valid Unicode gets from us what it gets without us."""
    fields: JSON = {name: "\ud83d"}
    ours = ask(host, namespace, **fields)
    sent = [request[name] for request in host.sent]
    host.upstream.clear()
    body = {"model": "none-m", "messages": [{"role": "user", "content": TASK}], name: "\ud83d"}
    assert ours.status_code == host.without_memory(body).status_code
    assert sent == [request[name] for request in host.sent]
    assert host.chat(TASK, memory=namespace)["agent_memory"]["action"] == "plain"


@pytest.mark.host
@pytest.mark.parametrize(
    "value", [b"", b"\xff\xfe", b"\xc3", "👩‍🚀".encode(), b"x" * 10_000, b"17", b"a, b", b"%C3%84nn"]
)
@pytest.mark.parametrize("header", [b"X-OpenWebUI-User-Id", b"X-LiteLLM-End-User-Id"])
def test_odd_headers_break_nothing(host: Host, namespace: dict[str, str], header: bytes, value: bytes) -> None:
    """Whatever bytes a gateway's header holds, the request is answered and recorded under a name that fits."""
    asked = ask(host, namespace, headers=[(header, value)])
    assert asked.status_code == 200, asked.text
    assert "user" not in host.sent[-1]
    assert len(scope_of(host, asked)["user_id"]) <= 200


@pytest.mark.host
def test_all_routes_take_a_gateways_header(host: Host, namespace: dict[str, str]) -> None:
    """Recall and feedback for whom a gateway names are theirs, as the requests were."""
    trace_id = teach(host, namespace, headers=[(b"X-OpenWebUI-User-Id", "Ännchen".encode())])
    url, key = f"{host.process.base_url}/agent_memory", (b"Authorization", b"bearer alice")
    where = {"query": TASK, "namespace": namespace["namespace"]}
    for who, count in ((b"\xc3\x84nnchen", 1), (b"bob", 0)):
        headers = [key, (b"X-OpenWebUI-User-Id", who)]
        assert len(host.http.get(f"{url}/memories", headers=headers, params=where).json()["data"]) == count
    said = {"trace_id": trace_id, "metric": "comment", "value": "thanks", "source": "human"}
    told = host.http.post(f"{url}/feedback", headers=[key, (b"X-OpenWebUI-User-Id", b"\xc3\x84nnchen")], json=said)
    assert told.json()["status"] == "applied"


# -- the reading of it alone ---------------------------------------------------------------------------


def read(body: JSON, headers: Mapping[str, str], maps: bool = True) -> Options:
    """Return the options of a request with this body and these headers."""
    return identified(parse_options(body.get("agent_memory"), headers, now=0), body, headers, maps=maps)


@pytest.mark.parametrize("value", [*ODD, "\ud83d", "\udc00x", "ann"])
def test_what_is_read_can_be_stored(value: Any) -> None:
    """Whatever the value, what is made of it is valid Unicode of at most 200 characters, and the same each time."""
    options = read({"user": value}, {})
    assert options == read({"user": value}, {})
    assert len(options.user_id.encode("utf-8")) <= 800
    assert options.user_id == options.end_user
    assert read({"user": value}, {}, maps=False).user_id == ""


def test_long_names_do_not_collide() -> None:
    """Names that are too long for the store, or no valid Unicode, stay different from one another."""
    names = ["a" * 201, "a" * 202, "a" * 200 + "b", "a" * 200, "\ud83d", "\ud83e", "a" * 10_000, "\ufffd", "?"]
    read_as = [read({"user": name}, {}).user_id for name in names]
    assert len(set(read_as)) == len(names)
    assert all(one != other for one, other in itertools.combinations(read_as, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_in_any_letters_of_the_header(name: str) -> None:
    """The gateway's header counts in any letters of its name, and as UTF-8 read as Latin-1."""
    for header in ("X-OpenWebUI-User-Id", "x-openwebui-user-id", "X-LITELLM-END-USER-ID"):
        wire = name.encode().decode("latin-1")
        assert read({}, {header: wire}).user_id == name
        assert read({"user": "shared"}, {header: wire}).user_id == name


def test_the_setting_is_known(tmp_path: Path) -> None:
    """The mapping is on unless it is turned off."""
    from optillm_memory.settings import Settings

    assert Settings.from_env({}).identify_users is True
    assert Settings.from_env(OFF).identify_users is False
