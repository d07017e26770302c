"""Routing: which arm answers a request of approach `auto`, and what is believed of the arms."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from optillm_memory.decide.policy import Situation, Terms
from optillm_memory.decide.policy_updater import PolicyUpdater, Row
from optillm_memory.recall.retriever import Version
from optillm_memory.records import Arm, Scope
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings

_SCOPES_KEPT = 64
_EPISODES_KEPT = 10_000
_SHOWN = 160  # characters of an example task


class Source(Protocol):
    """What routing reads; every call is bound to one scope."""

    def revision(self, scope: Scope) -> Version:
        """Return what is of another origin when nothing that was read before holds any more."""

    def choices(self, scope: Scope, since: int, fingerprint: str) -> tuple[int, list[Row]]:
        """Return (revision, rows) of the choices that came, or of which more is known, after a revision, in order."""

    def arm_of(self, scope: Scope, episode_id: str) -> str | None:
        """Return the name of the arm that an episode was given."""

    def task_of(self, scope: Scope, trace_id: str) -> str:
        """Return the task of a trace."""


class Router:
    """Chooses arms by each scope's policy."""

    def __init__(self, source: Source, settings: Settings, fingerprint: Callable[[], str]) -> None:
        """Start with nothing known; without arms in the settings every request goes the way it names."""
        self.arms = settings.parsed_arms
        self._terms = Terms(
            cost_price=settings.cost_price, latency_price=settings.second_price, exploration=settings.exploration,
            audition=settings.audition,
        )  # fmt: skip
        self._source = source
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._learners: OrderedDict[tuple[Scope, str], tuple[tuple[int, int], PolicyUpdater]] = OrderedDict()
        # Arms by episode: the log may not have them yet when the next request comes.
        self._given: OrderedDict[tuple[Scope, str], str] = OrderedDict()

    def by_default(self, turn: Turn, approaches: Collection[str] | None) -> Turn:
        """Return the turn with the first arm that can answer it, for a request that the policy is not asked about."""
        arm = next((arm for arm in self.arms if can_answer(arm, turn, approaches)), None)
        if arm is None:
            return turn.skip("no_arm_can_answer" if self.arms else "no_arms")
        return given(turn, arm)

    def routed(self, turn: Turn, vector: NDArray[Any] | None, salt: bytes, approaches: Collection[str] | None) -> Turn:
        """Return the turn with an arm: that of its episode, or one that the policy chooses.

        `approaches` are those that the host can run; None for all.
        """
        able = [arm for arm in self.arms if can_answer(arm, turn, approaches)]
        for arm in self.arms:
            if approaches is not None and arm.approach not in ("none", *approaches):
                turn = turn.skip("no_such_approach", arm=arm.name)
        if not able:
            return turn  # which says so already
        if turn.continues or turn.options.episode_id is not None:
            known = self._given.get((turn.scope, turn.episode_id))
            name = known or self._source.arm_of(turn.scope, turn.episode_id)
            if kept := next((arm for arm in able if arm.name == name), None):
                return given(turn, kept)
        learner = self._learner(turn.scope)
        situation = Situation(vector, length_of(turn.body))
        choice = learner.choose(
            turn.trace_id, situation, chance(turn.trace_id, salt), {arm.name for arm in able},
            recorded=turn.options.writes,
        )  # fmt: skip
        with self._lock:
            self._given[turn.scope, turn.episode_id] = choice.arm.name
            while len(self._given) > _EPISODES_KEPT:
                self._given.popitem(last=False)
        return replace(given(turn, choice.arm), choice=choice, length=situation.length)

    def believed(self, scope: Scope) -> dict[str, Any]:
        """Return the arms of a scope, what is believed of each, in all and by task cluster, and on what terms."""
        if not self.arms:
            return {"arms": [], "terms": asdict(self._terms), "choices": 0, "all": {}, "clusters": []}
        learner = self._learner(scope)
        policy, examples = learner.policy, learner.examples()
        return {
            "arms": [asdict(arm) for arm in self.arms],
            "default": self.arms[0].name,
            "terms": asdict(self._terms),
            "choices": policy.count,
            "budget_left": round(policy.budget, 4),
            "all": _rounded(policy.estimates()),
            "clusters": [
                {
                    "cluster": cluster,
                    "requests": policy.requests_of(cluster),
                    "example": self._source.task_of(scope, examples[cluster])[:_SHOWN],
                    "arms": _rounded(policy.estimates(cluster)),
                }
                for cluster in sorted(c for c in examples if c >= 0)
            ],
        }

    def _learner(self, scope: Scope) -> PolicyUpdater:
        key = (scope, self._fingerprint())  # of another encoder, vectors and so clusters are others
        origin = self._source.revision(scope).origin
        with self._lock:
            known, learner = self._learners.get(key) or (None, None)
            if learner is None or known != origin:  # revisions of another origin say nothing of this one's
                learner = PolicyUpdater(self.arms, self._terms)
                self._learners[key] = origin, learner
            self._learners.move_to_end(key)
            while len(self._learners) > _SCOPES_KEPT:
                self._learners.popitem(last=False)
        while not learner.busy:
            since = learner.since
            if learner.take(since, *self._source.choices(scope, since, key[1])):
                break
        return learner


def given(turn: Turn, arm: Arm) -> Turn:
    """Return the turn with an arm."""
    asked = str(turn.body.get("model") or "")
    return replace(turn, arm=arm.name, approach=arm.approach, model=arm.model_for(asked))


def can_answer(arm: Arm, turn: Turn, approaches: Collection[str] | None) -> bool:
    """Whether an arm can answer a request.

    All approaches but `none` are given words and give words: no tools, no images, no form of the response, one choice.
    """
    if arm.approach == "none":
        return True
    if approaches is not None and arm.approach not in approaches:
        return False
    body = turn.body
    messages = [m for m in turn.sent if isinstance(m, Mapping)]
    return not (
        body.get("tools")
        or body.get("functions")
        or body.get("response_format")
        or (body.get("n") or 1) != 1
        or any(m.get("role") in ("tool", "function") or m.get("tool_calls") for m in messages)
        or any(_is_mixed(m.get("content")) for m in messages)
    )


def chance(trace_id: str, salt: bytes) -> float:
    """Return a request's chance in [0, 1): a keyed hash, not to be guessed."""
    digest = hashlib.blake2b(trace_id.encode("utf-8", "replace"), key=salt, digest_size=8, person=b"policy").digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def length_of(body: Mapping[str, Any]) -> int:
    """Return the characters of a request's messages."""
    messages = body.get("messages")
    return (
        sum(_length(m.get("content")) for m in messages if isinstance(m, Mapping)) if isinstance(messages, list) else 0
    )


def summary(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what is believed in lines for people, by name."""
    if not found["arms"]:
        return {"arms": "none: set OPTILLM_AGENT_MEMORY_ARMS"}
    lines = {"choices": f"{found['choices']}, the default arm is {found['default']}"}
    lines |= {name: _line(arm) for name, arm in found["all"].items()}
    for cluster in found["clusters"]:
        name = f"cluster {cluster['cluster']}"
        lines[name] = f"{cluster['requests']} requests such as: {cluster['example'].splitlines()[0]}"
        lines |= {f"{name} {arm}": _line(value) for arm, value in cluster["arms"].items()}
    return lines


def _line(arm: Mapping[str, float]) -> str:
    return (
        f"utility {arm['utility']:.3f}  reward {arm['reward']:.3f} ± {arm['reward_sd']:.3f} of {arm['told']:.0f} told  "
        f"cost {arm['cost']:.3f}  {arm['latency']:.2f} s  best with probability {arm['best']:.2f}"
    )


def _length(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Sequence):
        return sum(len(str(part.get("text") or "")) for part in content if isinstance(part, Mapping))
    return 0


def _is_mixed(content: Any) -> bool:
    return isinstance(content, list) and any(not isinstance(p, Mapping) or p.get("type") != "text" for p in content)


def _rounded(beliefs: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 4) for key, value in found.items()} for name, found in beliefs.items()}
