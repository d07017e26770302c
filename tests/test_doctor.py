"""The doctor: it names what is wrong and how to fix it, and changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from builders import lexical_memory, teach
from click.testing import CliRunner
from postgres import Server

from optillm_memory.cli import main
from optillm_memory.host import doctor
from optillm_memory.host.doctor import Finding, examine
from optillm_memory.host.install import install, plugin_path
from optillm_memory.settings import ENV_PREFIX
from optillm_memory.store.postgres.schema import is_there
from optillm_memory.store.sqlite.connection import LATEST
from optillm_memory.store.sqlite.library import sqlite3
from optillm_memory.store.sqlite.store import SqliteStore

SCHEMAS = Path(__file__).parent / "schemas"


@pytest.fixture(autouse=True)
def _without_optillm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is checked of optillm itself, which takes ten seconds to import."""
    monkeypatch.setattr(doctor, "_host", lambda: iter(()))


def found(directory: Path, **variables: str) -> dict[str, list[Finding]]:
    """Return the findings by name; a keyword is the variable OPTILLM_AGENT_MEMORY_<keyword>."""
    given = {"DB": str(directory / "memory.db"), "ENCODER": "none", **variables}
    findings: dict[str, list[Finding]] = {}
    for finding in examine(directory, {ENV_PREFIX + name: value for name, value in given.items()}):
        findings.setdefault(finding.name, []).append(finding)
    return findings


def levels(findings: dict[str, list[Finding]]) -> set[str]:
    """Return the levels of all findings."""
    return {finding.level for several in findings.values() for finding in several}


def state(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """Return every file with its content and the time of its last change, and every folder."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None
        for p in folder.rglob("*")
    }


def test_where_nothing_is_yet_nothing_is_created(tmp_path: Path) -> None:
    """Without a database all is well: it says where the first start creates one, and leaves no file or folder."""
    findings = found(tmp_path, DB=str(tmp_path / "new" / "memory.db"))
    assert levels(findings) <= {"ok", "warn"}  # an old SQLite is a warning
    (database,) = findings["database"]
    assert database.level == "ok"
    assert "the first start creates it" in database.message
    assert f"a temporary file in {tmp_path}, removed again" in database.message
    assert "vectors" not in findings
    assert list(tmp_path.iterdir()) == []


def test_a_database_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    """Of a sound database nothing changes, no thread is started, and its memories are counted."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "list the files", "ls")
    before, threads = state(tmp_path), threading.active_count()
    findings = found(tmp_path)
    assert levels({"": findings["database"] + findings["vectors"] + findings["settings"]}) == {"ok"}
    assert findings["vectors"][0].message.startswith("of 1 memories, with a vector: none")
    assert [f.level for f in found(tmp_path, ENCODER="hashing")["vectors"]] == ["warn"]
    assert state(tmp_path) == before
    assert threading.active_count() == threads


def test_a_database_in_use_is_looked_at(tmp_path: Path) -> None:
    """Beside a server that writes, the doctor neither waits nor disturbs."""
    with closing(SqliteStore(tmp_path / "memory.db")) as store:
        assert [f.level for f in found(tmp_path)["database"]] == ["ok"]
        assert store.fault == ""


@pytest.mark.parametrize(
    ("schema", "level", "message"),
    [("m006", "warn", "the next start migrates it"), ("later", "fail", "newer optillm-memory"),
     ("corrupt", "fail", "cannot read"), ("foreign", "fail", "not a database of optillm-memory")],
)  # fmt: skip
def test_a_database_that_does_not_fit_is_named(tmp_path: Path, schema: str, level: str, message: str) -> None:
    """An earlier or later schema, a broken file and another program's file are told apart, and left alone."""
    path = tmp_path / "memory.db"
    if schema == "corrupt":
        path.write_bytes(b"this is no database " * 1000)
    elif schema == "later":
        SqliteStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        if schema == "m006":
            db.executescript((SCHEMAS / "m006.sql").read_text())
        elif schema == "later":
            db.execute("UPDATE _sqlite_migrations SET name = 'm999_later' WHERE name = ?", (LATEST,))
        elif schema == "foreign":
            db.execute("CREATE TABLE theirs(x)")
        db.commit()
    path.chmod(0o600)
    before = state(tmp_path)
    (finding,) = found(tmp_path)["database"]
    assert (finding.level, message in finding.message) == (level, True), finding.message
    assert state(tmp_path) == before


def test_files_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    """A file that others can read, a corrupt one set aside, and a folder that cannot be written are named."""
    path = tmp_path / "memory.db"
    SqliteStore(path).close()
    aside = tmp_path / "memory.db.corrupt-20300101-000000-1"
    aside.touch()
    assert [(f.level, aside.name in f.message) for f in found(tmp_path)["database"]] == [("warn", True)]
    path.chmod(0o644)
    assert [(f.level, "chmod 600" in f.message) for f in found(tmp_path)["database"]] == [("warn", True)]
    (database,) = found(tmp_path, DB=str(path / "memory.db"))["database"]  # a file is no folder, not even for root
    assert database.level == "fail"
    assert "cannot be written" in database.message
    assert [(f.level, "is not a file" in f.message) for f in found(tmp_path, DB=str(tmp_path))["database"]] == [
        ("fail", True)
    ]


def test_settings_are_named(tmp_path: Path) -> None:
    """Every wrong value is a failure, an unknown variable a warning, and the valid ones are used."""
    wrong = {"HOLDOUT": "2", "MAX_ITEMS": "many", "ANSWER_FORM": "no_such_module:form"}
    findings = found(tmp_path, HOLDUOT="0", **wrong)
    failures = [f.message for f in findings["settings"] if f.level == "fail"]
    assert [message.partition(":")[0] for message in failures] == [ENV_PREFIX + name for name in wrong]
    (warning,) = [f.message for f in findings["settings"] if f.level == "warn"]
    assert warning.startswith("OPTILLM_AGENT_MEMORY_HOLDUOT")
    assert warning.endswith("did you mean OPTILLM_AGENT_MEMORY_HOLDOUT?")
    assert len(findings["settings"]) == 4
    assert str(tmp_path / "memory.db") in findings["database"][0].message


def test_a_wrong_database_is_not_replaced_by_the_default(tmp_path: Path) -> None:
    """Where the database's name is wrong, no other database is examined."""
    findings = found(tmp_path, DB="mysql://user:password@host/d")
    assert [f.level for f in findings["settings"]] == ["fail"]
    assert "password" not in findings["settings"][0].message
    assert "database" not in findings


def test_the_plugin_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin file that cannot be imported is named, and importing it leaves nothing behind."""
    monkeypatch.setenv(ENV_PREFIX + "DB", str(tmp_path / "memory.db"))
    assert [f.level for f in found(tmp_path)["plugin file"]] == ["ok"]
    path = install(tmp_path)
    path.write_text("SLUG = 'agent_memory'\nimport module_that_is_not_there\n")
    before = state(tmp_path)
    (finding,) = found(tmp_path)["plugin file"]
    assert finding.level == "fail"
    assert "No module named 'module_that_is_not_there'" in finding.message
    assert state(tmp_path) == before
    path.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(doctor, "IMPORT_S", 0.2)
    (finding,) = found(tmp_path)["plugin file"]
    assert (finding.level, "longer than 0.2 seconds" in finding.message) == ("fail", True)


def test_a_server(tmp_path: Path, postgres: Server) -> None:
    """A server without a memory is left without one; one that cannot be reached is a failure without its password."""
    url = postgres.fresh()
    (finding,) = found(tmp_path, DB=url)["database"]
    assert (finding.level, "the first start creates it" in finding.message) == ("ok", True)
    assert not is_there(url)
    (finding,) = found(tmp_path, DB="postgresql://user:hidden@127.0.0.1:1/d")["database"]
    assert finding.level == "fail"
    assert "hidden" not in finding.message


def test_the_command(tmp_path: Path) -> None:
    """`doctor` prints a line for each finding and exits with 1 if one is a failure; `--json` prints the same."""
    env = {ENV_PREFIX + "DB": str(tmp_path / "memory.db"), ENV_PREFIX + "ENCODER": "none"}
    for extra, code in (({}, 0), ({ENV_PREFIX + "HOLDOUT": "2"}, 1)):
        text = CliRunner(env={**env, **extra}).invoke(main, ["doctor", str(tmp_path)])
        printed = CliRunner(env={**env, **extra}).invoke(main, ["doctor", str(tmp_path), "--json"])
        assert (text.exit_code, printed.exit_code) == (code, code), text.output
        findings = json.loads(printed.stdout)
        assert {"python", "settings", "sqlite", "database", "encoder", "plugin file"} <= {f["name"] for f in findings}
        assert len(text.stdout.splitlines()) == len(findings)
        assert ("FAIL" in text.stdout) == bool(code)
        assert all(f["message"] in text.stdout for f in findings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.host
def test_the_installed_optillm_is_as_we_need_it(tmp_path: Path) -> None:
    """On the real optillm every fact holds, the installed plugin file can be imported, and nothing is created."""
    path = install(tmp_path)
    env = {**os.environ, ENV_PREFIX + "DB": str(tmp_path / "memory.db"), ENV_PREFIX + "ENCODER": "none"}
    before = state(tmp_path)
    done = subprocess.run(
        [sys.executable, "-B", "-m", "optillm_memory.cli", "doctor", str(tmp_path), "--json"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    facts = [f for name, f in findings.items() if name.startswith("host:")]
    assert len(facts) == len(doctor._FACTS)
    assert {f["level"] for f in facts} == {"ok"}
    assert findings["plugin file"]["message"] == f"{plugin_path(tmp_path)} can be imported"
    assert path.exists()
    assert state(tmp_path) == before
