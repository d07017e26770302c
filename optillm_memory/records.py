"""The vocabulary of the design as frozen values, which the packages pass to each other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

# Starts a daemon thread of this name that does this work; `background.threads.start_thread` is the one that does.
ThreadStarter: TypeAlias = Callable[[str, Callable[[], None]], threading.Thread]
# Whose call it is: a caller's tenant, or None for the operator at the machine, who may see and judge every scope.
Tenant: TypeAlias = str | None
OPERATOR: Tenant = None

Message = dict[str, Any]
Mode = Literal["readwrite", "read", "write", "off"]
Action = Literal["plain", "inject", "reuse", "holdout"]
Metric = Literal["success", "score", "comment", "demonstration", "error"]
Source = Literal["code", "human", "llm", "inferred"]
Level = Literal["off", "default", "strict"]  # of redaction
Verdict = Literal["success", "failure", "unknown"]
Trust = Literal["open", "strict"]
FeedbackStatus = Literal["applied", "pending", "duplicate", "retracted"]

METRICS: tuple[Metric, ...] = ("success", "score", "comment", "demonstration", "error")
_USE_WEIGHT = 0.05
# Reporters that need no key of their own: the operator over HTTP, the command line, and this process's own code.
OPERATING, COMMAND_LINE, IN_PROCESS = "operator", "cli", "python"
TRUSTED = frozenset((OPERATING, COMMAND_LINE, IN_PROCESS))
VERIFYING: frozenset[Source] = frozenset(("code", "human"))


@dataclass(frozen=True, slots=True)
class Scope:
    """The isolation key: recall never crosses it."""

    tenant: str
    namespace: str = "default"
    user_id: str = ""
    agent_id: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """What a call may see and change: what agrees with all that is named here.

    None is any; so a view of a tenant that names no user is that of all its users, and the default is the operator's.
    """

    tenant: Tenant = OPERATOR
    namespace: str | None = None
    user_id: str | None = None
    agent_id: str | None = None

    def covers(self, scope: Scope) -> bool:
        """Whether what is in a scope may be seen and changed."""
        pairs = ((getattr(self, name), getattr(scope, name)) for name in SCOPE_PARTS)
        return all(named is None or named == found for named, found in pairs)

    @classmethod
    def of(cls, whose: View | Tenant) -> View:
        """Return the view of a tenant, or the view itself."""
        return whose if isinstance(whose, View) else cls(whose)


SCOPE_PARTS = ("tenant", "namespace", "user_id", "agent_id")
NARROWING = SCOPE_PARTS[1:]  # the parts that a caller names: within its tenant
EVERYTHING = View()


@dataclass(frozen=True, slots=True)
class Step:
    """One action (tool call) and its observation (tool result); `observation` is None while it is awaited.

    `step_id` is the same in every request that holds the step, `parent_id` that of the step before it on its branch,
    and `made` the conversation prefix that ends with the answer that asked for it.
    """

    call_id: str
    ordinal: int
    tool: str
    arguments: str
    observation: str | None
    step_id: str = ""
    parent_id: str = ""
    made: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """One request through the proxy with its response; `extra_calls` are those that memory made.

    `partition` hashes what else must be equal for an answer to be reused; empty where reuse is out of the question.
    `continued` is the answered conversation prefix that the request goes on from (empty for none), `continuation` that
    prefix with the next message. `one_shot`: no assistant had spoken, and there were no tools. `end_user` is the user
    that the client named, `goal` what the caller said the episode is meant to achieve; empty where they said nothing.
    `asker` is the reporter whose key came with the request.
    """

    trace_id: str
    scope: Scope
    episode_id: str
    created_at: float
    model: str
    approach: str
    action: Action
    held_out: bool
    propensity: float
    task: str
    frame: str
    messages: str
    answer: str | None
    finish_reason: str | None
    error: str | None
    skipped: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    recall_ms: float
    tags: Mapping[str, str] = field(default_factory=dict)
    extra_calls: int = 0
    partition: str = ""
    continued: str = ""
    continuation: str = ""
    one_shot: bool = True
    end_user: str = ""
    goal: str = ""
    asker: str = ""

    @property
    def askers(self) -> frozenset[str]:
        """All names of whoever asked: a reporter of one of these names speaks of its own work."""
        names = (self.scope.tenant, self.scope.user_id, self.scope.agent_id, self.end_user, self.asker)
        return frozenset(name for name in names if name)


@dataclass(frozen=True, slots=True)
class Feedback:
    """Evidence about one trace, or about all traces of one episode.

    `value` is a bool (success), a number in [0, 1] (score), a text (comment, demonstration, error),
    or None, which retracts the feedback of the same `feedback_id`. `reporter` is who showed a credential for it, empty
    for nobody; under `strict` trust that decides what it proves. From `valid_until` (Unix seconds) on, what it says no
    longer holds; None is never.
    """

    feedback_id: str
    metric: Metric
    value: bool | float | str | None
    source: Source
    trace_id: str | None
    episode_id: str | None
    evidence: Mapping[str, Any] | None
    occurred_at: float
    reporter: str = ""
    trust: Trust = "open"
    valid_until: float | None = None


_CAPPED = "counts as llm: under strict trust only a reporter's key verifies"


@dataclass(frozen=True, slots=True)
class FeedbackReceipt:
    """What became of one feedback; returned once it is on disk."""

    feedback_id: str
    status: FeedbackStatus
    is_capped: bool = False  # it counts as `llm`, whatever its source was said to be

    def as_dict(self) -> dict[str, str]:
        """Return the JSON object that the endpoint answers with."""
        found = {"feedback_id": self.feedback_id, "status": self.status}
        return {**found, "source": "llm", "note": _CAPPED} if self.is_capped else found


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trace went, from feedback alone; `verified` when `code` or `human` said so.

    It holds until `valid_until`, by the latest feedback that counts; None is for ever.
    """

    verdict: Verdict
    verified: bool = False
    valid_until: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """Something that recall can return; an exemplar is a task and its verified answer.

    `successes` and `failures` count verified outcomes of the answer itself, `used_successes` and `used_failures`
    those of the requests that it was injected in. From `valid_until` (Unix seconds) on it is not used; None is never.
    """

    memory_id: str
    kind: str
    status: str
    scope: Scope
    task: str
    answer: str
    frame: str
    successes: int
    failures: int
    used_successes: int
    used_failures: int
    created_at: float
    valid_until: float | None = None

    @property
    def value(self) -> float:
        """Posterior mean of success under a Beta(4, 1) prior: a verified memory starts trusted, failures cost.

        A request that it was injected in weighs a twentieth of a verdict on its own answer: such a request fails for
        many reasons, and the injected memories share in all of them (co-occurrence is no proof).
        """
        good = 4 + self.successes + _USE_WEIGHT * self.used_successes
        bad = 1 + self.failures + _USE_WEIGHT * self.used_failures
        return good / (good + bad)

    def holds(self, now: float) -> bool:
        """Whether it still holds at a moment, in Unix seconds."""
        return self.valid_until is None or self.valid_until > now

    def as_dict(self) -> dict[str, Any]:
        """Return the memory as a JSON object."""
        return {**asdict(self), "value": round(self.value, 4)}


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A verified exemplar as the gate sees it.

    `origins` are the (partition, first episode, last episode) in which its answer was verified. `failed`: its latest
    verdict is a failure. `quarantined`: a reuse of it was found wrong, and it was not verified again since.
    """

    record: MemoryRecord
    origins: tuple[tuple[str, str, str], ...]
    failed: bool
    quarantined: bool


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of recall with its score parts; `cosine` is None where recall was lexical."""

    memory: MemoryRecord
    score: float
    cosine: float | None
    lexical: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the hit as a JSON object: the memory with its score components."""
        return {**self.memory.as_dict(), "score": self.score, "cosine": self.cosine, "lexical": self.lexical}


@dataclass(frozen=True, slots=True)
class Injected:
    """A memory as it was put in the prompt; `tokens` is an estimate, `suggestion` the action that a fix advised."""

    memory_id: str
    kind: str
    score: float
    tokens: int
    suggestion: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the response's metadata."""
        shown = {"memory_id": self.memory_id, "kind": self.kind, "score": self.score, "tokens": self.tokens}
        return shown if self.suggestion is None else {**shown, "suggestion": self.suggestion}


@dataclass(frozen=True, slots=True)
class KnownFix:
    """A fix that may be suggested: a failing action with its output, and what worked.

    `relation` is `instead`, `first` or `note`; `value` is its posterior in the environment that was asked about.
    """

    memory_id: str
    status: str
    tool: str
    field: str
    action: str
    output: str
    signature: str
    relation: str
    text: str
    value: float


@dataclass(frozen=True, slots=True)
class PastAttempt:
    """One earlier try of an action: how it went, when (Unix seconds), and what it printed where it failed."""

    episode_id: str
    step_id: str
    verdict: Verdict
    basis: str
    message: str
    output: str
    at: float
    signature: str


@dataclass(frozen=True, slots=True)
class Placement:
    """One insertion into a conversation, as the ledger keeps it.

    `anchor` is the hash of the client's messages up to and with message `position`; `payload` is a list of
    messages put before that message (`turns`), or a text put at its end (`block`).
    """

    anchor: str
    position: int
    form: Literal["turns", "block"]
    payload: list[Message] | str
    items: tuple[Injected, ...] = ()


OWN_MODEL = "default"  # in an arm: the model that the request names


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of answering: `approach@model`; `price` is what a thousand of its tokens cost, in any unit."""

    name: str
    approach: str
    model: str
    price: float = 1.0

    def model_for(self, asked: str) -> str:
        """Return the model to call where the request names this one."""
        return asked if self.model == OWN_MODEL else self.model


_uuid_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not find it held by a thread that it does not have
    os.register_at_fork(
        before=_uuid_lock.acquire, after_in_parent=_uuid_lock.release, after_in_child=_uuid_lock.release
    )
_uuid_last = 0


def uuid7_hex() -> str:
    """Return a UUIDv7 (RFC 9562 §5.7) as 32 hex digits, increasing within this process."""
    global _uuid_last  # noqa: PLW0603
    with _uuid_lock:
        # 48 bits of milliseconds and 12 bits of sub-millisecond time (RFC 9562 §6.2, method 3).
        stamp = time.time_ns() * 4096 // 1_000_000
        _uuid_last = stamp = max(stamp, _uuid_last + 1)
    random = int.from_bytes(os.urandom(8), "big") & (2**62 - 1)
    value = (stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64 | 0b10 << 62 | random
    return f"{value:032x}"


def new_trace_id() -> str:
    """Return a fresh trace id: what an OpenAI client sees as the completion's id."""
    return f"chatcmpl-{uuid7_hex()}"
