"""Deciding: what a request gets of memory (an answer, insertions, nothing if held out), and which arm answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.episodes import root_of
from optillm_memory.conversation.goal import goal_of
from optillm_memory.conversation.options import AUTO
from optillm_memory.decide.holdout import assign
from optillm_memory.inject.advice import as_advice
from optillm_memory.inject.procedure import as_procedure, shortened
from optillm_memory.inject.refusals import FORMS
from optillm_memory.inject.render import Rendering, placement_at, render_fitting
from optillm_memory.learn.conflicts import without_superseded
from optillm_memory.recall.retriever import OTHER_FRAME, Retriever
from optillm_memory.records import Hit, Placement
from optillm_memory.request.actions import ActionDecider
from optillm_memory.request.advise import Adviser
from optillm_memory.request.locate import Locator
from optillm_memory.request.procedures import ProcedureAdviser
from optillm_memory.request.reuse import ReuseDecider
from optillm_memory.request.route import Router
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings
from optillm_memory.store.tables.memories import RecallReads


class Decider:
    """Takes a request through all that is decided before it goes upstream."""

    def __init__(
        self,
        source: RecallReads,
        settings: Settings,
        encoder: EncoderService,
        salt: Callable[[], bytes],
        changed: Callable[[], str],
        retriever: Retriever,
        locator: Locator,
        adviser: Adviser,
        reuse: ReuseDecider,
        router: Router,
        procedures: ProcedureAdviser,
        actions: ActionDecider,
    ) -> None:
        """Join what decides; `salt` gives the database's secret for the holdout.

        `changed` says what shows that the database was changed from outside: then nothing of it is used.
        """
        self._source = source
        self._settings = settings
        self._encoder = encoder
        self._retriever = retriever
        self._salt = salt
        self._changed = changed
        self._locator = locator
        self._adviser = adviser
        self._reuse = reuse
        self._router = router
        self._procedures = procedures
        self._actions = actions

    def decide(self, turn: Turn, *, size: int, text_only: bool, approaches: Collection[str] | None) -> Turn:
        """Return the turn as it is to go upstream, or with the answer that is reused."""
        started = time.perf_counter()
        if turn.options.mode == "off":
            return turn.skip("mode_off")
        auto = turn.options.approach == AUTO
        if auto:
            turn = self._router.with_default_arm(turn, approaches)
        if size > self._settings.max_request_bytes:
            return turn.skip("too_large")
        turn = self._locator.locate(replace(turn, conversation=conversations.parse(turn.body)))
        if not turn.options.reads:
            return turn.skip("mode_write")
        if self._changed():
            return turn.skip("seal_broken")
        turn = self._with_memory(turn, text_only=text_only)
        if auto and turn.action != "reuse":
            turn = self._router.route(turn, approaches)
        return replace(turn, recall_ms=(time.perf_counter() - started) * 1000)

    def _with_memory(self, turn: Turn, *, text_only: bool) -> Turn:
        assignment = assign(root_of(turn.episode_id), self._salt(), self._settings.holdout)
        turn = replace(turn, held_out=assignment.held_out, propensity=assignment.propensity)
        turn = self._reused(turn)
        if turn.action == "reuse":
            return turn
        refused = self._locator.refused_forms(turn)
        standing = [] if assignment.held_out or text_only else self._locator.standing(turn, refused)
        position = len(turn.parsed.messages) - 1
        rendering = None
        if not standing or standing[-1].position != position:  # the very same request gets what it got before
            turn, rendering = self._rendered(turn, standing, refused | {"turns"} if text_only else refused)
        for memory_id in rendering.over_budget if rendering is not None else ():
            turn = turn.skip("over_budget", memory_id=memory_id)
        if assignment.held_out:
            withheld = rendering.injected if rendering is not None else ()
            return replace(turn, action="holdout", withheld=withheld) if withheld else turn
        fresh = (
            placement_at(turn.parsed, position, rendering, turn.scope, self._salt()) if rendering is not None else None
        )
        return turn.placing(standing, fresh)

    def _rendered(
        self, turn: Turn, standing: Sequence[Placement], refused: frozenset[str]
    ) -> tuple[Turn, Rendering | None]:
        """Return what memory has to say to the last message, in a form that was not refused, or why it says nothing."""
        conversation = turn.parsed
        if not conversation.ends_with_observation and not (conversation.ends_with_user and conversation.task.strip()):
            return turn.skip("no_new_user_message"), None
        if refused >= FORMS or ("block" in refused and conversation.ends_with_observation):
            return turn.skip("refused_before"), None
        rendering = None
        if conversation.ends_with_observation:
            rendering = self._advice(turn, standing)
        elif conversation.is_first_turn:  # a user's turn in the middle of a dialogue is not a task
            turn, hits = self._hits(turn, standing)
            if hits and (rendering := self._exemplars(turn, hits, refused)) is None:
                return turn.skip("refused_before"), None
        if rendering is None and "block" not in refused:
            turn, rendering = self._procedure(turn, standing)
        return (turn if rendering is not None else turn.skip("nothing_relevant")), rendering

    def _reused(self, turn: Turn) -> Turn:
        """Return the turn with the answer or the action that memory gives by itself, where the caller wants it."""
        if wanted := turn.options.reuse:
            turn = self._reuse.consider(turn)
            if turn.action != "reuse" and wanted.get("actions"):
                turn = self._actions.consider(turn)
        return turn

    def _procedure(self, turn: Turn, standing: Sequence[Placement]) -> tuple[Turn, Rendering | None]:
        """Return the procedure for what the user wants, where the conversation has none yet."""
        if not turn.parsed.ends_with_user or any(i.kind == "procedure" for p in standing for i in p.items):
            return turn, None
        found = self._procedures.offer(turn)
        offer = found and shortened(found)
        if offer is None or turn.options.max_items == 0:
            return turn, None
        budget = turn.options.limits(1, self._settings.token_budget)["token_budget"]
        return replace(turn, offer=offer), as_procedure(offer, token_budget=budget)

    def _advice(self, turn: Turn, standing: Sequence[Placement]) -> Rendering | None:
        advice = self._adviser.on_results(turn, self._locator.pending_advice(turn), standing)
        limits = turn.options.limits(self._settings.max_block_items, self._settings.token_budget)
        return as_advice(advice, **limits) if advice else None

    def _exemplars(self, turn: Turn, hits: Sequence[Hit], refused: Collection[str]) -> Rendering | None:
        settings = self._settings
        asked = settings.parsed_trust == "strict" and turn.parsed.plain and "turns" not in refused
        alone = self._source.standing_alone(turn.scope, [h.memory.memory_id for h in hits]) if asked else ()
        return render_fitting(
            hits,
            turn.parsed,
            refused,
            turns=turn.options.limits(settings.max_items, settings.token_budget),
            block=turn.options.limits(settings.max_block_items, settings.token_budget),
            only_quoted=alone,
        )

    def _hits(self, turn: Turn, standing: Sequence[Placement]) -> tuple[Turn, list[Hit]]:
        """Return the hits that do not stand in the conversation already."""
        key = conversations.key_of(turn.parsed.task)
        pending = self._encoder.ask(key, turn.encoder_limit_s, owner=turn.scope.tenant)
        hits = self._retriever.recall(
            turn.scope,
            key,
            pending.vector,
            fingerprint=self._encoder.fingerprint,
            unrelated=self._encoder.unrelated,
            episode_id=turn.episode_id,
            frame=turn.parsed.frame,
        )
        if pending.state != "ready":
            turn = turn.skip(f"encoder_{pending.state}_recall_is_lexical")
        hits = without_superseded(hits, lambda ids: self._source.verified_at(turn.scope, ids))
        seen = {item.memory_id for placement in standing for item in placement.items}
        return turn, self._fitting(turn, [h for h in hits if h.memory.memory_id not in seen])

    def _fitting(self, turn: Turn, hits: list[Hit]) -> list[Hit]:
        """Return the hits that fit by what the user wants alone, most similar first.

        What all requests of an agent have in common makes their texts alike, whatever is asked. Where a request has
        nothing of it, recall has seen what the user wants already.
        """
        task = turn.parsed.task
        if not hits or "\n" not in task.strip():
            return hits
        shared = self._procedures.shared_lines(turn.scope, turn.parsed.frame)
        goal = conversations.key_of(goal_of([task], shared))
        if goal == conversations.key_of(task):
            return hits
        goals = [conversations.key_of(goal_of([hit.memory.task], shared)) for hit in hits]
        asked, *others = [
            self._encoder.ask(text, turn.encoder_limit_s, owner=turn.scope.tenant) for text in (goal, *goals)
        ]
        fits = self._retriever.related(
            turn.scope,
            goal,
            asked.vector(),
            goals,
            [other.vector() for other in others],
            fingerprint=self._encoder.fingerprint,
            unrelated=self._encoder.unrelated,
        )
        weights = [h.memory.value * (1.0 if h.memory.frame == turn.parsed.frame else OTHER_FRAME) for h in hits]
        found = zip(hits, fits, weights, strict=True)
        return sorted([replace(h, score=fit * w) for h, fit, w in found if fit is not None], key=lambda h: -h.score)
