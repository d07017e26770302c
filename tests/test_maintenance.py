"""Maintenance: every memory gets its vector and is found by meaning, whoever learned it and whatever failed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from builders import ask, body, hashing_memory, lexical_memory, response, teach, tell
from hosting import until

from optillm_memory.errors import StoreError
from optillm_memory.store.tables.vectors import VectorReads


def test_a_request_does_not_hide_a_memory_that_has_no_vector_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again before maintenance came to it, a memory made without an encoder is found by meaning afterwards."""
    task = "restart the nginx server"
    with lexical_memory(tmp_path) as memory:
        teach(memory, task, "systemctl restart nginx")
    free, look = threading.Event(), VectorReads.missing

    def held(store: VectorReads, fingerprint: str, after: int, limit: int) -> Any:
        free.wait(20)
        return look(store, fingerprint, after, limit)

    monkeypatch.setattr(VectorReads, "missing", held)
    with hashing_memory(tmp_path) as memory:
        assert memory.recall(task)[0].cosine is None
        ask(memory, task)
        free.set()
        assert until(lambda: memory.recall(task)[0].cosine is not None)
        assert memory.stats()["memories_without_vector"] == 0


def test_maintenance_goes_on_after_a_fault_and_sees_what_others_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that failed is tried again, and what another process learned gets its vector though nobody says so."""
    monkeypatch.setattr("optillm_memory.background.maintenance._LOOK_S", 0.05)
    monkeypatch.setattr("optillm_memory.background.maintenance._REPEAT_S", 0.05)
    failures, look = [StoreError("broken off")], VectorReads.missing

    def failing(store: VectorReads, fingerprint: str, after: int, limit: int) -> Any:
        if failures:
            raise failures.pop()
        return look(store, fingerprint, after, limit)

    monkeypatch.setattr(VectorReads, "missing", failing)
    with hashing_memory(tmp_path) as memory, lexical_memory(tmp_path) as another:
        for task in ("restart the nginx server", "list the open ports"):
            teach(another, task, "done")
            assert until(lambda task=task: bool(found := memory.recall(task)) and found[0].cosine is not None)  # type: ignore[misc]
        assert not failures


def test_what_is_learned_does_not_wait_until_all_is_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While maintenance rests from looking through old memories a new one gets its vector; afterwards all have one."""
    monkeypatch.setattr("optillm_memory.store.tables.vectors._STRETCH", 2)
    with hashing_memory(tmp_path) as memory:  # with vectors: there is nothing to do but to look
        for number in range(6):
            teach(memory, f"restart server number {number}", "done")
    with lexical_memory(tmp_path) as memory:
        for number in range(2):
            teach(memory, f"stop daemon number {number}", "done")
    monkeypatch.setattr("optillm_memory.background.maintenance._REST", 1e6)
    looks: list[int] = []
    look = VectorReads.missing

    def noted(store: VectorReads, fingerprint: str, after: int, limit: int) -> Any:
        looks.append(after)
        return look(store, fingerprint, after, limit)

    monkeypatch.setattr(VectorReads, "missing", noted)
    with hashing_memory(tmp_path) as memory:
        assert until(lambda: 0 in looks)  # and rests then, for hours
        written = memory.new_turn(body("count the words of a file"))  # nobody has its vector
        memory.finish(written, response("wc -w"))
        tell(memory, written)
        assert until(lambda: memory.stats()["memories_without_vector"] == 2)
        assert [m.cosine for m in memory.recall("stop daemon number 1")][:1] == [None]
    assert 2 not in looks
    monkeypatch.setattr("optillm_memory.background.maintenance._REST", 0.0)
    with hashing_memory(tmp_path) as memory:
        assert until(lambda: memory.stats()["memories_without_vector"] == 0)


def test_closing_is_not_missed_by_who_is_about_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed in the moment in which the erasing thread forgets that it was woken, it ends, and nobody waits for it."""
    monkeypatch.setattr("optillm_memory.background.maintenance._TOGETHER_S", 0.0)
    with lexical_memory(tmp_path) as memory:
        maintenance = memory._maintenance
        (erasing,) = (t for t in maintenance._threads if t.name == "agent-memory-erasure")
        clear = maintenance._forgotten.clear

        def while_it_closes() -> None:
            maintenance._closing.set()
            maintenance._forgotten.set()
            clear()

        monkeypatch.setattr(maintenance._forgotten, "clear", while_it_closes)
        maintenance.erase_soon()
        erasing.join(30)
        assert not erasing.is_alive()
