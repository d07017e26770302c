"""The encoder through OpenVINO: the same model in half the time or less, on one core where possible."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optillm_memory.recall.encoder import REFERENCE, Encoder, SentenceTransformerEncoder, Vectors

logger = logging.getLogger(__name__)
FIDELITY = 0.9999  # the least cosine to the original's vectors that is accepted
_THREADS = 2  # the other cores are left to the proxy
_STEP = 8  # texts are padded to a multiple of this number of tokens, since each new shape costs some ms once
_TOKENS = 1_024  # in one batch; more would not be faster, and need memory


class OpenVinoEncoder:
    """A mean-pooling sentence-transformers model, compiled for this processor.

    Inference releases the interpreter lock. With AMX (bfloat16 matrix products) it runs in the caller's thread, which
    is fast enough and waits for no other core; else on `_THREADS` cores.
    """

    def __init__(self, original: SentenceTransformerEncoder, mode: str = "PERFORMANCE") -> None:
        """Convert and compile the model, in the processor's fastest precision or, in mode ACCURACY, in the model's own.

        Raises ImportError without OpenVINO, and the exceptions of its converter.
        """
        import torch  # noqa: PLC0415

        core = _openvino().Core()
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.11
        alone = mode == "PERFORMANCE" and capabilities.get("amx_bf16", False)
        settings = {
            "EXECUTION_MODE_HINT": mode,
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": 1 if alone else min(_THREADS, torch.get_num_threads()),
            "ENABLE_CPU_PINNING": False,  # of many processes on a machine each would be bound to the same cores
        }
        self._run = core.compile_model(_converted(original.model), "CPU", settings).create_infer_request()
        self._lock = threading.Lock()  # an inference request serves one caller at a time
        fast = original.model.tokenizer.backend_tokenizer
        self._tokenizer = type(fast).from_str(fast.to_str())  # a copy, since padding and truncation are its state
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(int(original.model.max_seq_length))
        self._dimension = int(original.model[0].auto_model.config.hidden_size)
        self.fingerprint, self.former_fingerprints = original.fingerprint, original.former_fingerprints

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors: the mean over each text's tokens (Reimers and Gurevych 2019, section 3)."""
        vectors = np.zeros((len(texts), self._dimension), dtype=np.float32)
        tokens = [encoded.ids for encoded in self._tokenizer.encode_batch_fast(list(texts))]
        for group in _grouped([len(ids) for ids in tokens]):
            ids, mask = _padded([tokens[number] for number in group])
            with self._lock:
                hidden = self._run.infer([ids, mask], share_outputs=True)[0]
                vectors[group] = _means(hidden, mask)
        return vectors


def accelerated(original: SentenceTransformerEncoder) -> Encoder:
    """Return the model through OpenVINO if that gives the same vectors, else the original."""
    for mode in ("PERFORMANCE", "ACCURACY"):
        try:
            faster = OpenVinoEncoder(original, mode)
            fidelity = float(np.vecdot(faster.encode(REFERENCE), original.encode(REFERENCE)).min())
        except Exception as error:  # noqa: BLE001 - a converter fails in many ways; the original still works
            logger.info("agent_memory: no encoder through OpenVINO (%s): %s: %s", mode, type(error).__name__, error)
            continue
        if fidelity >= FIDELITY:
            return faster
        logger.info("agent_memory: through OpenVINO (%s) the encoder's vectors have cosine %.4f", mode, fidelity)
    return original


def _grouped(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of texts in batches of similar length, of at most `_TOKENS` tokens or one text."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[number] > _TOKENS:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _padded(tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the token ids and their mask, both of shape (texts, tokens)."""
    longest = max(map(len, tokens))
    ids = np.zeros((len(tokens), -(-longest // _STEP) * _STEP), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, found in enumerate(tokens):
        ids[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return ids, mask


def _means(hidden: NDArray[np.float32], mask: NDArray[np.int64]) -> Vectors:
    weights = mask[..., None].astype(np.float32)
    means = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report the import over the network."""
    absent = "openvino_telemetry" not in sys.modules
    if absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # it is then taken as not installed
    try:
        import openvino  # noqa: PLC0415
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]
    return openvino


def _converted(model: Any) -> Any:
    """Return the transformer as an OpenVINO model of token ids and mask, with dynamic shapes (texts, tokens).

    It uses the frontend directly: `openvino.convert_model` would report each conversion.
    """
    import torch  # noqa: PLC0415
    from openvino import PartialShape, Type  # noqa: PLC0415
    from openvino.frontend import FrontEndManager  # noqa: PLC0415
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: PLC0415
    from transformers.utils import logging as talk  # noqa: PLC0415

    class Hidden(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model[0].auto_model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = model.tokenizer(["two texts of", "different lengths are traced"], padding=True, return_tensors="pt")
    frontend = FrontEndManager().load_by_framework("pytorch")
    before = talk.get_verbosity()
    talk.set_verbosity_error()  # tracing reads attributes that emit irrelevant warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about traced shapes
            traced = TorchScriptPythonDecoder(
                Hidden().eval(), example_input=(example["input_ids"], example["attention_mask"])
            )
    finally:
        talk.set_verbosity(before)
    converted = frontend.convert(frontend.load(traced))
    for entry in converted.inputs:
        entry.get_node().set_element_type(Type.i64)
        entry.get_node().set_partial_shape(PartialShape([-1, -1]))
    converted.validate_nodes_and_infer_types()
    return converted
