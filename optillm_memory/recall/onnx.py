"""The encoder through ONNX Runtime: the same model at full precision, in half the time or less for a short text."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from optillm_memory.recall.encoder import REFERENCE, Encoder, SentenceTransformerEncoder, Vectors

logger = logging.getLogger(__name__)
FIDELITY = 0.9999  # the least cosine to the original's vector that is taken as the same model
# Beside a server one thread serves a short text best: waking a second takes as long as it saves, and takes it from
# others. From so many tokens on two are quicker by a third.
_LONG, _THREADS = 20, 2


class OnnxEncoder:
    """A mean-pooling sentence-transformers model, exported in memory, its attention fused into one step a layer.

    Python's lock is free while it runs, and its threads wait without spinning.
    """

    def __init__(self, original: SentenceTransformerEncoder) -> None:
        """Export the model. Raises whatever the exporter does, and ImportError without onnx and onnxruntime."""
        import onnx  # noqa: F401, PLC0415 - the exporter's own need, looked for before the work
        import onnxruntime  # noqa: PLC0415
        import torch  # noqa: PLC0415

        self.fingerprint = original.fingerprint
        self._tokenizer: Any = original.model.tokenizer
        self._limit = int(original.model.max_seq_length)
        self._dimension = int(original.model[0].auto_model.config.hidden_size)
        transformer = original.model[0].auto_model
        exported = _fused(_exported(transformer, self._tokenizer), transformer.config)

        def session(threads: int) -> Any:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3
            return onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])

        threads = min(_THREADS, torch.get_num_threads())
        self._short = session(1)
        self._long = session(threads) if threads > 1 else self._short

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors: the mean over each text's tokens (Reimers and Gurevych 2019, section 3)."""
        if not texts:
            return np.zeros((0, self._dimension), dtype=np.float32)
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._limit, return_tensors="np"
        )
        mask = tokens["attention_mask"].astype(np.int64)
        session = self._long if mask.size >= _LONG else self._short
        hidden = session.run(None, {"input_ids": tokens["input_ids"].astype(np.int64), "attention_mask": mask})[0]
        weights = mask[..., None].astype(np.float32)
        means = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
        vectors = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return np.asarray(vectors, dtype=np.float32)


def accelerated(original: SentenceTransformerEncoder) -> Encoder:
    """Return the model through ONNX Runtime where that gives the same vectors, else as it is."""
    try:
        faster = OnnxEncoder(original)
        fidelity = float(np.vecdot(faster.encode(REFERENCE), original.encode(REFERENCE)).min())
    except Exception as error:  # noqa: BLE001 - an exporter fails in many ways; the original still works
        logger.info("agent_memory: the encoder stays in PyTorch: %s: %s", type(error).__name__, error)
        return original
    if fidelity < FIDELITY:
        logger.info("agent_memory: the encoder stays in PyTorch: through ONNX its vectors have cosine %.4f", fidelity)
        return original
    return faster


def _exported(transformer: Any, tokenizer: Any) -> bytes:
    import torch  # noqa: PLC0415

    class Hidden(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    plainly = getattr(transformer.config, "_attn_implementation", "eager")
    transformer.set_attn_implementation("eager")  # the form in which attention is known again below
    example = tokenizer(["two texts of", "different lengths make both axes free"], padding=True, return_tensors="pt")
    axes = {0: "texts", 1: "tokens"}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own future and of traced shapes
        torch.onnx.export(
            Hidden().eval(),
            (example["input_ids"], example["attention_mask"]),
            file,
            input_names=["input_ids", "attention_mask"],
            output_names=["hidden"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
            opset_version=17,
            dynamo=False,
        )
    transformer.set_attn_implementation(plainly)
    return file.getvalue()


def _fused(exported: bytes, config: Any) -> bytes:
    """Return the model with attention, biases and normalisation in fused steps; as it is where that fails."""
    import onnx  # noqa: PLC0415

    try:
        from onnxruntime.transformers.fusion_options import FusionOptions  # noqa: PLC0415
        from onnxruntime.transformers.optimizer import optimize_model  # noqa: PLC0415

        options = FusionOptions("bert")
        options.use_multi_head_attention = False
        fused = optimize_model(
            onnx.load_from_string(exported), model_type="bert", num_heads=int(config.num_attention_heads),
            hidden_size=int(config.hidden_size), optimization_options=options, opt_level=0,
        )  # fmt: skip
        content: bytes = fused.model.SerializeToString()
    except Exception as error:  # noqa: BLE001 - it knows some models, in some releases; the rest works unfused
        logger.info("agent_memory: the encoder's steps are not fused: %s: %s", type(error).__name__, error)
        return exported
    return content
