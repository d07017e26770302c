"""The replay of recorded runs through an empty memory, request by request, as an agent would have sent them.

The agent in the log never saw what memory would have inserted: what it did next is a witness of what was right, not an
effect.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optillm_memory.bench.in_process import empty_memory
from optillm_memory.bench.trajectories.runs import Run, calls_in
from optillm_memory.bench.trajectories.served import Served, actions_of
from optillm_memory.conversation.text import text_of
from optillm_memory.inject.render import estimate_tokens
from optillm_memory.learn.procedures.offer import Offer
from optillm_memory.memory import Memory
from optillm_memory.recall.encoder import Encoder
from optillm_memory.records import Message, Placement
from optillm_memory.request.turn import Turn

_VECTORS_S = 5.0  # for which a run waits, at most, until what the last one taught can be found
_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Asking:
    """How the agent asks: the share of outcomes that it reports, and whether memory may serve it actions."""

    outcomes: float = 1.0
    seed: int = 0
    actions: bool = False
    max_error: float = 0.05
    read_only: tuple[str, ...] = ()

    def field(self, run: Run, *, actions: bool) -> dict[str, Any]:
        """Return a request's field `agent_memory`."""
        asked: dict[str, Any] = {"episode_id": str(run.number)}
        if actions:
            asked["reuse"] = {"max_error": self.max_error, "actions": True}
            if self.read_only:
                asked["tools"] = {"read_only": list(self.read_only)}
        return asked


@dataclass(frozen=True, slots=True)
class Insertion:
    """One new insertion: the run and message that it was made for, what was written, and the tasks of its exemplars."""

    run: Run
    index: int
    placement: Placement
    tasks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What was written, as text."""
        return text_of_payload(self.placement.payload)

    @property
    def kinds(self) -> str:
        """The kinds of the memories in it."""
        return "+".join(sorted({item.kind for item in self.placement.items}))


@dataclass(slots=True)
class Episode:
    """What came of one run: its offers with the index of the message that each was made for, and the first serve.

    `prompt_tokens` are those of the requests that went to the model, without `injected_tokens`.
    """

    run: Run
    requests: int = 0
    injected_requests: int = 0
    prompt_tokens: int = 0
    injected_tokens: int = 0
    offers: list[tuple[int, Offer]] = field(default_factory=list)
    served: Served | None = None


@dataclass(slots=True)
class Replayed:
    """Everything that a replay saw."""

    episodes: list[Episode] = field(default_factory=list)
    insertions: list[Insertion] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    answers_served: int = 0
    begin_ms: list[float] = field(default_factory=list)
    learn_ms: list[float] = field(default_factory=list)
    wal_peak_bytes: int = 0
    db_bytes: int = 0


def replay(
    runs: Sequence[Run], encoder: Encoder, asking: Asking, *, tick: Callable[[], None] = lambda: None
) -> Replayed:
    """Replay runs in order: each assistant message is the response to the messages before it.

    After a run its true outcome is reported as feedback of source `code`, for a share of the runs. The next request
    comes when the last one is on disk, for a model takes longer to answer than that.
    """
    with empty_memory(encoder) as memory:
        player = _Player(memory, asking)
        for run in runs:
            player.play(run)
            tick()
        memory.close()
        player.result.db_bytes = _size(memory.settings.db)
    return player.result


class _Player:
    def __init__(self, memory: Memory, asking: Asking) -> None:
        self.result = Replayed()
        self._memory = memory
        self._asking = asking
        self._chance = random.Random(asking.seed)

    def play(self, run: Run) -> None:
        episode = Episode(run)
        self.result.episodes.append(episode)
        tokens = [tokens_of(message) for message in run.messages]
        schemas = estimate_tokens(json.dumps(list(run.tools))) if run.tools else 0
        for index in run.answered:
            turn = self._ask(episode, index)
            episode.requests += 1
            if turn.action != "reuse":
                episode.prompt_tokens += sum(tokens[:index]) + schemas
                self._count(episode, index, turn)
            self._memory.settle()
            self._watch()
        if self._chance.random() < self._asking.outcomes:
            self._report(run)

    def _ask(self, episode: Episode, index: int) -> Turn:
        """Ask as the log's agent did, and record its response; return the turn that was answered.

        An action that memory serves is taken where the log has the same one. Where it has another the model is asked
        instead, as it is for the rest of the run: only the first serve of a run is judged.
        """
        run = episode.run
        response = run.messages[index]
        turn = self._begin(run, index, actions=self._asking.actions and episode.served is None)
        if turn.action == "reuse":
            completion = turn.reused()
            served = Served.of(index, completion)
            episode.served = served
            self.result.answers_served += served is None
            if served is not None and served.actions == actions_of(response):
                self._memory.finish(turn, completion)
                return turn
            turn = self._begin(run, index, actions=False)
        finish_reason = "tool_calls" if calls_in(response) else "stop"
        choice = {"index": 0, "message": dict(response), "finish_reason": finish_reason}
        self._memory.finish(turn, {"choices": [choice]})
        return turn

    def _begin(self, run: Run, index: int, *, actions: bool) -> Turn:
        messages = [dict(message) for message in run.messages[:index]]
        body = {"model": run.model, "messages": messages, "agent_memory": self._asking.field(run, actions=actions)}
        if run.tools:
            body["tools"] = [dict(tool) for tool in run.tools]
        started = time.perf_counter()
        turn = self._memory.begin(body)
        self.result.begin_ms.append((time.perf_counter() - started) * 1000)
        self.result.skipped.update(item["reason"] for item in turn.skipped)
        return turn

    def _count(self, episode: Episode, index: int, turn: Turn) -> None:
        episode.injected_tokens += sum(estimate_tokens(text_of_payload(p.payload)) for p in turn.placements)
        episode.injected_requests += bool(turn.fresh)
        if turn.offer is not None and any(item.kind == "procedure" for p in turn.fresh for item in p.items):
            episode.offers.append((index, turn.offer))
        for placement in turn.fresh:
            exemplars = [item.memory_id for item in placement.items if item.kind == "exemplar"]
            tasks = tuple(self._memory.memory(memory_id).task for memory_id in exemplars)
            self.result.insertions.append(Insertion(episode.run, index, placement, tasks))

    def _report(self, run: Run) -> None:
        started = time.perf_counter()
        outcome = {"episode_id": str(run.number), "metric": "success", "value": run.resolved, "source": "code"}
        self._memory.feedback(outcome)
        self._memory.settle()
        self.result.learn_ms.append((time.perf_counter() - started) * 1000)
        self._watch()
        until = time.monotonic() + _VECTORS_S
        while self._memory.stats()["memories_without_vector"] and time.monotonic() < until:
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        size = _size(f"{self._memory.settings.db}-wal")
        self.result.wal_peak_bytes = max(self.result.wal_peak_bytes, size)


def text_of_payload(payload: str | Sequence[Message]) -> str:
    """Return what an insertion wrote, as text."""
    return payload if isinstance(payload, str) else "\n".join(text_of(message) for message in payload)


def tokens_of(message: Mapping[str, Any]) -> int:
    """Estimate the tokens of a message, with the calls in it."""
    calls = message.get("tool_calls")
    return estimate_tokens(text_of(message)) + (estimate_tokens(json.dumps(calls)) if calls else 0)


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
