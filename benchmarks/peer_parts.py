"""What every peer is given: vectors that are ready-made, and an LLM that answers at once."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.bench.records import DIMENSION, Records
from optillm_memory.conversation.parse import key_of
from optillm_memory.recall.encoder import REFERENCE, Vectors

Vector = NDArray[np.float32]


class Known:
    """Stands in for the encoder: texts whose vectors are known already."""

    fingerprint = "bench-known-384"

    def __init__(self) -> None:
        """Know what an encoder service asks for at its start."""
        self._vectors: dict[str, Vector] = {}
        for text, record in zip(REFERENCE, Records(len(REFERENCE), seed=1 << 20), strict=True):
            self.learn(text, record.vector)

    def learn(self, text: str, vector: Vector) -> None:
        """Know one more."""
        self._vectors[text] = self._vectors[key_of(text)] = vector

    def vector(self, text: str) -> Vector:
        """Return a text's vector; what a peer made of the texts itself has none, and gets one far from all."""
        if (vector := self._vectors.get(text)) is None:
            drawn = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIMENSION)
            vector = self._vectors[text] = (drawn / np.linalg.norm(drawn)).astype(np.float32)
        return vector

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of several texts."""
        return np.stack([self.vector(text) for text in texts])

    def lists(self, texts: Sequence[str]) -> list[list[float]]:
        """Return them as the lists of numbers that some peers want."""
        return [self.vector(text).tolist() for text in texts]


class Upstream:
    """Stands in for the LLM: answers at once, counts its calls, speaks the client's and mem0's language."""

    def __init__(self) -> None:
        """Start at none."""
        self.calls = 0
        self.chat = self.completions = self

    def create(self, *, messages: Sequence[Mapping[str, Any]], **_: Any) -> Any:
        """Answer as a client does: a kind of problem where one is asked for, else the text that was sent as a note."""
        self.calls += 1
        said = str(messages[-1]["content"])
        kinds = re.search(r"ONE of these types: (.*)\n", said)
        if kinds:
            names = kinds[1].split(", ")
            answer = names[zlib.crc32(said.encode()) % len(names)]
        elif noted := re.search(r"'''text\n(.*?)\n'''\nCopy over", said, re.DOTALL):
            answer = f"YES#{noted[1]}"
        else:
            answer = said
        return _Answer(answer)

    def generate_response(self, *_: Any, **__: Any) -> str:
        """Answer as mem0's own class does: nothing is worth extracting."""
        self.calls += 1
        return json.dumps({"memory": []})


class _Answer:
    def __init__(self, content: str) -> None:
        self.content = content
        self.message, self.choices, self.usage = self, [self], self
        self.completion_tokens = 1
