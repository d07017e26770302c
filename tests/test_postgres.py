"""PostgreSQL: what many proxies learn at once, what a crash leaves, and how its users are told what is wrong."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import psycopg
import pytest
from builders import SCOPE, ask, body, feedback, response, trace
from postgres import Server, running
from test_store import add, say, verified

from optillm_memory import Memory, Settings, StoreError, StoreTooNew
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.settings import without_password
from optillm_memory.store import fold
from optillm_memory.store.base import Store
from optillm_memory.store.opening import open_store
from optillm_memory.store.postgres import schema as postgres_schema
from optillm_memory.store.postgres import store as postgres
from optillm_memory.store.postgres.connection import PostgresConnection
from optillm_memory.store.tables.vectors import key_hash
from optillm_memory.store.tables.words import scoped

T = TypeVar("T")
FORK = multiprocessing.get_context("spawn")


@pytest.fixture
def url(postgres: Server) -> str:
    """Give the URL of an empty database."""
    return postgres.fresh()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """Give a store on an empty database."""
    opened = opened_at(url)
    yield opened
    opened.close()


def opened_at(url: str) -> Store:
    """Open a store."""
    return open_store(url, queue_size=10_000, normal=normal_answer)


def memory_at(url: str, **values: Any) -> Memory:
    """Open a lexical memory without a holdout."""
    return Memory(Settings(**{"db": url, "encoder": "none", "holdout": 0.0, "reuse_audit": 0.0, **values}))


def rebuilt(store: Store) -> list[Any]:
    """Return what the log says, folded anew."""
    store.write(fold.rebuild).result(60)
    return comparable(store)


def comparable(store: Store) -> list[Any]:
    """Return the derived state less the numbers that a rebuild gives anew."""
    return sorted(repr(row) for row in store.derived())


def test_a_password_is_never_shown(postgres: Server) -> None:
    """Neither the place nor an error of a server that is not there tells the password."""
    url = "postgresql://me:secret@127.0.0.1:1/memory?sslmode=disable"
    assert without_password(url) == "postgresql://me@127.0.0.1:1/memory"
    store = opened_at(url)
    try:
        assert "secret" not in store.fault
        assert "127.0.0.1" in store.fault
        with pytest.raises(StoreError) as told:
            store.recall.revision()
        assert "secret" not in str(told.value)
    finally:
        store.close()


def test_a_newer_schema_is_refused(url: str) -> None:
    """A database that a later release wrote is named, with what to do; nothing in it is touched."""
    opened_at(url).close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("INSERT INTO agent_memory.migrations(name) VALUES ('p999_later')")
    with pytest.raises(StoreTooNew, match="p999_later"):
        opened_at(url)


def of_the_first_release(url: str, patching: pytest.MonkeyPatch) -> list[Any]:
    """Make a database as the first release left it, with something in it; return the state that is derived."""
    with patching.context() as patch:
        patch.setattr(postgres_schema, "_MIGRATIONS", dict(list(postgres_schema._MIGRATIONS.items())[:1]))
        with closing(PostgresConnection(url)) as old:
            postgres_schema.migrate(old, url)
    newest = opened_at(url)
    assert newest.fault == ""
    right, wrong = verified(newest, "restart the server"), add(newest, trace("stop the server", "rm"))
    say(newest, feedback(value=False, trace_id=wrong.trace_id))
    before = rebuilt(newest)
    newest.close()
    with psycopg.connect(url, autocommit=True, options="-c search_path=agent_memory,public") as db:
        said = db.execute("SELECT memory_id, trace_id, role, success, verified, contributions.answer "
                          "FROM contributions JOIN memories USING (number)").fetchall()  # fmt: skip
        assert sorted(row[1] for row in said) == sorted([right.trace_id, wrong.trace_id])
        db.execute("DELETE FROM memories WHERE status = 'unfounded'")
        db.execute("DROP TABLE contributions")
        columns = postgres_schema._CONTRIBUTIONS.replace("#TEXT", postgres_schema._TEXT)
        db.execute(f"CREATE TABLE contributions({columns})")
        db.execute("CREATE INDEX contributions_trace ON contributions(trace_id)")
        with db.cursor() as cursor:
            cursor.executemany("INSERT INTO contributions VALUES (%s, %s, %s, %s, %s, %s)", said)
        for column in ("continued", "continuation", "one_shot"):
            db.execute(f"ALTER TABLE traces DROP COLUMN {column}")
        for column in ("end_user", "goal"):
            db.execute(f"ALTER TABLE traces DROP COLUMN {column}")
        db.execute("ALTER TABLE traces DROP COLUMN asker")
        for column in ("reporter", "trust", "within_namespace", "within_user_id", "within_agent_id"):
            db.execute(f"ALTER TABLE feedback DROP COLUMN {column}")
        for table in ("feedback", "outcomes", "memories"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN valid_until")
        db.execute("DROP TABLE revoked")
        db.execute("DROP TABLE lines")
        db.execute("ALTER TABLE steps DROP COLUMN made")
        db.execute("ALTER TABLE prefixes DROP CONSTRAINT prefixes_pkey")
        db.execute("ALTER TABLE prefixes ADD PRIMARY KEY (scope_id, hash)")
        db.execute("ALTER TABLE prefixes ALTER COLUMN trace_id DROP NOT NULL")
        db.execute("DROP INDEX prefixes_trace")
        for index in ("steps_made_by ON steps(made_by)", "steps_step_id ON steps(step_id)"):
            db.execute(f"CREATE INDEX {index}")
        db.execute("CREATE INDEX injections_memory ON injections(memory_id)")
        db.execute("DELETE FROM migrations WHERE name <> 'p001_tables'")
    return before


def test_an_earlier_schema_comes_up_to_date(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of the first release keeps what was said of its memories, also of what was never right."""
    before = of_the_first_release(url, monkeypatch)
    again = opened_at(url)
    try:
        assert comparable(again) == before == rebuilt(again)
        more = add(again, trace("stop the server", "rm", episode_id="more"))
        say(again, feedback(trace_id=more.trace_id, feedback_id="fb-more"))
        (memory,) = [m for m in again.list_memories(None) if m.answer == "rm"]
        assert (memory.successes, memory.failures) == (1, 1)
    finally:
        again.close()


def killed_while_it_migrates(url: str, after: int) -> None:
    """Bring a database up, and be killed before the statement that comes after so many."""
    execute, done = PostgresConnection.execute, itertools.count()

    def until(connection: PostgresConnection, sql: str, values: Any = ()) -> Any:
        if next(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return execute(connection, sql, values)

    PostgresConnection.execute = until  # type: ignore[method-assign, assignment]
    with closing(PostgresConnection(url)) as connection:
        postgres_schema.migrate(connection, url)


def migrates(url: str, after: int) -> bool:
    """Return whether a process brought the database up before it was to be killed."""
    process = FORK.Process(target=killed_while_it_migrates, args=(url, after))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def test_one_killed_while_it_migrates_leaves_what_was_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any statement of a migration, the database is that of before, and the next one brings it up."""
    before = of_the_first_release(url, monkeypatch)
    killed = 0
    while not migrates(url, killed):
        killed += 1
        assert killed < 1_000
        with psycopg.connect(url, options="-c search_path=agent_memory,public") as db:
            assert db.execute("SELECT name FROM migrations").fetchall() == [("p001_tables",)]
            assert db.execute("SELECT count(memory_id) FROM contributions").fetchone() == (2,)
    assert killed > 8
    again = opened_at(url)
    try:
        assert comparable(again) == before == rebuilt(again)
    finally:
        again.close()


@pytest.mark.parametrize("after", [3, 20, 40])
def test_one_killed_while_it_makes_the_tables_leaves_none(url: str, after: int) -> None:
    """Of a database that was never whole nothing is there."""
    assert not migrates(url, after)
    assert not postgres_schema.is_there(url)
    with memory_at(url) as memory:
        assert ask(memory, "now it is", "yes").trace_id
        assert memory.store.stats()["traces"] == 1


def test_several_processes_may_open_a_new_database_at_once(url: str) -> None:
    """One of them makes the tables, all of them find them."""
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(opened_at, [url] * 6))
    assert [store.fault for store in stores] == [""] * 6
    assert [store.stats()["traces"] for store in stores] == [0] * 6
    for store in stores:
        store.close()


def test_the_nearest_of_a_scope_are_found_in_the_database(store: Store, url: str) -> None:
    """HNSW gives the nearest verified memories of one scope and one encoder, with their cosines."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, vector in enumerate(vectors):
        made = verified(store, f"task {number}")
        kept = [(key_hash(made.task), vector.tobytes())]
        store.write(lambda tx, kept=kept: tx.vectors.put(kept, "f")).result(10)  # type: ignore[misc]
    other = verified(store, "task of another", scope=SCOPE.__class__("other"))
    store.write(lambda tx: tx.vectors.put([(key_hash(other.task), vectors[0].tobytes())], "f")).result(10)
    deadline = time.monotonic() + 20
    while not (found := store.recall.nearest(SCOPE, "f", vectors[7], 5)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tasks = {number: memory.task for number, memory in store.recall.memories(SCOPE, [n for n, _ in found]).items()}
    cosines = vectors @ vectors[7]
    expected = np.argsort(-cosines)[:5]
    assert [tasks[n] for n, _ in found] == [f"task {i}" for i in expected]
    assert [c for _, c in found] == pytest.approx(cosines[expected], abs=2e-3)
    assert [c.vector for c in store.recall.changes(SCOPE, 0, "f", 1000)] == [v.tobytes() for v in vectors]
    with closing(opened_at(url)) as newcomer:  # who comes later does not wait for what is there
        assert newcomer.recall.nearest(SCOPE, "f", vectors[7], 5) == found


def test_words_are_looked_up_in_their_index_from_the_start(url: str) -> None:
    """Of a table that the server knows nothing about yet, too, a rare word is found without reading all of it."""
    with closing(opened_at(url)) as store, psycopg.connect(url, options="-c search_path=agent_memory") as db:
        number = store.write(lambda tx: tx.scopes.number(SCOPE)).result(10)
        filler = [scoped(number, f"filler{n}") for n in range(20)]
        db.execute("ALTER TABLE memories_fts SET (autovacuum_enabled = off)")
        with db.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO memories_fts(rowid, words) VALUES (%s, %s)",
                [(n, " ".join([scoped(number, f"word{n}"), *filler])) for n in range(5_000)],
            )
        db.commit()
        asked = (scoped(number, "word7"), 64)
        plan = db.execute(f"EXPLAIN SELECT {postgres._POSTINGS.replace('?', '%s')}", asked).fetchall()
        assert "memories_terms" in str(plan)
        with closing(PostgresConnection(url, read_only=True)) as reader:
            found = postgres._postings(reader, number, ["word7", "filler3", "nowhere"], 64)
    assert (found["word7"], found["nowhere"]) == ([7], [])
    assert len(set(found["filler3"])) == 64


def test_what_one_proxy_learns_another_recalls_within_a_second(url: str) -> None:
    """Feedback that one memory acknowledged is in the next recall of another."""
    with memory_at(url) as one, memory_at(url) as other:
        turn = ask(one, "restart the nginx server", "sudo systemctl restart nginx")
        one.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"})
        found = other.begin(body("restart the nginx server please"))
        assert [item.kind for item in found.injected] == ["exemplar"]


def test_many_proxies_learn_each_thing_once(url: str) -> None:
    """Four memories at once take feedback on the same traces: nothing is lost or doubled, all is as a rebuild says."""
    memories = [memory_at(url) for _ in range(4)]
    traces = [ask(memories[0], f"task number {n}", f"answer {n}").trace_id for n in range(20)]

    def told(which: int) -> None:
        for n, trace_id in enumerate(traces):
            memories[which].feedback(
                {
                    "trace_id": trace_id, "metric": "success", "value": True, "source": "code",
                    "feedback_id": f"{n}" if n % 2 else f"{n}-{which}",
                }
            )  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(told, range(4)))
    store = memories[0].store
    assert store.stats()["feedback"] == 10 + 40
    found = memories[1].store.list_memories(None, limit=100)
    assert [record.successes for record in found] == [1] * 20
    assert comparable(store) == rebuilt(store)
    for memory in memories:
        memory.close()


def killed_while_it_learns(url: str, said: Any) -> None:
    """Send feedback and tell what was acknowledged, until killed."""
    store = opened_at(url)
    for number in range(100_000):
        made = add(store, trace(f"task {number} of {os.getpid()}", "an answer"))
        say(store, feedback(trace_id=made.trace_id, feedback_id=f"fb-{os.getpid()}-{number}"))
        said.send(f"fb-{os.getpid()}-{number}")


def test_one_killed_while_it_learns_leaves_nothing_half_done(url: str) -> None:
    """What a proxy acknowledged before kill -9 is there once, and the rest of the state is what a rebuild gives."""
    with memory_at(url) as memory:
        acknowledged: set[str] = set()
        for _ in range(3):
            here, there = FORK.Pipe(duplex=False)
            process = FORK.Process(target=killed_while_it_learns, args=(url, there))
            process.start()
            there.close()
            for _ in range(8):
                assert here.poll(30)
                acknowledged.add(here.recv())
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join(30)
            while here.poll(0):
                try:
                    acknowledged.add(here.recv())
                except EOFError:
                    break
        with psycopg.connect(url, options="-c search_path=agent_memory") as connection:
            kept = [row[0] for row in connection.execute("SELECT feedback_id FROM feedback").fetchall()]
        assert len(acknowledged) >= 24
        assert acknowledged <= set(kept)
        assert len(kept) == len(set(kept))
        assert comparable(memory.store) == rebuilt(memory.store)
        assert ask(memory, "still there", "yes").trace_id


def until_it_works(attempt: Callable[[], T]) -> T:
    """Return what an attempt gives once the store is there again."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return attempt()
        except StoreError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_server_that_was_restarted_is_found_again() -> None:
    """After a crash of the server feedback is taken and memories are recalled again, by the same process."""
    with running() as server, memory_at(server.fresh()) as memory:
        turn = ask(memory, "restart the nginx server", "systemctl restart nginx")
        said = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"}
        memory.feedback(said)
        server.restart()
        until_it_works(lambda: memory.feedback({**said, "feedback_id": "later"}))
        assert until_it_works(lambda: memory.begin(body("restart the nginx server"))).action == "inject"


def test_threads_read_while_one_writes(url: str) -> None:
    """More threads than the pool has connections recall while feedback comes in; none fails."""
    with memory_at(url) as memory:
        turns = [ask(memory, f"restart server {n}", f"answer {n}") for n in range(10)]
        failed: list[BaseException] = []

        def recalls() -> None:
            try:
                for n in range(20):
                    memory.finish(memory.begin(body(f"restart server {n}")), response("x"))
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        threads = [threading.Thread(target=recalls) for _ in range(24)]
        for thread in threads:
            thread.start()
        for turn in turns:
            memory.feedback({"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "code"})
        for thread in threads:
            thread.join(60)
        memory.settle()
        assert failed == []
        assert memory.store.stats()["traces"] == 10 + 24 * 20
        assert memory.store.lost == 0


def test_errors_are_those_that_the_store_knows(url: str) -> None:
    """A statement that is wrong, and one record that is, raise as they do with SQLite."""
    from optillm_memory.store.sqlite import connection as sqlite

    connection = PostgresConnection(url)
    with pytest.raises(sqlite.OperationalError):
        connection.execute("SELECT nothing FROM nowhere")
    with pytest.raises(sqlite.IntegrityError):
        connection.execute("SELECT CAST(? AS BIGINT)", (1 << 70,))
    connection.close()
    assert connection.closed
    assert not connection.in_transaction
