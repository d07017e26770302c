"""The commands: what they print and write, and that those which only read or delete never create a database."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from builders import body, response
from click.testing import CliRunner
from postgres import Server

from optillm_memory import Memory
from optillm_memory.cli import main
from optillm_memory.store.postgres.schema import is_there

ON_WHAT_IS_THERE = {
    "stats": (), "traces": (), "show": ("t1",), "why": ("t1",), "memories": (), "uplift": (), "policy": (),
    "recall": ("a task",), "rebuild": (), "compact": (), "verify": (), "seal": (), "migrate": (),
    "backup": ("copy.db",), "forget": ("--trace", "t1", "--yes"), "reembed": (), "operator-key": (),
}  # fmt: skip


@pytest.mark.parametrize("command", [*ON_WHAT_IS_THERE, "verify --mend", "forget --dry-run"])
def test_a_mistyped_name_makes_no_database(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is told with exit code 1, printing JSON or not, and nothing is left where it was looked for."""
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    for extra in ((), ("--json",)):
        done = CliRunner().invoke(main, [name, *ON_WHAT_IS_THERE[name], *options, *extra, "--db", "typo.db"])
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: there is no database typo.db")
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_a_memory_is_given_none(postgres: Server) -> None:
    """The name of another database is told with exit code 1, and no table of ours is made in it."""
    url = postgres.fresh()
    for name, given in ON_WHAT_IS_THERE.items():
        done = CliRunner().invoke(main, [name, *given, "--db", url])
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: ")
        assert ("there is no memory on postgresql://" in done.stderr) == (name not in ("backup", "seal")), done.stderr
    assert not is_there(url)
    assert CliRunner().invoke(main, ["feedback", "t1", "--success", "--db", url]).exit_code == 0
    assert CliRunner().invoke(main, ["stats", "--db", url]).exit_code == 0


READ_ONLY = {
    "stats": (), "traces": (), "show": ("TRACE",), "why": ("TRACE",), "memories": (), "uplift": (), "policy": (),
    "recall": ("a task",), "verify": (), "seal": (), "forget": ("--trace", "TRACE", "--dry-run"),
}  # fmt: skip


@pytest.mark.parametrize("command", READ_ONLY)
def test_commands_that_read_change_nothing(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no byte and create no file, and start no thread but the encoder's where they need one."""
    db, started = tmp_path / "memory.db", []
    with Memory.open(db, encoder="none") as memory:
        turn = memory.begin(body("a task"))
        memory.finish(turn, response("an answer"))
        memory.settle()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    arguments = [turn.trace_id if argument == "TRACE" else argument for argument in READ_ONLY[command]]
    environment = {"OPTILLM_AGENT_MEMORY_ENCODER": "hashing"}
    done = CliRunner(env=environment).invoke(main, [command, *arguments, "--db", str(db)])
    assert done.exit_code == 0, done.output
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert started == (["agent-memory-encoder"] if command in ("policy", "recall") else [])


def test_commands_that_read_migrate_nothing(tmp_path: Path) -> None:
    """A database of an earlier release is refused with the command that migrates it, and stays as it is."""
    db = tmp_path / "memory.db"
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.executescript((Path(__file__).parent / "schemas" / "m006.sql").read_text())
    before = db.read_bytes()
    for command in READ_ONLY.keys() - {"verify"}:
        arguments = ["t1" if argument == "TRACE" else argument for argument in READ_ONLY[command]]
        done = CliRunner().invoke(main, [command, *arguments, "--db", str(db)])
        assert (done.exit_code, "optillm-memory migrate" in done.stderr) == (1, True)
        assert db.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["memory.db"]


def test_every_command_on_a_database_is_asked() -> None:
    """No command that takes a database is left out above but `feedback`, which may make it."""
    takers = {name for name, command in main.commands.items() if any(p.name == "db" for p in command.params)}
    assert takers - {"feedback"} == set(ON_WHAT_IS_THERE)


def test_feedback_makes_the_database_it_waits_in(tmp_path: Path) -> None:
    """Feedback may come before what it is about: it waits in a database that is made for it."""
    where = ("--db", str(tmp_path / "new.db"), "--json")
    done = CliRunner().invoke(main, ["feedback", "t1", "--success", *where])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["status"] == "pending"
    assert json.loads(CliRunner().invoke(main, ["stats", *where]).stdout)["feedback"] == 1


def leaves(group: click.Group) -> Iterator[click.Command]:
    """Yield every command that is not a group of commands."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command


def test_json_is_a_flag_and_output_a_file() -> None:
    """Every command but `serve`, those of `bench` too, has `--json` as a flag and `--output` as a file."""
    found = [command for command in leaves(main) if command.name != "serve"]
    assert len(found) > 20
    for command in found:
        options = {opt: parameter for parameter in command.params for opt in parameter.opts}
        assert isinstance(options["--json"], click.Option), command.name
        assert options["--json"].is_flag
        assert isinstance(options["--output"].type, click.Path)


@pytest.mark.parametrize("command", [("stats",), ("verify",), ("traces", "--text", "two"), ("settings",)], ids=" ".join)
def test_output_holds_what_json_prints(command: tuple[str, ...], tmp_path: Path) -> None:
    """The file holds the JSON of the result, and what is printed is the same as without it."""
    with Memory.open(tmp_path / "memory.db", encoder="none") as memory:
        for task in ("one", "two"):
            memory.finish(memory.begin(body(task)), response("an answer"))
    where = () if command[0] == "settings" else ("--db", str(tmp_path / "memory.db"))
    file = tmp_path / "out.json"
    as_json = CliRunner().invoke(main, [*command, *where, "--json"])
    assert as_json.exit_code == 0, as_json.output
    for options in ((), ("--json",)):
        plain = CliRunner().invoke(main, [*command, *where, *options])
        written = CliRunner().invoke(main, [*command, *where, *options, "--output", str(file)])
        assert (written.exit_code, written.stdout) == (0, plain.stdout)
        assert file.read_text(encoding="utf-8") == as_json.stdout
        file.unlink()
    if command[0] == "traces":
        assert [trace["task"] for trace in json.loads(as_json.stdout)] == ["two"]


def test_output_into_no_folder_is_refused_at_once(tmp_path: Path) -> None:
    """A file in a folder that does not exist is a usage error, before anything is done."""
    db = tmp_path / "memory.db"
    options = ("--db", str(db), "--output", str(tmp_path / "missing" / "out.json"))
    done = CliRunner().invoke(main, ["feedback", "t1", "--success", *options])
    assert done.exit_code == 2
    assert "there is no folder" in done.stderr
    assert not db.exists()
