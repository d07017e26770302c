"""What long commands show while they work, and what stopping them leaves."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import feedback, lexical_memory, teach, trace
from click.testing import CliRunner

from optillm_memory.cli import main
from optillm_memory.cli.common import progress
from optillm_memory.store import fold
from optillm_memory.store.transaction import Transaction

MANY = 10_000  # memories whose vectors take some seconds


class Terminal(io.StringIO):
    """What takes itself for a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_a_log_gets_a_line_now_and_then_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal the first line is printed, none before its time has come, and where it ended."""
    with progress(every_s=3600) as told:
        for number in range(100):
            told(f"{number} of 100")
    assert capsys.readouterr().err == "0 of 100\n99 of 100\n"
    with progress(every_s=0) as told:
        told("one")
        told("two")
    assert capsys.readouterr().err == "one\ntwo\n"
    with progress():
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_has_one_line_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal each line takes the place of the one before."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress() as told:
        told("one")
        told("two")
    assert terminal.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K"


def test_every_long_command_tells_how_far_it_is(tmp_path: Path) -> None:
    """Where stderr is no terminal, backup, copy, reembed and forget leave their last line on it."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "restart the server", "systemctl restart s")
    db = str(tmp_path / "memory.db")
    for arguments, last in (
        (("backup", str(tmp_path / "backup.db"), "--db", db), "pages"),
        (("copy", db, str(tmp_path / "copy.db")), "rows"),
        (("reembed", "--prune", "--db", db), "1 memories"),
        (("forget", "--namespace", "default", "--yes", "--db", db), "overwriting"),
    ):
        done = CliRunner().invoke(main, [*arguments, "--json"], env={"OPTILLM_AGENT_MEMORY_ENCODER": "hashing"})
        assert done.exit_code == 0, done.output
        assert last in done.stderr
        json.loads(done.stdout)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let children hear SIGINT: a shell that runs us behind its back has it ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def learned(tx: Transaction, first: int, count: int) -> None:
    """Let a store learn so many verified answers in one commit."""
    for number in range(first, first + count):
        made = trace(f"question number {number}", f"answer {number}", episode_id=f"ep-{number}")
        tx.add_trace(made)
        fold.trace_arrived(tx, made)
        said = feedback(feedback_id=f"fb-{number}", trace_id=made.trace_id)
        fold.feedback_arrived(tx, "local", None, said, received_at=made.created_at)


def test_reembed_stopped_by_ctrl_c_goes_on_where_it_was(tmp_path: Path, interruptible: None) -> None:
    """A real SIGINT ends the real command in one line; what was embedded is kept, and the next run does the rest."""
    with lexical_memory(tmp_path) as memory:
        for first in range(0, MANY, 1_000):
            memory.store.write(lambda tx, first=first: learned(tx, first, 1_000)).result(60)  # type: ignore[misc]
        assert memory.store.vectors.coverage() == (MANY, {})
    command = [sys.executable, "-m", "optillm_memory.cli", "reembed", "--json", "--db", str(tmp_path / "memory.db")]
    env = {**os.environ, "OPTILLM_AGENT_MEMORY_ENCODER": "hashing"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first_line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert "memories" in first_line
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "Error: interrupted; what was embedded is kept: run it again to go on"
    assert "Traceback" not in err
    with lexical_memory(tmp_path) as memory:
        kept = sum(memory.store.vectors.coverage()[1].values())
    assert 0 < kept < MANY
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["embedded"] <= MANY - kept  # upkeep does its share at the same time
    with lexical_memory(tmp_path) as memory:
        assert memory.store.vectors.coverage()[1] == {"hashing-trigram-256": MANY}


def test_ctrl_c_while_the_encoder_loads_is_told_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the first memory was embedded, the command says the same and not merely that it was aborted."""
    with lexical_memory(tmp_path) as memory:
        teach(memory, "restart the server", "systemctl restart s")

    def stopped(_self: object, _timeout_s: float) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("optillm_memory.background.encoder_service.EncoderService.wait", stopped)
    done = CliRunner().invoke(main, ["reembed", "--db", str(tmp_path / "memory.db")])
    assert done.exit_code == 1
    assert "run it again to go on" in done.output
