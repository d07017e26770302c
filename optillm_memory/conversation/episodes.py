"""Episodes: which one a request continues, where several begin with the same messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from optillm_memory.records import uuid7_hex

IDLE_S = 3600.0  # seconds without a request after which a continued conversation is a new episode
_FORK = "~fork-"
_FORKED = re.compile(rf"(?:{_FORK}[0-9a-f]{{12}})+\Z")
_OWN_NAME = re.compile(r"ep-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An episode that a conversation prefix belongs to.

    `latest` is the time of its latest request in Unix seconds; `closed` means that it has an outcome; `continuations`
    are the prefixes, one message longer, by which it continued. `inherits` is the episode that it was forked from,
    while none of its own requests is answered; `here` means that this process has seen it.
    """

    episode_id: str
    latest: float
    closed: bool = False
    continuations: frozenset[str] = field(default_factory=frozenset)
    inherits: str = ""
    here: bool = False


@dataclass(frozen=True, slots=True)
class Located:
    """The episode that a request belongs to, and the prefix and continuation that identified it.

    `inherits` is the episode that it was forked from: insertions in its prompts stay.
    """

    episode_id: str
    inherits: str = ""
    continued: str = ""
    continuation: str = ""


def locate(candidates: Iterable[Candidate], continued: str, continuation: str, now: float) -> Located | None:
    """Return the episode that this continuation of a prefix belongs to; None where no episode has the prefix.

    Many conversations begin with the same messages ("hi", the same greeting). An episode without a continuation comes
    before one with the same continuation (a repeated request). Of several, those without a caller's name come first,
    then those seen by this process (other processes may continue the others), then the latest. A second, different
    continuation is a new episode (a fork), and so is a request after an outcome or an hour of silence.
    """
    known = sorted(candidates, key=lambda c: (_is_own_name(c.episode_id), c.here, c.latest), reverse=True)
    if not known:
        return None
    open_ones = [c for c in known if not c.closed and now - c.latest <= IDLE_S]
    fresh = [c for c in open_ones if not c.continuations or not continuation]
    same = [c for c in open_ones if continuation in c.continuations]
    if found := next(iter((*fresh, *same)), None):
        return Located(found.episode_id, found.inherits, continued, continuation)
    return Located(fork_of(known[0].episode_id), known[0].episode_id, continued, continuation)


def merged(one: Iterable[Candidate], other: Iterable[Candidate]) -> list[Candidate]:
    """Merge the candidates of two sources for the same prefix."""
    found: dict[str, Candidate] = {}
    for item in (*one, *other):
        known = found.get(item.episode_id, item)
        found[item.episode_id] = Candidate(
            item.episode_id,
            max(known.latest, item.latest),
            known.closed or item.closed,
            known.continuations | item.continuations,
            known.inherits or item.inherits,
            known.here or item.here,
        )
    return list(found.values())


def root_of(episode_id: str) -> str:
    """Return the episode that an episode was forked from: the holdout is drawn once for all forks."""
    return _FORKED.sub("", episode_id)


def forks_of(episode_id: str) -> tuple[str, str]:
    """Return the half-open range of ids (start, end) of the forks of an episode."""
    start = root_of(episode_id) + _FORK
    return start, start[:-1] + chr(ord(start[-1]) + 1)


def new_episode_id() -> str:
    """Return a new id for an episode without a caller's name."""
    return f"ep-{uuid7_hex()}"


def _is_own_name(episode_id: str) -> bool:
    return _OWN_NAME.fullmatch(root_of(episode_id)) is not None


def fork_of(episode_id: str) -> str:
    """Return a new id for a fork of an episode."""
    return f"{root_of(episode_id)}{_FORK}{uuid7_hex()[-12:]}"
