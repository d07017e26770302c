"""The commands on a database that is not there: who only reads or deletes says so, and makes none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from postgres import Server

from optillm_memory.cli import main
from optillm_memory.store.postgres.schema import is_there

ON_WHAT_IS_THERE = {
    "stats": (), "traces": (), "show": ("t1",), "why": ("t1",), "memories": (), "uplift": (), "policy": (),
    "recall": ("a task",), "rebuild": (), "verify": (), "backup": ("copy.db",), "forget": ("--trace", "t1", "--yes"),
    "reembed": (),
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
        assert ("there is no memory on postgresql://" in done.stderr) == (name != "backup"), done.stderr
    assert not is_there(url)
    assert CliRunner().invoke(main, ["feedback", "t1", "--success", "--db", url]).exit_code == 0
    assert CliRunner().invoke(main, ["stats", "--db", url]).exit_code == 0


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
