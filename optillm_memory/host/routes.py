"""The routes under /v1/agent_memory/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flask
from werkzeug.exceptions import RequestEntityTooLarge

from optillm_memory.errors import AgentMemoryError, InvalidField, NotFound, StoreUnavailable, TooLarge
from optillm_memory.host.incoming import ANONYMOUS, caller_of, refusal_of, scope_of
from optillm_memory.host.runtime import runtime
from optillm_memory.host.server import host
from optillm_memory.memory import Memory
from optillm_memory.records import OPERATOR, Hit, MemoryRecord, Scope, Tenant
from optillm_memory.store.maintenance.selection import Selection

FEEDBACK_BYTES = 1_000_000
PAGE = 50
PAGE_LIMIT = 1_000
blueprint = flask.Blueprint("agent_memory", __name__, url_prefix="/v1/agent_memory")
Answer = tuple[flask.Response, int]


def error_response(message: str, status: int, *, param: str | None = None, code: str | None = None) -> Answer:
    """Return an error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004
    return flask.jsonify({"error": {"message": message, "type": kind, "param": param, "code": code}}), status


@blueprint.errorhandler(AgentMemoryError)
def on_error(error: AgentMemoryError) -> Answer:
    """Return the error with the status that fits it."""
    if isinstance(error, InvalidField):
        return error_response(str(error), 400, param=error.param, code="invalid_field")
    if isinstance(error, NotFound):
        return error_response(str(error), 404, code="not_found")
    if isinstance(error, TooLarge):
        return error_response(str(error), 413, code="too_large")
    return error_response(str(error), 503, code="memory_unavailable")


@blueprint.before_request
def refuse_foreign_pages() -> Answer | None:
    """Refuse what a page of another site sent without a key; on this machine it would be the operator."""
    reason = refusal_of(flask.request, host())
    return None if reason is None else error_response(reason, 403, code="foreign_origin")


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
    payload = request.get_json(silent=True, force=True)
    if payload is None:
        raise InvalidField("feedback", "must be a JSON object or a list of objects")
    tenant, scope = _visible(), _scope()
    named = tenant != OPERATOR or any(k.lower().startswith("x-agent-memory-") for k in dict(request.headers))
    receipts = _memory().feedback(payload, tenant=tenant, scope=scope if named else None)
    bodies = [r.as_dict() for r in receipts]
    return flask.jsonify(bodies if isinstance(payload, list) else bodies[0]), 202


@blueprint.get("/traces")
def traces() -> Answer:
    """Return the caller's latest traces; `?text=` keeps those whose task or answer contains a text."""
    found = _memory().traces(tenant=_visible(), limit=_limit(), text=flask.request.args.get("text", ""))
    return flask.jsonify({"object": "list", "data": found}), 200


@blueprint.get("/traces/<trace_id>")
def trace(trace_id: str) -> Answer:
    """Return one trace with its messages, steps, injections and feedback."""
    return flask.jsonify(_memory().trace(trace_id, tenant=_visible())), 200


@blueprint.get("/traces/<trace_id>/why")
def why(trace_id: str) -> Answer:
    """Return why a request was answered as it was: what was recalled, injected or skipped, and the decision."""
    return flask.jsonify(_memory().why(trace_id, tenant=_visible())), 200


@blueprint.get("/memories")
def memories() -> Answer:
    """Return the latest memories; with `?query=`, what a request with that task would recall in the scope."""
    query = flask.request.args.get("query")
    if query is None:
        found: Sequence[MemoryRecord | Hit] = _memory().memories(tenant=_visible(), limit=_limit())
    else:
        found = _memory().recall(query, scope=_scope(), limit=_limit())
    return flask.jsonify({"object": "list", "data": [each.as_dict() for each in found]}), 200


@blueprint.get("/memories/<memory_id>")
def one_memory(memory_id: str) -> Answer:
    """Return one memory of any status; a fix with its error and its evidence."""
    return flask.jsonify(_memory().described(memory_id, tenant=_visible())), 200


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
    """Delete for good everything of the caller in a namespace; `?user_id=` and `?agent_id=` narrow it; 202."""
    narrowed = {key: value for key in ("user_id", "agent_id") if (value := flask.request.args.get(key)) is not None}
    return _forgotten(namespace=name, **narrowed)


@blueprint.get("/erasures/<receipt>")
def erasure(receipt: str) -> Answer:
    """Return whether the bytes of what a DELETE deleted are out of all files by now."""
    return flask.jsonify(_memory().erasure(receipt)), 200


@blueprint.get("/uplift")
def uplift() -> Answer:
    """Return how memory changed the outcome of the caller's episodes; `?limit=` memories of each scope."""
    return flask.jsonify(_memory().uplift(tenant=_visible(), limit=_limit())), 200


@blueprint.get("/policy")
def policy() -> Answer:
    """Return the arms of approach `auto` and what is estimated of them in the caller's scope."""
    return flask.jsonify(_memory().policy(_scope())), 200


@blueprint.get("/stats")
def stats() -> Answer:
    """Return counts of the whole store, and the faults that failed open, by name."""
    return flask.jsonify({**_memory().stats(), "faults": dict(runtime().fail_open.faults)}), 200


@blueprint.post("/rebuild")
def rebuild() -> Answer:
    """Derive everything again from the log; for the operator, or the holder of the host's key."""
    if _visible() != OPERATOR and not host().server_config["optillm_api_key"]:
        return error_response("rebuild is for the operator: ask from this machine, without a key", 403)
    return flask.jsonify(_memory().rebuild()), 200


@blueprint.get("/ready")
def ready() -> Answer:
    """Return whether the database can be written, by writing to it; 503 if not."""
    _memory().probe()
    return flask.jsonify({"status": "ready", "encoder": _memory().encoder.state}), 200


def _forgotten(**named: Any) -> Answer:
    return flask.jsonify(_memory().delete(Selection(tenant=_visible(), **named))), 202


def _memory() -> Memory:
    memory = runtime().memory
    if memory is None:
        raise StoreUnavailable(f"memory is off: {runtime().fault}")
    return memory


def _visible() -> Tenant:
    return caller_of(flask.request, host())


def _scope() -> Scope:
    return scope_of(flask.request, _visible() or ANONYMOUS)


def _limit() -> int:
    text = flask.request.args.get("limit", str(PAGE))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= PAGE_LIMIT:
        raise InvalidField("limit", f"must be a whole number from 1 to {PAGE_LIMIT}")
    return int(text)
