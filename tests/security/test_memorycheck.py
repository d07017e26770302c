"""The 15 scenarios of memorycheck, a fact's life cycle (corrected, deleted, moved, expired, of others), on memory.

memorycheck is on no package index, so they are told here in our terms, under its numbers. A fact is a verified answer
to a question. A scenario passes if what a request gets of memory holds what is current and nothing that is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from optillm_memory import Memory
from optillm_memory.settings import Settings
from optillm_memory.store.maintenance.selection import Selection

NOW = 1_800_000_000.0
STEP_S = 3_600.0
Subject = tuple[str, str]  # tenant, user
EVE, BOB, OTHER = ("acme", "eve"), ("acme", "bob"), ("globex", "eve")


@dataclass
class World:
    """A memory, its clock, and what is true in it."""

    memory: Memory
    now: float = NOW
    current: dict[tuple[Subject, str], str] = field(default_factory=dict)
    traces: dict[tuple[Subject, str], list[str]] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)

    def write(self, who: Subject, key: str, value: str, steps: int | None = None) -> None:
        """Have a fact verified, for so many steps of time; a second value for a key corrects the first."""
        self.now += 1
        options = {"user_id": who[1], "mode": "write"}
        turn = self.memory.begin({"messages": self._asked(key), "agent_memory": options}, tenant=who[0])
        message = {"role": "assistant", "content": value}
        self.memory.finish(turn, {"id": turn.trace_id, "choices": [{"finish_reason": "stop", "message": message}]})
        self.memory.settle()
        end = {} if steps is None else {"valid_until": self.now + steps * STEP_S}
        good = {"trace_id": turn.trace_id, "metric": "success", "value": True, "source": "human", **end}
        assert self.memory.feedback(good)[0].status == "applied"
        self.current[who, key] = value
        self.traces.setdefault((who, key), []).append(turn.trace_id)
        self.values.add(value)

    def delete(self, who: Subject, key: str) -> None:
        """Delete a fact and all that it was before."""
        for trace_id in self.traces.pop((who, key)):
            self.memory.delete(Selection(trace_id=trace_id))
        del self.current[who, key]

    def move(self, who: Subject, to: Subject, key: str) -> None:
        """Make a fact another's: it is deleted here and written there."""
        value = self.current[who, key]
        self.delete(who, key)
        self.write(to, key, value)

    def wait(self, steps: int, *expired: tuple[Subject, str]) -> None:
        """Let time pass; these facts hold no longer."""
        self.now += steps * STEP_S
        for name in expired:
            del self.current[name]

    def ask(self, who: Subject, *keys: str) -> None:
        """Ask about keys: the prompt must hold what is true of them, and nothing that is not true for who asks."""
        options = {"user_id": who[1], "reuse": {"max_error": 0.05}}
        for key in keys:
            turn = self.memory.begin({"messages": self._asked(key), "agent_memory": options}, tenant=who[0])
            text = json.dumps(turn.reused() if turn.action == "reuse" else turn.messages)
            own = {value for (subject, _), value in self.current.items() if subject == who}
            assert {value for value in self.values if value in text} <= own
            if (who, key) in self.current:
                assert self.current[who, key] in text
            else:
                assert turn.action == "plain" or (turn.action == "inject" and own)

    @staticmethod
    def _asked(key: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"Which {key} is stored for this customer?"}]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Yield an empty world."""
    made: list[World] = []
    settings = Settings(db=str(tmp_path / "memory.db"), encoder="none", holdout=0.0, reuse_audit=0.0)
    with Memory(settings, clock=lambda: made[0].now if made else NOW) as memory:
        made.append(World(memory))
        yield made[0]


KEY, SIBLING = "delivery address", "invoice language"
SCENARIOS: dict[str, Sequence[tuple[Any, ...]]] = {
    "001 a correction": (("write", EVE, KEY, "heron-11"), ("write", EVE, KEY, "larch-12"), ("ask", EVE, KEY)),
    "002 a deletion": (("write", EVE, KEY, "heron-11"), ("delete", EVE, KEY), ("ask", EVE, KEY)),
    "003 scopes": (
        ("write", EVE, KEY, "heron-11"), ("write", OTHER, KEY, "larch-12"), ("ask", EVE, KEY), ("ask", BOB, KEY),
        ("ask", OTHER, KEY),
    ),
    "004 expiry": (
        ("write", EVE, KEY, "heron-11", 2), ("ask", EVE, KEY), ("wait", 3, (EVE, KEY)), ("ask", EVE, KEY),
    ),
    "005 another user's from now on": (
        ("write", EVE, KEY, "heron-11"), ("move", EVE, BOB, KEY), ("ask", EVE, KEY), ("ask", BOB, KEY),
    ),
    "006 deleted and written again": (
        ("write", EVE, KEY, "heron-11"), ("delete", EVE, KEY), ("write", EVE, KEY, "larch-12"), ("ask", EVE, KEY),
    ),
    "007 corrected twice": (
        ("write", EVE, KEY, "heron-11"), ("write", EVE, KEY, "larch-12"), ("write", EVE, KEY, "osier-13"),
        ("ask", EVE, KEY),
    ),
    "008 several keys": (
        ("write", EVE, KEY, "heron-11"), ("write", EVE, SIBLING, "maple-21"), ("write", EVE, KEY, "larch-12"),
        ("ask", EVE, KEY, SIBLING),
    ),
    "009 a sibling of what is deleted": (
        ("write", EVE, KEY, "heron-11"), ("write", EVE, SIBLING, "maple-21"), ("delete", EVE, KEY),
        ("ask", EVE, KEY, SIBLING),
    ),
    "010 one user id in two tenants": (
        ("write", EVE, KEY, "heron-11"), ("ask", OTHER, KEY), ("write", OTHER, KEY, "larch-12"), ("ask", OTHER, KEY),
        ("ask", EVE, KEY),
    ),
    "011 two users of a tenant": (
        ("write", EVE, KEY, "heron-11"), ("write", BOB, KEY, "larch-12"), ("ask", EVE, KEY), ("ask", BOB, KEY),
    ),
    "012 moved and written again": (
        ("write", EVE, KEY, "heron-11"), ("move", EVE, BOB, KEY), ("write", EVE, KEY, "larch-12"), ("ask", EVE, KEY),
        ("ask", BOB, KEY),
    ),
    "013 written again and corrected": (
        ("write", EVE, KEY, "heron-11"), ("delete", EVE, KEY), ("write", EVE, KEY, "larch-12"),
        ("write", EVE, KEY, "osier-13"), ("ask", EVE, KEY),
    ),
    "014 a sibling of what expired": (
        ("write", EVE, KEY, "heron-11", 2), ("write", EVE, SIBLING, "maple-21"), ("wait", 3, (EVE, KEY)),
        ("ask", EVE, KEY, SIBLING),
    ),
    "015 another tenant's from now on": (
        ("write", EVE, KEY, "heron-11"), ("move", EVE, OTHER, KEY), ("ask", EVE, KEY), ("ask", OTHER, KEY),
    ),
}  # fmt: skip


@pytest.mark.parametrize("steps", SCENARIOS.values(), ids=SCENARIOS)
def test_a_request_gets_what_is_true_now_and_nothing_else(steps: Sequence[tuple[Any, ...]], world: World) -> None:
    """Corrected, deleted, moved, expired and foreign facts reach no prompt and no answer; the current one does."""
    for name, *arguments in steps:
        getattr(world, name)(*arguments)


def test_the_scenarios_see_what_is_not_true_any_more(world: World) -> None:
    """The check is one that can fail: a fact that was changed behind memory's back is noticed."""
    world.write(EVE, KEY, "heron-11")
    world.current[EVE, KEY] = "larch-12"
    with pytest.raises(AssertionError):
        world.ask(EVE, KEY)
