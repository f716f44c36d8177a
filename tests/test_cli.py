"""The console script."""

from __future__ import annotations

from pathlib import Path

import pytest

import memrewrite
from memrewrite.cli import main


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == memrewrite.__version__
    assert main([]) == 0
    assert "sites" in capsys.readouterr().out


def test_sites_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    assert main(["sites", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    selected = {line.split()[0] for line in lines if line.endswith("yes")}
    assert selected == {"model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"}
