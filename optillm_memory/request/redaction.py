"""What of a request may be stored: its texts and its names, without secrets, the same wherever they are looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from optillm_memory.conversation.options import Options
from optillm_memory.conversation.redact import digest_of, redact, storable
from optillm_memory.records import NARROWING, Feedback, Level, Scope, View
from optillm_memory.settings import Settings
from optillm_memory.store.maintenance.selection import Selection

_REMEMBERED = 4_096  # names, and short texts: an agent repeats its steps with every request
_NAMED = ("trace_id", "episode_id", "memory_id", *NARROWING)  # of a selection
_SHORT = 2_000  # characters


class Redactor:
    """Redacts what is stored, at the level that is set.

    A name (of a namespace, a user, an episode, a tag …) that holds a secret becomes a digest keyed with the database's
    salt: equal names stay equal, and nobody can confirm a guess without the database.
    """

    def __init__(self, settings: Settings, salt: Callable[[], bytes]) -> None:
        """Take the level and the longest text from the settings; `salt` is asked for when a name holds a secret."""
        self._level: Level = settings.level
        self._limit = settings.max_text
        self._salt = salt
        self._short = lru_cache(maxsize=_REMEMBERED)(self._storable)
        self._named = lru_cache(maxsize=_REMEMBERED)(self._name)

    def text(self, text: str) -> str:
        """Return a text as it may be stored."""
        return self._short(text) if len(text) <= _SHORT else self._storable(text)

    def name(self, name: str) -> str:
        """Return a name as it may be stored."""
        return self._named(name)

    def tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Return tags as they may be stored; the name of a tag may tell that its value is a secret."""
        named = {}
        for tag, value in tags.items():
            line = f"{tag}={value}"
            secret = redact(line, self._level) != line and redact(tag, self._level) == tag
            named[self.name(tag)] = digest_of(value, self._salt()) if secret else self.name(value)
        return named

    def scope(self, scope: Scope) -> Scope:
        """Return a scope as it is stored."""
        return replace(scope, **{part: self.name(getattr(scope, part)) for part in NARROWING})

    def view(self, view: View) -> View:
        """Return what a call may see by the names under which it is stored."""
        named = {part: self.name(value) for part in NARROWING if (value := getattr(view, part))}
        return replace(view, **named)

    def options(self, options: Options) -> Options:
        """Return a caller's options with the names by which what they name is stored."""
        return replace(
            options,
            namespace=self.name(options.namespace),
            user_id=self.name(options.user_id),
            agent_id=self.name(options.agent_id),
            episode_id=None if options.episode_id is None else self.name(options.episode_id),
            end_user=self.name(options.end_user),
            tags=self.tags(options.tags),
        )

    def selection(self, selection: Selection) -> Selection:
        """Return what is to be forgotten by the names under which it is stored."""
        named: dict[str, Any] = {part: self.name(value) for part in _NAMED if (value := getattr(selection, part))}
        return replace(selection, **named)

    def feedback(self, feedback: Feedback) -> Feedback:
        """Return feedback as it may be stored."""
        evidence = feedback.evidence and {
            k: self.text(v) if isinstance(v, str) else v for k, v in feedback.evidence.items()
        }
        return replace(
            feedback,
            feedback_id=self.name(feedback.feedback_id),
            trace_id=None if feedback.trace_id is None else self.name(feedback.trace_id),
            episode_id=None if feedback.episode_id is None else self.name(feedback.episode_id),
            value=self.text(feedback.value) if isinstance(feedback.value, str) else feedback.value,
            evidence=evidence,
        )

    def _name(self, name: str) -> str:
        return name if redact(name, self._level) == name else digest_of(name, self._salt())

    def _storable(self, text: str) -> str:
        return storable(text, self._limit, self._level)
