"""Where it lives: one contract for every store, over a fixture of what opens them."""

from __future__ import annotations

import inspect
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import NOW, SCOPE, feedback, trace
from hypothesis import given, settings
from hypothesis import strategies as st

from optillm_memory import Feedback, InvalidField, Scope, StoreUnavailable
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.recall.retriever import Source
from optillm_memory.records import Injected, Placement, Step, Trace
from optillm_memory.store import fold
from optillm_memory.store.base import Store
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.selection import ForgettingReads
from optillm_memory.store.opening import open_store
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.tables.decisions import DecisionReads
from optillm_memory.store.tables.episodes import EpisodeReads
from optillm_memory.store.tables.exposures import ExposureReads
from optillm_memory.store.tables.fixes import FixReads
from optillm_memory.store.tables.memories import RecallReads
from optillm_memory.store.tables.proposals import ProposalReads
from optillm_memory.store.tables.traces import PENDING_S
from optillm_memory.store.tables.vectors import VectorReads, key_hash
from optillm_memory.store.transaction import Transaction

Opener = Callable[..., Store]
OTHERS = [Scope("b"), Scope("local", "other"), Scope("local", user_id="u"), Scope("local", agent_id="a")]


@pytest.fixture(params=["sqlite", "postgres"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Give what opens each kind of store, on one place; all are closed at the end."""
    opened: list[Store] = []
    place = request.getfixturevalue("postgres").fresh() if request.param == "postgres" else str(tmp_path / "memory.db")

    def open_one(**options: Any) -> Store:
        opened.append(open_store(place, **{"queue_size": 10_000, "normal": normal_answer, **options}))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    """Give one open store."""
    return opener()


def add(store: Store, made: Trace, steps: Sequence[Step] = (), **parts: Any) -> Trace:
    """Append a trace and learn from what waited for it."""

    def arrive(tx: Transaction) -> None:
        assert tx.add_trace(made, **parts)
        observed = tx.steps.add(tx.scopes.number(made.scope), made.episode_id, made.trace_id, steps)
        fold.trace_arrived(tx, made)
        fold.steps_arrived(tx, made, observed, received_at=made.created_at)

    store.write(arrive).result(10)
    return made


def say(store: Store, item: Feedback, *, tenant: str = "local", at: float = NOW) -> str:
    """Submit feedback; return its status."""
    return store.write(lambda tx: fold.feedback_arrived(tx, tenant, None, item, received_at=at)).result(10).status


def verified(store: Store, task: str = "list the files", answer: str = "ls", scope: Scope = SCOPE) -> Trace:
    """Add a trace with a verified answer."""
    made = add(store, trace(task, answer, scope=scope, episode_id=f"ep-{task}"))
    assert (
        say(store, feedback(trace_id=made.trace_id, feedback_id=f"fb-{made.trace_id}"), tenant=scope.tenant)
        == "applied"
    )
    return made


# -- round trips -----------------------------------------------------------------------------------

FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text(), st.text(), FLOATS, FLOATS, st.dictionaries(st.text(min_size=1), st.text()), st.booleans())
def test_a_trace_comes_back_as_it_was(
    task: str, answer: str, error: str, created_at: float, latency: float, tags: dict[str, str], held_out: bool
) -> None:
    """Any text, with NUL or astral characters, and any float survives the store."""
    made = trace(
        task,
        answer or None,
        error=error or None,
        created_at=created_at,
        latency_ms=latency,
        tags=tags,
        held_out=held_out,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "memory.db")
        try:
            store.write(lambda tx: tx.add_trace(made)).result(10)
            assert store.write(lambda tx: tx.traces.get(made.trace_id)).result(10) == made
            shown = store.trace(made.trace_id, "local")
        finally:
            store.close()
    assert shown is not None
    assert (shown["task"], shown["answer"], shown["tags"]) == (task, answer or None, tags)


def test_steps_ledger_and_injections_come_back(store: Store) -> None:
    """What belongs to a trace is read with it; an observation that comes later completes its step, once."""
    call = Step("c1", 0, "ls", '{"x": "\x00é"}', None, step_id="s1")
    seen = replace(call, observation="files")
    placement = Placement("h", 2, "turns", [{"role": "user", "content": "t"}], (Injected("m", "exemplar", 0.5, 3),))
    first = add(store, trace(), steps=[call], placements=[placement], injected=placement.items, prefixes=["p"])
    for observed in ("files", "changed"):
        add(store, trace(), steps=[replace(seen, observation=observed)], placements=[placement])
    shown = store.trace(first.trace_id, None)
    assert shown is not None
    assert [(s["arguments"], s["observation"]) for s in shown["steps"]] == [('{"x": "\x00é"}', "files")]
    assert [i["memory_id"] for i in shown["injected"]] == ["m"]
    assert store.episodes.ledger(SCOPE, first.episode_id) == [placement]
    assert [c.episode_id for c in store.episodes.episodes_of(SCOPE, "p")] == [first.episode_id]


def test_a_trace_is_appended_once(store: Store) -> None:
    """The log never changes a row: the same id again adds nothing."""
    made = add(store, trace())
    assert store.write(lambda tx: tx.add_trace(replace(made, answer="other"))).result(10) is False
    assert store.write(lambda tx: tx.traces.get(made.trace_id)).result(10) == made


# -- feedback --------------------------------------------------------------------------------------


def test_feedback_is_idempotent_and_conflicts_are_refused(store: Store) -> None:
    """The same id and content is a duplicate, other content is refused, and another tenant's id is its own."""
    made = add(store, trace())
    item = feedback(trace_id=made.trace_id)
    assert [say(store, item), say(store, item), say(store, replace(item, occurred_at=NOW + 1))] == [
        "applied", "duplicate", "duplicate",
    ]  # fmt: skip
    with pytest.raises(InvalidField, match="feedback_id"):
        say(store, replace(item, value=False))
    assert say(store, item, tenant="b") == "pending"
    assert store.stats()["feedback"] == 2


def test_a_retraction_is_final_whichever_comes_first(store: Store) -> None:
    """A retracted feedback does not act, also when it arrives after its retraction or again."""
    made = add(store, trace())
    item, gone = feedback(trace_id=made.trace_id), feedback(None)
    assert [say(store, gone), say(store, item), say(store, item), say(store, gone)] == [
        "retracted", "retracted", "duplicate", "retracted",
    ]  # fmt: skip
    shown = store.trace(made.trace_id, None)
    assert shown is not None
    assert shown["outcome"]["verdict"] == "unknown"


@pytest.mark.parametrize(("waited", "verdict"), [(PENDING_S - 1, "success"), (PENDING_S + 1, "unknown")])
def test_feedback_waits_seven_days_for_its_trace(store: Store, waited: float, verdict: str) -> None:
    """Feedback that came first acts when its trace comes within 7 days, and not after."""
    made = trace(created_at=NOW + waited)
    assert say(store, feedback(trace_id=made.trace_id)) == "pending"
    add(store, made)
    shown = store.trace(made.trace_id, None)
    assert shown is not None
    assert shown["outcome"]["verdict"] == verdict


def test_a_tenant_cannot_speak_of_anothers_traces(store: Store) -> None:
    """Another tenant's feedback changes nothing and learns nothing; the operator's counts."""
    made = add(store, trace())
    item = feedback(trace_id=made.trace_id)
    assert say(store, item, tenant="b") == "pending"
    store.write(fold.rebuild).result(10)
    assert store.list_memories(None) == []
    assert say(store, item, tenant="") == "applied"
    assert [m.status for m in store.list_memories(None)] == ["verified"]


def test_an_episodes_name_in_two_scopes_needs_the_scope(store: Store) -> None:
    """Feedback on an episode that several scopes have is refused until one is named."""
    for namespace in ("default", "other"):
        add(store, trace(scope=Scope("local", namespace), episode_id="same"))
    item = feedback(trace_id=None, episode_id="same")
    with pytest.raises(InvalidField, match="2 scopes"):
        say(store, item)
    arrived = store.write(lambda tx: fold.feedback_arrived(tx, "local", SCOPE, item, received_at=NOW))
    assert arrived.result(10).status == "applied"
    assert [m.scope for m in store.list_memories(None)] == [SCOPE]


# -- scope -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", OTHERS)
def test_no_read_crosses_a_scope(store: Store, other: Scope) -> None:
    """A memory of one scope is in no read of another, be it tenant, namespace, user or agent that differs."""
    made = add(store, trace(), prefixes=["p"], placements=[Placement("h", 0, "block", "B")])
    say(store, feedback(trace_id=made.trace_id))
    verified(store, "something else", scope=other)
    vector = b"\0" * 4
    store.write(lambda tx: tx.vectors.put([(key_hash(made.task), vector)], "f")).result(10)
    ((number, _),) = store.recall.lexical(SCOPE, ["files"], 5, alone=False)
    (memory,) = store.recall.memories(SCOPE, [number]).values()
    assert store.recall.lexical(other, ["files"], 5, alone=False) == []
    assert store.recall.memories(other, [number]) == {}
    assert store.recall.of_episode_alone(SCOPE, [memory.memory_id], made.episode_id) == {memory.memory_id}
    assert store.recall.of_episode_alone(other, [memory.memory_id], made.episode_id) == set()
    assert [c.vector for c in store.recall.changes(SCOPE, 0, "f", 10)] == [vector]
    assert [c.vector for c in store.recall.changes(other, 0, "f", 10)] == [None]
    assert number not in {c.number for c in store.recall.changes(other, 0, "f", 10)}
    assert store.episodes.episodes_of(other, "p") == []
    assert store.episodes.ledger(other, made.episode_id) == []
    if other.tenant != SCOPE.tenant:
        assert store.trace(made.trace_id, other.tenant) is None
        assert made.trace_id not in {t["trace_id"] for t in store.traces(other.tenant)}
        assert memory.memory_id not in {m.memory_id for m in store.list_memories(other.tenant)}


def test_every_read_for_recall_takes_a_scope(store: Store) -> None:
    """By reflection: recall's reads all take a scope first, what looks at texts takes a view, the rest is pinned."""
    for name, method in inspect.getmembers(Source, inspect.isfunction):
        if not name.startswith("_") and name not in ("revision", "read_ahead"):
            assert list(inspect.signature(method).parameters)[1] == "scope", name
    parts: list[type] = [Store]
    parts += [RecallReads, EpisodeReads, FixReads, ProposalReads, DecisionReads, ExposureReads, VectorReads]
    parts += [ForgettingReads]
    assert {type(part) for part in vars(store).values()} >= set(parts[1:])
    first: dict[str, str] = {}
    by_view = set()
    for name, method in (found for part in parts for found in inspect.getmembers(part, inspect.isfunction)):
        parameters = inspect.signature(method).parameters
        if not name.startswith("_"):
            first[name] = next(iter(list(parameters)[1:]), "")
            by_view |= {name} if "view" in parameters else set()
    unscoped = {name for name, parameter in first.items() if parameter != "scope"} - by_view
    assert by_view == {"trace", "traces", "list_memories", "episodes", "stats", "coverage"}
    assert unscoped == {
        "write", "post", "flush", "pause", "resume", "close",  # writing
        "salt", "tenants", "has_tenant", "reporters", "waiting_feedback",  # numbers and names, no texts
        "derived", "missing", "unused",  # upkeep: rebuild's comparison, and the encoder's
        "numbers_of", "last_number",
        "chosen", "chosen_counts", "chosen_scopes", "episodes_before", "held", "has_copies",  # forgetting: no texts
        "erasures", "is_unfinished", "copied", "empty_scopes", "errors_of", "warnings_of", "waiting",
        "outdate_indexes", "copy_wal", "erase", "compact", "set_aside",
        "index_files", "size_bytes", "read_ahead", "rebuild", "check_seal",
    }  # fmt: skip


def test_reading_ahead_goes_through_everything_and_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every memory and every posting is read once, in pieces; a server is left to itself."""
    monkeypatch.setattr("optillm_memory.store.sqlite.store._PIECE", 2)
    for number in range(5):
        verified(store, f"task {number}")
    pieces = len(list(store.recall.read_ahead()))
    assert pieces == 0 if not isinstance(store, SqliteStore) else pieces >= 3 + 3


# -- several processes' view -----------------------------------------------------------------------


def test_changes_are_seen_by_a_second_store(opener: Opener) -> None:
    """What one store learns, quarantines and rebuilds another on the same file finds by revision and generation."""
    one, two = opener(), opener()
    before = two.recall.revision()
    made = verified(one)
    after = two.recall.revision()
    assert after[0] == before[0]
    assert after[1] > before[1]
    (change,) = two.recall.changes(SCOPE, before[1], "f", 10)
    assert (change.vector, change.revision) == (None, after[1])
    one.write(lambda tx: tx.vectors.put([(key_hash(made.task), b"1234")], "f")).result(10)
    one.write(lambda tx: tx.exemplars.touch([change.number])).result(10)
    (again,) = two.recall.changes(SCOPE, after[1], "f", 10)
    assert again.vector == b"1234"
    say(one, replace(feedback(), trace_id=made.trace_id, feedback_id="no", source="human", value=False))
    (gone,) = two.recall.changes(SCOPE, again.revision, "f", 10)
    assert (gone.number, gone.vector) == (change.number, None)
    assert two.recall.memories(SCOPE, [gone.number]) == {}
    one.write(fold.rebuild).result(10)
    assert two.recall.revision()[0] > after[0]


def test_changes_come_in_whole_revisions(store: Store) -> None:
    """A limit never splits a revision, so that nothing is skipped when reading goes on after it."""
    for number in range(5):
        verified(store, f"task {number}")
    numbers = [c.number for c in store.recall.changes(SCOPE, 0, "f", 100)]
    store.write(lambda tx: tx.exemplars.touch(numbers)).result(10)
    assert len(store.recall.changes(SCOPE, 0, "f", 2)) == 5


def test_own_episode_is_no_evidence(store: Store) -> None:
    """A memory that rests on one episode alone is not for that episode; with another's success it is."""
    verified(store)
    (memory,) = store.list_memories(None)
    own = "ep-list the files"
    assert store.recall.of_episode_alone(SCOPE, [memory.memory_id], own) == {memory.memory_id}
    more = add(store, trace(episode_id="second"))
    say(store, feedback(trace_id=more.trace_id))
    assert store.recall.of_episode_alone(SCOPE, [memory.memory_id], own) == set()


def test_an_answer_that_was_never_right_is_no_memory(store: Store) -> None:
    """It is not listed, counted or searched; its failures count once another trace gives it and is right."""
    wrong = add(store, trace())
    say(store, feedback(value=False, trace_id=wrong.trace_id))
    assert store.list_memories(None) == []
    assert (store.stats()["memories"], store.stats()["memories_by_kind"]) == (0, {})
    assert [c.vector for c in store.recall.changes(SCOPE, 0, "f", 10)] in ([], [None])
    assert store.recall.lexical(SCOPE, ["list", "files"], 5, alone=True) == []
    for number, state in ((1, "quarantined"), (2, "verified")):
        right = add(store, trace(episode_id=f"right-{number}"))
        say(store, feedback(trace_id=right.trace_id, feedback_id=f"fb-right-{number}"))
        (memory,) = store.list_memories(None)
        assert (memory.status, memory.successes, memory.failures) == (state, number, 1)
    assert store.recall.lexical(SCOPE, ["list", "files"], 5, alone=True)
    before = store.derived()
    store.write(fold.rebuild).result(30)
    assert store.derived() == before


@pytest.mark.parametrize("demonstrated", ["ls", "ls -la"])
def test_a_memory_made_by_one_trace_is_what_a_rebuild_makes_of_it(store: Store, demonstrated: str) -> None:
    """What its first trace says of a memory is reckoned without reading it again: right, wrong, shown, used."""
    made = add(store, trace(), injected=[Injected("mem-unknown", "exemplar", 0.5, 9)])
    shown = feedback(demonstrated, trace_id=made.trace_id, metric="demonstration", source="human", feedback_id="shown")
    say(store, shown)
    say(store, feedback(value=demonstrated == "ls", trace_id=made.trace_id))
    (memory,) = store.list_memories(None)
    assert (memory.answer, memory.status, memory.successes) == (demonstrated, "verified", 1)
    before = store.derived()
    store.write(fold.rebuild).result(30)
    assert store.derived() == before


# -- the writer ------------------------------------------------------------------------------------


def blocked(store: Store) -> threading.Event:
    """Keep the writer busy until the event is set; return once it is."""
    busy, release = threading.Event(), threading.Event()

    def wait(_: Transaction) -> None:
        busy.set()
        assert release.wait(10)

    store.post(wait)
    assert busy.wait(10)
    return release


def on_disk(store: Store) -> int:
    """Count the traces that another connection can see."""
    return int(store.stats()["traces"])


def test_nothing_is_acknowledged_before_its_commit(store: Store) -> None:
    """Records share a commit, and the first of them is not acknowledged while the last is still being written."""
    release = blocked(store)
    first = store.write(lambda tx: tx.add_trace(trace()))
    seen: list[tuple[bool, int]] = []
    last = store.write(lambda _: seen.append((first.done(), on_disk(store))))
    release.set()
    assert first.result(10) is True
    last.result(10)
    assert seen == [(False, 0)]
    assert on_disk(store) == 1


def test_a_full_queue_refuses_and_counts(opener: Opener) -> None:
    """What finds no room is refused at once, or dropped and counted where nobody waits; what had room is written."""
    store = opener(queue_size=2)
    release = blocked(store)
    kept = [store.write(lambda tx: tx.add_trace(trace())) for _ in range(2)]
    with pytest.raises(StoreUnavailable, match="waiting"):
        store.write(lambda tx: tx.add_trace(trace()))
    store.post(lambda tx: tx.add_trace(trace()))
    assert store.lost == 1
    release.set()
    assert [future.result(10) for future in kept] == [True, True]
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.write(lambda tx: tx.add_trace(trace()))


def test_one_bad_record_does_not_take_the_others(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """An operation that breaks is rolled back alone; its neighbours in the same commit stay, and it is counted."""

    def clash(tx: Transaction) -> None:
        tx.add_trace(trace(trace_id="half"))
        tx.db.execute("INSERT INTO meta(key, value) VALUES ('revision', 1)")

    def overflow(tx: Transaction) -> None:
        tx.add_trace(trace(trace_id="half", prompt_tokens=1 << 70))

    release = blocked(store)
    before = store.write(lambda tx: tx.add_trace(trace()))
    broken = [store.write(clash), store.write(overflow)]
    store.post(clash)
    after = store.write(lambda tx: tx.add_trace(trace()))
    release.set()
    assert before.result(10) is after.result(10) is True
    for future in broken:
        assert future.exception(10) is not None
    assert on_disk(store) == 2
    assert store.lost == 1
    assert "could not be written" in caplog.text


def test_what_a_refused_record_read_is_not_used_by_others(store: Store) -> None:
    """A scope that was made by a record which was then refused is made again by the next one."""
    scope = Scope("fresh")

    def refused(tx: Transaction) -> None:
        tx.scopes.number(scope)
        tx.exemplars.touch([])
        raise InvalidField("feedback", "is refused")

    release = blocked(store)
    made = trace(scope=scope)
    first, second = store.write(refused), store.write(lambda tx: tx.add_trace(made))
    release.set()
    with pytest.raises(InvalidField, match="is refused"):
        first.result(10)
    assert second.result(10) is True
    assert store.trace(made.trace_id, "fresh") is not None
    before = store.recall.revision()
    store.write(lambda tx: tx.exemplars.touch([])).result(10)
    assert store.recall.revision() == before._replace(revision=before.revision + 1)


def test_a_scope_dropped_in_a_commit_is_made_again_in_it(store: Store) -> None:
    """Forgetting takes the names of empty scopes away; what comes after it in the same commit finds them anew."""
    made = trace(scope=Scope("fresh"))

    def both(tx: Transaction) -> bool:
        assert deletion.delete_scopes(tx, [tx.scopes.number(made.scope)], 0) == 1
        return tx.add_trace(made)

    assert store.write(both).result(10) is True
    assert store.trace(made.trace_id, "fresh") is not None


def test_changes_of_a_commit_share_revisions_up_to_a_bound(store: Store) -> None:
    """Whoever reads changes in parts gets parts of a bounded size, also of what one long commit learned."""

    def many(tx: Transaction) -> None:
        for number in range(600):
            made = trace(f"task {number}", "an answer", episode_id=f"ep-{number}")
            tx.add_trace(made)
            said = feedback(trace_id=made.trace_id, feedback_id=f"fb-{number}")
            fold.feedback_arrived(tx, "local", None, said, received_at=NOW)

    store.write(many).result(60)
    shares = Counter(change.revision for change in store.recall.changes(SCOPE, 0, "", 10_000))
    assert sum(shares.values()) == 600
    assert 1 < len(shares) < 10
    assert max(shares.values()) <= 256
    since, seen = 0, 0
    while part := store.recall.changes(SCOPE, since, "", 100):
        assert len(part) < 100 + 256
        since, seen = part[-1].revision, seen + len(part)
    assert seen == 600
