"""Forgetting through a real optillm: a caller deletes its own, and nobody else's."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hosting import Host

pytestmark = pytest.mark.host


def taught(host: Host, text: str, namespace: dict[str, str], key: str = "alice") -> dict[str, Any]:
    """Ask for an echo and praise it; return the answered body."""
    completion = host.chat(text, memory=namespace, key=key)
    host.tell({"trace_id": completion["id"], "metric": "success", "value": True, "source": "code"}, key=key)
    return completion


def test_callers_delete_what_is_theirs(host: Host, namespace: dict[str, str]) -> None:
    """A trace, a memory and a namespace can be deleted by whose they are, for others they are not there; then no byte.

    The bytes are gone when the receipt says so, within the time that it states.
    """
    first, second = (taught(host, f"zwitscherlich {n}", namespace) for n in "ab")
    (known, *_) = host.route("GET", "memories").json()["data"]
    paths = (f"traces/{first['id']}", f"memories/{known['memory_id']}", f"namespaces/{namespace['namespace']}")
    for path in paths:
        assert host.route("DELETE", path, key="bob").status_code == 404
    done = host.route("DELETE", paths[0])
    assert (done.status_code, done.json()["deleted"]["traces"]) == (202, 1), done.text
    assert host.route("GET", paths[0]).status_code == 404
    assert host.route("GET", f"traces/{second['id']}").status_code == 200
    assert host.route("DELETE", paths[1]).status_code == 202
    assert host.route("GET", paths[1]).status_code == 404
    taught(host, "zwitscherlich c", namespace)
    assert host.route("DELETE", f"{paths[2]}?user_id=nobody").status_code == 404
    done = host.route("DELETE", paths[2])
    assert done.json()["deleted"]["traces"] >= 1
    assert host.route("DELETE", paths[2]).status_code == 404
    receipt, within_s = done.json()["receipt"], done.json()["erased_within_s"]
    deadline = time.monotonic() + within_s
    while host.route("GET", f"erasures/{receipt}").json()["status"] != "done":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert host.route("GET", "erasures/999999").status_code == 404
    held = [f.name for f in host.db.parent.rglob("*") if f.is_file() and b"zwitscherlich" in f.read_bytes()]
    assert [name for name in held if name.startswith(host.db.name)] == []
