"""The holdout: a small random share of episodes runs without memory, so that the uplift can be measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Assignment:
    """Whether an episode is held out, and the probability that it had of being assigned as it was."""

    held_out: bool
    propensity: float


def assign(episode_id: str, salt: bytes, share: float) -> Assignment:
    """Assign an episode by a keyed hash: the same for all its requests and in every process, and unpredictable.

    `salt` is the database's own secret, so that a caller who chooses episode ids cannot choose the assignment.
    """
    digest = hashlib.blake2b(episode_id.encode("utf-8", "replace"), key=salt, digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < share * 2**64
    return Assignment(held_out, share if held_out else 1.0 - share)
