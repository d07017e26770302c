"""PostgreSQL: what proxies do to each other on one server, and what the server keeps by itself."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np
import psycopg
import pytest
from builders import SCOPE
from postgres import Server
from test_postgres import opened_at
from test_store import verified

from optillm_memory.store import postgres
from optillm_memory.store.base import Store

DIMENSION, VECTORS = 64, 3_000


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
    return bool(store.nearest(SCOPE, fingerprint, np.ones(DIMENSION, np.float32), 5))


def test_many_proxies_build_each_index_once(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Proxies that recall at once, with two encoders between them, get both indexes, and none fails another's build."""
    monkeypatch.setattr(postgres, "_LOOK_AGAIN_S", 0.5, raising=False)
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
    monkeypatch.setattr(postgres, "_LOOK_AGAIN_S", 0.1)
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
