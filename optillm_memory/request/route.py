"""Routing: which arm answers a request of approach `auto`, and what is known of the arms."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.threads import start_thread
from optillm_memory.conversation.parse import key_of
from optillm_memory.decide.policy import Situation, Terms
from optillm_memory.decide.policy_updater import PolicyUpdater
from optillm_memory.records import Arm, Scope
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings
from optillm_memory.store.tables.decisions import DecisionReads

_SCOPES_KEPT = 64
_EPISODES_KEPT = 10_000
_SHOWN = 160  # characters of an example task


class Router:
    """Chooses arms by each scope's policy."""

    def __init__(
        self, source: DecisionReads, settings: Settings, encoder: EncoderService, salt: Callable[[], bytes]
    ) -> None:
        """Start with nothing known; without arms in the settings every request goes the way it names."""
        self.arms = settings.parsed_arms
        self._terms = Terms(
            cost_price=settings.cost_price, latency_price=settings.second_price,
            exploration_budget=settings.exploration_budget, warmup_share=settings.warmup_share,
        )  # fmt: skip
        self._source = source
        self._encoder = encoder
        self._salt = salt
        self._lock = threading.Lock()
        self._updaters: OrderedDict[tuple[Scope, str], tuple[tuple[int, int], PolicyUpdater]] = OrderedDict()
        # The log may not have them yet when the episode's next request comes.
        self._arm_of_episode: OrderedDict[tuple[Scope, str], str] = OrderedDict()

    def with_default_arm(self, turn: Turn, approaches: Collection[str] | None) -> Turn:
        """Return the turn with the first arm that can answer it, for a request that the policy is not asked about."""
        arm = next((arm for arm in self.arms if can_answer(arm, turn, approaches)), None)
        if arm is None:
            return turn.skip("no_arm_can_answer" if self.arms else "no_arms")
        return _with_arm(turn, arm)

    def route(self, turn: Turn, approaches: Collection[str] | None) -> Turn:
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
            with self._lock:
                known = self._arm_of_episode.get((turn.scope, turn.episode_id))
            name = known or self._source.arm_of(turn.scope, turn.episode_id)
            if kept := next((arm for arm in able if arm.name == name), None):
                return _with_arm(turn, kept)
        key = key_of(turn.parsed.task) if turn.parsed.task.strip() else ""
        vector = self._encoder.ask(key, turn.encoder_limit_s, owner=turn.scope.tenant).vector()
        situation = Situation(vector, length_of(turn.body))
        choice = self._updater(turn.scope).choose(
            turn.trace_id, situation, chance(turn.trace_id, self._salt()), {arm.name for arm in able},
            recorded=turn.options.writes,
        )  # fmt: skip
        with self._lock:
            self._arm_of_episode[turn.scope, turn.episode_id] = choice.arm.name
            while len(self._arm_of_episode) > _EPISODES_KEPT:
                self._arm_of_episode.popitem(last=False)
        return replace(_with_arm(turn, choice.arm), choice=choice, length=situation.length)

    def report(self, scope: Scope) -> dict[str, Any]:
        """Return the arms of a scope, what is known of each, in all and by task cluster, and on what terms."""
        if not self.arms:
            return {"arms": [], "terms": asdict(self._terms), "choices": 0, "all": {}, "clusters": []}
        figures, examples = self._updater(scope).report()
        for cluster in figures["clusters"]:
            cluster["example"] = self._source.task_of(scope, examples[cluster["cluster"]])[:_SHOWN]
        return {
            "arms": [asdict(arm) for arm in self.arms],
            "default": self.arms[0].name,
            "terms": asdict(self._terms),
            **figures,
        }

    def _updater(self, scope: Scope) -> PolicyUpdater:
        """Return a scope's policy, up to date with the choices that are on disk."""
        key = (scope, self._encoder.fingerprint)  # of another encoder, vectors and so clusters are others
        origin = self._source.revision(scope).origin
        with self._lock:
            known, updater = self._updaters.get(key) or (None, None)
            if updater is None or known != origin:  # revisions of another origin say nothing of this one's
                updater = PolicyUpdater(self.arms, self._terms, start_thread)
                self._updaters[key] = origin, updater
            self._updaters.move_to_end(key)
            while len(self._updaters) > _SCOPES_KEPT:
                self._updaters.popitem(last=False)
        while not updater.busy:
            since = updater.since
            if updater.take(since, *self._source.choices(scope, since, key[1])):
                break
        return updater


def _with_arm(turn: Turn, arm: Arm) -> Turn:
    asked = str(turn.body.get("model") or "")
    return replace(turn, arm=arm.name, approach=arm.approach, model=arm.model_for(asked))


def can_answer(arm: Arm, turn: Turn, approaches: Collection[str] | None) -> bool:
    """Whether an arm can answer a request.

    All approaches but `none` take and return words alone: no tools, images or response format, and one choice.
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
    """Return a request's random number in [0, 1): a keyed hash, not to be guessed."""
    digest = hashlib.blake2b(trace_id.encode("utf-8", "replace"), key=salt, digest_size=8, person=b"policy").digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def length_of(body: Mapping[str, Any]) -> int:
    """Return the characters of a request's messages."""
    messages = body.get("messages")
    return (
        sum(_length(m.get("content")) for m in messages if isinstance(m, Mapping)) if isinstance(messages, list) else 0
    )


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """Return a report in lines for people, by name."""
    if not report["arms"]:
        return {"arms": "none: set OPTILLM_AGENT_MEMORY_ARMS"}
    lines = {"choices": f"{report['choices']}, the default arm is {report['default']}"}
    lines |= {name: _line(arm) for name, arm in report["all"].items()}
    for cluster in report["clusters"]:
        name = f"cluster {cluster['cluster']}"
        lines[name] = f"{cluster['requests']} requests such as: {cluster['example'].splitlines()[0]}"
        lines |= {f"{name} {arm}": _line(value) for arm, value in cluster["arms"].items()}
    return lines


def _line(arm: Mapping[str, float]) -> str:
    return (
        f"utility {arm['utility']:.3f}  reward {arm['reward']:.3f} ± {arm['reward_sd']:.3f} over {arm['rewards']:.0f} "
        f"rewards  cost {arm['cost']:.3f}  {arm['latency']:.2f} s  best with probability {arm['best']:.2f}"
    )


def _length(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Sequence):
        return sum(len(str(part.get("text") or "")) for part in content if isinstance(part, Mapping))
    return 0


def _is_mixed(content: Any) -> bool:
    return isinstance(content, list) and any(not isinstance(p, Mapping) or p.get("type") != "text" for p in content)
