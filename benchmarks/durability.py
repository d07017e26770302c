"""`python -m benchmarks durability`: nothing acknowledged is lost by kills, power losses or many writers."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import kills as kill
from benchmarks import soak
from optillm_memory.errors import HostError

STEPS_OF_SOAK = 2


def run(
    *, kills: int, power_losses: int, processes: int, threads: int, seconds: float, seed: int,
    say: Callable[[str], object], tick: Callable[[], object],
) -> dict[str, Any]:  # fmt: skip
    """Run all three in a temporary folder; return the figures as flat keys.

    `lost`, `doubled`, `corrupt`, `differing` and `acknowledged` are sums over all three. Raises HostError if the
    package for the failing disk is missing.
    """
    power = _power() if power_losses else None
    with tempfile.TemporaryDirectory(prefix="optillm-memory-") as name, _quiet():
        folder = Path(name)
        parts: dict[str, dict[str, Any]] = {}
        if kills:
            say(f"killing {kills} times")
            parts["kills"] = kill.run(folder, kills, seed=seed, tick=tick)
        if power is not None:
            say(f"cutting the power {power_losses} times")
            parts["power"] = power.run(folder, power_losses, seed=seed, tick=tick)
        if seconds:
            say(f"{processes} processes with {threads} threads each, for {seconds:g} s")
            parts["soak"] = soak.run(folder, processes=processes, threads=threads, seconds=seconds, tick=tick)
    summed = ("acknowledged", "lost", "doubled", "corrupt", "differing")
    figures: dict[str, Any] = {name: sum(part[name] for part in parts.values()) for name in summed}
    for name, part in parts.items():
        figures |= {f"{name}_{key}" if key in summed else key: value for key, value in part.items()}
    return figures


def _power() -> Any:
    try:
        from benchmarks import power
    except ImportError as error:
        raise HostError(f"a power loss needs a disk that fails on demand: pip install apsw ({error})") from error
    return power


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log: the faults are intended."""
    log = logging.getLogger("optillm_memory")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)
