"""Power loss at random moments, many times: the real store on a disk that loses what was not synced."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.acknowledged import Faults, check, damage, opened, request, send_feedback
from benchmarks.faultdisk import PowerFailure, on
from optillm_memory.errors import AgentMemoryError
from optillm_memory.store.sqlite import connection

LIVES = 10  # of one file, before the next begins
_CLOSES = 0.2  # share of the lives that close properly if the power lasts
_ROLLBACK = 0.25  # share of the lives with a rollback journal, as for an SQLite whose WAL is unsafe


def run(
    folder: Path, losses: int, *, seed: int, tick: Callable[[], object], honest: bool = True
) -> dict[str, Any]:  # fmt: skip
    """Cut the power `losses` times, with a new file after every few; return the acknowledged feedback and the faults.

    A disk that is not `honest` only pretends to sync: the check must find lost what the store acknowledged on it.
    """
    chance = random.Random(seed)
    faults, total = Faults(), 0
    for first in range(0, losses, LIVES):
        acknowledged: dict[str, str] = {}
        place = folder / f"lost-{first}"
        place.mkdir()
        for life in range(first, min(losses, first + LIVES)):
            place, found = _life(place, f"life {life}", acknowledged, chance, honest=honest)
            faults += found + damage(place / "memory.db")
            tick()
        faults += check(place / "memory.db", acknowledged)
        total += len(acknowledged)
    return {"power_losses": losses, "acknowledged": total, **vars(faults)}


def _life(
    place: Path, name: str, acknowledged: dict[str, str], chance: random.Random, *, honest: bool
) -> tuple[Path, Faults]:
    """Write to a folder's file until the power fails; return a folder with what a restart finds, and the faults.

    An error while the power lasts is a fault: the file was damaged before.
    """
    faults = Faults()
    # The first operations, which start and migrate, are as likely as the many later ones.
    disk = PowerFailure(int(10 ** chance.uniform(0, 3.6)), chance.random, honest=honest)
    closes, wal = chance.random() < _CLOSES, chance.random() >= _ROLLBACK
    with on(disk), mock.patch.object(connection, "wal_is_safe", return_value=wal):
        memory = opened(place / "memory.db")
        try:
            for number in range(1, 1 << 30):
                trace_id = request(memory, f"task {number} of {name}")
                acknowledged[send_feedback(memory, trace_id)] = trace_id
                if closes and chance.random() < 1 / 20:
                    break
        except AgentMemoryError:
            faults += Faults(corrupt=int(not disk.failed))
        finally:
            memory.close()
    disk.unregister()
    remaining = place.with_name(f"{place.name}+")
    remaining.mkdir()
    disk.write_remaining(remaining)
    return remaining, faults
