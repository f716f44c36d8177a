"""Documents of results: what is refused, and what goes on."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from memrewrite.bench.configurations import parse
from memrewrite.bench.document import Document


def test_a_flag_that_older_results_do_not_know(tmp_path: Path) -> None:
    Document(tmp_path, {"kind": "cost", "batch": 1}, resume=False).save()
    Document(tmp_path, {"kind": "cost", "batch": 1, "dropout": False}, resume=True)
    with pytest.raises(ValueError, match="dropout None then, True now"):
        Document(tmp_path, {"kind": "cost", "batch": 1, "dropout": True}, resume=True)


def test_images_have_no_sequence() -> None:
    from memrewrite.bench.cli import _request, model_flags
    from memrewrite.bench.document import title

    words = {"vit-small": "vit-small, 8 images, fp32", "llama-60m": "llama-60m, 8 x 256, fp32"}
    parser = ArgumentParser()
    model_flags(parser, "llama-60m", 8, 256)
    for model, wanted in words.items():
        request = {"kind": "cost", **vars(_request(parser.parse_args([model])))}
        assert wanted in title({"request": request, "environment": {"card": None}})


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    request = {"kind": "cost", "model": "a", "batch": 8}
    document = Document(tmp_path, request, resume=False)
    document.row(parse("eager"))["runs"] += [{"error": None}, {"error": {"stage": "x"}}]
    document.save()
    with pytest.raises(FileExistsError, match="--resume"):
        Document(tmp_path, request, resume=False)
    with pytest.raises(ValueError, match="batch 8 then, 4 now"):
        Document(tmp_path, {**request, "batch": 4}, resume=True)
    again = Document(tmp_path, request, resume=True)
    assert again.row(parse("eager"))["runs"] == [{"error": None}]  # what failed is tried again


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Document(tmp_path, {}, resume=True)
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(ValueError, match="not written by a bench"):
        Document(tmp_path, {}, resume=True)
