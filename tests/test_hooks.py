"""The host's hooks: a fault in one is logged, counted, and leaves the request to the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import flask
import pytest

from optillm_memory.host import hooks
from optillm_memory.host.failopen import FailOpen


@pytest.fixture
def fail_open(monkeypatch: pytest.MonkeyPatch) -> FailOpen:
    """Give the fail-open that the hooks use, without opening a memory or importing optillm."""
    found = FailOpen(1)
    monkeypatch.setattr(hooks, "runtime", lambda: SimpleNamespace(fail_open=found))
    monkeypatch.setattr(hooks, "host", object)
    return found


def broken(*_: Any) -> None:
    """Fail as nobody foresaw."""
    raise ZeroDivisionError("unforeseen")


def test_a_request_that_cannot_be_read_is_left_to_the_host(
    fail_open: FailOpen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault while the request is read is counted under its name, and the host answers."""
    monkeypatch.setattr(hooks, "read_incoming", broken)
    with flask.Flask("host").test_request_context("/v1/chat/completions", method="POST", json={}):
        assert hooks.before_request() is None
    assert fail_open.faults == {"ZeroDivisionError": 1}
    with flask.Flask("host").test_request_context("/v1/models"):
        assert hooks.before_request() is None
    assert fail_open.faults == {"ZeroDivisionError": 1}


def test_a_list_of_models_that_cannot_be_read_is_left_as_it_is(
    fail_open: FailOpen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are listed with memory beside them; a fault in that is counted, and the list goes out as it was."""
    app = flask.Flask("host")
    with app.test_request_context("/v1/models"):
        listed = hooks.after_request(flask.jsonify({"data": [{"id": "m"}]}))
        assert [model["id"] for model in listed.get_json()["data"]] == ["m", "agent_memory-m"]
        assert not fail_open.faults
        monkeypatch.setattr(hooks, "_list_models", broken)
        assert hooks.after_request(flask.jsonify({"data": [{"id": "m"}]})).get_json() == {"data": [{"id": "m"}]}
    assert fail_open.faults == {"ZeroDivisionError": 1}
