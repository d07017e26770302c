"""What every peer gets: an encoder that knows all vectors in advance, and an LLM that answers at once."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from optillm_memory.bench.records import KnownEncoder


class PeerEncoder(KnownEncoder):
    """An encoder that costs nothing, with the forms of vectors that peers want."""

    def lists(self, texts: Sequence[str]) -> list[list[float]]:
        """Return the vectors of several texts as lists of numbers."""
        return [self.vector(text).tolist() for text in texts]


class Upstream:
    """Replaces the LLM: answers at once, counts its calls, has the interfaces of a client and of mem0's LLM."""

    def __init__(self) -> None:
        """Start with no calls."""
        self.calls = 0
        self.chat = self.completions = self

    def create(self, *, messages: Sequence[Mapping[str, Any]], **_: Any) -> Any:
        """Answer as a client does: with a kind of problem if asked for one, else with the request's text as a note."""
        self.calls += 1
        prompt = str(messages[-1]["content"])
        kinds = re.search(r"ONE of these types: (.*)\n", prompt)
        if kinds:
            names = kinds[1].split(", ")
            answer = names[zlib.crc32(prompt.encode()) % len(names)]
        elif noted := re.search(r"'''text\n(.*?)\n'''\nCopy over", prompt, re.DOTALL):
            answer = f"YES#{noted[1]}"
        else:
            answer = prompt
        return _Answer(answer)

    def generate_response(self, *_: Any, **__: Any) -> str:
        """Answer as mem0's own class does: there is nothing to extract."""
        self.calls += 1
        return json.dumps({"memory": []})


class _Answer:
    def __init__(self, content: str) -> None:
        self.content = content
        self.message, self.choices, self.usage = self, [self], self
        self.completion_tokens = 1
