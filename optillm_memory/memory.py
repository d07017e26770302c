"""Memory: begin → finish → feedback. Joins the rooms; holds no algorithm of its own."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.feedback import parse_feedback
from optillm_memory.conversation.options import FIELD, Options, parse_options
from optillm_memory.conversation.parse import Conversation
from optillm_memory.conversation.recent import Recent
from optillm_memory.conversation.redact import storable
from optillm_memory.decide.holdout import assign
from optillm_memory.errors import NotFound
from optillm_memory.inject.place import place, still_anchored
from optillm_memory.inject.render import as_block, as_turns
from optillm_memory.learn import fold
from optillm_memory.recall.encoder import Encoder, load_encoder
from optillm_memory.recall.recaller import Recaller
from optillm_memory.recall.service import EncoderService
from optillm_memory.records import Feedback, FeedbackReceipt, Hit, MemoryRecord, Placement, Scope, Step, Trace
from optillm_memory.settings import Settings
from optillm_memory.store.sqlite import SqliteStore
from optillm_memory.store.transaction import Transaction, key_hash
from optillm_memory.turn import Turn, answer_of, recorded_messages

logger = logging.getLogger(__name__)
OPERATOR = ""  # the tenant of whoever works at the machine: may speak of, and look at, every scope
ACKNOWLEDGE_S = 15.0
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
        self.store = SqliteStore(self.settings.path, queue_size=self.settings.queue_size)
        self.encoder = EncoderService(encoder or (lambda: load_encoder(self.settings.encoder)))
        self._recaller = Recaller(self.store)
        self._recent = Recent()
        self._salt: bytes | None = None
        self._closing = threading.Event()
        self._missing = threading.Event()
        self._upkeep = threading.Thread(target=self._fill_vectors, name="agent-memory-upkeep", daemon=True)
        self._upkeep.start()

    @classmethod
    def open(cls, path: str | Path, **settings: Any) -> Memory:
        """Open a database file with settings by keyword."""
        return cls(Settings.from_env(**{"db": str(path), **settings}))

    def close(self) -> None:
        """Write what is queued and let go of the file."""
        self._closing.set()
        self._missing.set()
        self._upkeep.join(10)
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
    ) -> Turn:
        """Recall and decide for a request in OpenAI's form; send `turn.messages` upstream, then call `finish`.

        `size` is the body's length in bytes where it is known; `text_only` asks for a block even where turns
        would serve. Raises InvalidField for a bad `agent_memory` field, TimeoutError when past the deadline.
        """
        started = time.perf_counter()
        turn = self.new_turn(body, tenant=tenant, options=options, approach=approach)
        if turn.options.mode == "off":
            return turn.skip("mode_off")
        if size > self.settings.max_request_bytes:
            return turn.skip("too_large")
        conversation = conversations.parse(body)
        turn = self._located(replace(turn, conversation=conversation))
        if not turn.options.reads:
            return turn.skip("mode_write")
        turn = self._decided(turn, conversation, text_only=text_only)
        return replace(turn, recall_ms=(time.perf_counter() - started) * 1000)

    def finish(
        self, turn: Turn, response: Mapping[str, Any] | None, *, error: str | None = None, injected: bool = True
    ) -> None:
        """Record the request with its response, or the error it ended in, behind the caller's back.

        `injected` False says that the turn's insertions did not go out after all.
        """
        if not injected:
            turn = replace(turn, action="plain", injected=(), placements=(), fresh=())
        elapsed_ms = (time.perf_counter() - turn.started) * 1000
        messages = [choice.get("message") or {} for choice in (response or {}).get("choices") or []]
        prefixes: list[str] = []
        if turn.conversation is not None and response is not None:
            last = turn.conversation.prefixes[-1] if turn.conversation.prefixes else ""
            prefixes = list(dict.fromkeys(conversations.extend_prefix(last, m) for m in messages))
            self._recent.remember(turn.scope, turn.episode_id, prefixes, turn.placements)
        if turn.options.writes:
            self.store.post(lambda tx: self._record(tx, turn, response, error, prefixes, elapsed_ms))

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
        return self.submit_feedback(payload, tenant=tenant, scope=scope)(ACKNOWLEDGE_S)

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
        items = [self._cleaned(f) for f in items]
        future = self.store.write(
            lambda tx: [fold.feedback_arrived(tx, tenant, scope, f, received_at=now) for f in items]
        )
        future.add_done_callback(lambda _: self._missing.set())
        return future.result

    # -- looking at it -----------------------------------------------------------------------------

    def recall(self, query: str, *, scope: Scope | None = None, limit: int = 10, timeout_s: float = 5.0) -> list[Hit]:
        """Return what a request with this task would recall in a scope, best first."""
        key = conversations.key_of(query)
        encoder, scope = self.encoder, scope or Scope("local")
        vector = encoder.ask(key, timeout_s).vector
        return self._recaller.recall(
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

    def stats(self) -> dict[str, Any]:
        """Return counts of the store and the state of the encoder."""
        return {**self.store.stats(), "encoder": self.encoder.state, "encoder_reason": self.encoder.reason}

    def rebuild(self) -> dict[str, int]:
        """Fold the whole log again; return how many traces were read and how many memories came of it."""

        def again(tx: Transaction) -> int:
            trace_ids = tx.clear_derived()
            fold.relearn(tx, trace_ids)
            return len(trace_ids)

        traces = self.store.write(again).result()
        self._missing.set()
        return {"traces": traces, "memories": self.store.stats()["memories"]}

    # -- joining the rooms -------------------------------------------------------------------------

    def _located(self, turn: Turn) -> Turn:
        """Find the episode: named by the caller, else the one whose conversation this continues."""
        conversation = turn.conversation
        assert conversation is not None
        known = conversation.answered_prefixes()
        found = self._recent.episode_of(turn.scope, known) or (
            self.store.episode_of(turn.scope, known) if known else None
        )
        episode_id = turn.options.episode_id or found or turn.episode_id
        return replace(turn, episode_id=episode_id, continues=found is not None)

    def _decided(self, turn: Turn, conversation: Conversation, *, text_only: bool) -> Turn:
        if self._salt is None:
            self._salt = self.store.salt()
        lot = assign(turn.episode_id, self._salt, self.settings.holdout)
        turn = replace(turn, held_out=lot.held_out, propensity=lot.propensity)
        ledger: Sequence[Placement] | None = self._recent.placements(turn.scope, turn.episode_id)
        if ledger is None:
            known = turn.continues or turn.options.episode_id is not None
            ledger = self.store.ledger(turn.scope, turn.episode_id) if known else []
            self._recent.remember(turn.scope, turn.episode_id, (), ledger)
        standing = [] if lot.held_out or text_only else still_anchored(ledger, conversation.prefixes)
        hits, turn = self._hits(turn, conversation, standing)
        if lot.held_out:
            return replace(turn, action="holdout") if hits else turn
        turn, new = self._rendered(turn, conversation, hits, text_only=text_only)
        placements = [*standing, *([new] if new else [])]
        if not placements:
            return turn
        return replace(
            turn,
            action="inject",
            placements=tuple(placements),
            fresh=(new,) if new else (),
            injected=tuple(item for p in placements for item in p.items),
            messages=place(turn.messages, placements),
        )

    def _hits(self, turn: Turn, conversation: Conversation, standing: list[Placement]) -> tuple[list[Hit], Turn]:
        if not conversation.task or not conversation.ends_with_user:
            return [], turn.skip("no_new_user_message")
        if standing and standing[-1].position == len(conversation.messages) - 1:
            return [], turn  # the very same request again: it gets what it got before
        key = conversations.key_of(conversation.task)
        left_s = self.settings.deadline_ms / 1000 - (time.perf_counter() - turn.started)
        asked = self.encoder.ask(key, left_s * ENCODER_SHARE)
        hits = self._recaller.recall(
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
        seen = {item.memory_id for placement in standing for item in placement.items}
        fresh = [h for h in hits if h.memory.memory_id not in seen]
        return fresh, turn if fresh else turn.skip("nothing_relevant")

    def _rendered(
        self, turn: Turn, conversation: Conversation, hits: list[Hit], *, text_only: bool
    ) -> tuple[Turn, Placement | None]:
        if not hits:
            return turn, None
        options, limits = turn.options, self.settings
        budget = limits.token_budget if options.token_budget is None else options.token_budget
        same = [h for h in hits if h.memory.frame == conversation.frame]
        if conversation.plain and same and not text_only:
            count = limits.max_items if options.max_items is None else options.max_items
            form, rendering = "turns", as_turns(same, max_items=count, token_budget=budget)
        else:
            count = limits.max_block_items if options.max_items is None else options.max_items
            form, rendering = "block", as_block(hits, max_items=count, token_budget=budget)
        for memory_id in rendering.over_budget:
            turn = turn.skip("over_budget", memory_id=memory_id)
        if not rendering.injected:
            return turn, None
        position = len(conversation.messages) - 1
        anchor = conversation.prefixes[position]
        return turn, Placement(anchor, position, form, rendering.payload, rendering.injected)  # type: ignore[arg-type]

    # -- on the writer's thread --------------------------------------------------------------------

    def _record(
        self,
        tx: Transaction,
        turn: Turn,
        response: Mapping[str, Any] | None,
        error: str | None,
        prefixes: list[str],
        elapsed_ms: float,
    ) -> None:
        conversation = turn.conversation
        if conversation is None:  # recall failed or was left out: what it would have found out is found out here
            conversation = conversations.parse(turn.body)
            turn = self._located(replace(turn, conversation=conversation))
        usage = (response or {}).get("usage") or {}
        choices = (response or {}).get("choices") or []
        answer = answer_of(choices)
        trace = Trace(
            trace_id=turn.trace_id,
            scope=turn.scope,
            episode_id=turn.episode_id,
            created_at=turn.created_at,
            model=self._stored(turn.model),
            approach=turn.approach,
            action=turn.action,
            held_out=turn.held_out,
            propensity=turn.propensity,
            task=self._stored(conversation.task),
            frame=conversation.frame,
            messages=json.dumps(recorded_messages(conversation, choices, self._stored, since=turn.continues)),
            answer=None if answer is None else self._stored(conversations.without_blocks(answer)),
            finish_reason=self._stored(str(choices[0].get("finish_reason"))) if choices else None,
            error=None if error is None else self._stored(error),
            skipped=json.dumps(list(turn.skipped)),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            latency_ms=elapsed_ms,
            recall_ms=turn.recall_ms,
            tags=turn.options.tags,
        )
        steps = [
            Step(
                self._stored(s.call_id),
                s.ordinal,
                self._stored(s.tool),
                self._stored(s.arguments),
                s.observation and self._stored(s.observation),
            )
            for s in conversation.steps
        ]
        fresh = turn.fresh if response is not None else ()
        if tx.add_trace(trace, steps=steps, prefixes=prefixes, placements=fresh, injected=turn.injected):
            vector = self.encoder.cached(conversations.key_of(conversation.task))
            if vector is not None:
                tx.put_vectors([(key_hash(trace.task), vector.tobytes())], self.encoder.fingerprint)
            fold.trace_arrived(tx, trace)

    def _stored(self, text: str) -> str:
        return storable(text, self.settings.max_text, secrets=self.settings.redact)

    def _cleaned(self, feedback: Feedback) -> Feedback:
        evidence = feedback.evidence and {
            k: self._stored(v) if isinstance(v, str) else v for k, v in feedback.evidence.items()
        }
        value = self._stored(feedback.value) if isinstance(feedback.value, str) else feedback.value
        return replace(feedback, value=value, evidence=evidence)

    # -- behind everything -------------------------------------------------------------------------

    def _fill_vectors(self) -> None:
        """Encode the memories that have no vector yet: those of the time before the encoder was there."""
        while not self._closing.is_set() and not self.encoder.settled.wait(0.2):
            pass
        done, generation = 0, -1
        while not self._closing.is_set() and self.encoder.state == "ready":
            try:
                if (current := self.store.revision()[0]) != generation:  # a rebuild numbers the memories anew
                    done, generation = 0, current
                rows = self.store.without_vectors(self.encoder.fingerprint, done, 64)
                if rows:
                    self._encode_missing(rows)
                    done = max(number for number, _, _ in rows)
                    continue
            except Exception:
                logger.exception("agent_memory: vectors could not be filled in; trying again")
                self._closing.wait(1.0)
            self._missing.wait()
            self._missing.clear()

    def _encode_missing(self, rows: list[tuple[int, str, str]]) -> None:
        vectors = self.encoder.encode([key for _, key, _ in rows])
        if vectors is None:
            return
        pairs = [(hashed, vector.tobytes()) for (_, _, hashed), vector in zip(rows, vectors, strict=True)]

        def fill(tx: Transaction) -> None:
            tx.put_vectors(pairs, self.encoder.fingerprint)
            tx.touch([number for number, _, _ in rows])

        self.store.write(fill).result()
