"""What a suggestion says that its reader could not know: no values of other people's episodes may be among it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optillm_memory.conversation.actions import Action, normal_action
from optillm_memory.conversation.text import text_of
from optillm_memory.learn.intents import LONGEST_FIX, is_document, same_intent

_TOKEN = re.compile(r"[^\s'\"`()\[\]{}<>|;&,=]+")
_PART = re.compile(r"\w+")
_SEGMENT = re.compile(r"(?:^|[;&|])\s*(?:sudo\s+)?([^\s;&|]+)(?:\s+(-\S+\s+)*([a-z][a-z-]{1,20})(?=\s|$))?")
_PLAIN = re.compile(r"-{1,2}[A-Za-z][\w-]{0,40}|[A-Z]{2,20}|\W+|\w{1,2}|\d{1,3}(?:\.\d{1,2})?")
_WHOLE = re.compile(r"[/@:]|\d{3}")
_PROGRAM = re.compile(r"[a-z][a-z0-9_+-]{0,30}")


class News:
    """A failing action in its conversation; tells whether a suggested text may be shown there.

    Its words come from the failing action, its output or the conversation, are plain vocabulary (programs, options,
    keywords), or constants, which stand in the actions of several tasks.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        action: Action,
        output: str,
        constants: Callable[[Sequence[str]], bool],
    ) -> None:
        """`constants` tells whether words are constants."""
        self._messages = messages
        self._action = action
        self._output = output
        self._constants = constants
        self._text: str | None = None

    def is_fit(self, text: str, *, first_against: str | None = None, same_goal: bool = False) -> bool:
        """Whether a text is an edit of the failing action, or small, and says nothing of other episodes.

        `first_against`: the output that a text was mined from where it was done first. What it names there is a value
        of that episode, however often it came. What served the same goal, word for word, may be told with its values.
        """
        made = Action(self._action.tool, self._action.field, text)
        if len(text) > LONGEST_FIX or is_document(made) or normal_action(text) == normal_action(self._action.text):
            return False
        if first_against is None and not same_intent(self._action, made, self._output):
            return False
        foreign = self.foreign(text)
        if not foreign or same_goal:
            return True
        return not any(word in (first_against or "") for word in foreign) and self._constants(foreign)

    def foreign(self, text: str) -> list[str]:
        """Return the words of a text that are neither of this conversation nor plain vocabulary."""
        segments = _SEGMENT.findall(text)
        programs = {program for program, _, _ in segments}
        verbs = {verb for program, _, verb in segments if _PROGRAM.fullmatch(program)}  # `install` of `pip install x`
        near = f"{self._action.text}\n{self._output}"
        found: dict[str, None] = {}
        for token in _TOKEN.findall(text):
            if token in near or token in verbs or _PLAIN.fullmatch(token):
                continue
            if token in programs and _PROGRAM.fullmatch(token):
                continue
            if token in self._here():
                continue
            unknown = [p for p in _PART.findall(token) if not self._is_known(p, near)]
            if token in programs or (unknown and _WHOLE.search(token)):
                found[token] = None  # a path or an address is a value as a whole
            else:
                found.update(dict.fromkeys(unknown))
        return list(found)

    def _is_known(self, part: str, near: str) -> bool:
        return part in near or _PLAIN.fullmatch(part) is not None or part in self._here()

    def _here(self) -> str:
        if self._text is None:
            calls = (str(m.get("tool_calls") or "") for m in self._messages)
            self._text = "\n".join((*map(text_of, self._messages), *calls))
        return self._text
