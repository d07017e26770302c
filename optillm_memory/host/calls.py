"""Recording client: wraps the host's client and records every model call made through it."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar

from optillm_memory.conversation.text import text_of
from optillm_memory.host.failopen import FailOpen
from optillm_memory.store.tables.calls import ModelCall

T = TypeVar("T")
REFUSED = frozenset((400, 413, 422))  # the prompt is at fault, not the caller, its rate, or the upstream
_CHAIN = 8  # longest chain of causes that is followed
_PLAIN = (str, int, float, bool, type(None))
_LONG = ("messages", "tools")
_COPIES = ("with_options", "copy")  # a client with other options still makes this request's calls


class CallLog:
    """The model calls of one request; approaches make them from any thread."""

    def __init__(self, fail_open: FailOpen) -> None:
        """Start without calls; `fail_open` catches faults in recording."""
        self._fail_open = fail_open
        self._calls: list[ModelCall] = []
        self._lock = threading.Lock()
        self._closed = False
        self.refused = self.answered = 0  # calls that the upstream refused, and calls that it answered

    def __len__(self) -> int:
        return len(self._calls)

    def try_for(self, work: Callable[[], T], otherwise: T) -> T:
        """Return the result of quick work, or `otherwise` if it fails."""
        done: list[T] = []
        self._fail_open.quietly(lambda: done.append(work()))
        return done[0] if done else otherwise

    def add(self, asked: Mapping[str, Any], response: Any, error: Exception | None, latency_ms: float) -> None:
        """Record a finished call; a fault in that costs the record, not the call."""
        refused = is_refusal(error) or self.try_for(lambda: says_refused(response), False)
        with self._lock:
            self.refused += refused
            self.answered += error is None and not refused
        self._fail_open.quietly(lambda: self._add(_call(asked, response, error, latency_ms)))

    def _add(self, call: ModelCall) -> None:
        with self._lock:
            if not self._closed:
                self._calls.append(call)

    def asked(self) -> str:
        """Return the text of all prompts so far, with single spaces."""
        with self._lock:
            return spaced("\n".join(text_of(message) for call in self._calls for message in call.messages))

    def close(self) -> tuple[ModelCall, ...]:
        """Return the calls and record no more: an approach may keep its client longer than the request lasts."""
        with self._lock:
            self._closed = True
            return tuple(self._calls)


class _StandIn:
    """Wraps an object of the client: what is not defined here comes from the real object."""

    def __init__(self, real: Any, log: CallLog) -> None:
        self._real = real
        self._log = log

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_real":
            raise AttributeError(name)
        return getattr(self._real, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # isinstance sees the real type. The class has a different name: code that checks the name of a client, such as
        # optillm's deep_research, would build a client of its own and make its calls with that.
        kind: Any = type(self._real)
        return _subclass(kind)


@functools.cache
def _subclass(kind: type) -> type:
    return type("RecordingClient", (kind,), {})


class RecordingClient(_StandIn):
    """The host's client, of any type, with `chat.completions.create` recorded."""

    @property
    def chat(self) -> Any:
        """The client's `chat`, recorded."""
        return _Chat(self._real.chat, self._log)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name in _COPIES:
            return lambda *args, **given: RecordingClient(found(*args, **given), self._log)
        return found


class _Chat(_StandIn):
    @property
    def completions(self) -> Any:
        return _Completions(self._real.completions, self._log)


class _Completions(_StandIn):
    def create(self, *args: Any, **asked: Any) -> Any:
        """Make the call with the real client, and record it."""
        started = time.perf_counter()
        try:
            response = self._real.create(*args, **self._log.try_for(lambda: sent_lean(self._real, asked), asked))
        except Exception as error:
            self._log.add(asked, None, error, (time.perf_counter() - started) * 1000)
            raise
        self._log.add(asked, response, None, (time.perf_counter() - started) * 1000)
        return response


def is_refusal(error: BaseException | None) -> bool:
    """Whether an upstream refused a prompt: status 400, 413 or 422, in the exception or in one of its causes."""
    for _ in range(_CHAIN):
        if error is None:
            return False
        status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in REFUSED
        error = error.__cause__ or error.__context__
    return False


def says_refused(response: Any) -> bool:
    """Whether a body with status 200 is a refusal: some gateways put the provider's error into it."""
    error = _part(response, "error")
    return (
        isinstance(error, Mapping)
        and not _choices(response)
        and any(
            str(error.get(name)) in {str(status) for status in REFUSED} for name in ("code", "status", "status_code")
        )
    )


def with_limits(client: Any, *, timeout_s: float, max_retries: int | None = None) -> Any:
    """Return the client with a time limit and a number of retries, if it supports them."""
    limited = getattr(client, "with_options", None)
    if limited is None:
        return client
    return limited(timeout=timeout_s, **({} if max_retries is None else {"max_retries": max_retries}))


def time_limit_of(client: Any) -> float | None:
    """Return how many seconds a client waits for an answer; None if it does not say, or waits forever."""
    limit = getattr(client, "timeout", None)
    limit = getattr(limit, "read", limit)
    return float(limit) if isinstance(limit, (int, float)) else None


def spaced(text: str) -> str:
    """Return a text with single spaces: approaches reformat what they pass on."""
    return " ".join(text.split())


def sent_lean(completions: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that make the openai package send the same bytes without its walk through all messages.

    The walk is for values that are not JSON; it takes 3 ms for 11 messages and 150 ms for 400. `extra_body` is merged
    into the body unchanged. Code that wraps the package's function (for telemetry) gets the original arguments.
    """
    # Not at import: it takes a third of a second, and by now the host's client has loaded it.
    from openai.resources.chat.completions import Completions  # noqa: PLC0415

    if not isinstance(completions, Completions) or not _is_openais_own(completions.create):
        return asked
    extra = asked.get("extra_body") or {}
    if not isinstance(extra, dict):
        return asked
    long = {name: asked[name] for name in _LONG if type(asked.get(name)) is list and _is_plain(asked[name])}
    # An empty list keeps the field's position in the body.
    return {**asked, **{name: [] for name in long}, "extra_body": {**long, **extra}} if long else asked


def _is_openais_own(function: Any) -> bool:
    made_in = function.__func__.__globals__.get("__name__") if type(function) is MethodType else None
    return str(made_in).startswith("openai.")


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return kind in _PLAIN or (kind is list and all(map(_is_plain, value)))


def _call(asked: Mapping[str, Any], response: Any, error: Exception | None, latency_ms: float) -> ModelCall:
    messages = _as_plain(asked.get("messages"))
    usage = _part(response, "usage")
    return ModelCall(
        model=str(asked.get("model") or ""),
        messages=[m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else [],
        answers=[_answer(choice) for choice in _choices(response)],
        prompt_tokens=int(_part(usage, "prompt_tokens") or 0),
        completion_tokens=int(_part(usage, "completion_tokens") or 0),
        latency_ms=latency_ms,
        error=None if error is None else f"{type(error).__name__}: {error}",
    )


def _as_plain(value: Any) -> Any:
    # A copy, since approaches keep adding to the list they sent; it can contain objects of the openai package.
    if isinstance(value, Mapping):
        return {str(key): _as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_plain(item) for item in value]
    if type(value) in _PLAIN:
        return value
    return _as_plain(value.model_dump()) if hasattr(value, "model_dump") else str(value)


def _choices(response: Any) -> Sequence[Any]:
    choices = _part(response, "choices")
    return choices if isinstance(choices, (list, tuple)) else ()  # a stream has none


def _answer(choice: Any) -> str:
    content = _part(_part(choice, "message"), "content")
    return content if isinstance(content, str) else ""


def _part(of: Any, name: str) -> Any:
    # Most of the host's clients answer with objects, some with mappings.
    return of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)
