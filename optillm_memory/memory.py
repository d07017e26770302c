"""Memory: begin → finish → feedback. Joins the rooms; holds no algorithm of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.maintenance import Maintenance, limits_of
from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.episodes import root_of
from optillm_memory.conversation.feedback import parse_feedback
from optillm_memory.conversation.language import warm
from optillm_memory.conversation.options import AUTO, FIELD, Options, parse_options
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.steps import calls_of
from optillm_memory.conversation.text import text_of
from optillm_memory.decide.holdout import assign
from optillm_memory.errors import NotFound, StoreUnavailable
from optillm_memory.inject.advice import as_advice
from optillm_memory.inject.refusals import FORMS
from optillm_memory.inject.render import Rendering, in_form, placed_at
from optillm_memory.learn import fold
from optillm_memory.learn.conflicts import without_superseded
from optillm_memory.learn.forms import form_named
from optillm_memory.recall.encoder import Encoder, load_encoder
from optillm_memory.recall.retriever import Retriever
from optillm_memory.records import Feedback, FeedbackReceipt, Hit, MemoryRecord, Placement, Scope
from optillm_memory.request.advise import Adviser
from optillm_memory.request.locate import Locator
from optillm_memory.request.record import Recorder
from optillm_memory.request.reuse import Reuser, Shadow
from optillm_memory.request.route import Router
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings
from optillm_memory.store.maintenance.erase import erasure, forget_rows
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.opening import open_store

OPERATOR = ""  # the tenant of whoever works at the machine: may speak of, and look at, every scope
ACKNOWLEDGE_S = 15.0
WHY = (
    *("trace_id", "episode_id", "action", "approach", "model", "held_out", "propensity", "skipped", "injected"),
    *("withheld", "calls", "outcome", "proposal", "policy"),
)  # fmt: skip
ENCODER_SHARE = 0.7  # of the deadline; a busy encoder leaves time to recall by words alone


class Memory:
    """Agent memory in one database file, for one process; any number of threads."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        encoder: Callable[[], Encoder | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the database and start to load the encoder behind it. Raises StoreTooNew."""
        self.settings = settings or Settings.from_env()
        self._clock = clock
        normal = form_named(self.settings.answer_form)
        self.store = open_store(self.settings.db, queue_size=self.settings.queue_size, normal=normal)
        self.encoder = EncoderService(encoder or (lambda: load_encoder(self.settings.encoder)), before=warm)
        self._retriever = Retriever(self.store, self.store.index_files())
        self._locator = Locator(self.store, clock)
        self._salt: bytes | None = None
        self._upkeep = Maintenance(self.store, self.encoder, limits_of(self.settings))
        self._recorder = Recorder(self.settings, self.encoder, self._locator.located, self._upkeep.note)
        self._adviser = Adviser(self.store, self.settings, clock)
        self._reuser = Reuser(self.store, self._retriever, self.encoder, normal, self.settings.reuse_audit)
        self._router = Router(self.store, self.settings, lambda: self.encoder.fingerprint)
        self._shadow = Shadow(self._considered, self._propose)

    @classmethod
    def open(cls, path: str | Path, **settings: Any) -> Memory:
        """Open a database file with settings by keyword."""
        return cls(Settings.from_env(**{"db": str(path), **settings}))

    def settle(self) -> None:
        """Wait until every request that was finished is in the log, with what memory would have answered."""
        self._shadow.flush()
        self.store.flush()

    @property
    def busy(self) -> bool:
        """Whether vectors are being taken in, written or examined behind the requests."""
        return self._retriever.busy

    def close(self) -> None:
        """Write what is queued and let go of the file."""
        self._upkeep.close()
        self._shadow.close()
        self._retriever.close()
        self.encoder.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- a request ---------------------------------------------------------------------------------

    def new_turn(
        self, body: Mapping[str, Any], *, tenant: str = "local", options: Options | None = None, approach: str = "none"
    ) -> Turn:
        """Return a turn that nothing was recalled for: what a request falls back to. Raises InvalidField."""
        options = options or parse_options(body.get(FIELD), now=self._clock())
        return Turn.plain(body, tenant=tenant, options=options, approach=approach, now=self._clock())

    def begin(
        self,
        body: Mapping[str, Any],
        *,
        tenant: str = "local",
        options: Options | None = None,
        approach: str = "none",
        size: int = 0,
        text_only: bool = False,
        approaches: Collection[str] | None = None,
    ) -> Turn:
        """Recall and decide for a request in OpenAI's form; send `turn.messages` upstream, then call `finish`.

        `size` is the body's length in bytes where it is known; `text_only` asks for a block even where turns
        would serve; `approaches` are those that can be run, None for all. Raises InvalidField for a bad
        `agent_memory` field, TimeoutError when past the deadline.
        """
        started = time.perf_counter()
        turn = self.new_turn(body, tenant=tenant, options=options, approach=approach)
        if turn.options.mode == "off":
            return turn.skip("mode_off")
        auto = turn.options.approach == AUTO
        if auto:
            turn = self._router.by_default(turn, approaches)
        if size > self.settings.max_request_bytes:
            return turn.skip("too_large")
        conversation = conversations.parse(body)
        turn = self._locator.located(replace(turn, conversation=conversation))
        conversation = turn.conversation or conversation
        if not turn.options.reads:
            return turn.skip("mode_write")
        turn = self._decided(turn, conversation, text_only=text_only)
        if auto and turn.action != "reuse":
            turn = self._routed(turn, conversation, approaches)
        return replace(turn, recall_ms=(time.perf_counter() - started) * 1000)

    def guard(self, turn: Turn, completion: Mapping[str, Any]) -> tuple[Turn, bool]:
        """Look at an answer before it goes out: it may be about to repeat an action that is known to fail.

        Returns the turn and whether to ask again: then `turn.messages` hold an advisory, and `guarded` tells which of
        the two answers to keep.
        """
        conversation, choices = turn.conversation, completion.get("choices") or []
        if self.settings.guard == "off" or conversation is None or not turn.options.reads or len(choices) != 1:
            return turn, False
        advice = self._adviser.on_answer(turn, conversation, choices[0].get("message") or {})
        if not advice:
            return turn, False
        if self.settings.guard == "advise" and not turn.held_out:
            self._locator.recent.advise(turn.scope, turn.episode_id, advice, self._clock())
            return turn, False
        limits = turn.options.limits(self.settings.max_block_items, self.settings.token_budget)
        limits["token_budget"] -= sum(item.tokens for placement in turn.fresh for item in placement.items)
        rendering = as_advice(advice, **limits)
        fresh = placed_at(conversation, len(conversation.messages) - 1, rendering)
        standing = [p for p in turn.placements if p not in turn.fresh]
        if fresh is None:
            turn = turn.skip("over_budget", memory_id=advice[0].memory_id)
        elif turn.held_out:
            turn = replace(turn, action="holdout", withheld=(*turn.withheld, *fresh.items))
        elif any(p.position == fresh.position and p.form == fresh.form for p in standing):
            turn = turn.skip("advised_already")  # the very same request again: a place is written to once
        else:
            return turn.placing(standing, *turn.fresh, fresh), True
        return turn, False

    def guarded(self, turn: Turn, completion: Mapping[str, Any]) -> bool:
        """Whether the second answer is better behaved than the first: it says something, and repeats no failure."""
        choices = completion.get("choices") or []
        message = (choices[0].get("message") or {}) if len(choices) == 1 else {}
        if turn.conversation is None or not (calls_of(message, 0) or text_of(message)):
            return False
        return not self._adviser.on_answer(turn, turn.conversation, message)

    def refused(self, turn: Turn) -> Turn:
        """Return the turn as it goes out where the upstream refused it with memory and took it without.

        The forms of what was inserted are not tried with this model for a while, nor in this episode again.
        """
        forms = {p.form for p in turn.placements}
        self._locator.refusals.note(turn.scope, turn.episode_id, turn.model, forms, self._clock())
        return turn.as_sent().skip("refused_with_memory", form=",".join(sorted(forms)))

    def finish(self, turn: Turn, response: Mapping[str, Any] | None, *, error: str | None = None) -> None:
        """Record the request with its response, or the error it ended in, in the background."""
        elapsed_ms = (time.perf_counter() - turn.started) * 1000
        prefixes: list[str] = []
        if turn.conversation is not None:
            prefixes = conversations.answer_prefixes(turn.conversation, response)
        self._locator.settle(turn, prefixes, answered=response is not None)
        if turn.options.writes:
            self.store.post(lambda tx: self._recorder.record(tx, turn, response, error, prefixes, elapsed_ms))
            if turn.conversation is not None and turn.options.reads and turn.decision is None:
                self._shadow.submit(turn)

    def feedback(
        self,
        payload: Mapping[str, Any] | Sequence[Any] | Iterable[Feedback],
        *,
        tenant: str = OPERATOR,
        scope: Scope | None = None,
    ) -> list[FeedbackReceipt]:
        """Take feedback (objects as the endpoint takes them, or records); return once it is on disk and applied.

        Raises InvalidField, and StoreUnavailable where it could not be written: then nothing was acknowledged.
        """
        try:
            return self.submit_feedback(payload, tenant=tenant, scope=scope)(ACKNOWLEDGE_S)
        except (TimeoutError, FutureTimeoutError):
            raise StoreUnavailable(f"not on disk after {ACKNOWLEDGE_S:.0f} s, but it may be later") from None

    def submit_feedback(
        self, payload: Any, *, tenant: str = OPERATOR, scope: Scope | None = None
    ) -> Callable[[float], list[FeedbackReceipt]]:
        """Queue feedback; return a function that waits so many seconds for its receipts."""
        now = self._clock()
        several = isinstance(payload, Iterable) and not isinstance(payload, (Mapping, str, bytes))
        given = list(payload) if several else payload
        if isinstance(given, list) and given and all(isinstance(f, Feedback) for f in given):
            items = given
        else:
            items = parse_feedback(given, now=now)
        items = [self._recorder.cleaned(f) for f in items]
        future = self.store.write(
            lambda tx: [fold.feedback_arrived(tx, tenant, scope, f, received_at=now) for f in items]
        )
        future.add_done_callback(lambda _: self._upkeep.wake())
        return future.result

    # -- looking at it -----------------------------------------------------------------------------

    def recall(self, query: str, *, scope: Scope | None = None, limit: int = 10, timeout_s: float = 5.0) -> list[Hit]:
        """Return what a request with this task would recall in a scope, best first."""
        key = conversations.key_of(query)
        encoder, scope = self.encoder, scope or Scope("local")
        vector = encoder.ask(key, timeout_s).vector
        return self._retriever.recall(
            scope, key, vector, fingerprint=encoder.fingerprint, unrelated=encoder.unrelated, limit=limit
        )

    def trace(self, trace_id: str, *, tenant: str | None = None) -> dict[str, Any]:
        """Return a trace with its steps, injections and feedback. Raises NotFound."""
        if (found := self.store.trace(trace_id, tenant)) is None:
            raise NotFound(f"no trace {trace_id!r} in this scope")
        return found

    def memory(self, memory_id: str, *, tenant: str | None = None) -> MemoryRecord:
        """Return a memory of any status. Raises NotFound."""
        if not (found := self.store.list_memories(tenant, memory_id=memory_id, limit=1)):
            raise NotFound(f"no memory {memory_id!r} in this scope")
        return found[0]

    def described(self, memory_id: str, *, tenant: str | None = None) -> dict[str, Any]:
        """Return a memory with its value, and a fix with its error and its evidence. Raises NotFound."""
        record = self.memory(memory_id, tenant=tenant)
        shown = {**asdict(record), "value": round(record.value, 4)}
        return {**shown, "fix": self.store.fix_details(record.scope, memory_id)} if record.kind == "fix" else shown

    def stats(self) -> dict[str, Any]:
        """Return counts of the store and the state of the encoder."""
        total, embedded = self.store.coverage()
        return {
            **self.store.stats(), "memories_without_vector": total - embedded.get(self.encoder.fingerprint, 0),
            "encoder": self.encoder.state, "encoder_reason": self.encoder.reason,
        }  # fmt: skip

    def why(self, trace_id: str, *, tenant: str | None = None) -> dict[str, Any]:
        """Return why a request was answered as it was: what memory had to say, what was decided. Raises NotFound."""
        trace = self.trace(trace_id, tenant=tenant)
        return {key: trace[key] for key in WHY}

    def policy(self, scope: Scope | None = None) -> dict[str, Any]:
        """Return the arms of approach `auto` in a scope, and what is believed of each, in all and by task cluster."""
        return {"object": "policy", **self._router.believed(scope or Scope("local"))}

    def rebuild(self) -> dict[str, int]:
        """Fold the whole log again; return how many traces were read and how many memories came of it."""
        traces = self.store.write(fold.rebuild).result()
        self._upkeep.wake()
        return {"traces": traces, "memories": self.store.stats()["memories"]}

    def forget(self, selection: Selection) -> dict[str, Any]:
        """Delete a selection for good; return what was deleted, and the receipt of the erasure of its bytes.

        Nothing of it is recalled or shown from now on. Its bytes leave the files in the background: `erasure` tells
        when. Raises NotFound.
        """
        deleted = forget_rows(self.store, selection)
        receipt = str(deleted.pop("receipt"))
        self._upkeep.erase_soon()
        return {"deleted": deleted, **erasure(self.store, receipt), "left": self.store.set_aside(delete=False)}

    def erasure(self, receipt: str) -> dict[str, Any]:
        """Return whether the bytes of what was forgotten with a receipt are out of all files. Raises NotFound."""
        return erasure(self.store, receipt)

    # -- joining the rooms -------------------------------------------------------------------------

    def _decided(self, turn: Turn, conversation: Conversation, *, text_only: bool) -> Turn:
        lot = assign(root_of(turn.episode_id), self._secret(), self.settings.holdout)
        turn = replace(turn, held_out=lot.held_out, propensity=lot.propensity)
        if turn.options.reuse:
            turn = self._considered(turn)
            if turn.action == "reuse":
                return turn
        refused = self._locator.refusals.forms(turn.scope, turn.episode_id, turn.model, self._clock())
        standing = [] if lot.held_out or text_only else self._locator.standing(turn, refused)
        position = len(conversation.messages) - 1
        if standing and standing[-1].position == position:
            rendering = None  # the very same request again: it gets what it got before
        elif "block" in refused and (conversation.ends_with_observation or refused == FORMS):
            turn, rendering = turn.skip("refused_before"), None
        elif conversation.ends_with_observation:
            turn, rendering = self._advised(turn, conversation)
        else:
            hits, turn = self._hits(turn, conversation, standing)
            turn, rendering = self._rendered(turn, conversation, hits, refused, text_only=text_only)
        for memory_id in rendering.over_budget if rendering is not None else ():
            turn = turn.skip("over_budget", memory_id=memory_id)
        if lot.held_out:
            withheld = tuple(rendering.injected) if rendering is not None else ()
            return replace(turn, action="holdout", withheld=withheld) if withheld else turn
        fresh = placed_at(conversation, position, rendering) if rendering is not None else None
        return turn.placing(standing, fresh)

    def _considered(self, turn: Turn) -> Turn:
        """Consider answering from memory alone; in shadow too, where the deadline is nobody's concern."""
        assert turn.conversation is not None
        left_s = self._left_s(turn) if turn.options.reuse else 5.0
        key = conversations.key_of(turn.conversation.task)
        return self._reuser.considered(turn, self.encoder.ask(key, left_s * ENCODER_SHARE).vector(), self._secret())

    def _routed(self, turn: Turn, conversation: Conversation, approaches: Collection[str] | None) -> Turn:
        key = conversations.key_of(conversation.task)
        vector = (
            self.encoder.ask(key, self._left_s(turn) * ENCODER_SHARE).vector() if conversation.task.strip() else None
        )
        return self._router.routed(turn, vector, self._secret(), approaches)

    def _propose(self, turn: Turn) -> None:
        self.store.post(lambda tx: self._recorder.record_proposal(tx, turn))

    def _left_s(self, turn: Turn) -> float:
        return self.settings.deadline_ms / 1000 - (time.perf_counter() - turn.started)

    def _secret(self) -> bytes:
        if self._salt is None:
            self._salt = self.store.salt()
        return self._salt

    def _advised(self, turn: Turn, conversation: Conversation) -> tuple[Turn, Rendering | None]:
        pending = self._locator.recent.pending_advice(turn.scope, turn.episode_id, self._clock())
        gone = self.store.forgotten(item.memory_id for item in pending)
        pending = tuple(item for item in pending if item.memory_id not in gone)
        advice = self._adviser.on_results(turn, conversation, pending)
        limits = turn.options.limits(self.settings.max_block_items, self.settings.token_budget)
        rendering = as_advice(advice, **limits) if advice else None
        return (turn, rendering) if rendering else (turn.skip("nothing_relevant"), None)

    def _hits(self, turn: Turn, conversation: Conversation, standing: list[Placement]) -> tuple[list[Hit], Turn]:
        if not conversation.task.strip() or not conversation.ends_with_user:
            return [], turn.skip("no_new_user_message")
        key = conversations.key_of(conversation.task)
        asked = self.encoder.ask(key, self._left_s(turn) * ENCODER_SHARE)
        hits = self._retriever.recall(
            turn.scope,
            key,
            asked.vector,
            fingerprint=self.encoder.fingerprint,
            unrelated=self.encoder.unrelated,
            episode_id=turn.episode_id,
            frame=conversation.frame,
        )
        if asked.state != "ready":
            turn = turn.skip(f"encoder_{asked.state}_recall_is_lexical")
        hits = without_superseded(hits, lambda ids: self.store.last_verified(turn.scope, ids))
        seen = {item.memory_id for placement in standing for item in placement.items}
        fresh = [h for h in hits if h.memory.memory_id not in seen]
        return fresh, turn if fresh else turn.skip("nothing_relevant")

    def _rendered(
        self, turn: Turn, conversation: Conversation, hits: list[Hit], refused: Collection[str], *, text_only: bool
    ) -> tuple[Turn, Rendering | None]:
        settings, options = self.settings, turn.options
        turns = options.limits(settings.max_items, settings.token_budget)
        block = options.limits(settings.max_block_items, settings.token_budget)
        refused = {*refused, "turns"} if text_only else refused
        rendering = in_form(hits, conversation, refused, turns=turns, block=block) if hits else None
        return turn.skip("refused_before") if hits and rendering is None else turn, rendering
