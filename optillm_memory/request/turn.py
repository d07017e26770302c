"""Turn: one request on its way through memory, from begin to finish."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optillm_memory.conversation.episodes import Located, new_episode_id
from optillm_memory.conversation.options import Options
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.partition import partition_of
from optillm_memory.decide.actions import NextAction
from optillm_memory.decide.agreement import Proposal
from optillm_memory.decide.gate import Decision
from optillm_memory.decide.policy import Choice
from optillm_memory.inject.place import append_text, place
from optillm_memory.learn.procedures.offer import Offer
from optillm_memory.records import Action, Injected, Message, Placement, Scope, new_trace_id
from optillm_memory.request.deadline import Deadline
from optillm_memory.store.tables.calls import ModelCall

_ENCODER_SHARE = 0.7  # of the time that remains; after a busy encoder there is time to recall by words alone


@dataclass(frozen=True, slots=True)
class Turn:
    """A request with what was decided for it; `messages` is what goes upstream.

    `placements` are all insertions in the prompt, `fresh` those that this request made, `withheld` what a held-out
    request would have had. `conversation` is None where memory was not consulted. `calls` are the model calls that made
    the answer, where that is not one plain call. `located` says by which prefix the episode was found, None where the
    conversation is new or the caller named it. `proposal` is what memory would answer by itself, `decision` what the
    gate says of it; where the action is `reuse`, that is the answer, and nothing goes upstream; `next_action` is the
    proposal where it is a tool call. `arm` is what answers a request of approach `auto`, `choice` how it was chosen
    where it is not the episode's, and `length` the request's characters. `offer` is the procedure that this request was
    newly given. `started` is on the monotonic clock, `created_at` in Unix seconds.
    """

    trace_id: str
    episode_id: str
    scope: Scope
    options: Options
    body: Mapping[str, Any]
    messages: list[Message]
    model: str
    approach: str
    created_at: float
    started: float
    conversation: Conversation | None = None
    located: Located | None = None
    action: Action = "plain"
    held_out: bool = False
    propensity: float = 1.0
    placements: tuple[Placement, ...] = ()
    fresh: tuple[Placement, ...] = ()
    injected: tuple[Injected, ...] = ()
    withheld: tuple[Injected, ...] = ()
    skipped: tuple[Mapping[str, str], ...] = ()
    recall_ms: float = 0.0
    extra_calls: int = 0
    calls: tuple[ModelCall, ...] = ()
    proposal: Proposal | None = None
    decision: Decision | None = None
    arm: str = ""
    choice: Choice | None = None
    length: int = 0
    offer: Offer | None = None
    next_action: NextAction | None = None
    deadline: Deadline = field(default_factory=Deadline, compare=False)

    @property
    def parsed(self) -> Conversation:
        """The conversation, of a turn that memory is consulted for."""
        assert self.conversation is not None
        return self.conversation

    @property
    def encoder_limit_s(self) -> float:
        """How long this request may wait for its vector."""
        return max(self.deadline.remaining_s, 0.0) * _ENCODER_SHARE

    @property
    def partition(self) -> tuple[str, str]:
        """What must be equal for this request's answer to be reused, or "" with the reason why it never is."""
        return partition_of(self.body, self.parsed, self.options.end_user)

    @property
    def continues(self) -> bool:
        """Whether earlier traces of the episode hold the conversation so far."""
        return self.located is not None and not self.located.inherits

    @property
    def for_ledger(self) -> tuple[Placement, ...]:
        """What the episode's ledger is to hold of this request: of a conversation taken over, all that stands in it."""
        return self.placements if self.located is not None and self.located.inherits else self.fresh

    @property
    def sent(self) -> list[Message]:
        """The messages as the client sent them."""
        raw = self.body.get("messages")
        return list(raw) if isinstance(raw, list) else []

    @classmethod
    def plain(
        cls, body: Mapping[str, Any], *, tenant: str, options: Options, approach: str, now: float, deadline: Deadline
    ) -> Turn:
        """Return the turn of a request as it came, with a fresh trace id and an episode of its own."""
        raw = body.get("messages")
        return cls(
            trace_id=new_trace_id(),
            episode_id=options.episode_id or new_episode_id(),
            scope=Scope(tenant, options.namespace, options.user_id, options.agent_id),
            options=options,
            body=body,
            messages=list(raw) if isinstance(raw, list) else [],
            model=str(body.get("model") or ""),
            approach=approach,
            created_at=now,
            started=time.perf_counter(),
            deadline=deadline,
        )

    def skip(self, reason: str, **details: str) -> Turn:
        """Return the turn with one more reason why something was left out."""
        return replace(self, skipped=(*self.skipped, {"reason": reason, **details}))

    def as_sent(self) -> Turn:
        """Return the turn with the client's messages as they came: nothing was inserted."""
        return replace(self, action="plain", injected=(), placements=(), fresh=(), messages=self.sent)

    def placing(self, standing: Sequence[Placement], *fresh: Placement | None) -> Turn:
        """Return the turn with what stands in its prompt from before and what this request puts there.

        Two blocks at one place become one, for a place is what a later request finds again.
        """
        made: dict[tuple[str, str], Placement] = {}
        for new in fresh:
            if new is not None:
                made[new.anchor, new.form] = _joined(made.get((new.anchor, new.form)), new)
        placements = [*standing, *made.values()]
        if not placements:
            return self
        # Only where it is new is a suggestion to be followed; later on it is part of the conversation.
        added = [item for p in made.values() for item in p.items]
        again = {item.memory_id for item in added}
        old = [replace(i, suggestion=None) for p in standing for i in p.items if i.memory_id not in again]
        return replace(
            self,
            action="inject",
            placements=tuple(placements),
            fresh=tuple(made.values()),
            injected=(*old, *added),
            messages=place(self.sent, placements),
        )

    def reused(self) -> dict[str, Any]:
        """Return the completion of a request that memory answers: the host's form, and no tokens used."""
        assert self.proposal is not None
        message: Message = {"role": "assistant", "content": self.proposal.answer}
        if self.next_action is not None:
            function = {"name": self.next_action.tool, "arguments": self.next_action.arguments}
            call = {"id": f"call_{self.trace_id.rpartition('-')[2]}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        ending = "stop" if self.next_action is None else "tool_calls"
        return {
            "id": self.trace_id,
            "object": "chat.completion",
            "created": int(self.created_at),
            "model": self.model,
            "choices": [{"index": 0, "message": message, "finish_reason": ending}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }

    def metadata(self) -> dict[str, Any]:
        """Return the response's field `agent_memory`."""
        return {
            "trace_id": self.trace_id,
            "episode_id": self.episode_id,
            "action": self.action,
            "approach": self.approach,
            "model": self.model,
            "injected": [{**item.as_dict(), "score": round(item.score, 4)} for item in self.injected],
            "skipped": [dict(item) for item in self.skipped],
            "recall_ms": round(self.recall_ms, 3),
            **({"extra_calls": self.extra_calls} if self.extra_calls else {}),
            **({"policy": self._policy()} if self.arm else {}),
            **({"reuse": self._reuse()} if self.options.reuse and self.decision else {}),
        }

    def _policy(self) -> dict[str, Any]:
        policy: dict[str, Any] = {"arm": self.arm}
        if self.choice is not None:
            policy |= {"propensity": round(self.choice.propensity, 4), "reason": self.choice.reason}
        return policy

    def _reuse(self) -> dict[str, Any]:
        assert self.decision is not None
        reuse: dict[str, Any] = {"served": self.decision.serve, "reason": self.decision.reason}
        if self.proposal is not None:
            reuse |= {"score": round(self.proposal.score, 4), "threshold": self.decision.threshold}
            reuse["memory_ids"] = list(self.proposal.memory_ids)
        return reuse


def _joined(before: Placement | None, new: Placement) -> Placement:
    if before is None or not isinstance(before.payload, str) or not isinstance(new.payload, str):
        return new
    return replace(new, payload=append_text(before.payload, new.payload), items=(*before.items, *new.items))
