"""Memory: begin, finish, feedback, recall. A facade that joins the packages and holds no algorithm of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from typing_extensions import Self

from optillm_memory.background import maintenance
from optillm_memory.background.encoder_service import EncoderService
from optillm_memory.background.maintenance import Maintenance
from optillm_memory.background.threads import close_in_order, start_thread
from optillm_memory.background.worker import BackgroundWorker
from optillm_memory.conversation import parse as conversations
from optillm_memory.conversation.language import warm
from optillm_memory.conversation.options import FIELD, Options, parse_options
from optillm_memory.errors import NotFound, StoreUnavailable
from optillm_memory.learn import uplift
from optillm_memory.learn.forms import form_named
from optillm_memory.recall.encoder import Encoder, load_encoder
from optillm_memory.recall.retriever import Retriever
from optillm_memory.records import (
    EVERYTHING,
    IN_PROCESS,
    OPERATOR,
    Feedback,
    FeedbackReceipt,
    Hit,
    MemoryRecord,
    Scope,
    Tenant,
    View,
)
from optillm_memory.request.actions import ActionDecider
from optillm_memory.request.advise import Adviser
from optillm_memory.request.deadline import Deadline
from optillm_memory.request.decide import Decider
from optillm_memory.request.guard import Guard
from optillm_memory.request.locate import Locator
from optillm_memory.request.procedures import ProcedureAdviser
from optillm_memory.request.record import Recorder
from optillm_memory.request.redaction import Redactor
from optillm_memory.request.reuse import ReuseDecider
from optillm_memory.request.route import Router
from optillm_memory.request.shadow import Shadow
from optillm_memory.request.turn import Turn
from optillm_memory.settings import Settings, is_url
from optillm_memory.store import fold
from optillm_memory.store.maintenance import erase, verify
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.opening import open_store

ACKNOWLEDGE_S = 15.0
_SETTLE_S = 60.0
_WHY = (
    *("trace_id", "episode_id", "action", "approach", "model", "held_out", "propensity", "skipped", "injected"),
    *("withheld", "calls", "outcome", "proposal", "policy"),
)  # fmt: skip


class Memory:
    """Agent memory in one database, for one process; any number of threads.

    `view` says what a call may see: what agrees with all that is named in it. A tenant's name stands for all of that
    tenant's, None for the operator, who sees everything.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        encoder: Callable[[], Encoder | None] | None = None,
        clock: Callable[[], float] = time.time,
        read_only: bool = False,
    ) -> None:
        """Open the database and start to load the encoder in the background. Raises StoreTooNew.

        Opened `read_only` nothing is created, migrated or written and no thread is started, but for the encoder's when
        it is first needed; raises NotFound where there is no memory.
        """
        self.settings = settings = settings or Settings.from_env()
        self._clock = clock
        normal = form_named(settings.answer_form)
        self.store = store = open_store(
            settings.db, queue_size=settings.queue_size, normal=normal, read_only=read_only,
            seal=settings.seal, seal_folder=settings.seal_folder, clock=clock, start=start_thread,
        )  # fmt: skip
        load = encoder or (lambda: load_encoder(settings.encoder))
        self.encoder = EncoderService(load, before=warm, lazy=read_only)
        salt = functools.cache(store.salt)
        self._redactor = Redactor(settings, salt)
        loader, writer = BackgroundWorker("agent-memory-index-loader"), BackgroundWorker("agent-memory-index-writer")
        self._retriever = Retriever(store.recall, loader, writer, store.index_files())
        self._locator = Locator(store.episodes, clock)
        self._maintenance = Maintenance(store, self.encoder, settings)
        self._adviser = Adviser(store.fixes, settings, self._redactor.text, clock)
        self._guard = Guard(settings, self._adviser, self._locator, salt)
        self._reuse = ReuseDecider(store.proposals, self._retriever, self.encoder, normal, salt, settings.reuse_audit)
        self._router = Router(store.decisions, settings, self.encoder, salt)
        procedures = ProcedureAdviser(store.procedures, store.recall, self.encoder, None if read_only else store.post)
        actions = ActionDecider(store.recall, procedures, self._reuse.gate, salt, settings)
        self._decider = Decider(
            store.recall, settings, self.encoder, salt, lambda: store.seal.fault,
            self._retriever, self._locator, self._adviser, self._reuse, self._router,
            procedures, actions,
        )  # fmt: skip
        self._recorder = Recorder(
            store, self.encoder, self._locator, self._maintenance, self._redactor, clock, settings.parsed_trust
        )
        self._shadow = Shadow(self._reuse, actions, self._recorder)
        self._read_only = read_only
        if not read_only:
            self._maintenance.start()

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False, **settings: Any) -> Memory:
        """Open a database file with settings by keyword."""
        return cls(Settings.from_env(**{"db": str(path), **settings}), read_only=read_only)

    def settle(self) -> None:
        """Wait until every finished request is in the log, with what memory would have answered."""
        if not self._shadow.flush(_SETTLE_S):
            raise StoreUnavailable(f"requests were not all recorded within {_SETTLE_S:.0f} s")
        self.store.flush()

    @property
    def busy(self) -> bool:
        """Whether vectors are being loaded, written or checked in the background."""
        return self._retriever.busy

    def close(self) -> None:
        """Write what is queued and let go of the file: first what writes by itself, then what that rests on."""
        close_in_order(
            self._maintenance.close, self._shadow.close, self._retriever.close, self.encoder.close, self.store.close
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- a request ---------------------------------------------------------------------------------

    def new_turn(
        self, body: Mapping[str, Any], *, tenant: str = "local", options: Options | None = None, approach: str = "none"
    ) -> Turn:
        """Return a request's turn before memory is consulted for it. Raises InvalidField."""
        options = self.named(options or parse_options(body.get(FIELD), now=self._clock()))
        deadline = Deadline(self.settings.deadline_ms / 1000)
        return Turn.plain(body, tenant=tenant, options=options, approach=approach, now=self._clock(), deadline=deadline)

    def named(self, options: Options) -> Options:
        """Return options with the names by which what they name is stored: one with a secret becomes a digest."""
        return self._redactor.options(options)

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

        The last three are those of `consult`. Raises InvalidField for a bad `agent_memory` field.
        """
        turn = self.new_turn(body, tenant=tenant, options=options, approach=approach)
        return self.consult(turn, size=size, text_only=text_only, approaches=approaches)

    def consult(
        self, turn: Turn, *, size: int = 0, text_only: bool = False, approaches: Collection[str] | None = None
    ) -> Turn:
        """Recall and decide for a turn.

        `size` is the body's length in bytes where it is known; `text_only` asks for a block even where turns
        would serve; `approaches` are those that can be run, None for all.
        """
        with turn.deadline.running():
            return self._decider.decide(turn, size=size, text_only=text_only, approaches=approaches)

    def guard(self, turn: Turn, completion: Mapping[str, Any]) -> tuple[Turn, bool]:
        """Look at an answer before it goes out: it may be about to repeat an action that is known to fail.

        Returns the turn and whether to ask again: then `turn.messages` hold advice, and `guarded` says which of the
        two answers to keep.
        """
        if self.store.seal.fault:
            return turn, False
        with turn.deadline.running():
            return self._guard.check(turn, completion)

    def guarded(self, turn: Turn, completion: Mapping[str, Any]) -> bool:
        """Whether the second answer is better than the first: it is not empty, and repeats no failure."""
        with turn.deadline.running():
            return self._guard.accepts(turn, completion)

    def refused(self, turn: Turn) -> Turn:
        """Return the turn as it goes out where the upstream refused it with memory and took it without."""
        return self._locator.refuse(turn)

    def finish(self, turn: Turn, response: Mapping[str, Any] | None, *, error: str | None = None) -> None:
        """Record the request with its response, or the error it ended in, in the background.

        Raises StoreUnavailable where memory was opened read-only.
        """
        if self._read_only and turn.options.writes:
            raise StoreUnavailable(f"{self.settings.place} was opened read-only")
        self._recorder.finish(turn, response, error)
        self._shadow.submit(turn)

    def feedback(
        self,
        payload: Mapping[str, Any] | Sequence[Any] | Iterable[Feedback],
        *,
        view: View | Tenant = OPERATOR,
        scope: Scope | None = None,
        reporter: str = IN_PROCESS,
        may_wait: bool = True,
    ) -> list[FeedbackReceipt]:
        """Take feedback (objects as the endpoint takes them, or records); return once it is on disk and applied.

        It counts on no trace outside the view. `scope` tells episodes of one name apart. `reporter` is who vouches for
        it: who calls this is trusted; under strict trust an empty name is nobody's word.

        Raises InvalidField, NotAllowed for a reporter who was revoked, TooMany where it is for an unknown trace and may
        not wait for it, and StoreUnavailable where it could not be written: then nothing was acknowledged.
        """
        waiting = self.submit_feedback(payload, view=view, scope=scope, reporter=reporter, may_wait=may_wait)
        try:
            return waiting(ACKNOWLEDGE_S)
        except (TimeoutError, FutureTimeoutError):
            raise StoreUnavailable(f"not on disk after {ACKNOWLEDGE_S:.0f} s, but it may be later") from None

    def submit_feedback(
        self,
        payload: Any,
        *,
        view: View | Tenant = OPERATOR,
        scope: Scope | None = None,
        reporter: str = IN_PROCESS,
        may_wait: bool = True,
    ) -> Callable[[float], list[FeedbackReceipt]]:
        """Queue feedback; return a function that waits so many seconds for its receipts."""
        return self._recorder.submit_feedback(payload, View.of(view), scope, reporter, may_wait=may_wait).result

    # -- looking at it -----------------------------------------------------------------------------

    def recall(self, query: str, *, scope: Scope | None = None, limit: int = 10, timeout_s: float = 5.0) -> list[Hit]:
        """Return what a request with this task would recall in a scope, best first."""
        if self.store.seal.fault:
            return []
        key = conversations.key_of(query)
        encoder, scope = self.encoder, self._redactor.scope(scope or Scope("local"))
        vector = encoder.ask(key, timeout_s, owner=scope.tenant).vector
        return self._retriever.recall(
            scope, key, vector, fingerprint=encoder.fingerprint, unrelated=encoder.unrelated, limit=limit
        )

    def trace(self, trace_id: str, *, view: View | Tenant = OPERATOR) -> dict[str, Any]:
        """Return a trace with its steps, injections and feedback. Raises NotFound."""
        if (found := self.store.trace(trace_id, self._seen(view))) is None:
            raise NotFound(f"no trace {trace_id!r} in this scope")
        return found

    def traces(self, *, view: View | Tenant = OPERATOR, limit: int = 50, text: str = "") -> list[dict[str, Any]]:
        """Return the latest traces, newest first, whose task or answer holds a text."""
        return self.store.traces(self._seen(view), limit=limit, text=text)

    def memory(self, memory_id: str, *, view: View | Tenant = OPERATOR) -> MemoryRecord:
        """Return a memory of any status. Raises NotFound."""
        if not (found := self.store.list_memories(self._seen(view), memory_id=memory_id, limit=1)):
            raise NotFound(f"no memory {memory_id!r} in this scope")
        return found[0]

    def memories(self, *, view: View | Tenant = OPERATOR, limit: int = 50) -> list[MemoryRecord]:
        """Return memories of every status, newest first."""
        return self.store.list_memories(self._seen(view), limit=limit)

    def described(self, memory_id: str, *, view: View | Tenant = OPERATOR) -> dict[str, Any]:
        """Return a memory with its value, and a fix with its error and its evidence. Raises NotFound."""
        record = self.memory(memory_id, view=view)
        fix = {"fix": self.store.fixes.details(record.scope, memory_id)} if record.kind == "fix" else {}
        return {**record.as_dict(), **fix}

    def why(self, trace_id: str, *, view: View | Tenant = OPERATOR) -> dict[str, Any]:
        """Return why a request was answered as it was: what memory had to say, what was decided. Raises NotFound."""
        trace = self.trace(trace_id, view=view)
        return {key: trace[key] for key in _WHY}

    def policy(self, scope: Scope | None = None) -> dict[str, Any]:
        """Return the arms of approach `auto` in a scope, and what is known of each, in all and by task cluster."""
        return {"object": "policy", **self._router.report(self._redactor.scope(scope or Scope("local")))}

    def uplift(self, *, view: View | Tenant = OPERATOR, limit: int = 20) -> dict[str, Any]:
        """Return what memory changed in the outcome of episodes, with at most `limit` memories of each scope."""
        return uplift.report(self.store.exposures.episodes(self._seen(view)), limit=limit)

    def stats(self, *, view: View | Tenant = OPERATOR) -> dict[str, Any]:
        """Return counts and the state of the encoder; of everything also the store's size and what ails it."""
        view = self._seen(view)
        total, embedded = self.store.vectors.coverage(view)
        reason = {"encoder_reason": self.encoder.reason} if view == EVERYTHING else {}
        return {
            **self.store.stats(view), "memories_without_vector": total - embedded.get(self.encoder.fingerprint, 0),
            "encoder": self.encoder.state, **reason,
        }  # fmt: skip

    def waiting_feedback(self, tenant: str | None) -> int:
        """Return how much feedback of a tenant, or of all for None, is for traces that are not there."""
        return self.store.waiting_feedback(tenant)

    def tenants(self, namespace: str) -> list[str]:
        """Return the tenants that have a namespace of this name."""
        return self.store.tenants(self._redactor.name(namespace))

    def has_tenant(self, tenant: str) -> bool:
        """Whether anything was ever recorded for a tenant."""
        return self.store.has_tenant(tenant)

    def _seen(self, view: View | Tenant) -> View:
        """Return a view by the names under which is stored what it shows."""
        return self._redactor.view(View.of(view))

    # -- looking after it --------------------------------------------------------------------------

    def probe(self, timeout_s: float = 5.0) -> None:
        """Write to the database and take it back. Raises StoreUnavailable."""
        try:
            self.store.write(lambda tx: tx.counters.probe()).result(timeout_s)
        except (TimeoutError, FutureTimeoutError):
            raise StoreUnavailable(f"the database did not answer within {timeout_s:g} seconds") from None

    def rebuild(self, *, accept_changes: bool = False) -> dict[str, int]:
        """Fold the whole log again; return how many traces were read and how many memories came of it.

        Raises StoreError where the seal shows that the log was changed from outside, unless that is to be accepted.
        """
        traces = self.store.rebuild(accept=accept_changes)
        self.store.check_seal()
        self._maintenance.wake()
        return {"traces": traces, "memories": self.store.stats()["memories"]}

    def reporters(self) -> list[dict[str, Any]]:
        """Return the reporters of feedback: name, how much they said, when last (Unix seconds), whether revoked."""
        names = ("reporter", "feedback", "last_at", "revoked")
        return [dict(zip(names, row, strict=True)) for row in self.store.reporters()]

    def revoke(self, reporter: str) -> dict[str, Any]:
        """Take back for good all that came of a reporter's feedback, and accept none any more.

        Returns how many traces it was on. Raises NotFound for a name that nothing was reported under.
        """
        if reporter not in {str(known["reporter"]) for known in self.reporters()}:
            raise NotFound(f"no reporter {reporter!r}")
        traces = self.store.write(lambda tx: fold.revoke(tx, reporter, self._clock())).result()
        return {"reporter": reporter, "traces": traces}

    def check_seal(self) -> list[str]:
        """Compare every row of the database with its seal; return what is wrong, nothing where it has none."""
        return self.store.check_seal()

    def counts(self, selection: Selection) -> dict[str, int]:
        """Return how much `forget` would delete."""
        return self.store.forgetting.chosen_counts(self._redactor.selection(selection))

    def forget(
        self, selection: Selection, *, with_set_aside: bool = False, progress: Callable[[str], None] = lambda _: None
    ) -> dict[str, Any]:
        """Delete a selection for good, and wait until its bytes are out of all files.

        Returns counts and, under `left`, what still holds text. Raises NotFound.
        """
        return erase.forget(
            self.store, self._redactor.selection(selection), with_set_aside=with_set_aside, progress=progress
        )

    def delete(self, selection: Selection) -> dict[str, Any]:
        """Delete a selection at once; its bytes are removed from all files in the background.

        Nothing of it is recalled or shown from now on. Returns what was deleted, and the receipt by which `erasure`
        tells whether its bytes are gone. Raises NotFound, and StoreUnavailable where it was not done in time: then a
        part of it may be deleted already, and the next deletion goes on with it.
        """
        try:
            deleted = erase.forget_rows(self.store, self._redactor.selection(selection))
        except (TimeoutError, FutureTimeoutError):
            raise StoreUnavailable("others write so much that this took too long; delete it again") from None
        receipt = str(deleted.pop("receipt"))
        self._maintenance.erase_soon()
        return {"deleted": deleted, **self.erasure(receipt), "left": self.store.set_aside(delete=False)}

    def erasure(self, receipt: str) -> dict[str, Any]:
        """Return whether the bytes of what was deleted with a receipt are out of all files. Raises NotFound."""
        return erase.erasure(self.store, receipt)

    def reembed(self, *, progress: Callable[[str], None] = lambda _: None) -> int:
        """Give every memory its vector by this encoder; return how many had none.

        Interrupted, it goes on where it was. Raises EncoderUnavailable.
        """
        return maintenance.reembed(self.store, self.encoder, progress=progress)

    def prune_vectors(self) -> int:
        """Delete the vectors of all other encoders; return how many there were."""
        return maintenance.prune_vectors(self.store, self.encoder.fingerprint)

    def compact(self, *, progress: Callable[[str], None] = lambda _: None) -> list[str]:
        """Give the disk back what was deleted; return what kept it from that."""
        return self.store.compact(progress=progress)

    def mend(self) -> dict[str, int]:
        """Delete rows that belong to nothing, and vectors of a wrong length; return how many by table."""
        settings = self.settings
        return verify.mend(self.store, settings.db if is_url(settings.db) else settings.path)

    def pause(self, timeout_s: float) -> bool:
        """Write nothing until `resume`; return whether no commit is under way any more."""
        return self.store.pause(timeout_s)

    def resume(self) -> None:
        """Go on after a `pause` that succeeded."""
        self.store.resume()
