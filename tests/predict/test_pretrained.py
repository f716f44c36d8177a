"""Models with real weights: where they are, and every way in which they may be missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from memrewrite.cli import main
from memrewrite.predict import models, pretrained
from memrewrite.predict.pretrained import PACKAGES, load, source, tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LLaMA of Hugging Face on disk."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL, num_attention_heads=2, attention_dropout=0.5)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("name", PACKAGES)
def test_weights_that_are_not_installed(name: str, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=PACKAGES[name].install):
        models.from_config(name)
    with pytest.raises(ValueError, match="its vocabulary and its layers are given"):
        models.from_config(name, layers=2)


def test_a_damaged_file_of_a_package(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: origin)
    with pytest.raises(ValueError, match=r"is damaged: its SHA-256 is .*--force-reinstall"):
        source("minilm")


def test_a_folder_is_loaded_whole_and_without_dropout_where_asked(folder: Path) -> None:
    model: Any = models.from_config(str(folder), dropout=False)
    whole = hf.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert model.training and model.config.attention_dropout == 0.0
    assert load(str(folder)).config.attention_dropout == 0.5  # type: ignore[union-attr]
    assert len(source(str(folder)).digest()) == 64


def test_a_model_without_a_head_gets_a_classifier(tmp_path: Path) -> None:
    config = hf.BertConfig(**SMALL, num_attention_heads=2)
    hf.BertModel(config).save_pretrained(tmp_path)
    model = load(str(tmp_path))
    given = models.inputs(model, 3, 8, torch.float32)
    assert given["labels"].shape == (3,)
    assert model(**given).logits.shape == (3, pretrained.LABELS)


def test_paths_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(FileNotFoundError, match="has no weights: give --pretrained"):
            source(str(path))
        words = ["bench", "--pretrained", str(path), "--output", str(tmp_path / "out")]
        assert main(words) == 2 and "has no weights" in capsys.readouterr().err


def test_an_architecture_that_transformers_cannot_read(monkeypatch: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf import GGUFWriter

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writer = GGUFWriter(tmp_path / "odd.gguf", "nothing-known")
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    with pytest.raises(ValueError, match=r"transformers cannot read odd.gguf"):
        load(str(tmp_path / "odd.gguf"))


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer that transformers reads"):
        tokenizer(str(folder))
