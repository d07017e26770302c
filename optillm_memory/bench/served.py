"""An optillm with memory as `optillm-memory serve` starts it, but whose encoder has the bench's vectors ready-made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.peer_parts import Known, Vector
from optillm_memory.bench.records import FINGERPRINT
from optillm_memory.host import runtime
from optillm_memory.host.launcher import serve
from optillm_memory.memory import Memory


class Ready(Known):
    """Knows the texts that will be asked for; its vectors are of the kind that the bench's records have."""

    fingerprint = FINGERPRINT

    @classmethod
    def of(cls, path: Path) -> Ready:
        """Read them from where `keep` put them."""
        known = cls()
        with np.load(path) as held:
            for text, vector in zip(held["texts"].tolist(), held["vectors"], strict=True):
                known.learn(text, vector)
        return known


def keep(path: Path, texts: Sequence[str], vectors: Sequence[Vector]) -> None:
    """Write what the process will know."""
    np.savez(path, texts=np.array(texts), vectors=np.stack(vectors))


def _main(vectors: str, *arguments: str) -> None:
    # The host opens its memory itself and has no parameter for an encoder; memory has one.
    vars(runtime)["Memory"] = partial(Memory, encoder=lambda: Ready.of(Path(vectors)))
    serve(arguments)


if __name__ == "__main__":
    _main(*sys.argv[1:])
