"""A page of another site, in a browser on this machine, reaches nothing that memory holds."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import flask
import pytest
from hosting import MODEL, Host

from optillm_memory.host.origin import foreign_origin

HERE = "127.0.0.1"
TASK, ANSWER = "How do I open the vault?", "Turn the wheel three times."

FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:8000"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://localhost:9999"},
    {"Origin": "null"},
    {"Origin": "http://[broken"},
    {"Host": "evil.example"},
    {"Host": "evil.example:8000", "Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example:8000"},
    {"Host": "localhost.evil.example:8000", "X-Forwarded-For": "127.0.0.1"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost@evil.example"},
    {"Host": "192.0.2.7:8000"},
    {"Host": "gpu-box:8000"},
    {"Host": ""},
    {"Host": "[broken"},
]
OWN: list[dict[str, str]] = [
    {},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:8000"},
    {"Origin": "http://localhost:8000"},
    {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"},
    {"Host": "[::1]:8000"},
    {"Host": "memory.localhost:8000"},
    {"Host": "LOCALHOST:8000"},
    {"Host": "localhost.:8000"},
    {"Host": "host.docker.internal:8000"},
    {"Host": f"{socket.gethostname()}:8000"},
    # Behind a proxy that gives its own name to this server; the browser says that the page is of the same site.
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://memory.example"},
]


def reason(
    headers: Mapping[str, str], *, listens_on: str = HERE, caller: str = HERE, allowed: str = "", any_name: bool = False
) -> str | None:
    """Return why a request with these headers is refused."""
    given = {"Host": "localhost:8000", **headers}
    with flask.Flask(__name__).test_request_context(
        "/v1/agent_memory/traces", headers=given, environ_overrides={"REMOTE_ADDR": caller}
    ):
        return foreign_origin(flask.request, listens_on, allowed, any_name=any_name)


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_are_known(headers: dict[str, str]) -> None:
    """By what the browser says of the page, or by the name under which this machine was reached."""
    assert reason(headers) is not None


@pytest.mark.parametrize("headers", OWN)
def test_programs_and_own_pages_are_let_through(headers: dict[str, str]) -> None:
    """What is no browser says nothing of pages, and own pages come from where they ask."""
    assert reason(headers) is None


def test_names_of_this_server_can_be_allowed() -> None:
    """A reverse proxy's name is refused by a message that names the setting, and allowed by it."""
    given = {"Host": "Memory.example:443"}
    assert "OPTILLM_AGENT_MEMORY_ALLOWED_HOSTS" in str(reason(given))
    assert reason(given, allowed="other.example, memory.EXAMPLE") is None
    assert reason({**given, "Sec-Fetch-Site": "cross-site"}, allowed="memory.example") is not None


NAMES_OF_A_NETWORK = ["gpu-box:8000", "192.0.2.7:8000", "[2001:db8::7]:8000", "optillm:8000", "llm.bound.example"]


@pytest.mark.parametrize("name", NAMES_OF_A_NETWORK)
def test_a_server_on_the_network_has_more_names(name: str) -> None:
    """Its addresses, names without a dot and the name it is bound to: none that DNS lets an outsider choose."""
    listens_on = "llm.bound.example" if name.endswith("example") else "0.0.0.0"
    assert reason({"Host": name}, listens_on=listens_on) is None
    assert reason({"Host": "evil.example"}, listens_on=listens_on) is not None
    assert reason({"Host": name, "Origin": "https://evil.example"}, listens_on=listens_on) is not None


def test_a_program_may_call_a_server_on_the_network_by_any_name() -> None:
    """In a chat request only pages are held to known names; a page says so in what it posts, also after rebinding."""
    name = {"Host": "llm.corp.example:8000"}
    assert reason(name, listens_on="0.0.0.0", any_name=True) is None
    assert reason({**name, "Origin": "http://llm.corp.example:8000"}, listens_on="0.0.0.0", any_name=True) is not None
    assert reason({**name, "Sec-Fetch-Site": "same-origin"}, listens_on="0.0.0.0", any_name=True) is not None
    assert reason(name, any_name=True) is not None  # on this machine alone there is no such name


@pytest.mark.host
def test_a_page_of_another_site_neither_reads_nor_writes(host: Host, namespace: dict[str, str]) -> None:
    """All routes refuse it without a secret of this server; a chat request without a key is answered without memory."""
    trace_id = host.teach(TASK, ANSWER, memory=namespace, key="")
    messages = [{"role": "user", "content": TASK}]
    assert host.chat(TASK, memory=namespace, key="")["agent_memory"]["action"] == "inject"
    told = {"trace_id": trace_id, "metric": "success", "value": False, "source": "code"}
    before = len(host.get(f"traces/{trace_id}", key=None)["feedback"])
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        for method, path in (
            ("GET", "traces"), ("GET", f"traces/{trace_id}"), ("GET", "memories"), ("GET", "stats"), ("GET", "ready"),
            ("POST", "feedback"), ("POST", "rebuild"), ("DELETE", "namespaces/default"),
        ):  # fmt: skip
            for key in ("", "guessed"):
                given = {"json": told} if method == "POST" else {}
                refused = host.route(method, path, key=key, headers=headers, **given)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin"), (method, path)
        host.upstream.clear()
        body = {"model": MODEL, "messages": messages, "agent_memory": {**namespace, "feedback": [told]}}
        asked = host.post(body, key=None, headers=headers)
        assert (asked.status_code, "agent_memory" in asked.json()) == (200, False)
        assert host.prompt == messages
        assert host.route("GET", "traces", headers=headers, key=None).status_code == 200
    assert len(host.get(f"traces/{trace_id}", key=None)["feedback"]) == before
    assert host.chat(TASK, memory=namespace, key="")["agent_memory"]["action"] == "inject"
