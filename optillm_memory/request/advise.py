"""Advising: what memory knows of a failing action, when its error is seen and when it is about to be done again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optillm_memory.background.threads import start_thread
from optillm_memory.conversation.actions import Action, action_of, normal_action
from optillm_memory.conversation.observation import Reading, Result, nearby, read
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.redact import is_whole
from optillm_memory.conversation.signature import signature_of
from optillm_memory.conversation.steps import TEXT_TOOL, calls_of, command_in, is_observation
from optillm_memory.conversation.text import text_of
from optillm_memory.conversation.wrapping import unwrap
from optillm_memory.decide.guard import known_to_fail, of_same_form, same_but_for_names
from optillm_memory.inject.advice import FAILURE, Advice
from optillm_memory.learn.attempts import environment_of, message_of
from optillm_memory.learn.dialect import LANGUAGE, form_of
from optillm_memory.learn.suggest import Example
from optillm_memory.learn.suggester import Suggester
from optillm_memory.records import KnownFix, PastAttempt, Placement, Step
from optillm_memory.request.news import News
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings
from optillm_memory.store.tables.fixes import FixReads

_NAME = re.compile(r"\w{2,}")
_PROVEN = 0.5  # from this value on a fix of this very action is advised whatever others suggest
_MOST_CALLS = 16  # of one answer that are looked at; a block holds a few items
_STEPS_BACK = 200  # in which an action counts as tried in this conversation
_DAY_S = 86_400.0


class Adviser:
    """Suggests fixes, in one scope at a time."""

    def __init__(
        self, source: FixReads, settings: Settings, stored: Callable[[str], str], clock: Callable[[], float]
    ) -> None:
        """Read from a source; what fixes teach is worked out when it is first asked for.

        `stored` gives a text as it is stored: with that it is compared, and that is what is told.
        """
        self._stored = stored
        self._source = source
        self._settings = settings
        self._clock = clock
        self._suggester = Suggester(start_thread)

    def on_results(
        self, turn: Turn, pending: Sequence[Advice] = (), standing: Sequence[Placement] = ()
    ) -> list[Advice]:
        """Return advice on the actions whose results came with this request and show a failure.

        `pending` is advice on the actions that were asked for; those that the results have settled are left out.
        What stands in the conversation already (`standing`) is not said again.
        """
        found = []
        advised = {(i.memory_id, normal_action(i.suggestion or "")) for p in standing for i in p.items}
        settled = set()
        tried = self._tried(turn)
        for step in turn.parsed.observed[:_MOST_CALLS]:
            observation = self._stored(step.observation or "")
            reading = self._read(turn, step, observation)
            action = self._action(step.tool, step.arguments)
            # A code that nothing proves to be the harness's keeps from advice, and is evidence of nothing else.
            if reading.verdict == "success" or (
                reading.verdict == "unknown" and unwrap(step.observation or "").exit_code == 0
            ):
                settled.add(_words(action, action.text))
            if reading.verdict != "failure":
                continue
            signature = reading.signature.key if reading.signature else ""
            error = message_of(reading, observation)
            fixes = self._suggested(turn, action, observation, signature)
            past = self._source.past_attempts(turn.scope, action.key, environment=environment_of(turn.options.tags))
            count = 1 + sum(p.verdict == "failure" and p.step_id != step.step_id for p in past)
            for fix, text, confidence in fixes:
                # What this conversation has tried or was told already is no news to it.
                if (fix.memory_id, normal_action(text)) in advised:
                    break
                if fix.relation == "note" or _words(action, text) not in tried:
                    found.append(_advice(action, count, error, fix, text, confidence))
                    settled.add(_words(action, action.text))
                    break
        return [*(a for a in pending if (a.tool, a.field, normal_action(a.action).rstrip("; ")) not in settled), *found]

    def on_answer(self, turn: Turn, message: Mapping[str, Any]) -> list[Advice]:
        """Return advice on the actions of an answer that are known to fail; empty where there are none."""
        found = []
        tried = self._tried(turn)
        for tool, arguments in actions_in(message, turn.parsed)[:_MOST_CALLS]:
            action = self._action(tool, arguments)
            failures = self._failures(turn, action)
            if not failures:
                found += self._alike(turn, action, tried)
                continue
            latest = failures[0]
            fixes = self._suggested(turn, action, latest.output, latest.signature)
            if any(fix.relation == "first" and _words(action, text) in tried for fix, text, _ in fixes):
                continue  # what was missing has been done
            known = {_words(action, action.text), *tried}
            news = [f for f in fixes if f[0].relation == "note" or _words(action, f[1]) not in known]
            fix, text, confidence = news[0] if news else (None, "", 0.0)
            found.append(_advice(action, len(failures), latest.message, fix, text, confidence))
        return found

    def _alike(self, turn: Turn, action: Action, tried: set[tuple[str, str, str]]) -> list[Advice]:
        """Return advice where an action with other names failed for a reason that has nothing to do with its names.

        None where an action of this form has worked, or the error speaks of a name: then it may well work with others.
        """
        words = action.text.split()
        if not words or _words(action, action.text) in tried:
            return []
        for fix in self._fixes(turn, action.tool, "", start=words[0]):
            places = same_but_for_names(action.text, fix.action) if fix.field == action.field else None
            if places is None or fix.relation == "note":
                continue
            error = message_of(Reading("failure", signature=signature_of(fix.output)), fix.output)
            names = [fix.action.split()[place] for place in places]
            if not error or any(part in error for name in names for part in _NAME.findall(name)):
                continue
            worked = self._source.worked(turn.scope, action.key, environment=environment_of(turn.options.tags))
            if any(of_same_form(action.text, text, places) for text in worked):
                return []
            suggested = self._suggested(turn, action, fix.output, fix.signature)
            fresh = [s for s in suggested if _words(action, s[1]) not in tried]
            return [_advice(action, 1, error, *fresh[0])] if fresh else []
        return []

    def _read(self, turn: Turn, step: Step, observation: str) -> Reading:
        """Read a result, also in what its tool's dialect is known to be."""
        same = [s for s in turn.parsed.steps if s.tool == step.tool and s.observation is not None]
        results = [Result(s.arguments, s.observation or "") for s in same]
        others = nearby(results, same.index(step), step.tool)
        reading = read(observation, others, tool=step.tool, arguments=step.arguments)
        if reading.verdict != "unknown" or (form := form_of(observation)) is None:
            return reading
        learned = form.key in self._source.dialect(turn.scope, self._stored(step.tool))
        return Reading("failure", basis=LANGUAGE, signature=form) if learned else reading

    def _failures(self, turn: Turn, action: Action) -> list[PastAttempt]:
        """Return the failures that speak against an action now."""
        past = self._source.past_attempts(turn.scope, action.key, environment=environment_of(turn.options.tags))
        expiry_s = self._settings.guard_expiry_days * _DAY_S
        return known_to_fail(past, turn.parsed.steps, episode_id=turn.episode_id, now=self._clock(), expiry_s=expiry_s)

    def _tried(self, turn: Turn) -> set[tuple[str, str, str]]:
        actions = [self._action(s.tool, s.arguments) for s in turn.parsed.steps[-_STEPS_BACK:]]
        return {_words(action, action.text) for action in actions}

    def _action(self, tool: str, arguments: str) -> Action:
        # As it is stored, for that is what it is compared with.
        return action_of(self._stored(tool), self._stored(arguments))

    def _fixes(
        self, turn: Turn, tool: str, signature: str, *, start: str = "", action: str = "", output: str = ""
    ) -> list[KnownFix]:
        return self._source.known_fixes(
            turn.scope, tool, signature, environment=environment_of(turn.options.tags), episode_id=turn.episode_id,
            start=start, action=action, output=output,
        )  # fmt: skip

    def _suggested(self, turn: Turn, action: Action, output: str, signature: str) -> list[tuple[KnownFix, str, float]]:
        """Return (fix that it rests on, corrected action, confidence), best first."""
        fixes = self._fixes(turn, action.tool, signature, action=action.text, output=output)
        same = [f for f in fixes if f.relation == "note" and f.signature == signature and signature]
        own = _words(action, action.text)
        noted = [(f, f.text, f.value) for f in same if _words(Action(f.tool, f.field, ""), f.action) == own]
        proven = [
            f
            for f in fixes
            if f.relation != "note"
            and f.signature == signature
            and _words(Action(f.tool, f.field, ""), f.action) == own
        ]
        news = News(turn.parsed.messages, action, output, lambda words: self._constants(turn, action.tool, words))
        for best in sorted(proven, key=lambda f: -f.value):
            # This very action: what worked, word for word.
            if best.value < _PROVEN:
                break
            if self._is_fit(turn, news, best, best.text):
                return [(best, best.text, best.value), *noted[:1]]
        usable = [f for f in fixes if f.relation != "note" and f.field == action.field]
        # A value that moves a little makes no other example.
        examples = {Example(f.action, f.output, f.text, max(round(f.value, 1), 0.1)): f for f in usable}
        found = self._suggester.suggest(
            (turn.scope, action.tool),
            list(examples),
            action.text,
            output,
            min_confidence=self._settings.fix_confidence,
        )
        if found is None:
            return noted[:1]
        suggestion, known = found
        rests_on = next((examples[known[e]] for e in suggestion.support if known[e] in examples), None)
        # What was done first helps against the same error only.
        if rests_on is None or (rests_on.relation == "first" and rests_on.signature != signature):
            return noted[:1]
        if not self._is_fit(turn, news, rests_on, suggestion.action):
            return noted[:1]
        return [(rests_on, suggestion.action, suggestion.confidence), *noted[:1]]

    def _is_fit(self, turn: Turn, news: News, fix: KnownFix, text: str) -> bool:
        against = fix.output if fix.relation == "first" else None
        return is_whole(text) and news.is_fit(text, first_against=against, same_goal=self._serves(turn, fix))

    def _serves(self, turn: Turn, fix: KnownFix) -> bool:
        """Whether a fix is known from an episode with the very goal of this one, which is all that the user said."""
        messages = turn.parsed.messages
        said = sum(m.get("role") == "user" and not is_observation(messages, i) for i, m in enumerate(messages))
        goal = self._stored(turn.parsed.task)
        return said == 1 and self._source.served(turn.scope, fix.memory_id, goal)

    def _constants(self, turn: Turn, tool: str, words: Sequence[str]) -> bool:
        return all(self._source.is_constant(turn.scope, tool, word) for word in words)


def actions_in(message: Mapping[str, Any], conversation: Conversation) -> list[tuple[str, str]]:
    """Return (tool, arguments) of what an answer asks for: its calls, or the command in its text if that is the way."""
    calls = [(tool, arguments) for _, tool, arguments in calls_of(message, 0)]
    if calls or not any(s.tool == TEXT_TOOL and s.call_id.startswith("text-") for s in conversation.steps):
        return calls
    command = command_in(text_of(message))
    return [(TEXT_TOOL, command)] if command else []


def _words(action: Action, text: str) -> tuple[str, str, str]:
    # Another folder or limit does not make a suggestion new.
    return action.tool, action.field, normal_action(text).rstrip("; ")


def _advice(action: Action, count: int, error: str, fix: KnownFix | None, text: str, confidence: float) -> Advice:
    if fix is None:
        digest = hashlib.blake2b(action.key.encode("utf-8", "replace"), digest_size=12).hexdigest()
        return Advice(f"{FAILURE}{digest}", action.tool, action.field, action.text, count, error)
    return Advice(
        fix.memory_id, action.tool, action.field, action.text, count, error, text, fix.relation,
        fix.status == "verified", confidence,
    )  # fmt: skip
