"""The console script."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import memrewrite
from memrewrite import cli
from memrewrite.cli import main
from memrewrite.predict import models
from memrewrite.predict.estimate import Estimate, Program


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


SMALL = ["llama-60m", "--layers", "1", "--vocab", "64", "--batch", "2", "--seq", "16"]


def test_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", *SMALL, "--velora", "--sites", "all", "--galore-rank", "16", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memrewrite"]["saved"] < found["torch.compile"]["saved"]
    assert found["memrewrite"]["optimizer_state"] < found["torch.compile"]["optimizer_state"]
    assert found["symbols"] == {}


@pytest.mark.slow
def test_the_largest_batch_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", *SMALL, "--velora", "--sites", "all", "--fit", "200MB"]
    assert main(words) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "largest batch within 200MB at sequence 16:"
    plain, ours = (int(word.split()[-1]) for word in second.split(", "))
    assert ours > plain > 0
    assert any(line.split()[0] == "peak" for line in rest if line.split())


@pytest.mark.slow
def test_report_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    deep = [*SMALL, "--layers", "2"]
    assert main(["report", *deep, "--velora", "--full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("model.")}
    assert " compressed " in rows["model.layers.1.mlp.down_proj"]
    assert " exact " in rows["model.layers.1.mlp.up_proj"]
    assert main(["report", *deep, "--velora"]) == 0
    assert "\nmodel.layers.*.mlp.down_proj x 2 " in capsys.readouterr().out


def test_a_deep_stack_takes_the_shortcut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def whole(arguments: argparse.Namespace, dynamic: bool) -> Any:
        seen.append(arguments.layers)
        program = Program(*(8 * (arguments.layers or 80) + i for i in range(8)))
        return Estimate(program, program, {}, "logits")

    monkeypatch.setattr(cli, "_whole", whole)
    assert main(["estimate", "llama-70b"]) == 0
    assert seen == [8, 12, 16]
    short = capsys.readouterr().out.splitlines()
    assert main(["estimate", "llama-70b", "--whole"]) == 0
    assert seen[3:] == [None]
    figures, owner = short[:-1], short[-1]
    assert figures == capsys.readouterr().out.splitlines()[:-1] and " 647 " in figures[-2]
    assert owner == "from depths 8, 12 and 16; at 16, logits"
    assert main(["estimate", "llama-60m"]) == 0
    assert seen[4:] == [None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["estimate"], "name a model"),
        (["estimate", "llama-9t"], "neither a file nor one of"),
        (["estimate", "nowhere:model"], "No module named 'nowhere'"),
        (["estimate", "llama-60m", "--optimizer", "magic"], "is none of"),
        (["estimate", "llama-60m", "--fit", "much"], "no amount of memory"),
        (["estimate", "llama-60m", "--velora", "--subtoken-size", "9999"], "compresses none"),
    ],
)
def test_bad_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron-9000"}')
    assert main(["estimate", "--hf-config", str(tmp_path / "config.json")]) == 2
    assert "perceptron-9000" in capsys.readouterr().err


def test_amounts_of_memory() -> None:
    assert models.parse_bytes("24GiB") == 24 * 2**30
    assert models.parse_bytes("1.5GB") == 1_500_000_000
    assert models.parse_bytes("800") == 800
    for text in ("", "GiB", "-1GB", "0", "1TB", "nanGB"):
        with pytest.raises(ValueError, match="no amount of memory"):
            models.parse_bytes(text)
