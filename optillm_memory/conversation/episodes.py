"""Episodes: which one a conversation goes on with, where many begin alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from optillm_memory.records import uuid7_hex

IDLE_S = 3600.0  # after so long without a request a conversation that goes on is a new episode
_FORK = "~fork-"
_FORKED = re.compile(rf"(?:{_FORK}[0-9a-f]{{12}})+\Z")
_OWN_NAME = re.compile(r"ep-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An episode that a conversation prefix belongs to.

    `latest` is the time of its latest request in Unix seconds; `closed` says that it has an outcome; `continuations`
    are the prefixes, one message longer, with which it has gone on from there. `inherits` is the episode whose
    conversation goes on in it, as long as none of its own requests is answered; `here` says that this process has
    seen it.
    """

    episode_id: str
    latest: float
    closed: bool = False
    continuations: frozenset[str] = field(default_factory=frozenset)
    inherits: str = ""
    here: bool = False


@dataclass(frozen=True, slots=True)
class Located:
    """The episode that a request belongs to, and the prefix and continuation by which that was found.

    `inherits` is the episode whose conversation goes on in this one: what stands in its prompts stays.
    """

    episode_id: str
    inherits: str = ""
    continued: str = ""
    continuation: str = ""


def locate(candidates: Iterable[Candidate], continued: str, continuation: str, now: float) -> Located | None:
    """Return the episode that goes on with this continuation of a prefix; None where no episode has the prefix.

    Many conversations begin alike ("hi", the same greeting). One that has not gone on from the prefix yet is taken
    before one that went on in the same way (the same request again). Of several, those that no caller has named come
    first, then those that this process has seen (other processes may be going on with the others), then the latest. A
    second, different continuation is an episode of its own, and so is what follows an outcome or an hour of silence.
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
    """Return what two sources know of the same prefix, as one list."""
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
    """Return the episode whose conversation an episode began with: the holdout is drawn once for all of them."""
    return _FORKED.sub("", episode_id)


def forks_of(episode_id: str) -> tuple[str, str]:
    """Return the range of ids, with its start and without its end, of the episodes that began with this one's."""
    start = root_of(episode_id) + _FORK
    return start, start[:-1] + chr(ord(start[-1]) + 1)


def new_episode_id() -> str:
    """Return the id of an episode that no caller has named."""
    return f"ep-{uuid7_hex()}"


def _is_own_name(episode_id: str) -> bool:
    return _OWN_NAME.fullmatch(root_of(episode_id)) is not None


def fork_of(episode_id: str) -> str:
    """Return a new episode's id that tells with which episode's conversation it began."""
    return f"{root_of(episode_id)}{_FORK}{uuid7_hex()[-12:]}"
