"""The four passes over the multi-step tasks, each in a memory that is opened anew on the same database.

Pass 1 is cold: memory records and says nothing. Pass 2 does the same tasks again, pass 3 as many with other names, and
pass 4 those of pass 1 once more, with leave to serve actions: all tools that change nothing are declared read-only, and
those that change something without a question to the user are allowed by name. Pass 3 is also made from a copy of the
database of pass 2 with a holdout.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.multistep.episode import Course, run_episode
from benchmarks.multistep.families import FAMILIES, tasks
from benchmarks.multistep.figures import Outing, against, held_out, served_errors, summary
from benchmarks.multistep.policy import Agent
from benchmarks.multistep.task import Domain, Family, Task
from optillm_memory.conversation.options import parse_options
from optillm_memory.errors import InvalidField
from optillm_memory.memory import Memory
from optillm_memory.settings import Settings

NAMESPACE = "bench-agent"
_FAST = Path("/dev/shm")  # what is measured is not the disk
_OTHER_NAMES, _NEXT_SEED = 500, 1000  # the numbers of the tasks of pass 3, and of the next seed
FOLLOW = (1.0, 0.7)
PASSES = ("pass_2", "pass_3", "holdout", "pass_4")


def episodes(
    seeds: int, instances: int, follow: Sequence[float] = FOLLOW, families: Sequence[Family] = FAMILIES
) -> int:
    """Return how many episodes `run` makes with memory."""
    return seeds * instances * len(families) * (1 + len(PASSES) * len(follow))


def run(
    *,
    seeds: int = 1,
    seed: int = 0,
    instances: int = 12,
    follow: Sequence[float] = FOLLOW,
    max_error: float = 0.05,
    share: float = 0.5,
    families: tuple[Family, ...] = FAMILIES,
    encoder: str = "hashing",
    say: Callable[[str], None] = lambda _text: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make the passes with `instances` tasks of each family for each seed, and return the figures over all seeds.

    `follow` are the probabilities with which the agent follows a step of a procedure; pass 1 is the same for all.
    """
    first: list[list[Outing]] = []
    found: dict[float, dict[str, list[list[Outing]]]] = {p: {name: [] for name in PASSES} for p in follow}
    for number in range(seed, seed + seeds):
        say(f"multi-step tasks, seed {number}")
        with tempfile.TemporaryDirectory(
            prefix="optillm-memory-bench-", dir=_FAST if _FAST.is_dir() else None
        ) as folder:
            one = _Seed(Path(folder), number, instances, families, encoder, max_error, share, tick)
            first.append(one.cold())
            for probability in follow:
                for name, outings in one.warm(probability).items():
                    found[probability][name].append(outings)
    one_ = summary(_joined(first))
    return {
        "families": len(families),
        "actions_supported": actions_supported(max_error),
        "pass_1": one_,
        **{f"follow_{p:g}": _figures(found[p], one_, max_error) for p in follow},
    }


def _figures(found: Mapping[str, list[list[Outing]]], first: Mapping[str, Any], max_error: float) -> dict[str, Any]:
    second, third, fourth = (against(summary(_joined(found[n])), first) for n in ("pass_2", "pass_3", "pass_4"))
    least = [o.course.task.family.least_llm_calls for o in _joined(found["pass_4"])]
    return {
        "pass_2": second,
        "pass_3": third,
        "pass_4": {
            **fourth,
            # What remains where memory serves all that it may.
            "least_share_of_llm_calls": round(sum(least) / len(least) / first["llm_calls_per_task"], 4),
            "served": served_errors(found["pass_4"], max_error),
        },
        "holdout": held_out(_joined(found["holdout"])),
    }


def _joined(by_seed: Sequence[Sequence[Outing]]) -> list[Outing]:
    return [outing for outings in by_seed for outing in outings]


class _Seed:
    """The passes of one seed."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        instances: int,
        families: tuple[Family, ...],
        encoder: str,
        max_error: float,
        share: float,
        tick: Callable[[], None],
    ) -> None:
        self._folder, self._seed, self._encoder, self._tick = folder, seed, encoder, tick
        self._max_error, self._share = max_error, share
        self._same = tasks(seed * _NEXT_SEED, instances, families)
        self._other = tasks(seed * _NEXT_SEED + _OTHER_NAMES, instances, families)
        self._before: dict[tuple[str, int], Course] = {}

    def cold(self) -> list[Outing]:
        """Make pass 1."""
        outings = self._pass("pass_1", self._same, self._folder / "cold.db", 0.0, lambda _: {"mode": "write"})
        self._before = {o.course.task.key: o.course for o in outings}
        return outings

    def warm(self, follow: float) -> dict[str, list[Outing]]:
        """Make the other passes from a copy of the database of pass 1."""
        db, aside = self._folder / f"warm-{follow:g}.db", self._folder / f"aside-{follow:g}.db"
        copied(self._folder / "cold.db", db)
        found = {"pass_2": self._pass("pass_2", self._same, db, follow, lambda _: {})}
        copied(db, aside)
        found["pass_3"] = self._pass("pass_3", self._other, db, follow, lambda _: {})
        # The same agent on the same tasks, so that only the holdout differs.
        found["holdout"] = self._pass("pass_3", self._other, aside, follow, lambda _: {}, share=self._share)
        found["pass_4"] = self._pass("pass_4", self._same, db, follow, lambda domain: serving(domain, self._max_error))
        return found

    def _pass(
        self,
        name: str,
        chosen: Sequence[Task],
        db: Path,
        follow: float,
        options: Callable[[Domain], Mapping[str, Any]],
        *,
        share: float = 0.0,
    ) -> list[Outing]:
        agent = Agent(f"{self._seed}/{name}", follow)
        order = Random(f"{self._seed}/{name}").sample(list(chosen), len(chosen))
        outings = []
        with opened(db, self._encoder, share) as memory:
            for task in order:
                course = run_episode(task, agent, memory, {"namespace": NAMESPACE, **options(task.family.domain)})
                plain, best = run_episode(task, agent), run_episode(task, Agent(agent.seed, wasteful=False))
                outings.append(Outing(course, plain, best, self._before.get(task.key)))
                self._tick()
            memory.settle()
        return outings


def opened(db: Path, encoder: str = "hashing", share: float = 0.0) -> Memory:
    """Open a memory as a new process would, with its encoder ready."""
    memory = Memory(Settings.from_env(db=str(db), encoder=encoder, holdout=share))
    memory.encoder.wait(120)
    return memory


def serving(domain: Domain, max_error: float) -> dict[str, Any]:
    """Return the options by which memory may serve actions; none where it does not know of that yet."""
    if not actions_supported(max_error):
        return {}
    return {
        "reuse": {"max_error": max_error, "actions": True},
        "tools": {"read_only": domain.read_only, "allow": list(domain.allowed)},
    }


def actions_supported(max_error: float) -> bool:
    """Whether memory takes the options by which it may serve actions."""
    try:
        parse_options({"reuse": {"max_error": max_error, "actions": True}, "tools": {"read_only": ["x"]}}, now=0.0)
    except InvalidField:
        return False
    return True


def copied(db: Path, to: Path) -> None:
    """Copy a closed database with the files beside it."""
    for file in db.parent.glob(f"{db.name}*"):
        if file.is_file():
            shutil.copy(file, to.parent / file.name.replace(db.name, to.name, 1))
