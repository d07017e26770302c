"""Operations that say beforehand what they will ask for: a commit reads it for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Arrival(NamedTuple):
    """A trace that is going to be appended, and its episode."""

    trace_id: str
    episode_id: str


class Submission(NamedTuple):
    """Feedback that is going to be appended, and the trace that it names."""

    tenant: str
    feedback_id: str
    trace_id: str | None


@dataclass(frozen=True, slots=True)
class Announced(Generic[T]):
    """An operation of a commit; it may do without, or with more than, what it says."""

    operation: Callable[[Any], T]
    arrivals: Sequence[Arrival] = ()
    feedback: Sequence[Submission] = ()

    def __call__(self, tx: Any) -> T:
        """Run it."""
        return self.operation(tx)


def padded(values: Sequence[T]) -> list[T]:
    """Return values with the last one repeated up to a power of two: a statement for many has few forms."""
    found = list(values)
    return found + found[-1:] * ((1 << (len(found) - 1).bit_length()) - len(found)) if found else []
