"""No caller reads, changes or deletes what is another's: tenants and users with canaries, on all routes and both lanes.

A new route is a line in `ROUTES`; a test fails until it is there.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import examples
from hosting import CHECKOUT, MODEL, Host, authorization, served
from readme_parts import route_list

from optillm_memory.testing.upstream import RecordingUpstream

pytestmark = [pytest.mark.host, pytest.mark.slow]

# Every route, with an owner's trace, memory and so on in its place. `safe`: it changes nothing, and every caller
# tries it. What `changes` something is tried by those who may not.
ROUTES = {
    ("GET", "traces"): "safe",
    ("GET", "traces/{trace}"): "safe",
    ("GET", "traces/{trace}/why"): "safe",
    ("GET", "memories"): "safe",
    ("GET", "memories/{memory}"): "safe",
    ("GET", "uplift"): "safe",
    ("GET", "policy"): "safe",
    ("GET", "stats"): "safe",
    ("GET", "ready"): "safe",
    ("GET", "erasures/{erasure}"): "safe",
    ("POST", "feedback"): "changes",
    ("POST", "rebuild"): "safe",
    ("DELETE", "traces/{trace}"): "changes",
    ("DELETE", "memories/{memory}"): "changes",
    ("DELETE", "namespaces/{namespace}"): "own",  # deletes the caller's own: tried by itself
}
QUERIES = {"memories": ("", "?query=gauge&limit=50"), "traces": ("", "?text=gauge&limit=1000")}
KEYS = {"red": "red-key", "blue": "blue-key-1", "keyless": ""}
USERS = ("alice", "bob")
LANES = (MODEL, "agent_memory-re2-m")


@dataclass(frozen=True)
class Caller:
    """A tenant, narrowed to a user or not."""

    tenant: str
    user: str | None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of its requests."""
        return authorization(KEYS[self.tenant]) | ({"X-Agent-Memory-User-Id": self.user} if self.user else {})

    def may(self, owner: Owner) -> bool:
        """Whether what an owner has is to be seen by this caller."""
        return self.tenant == owner.tenant and self.user in (None, owner.user)


@dataclass(frozen=True)
class Owner:
    """A user of a tenant with a verified answer that holds a canary."""

    tenant: str
    user: str
    trace: str
    episode: str
    memory: str
    feedback: str

    @property
    def canary(self) -> str:
        """What stands in all that is this owner's, and nowhere else."""
        return canary_of(self.tenant, self.user)


# Run by a host as it starts: it takes out one of the two filters that keep callers apart, the condition of all that is
# listed, shown or deleted (`seen`), or what feedback may be on (`covers`).
WITHOUT = """
import os, runpy
from optillm_memory.records import View
from optillm_memory.store.tables import feedback, scopes

runpy.run_path(os.environ["LEAN_MODULE"])
if os.environ["WITHOUT_FILTER"] == "seen":
    scopes.seen = lambda _: ("1 = 1", ())
else:
    View.covers = lambda *_: True
    feedback._covers = lambda table: " AND ".join(f"(? = ? OR {table}.reporter = '')" for _ in range(3))
"""
CALLERS = [Caller(tenant, user) for tenant in KEYS for user in (*USERS, None)]


def canary_of(tenant: str, user: str) -> str:
    """Return the word of a user of a tenant."""
    return f"canary-{tenant}-{user}-end"


def task_of(tenant: str, user: str) -> str:
    """Return what a user of a tenant asks."""
    return f"How do I reset the gauge of {canary_of(tenant, user)}?"


@pytest.fixture(scope="module")
def tenants_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a file in which one tenant has two keys."""
    path = tmp_path_factory.mktemp("keys") / "tenants.json"
    path.write_text(json.dumps({"blue": ["blue-key-1", "blue-key-2"]}))
    return path


@pytest.fixture(scope="module")
def open_host(
    upstream: RecordingUpstream, tmp_path_factory: pytest.TempPathFactory, tenants_file: Path
) -> Iterator[Host]:
    """Start a host whose tenants are told apart by a file and by their own keys."""
    env = {"OPTILLM_AGENT_MEMORY_TENANTS_FILE": str(tenants_file)}
    with served(upstream, tmp_path_factory.mktemp("tenancy") / "memory.db", env=env) as host:
        yield host


def populated(host: Host) -> list[Owner]:
    """Give every user of every tenant a verified answer, all in one namespace and under one episode name."""
    owners = []
    for tenant, key in KEYS.items():
        for user in USERS:
            canary, feedback_id = canary_of(tenant, user), f"fb-{tenant}-{user}"
            host.upstream.reply = answering(f"turn the wheel of {canary}")
            memory = {"user_id": user, "episode_id": "shared"}
            trace_id = host.chat(task_of(tenant, user), memory=memory, key=key)["id"]
            told = {"trace_id": trace_id, "metric": "success", "value": True, "source": "code"}
            headers = Caller(tenant, user).headers
            receipt = host.route("POST", "feedback", key="", headers=headers, json={**told, "feedback_id": feedback_id})
            assert receipt.json()["status"] == "applied", receipt.text
            found = host.get("memories", key=None, limit=1000)["data"]
            (memory_id,) = [m["memory_id"] for m in found if canary in m["answer"]]
            owners.append(Owner(tenant, user, trace_id, "shared", memory_id, feedback_id))
    host.upstream.reply = answering("a plain answer")
    return owners


def answering(text: str) -> Callable[[Any], str]:
    """Return an upstream's reply that is always this text."""
    return lambda _request: text


@pytest.fixture(scope="module")
def owners(open_host: Host) -> list[Owner]:
    """Give the owners of the module's host."""
    return populated(open_host)


# -- probes: each returns what it found wrong ------------------------------------------------------


def leaks(caller: Caller, text: str, owners: list[Owner]) -> list[str]:
    """Return the canaries in a text that the caller may not see."""
    return [owner.canary for owner in owners if owner.canary in text and not caller.may(owner)]


def feedback_bodies(owner: Owner) -> list[dict[str, Any]]:
    """Return all ways to speak of what is an owner's."""
    wrong = {"metric": "success", "value": False, "source": "code"}
    return [
        {"trace_id": owner.trace, **wrong},
        {"trace_id": owner.trace, "metric": "demonstration", "value": "planted answer", "source": "human"},
        {"trace_id": owner.trace, "metric": "comment", "value": "planted comment", "source": "human"},
        {"feedback_id": owner.feedback, "value": None},
    ]


def requests_of(method: str, path: str, owner: Owner) -> list[tuple[str, dict[str, Any]]]:
    """Return the (path, further arguments) with which a route is asked about what is an owner's."""
    named = path.format(trace=owner.trace, memory=owner.memory, erasure="1", namespace="default", episode=owner.episode)
    if path == "feedback":
        return [(named, {"json": body}) for body in feedback_bodies(owner)]
    return [(named + query, {"json": {}} if method == "POST" else {}) for query in QUERIES.get(path, ("",))]


def probe(host: Host, owners: list[Owner]) -> list[str]:
    """Ask every route as every caller about what is every owner's; return what was read or changed across."""
    found = []
    for caller in CALLERS:
        for (method, path), kind in ROUTES.items():
            about = owners if "{" in path or path == "feedback" else owners[:1]
            for owner in about:
                if kind == "own" or (kind == "changes" and caller.may(owner)):
                    continue
                for asked, given in requests_of(method, path, owner):
                    answer = host.route(method, asked, key="", headers=caller.headers, **given)
                    where = f"{method} {asked} by {caller}: {answer.status_code}"
                    found += [f"{where} shows {canary}" for canary in leaks(caller, answer.text, owners)]
                    is_object = "{trace}" in path or "{memory}" in path
                    if is_object and not caller.may(owner) and answer.status_code != 404:
                        found.append(f"{where} finds what is {owner.canary}'s")
                    if answer.status_code >= 500:
                        found.append(f"{where} failed: {answer.text}")
    return found + chats(host, owners) + damage(host, owners)


def chats(host: Host, owners: list[Owner]) -> list[str]:
    """Ask every owner's question as everybody, with feedback in band on what is the owner's; return what crossed."""
    found = []
    for number, caller in enumerate(CALLERS):
        for owner in owners:
            if caller.may(owner):
                continue
            host.upstream.clear()
            memory: dict[str, Any] = {"user_id": caller.user} if caller.user else {}
            memory["feedback"] = feedback_bodies(owner)
            messages = [{"role": "user", "content": task_of(owner.tenant, owner.user)}]
            body = {"model": LANES[number % 2], "messages": messages, "agent_memory": {**memory, "mode": "read"}}
            answer = host.post(body, key=KEYS[caller.tenant])
            sent = json.dumps(host.sent) + answer.text
            found += [
                f"chat by {caller} shows {canary}"
                for canary in leaks(caller, sent.replace(messages[0]["content"], ""), owners)
            ]
    return found


def damage(host: Host, owners: list[Owner]) -> list[str]:
    """Return what is not as its owner left it."""
    found = []
    for owner in owners:
        shown = host.route("GET", f"traces/{owner.trace}", key=None)
        if shown.status_code != 200:
            found.append(f"the trace of {owner.canary} is gone")
            continue
        trace = shown.json()
        if trace["outcome"] != {"verdict": "success", "verified": True}:
            found.append(f"the outcome of {owner.canary} is {trace['outcome']}")
        if [item["feedback_id"] for item in trace["feedback"]] != [owner.feedback]:
            found.append(f"the feedback of {owner.canary} is {trace['feedback']}")
    return found


# -- what must hold --------------------------------------------------------------------------------


def test_every_route_is_probed() -> None:
    """A route that is not in the table above is not tested: put it there."""
    names = {"traces": "{trace}", "memories": "{memory}", "erasures": "{erasure}", "namespaces": "{namespace}"}
    known = set()
    for method, path, _ in route_list():
        short = path.removeprefix("/v1/agent_memory/")
        own = names.get(short.partition("/")[0], "")
        known.add((method, short.replace("{id}", own).replace("{name}", own)))
    assert known == set(ROUTES)


def test_nobody_reaches_what_is_anothers(open_host: Host, owners: list[Owner]) -> None:
    """Every caller, on every route and both lanes, gets what it may see, and 404 for the rest; nothing is changed."""
    assert probe(open_host, owners) == []
    for caller in CALLERS:  # and what is one's own is there
        text = open_host.route("GET", "memories", key="", headers=caller.headers).text
        assert {o.canary for o in owners if o.canary in text} == {o.canary for o in owners if caller.may(o)}
        counted = open_host.route("GET", "stats", key="", headers=caller.headers).json()
        assert counted["memories"] == sum(caller.may(o) for o in owners)
        assert not counted.keys() & {"bytes", "fault", "faults", "lost", "encoder_reason"}


def test_keys_of_one_tenant_share_its_memory(open_host: Host, owners: list[Owner]) -> None:
    """A tenant's second key sees what the first has; a key that is not in the file is a tenant of its own."""
    mine = next(o for o in owners if o.tenant == "blue")
    assert open_host.route("GET", f"traces/{mine.trace}", key="blue-key-2").status_code == 200
    assert open_host.route("GET", f"traces/{mine.trace}", key="blue-key-3").status_code == 404
    in_header = {"X-Agent-Memory-Key": "blue-key-2"}
    assert open_host.route("GET", f"traces/{mine.trace}", key="other", headers=in_header).status_code == 200
    refused = open_host.route("GET", "traces", key="", headers={"X-Agent-Memory-Key": "blue-key-3"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_credential")


@pytest.mark.parametrize("without", ["seen", "covers"])
def test_without_a_filter_the_probes_find_something(
    upstream: RecordingUpstream, tmp_path: Path, tenants_file: Path, without: str
) -> None:
    """On a host whose filter was taken out, the same probes report what crossed: they can fail."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    env = {
        "OPTILLM_AGENT_MEMORY_TENANTS_FILE": str(tenants_file),
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, CHECKOUT))),
        "LEAN_MODULE": str(CHECKOUT / "tests" / "without_torch" / "sitecustomize.py"),
        "WITHOUT_FILTER": without,
    }
    with served(upstream, tmp_path / "memory.db", env=env) as host:
        few = populated(host)
        callers = [Caller("red", "bob")]
        original, CALLERS[:] = list(CALLERS), callers
        try:
            found = probe(host, few)
        finally:
            CALLERS[:] = original
    expected = "finds what is" if without == "seen" else "the feedback of"
    assert any(expected in line for line in found), found


def test_mixed_operations_cross_nothing(open_host: Host, owners: list[Owner]) -> None:
    """Chats, reads, feedback and deletions in any order leave what is others' alone (10,000 in `.ci/full`)."""
    dice = random.Random(7)
    mine: dict[Caller, list[str]] = {caller: [] for caller in CALLERS}
    for number in range(examples(500)):
        caller, other = dice.choice(CALLERS), dice.choice(owners)
        kind = dice.choice(("chat", "chat", "read", "judge", "delete own", "delete other"))
        if kind == "chat":
            memory: Mapping[str, Any] = {"user_id": caller.user} if caller.user else {}
            open_host.upstream.clear()
            asked = f"operation {number}: {'gauge' * (number % 2)}"
            answered = open_host.chat(asked, model=LANES[number % 2], memory=memory, key=KEYS[caller.tenant])
            assert leaks(caller, json.dumps(open_host.sent) + json.dumps(answered), owners) == []
            mine[caller].append(answered["id"])
            continue
        path, given = "traces?limit=1000", {}
        method = "GET"
        if kind == "judge":
            method, path, given = "POST", "feedback", {"json": dice.choice(feedback_bodies(other))}
            if caller.may(other):
                continue
        elif kind == "delete own" and mine[caller]:
            method, path = "DELETE", f"traces/{mine[caller].pop()}"
        elif kind == "delete other" and not caller.may(other):
            method, path = "DELETE", f"traces/{other.trace}"
        answer = open_host.route(method, path, key="", headers=caller.headers, **given)
        assert leaks(caller, answer.text, owners) == []
        assert answer.status_code == (404 if kind == "delete other" and method == "DELETE" else answer.status_code)
        assert answer.status_code < 500, answer.text
    assert damage(open_host, owners) == []


# -- narrowing -------------------------------------------------------------------------------------

IDLE = [
    ("GET", "ready?user_id=alice", {}, "user_id"),
    ("POST", "rebuild", {"X-Agent-Memory-User-Id": "alice"}, "x-agent-memory-user-id"),
    ("GET", "traces?userid=alice", {}, "userid"),
    ("DELETE", "namespaces/default?user=alice", {}, "user"),
    ("DELETE", "namespaces/default", {"X-Agent-Memory-Episode-Id": "e"}, "x-agent-memory-episode-id"),
    ("DELETE", "namespaces/default", {"X-Agent-Memory-Namespace": "other"}, "namespace"),
    ("GET", "traces?user_id=alice&user_id=bob", {}, "user_id"),
    ("GET", "traces?user_id=bob", {"X-Agent-Memory-User-Id": "alice"}, "user_id"),
    ("GET", "traces?user_id=", {}, "agent_memory.user_id"),
]


@pytest.mark.parametrize(("method", "path", "headers", "param"), IDLE)
def test_what_a_route_would_ignore_is_refused(
    open_host: Host, owners: list[Owner], method: str, path: str, headers: dict[str, str], param: str
) -> None:
    """A part of a scope that the route does not heed, a mistyped or a contradicted one: 400 that names it."""
    refused = open_host.route(method, path, key="red-key", headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert damage(open_host, owners) == []


@pytest.mark.parametrize("way", ["query", "header", "gateway"])
def test_deleting_a_namespace_as_one_user_leaves_the_others(open_host: Host, owners: list[Owner], way: str) -> None:
    """However the user is named, `DELETE namespaces/default` deletes that user's alone."""
    memory, name = {"namespace": "default"}, f"user-{way}"
    made = open_host.chat("throw me away", memory={**memory, "user_id": name}, key="red-key")["id"]
    headers = {"header": {"X-Agent-Memory-User-Id": name}, "gateway": {"X-OpenWebUI-User-Id": name}}.get(way, {})
    query = f"?user_id={name}" if way == "query" else ""
    open_host.settle()
    done = open_host.route("DELETE", f"namespaces/default{query}", key="red-key", headers=headers)
    assert (done.status_code, done.json()["deleted"]["traces"]) == (202, 1), done.text
    assert open_host.route("GET", f"traces/{made}", key="red-key").status_code == 404
    assert damage(open_host, owners) == []
