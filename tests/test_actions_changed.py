"""Changed environments: what becomes of served actions where a tool, a column or an id is gone, or access refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.multistep.changes import CHANGES, changed, warm
from benchmarks.multistep.passes import NAMESPACE, copied, opened
from benchmarks.multistep.world import UNCHANGED, Change
from optillm_memory import Memory, Scope
from optillm_memory.learn.procedures.effects import effect_of

ERROR = 0.5  # so lax that a few episodes open the gate
KNOWN, NEW = 3, 50  # a task that was done before, and one of the kind
Warmed = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def _no_audits() -> Iterator[None]:
    """Have every action served that may be: an audit would leave it to the LLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTILLM_AGENT_MEMORY_REUSE_AUDIT", "0")
        yield


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    """Give the database of a memory that has seen a family's tasks solved, made once for each family."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = db = tmp_path_factory.mktemp(name) / "memory.db"
            with opened(db) as memory:
                for number in range(4):
                    warm(memory, name, range(5), seed=f"w{number}")
        return made[name]

    return of


@contextmanager
def copy_of(db: Path, folder: Path) -> Iterator[Memory]:
    """Give a memory on a copy of a database."""
    copied(db, folder / db.name)
    with opened(folder / db.name) as memory:
        yield memory


def misled(memory: Memory) -> int:
    """Return how many procedures have served an action that was wrong."""
    return sum(found.misled > 0 for found in memory.store.procedures.changed(Scope("local", NAMESPACE), 0))


@pytest.mark.parametrize("name", sorted({name for name, _ in CHANGES}))
def test_without_a_change_actions_are_served(warmed: Warmed, tmp_path: Path, name: str) -> None:
    """In the environment in which memory learned it serves actions of a task that was done before, and none fails."""
    with copy_of(warmed(name), tmp_path) as memory:
        course = changed(memory, name, KNOWN, UNCHANGED, max_error=ERROR)
        assert course.solved
        assert course.served
        assert not any(s.failed or s.again or not s.offered for s in course.served)
        assert misled(memory) == 0


@pytest.mark.parametrize("number", [KNOWN, NEW])
@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[f"{name}-{c.kind}" for name, c in CHANGES])
def test_a_changed_environment_is_handed_back(
    warmed: Warmed, tmp_path: Path, name: str, change: Change, number: int
) -> None:
    """After the first mismatch nothing is served, what was wrong is not served again, and the LLM solves the task."""
    # In another's procedure the agent would read the other's choice of how to be paid.
    follow = 0.0 if name == "return_item" else 1.0
    with copy_of(warmed(name), tmp_path) as memory:
        course = changed(memory, name, number, change, max_error=ERROR, follow=follow)
        assert course.solved
        assert course.served_after_mismatch == []
        assert all(s.offered for s in course.served)
        wrong = [s for s in course.served if s.failed]
        assert len(wrong) <= 1
        assert (misled(memory) > 0) is bool(wrong)
        if change.kind == "tool_renamed":  # an agent with another tool is another agent
            assert course.served == []
        again = changed(memory, name, number, change, max_error=ERROR, follow=follow)
        assert again.solved
        assert not any(s.failed for s in again.served)
        if wrong:
            assert course.llm_calls > 1
            assert wrong[0].call not in [s.call for s in again.served]
    with opened(tmp_path / "memory.db") as memory:  # nor after a restart
        assert not any(s.failed for s in changed(memory, name, number, change, max_error=ERROR, follow=follow).served)


@pytest.mark.parametrize("name", ["gift_card", "unlock_account", "spent"])
def test_a_refusal_costs_the_procedure_value(warmed: Warmed, tmp_path: Path, name: str) -> None:
    """A served action that is refused is labelled wrong, and the LLM does what the refusal asks for."""
    change = next(c for family, c in CHANGES if family == name and c.kind == "refusal")
    with copy_of(warmed(name), tmp_path) as memory:
        before = misled(memory)
        course = changed(memory, name, KNOWN, change, max_error=ERROR)
        assert [s.failed for s in course.served][-1:] == [True]
        assert course.solved
        assert misled(memory) == before + 1
        assert [effect_of(s.call.tool, "{}") for s in course.served if s.failed] != ["writes"]
