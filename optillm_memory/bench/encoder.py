"""`bench encoder`: the encoder compared with that of sentence-transformers: time, and similarity of the vectors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optillm_memory.bench.report import quantile
from optillm_memory.recall.encoder import Encoder, SentenceTransformerEncoder, encoder_source, load_encoder

LENGTHS = (8, 16, 24, 32, 40, 48, 56, 63)  # tokens, including the special ones before and after each text
SHORT = 64


def run(texts: Sequence[str], *, repeats: int, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Return the times of both encoders in ms, one text at a time and in turn, by the texts' length in tokens.

    The texts' words are joined to `repeats` texts of each length. `ratio_under_64` is the sum of the encoder's medians
    over the lengths divided by that of the reference, `min_cosine` the lowest cosine of a vector and the reference's.
    """
    reference = SentenceTransformerEncoder(encoder_source("auto"))
    ours = load_encoder("auto")
    assert ours is not None
    made = _of_lengths(texts, reference.model.tokenizer, repeats)
    for encoder in (reference, ours):
        encoder.encode([made[LENGTHS[0]][0]])
    figures: dict[str, Any] = {}
    sums, least = {"encoder": 0.0, "reference": 0.0}, 1.0
    for length, chosen in made.items():
        times: dict[str, list[float]] = {"encoder": [], "reference": []}
        for text in chosen:
            vectors = {name: _timed(kind, text, times[name]) for name, kind in
                       (("encoder", ours), ("reference", reference))}  # fmt: skip
            least = min(least, float(np.vecdot(vectors["encoder"], vectors["reference"])[0]))
            tick()
        middle = {name: quantile(found, 0.5) for name, found in times.items()}
        figures[str(length)] = {f"{name}_p50_ms": round(value, 3) for name, value in middle.items()}
        figures[str(length)]["ratio"] = round(middle["encoder"] / middle["reference"], 3)
        sums = {name: sums[name] + middle[name] for name in sums}
    whole = round(sums["encoder"] / sums["reference"], 3)
    return {**figures, "ratio_under_64": whole, "min_cosine": round(least, 6), "encoder": type(ours).__name__}


def _timed(encoder: Encoder, text: str, times: list[float]) -> Any:
    started = time.perf_counter()
    vectors = encoder.encode([text])
    times.append((time.perf_counter() - started) * 1000)
    return vectors


def _of_lengths(texts: Sequence[str], tokenizer: Any, count: int) -> dict[int, list[str]]:
    """Return texts of each length, made of the words of others; a word that exceeds the length is cut."""
    words = itertools.cycle(word for text in texts for word in text.split())
    made: dict[int, list[str]] = {}
    for length in LENGTHS:
        made[length] = []
        while len(made[length]) < count:
            tokens: list[int] = []
            while len(tokens) < length - 2:
                tokens += tokenizer(next(words), add_special_tokens=False)["input_ids"]
            made[length].append(str(tokenizer.decode(tokens[: length - 2])))
    return made
