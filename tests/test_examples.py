"""The examples run, and what they write can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.inductor


def example(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_demo(tmp_path: Path, text: Path) -> None:
    (ids,) = text.iterdir()
    (tmp_path / ids.name).symlink_to(ids)
    chosen = ("torch.compile", "memrewrite velora all + galore")
    sizes = ("--size", "tiny", "--steps", "6", "--batch", "2", "--sequence", "32", "--vocab", "300")
    done = example("train_llama.py", *sizes, "--output", str(tmp_path), "--configurations", *chosen)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    baseline, ours = json.loads((tmp_path / "demo.json").read_text())["results"]
    assert ours["saved"] < baseline["saved"]
    assert ours["state"] < baseline["state"]
    assert len(ours["losses"]) == 6
    assert "saved for backward" in done.stdout
    assert "optimizer state:" in done.stdout


def test_what_sketches_hold(tmp_path: Path, text: Path) -> None:
    sizes = ("--steps", "3", "--layers", "1", "--vocab", "300", "--rank", "8")
    paths = ("--data", str(text), "--output", str(tmp_path / "sketch.json"))
    done = example("bench_sketch.py", *sizes, *paths)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = json.loads((tmp_path / "sketch.json").read_text())["weights"]
    assert list(weights) == ["0", "2"] and len(weights["0"]) == 7
    assert all(0.5 < w["sketched"] <= 1.0 + 1e-6 for step in weights.values() for w in step)
    assert "| step" in done.stdout


def test_runs_that_differ_by_rounding(tmp_path: Path, text: Path) -> None:
    sizes = ("--steps", "8", "--layers", "1", "--vocab", "300", "--backend", "aot_eager")
    paths = ("--data", str(text), "--output", str(tmp_path / "rounding.json"))
    done = example("bench_rounding.py", *sizes, *paths)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "rounding.json").read_text())
    for name in ("full", "moved"):
        pairs = zip(found["losses"]["small"], found["losses"][name], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-4
    # One unit of a weight need not be one of the loss, but the weight stays where it was moved.
    assert found["weights_apart"]["moved"] > 0


def test_peaks_of_refreshes(tmp_path: Path) -> None:
    sizes = ("--model", "llama-tiny", "--layers", "1", "--vocab", "300", "--rank", "8")
    path = tmp_path / "refresh.json"
    sizes += ("--backend", "aot_eager")
    done = example("bench_refresh.py", *sizes, "--ways", "staggered", "--output", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())["bytes"]
    assert list(found) == ["staggered"] and found["staggered"]["backward"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "0"), "whole number"),
        (("--configurations", "magic"), "magic"),
        (("--device", "nowhere"), "not available"),
        (("--vocab", "3"), "choose from"),
    ],
)
def test_the_demo_refuses_bad_input(arguments: tuple[str, ...], words: str) -> None:
    done = example("train_llama.py", *arguments)
    assert done.returncode == 2 and words in done.stderr
