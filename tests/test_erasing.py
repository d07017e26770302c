"""Erasing: a DELETE rewrites nothing and holds nobody up, and its receipt tells when no byte is left in any file."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from builders import SCOPE, ask, body, feedback, hashing_memory, lexical_memory, response, teach, tell, trace
from postgres import Server

from optillm_memory import NotFound, Scope, StoreUnavailable
from optillm_memory.records import Trace
from optillm_memory.store import fold
from optillm_memory.store.maintenance import erase as erasing
from optillm_memory.store.maintenance import forget as deletion
from optillm_memory.store.maintenance.erase import erase, forget, forget_rows
from optillm_memory.store.maintenance.selection import Selection
from optillm_memory.store.sqlite import connection as connections
from optillm_memory.store.sqlite.connection import Connection, connect, copy_wal
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.pages import scrub, unused
from optillm_memory.store.sqlite.store import SqliteStore
from optillm_memory.store.sqlite.writer import SqliteWriter
from optillm_memory.store.transaction import Transaction

SECRET = "zwitscherlich"  # no word of any other text
LONG_S = 60.0


def holding(folder: Path, text: str = SECRET) -> list[str]:
    """Return the files below a folder that hold a text, in any case."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if text.lower().encode() in path.read_bytes().lower()]


def until(condition: Callable[[], Any], timeout_s: float = LONG_S) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def put(traces: list[Trace], tx: Transaction) -> None:
    """Write traces."""
    for one in traces:
        tx.add_trace(one)


def number_of(path: Path, pragma: str) -> int:
    """Return what a pragma of a file says."""
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute(f"PRAGMA {pragma}").fetchone()[0])


# -- receipts --------------------------------------------------------------------------------------


def test_a_delete_is_answered_at_once_and_its_receipt_tells_the_end(tmp_path: Path) -> None:
    """Rows are gone with the answer, the bytes within the stated time, and the file was not written anew for it."""
    with hashing_memory(tmp_path) as memory:
        turns = [teach(memory, f"say {SECRET} {n} " + "padding " * 400, f"{SECRET} {n}") for n in range(30)]
        done = memory.delete(Selection(namespace="default", tenant="local"))
        assert done["deleted"] == {"traces": 30, "pending_feedback": 0}
        assert (done["status"], done["left"]) == ("erasing", [])
        assert memory.store.trace(turns[0].trace_id, None) is None
        assert memory.stats()["memories"] == 0
        until(lambda: memory.erasure(done["receipt"])["status"] == "done", done["erased_within_s"])
        assert holding(tmp_path) == []
        assert number_of(tmp_path / "memory.db", "freelist_count") > 50  # the pages are there, and free
        for receipt in ("0", "-1", "x", str(int(done["receipt"]) + 1)):
            with pytest.raises(NotFound):
                memory.erasure(receipt)


def test_eight_at_once_all_succeed(tmp_path: Path) -> None:
    """Deletions by several callers at the same moment, while others ask and judge, succeed and are erased together."""
    with hashing_memory(tmp_path) as memory:
        for n in range(8):
            teach(memory, f"{SECRET} {n}", f"{SECRET} of {n}", tenant=f"tenant-{n}")
        erasures: list[int] = []
        original = memory.store.erase

        def counted(**keywords: Any) -> list[str]:
            erasures.append(1)
            return original(**keywords)

        memory.store.erase = counted  # type: ignore[method-assign]
        with ThreadPoolExecutor(9) as pool:
            chosen = [Selection(tenant=f"tenant-{n}", namespace="default") for n in range(8)]
            asked = pool.submit(lambda: [teach(memory, f"meanwhile {n}", "yes") for n in range(20)])
            done = list(pool.map(memory.delete, chosen))
            asked.result(LONG_S)
        assert [d["deleted"]["traces"] for d in done] == [1] * 8
        until(lambda: {memory.erasure(d["receipt"])["status"] for d in done} == {"done"})
        assert len(erasures) < 8
        assert holding(tmp_path) == []
        assert memory.stats()["traces"] == 20


def test_an_erasure_that_was_interrupted_is_done_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the rows and the bytes, the receipt stands: the next one that opens the file does the rest."""
    with lexical_memory(tmp_path) as memory:
        turn = teach(memory, f"say {SECRET}", "no")
        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "erase", lambda *_, **__: ["it was killed"])
            receipt = memory.delete(Selection(trace_id=turn.trace_id))["receipt"]
            erase(memory.store)
        assert memory.store.forgetting.is_unfinished()
        files = memory.store.index_files()
        assert files is not None
        with files.draft(files.name(Scope("whoever"), "f")) as draft:  # it may hold vectors of what is gone
            assert draft is not None
            draft.file.write(b"vectors")
            draft.commit()
        memory._maintenance.close()
    with lexical_memory(tmp_path) as memory:
        until(lambda: memory.erasure(receipt)["status"] == "done")
        assert holding(tmp_path) == []
        assert not files.exists(files.name(Scope("whoever"), "f"))


def test_an_erasure_that_was_under_way_does_not_count_for_a_later_deletion(tmp_path: Path) -> None:
    """What is deleted while the bytes of earlier deletions are erased needs an erasure of its own."""
    with closing(SqliteStore(tmp_path / "memory.db")) as store:
        for text in ("one", SECRET):
            store.write(partial(put, [trace(text, episode_id=text)])).result(10)
        first = forget_rows(store, Selection(episode_id="one"))["receipt"]
        original, later = store.erase, list[int]()

        def meanwhile(**keywords: Any) -> list[str]:
            later.append(forget_rows(store, Selection(episode_id=SECRET))["receipt"])
            return original(**keywords)

        store.erase = meanwhile  # type: ignore[method-assign]
        erase(store)
        asked, erased = store.forgetting.erasures()
        assert first <= erased < later[0] == asked


def test_a_server_erases_without_writing_its_tables_anew(postgres: Server, tmp_path: Path) -> None:
    """On PostgreSQL no table gets a new file by a DELETE, and the receipt tells that dead rows are taken out."""
    with hashing_memory(tmp_path, db=postgres.fresh()) as memory:
        turn = teach(memory, f"say {SECRET}", "no")

        def files() -> list[Any]:
            with memory.store._readers.borrow() as db:
                return list(db.execute("SELECT pg_relation_filenode('agent_memory.traces')").fetchall())

        before = files()
        done = memory.delete(Selection(trace_id=turn.trace_id))
        until(lambda: memory.erasure(done["receipt"])["status"] == "done")
        assert files() == before
        assert memory.store.compact(progress=lambda _: None) == []
        assert files() != before


# -- who waits -------------------------------------------------------------------------------------


def test_who_writes_waits_for_no_deletion(tmp_path: Path) -> None:
    """While a large namespace is deleted and erased, every commit is short: no write waits long for its turn."""
    with closing(SqliteStore(tmp_path / "memory.db")) as store:
        for start in range(0, 3_000, 500):
            many = [trace(f"task {n} " * 40, "no", episode_id=f"e{n % 700}") for n in range(start, start + 500)]
            store.write(partial(put, many)).result(LONG_S)
        ended, waits = threading.Event(), list[float]()

        def write() -> None:
            while not ended.is_set():
                started = time.perf_counter()
                store.write(lambda tx: tx.counters.probe()).result(LONG_S)
                waits.append(time.perf_counter() - started)
                time.sleep(0.005)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert forget(store, Selection(namespace="default"))["traces"] == 3_000
        finally:
            ended.set()
            writer.join()
    waits.sort()
    assert len(waits) > 20
    assert waits[len(waits) // 2] < 0.1
    assert waits[-1] < 2.0  # on a machine that does much else; in one commit it were many seconds


def test_between_two_commits_of_a_deletion_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of a deletion ends when its time is up; what was queued meanwhile is written before the next one."""
    order: list[tuple[str, int]] = []
    seconds = itertools.count(0.0, erasing._SLICE_S / 4)  # by the time of the test each part takes a quarter
    monkeypatch.setattr(erasing, "clock", lambda: next(seconds))
    with closing(SqliteStore(tmp_path / "memory.db")) as store:
        store.write(partial(put, [trace(f"task {n}", "no", episode_id=f"e{n // 2}") for n in range(100)])).result(10)
        store.write(partial(put, [trace("long", "no", episode_id="f") for _ in range(20)])).result(10)
        original = deletion.delete_traces

        def observed(tx: Transaction, ids: Sequence[str], now: float) -> int:
            order.append(("deletion", len(ids)))
            store.post(lambda _: order.append(("other", 1)))
            return original(tx, ids, now)

        monkeypatch.setattr(deletion, "delete_traces", observed)
        assert forget_rows(store, Selection(namespace="default"))["traces"] == 120
    runs = [[size for _, size in run] for kind, run in itertools.groupby(order, key=itemgetter(0)) if kind != "other"]
    # Short episodes are deleted together, a long one by itself.
    assert runs == [[8] * 4] * 3 + [[4, 20]]


def test_feedback_that_waits_is_deleted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what waits for traces that never came no commit deletes more than a bounded number of rows."""
    parts: list[int] = []
    original = deletion.delete_waiting

    def observed(tx: Transaction, numbers: Sequence[int]) -> int:
        parts.append(len(numbers))
        return original(tx, numbers)

    monkeypatch.setattr(deletion, "delete_waiting", observed)
    with closing(SqliteStore(tmp_path / "memory.db")) as store:

        def wait(tx: Transaction) -> None:
            for n in range(250):
                given = feedback(feedback_id=f"f{n}", trace_id=None, episode_id=f"e{n}")
                fold.feedback_arrived(tx, "local", SCOPE, given, received_at=1.0)

        store.write(wait).result(10)
        assert forget_rows(store, Selection(namespace="default"))["pending_feedback"] == 250
    assert parts == [100, 100, 50]


def test_who_deletes_copies_the_wal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is copied and the WAL cut off without a commit that waits for it, unless somebody reads it."""
    path = tmp_path / "memory.db"
    wal = tmp_path / "memory.db-wal"
    with closing(SqliteStore(path)) as store, closing(connect(path, read_only=True)) as reader:
        store.write(partial(put, [trace("a task " * 1_000, episode_id="one")])).result(10)
        store.copy_wal()
        assert wal.stat().st_size > 0  # so little is left as it is
        monkeypatch.setattr("optillm_memory.store.sqlite.store._COPIED_BYTES", 0)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM traces").fetchone()
        store.write(partial(put, [trace("another", episode_id="two")])).result(10)
        store.copy_wal()
        assert wal.stat().st_size > 0
        reader.execute("COMMIT")
        store.copy_wal()
        assert wal.stat().st_size == 0
    copy_wal(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize("kind", ["rows", "copies"])
def test_no_statement_of_a_deletion_reads_a_whole_table(tmp_path: Path, kind: str) -> None:
    """Whatever the size of the store, a commit that deletes finds its rows by an index."""
    with hashing_memory(tmp_path) as memory:
        said: list[Any] = ["install it"]
        for number, output in enumerate(("ERROR: no such package here\nexit code: 1", "ok\nexit code: 0", "done")):
            call = {
                "id": f"c{number}",
                "type": "function",
                "function": {"name": "bash", "arguments": f'{{"command": "pip {number}"}}'},
            }
            made = {"role": "assistant", "content": None, "tool_calls": [call]}
            turn = memory.begin(body(*said))
            memory.finish(turn, response(made))
            said += [made, {"role": "tool", "tool_call_id": f"c{number}", "content": output}]
        taught = teach(memory, "what is the codename?", SECRET)
        copied = memory.begin(body("what is the codename?"))
        memory.finish(copied, response("I do not know"))
        memory.settle()
        ids = [t["trace_id"] for t in memory.store.traces(None)]
        assert len(ids) == 5
        assert memory.trace(copied.trace_id)["injected"]

        def traced(tx: Transaction) -> list[str]:
            statements: list[str] = []
            if kind == "copies":
                deletion.delete_traces(tx, [taught.trace_id], time.time())
            tx.db.set_trace_callback(statements.append)
            try:
                if kind == "rows":
                    deletion.delete_traces(tx, ids, time.time())
                else:
                    assert deletion.withdraw_copies(tx, [copied.trace_id]) == 1
            finally:
                tx.db.set_trace_callback(None)
            return [sql for sql in statements if not sql.startswith("--")]

        statements = memory.store.write(traced).result(LONG_S)
        assert len(statements) > 15
        with memory.store._readers.borrow() as db:
            plans = {sql: [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")] for sql in statements}
    scanned = {
        sql: plan for sql, plan in plans.items() for step in plan if re.match(rf"SCAN ({'|'.join(LARGE)})\b", step)
    }
    assert scanned == {}


LARGE = (
    *("traces", "steps", "attempts", "feedback", "prefixes", "ledger", "injections", "contributions", "outcomes"),
    *("memories", "vectors", "proposals", "labels", "decisions", "rewards", "exposures", "calls", "fix_evidence"),
)


def test_jobs_of_a_closed_writer_are_refused(tmp_path: Path) -> None:
    """Nobody waits for what will never be done."""
    writer = SqliteWriter(tmp_path / "memory.db", queue_size=10)
    assert writer.apart(lambda db: db.in_transaction).result(10) is False
    with pytest.raises(ZeroDivisionError):
        writer.apart(lambda _: 1 // 0).result(10)
    writer.close()
    with pytest.raises(StoreUnavailable):
        writer.apart(lambda _: None)


# -- bytes -----------------------------------------------------------------------------------------


def word(number: int) -> str:
    """Return the word that stands for a row."""
    return f"q{number:06d}z"


def key(number: int) -> str:
    """Return the key of a row: in no order, so that rows are moved between pages to make room."""
    return f"{random.Random(number).random():.12f}"


def change(db: Connection, rng: random.Random, live: set[int], numbers: range) -> None:
    """Put rows of many sizes, and delete some."""
    db.execute("BEGIN")
    for number in numbers:
        text = "x" * rng.choice((0, 10, 100, 300)) + word(number)
        db.execute("INSERT INTO texts VALUES (?, ?)", (key(number), text))
    db.execute("COMMIT")
    live.update(numbers)
    gone = set(rng.sample(sorted(live), min(len(live), rng.randint(1, 20))))
    db.executemany("DELETE FROM texts WHERE key = ?", [(key(number),) for number in gone])
    live -= gone


def test_no_copy_is_left_that_moving_rows_made(tmp_path: Path) -> None:
    """SQLite's secure_delete alone leaves copies in unused parts of pages; afterwards none is there, nor comes back."""
    path, rng = tmp_path / "texts.db", random.Random(5)
    live: set[int] = set()
    left_before = 0
    with closing(connect(path)) as one, closing(connect(path)) as other:
        one.execute("PRAGMA journal_mode=WAL")
        for db in (one, other):
            db.execute("PRAGMA wal_autocheckpoint=0")
            db.execute("PRAGMA secure_delete=ON")
        one.execute("CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID")
        one.execute("CREATE TABLE texts(key TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
        for turn in range(400):  # each keeps pages that the other has changed
            change((one, other)[turn % 2], rng, live, range(turn * 15, turn * 15 + 15))
            if turn % 100 == 99:
                one.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                left_before += sum(words_in(path).values()) - len(live)
                assert scrub(one, path, 0) is None
                one.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                assert words_in(path) == dict.fromkeys(live, 1)
        assert one.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert left_before > 0  # copies of rows that were there, which would outlast their deletion


def words_in(path: Path) -> Counter[int]:
    """Return how often the word of each row is in a file; another process reads it, for to close it drops locks."""
    read = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    held = subprocess.run([sys.executable, "-c", read, str(path)], capture_output=True, check=True).stdout
    return Counter(int(number) for number in re.findall(rb"q(\d{6})z", held))


@pytest.mark.parametrize(
    ("page", "parts"),
    [
        (bytes([13, 0, 0, 0, 0, 0, 0, 0]) + bytes(504), []),  # its content would begin beyond its end
        (bytes([13, 0, 0, 0, 1, 0, 100, 0]) + bytes(504), [(10, 100)]),
        (bytes([2, 0, 0, 0, 1, 0, 100, 0]) + bytes(504), [(14, 100)]),
        (
            bytes([13, 0, 200, 0, 1, 0, 100, 0]) + bytes(192) + bytes([0, 0, 0, 20]) + bytes(308),
            [(10, 100), (204, 220)],
        ),
        (bytes([13, 0, 50, 0, 1, 0, 100, 0]) + bytes(504), []),  # a free part outside of the content
        (bytes([13, 2, 0, 0, 1, 0, 100, 0]) + bytes(504), []),  # a free part outside of the page
        (bytes([13, 0, 0, 1, 1, 0, 100, 0]) + bytes(504), []),  # more rows than fit
        (bytes([0, 0, 0, 9, 1, 2, 3, 4]) + bytes(504), []),  # the rest of a long text
        (bytes([7]) * 512, []),
    ],
)
def test_only_what_a_page_does_not_use_is_touched(page: bytes, parts: list[tuple[int, int]]) -> None:
    """By the file format: between the list of rows and the rows, and in what was freed; nothing where that is odd."""
    assert unused(page) == parts


def test_words_of_earlier_deletions_go_with_the_first_erasure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose words were deleted by an earlier release, or whose SQLite is old, is merged: they are gone, too."""
    monkeypatch.setattr(connections, "_secure_words", lambda _: None)
    with hashing_memory(tmp_path) as memory:
        for n in range(20):
            tell(memory, ask(memory, f"{SECRET} {n}", "yes"))
        teach(memory, "something else", "no")
        chosen = [t["trace_id"] for t in memory.store.traces(None) if SECRET in t["task"]]
        for trace_id in chosen:
            forget_rows(memory.store, Selection(trace_id=trace_id))
        memory._maintenance.close()
    monkeypatch.undo()
    assert holding(tmp_path)
    with hashing_memory(tmp_path) as memory:
        until(lambda: not memory.store.forgetting.is_unfinished())
        assert holding(tmp_path) == []
        assert [hit.memory.answer for hit in memory.recall("something else")] == ["no"]
        with memory.store._readers.borrow() as db:
            assert db.execute("SELECT v FROM memories_fts_config WHERE k = 'secure-delete'").fetchone() == (1,)
    with monkeypatch.context() as patch:
        patch.setattr("optillm_memory.store.sqlite.erase.words_are_secure", lambda: False)
        with closing(SqliteStore(tmp_path / "memory.db")) as store:
            assert forget(store, Selection(namespace="default"))["left"] == []
