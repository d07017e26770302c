"""Power loss at random moments: the real store on a disk that forgets what was not synced, over and over."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.acknowledged import Faults, check, damage, opened, request, tell
from benchmarks.faultdisk import PowerFailure, on
from optillm_memory.errors import AgentMemoryError
from optillm_memory.store.sqlite import connection

LIVES = 10  # of one file, before the next begins
_CLOSES = 0.2  # share of the lives that end in order, if the power lasts
_ROLLBACK = 0.25  # share of the lives with the journal of an SQLite whose WAL is not to be trusted


def run(
    folder: Path, losses: int, *, seed: int, tick: Callable[[], object], honest: bool = True
) -> dict[str, Any]:  # fmt: skip
    """Cut the power so many times, every few on a file of its own; return what was acknowledged and what is wrong.

    A disk that is not `honest` only says that it syncs: what the store acknowledges there must be found lost.
    """
    chance = random.Random(seed)
    faults, acknowledged = Faults(), 0
    for first in range(0, losses, LIVES):
        said: dict[str, str] = {}
        place = folder / f"lost-{first}"
        place.mkdir()
        for life in range(first, min(losses, first + LIVES)):
            place = _life(place, f"life {life}", said, chance, honest=honest)
            faults += damage(place / "memory.db")
            tick()
        faults += check(place / "memory.db", said)
        acknowledged += len(said)
    return {"power_losses": losses, "acknowledged": acknowledged, **vars(faults)}


def _life(place: Path, name: str, said: dict[str, str], chance: random.Random, *, honest: bool) -> Path:
    """Work on a folder's file until the power fails; return the folder with what is left."""
    # As likely among the first few operations, which start and migrate, as among many.
    disk = PowerFailure(int(10 ** chance.uniform(0, 3.6)), chance.random, honest=honest)
    closes, wal = chance.random() < _CLOSES, chance.random() >= _ROLLBACK
    with on(disk), mock.patch.object(connection, "wal_is_safe", return_value=wal):
        memory = opened(place / "memory.db")
        try:
            for number in range(1, 1 << 30):
                trace_id = request(memory, f"task {number} of {name}")
                said[tell(memory, trace_id)] = trace_id
                if closes and chance.random() < 1 / 20:
                    break
        except AgentMemoryError:
            assert disk.failed
        finally:
            memory.close()
    disk.unregister()
    left = place.with_name(f"{place.name}+")
    left.mkdir()
    disk.left_behind(left)
    return left
