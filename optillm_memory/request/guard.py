"""The guard: an answer that is about to repeat an action known to fail is asked for once more, with advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optillm_memory.conversation.steps import calls_of
from optillm_memory.conversation.text import text_of
from optillm_memory.inject.advice import Advice, as_advice
from optillm_memory.inject.render import placement_at
from optillm_memory.request.advise import Adviser
from optillm_memory.request.locate import Locator
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings


class Guard:
    """Looks at answers before they go out."""

    def __init__(self, settings: Settings, adviser: Adviser, locator: Locator, salt: Callable[[], bytes]) -> None:
        """Join what the guard needs; `salt` gives the database's secret."""
        self._salt = salt
        self._settings = settings
        self._adviser = adviser
        self._locator = locator

    def check(self, turn: Turn, completion: Mapping[str, Any]) -> tuple[Turn, bool]:
        """Return the turn, and whether to ask again: then its messages hold the advice."""
        message = _only_message(completion)
        if self._settings.guard == "off" or turn.conversation is None or not turn.options.reads or message is None:
            return turn, False
        advice = self._adviser.on_answer(turn, message)
        if not advice:
            return turn, False
        if self._settings.guard == "advise" and not turn.held_out:
            self._locator.keep_advice(turn, advice)
            return turn, False
        return self._with_advice(turn, advice)

    def _with_advice(self, turn: Turn, advice: Sequence[Advice]) -> tuple[Turn, bool]:
        limits = turn.options.limits(self._settings.max_block_items, self._settings.token_budget)
        limits["token_budget"] -= sum(item.tokens for placement in turn.fresh for item in placement.items)
        fresh = placement_at(
            turn.parsed, len(turn.parsed.messages) - 1, as_advice(advice, **limits), turn.scope, self._salt()
        )
        standing = [p for p in turn.placements if p not in turn.fresh]
        if fresh is None:
            return turn.skip("over_budget", memory_id=advice[0].memory_id), False
        if turn.held_out:
            return replace(turn, action="holdout", withheld=(*turn.withheld, *fresh.items)), False
        if any(p.position == fresh.position and p.form == fresh.form for p in standing):
            return turn.skip("advised_already"), False  # the very same request again: a place is written to once
        return turn.placing(standing, *turn.fresh, fresh), True

    def accepts(self, turn: Turn, completion: Mapping[str, Any]) -> bool:
        """Whether the second answer is better than the first: it is not empty, and repeats no failure."""
        message = _only_message(completion) or {}
        if turn.conversation is None or not (calls_of(message, 0) or text_of(message)):
            return False
        return not self._adviser.on_answer(turn, message)


def _only_message(completion: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = completion.get("choices") or []
    return (choices[0].get("message") or {}) if len(choices) == 1 else None
