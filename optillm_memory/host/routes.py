"""The routes under /v1/agent_memory/."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import flask
from werkzeug.exceptions import RequestEntityTooLarge

from optillm_memory.errors import (
    AgentMemoryError,
    InvalidField,
    NotAllowed,
    NotFound,
    StoreUnavailable,
    TooLarge,
    TooMany,
)
from optillm_memory.host.caller import Caller, caller_of, refuse_foreign
from optillm_memory.host.incoming import narrowed
from optillm_memory.host.runtime import runtime
from optillm_memory.host.server import host
from optillm_memory.memory import Memory
from optillm_memory.records import NARROWING, Hit, MemoryRecord, Scope, View
from optillm_memory.store.maintenance.selection import Selection

logger = logging.getLogger(__name__)

FEEDBACK_BYTES = 1_000_000
DELETE_WAIT_S = 60.0
PAGE = 50
PAGE_LIMIT = 1_000
TOO_DEEP = "the body is nested too deeply"
_STATUS = {"invalid_credential": 401, "unreadable_authorization": 401, "unsupported_media_type": 415}
# What each route takes from the query, and those that concern no scope. All others take the three parts of one.
_QUERY = {"traces": ("limit", "text"), "memories": ("limit", "query"), "uplift": ("limit",)}
_UNSCOPED = ("erasure", "ready", "rebuild")
blueprint = flask.Blueprint("agent_memory", __name__, url_prefix="/v1/agent_memory")
Answer = tuple[flask.Response, int]


def error_response(message: str, status: int, *, param: str | None = None, code: str | None = None) -> Answer:
    """Return an error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004
    return flask.jsonify({"error": {"message": message, "type": kind, "param": param, "code": code}}), status


@blueprint.errorhandler(AgentMemoryError)
def on_error(error: AgentMemoryError) -> Answer:
    """Return the error with the status that fits it; what is wrong with the server is for its log."""
    if isinstance(error, InvalidField):
        return error_response(str(error), 400, param=error.param, code="invalid_field")
    if isinstance(error, NotAllowed):
        return error_response(str(error), _STATUS.get(error.code, 403), code=error.code)
    if isinstance(error, NotFound):
        return error_response(str(error), 404, code="not_found")
    if isinstance(error, TooLarge):
        return error_response(str(error), 413, code="too_large")
    if isinstance(error, TooMany):
        response, status = error_response(str(error), 429, code="too_many")
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        return response, status
    logger.warning("agent_memory: %s %s: %s", flask.request.method, flask.request.path, error)
    caller: Caller | None = flask.g.get("agent_memory_caller")
    message = "memory is not available now, and nothing was acknowledged; the server's log says why"
    return error_response(str(error) if caller and caller.is_operator else message, 503, code="memory_unavailable")


@blueprint.errorhandler(RecursionError)
def on_deep_nesting(_: RecursionError) -> Answer:
    """Return 400 for a body that is nested deeper than Python follows."""
    return error_response(TOO_DEEP, 400, code="invalid_field")


@blueprint.before_request
def authorize() -> None:
    """Find out who asks, and refuse pages of other sites, bodies that a page can send unasked, and idle parameters."""
    request = flask.request
    flask.g.agent_memory_caller = caller = caller_of(request, host(), runtime())
    refuse_foreign(request, host(), runtime(), caller)
    # Across sites a browser sends three types of body, and an empty one, without asking the server first.
    writes = request.method in ("POST", "PUT", "PATCH")
    if (writes or (request.content_length or 0) > 0) and request.method != "GET" and not request.is_json:
        raise NotAllowed("unsupported_media_type", "send Content-Type: application/json")
    endpoint = str(request.endpoint).rpartition(".")[2]
    flask.g.agent_memory_view = narrowed(
        request, caller.visible, takes=_QUERY.get(endpoint, ()), scoped=endpoint not in _UNSCOPED
    )


@blueprint.post("/feedback")
def feedback() -> Answer:
    """Accept feedback; 202 means that it is on disk and already has its effect."""
    request = flask.request
    # One byte above the limit: a chunked body, which has no length, is cut off there without an error.
    request.max_content_length = FEEDBACK_BYTES + 1
    try:
        is_whole = len(request.get_data()) <= FEEDBACK_BYTES
    except RequestEntityTooLarge:
        is_whole = False
    if not is_whole:
        raise TooLarge(f"feedback is limited to {FEEDBACK_BYTES} bytes; send the end of a long output")
    payload = request.get_json(silent=True)
    if payload is None:
        raise InvalidField("feedback", "must be a JSON object or a list of objects")
    view, caller, limits = _view(), _caller(), runtime().feedback_limits
    named = view != View(view.tenant)
    limits.take(caller.tenant, len(payload) if isinstance(payload, list) else 1)
    receipts = _memory().feedback(
        payload,
        view=view,
        scope=_scope() if named else None,
        reporter=caller.reporter,
        may_wait=limits.may_wait(caller.tenant),
    )
    limits.note(caller.tenant, receipts)
    bodies = [r.as_dict() for r in receipts]
    return flask.jsonify(bodies if isinstance(payload, list) else bodies[0]), 202


@blueprint.get("/traces")
def traces() -> Answer:
    """Return the caller's latest traces; `?text=` keeps those whose task or answer contains a text."""
    found = _memory().traces(view=_view(), limit=_limit(), text=flask.request.args.get("text", ""))
    return flask.jsonify({"object": "list", "data": found}), 200


@blueprint.get("/traces/<trace_id>")
def trace(trace_id: str) -> Answer:
    """Return one trace with its messages, steps, injections and feedback."""
    return flask.jsonify(_memory().trace(trace_id, view=_view())), 200


@blueprint.get("/traces/<trace_id>/why")
def why(trace_id: str) -> Answer:
    """Return why a request was answered as it was: what was recalled, injected or skipped, and the decision."""
    return flask.jsonify(_memory().why(trace_id, view=_view())), 200


@blueprint.get("/memories")
def memories() -> Answer:
    """Return the latest memories; with `?query=`, what a request with that task would recall in the scope."""
    query = flask.request.args.get("query")
    if query is None:
        found: Sequence[MemoryRecord | Hit] = _memory().memories(view=_view(), limit=_limit())
    else:
        found = _memory().recall(query, scope=_scope(), limit=_limit())
    return flask.jsonify({"object": "list", "data": [each.as_dict() for each in found]}), 200


@blueprint.get("/memories/<memory_id>")
def one_memory(memory_id: str) -> Answer:
    """Return one memory of any status; a fix with its error and its evidence."""
    return flask.jsonify(_memory().described(memory_id, view=_view())), 200


@blueprint.delete("/memories/<memory_id>")
def forget_memory(memory_id: str) -> Answer:
    """Delete for good what a memory is based on, and so the memory; 202 with the receipt of its erasure."""
    return _forgotten(memory_id=memory_id)


@blueprint.delete("/traces/<trace_id>")
def forget_trace(trace_id: str) -> Answer:
    """Delete a trace for good, with its feedback and everything derived or copied from it; 202 with a receipt."""
    return _forgotten(trace_id=trace_id)


@blueprint.delete("/namespaces/<name>")
def forget_namespace(name: str) -> Answer:
    """Delete for good everything of the caller in a namespace; a user or an agent narrows it; 202."""
    if _view().namespace not in (None, name):
        raise InvalidField("namespace", f"{_view().namespace!r} is not the namespace in the path")
    return _forgotten(namespace=name)


@blueprint.get("/erasures/<receipt>")
def erasure(receipt: str) -> Answer:
    """Return whether the bytes of what a DELETE deleted are out of all files by now."""
    return flask.jsonify(_memory().erasure(receipt)), 200


@blueprint.get("/uplift")
def uplift() -> Answer:
    """Return how memory changed the outcome of the caller's episodes; `?limit=` memories of each scope."""
    return flask.jsonify(_memory().uplift(view=_view(), limit=_limit())), 200


@blueprint.get("/policy")
def policy() -> Answer:
    """Return the arms of approach `auto` and what is estimated of them in the caller's scope."""
    return flask.jsonify(_memory().policy(_scope())), 200


@blueprint.get("/stats")
def stats() -> Answer:
    """Return counts of what the caller has; for the operator of the whole store, with what failed open, by name."""
    faults = {"faults": dict(runtime().fail_open.faults)} if _caller().is_operator else {}
    return flask.jsonify({**_memory().stats(view=_view()), **faults}), 200


@blueprint.post("/rebuild")
def rebuild() -> Answer:
    """Derive everything again from the log; for the operator alone."""
    if not _caller().is_operator:
        raise NotAllowed("operator_only", "rebuild is for the operator: send X-Agent-Memory-Operator with the secret")
    return flask.jsonify(_memory().rebuild()), 200


@blueprint.get("/ready")
def ready() -> Answer:
    """Return whether the database can be written, by writing to it; 503 if not."""
    _memory().probe()
    return flask.jsonify({"status": "ready", "encoder": _memory().encoder.state}), 200


def _forgotten(**named: Any) -> Answer:
    view = _view()
    within = {**{part: getattr(view, part) for part in NARROWING}, **named}
    deleting = runtime().deleting  # one at a time: many at once would each take their turn before others may write
    if not deleting.acquire(timeout=DELETE_WAIT_S):
        raise StoreUnavailable("other deletions are still under way, and nothing of this one was done; send it again")
    try:
        return flask.jsonify(_memory().delete(Selection(tenant=view.tenant, **within))), 202
    finally:
        deleting.release()


def _memory() -> Memory:
    memory = runtime().memory
    if memory is None:
        raise StoreUnavailable(f"memory is off: {runtime().fault}")
    return memory


def _caller() -> Caller:
    caller: Caller = flask.g.agent_memory_caller
    return caller


def _view() -> View:
    view: View = flask.g.agent_memory_view
    return view


def _scope() -> Scope:
    """Return the one scope that the request names, for what is asked of a single one."""
    view = _view()
    return Scope(_caller().tenant, view.namespace or "default", view.user_id or "", view.agent_id or "")


def _limit() -> int:
    text = flask.request.args.get("limit", str(PAGE))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= PAGE_LIMIT:
        raise InvalidField("limit", f"must be a whole number from 1 to {PAGE_LIMIT}")
    return int(text)
