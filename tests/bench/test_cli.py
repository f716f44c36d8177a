"""The bench from the shell: bad requests are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from memrewrite.bench.cli import _run, weights_of
from memrewrite.bench.document import Document
from memrewrite.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-9t"], "neither a file nor one of"),
        (["--configurations", "magic"], "no part of a configuration"),
        (["--batch", "0"], "--batch 0 is not positive"),
        (["--device", "cuda:63"], "--device cuda:63 is not here"),
        (["--device", "meta"], "cpu and cuda only"),
        (["--output", "/dev/null/here"], "/dev/null/here"),
        (["train", "--lrs", "fast"], "write numbers"),
        (["train", "--lrs", "-1"], "positive"),
        (["train", "some:model"], "brings its own inputs"),
        (["train", "vit-small"], "no language model"),
        (["train", "--vocab", "99"], "from 257 to 65,536"),
        (["page", "/nowhere"], r"no bench.json below"),
    ],
)
def test_bad_requests(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words if {"--output", "page"} & {*words} else [*words, "--output", str(tmp_path)]
    assert main(["bench", *given]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("memrewrite bench: ")
    assert not list(tmp_path.iterdir())


def test_results_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"request": {}, "rows": []}))
    assert main(["bench", "--output", str(tmp_path)]) == 2
    assert "has results already" in capsys.readouterr().err


@pytest.mark.parametrize("failed", [1, 2])
def test_a_bench_fails_where_every_row_does(failed: int, tmp_path: Path) -> None:
    error = {"out_of_memory": False, "type": "Planted", "message": "", "stage": "step 1"}
    document = Document(tmp_path, {}, resume=False)
    document.data["rows"] = [
        {"name": str(i), "skipped": None, "runs": [{"error": error if i < failed else None}]}
        for i in range(2)
    ]
    assert _run(lambda: None, document, lambda: None) == (failed == 2)


@pytest.mark.parametrize(
    ("model", "words"),
    [("llama-60m", "weights: random"), ("planted:model", "those that planted:model returns")],
)
def test_a_bench_says_whose_weights_it_measures(model: str, words: str) -> None:
    assert words in weights_of(model)


def test_a_bench_prints_the_digest_of_real_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert hashlib.sha256(b"weights").hexdigest() in weights_of(str(tmp_path))
