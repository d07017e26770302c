"""Fingerprints of encoders, by their content and never by a name.

The weights behind a hub name or in a folder can change, and the same weights have many names. So everything that
determines the vectors is hashed: weights, vocabulary, token ids of sample texts, pooling. Names of tensors and modules
are not, since the libraries rename them from release to release.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Databases contain vectors of these encoders under fingerprints of earlier releases (a name and a hash of the file).
# The encoder keeps the most common one; vectors under the others are renamed by maintenance.
_KEPT = {
    "st-7d124bd615e0bba053763524defa140a": "model:53aa51172d142c89",  # all-MiniLM-L6-v2
}
_FORMER = {"model:53aa51172d142c89": ("all-MiniLM-L6-v2:sentence-transformers/all-MiniLM-L6-v2",)}
# Configuration of the transformer that determines the vectors, beside the weights.
_CONFIG = ("hidden_act", "layer_norm_eps", "max_position_embeddings", "model_type", "num_attention_heads")


def fingerprint_of(model: Any, texts: Sequence[str]) -> str:
    """Return the fingerprint of a loaded SentenceTransformer; `texts` are samples for its tokenizer.

    It reads every weight once: about 0.1 s for 90 MB.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in sorted(_tensors(model.state_dict().values())):
        digest.update(tensor)
    tokenizer = model.tokenizer
    settings = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "tokens": tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)["input_ids"],
        "length": model.max_seq_length,
        "prompt": (model.prompts or {}).get(model.default_prompt_name or ""),
        "pooling": [_pooling(module) for module in model],
        "config": [str(getattr(model[0].auto_model.config, name, None)) for name in _CONFIG],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    found = f"st-{digest.hexdigest()}"
    return _KEPT.get(found, found)


def former_fingerprints(fingerprint: str, folder: Path) -> tuple[str, ...]:
    """Return the fingerprints that earlier releases gave the encoder in a folder (or of the hub, where it is none)."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return _FORMER.get(fingerprint, ())
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    names = (*_FORMER.get(fingerprint, ()), f"{folder.name}:{digest.hexdigest()[:16]}")
    return tuple(name for name in names if name != fingerprint)


def _tensors(tensors: Iterable[Any]) -> list[bytes]:
    """Return the digest of each tensor of weights; integer buffers, such as positions, are none."""
    import torch  # noqa: PLC0415 - whoever has a model has loaded it

    found = []
    for tensor in tensors:
        if tensor.is_floating_point():
            digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            found.append(digest.digest())
    return found


def _pooling(module: Any) -> str:
    """Return the pooling of a module; empty for the transformer and the normalisation, the name of any other module."""
    name = type(module).__name__
    if name != "Pooling":
        return "" if name in ("Transformer", "Normalize") else name
    mode = getattr(module, "pooling_mode", None)
    return f"Pooling {mode if mode is not None else module.get_pooling_mode_str()}"
