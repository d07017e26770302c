"""Files that break, are cut or are taken away while they are served: nothing acknowledged is gone without a word."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from builders import SCOPE, ask, body, hashing_memory, lexical_memory, response, teach, tell
from faults import asides, known, served, told
from hosting import until

from benchmarks.acknowledged import integrity
from optillm_memory import Memory, StoreError, StoreUnavailable, Turn
from optillm_memory.decide.calibration import WRONG
from optillm_memory.decide.gate import LabelLog
from optillm_memory.store.sqlite.connection import open_writer
from optillm_memory.store.sqlite.library import sqlite3

MANY = 60
REFUND = "please help me with the refund for my account"
REUSE = {"agent_memory": {"reuse": {"max_error": 0.05}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the file of the test's memory."""
    return tmp_path / "memory.db"


def taught(memory: Memory, count: int = MANY) -> list[Turn]:
    """Teach many tasks of some length: a file of many pages."""
    return [teach(memory, f"task {number} " * 50, "done") for number in range(count)]


def outside(path: Path, code: str) -> str:
    """Do something to a file from another process: to open and close it in ours would drop our own locks."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys\npath = sys.argv[1]\n{code}", str(path)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def in_the_file(memory: Memory) -> None:
    """Bring everything from the WAL into the file, and have no page of it in a cache."""
    memory.settle()  # nothing in the background reads it again
    memory.store._readers.close()
    memory.store.write(lambda tx: tx.db.execute("PRAGMA cache_size=1").fetchall()).result(10)
    connection = sqlite3.connect(memory.settings.path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()


def pages_of(path: Path, name: str) -> list[int]:
    """Return the numbers of the pages of a table or an index, its root first."""
    connection = sqlite3.connect(path)
    try:
        found = connection.execute("SELECT pageno FROM dbstat WHERE name = ? ORDER BY path", (name,)).fetchall()
    except sqlite3.OperationalError:
        found = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchall()
    finally:
        connection.close()
    return [row[0] for row in found]


def overwrite(path: Path, page: int) -> None:
    """Fill a page of the file with rubbish."""
    outside(path, f"f = os.open(path, os.O_WRONLY); os.pwrite(f, b'\\xa5' * 4096, {(page - 1) * 4096})")


def recovered(memory: Memory, caplog: pytest.LogCaptureFixture, before: list[Turn]) -> None:
    """See that the memory goes on in a fresh file, and that the old one is kept, with all it had, and reported."""
    path = memory.settings.path
    turn = served(memory, "a task of after")
    assert told(memory, turn, within_s=20) in ("applied", "pending")
    after = teach(memory, "another task of after", "done")
    assert memory.store.fault == ""
    assert known(memory, after)
    assert integrity(path) == "ok"
    (aside,) = asides(path.parent)
    assert aside.name in caplog.text
    words = b"".join(p.read_bytes() for p in path.parent.glob(f"{aside.name}*"))
    assert sum(turn.trace_id.encode() in words for turn in before) > len(before) * 0.8


@pytest.mark.parametrize("name", ["traces", "memories", "feedback", "traces_episode"])
def test_a_page_that_breaks_is_found_by_the_writer(path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A broken page of a table or an index that a write meets: the file is set aside, and a fresh one is written to."""
    with lexical_memory(path.parent) as memory:
        turns = taught(memory)
        in_the_file(memory)
        for page in pages_of(path, name):
            overwrite(path, page)
        with caplog.at_level(logging.ERROR):
            for number in range(20):
                served(memory, f"a task {number} of meanwhile")
            recovered(memory, caplog, turns)


@pytest.mark.parametrize("name", ["traces", "memories", "outcomes"])
def test_a_page_that_breaks_is_found_by_a_reader(path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A broken page that only a reader meets: it tells the writer, which checks the file before it writes again."""
    with lexical_memory(path.parent) as memory:
        turns = taught(memory)
        in_the_file(memory)
        for page in pages_of(path, name):
            overwrite(path, page)
        with pytest.raises(Exception, match=r"malformed|cannot read"):
            memory.stats()
        with caplog.at_level(logging.ERROR):
            recovered(memory, caplog, turns)


@pytest.mark.parametrize("size", [4096, 40_000])
def test_a_file_that_is_cut(path: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """A file that loses its end is set aside, and what comes then is kept in a fresh one."""
    with lexical_memory(path.parent) as memory:
        taught(memory)
        in_the_file(memory)
        outside(path, f"os.truncate(path, {size})")
        with caplog.at_level(logging.ERROR):
            for number in range(20):
                served(memory, f"a task {number} of meanwhile")
            turn = served(memory, "a task of after")
            assert told(memory, turn, within_s=20) in ("applied", "pending")
        assert known(memory, teach(memory, "another task of after", "done"))
        (aside,) = asides(path.parent)
        assert aside.name in caplog.text
    assert integrity(path) == "ok"


@pytest.mark.parametrize("size", [0, 4096])
def test_a_file_that_is_cut_with_all_in_its_wal(path: Path, size: int, tmp_path: Path) -> None:
    """What the WAL holds outlasts the cut: served from there, then in the file; after a kill it is set aside."""
    with lexical_memory(path.parent) as memory:
        turns = taught(memory)
        outside(path, f"os.truncate(path, {size})")
        turns.append(teach(memory, "a task of after", "done"))
        assert known(memory, *turns)
        killed = tmp_path / "killed"
        killed.mkdir()
        outside(path, f"import shutil; [shutil.copy(path + s, {str(killed)!r}) for s in ('', '-wal')]")
    assert integrity(path) == "ok"
    with lexical_memory(path.parent) as memory:
        assert known(memory, *turns)
    with lexical_memory(killed) as memory:
        if memory.stats()["traces"]:
            assert known(memory, *turns)
        else:
            words = b"".join(p.read_bytes() for p in killed.glob("*.corrupt-*"))
            assert all(turn.trace_id.encode() in words for turn in turns)


def test_a_file_is_not_opened_again_beside_those_who_still_read_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WAL and its index were deleted while somebody reads by them: nothing is acknowledged that others do not see."""
    monkeypatch.setattr("optillm_memory.store.sqlite.connection._AWAY_S", 0.2)
    monkeypatch.setattr("optillm_memory.store.sqlite.connection._REOPENED_S", 0.01)
    with lexical_memory(path.parent) as memory:
        first = teach(memory, "a task", "done")
        waiting = served(memory, "a task that feedback waits for")
        memory.settle()
        with memory.store._readers.borrow() as db:
            db.execute("SELECT count(*) FROM traces").fetchone()
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink()
            with pytest.raises(StoreUnavailable, match="still read"):
                told(memory, waiting)
            served(memory, "a task of meanwhile")
        assert told(memory, waiting, within_s=10) == "applied"
        memory.settle()
        assert known(memory, first, waiting)
        assert outside(path, SEEN) == "3"


def test_a_file_that_can_only_be_read_from_anew_is_opened_again_without_a_write(path: Path) -> None:
    """Where its journals were deleted and nobody writes, those who read have the file opened again."""
    with lexical_memory(path.parent) as memory:
        teach(memory, "a task", "done")
        memory.store._readers.close()
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink()
        assert recalled(memory, "a task")
        assert until(path.with_name(path.name + "-wal").exists)


def recalled(memory: Memory, task: str) -> bool:
    """Whether a task is recalled, as soon as the file can be read again."""

    def read() -> bool:
        with contextlib.suppress(StoreError):
            return bool(memory.recall(task))
        return False

    return until(read)


def test_one_more_connection_waits_until_the_file_is_opened_again(path: Path) -> None:
    """The WAL was deleted while all connections are lent: who opens one more waits for the writer to make another."""
    with lexical_memory(path.parent) as memory, contextlib.ExitStack() as lent:
        teach(memory, "a task", "done")
        memory.settle()
        readers = memory.store._readers
        readers.close()
        db = lent.enter_context(readers.borrow())
        db.execute("SELECT count(*) FROM traces").fetchone()
        path.with_name(path.name + "-wal").unlink()
        threading.Timer(0.02, lent.close).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("optillm_memory.store.sqlite.connection._REOPENED_S", 30.0)
            with readers.borrow() as another:
                assert another.execute("SELECT count(*) FROM traces").fetchone() == (1,)


SEEN = """
from sqlite_utils.utils import sqlite3
print(sqlite3.connect(path).execute("SELECT count(*) FROM traces").fetchone()[0], end="")
"""


@pytest.mark.parametrize("suffixes", [("-wal",), ("-shm",), ("-wal", "-shm")])
def test_journals_that_are_deleted(path: Path, suffixes: tuple[str, ...]) -> None:
    """Without its WAL or the WAL's index the file still gets all that was acknowledged, also when killed soon after."""
    with lexical_memory(path.parent) as memory:
        before = taught(memory, 10)
        for suffix in suffixes:
            path.with_name(path.name + suffix).unlink()
        assert recalled(memory, "task 7")  # what is open goes on
        served(memory, "a task of meanwhile")
        memory.settle()
        after = [teach(memory, f"a task {number} of after", "done") for number in range(5)]
        assert recalled(memory, "a task 3 of after")
        assert known(memory, *before, *after)
        assert memory.store.fault == ""
        # What another process finds, and what a kill would leave: only what the files hold by their names.
        count = "from sqlite_utils.utils import sqlite3\nprint(sqlite3.connect(path).execute('{}').fetchone()[0])"
        assert int(outside(path, count.format("SELECT count(*) FROM feedback"))) == len(before) + len(after)
        assert outside(path, count.format("PRAGMA integrity_check")).strip() == "ok"
        assert asides(path.parent) == []
        copy = path.parent / "copy"
        copy.mkdir()
        outside(path, f"import shutil; [shutil.copy(path + s, {str(copy)!r}) for s in ('', '-wal')]")
    with lexical_memory(copy) as memory:
        assert known(memory, *before, *after)


@pytest.mark.parametrize("suffixes", [("",), ("", "-wal"), ("", "-wal", "-shm")])
def test_a_database_that_is_deleted(path: Path, suffixes: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    """The database is made again, what is left of the old one is kept beside it, and this is said in the log."""
    with lexical_memory(path.parent) as memory:
        taught(memory, 10)
        for suffix in suffixes:
            path.with_name(path.name + suffix).unlink()
        with caplog.at_level(logging.ERROR):
            served(memory, "a task of meanwhile")
            memory.settle()
            after = [teach(memory, f"a task {number} of after", "done") for number in range(5)]
        assert known(memory, *after)
        assert memory.stats()["feedback"] == 5
        assert "removed" in caplog.text
        assert outside(path, "print(os.path.getsize(path) > 0)") == "True\n"
    assert integrity(path) == "ok"
    with lexical_memory(path.parent) as memory:
        assert known(memory, *after)


def test_vectors_of_a_file_that_was_set_aside_are_forgotten(path: Path) -> None:
    """What was recalled from the old file is not taken for what has its number in the new one."""
    with hashing_memory(path.parent) as memory:
        for number in range(8):
            teach(memory, f"sort list number {number} by its length", "sorted(x, key=len)")
        assert memory.recall("sort list number 3 by its length")
        memory.store.flush()
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink()
        served(memory, "a task of meanwhile")
        memory.settle()
        new = [teach(memory, f"open port {number} of the firewall", "ufw allow") for number in range(8)]
        hits = memory.recall("open port 5 of the firewall")
        assert hits[0].memory.task == "open port 5 of the firewall"
        assert hits[0].cosine is not None
        assert hits[0].cosine > 0.99
        assert not [h for h in memory.recall("sort list number 3 by its length") if (h.cosine or 0) > 0.9]
        assert known(memory, *new)


def deleted(path: Path) -> None:
    """Delete a database with its journals."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()


def asked_otherwise(memory: Memory) -> list[int]:
    """Have an answer verified where memory proposes another; return the verdicts that the gate has then."""
    for who in "abcdef":
        teach(memory, f"{REFUND} {who}x", "desk refund")
    turn = memory.begin(body(f"{REFUND} zx", **REUSE))
    memory.finish(turn, response("another desk"))
    tell(memory, turn)
    return verdicts(memory)


def verdicts(memory: Memory) -> list[int]:
    """Return the verdicts of all labels that the gate has."""
    memory.settle()
    gate = memory._reuse.gate(SCOPE, memory.store.recall.revision(SCOPE))
    return [verdict for _, verdict in gate.logs.get("", LabelLog()).rows]


def test_nothing_of_a_file_that_was_deleted_is_reused(path: Path) -> None:
    """A new file's numbers and revisions begin anew: none of its answers and labels is taken for one of the old."""
    with hashing_memory(path.parent) as memory:
        assert asked_otherwise(memory).count(WRONG) == 1
        assert memory.begin(body(f"{REFUND} ax", **REUSE)).action == "reuse"
        deleted(path)
        served(memory, "a task of meanwhile")
        assert verdicts(memory) == []
        teach(memory, "what is the port of the metrics exporter?", "9400")
        turn = memory.begin(body("what is the port of the metrics exporter?", **REUSE))
        assert turn.action == "reuse"
        assert turn.reused()["choices"][0]["message"]["content"] == "9400"
        told = asked_otherwise(memory)
        assert WRONG in told
        with hashing_memory(path.parent) as another:
            assert verdicts(another) == told
        memory.rebuild()
        assert verdicts(memory) == told


def test_an_older_copy_put_in_the_files_place(path: Path) -> None:
    """What was read of the newer file is not taken for what has its number in the copy, by this process or another."""
    with hashing_memory(path.parent) as memory, hashing_memory(path.parent) as another:
        teach(memory, "sort a list by its length", "sorted(x, key=len)")
        memory.settle()
        copy = path.with_name("copy")
        outside(path, f"import sqlite3; sqlite3.connect(path).execute('VACUUM INTO ?', ({str(copy)!r},))")
        for task, answer in (
            ("open a port of the firewall", "ufw allow"),
            ("restart the web server", "nginx -s reload"),
        ):
            teach(memory, task, answer)
        assert [m.begin(body("restart the web server", **REUSE)).action for m in (memory, another)] == ["reuse"] * 2
        assert asked_otherwise(memory).count(WRONG) == 1
        memory.settle()
        before = memory.store.recall.revision()
        deleted(path)
        copy.rename(path)
        served(memory, "a task of meanwhile")
        memory.settle()
        assert memory.store.recall.revision().generation != before.generation
        teach(memory, "list the files of a folder", "ls")
        teach(memory, "read the end of a log", "tail")
        for each in (memory, another):
            hits = each.recall("list the files of a folder")
            assert hits[0].memory.answer == "ls"
            assert hits[0].cosine == pytest.approx(1, abs=0.01)
            assert not [h for h in each.recall("open a port of the firewall") if (h.cosine or 0) > 0.9]
            assert each.begin(body("restart the web server", **REUSE)).action != "reuse"
            turn = each.begin(body("read the end of a log", **REUSE))
            assert turn.action == "reuse"
            assert turn.reused()["choices"][0]["message"]["content"] == "tail"


def test_a_file_that_is_opened_again_keeps_its_generation(path: Path) -> None:
    """Only another file in its place makes all be read anew: not a WAL that was lost, nor a check."""
    with lexical_memory(path.parent) as memory:
        teach(memory, "a task", "done")
        before = memory.store.recall.revision().generation
        path.with_name(path.name + "-wal").unlink()
        teach(memory, "a task of meanwhile", "done")
        memory.store._writer.distrust()  # type: ignore[union-attr]
        teach(memory, "a task of after", "done")
        assert memory.store.recall.revision().generation == before


def test_beliefs_of_a_file_that_was_deleted_are_forgotten(path: Path) -> None:
    """The policy counts the choices of the new file alone, and those at once."""
    with hashing_memory(path.parent, arms="none@default, none@small=0.1", warmup_share=1.0) as memory:
        auto = {"agent_memory": {"approach": "auto"}}
        for number in range(20):
            ask(memory, body(f"question {number}", **auto))
        assert memory.policy()["choices"] == 20
        deleted(path)
        served(memory, "a task of meanwhile")
        memory.settle()
        assert memory.policy()["choices"] == 0
        ask(memory, body("a question of after", **auto))
        assert memory.policy()["choices"] == 1


WITHOUT_OVERRIDE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root's own files' rights hold for it too
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""
READ_ONLY = """
import logging, os, sys
from pathlib import Path
from builders import lexical_memory, teach
from faults import known, served, told
from optillm_memory import StoreUnavailable
logging.disable()
path, what = Path(sys.argv[1]), sys.argv[2]
with lexical_memory(path.parent) as memory:
    before = teach(memory, "a task of before", "done")
for locked, mode in {"file": [(path, 0o600)], "folder": [(path.parent, 0o700)],
                     "both": [(path, 0o600), (path.parent, 0o700)]}[what]:
    locked.chmod(mode & 0o500)
with lexical_memory(path.parent) as memory:
    turn = served(memory, "a task of meanwhile")
    try:
        told(memory, turn)
        print("acknowledged")
    except StoreUnavailable:
        print("refused")
    path.parent.chmod(0o700)
    path.chmod(0o600)
    print(told(memory, turn, within_s=15))
    print(known(memory, before, teach(memory, "a task of after", "done")))
"""


@pytest.mark.parametrize("what", ["file", "folder", "both"])
def test_a_place_that_may_not_be_written(path: Path, what: str) -> None:
    """With a read-only file or folder requests are served; with their rights back writing goes on in the process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OVERRIDE, READ_ONLY, str(path), what],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    said = done.stdout.split()
    assert said[0] in (("refused",) if what != "folder" else ("refused", "acknowledged"))
    assert said[1:] in (["pending", "True"], ["applied", "True"], ["duplicate", "True"])


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="reads Linux's list of locks")
def test_opening_a_file_again_drops_no_lock_of_ours(path: Path) -> None:
    """A process's locks on a file end when it closes any descriptor of it: to open it once more must not do that."""

    def locks() -> set[str]:
        inode = f":{path.stat().st_ino} "
        ours = [line.split(maxsplit=1)[1] for line in Path("/proc/locks").read_text().splitlines() if inode in line]
        return {line for line in ours if f" {os.getpid()} " in line}

    with lexical_memory(path.parent) as memory:
        teach(memory, "a task", "done")
        before = locks()
        assert before
        open_writer(path).close()
        assert locks() == before
