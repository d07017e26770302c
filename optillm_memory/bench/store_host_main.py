"""The host that `bench store` measures: `optillm-memory serve` with an encoder that knows the bench's vectors.

Run as `python -m optillm_memory.bench.store_host_main VECTORS [OPTILLM ARGUMENTS]`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from optillm_memory.bench.records import FINGERPRINT, KnownEncoder, Vector
from optillm_memory.host import runtime
from optillm_memory.host.launcher import serve
from optillm_memory.memory import Memory


def save_vectors(path: Path, texts: Sequence[str], vectors: Sequence[Vector]) -> None:
    """Write the texts and vectors that the process will know."""
    np.savez(path, texts=np.array(texts), vectors=np.stack(vectors))


def load_encoder(path: Path) -> KnownEncoder:
    """Return an encoder that knows what `save_vectors` wrote; its vectors count as those of the bench's records."""
    encoder = KnownEncoder(FINGERPRINT)
    with np.load(path) as saved:
        for text, vector in zip(saved["texts"].tolist(), saved["vectors"], strict=True):
            encoder.learn(text, vector)
    return encoder


def _main(vectors: str, *arguments: str) -> None:
    # The host opens its memory itself and has no parameter for an encoder; Memory has one.
    vars(runtime)["Memory"] = partial(Memory, encoder=lambda: load_encoder(Path(vectors)))
    serve(arguments)


if __name__ == "__main__":
    _main(*sys.argv[1:])
