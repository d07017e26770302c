"""Advising: what memory knows of a failing action, when its error is seen and when it is about to be done again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from optillm_memory.conversation.actions import Action, action_of
from optillm_memory.conversation.observation import read
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.redact import storable
from optillm_memory.conversation.steps import TEXT_TOOL, calls_of, command_in
from optillm_memory.conversation.text import text_of
from optillm_memory.decide.guard import known_to_fail
from optillm_memory.inject.advice import Advice
from optillm_memory.learn.attempts import environment_of, message_of
from optillm_memory.learn.suggest import Example, FixBook, Suggestion
from optillm_memory.records import KnownFix, PastAttempt, Scope, Step
from optillm_memory.settings import Settings
from optillm_memory.turn import Turn

_BOOKS_KEPT = 64
_DAY_S = 86_400.0


class Source(Protocol):
    """What advice is made from; every call is bound to one scope."""

    def revision(self) -> tuple[int, int]:
        """Return what changes whenever any memory does."""

    def known_fixes(
        self, scope: Scope, tool: str, signature: str, *, environment: str, episode_id: str, limit: int = 200
    ) -> list[KnownFix]:
        """Return the fixes of a tool's failures that may be suggested."""

    def past_attempts(self, scope: Scope, action_key: str, *, environment: str, limit: int = 50) -> list[PastAttempt]:
        """Return the earlier tries of an action."""


class Adviser:
    """Suggests fixes in one scope at a time; keeps the books of recently asked tools."""

    def __init__(self, source: Source, settings: Settings, clock: Callable[[], float]) -> None:
        """Read from a source; build a book of fixes when it is first asked."""
        self._source = source
        self._settings = settings
        self._clock = clock
        self._books: OrderedDict[tuple[Any, ...], tuple[FixBook, list[KnownFix]]] = OrderedDict()
        self._lock = threading.Lock()

    def on_results(self, turn: Turn, conversation: Conversation) -> list[Advice]:
        """Return advice on the actions whose results came with this request and show a failure."""
        found = []
        for step in conversation.observed:
            reading = read(step.observation or "", tool=step.tool, arguments=step.arguments)
            if reading.verdict != "failure":
                continue
            action = self._action(step.tool, step.arguments)
            signature = reading.signature.key if reading.signature else ""
            error = message_of(reading, step.observation or "")
            fixes = self._suggested(turn, action, step.observation or "", signature)
            past = self._source.past_attempts(turn.scope, action.key, environment=environment_of(turn.options.tags))
            tried = {self._action(s.tool, s.arguments).key for s in conversation.steps}
            count = 1 + sum(p.verdict == "failure" and p.step_id != step.step_id for p in past)
            for fix, text, confidence in fixes:
                # What this conversation has tried already is no news to it.
                if fix.relation == "note" or Action(action.tool, action.field, text).key not in tried:
                    found.append(_advice(action, count, error, fix, text, confidence))
                    break
        return found

    def on_answer(self, turn: Turn, conversation: Conversation, message: Mapping[str, Any]) -> list[Advice]:
        """Return advice on the actions of an answer that are known to fail; empty where there are none."""
        found = []
        for tool, arguments in actions_in(message, conversation):
            action = self._action(tool, arguments)
            failures = self.failures_of(turn, action, conversation.steps)
            if not failures:
                continue
            latest = failures[0]
            fixes = self._suggested(turn, action, latest.output, latest.signature)
            fix, text, confidence = fixes[0] if fixes else (None, "", 0.0)
            found.append(_advice(action, len(failures), latest.message, fix, text, confidence))
        return found

    def failures_of(self, turn: Turn, action: Action, here: Sequence[Step]) -> list[PastAttempt]:
        """Return the failures that speak against an action now."""
        past = self._source.past_attempts(turn.scope, action.key, environment=environment_of(turn.options.tags))
        expiry_s = self._settings.guard_expiry_days * _DAY_S
        return known_to_fail(past, here, episode_id=turn.episode_id, now=self._clock(), expiry_s=expiry_s)

    def _action(self, tool: str, arguments: str) -> Action:
        # As it is stored, for that is what it is compared with.
        limit, secrets = self._settings.max_text, self._settings.redact
        return action_of(storable(tool, limit, secrets=secrets), storable(arguments, limit, secrets=secrets))

    def _suggested(self, turn: Turn, action: Action, output: str, signature: str) -> list[tuple[KnownFix, str, float]]:
        """Return (fix that it rests on, corrected action, confidence), best first."""
        book, fixes = self._book(turn, action.tool, signature)
        same = [f for f in fixes if f.relation == "note" and f.signature == signature and signature]
        noted = [(f, f.text, f.value) for f in same if Action(f.tool, f.field, f.action).key == action.key]
        suggestion: Suggestion | None = None
        examples = [f for f in fixes if f.relation != "note"]
        if examples:
            suggestion = book.suggest(action.text, output, min_confidence=self._settings.fix_confidence)
        if suggestion is None:
            return noted[:1]
        rests_on = examples[suggestion.support[0]]
        if rests_on.field != action.field:
            return noted[:1]
        return [(rests_on, suggestion.action, suggestion.confidence), *noted[:1]]

    def _book(self, turn: Turn, tool: str, signature: str) -> tuple[FixBook, list[KnownFix]]:
        environment = environment_of(turn.options.tags)
        key = (turn.scope, tool, environment, turn.episode_id, self._source.revision())
        with self._lock:
            if (kept := self._books.get(key)) is not None:
                self._books.move_to_end(key)
                return kept
        fixes = self._source.known_fixes(
            turn.scope, tool, signature, environment=environment, episode_id=turn.episode_id
        )
        book = FixBook([Example(f.action, f.output, f.text, f.value) for f in fixes if f.relation != "note"])
        with self._lock:
            self._books[key] = book, fixes
            while len(self._books) > _BOOKS_KEPT:
                self._books.popitem(last=False)
        return book, fixes


def actions_in(message: Mapping[str, Any], conversation: Conversation) -> list[tuple[str, str]]:
    """Return (tool, arguments) of what an answer asks for: its calls, or the command in its text if that is the way."""
    calls = [(tool, arguments) for _, tool, arguments in calls_of(message, 0)]
    if calls or not any(s.tool == TEXT_TOOL and s.call_id.startswith("text-") for s in conversation.steps):
        return calls
    command = command_in(text_of(message))
    return [(TEXT_TOOL, command)] if command else []


def _advice(action: Action, count: int, error: str, fix: KnownFix | None, text: str, confidence: float) -> Advice:
    if fix is None:
        digest = hashlib.blake2b(action.key.encode("utf-8", "replace"), digest_size=12).hexdigest()
        return Advice(f"failure-{digest}", action.tool, action.field, action.text, count, error)
    return Advice(
        fix.memory_id, action.tool, action.field, action.text, count, error, text, fix.relation,
        fix.status == "verified", confidence,
    )  # fmt: skip
