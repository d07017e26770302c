"""Verify finds what is broken and says what mends it; backup copies a file that is in use."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agents import mend as mend_code
from builders import SCOPE, ask, hashing_memory, teach, tell
from click.testing import CliRunner
from hosting import until
from postgres import Server

from optillm_memory import Memory, StoreError
from optillm_memory.cli import main
from optillm_memory.learn.outcomes import normal_answer
from optillm_memory.store.maintenance.backup import backup, counts_of
from optillm_memory.store.maintenance.verify import ORPHANS, mend, verify
from optillm_memory.store.opening import open_store
from optillm_memory.store.postgres.connection import PostgresConnection
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.store import SqliteStore


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """Give a memory that has seen a little of everything."""
    with hashing_memory(tmp_path) as opened:
        for number in range(5):
            teach(opened, f"restart the server number {number}", f"systemctl restart s{number}")
        tell(opened, ask(opened, "restart the server number 7"), False)
        opened.settle()
        yield opened


def faults(path: Path | str, *, deep: bool = False) -> dict[str, str]:
    """Return what verify finds wrong, by name."""
    return {check.name: check.message for check in verify(path, deep=deep) if check.level == "fail"}


def spoil(path: Path, *statements: str) -> None:
    """Change a database behind the package's back."""
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def run(*arguments: str, **keywords: Any) -> Any:
    """Run a command of the command line."""
    return CliRunner().invoke(main, list(arguments), env={"OPTILLM_AGENT_MEMORY_ENCODER": "hashing"}, **keywords)


def test_a_sound_database_passes(memory: Memory, tmp_path: Path) -> None:
    """Nothing is found wrong in a database in use, neither at a glance nor by folding the log again."""
    assert faults(tmp_path / "memory.db", deep=True) == {}
    done = run("verify", "--deep", "--json", "--db", str(tmp_path / "memory.db"))
    assert done.exit_code == 0
    shown = {check["name"]: check["message"] for check in json.loads(done.stdout)}
    assert shown["counts"].startswith("6 traces")
    assert "yields the" in shown["fold"]
    assert memory.store.stats()["traces"] == 6


BROKEN = {
    "words": "DELETE FROM memories_fts WHERE rowid = 1",
    "evidence": "DELETE FROM contributions WHERE role = 'evidence'",
    "revision": "UPDATE memories SET revision = 1000000 WHERE number = 1",
    "vectors": "UPDATE vectors SET vector = zeroblob(12) WHERE id = 1",
    "orphans:traces": "DELETE FROM scopes",
    "orphans:outcomes": "DELETE FROM traces WHERE seq = 1",
    "orphans:steps": "INSERT INTO steps VALUES (1, 'ep', 's', '', 'c', 0, 't', '{}', NULL, 'none', NULL, '')",
    "orphans:calls": "INSERT INTO calls VALUES ('none', 0, 'm', 0, 0, 0, '[]', NULL, NULL)",
    "orphans:ledger": "INSERT INTO ledger VALUES (1, 'none', 'a', 0, 'turns', '[]', '[]')",
    "orphans:labels": "INSERT INTO labels VALUES ('none', 1, NULL, 1)",
    "orphans:rewards": "INSERT INTO rewards VALUES ('none', 1, NULL, 0, 0, 1)",
    "orphans:attempts": "INSERT INTO attempts VALUES (1, 'e', 's', 'k', 'success', '', '', '', '', 0)",
    "orphans:exposures": "INSERT INTO exposures VALUES ('m', 1, 'e', 0, 0, 0.5, 1)",
    "orphans:fixes": "INSERT INTO fixes VALUES ('f', 1, 't', 'f', 'a', 'o', 's', 'r', 't')",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found_and_mended(memory: Memory, tmp_path: Path, name: str) -> None:
    """Each kind of damage is found under its name, the exit code says so, and what is said to mend it does."""
    path = tmp_path / "memory.db"
    memory.close()
    spoil(path, BROKEN[name])
    found = faults(path)
    assert name in found
    assert run("verify", "--db", str(path)).exit_code == 1
    if "verify --mend" in found[name]:
        assert run("verify", "--mend", "--db", str(path)).exit_code in (0, 1)
    else:
        assert run("rebuild", "--db", str(path)).exit_code == 0
    assert name not in faults(path)


def test_every_table_is_looked_at(memory: Memory) -> None:
    """No table but those that name nothing else is left out of the search for rows that belong to nothing."""
    with memory.store._readers.borrow() as db:
        tables = {
            row[0]
            for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not row[0].startswith(("sqlite_", "_sqlite", "memories_fts"))
        }
    assert tables - set(ORPHANS) == {"meta", "scopes", "vectors", "forgotten", "revoked", "seal", "seals"}


def test_another_fold_is_found_by_a_deep_look(memory: Memory, tmp_path: Path) -> None:
    """A derived row that the log does not yield is found by folding a copy, of which nothing is left."""
    spoil(tmp_path / "memory.db", "UPDATE memories SET successes = 9 WHERE number = 1")
    assert faults(tmp_path / "memory.db") == {}
    assert list(faults(tmp_path / "memory.db", deep=True)) == ["fold"]
    assert not list(tmp_path.glob(".*verify*"))
    memory.rebuild()
    assert faults(tmp_path / "memory.db", deep=True) == {}


def test_a_broken_page_is_found(memory: Memory, tmp_path: Path) -> None:
    """A damaged file is told by SQLite's own check, in one line, and nothing is set aside for it."""
    memory.close()
    path = tmp_path / "memory.db"
    content = bytearray(path.read_bytes())
    content[20_000:30_000] = b"\xff" * 10_000
    path.write_bytes(content)
    assert list(faults(path)) == ["integrity"]
    assert run("verify", "--db", str(path)).exit_code == 1
    assert path.read_bytes() == content


def test_mending_leaves_what_belongs_together(memory: Memory) -> None:
    """Mending a sound database deletes nothing."""
    assert mend(memory.store, memory.settings.path) == {}


def test_another_release_s_schema_is_told(memory: Memory, tmp_path: Path) -> None:
    """A file of a newer release fails with what to do, and nothing else is claimed of it; so does one of an older."""
    path = tmp_path / "memory.db"
    assert {"schema": "ok"}.items() <= {check.name: check.level for check in verify(path)}.items()
    memory.close()
    spoil(path, "INSERT INTO _sqlite_migrations VALUES (999, 'optillm_memory', 'm999_later', '2030-01-01')")
    done = run("verify", "--json", "--db", str(path))
    assert done.exit_code == 1
    assert [check["name"] for check in json.loads(done.stdout)] == ["integrity", "schema"]
    assert "newer" in faults(path)["schema"]
    assert "m999_later" in faults(path)["schema"]
    assert "upgrade the package" in faults(path)["schema"]
    spoil(path, "DELETE FROM _sqlite_migrations WHERE name >= 'm006'", "DROP TABLE forgotten")
    assert "m006_forgotten is still to be done" in faults(path)["schema"]


# -- a server --------------------------------------------------------------------------------------


@pytest.fixture
def server(postgres: Server, tmp_path: Path) -> str:
    """Give the URL of a database on a server that has seen a little of everything."""
    url = postgres.fresh()
    with hashing_memory(tmp_path, db=url) as memory:
        for number in range(5):
            teach(memory, f"restart the server number {number}", f"systemctl restart s{number}")
        mend_code(memory)
        memory.settle()
        assert until(lambda: memory.stats()["memories_without_vector"] == 0)
    return url


def spoil_server(url: str, *statements: str) -> None:
    """Change a database on a server behind the package's back."""
    with closing(PostgresConnection(url)) as db:
        for statement in statements:
            db.execute(statement)


def index_of_vectors(url: str) -> str:
    """Build the index of vectors as the first search does; return its name."""
    with closing(open_store(url, queue_size=100, normal=normal_answer)) as store:
        query = np.ones(256, np.float32)
        assert until(lambda: store.recall.nearest(SCOPE, "hashing-trigram-256", query, 5) != [])
    with closing(PostgresConnection(url)) as db:
        return str(db.execute("SELECT indexname FROM pg_indexes WHERE indexdef LIKE '%hnsw%'").fetchone()[0])


def test_a_sound_server_passes(server: str) -> None:
    """All that is checked in a file but its pages is checked on a server, and the log folded in a copy of it."""
    index_of_vectors(server)
    done = run("verify", "--deep", "--json", "--db", server)
    assert done.exit_code == 0, done.output
    shown = {check["name"]: check for check in json.loads(done.stdout)}
    assert {check["level"] for check in shown.values()} == {"ok"}
    assert set(ORPHANS) == {name.partition(":")[2] for name in shown if name.startswith("orphans:")}
    assert {"schema", "counts", "words", "vectors", "encoders", "index", "evidence", "fold"} <= set(shown)
    assert shown["index"]["message"].endswith("1 of them of vectors")
    assert run("verify", "--mend", "--db", server).stderr == "deleted: {}\n"


BROKEN_ON_A_SERVER = {
    "words": "DELETE FROM memories_fts WHERE rowid = 1",
    "evidence": "DELETE FROM contributions WHERE role = 'evidence'",
    "revision": "UPDATE memories SET revision = 1000000 WHERE number = 1",
    "vectors": "UPDATE vectors SET vector = '[1, 2, 3]' WHERE id = 1",
    "orphans:traces": "DELETE FROM scopes",
    "orphans:outcomes": "DELETE FROM traces WHERE seq = 1",
    "orphans:calls": "INSERT INTO calls VALUES ('none', 0, 'm', 0, 0, 0, '[]', NULL, NULL)",
    "orphans:exposures": "INSERT INTO exposures VALUES ('m', 1, 'e', 0, FALSE, 0.5, TRUE)",
}


@pytest.mark.parametrize("name", BROKEN_ON_A_SERVER)
def test_what_is_broken_on_a_server_is_found_and_mended(server: str, name: str) -> None:
    """Each kind of damage is found under its name there, too, and what is said to mend it does."""
    spoil_server(server, BROKEN_ON_A_SERVER[name])
    found = faults(server)
    assert name in found
    assert run("verify", "--db", server).exit_code == 1
    how = ("verify", "--mend") if "verify --mend" in found[name] else ("rebuild",)
    assert run(*how, "--db", server).exit_code in (0, 1)
    assert name not in faults(server)


def test_an_index_on_a_server_that_is_not_valid_is_found(server: str) -> None:
    """An index that a build left unfinished is named, with what mends it: that of vectors is built again by itself."""
    name = index_of_vectors(server)
    spoil_server(server, f"UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = '{name}'::regclass")
    assert "has it built again" in faults(server)["index"]
    index_of_vectors(server)
    assert faults(server) == {}
    spoil_server(server, "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'memories_terms'::regclass")
    assert "REINDEX INDEX agent_memory.memories_terms" in faults(server)["index"]
    spoil_server(server, "REINDEX INDEX agent_memory.memories_terms")
    assert faults(server) == {}


def test_what_only_a_deep_look_finds_on_a_server(server: str) -> None:
    """A derived row that the log does not yield is found by folding a copy of it in a file."""
    spoil_server(server, "UPDATE memories SET successes = 9 WHERE number = 1")
    assert faults(server) == {}
    assert list(faults(server, deep=True)) == ["fold"]


def test_a_server_that_holds_no_memory_of_this_release(server: str, postgres: Server) -> None:
    """A newer schema is told as in a file; a database without one, or none at all, is an error, and none is made."""
    spoil_server(server, "INSERT INTO migrations(name) VALUES ('p999_later')")
    assert "p999_later" in faults(server)["schema"]
    empty = postgres.fresh()
    for _ in range(2):
        done = run("verify", "--db", empty)
        assert done.exit_code == 1
        assert "Error: there is no memory on postgresql://" in done.stderr
    done = run("verify", "--db", postgres.url("nowhere"))
    assert done.exit_code == 1
    assert "Error: cannot read postgresql://" in done.stderr


# -- backup ----------------------------------------------------------------------------------------


def test_a_copy_is_whole_while_others_write(memory: Memory, tmp_path: Path) -> None:
    """A copy made under constant writing is consistent, for its owner alone, and opens as a memory of its own."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            teach(memory, "restart the server number 9", "systemctl restart s9")

    writer = threading.Thread(target=write)
    writer.start()
    told: list[tuple[int, int]] = []
    copy = backup(tmp_path / "memory.db", tmp_path / "copy.db", progress=lambda *of: told.append(of))
    stop.set()
    writer.join(30)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert told[-1][0] == told[-1][1] > 0
    assert counts_of(copy)["traces"] >= 6
    assert [p.name for p in tmp_path.glob("copy*")] == ["copy.db"]
    assert faults(copy, deep=True) == {}
    with closing(SqliteStore(copy)) as store:
        assert store.stats()["memories"] >= 5


def test_a_copy_overwrites_nothing(memory: Memory, tmp_path: Path) -> None:
    """A destination that is there is refused and left as it is; so is a database that is not."""
    there = tmp_path / "there.db"
    there.write_text("precious")
    with pytest.raises(StoreError, match="not there yet"):
        backup(tmp_path / "memory.db", there)
    assert there.read_text() == "precious"
    with pytest.raises(StoreError, match="no database"):
        backup(tmp_path / "none.db", tmp_path / "copy.db")
    with pytest.raises(StoreError, match="cannot make"):
        backup(tmp_path / "memory.db", tmp_path / "no" / "folder" / "copy.db")
    done = run("backup", str(tmp_path / "copy.db"), "--db", str(tmp_path / "memory.db"), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["traces"] == memory.store.stats()["traces"]


def test_a_backup_of_a_server_says_what_does_it(tmp_path: Path) -> None:
    """The option's help does not promise what the command refuses, and the refusal names what to use."""
    helped = "".join(run("backup", "--help").stdout.split())  # lines are also broken at a hyphen
    assert "a file; for a server use pg_dump, or optillm-memory copy".replace(" ", "") in helped
    done = run("backup", str(tmp_path / "copy.db"), "--db", "postgresql://user:hidden@server/memory")
    assert done.exit_code == 1
    assert "pg_dump, or optillm-memory copy" in done.stderr
    assert "hidden" not in done.output
    assert list(tmp_path.iterdir()) == []
