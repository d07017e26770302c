"""The plugin file: installed for plain optillm, removed without a trace, and files of others left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from optillm_memory.cli import main
from optillm_memory.errors import HostError
from optillm_memory.host.install import CONTENT, install, plugin_path, uninstall


def test_install_is_idempotent_and_uninstall_clean(tmp_path: Path) -> None:
    """Installing twice leaves one file, and uninstalling leaves nothing."""
    path = install(tmp_path)
    changed_at = path.stat().st_mtime_ns
    assert install(tmp_path) == path == plugin_path(tmp_path)
    assert path.stat().st_mtime_ns == changed_at
    assert path.read_text() == CONTENT
    assert uninstall(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not uninstall(tmp_path)


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    """A plugin file that we did not write is neither overwritten nor removed, and its neighbours stay."""
    path = plugin_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("SLUG = 'mine'\n")
    for action in (install, uninstall):
        with pytest.raises(HostError, match="not written by optillm-memory"):
            action(tmp_path)
    assert path.read_text() == "SLUG = 'mine'\n"
    path.unlink()
    neighbour = path.with_name("other_plugin.py")
    neighbour.write_text("")
    install(tmp_path)
    assert uninstall(tmp_path)
    assert neighbour.exists()


def test_uninstall_removes_what_python_cached(tmp_path: Path) -> None:
    """Compiled copies of the plugin file are no reason to keep its folders."""
    cached = install(tmp_path).parent / "__pycache__" / "agent_memory_plugin.cpython-310.pyc"
    cached.parent.mkdir()
    cached.write_bytes(b"compiled")
    assert uninstall(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_installs_and_uninstalls(tmp_path: Path) -> None:
    """`install` writes the file and says where to start optillm; `install --uninstall` removes it and says so."""
    where = str(tmp_path)
    done = CliRunner().invoke(main, ["install", where])
    assert (done.exit_code, done.stdout) == (0, f"{plugin_path(tmp_path)}: start optillm in {where}\n")
    assert plugin_path(tmp_path).read_text() == CONTENT
    again = CliRunner().invoke(main, ["install", where, "--json"])
    assert (again.exit_code, json.loads(again.stdout)) == (0, {"path": str(plugin_path(tmp_path))})
    removed = CliRunner().invoke(main, ["install", where, "--uninstall"])
    assert (removed.exit_code, removed.stdout) == (0, "removed\n")
    assert list(tmp_path.iterdir()) == []
    none = CliRunner().invoke(main, ["install", where, "--uninstall", "--json"])
    assert (none.exit_code, json.loads(none.stdout)) == (0, {"removed": False})
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_a_foreign_file(tmp_path: Path) -> None:
    """Both ways, a plugin file of that name from someone else is an error with exit code 1, and stays as it is."""
    path = plugin_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("SLUG = 'mine'\n")
    for options in ([], ["--uninstall"]):
        done = CliRunner().invoke(main, ["install", str(tmp_path), *options])
        assert done.exit_code == 1
        assert done.stderr == f"Error: {path} was not written by optillm-memory; move it elsewhere first\n"
        assert path.read_text() == "SLUG = 'mine'\n"
