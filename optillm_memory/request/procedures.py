"""Procedures for a request: the solved episodes whose goals are nearest, and the one procedure that they agree on."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.conversation.goal import SharedLines, own_utterances, utterances
from optillm_memory.conversation.parse import key_of
from optillm_memory.conversation.text import text_of
from optillm_memory.learn.procedures.mine import SAY, run_of
from optillm_memory.learn.procedures.offer import Offer, Solved, agreeing, offer
from optillm_memory.recall.retriever import NEVER, Version
from optillm_memory.records import Scope
from optillm_memory.request.permission import offered_tools
from optillm_memory.request.turn import Turn
from optillm_memory.store.tables.memories import RecallReads
from optillm_memory.store.tables.procedures import ProcedureReads, StoredProcedure, keys_in
from optillm_memory.store.tables.vectors import key_hash
from optillm_memory.store.transaction import Transaction

_AGENTS_KEPT = 64  # scopes with a prompt signature
_EPISODES_KEPT = 2_000  # solved episodes of one agent, the latest
_NEAREST = 16
# How near a goal is, as a share of the way from unrelated texts (the encoder's median cosine of them) to equal ones:
# from the first on it is of one kind with another by itself, from the second on if several of the nearest did the same.
_ALIKE, _PERHAPS = 0.74, 0.5
_ASKED_OF, _AGREE = 5, 3  # the nearest that are compared, and how many of them must agree
_DIGITS = 5  # of a cosine that tell goals apart
_FEW = 10  # solved episodes of an agent, of which nothing is rare
_FAMILIES = 3  # kinds of goal in which a value must have come to be spelled out
_FAILING = 0.5  # value below which a procedure is not offered
_SETTLED = 20  # conversations from which on the shared lines are looked at again only as they grow
_GROWN = 1.1
_AT_ONCE, _ASKED_AT_ONCE, _ASK_AGAIN_S = 200, 32, 30.0  # goals, vectors, seconds
_Agent: TypeAlias = tuple[Scope, str]
Vector: TypeAlias = NDArray[np.float32]


@dataclass(slots=True)
class _Entry:
    """A solved episode with its goal as it is known now, and the goal's vector."""

    stored: StoredProcedure
    own: tuple[str, ...] = ()
    key: str = ""
    vector: Vector | None = None
    asked: float = -math.inf  # when the encoder was last asked for it, on the monotonic clock

    def renew(self, shared: SharedLines) -> None:
        """Work out the goal anew; one that has changed lacks its vector."""
        own = tuple(own_utterances(self.stored.texts, shared))
        if own != self.own:
            self.own, self.key, self.vector, self.asked = own, key_of("\n".join(own)), None, -math.inf


@dataclass(slots=True)
class _AgentState:
    """What is known of one agent (a scope and a prompt signature): shared lines, and solved episodes."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    version: Version = NEVER
    place: int = 0  # in the table of lines
    lines: dict[str, frozenset[str]] = field(default_factory=dict)  # by episode
    counts: Counter[str] = field(default_factory=Counter)
    shared: SharedLines = field(default_factory=SharedLines)
    entries: dict[int, _Entry] = field(default_factory=dict)  # by the number of their row
    stale: dict[int, None] = field(default_factory=dict)  # entries whose goal is to be worked out anew
    goals_of: int = 0  # conversations that were known when that began last

    def clear(self) -> None:
        """Forget all of it, but for whoever holds the lock."""
        self.version, self.place, self.goals_of, self.shared = NEVER, 0, 0, SharedLines()
        self.lines, self.counts, self.entries, self.stale = {}, Counter(), {}, {}


@dataclass(frozen=True, slots=True)
class SolvedAlike:
    """Solved episodes of one kind of goal, best first; `is_constant` tells which values belong to the kind of task.

    `is_used` tells which tools the agent's solved episodes used more than now and then.
    `misled` is when an action that was served from an episode as near as these was last found wrong (0: never),
    `fingerprint` that of the encoder by which they are alike.
    """

    near: Sequence[Solved]
    is_constant: Callable[[str], bool]
    fingerprint: str
    misled: float = 0.0
    is_used: Callable[[str], bool] = lambda _: False


class ProcedureAdviser:
    """Offers procedures, for one agent at a time; what it has read is kept, and read on from there."""

    def __init__(
        self,
        source: ProcedureReads,
        recall: RecallReads,
        encoder: EncoderService,
        post: Callable[[Callable[[Transaction], Any]], None] | None,
    ) -> None:
        """Start with nothing known; `post` has vectors kept in the background, None where nothing may be written."""
        self._post = post
        self._source = source
        self._recall = recall
        self._encoder = encoder
        self._lock = threading.Lock()
        self._agents: OrderedDict[_Agent, _AgentState] = OrderedDict()

    def shared_lines(self, scope: Scope, frame: str) -> SharedLines:
        """Return which lines an agent's conversations have in common."""
        state = self._state(scope, frame)
        with state.lock:
            self._read(state, scope, frame)
            return state.shared

    def offer(self, turn: Turn) -> Offer | None:
        """Return the procedure for a request whose user has just written, None where none fits."""
        found = self.solved(turn, turn.encoder_limit_s)
        if not found.near:
            return None
        done = [step.tool for step in run_of(turn.parsed.messages)[1] if step.tool != SAY and not step.failed]
        return offer(found.near, done, found.is_constant, _known_tools(turn, found.is_used))

    def solved(self, turn: Turn, limit_s: float) -> SolvedAlike:
        """Return the solved episodes whose goal is of one kind with that of a request's episode, best first."""
        conversation = turn.parsed
        nothing = SolvedAlike((), lambda _: False, self._encoder.fingerprint)
        state = self._state(turn.scope, conversation.frame)
        with state.lock:
            self._read(state, turn.scope, conversation.frame)
            shared = state.shared
            if not any(e.stored.episode_id != turn.episode_id for e in state.entries.values()):
                return nothing
        texts = [turn.options.goal] if turn.options.goal else utterances(conversation.messages)
        own = own_utterances(texts, shared)
        if not (goal := key_of("\n".join(own))):
            return nothing
        pending = self._encoder.ask(goal, limit_s, owner=turn.scope.tenant)  # before those that others lack
        with state.lock:
            self._renew_goals(state, turn.scope.tenant)
            entries = [e for e in state.entries.values() if e.stored.episode_id != turn.episode_id]
        entries = [e for e in entries if e.vector is not None and _value(e.stored) >= _FAILING]
        now = self._source.clock()
        entries = [e for e in entries if e.stored.holds(now)]
        if not entries or (vector := pending.vector()) is None:
            return nothing
        near, misled = self._nearest(entries, own, vector, turn.options.end_user)
        constants = _Constants(entries, self._cosine(_ALIKE))
        return SolvedAlike(near, constants, self._encoder.fingerprint, misled, _Tools(entries))

    # -- what is known of an agent -------------------------------------------------------------------

    def _state(self, scope: Scope, frame: str) -> _AgentState:
        with self._lock:
            state = self._agents.setdefault((scope, frame), _AgentState())
            self._agents.move_to_end((scope, frame))
            while len(self._agents) > _AGENTS_KEPT:
                self._agents.popitem(last=False)
            return state

    def _read(self, state: _AgentState, scope: Scope, frame: str) -> None:
        """Read on what was written of an agent since it was last asked about; the caller holds its lock."""
        version = self._recall.revision(scope)
        if version.origin != state.version.origin:  # forgotten, or made anew: nothing that was known holds
            state.clear()
        for place, episode_id, keys in self._source.lines(scope, frame, state.place):
            state.place = place
            state.counts.subtract(state.lines.get(episode_id, ()))
            state.lines[episode_id] = frozenset(keys_in(keys))
            state.counts.update(state.lines[episode_id])
        while len(state.lines) > 2 * _EPISODES_KEPT:
            state.counts.subtract(state.lines.pop(next(iter(state.lines))))
        if len(state.lines) != state.shared.conversations:
            state.shared = SharedLines(len(state.lines), state.counts)
        if version == state.version:
            return
        for stored in self._source.changed(scope, state.version.revision):
            if stored.stands and stored.frame == frame:
                state.entries[stored.number] = _Entry(stored)
                state.stale[stored.number] = None
            else:
                state.entries.pop(stored.number, None)
        while len(state.entries) > _EPISODES_KEPT:
            del state.entries[next(iter(state.entries))]
        state.version = version

    def _renew_goals(self, state: _AgentState, tenant: str) -> None:
        """Bring the goals of the solved episodes up to date with the shared lines, and fetch the vectors they lack.

        Some at each request: a later one finds those that are encoded meanwhile.
        """
        shared = state.shared.conversations
        if shared <= _SETTLED or shared > _GROWN * state.goals_of:
            state.goals_of = shared
            state.stale = dict.fromkeys(state.entries)
        for number in list(state.stale)[:_AT_ONCE]:
            del state.stale[number]
            if (entry := state.entries.get(number)) is not None:
                entry.renew(state.shared)
        lacking = [e for e in state.entries.values() if e.own and e.vector is None][:_AT_ONCE]
        if lacking and self._encoder.state == "ready":
            self._fetch_vectors(lacking, tenant)

    def _fetch_vectors(self, lacking: Sequence[_Entry], tenant: str) -> None:
        """Fetch vectors of goals from where they are kept; those of others are encoded for a later request."""
        kept = self._source.vectors(self._encoder.fingerprint, [key_hash(e.key) for e in lacking])
        fresh, asked = [], 0
        for entry in lacking:
            name = key_hash(entry.key)
            if (content := kept.get(name)) is not None:
                entry.vector = np.frombuffer(content, dtype=np.float32)
            elif (vector := self._encoder.cached(entry.key, owner=tenant)) is not None:
                entry.vector = vector
            elif asked < _ASKED_AT_ONCE and time.monotonic() > entry.asked + _ASK_AGAIN_S:
                self._encoder.ask(entry.key, 0.0, owner=tenant)  # this request's own goal must not wait for it
                entry.asked, asked = time.monotonic(), asked + 1
            if entry.vector is not None and entry.stored.key_hash != name:
                fresh.append((entry.stored.memory_id, name, entry.vector.tobytes()))
        if fresh and self._post is not None:
            fingerprint = self._encoder.fingerprint
            self._post(lambda tx: tx.procedures.put_vectors(fresh, fingerprint))

    def _nearest(
        self, entries: Sequence[_Entry], own: Sequence[str], vector: Vector, end_user: str
    ) -> tuple[Sequence[Solved], float]:
        """Return the solved episodes whose goal is of one kind with this one, best first, and when such misled last."""
        matrix = np.stack([e.vector for e in entries if e.vector is not None])
        cosines = matrix @ vector
        words, found = _words(own), []
        # Of equal goals the newest first: the latest evidence must be among those that are looked at.
        newest = [-e.stored.at for e in entries if e.vector is not None]
        for place in np.lexsort((newest, -cosines.round(_DIGITS)))[:_NEAREST].tolist():
            entry = entries[place]
            if cosines[place] < self._cosine(_PERHAPS):
                break
            equal = len(own) == 1 and _words(entry.own) == words and entry.stored.user == end_user
            stored = entry.stored
            solved = Solved(stored.memory_id, stored.episode_id, float(cosines[place]), stored.steps)
            found.append(replace(solved, at=stored.at, equal=equal, value=_value(stored), misled=stored.misled))
        alike = [solved for solved in found if solved.similarity >= self._cosine(_ALIKE)]
        near = alike or agreeing(found[:_ASKED_OF], _AGREE)
        farthest = min((solved.similarity for solved in near), default=math.inf)
        misled = max((e.stored.misled for e, c in zip(entries, cosines, strict=True) if c >= farthest), default=0.0)
        return near, misled

    def _cosine(self, share: float) -> float:
        """Return the cosine that is this share of the way from unrelated texts to equal ones."""
        unrelated, _ = self._encoder.unrelated
        return unrelated + (1 - unrelated) * share


class _Constants:
    """Tells whether a value belongs to the kind of task: it came in three kinds of goal."""

    def __init__(self, entries: Sequence[_Entry], floor: float) -> None:
        """Look for values among all solved episodes of an agent."""
        self._entries = entries
        self._floor = floor
        self._known: dict[str, bool] = {}

    def __call__(self, value: str) -> bool:
        """Return whether a value may be spelled out."""
        if value not in self._known:
            self._known[value] = self._came_often(value)
        return self._known[value]

    def _came_often(self, value: str) -> bool:
        kinds: list[Vector] = []
        for entry in self._entries:
            vector, slots = entry.vector, [slot for step in entry.stored.steps for slot in step.slots]
            if vector is None or not any(slot.kind == "constant" and slot.origin == value for slot in slots):
                continue
            if all(float(vector @ kind) < self._floor for kind in kinds):
                kinds.append(vector)
        return len(kinds) >= _FAMILIES


class _Tools:
    """Tells which tools are an agent's: of few solved episodes all, of more those that several of them used."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        """Look for tools among all solved episodes of an agent."""
        self._entries = entries

    def __call__(self, tool: str) -> bool:
        """Return whether a tool is used."""
        used = sum(any(step.tool == tool for step in entry.stored.steps) for entry in self._entries)
        return used >= (1 if len(self._entries) < _FEW else _FAMILIES)


def _known_tools(turn: Turn, is_used: Callable[[str], bool]) -> Callable[[str], bool]:
    """Return what tells whether a tool is one of the agent's: the request offers it, or names it, or it is used."""
    if offered := offered_tools(turn.body):
        return lambda tool: tool in offered
    text = "\n".join(text_of(message) for message in turn.parsed.messages)
    return lambda tool: tool in text or is_used(tool)


def _value(stored: StoredProcedure) -> float:
    """Posterior mean of success under Beta(3, 1): it was verified once; where it was given weighs a quarter."""
    good, bad = 3 + 0.25 * stored.used_successes, 1 + 0.25 * stored.used_failures + (stored.misled > 0)
    return good / (good + bad)


def _words(own: Sequence[str]) -> list[list[str]]:
    return [text.split() for text in own]
