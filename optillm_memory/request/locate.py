"""Locating: which episode a request belongs to, and what stands in that episode's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.episodes import Located, locate, merged
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.recent import RecentEpisodes
from optillm_memory.conversation.text import BLOCK_BEGIN, text_of
from optillm_memory.inject.advice import Advice
from optillm_memory.inject.place import still_anchored
from optillm_memory.inject.refusals import Refusals
from optillm_memory.records import Placement
from optillm_memory.request.turn import Turn
from optillm_memory.store.tables.episodes import EpisodeReads


class Locator:
    """Finds episodes and their insertions on disk, and among what this process has under way."""

    def __init__(self, source: EpisodeReads, clock: Callable[[], float]) -> None:
        """Start with nothing under way."""
        self._source = source
        self._clock = clock
        self._recent = RecentEpisodes()
        self._refusals = Refusals()

    def locate(self, turn: Turn) -> Turn:
        """Return the turn in its episode: named by the caller, else the one whose conversation this continues."""
        located = self._found(turn, turn.parsed)
        if located is not None:
            if located.continued:
                self._recent.take(turn.scope, located, self._clock())
            turn = replace(turn, episode_id=located.episode_id, located=located)
        if not any(BLOCK_BEGIN in text_of(message) for message in turn.parsed.messages):
            return turn
        # A client may send back what memory itself had put there.
        blocks = [p.payload for p in self._ledger(turn, turn.episode_id) if isinstance(p.payload, str)]
        return replace(turn, conversation=conversations.parse(turn.body, blocks)) if blocks else turn

    def settle(self, turn: Turn, prefixes: Sequence[str], *, answered: bool) -> None:
        """Note what became of a turn, and the prefixes with which its conversation goes on."""
        if answered:
            self._recent.remember(turn.scope, turn.episode_id, prefixes, turn.for_ledger, self._clock())
        if turn.located is not None and turn.located.continued:
            self._recent.settle(turn.scope, turn.located, answered=answered)

    def keep_advice(self, turn: Turn, advice: Sequence[Advice]) -> None:
        """Keep advice for the next request of an episode."""
        self._recent.advise(turn.scope, turn.episode_id, advice, self._clock())

    def pending_advice(self, turn: Turn) -> Sequence[Advice]:
        """Return, once, the advice that was kept for this request, less what may not be used since."""
        pending = self._recent.pending_advice(turn.scope, turn.episode_id, self._clock())
        gone = self._source.unusable(turn.scope, (item.memory_id for item in pending))
        return [item for item in pending if item.memory_id not in gone]

    def refused_forms(self, turn: Turn) -> frozenset[str]:
        """Return the forms of insertion that are not to be tried with this model, or in this episode."""
        return self._refusals.forms(turn.scope, turn.episode_id, turn.model, self._clock())

    def refuse(self, turn: Turn) -> Turn:
        """Return the turn as it goes out where the upstream refused it with memory and took it without.

        The forms of what was inserted are not tried with this model for a while, nor in this episode again.
        """
        forms = {p.form for p in turn.placements}
        self._refusals.note(turn.scope, turn.episode_id, turn.model, forms, self._clock())
        return turn.as_sent().skip("refused_with_memory", form=",".join(sorted(forms)))

    def standing(self, turn: Turn, refused: frozenset[str]) -> list[Placement]:
        """Return what earlier requests put into this conversation, where it still stands as it did.

        What was forgotten, quarantined, retired or withdrawn since is not inserted again.
        """
        if turn.located is None and turn.options.episode_id is None:
            return []
        inherits = turn.located.inherits if turn.located is not None else ""
        ledger = self._source.still_usable(turn.scope, self._ledger(turn, inherits or turn.episode_id))
        return [p for p in still_anchored(ledger, turn.parsed.prefixes) if p.form not in refused]

    def _found(self, turn: Turn, conversation: Conversation) -> Located | None:
        scope, named, now = turn.scope, turn.options.episode_id, self._clock()
        known = conversation.answered_prefixes()
        for continued, continuation in known:
            under_way = self._recent.episodes_of(scope, continued)
            candidates = merged(self._source.episodes_of(scope, continued), under_way)
            if named is not None:  # the caller's word holds; is the conversation so far that episode's?
                if any(c.episode_id == named for c in candidates):
                    return Located(named, "", continued, continuation)
            elif (located := locate(candidates, continued, continuation, now)) is not None:
                return located
        # An agent that shortens its conversation leaves no prefix as it was.
        if named is None and known and (steps := conversation.telling_steps()):
            candidate = self._source.episode_with_step(scope, steps)
            return locate([candidate] if candidate else [], "", "", now)
        return None

    def _ledger(self, turn: Turn, episode_id: str) -> Sequence[Placement]:
        """Return what stands in an episode's prompts; another process may have answered its last request."""
        scope = turn.scope
        return self._recent.ledger(scope, episode_id, lambda: self._source.ledger(scope, episode_id), self._clock())
