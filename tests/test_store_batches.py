"""One commit for many records: reading ahead and writing together change nothing but the time that it takes."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import NOW, SCOPE, feedback, trace
from test_store import blocked

from optillm_memory import Feedback, InvalidField, Scope
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.records import Injected, Step, Trace
from optillm_memory.store import fold
from optillm_memory.store.announced import Announced, Arrival, Submission
from optillm_memory.store.base import Store
from optillm_memory.store.opening import open_store
from optillm_memory.store.postgres.connection import PostgresConnection
from optillm_memory.store.transaction import Transaction

Operation = Callable[[Transaction], Any]
LONG_S = 60


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Give what makes an empty place for each kind of store."""
    with tempfile.TemporaryDirectory() as folder:
        made = iter(range(1 << 20))
        if request.param == "postgres":
            yield request.getfixturevalue("postgres").fresh
        else:
            yield lambda: str(Path(folder) / f"{next(made)}.db")


def opened(place: str) -> Store:
    """Open a store."""
    return open_store(place, queue_size=10_000, normal=normal_answer)


def arrival(made: Trace, steps: list[Step], injected: list[Injected]) -> Announced[None]:
    """Return the operation that records a trace."""

    def arrive(tx: Transaction) -> None:
        if tx.add_trace(made, prefixes=[f"p-{made.trace_id}"], injected=injected):
            tx.vectors.put([(made.task, bytes(8))], "encoder")
            observed = tx.steps.add(tx.scopes.number(made.scope), made.episode_id, made.trace_id, steps)
            fold.trace_arrived(tx, made)
            fold.steps_arrived(tx, made, observed, received_at=made.created_at)

    return Announced(arrive, [Arrival(made.trace_id, made.episode_id)])


def submission(item: Feedback, *, tenant: str = "local") -> Announced[Any]:
    """Return the operation that submits feedback."""

    def submit(tx: Transaction) -> str:
        try:
            return fold.feedback_arrived(tx, tenant, None, item, received_at=NOW + 60).status
        except InvalidField:
            return "refused"

    return Announced(submit, feedback=[Submission(tenant, item.feedback_id, item.trace_id)])


def drawn(seed: int) -> list[Announced[Any]]:
    """Draw a log: few episodes, tasks and answers, so that records of one commit concern each other."""
    rng = random.Random(seed)
    found: list[Announced[Any]] = []
    for number in range(rng.randint(4, 14)):
        one_shot = rng.random() < 0.7
        made = trace(
            rng.choice(["list the files", "count the lines", "say hello"]),
            rng.choice(["ls", "wc -l", "hello", None]),
            trace_id=f"t{number}",
            episode_id=rng.choice(["ep-1", "ep-2", f"ep-of-{number}", f"ep-of-{number}"]),
            scope=rng.choice([SCOPE, SCOPE, Scope("local", "other")]),
            created_at=NOW + number,
            one_shot=one_shot,
            messages='[{"role": "user", "content": "do it"}]',
        )
        steps = [] if one_shot else [Step(f"c{number}", 0, "ls", "{}", "files", step_id=f"s{number}")]
        injected = [Injected("mem-unknown", "exemplar", 0.5, 9)] if rng.random() < 0.2 else []
        found.append(arrival(made, steps, injected))
        if rng.random() < 0.1:
            found.append(arrival(made, steps, injected))  # the same again
    for number in range(rng.randint(4, 20)):
        on = f"t{rng.randrange(14)}"
        kind = rng.random()
        whole = rng.random() < 0.2
        item = feedback(
            rng.choice([True, True, False]),
            feedback_id=f"f{rng.randrange(16)}" if kind < 0.3 else f"f-{number}",
            trace_id=None if whole else on,
            episode_id=rng.choice(["ep-1", f"ep-of-{on[1:]}"]) if whole else None,
            source=rng.choice(["code", "human", "llm"]),
            occurred_at=NOW + rng.randrange(100),
        )
        if kind > 0.9:
            item = feedback("ls -la", feedback_id=f"f-{number}", trace_id=on, metric="demonstration", source="human")
        found.append(submission(item))
        if rng.random() < 0.15:
            found.append(submission(feedback(None, feedback_id=item.feedback_id, trace_id=None)))
    if rng.random() < 0.5:
        rng.shuffle(found)
    return found


def written(place: str, operations: list[Announced[Any]], sizes: Callable[[], int], *, announced: bool) -> list[Any]:
    """Write a log in commits of some sizes; return what each record got, and all that was derived, rebuilt alike."""
    store = opened(place)
    try:
        results: list[Any] = []
        rest = list(operations)
        while rest:
            count = sizes()
            part, rest = rest[:count], rest[count:]
            release = blocked(store)
            futures = [store.write(item if announced else item.operation) for item in part]
            release.set()
            results += [future.result(LONG_S) for future in futures]
        derived = [sorted(map(repr, store.derived())), sorted(_words(store)), store.stats()["feedback"]]
        store.write(fold.rebuild).result(LONG_S)
        assert sorted(map(repr, store.derived())) == derived[0]
        assert sorted(_words(store)) == derived[1]
        return [results, derived]
    finally:
        store.close()


def _words(store: Store) -> list[tuple[str, str]]:
    with store._readers.borrow() as db:
        return db.execute(
            "SELECT memory_id, words FROM memories_fts JOIN memories ON number = memories_fts.rowid"
        ).fetchall()


@pytest.mark.parametrize("seed", range(12))
def test_a_commit_of_many_is_as_many_commits(place: Callable[[], str], seed: int) -> None:
    """Records that are read ahead and written together have the same results as each alone, and as a rebuild."""
    operations, rng = drawn(seed), random.Random(seed)
    alone = written(place(), operations, lambda: 1, announced=False)
    assert written(place(), operations, lambda: 1 << 10, announced=True) == alone
    assert written(place(), operations, lambda: rng.randint(1, 5), announced=True) == alone


def test_feedback_of_a_large_commit_counts_whenever_it_comes(place: Callable[[], str]) -> None:
    """Two reports on one trace of a commit of hundreds both count, however many traces came in between."""
    store = opened(place())
    try:
        release = blocked(store)
        for number in range(200):
            store.post(arrival(trace(f"task {number}", "ls", trace_id=f"t{number}", episode_id=f"e{number}"), [], []))
        reports = [
            store.write(submission(feedback(value, trace_id="t0", feedback_id=f"f{value}", occurred_at=NOW + value)))
            for value in (True, False)
        ]
        release.set()
        assert [report.result(LONG_S) for report in reports] == ["applied", "applied"]
        before = store.derived()
        store.write(fold.rebuild).result(LONG_S)
        assert store.derived() == before
    finally:
        store.close()


def test_a_bad_row_that_was_deferred_is_refused_alone(place: Callable[[], str]) -> None:
    """What fails only when the rows of a commit are written takes no other record with it."""
    store = opened(place())
    try:
        release = blocked(store)
        good = [store.write(arrival(trace(trace_id=f"t{n}", episode_id=f"e{n}"), [], [])) for n in range(3)]
        bad = [
            store.write(lambda tx: tx.db.later("INSERT INTO meta(key, value) VALUES (?, ?)", [("revision", 1)])),
            store.write(arrival(trace(trace_id="huge", episode_id="h", prompt_tokens=1 << 70), [], [])),
        ]
        more = store.write(submission(feedback(trace_id="t0")))
        release.set()
        assert [future.result(LONG_S) for future in good] == [None] * 3
        assert more.result(LONG_S) == "applied"
        assert all(future.exception(LONG_S) is not None for future in bad)
        assert store.stats()["traces"] == 3
        assert store.fault == ""
    finally:
        store.close()


def test_what_was_deferred_is_seen_by_the_next_statement(place: Callable[[], str]) -> None:
    """A commit reads what it has deferred, and a transaction that is undone leaves nothing of it."""
    store = opened(place())

    def read(tx: Transaction) -> int:
        tx.db.later("INSERT INTO forgotten VALUES (?, ?)", [(f"m{n}", 1.0) for n in range(700)])
        return int(tx.db.execute("SELECT count(*) FROM forgotten").fetchone()[0])

    def undone(tx: Transaction) -> None:
        tx.db.later("INSERT INTO forgotten VALUES (?, ?)", [("undone", 1.0)])
        raise InvalidField("feedback", "is refused")

    try:
        assert store.write(read).result(LONG_S) == 700
        with pytest.raises(InvalidField):
            store.write(undone).result(LONG_S)
        assert store.write(lambda tx: tx.db.execute("SELECT count(*) FROM forgotten").fetchone()[0]).result(30) == 700
    finally:
        store.close()


@pytest.fixture
def waits_of(postgres: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Callable[..., int]]]:
    """Give a store on a server, and what posts operations for one commit and returns how many statements it took."""
    store, waited = opened(postgres.fresh()), []
    execute = PostgresConnection.execute

    def counted(connection: PostgresConnection, sql: str, values: Any = (), **options: Any) -> Any:
        waited.append(sql)
        return execute(connection, sql, values, **options)

    def commit(numbers: range, *kinds: Callable[[int], Any]) -> int:
        release = blocked(store)
        for n in numbers:
            for kind in kinds:
                store.post(kind(n))
        monkeypatch.setattr(PostgresConnection, "execute", counted)
        waited.clear()
        release.set()
        store.write(lambda _: None).result(LONG_S)
        monkeypatch.undo()
        return len(waited)

    yield store, commit
    store.close()


def asked(n: int) -> Any:
    """Return the arrival of a plain request."""
    return arrival(trace(f"task {n}", "ls", trace_id=f"t{n}", episode_id=f"e{n}"), [], [])


def reported(n: int) -> Any:
    """Return the report that its answer was right."""
    return submission(feedback(trace_id=f"t{n}", feedback_id=f"f{n}"))


def verified(store: Store) -> int:
    """Return how many memories are verified."""
    return len([m for m in store.list_memories(None, limit=1_000) if m.status == "verified"])


def test_a_commit_takes_a_few_round_trips_however_many_records_it_has(
    waits_of: tuple[Store, Callable[..., int]],
) -> None:
    """On a server the statements that a commit waits for are as many for 200 new records as for 20."""
    store, commit = waits_of
    few = commit(range(20), asked, reported)
    assert commit(range(1_000, 1_200), asked, reported) <= few
    assert few < 20
    assert verified(store) == 220


def test_feedback_on_an_earlier_plain_request_is_read_with_others(waits_of: tuple[Store, Callable[..., int]]) -> None:
    """Reports on plain one-shot requests of earlier commits take as many statements for forty as for four."""
    store, commit = waits_of
    for n in range(44):
        store.post(asked(n))
    store.flush()
    assert commit(range(4, 44), reported) <= commit(range(4), reported)
    assert verified(store) == 44
