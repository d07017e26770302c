"""`bench peers` puts the same through each memory: its figures are all there, and no peer reaches out."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cli import PEER_PACKAGES, main
from benchmarks.peer_kinds import PEERS, Ours
from benchmarks.peer_parts import PeerEncoder, Upstream
from benchmarks.peers import table
from optillm_memory.bench.records import Records
from optillm_memory.store.sqlite.connection import connect

KEYS = {
    "fill_per_s", "first_answer_s", "ask_p50_ms", "ask_p95_ms", "upstream_calls_per_ask", "finds", "add_per_s",
    "upstream_calls_per_add", "refused_of_80_at_once", "added", "kept_after_restart", "kept_of_80_at_once",
    "kept_after_kill", "ingest_per_s", "ingested",
}  # fmt: skip


@pytest.mark.long
def test_peers_are_measured_alike(tmp_path: Path) -> None:
    """Ours keeps all that it took and asks no LLM; optillm's own memory keeps 100 notes, and asks for each."""
    out = tmp_path / "figures.json"
    names = ("optillm-memory", "optillm memory")
    chosen = [part for name in names for part in ("--peer", name)]
    result = CliRunner().invoke(main, ["peers", "--sizes", "120", *chosen, "--simd", "avx2", "--output", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    ours, plugin = (figures["120"][name] for name in names)
    assert set(ours) == KEYS | {"requests_per_s"}, result.output
    assert set(plugin) == KEYS, result.output
    assert (ours["finds"], ours["kept_after_restart"], ours["kept_after_kill"]) == (1.0, 1.0, 1.0)
    assert (ours["kept_of_80_at_once"], ours["refused_of_80_at_once"]) == (80.0, 0.0)
    assert ours["upstream_calls_per_ask"] == ours["upstream_calls_per_add"] == 0.0
    assert plugin["upstream_calls_per_add"] == 2.0
    assert plugin["kept_of_80_at_once"] < 80
    assert ours["ingested"] == 480
    assert ours["ingest_per_s"] > 1.5 * ours["add_per_s"] > 0
    assert ours["requests_per_s"] > 0
    assert set(figures["settings"]["peers"]) == set(names)
    assert figures["settings"]["simd"] == "avx2"
    assert figures["settings"]["peers"]["optillm memory"] == {"optillm": figures["versions"]["optillm"]}
    assert "| optillm-memory |" in result.output
    assert "| ingest/s |" in result.output


def test_what_ours_accepted_is_on_disk_when_it_has_settled(tmp_path: Path) -> None:
    """The clock of an ingest stops when every record is in the file, learned, with its vector: nothing is left over."""
    encoder, count = PeerEncoder(), 1_000
    ours = Ours(tmp_path, encoder, Upstream(), count)
    texts = []
    for record in Records(count, seed=3):
        encoder.learn(record.task, record.vector)
        texts.append(record.task)
    ours.prepare(texts[: count // 2])
    for text in texts[: count // 2]:
        ours.accept(text)
    ours.settle()
    ours.prepare_requests(texts[count // 2 :])
    for text in texts[count // 2 :]:
        ours.request(text)
    ours.settle()
    with closing(connect(tmp_path / "memory.db", read_only=True)) as db:
        found = db.execute(
            "SELECT count(*) FROM memories JOIN vectors USING (key_hash) WHERE status = 'verified'"
        ).fetchone()
    ours.close()
    assert found[0] == count


def test_help_names_the_packages_of_all_peers() -> None:
    """What --help says to install is what the bench looks for."""
    wanted = dict.fromkeys(package for _, packages in PEERS.values() for package in packages)
    assert PEER_PACKAGES.split() == [package for package in wanted if not package.startswith("optillm")]
    result = CliRunner().invoke(main, ["peers", "--help"])
    assert f"pip install {PEER_PACKAGES}\n" in result.output


def test_unencoder_peers_are_named() -> None:
    """A name that is none of theirs is refused with those that are."""
    result = CliRunner().invoke(main, ["peers", "--peer", "mem1"])
    assert result.exit_code == 2
    assert "'mem1' is none of optillm-memory, chromadb" in result.output


def test_what_has_no_figure_has_a_hyphen() -> None:
    """A phase that failed leaves its cells, not its row."""
    assert (
        table({"one": {"ask_p50_ms": 1.25, "fill_per_s": 12345.0}})
        .splitlines()[2]
        .startswith("| one | 1.25 | - | - | 12,345 | - | - |")
    )


def test_guard_refuses_other_machines_and_installers() -> None:
    """In a watched process loopback is reached, other addresses and names are not, and no installer starts."""
    code = """
import socket, subprocess, sys
from benchmarks.peer_guard import watch
refused = watch()
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
for address in (("192.0.2.1", 80), ("telemetry.invalid", 443)):
    try:
        socket.create_connection(address, timeout=1)
        print("reached", address)
    except ConnectionRefusedError:
        pass
subprocess.run([sys.executable, "-c", ""], check=True)
for command in ([sys.executable, "-m", "pip", "install", "x"], "pip install x"):
    try:
        subprocess.run(command, shell=isinstance(command, str))
        print("ran", command)
    except PermissionError:
        pass
print(refused["connections"], refused["installs"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "2 2"
