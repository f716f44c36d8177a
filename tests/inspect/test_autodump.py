"""MEMREWRITE_DUMP, TORCH_LOGS and the structured trace: seen from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import nn

import memrewrite
from memrewrite import VeLoRA
from memrewrite.cli import main
from memrewrite.inspect import autodump
from memrewrite.session.session import session_of

SCRIPT = """
import sys, torch, memrewrite
def train():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32))
    velora = memrewrite.VeLoRA(8, sites="all")
    memrewrite.compile(model, velora=velora, galore_rank=4, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
    if "--fail" in sys.argv:
        raise RuntimeError("half-way")
train()
print("trained", sys.argv[1:])
"""


def run(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.slow
def test_the_environment_is_enough_and_the_logs_tell(script: Path, tmp_path: Path) -> None:
    dump, trace = tmp_path / "dump", tmp_path / "trace"
    done = run(script, MEMREWRITE_DUMP=str(dump), TORCH_LOGS="+memrewrite", TORCH_TRACE=str(trace))
    assert done.returncode == 0 and "trained []" in done.stdout
    record = json.loads((dump / "0-Sequential" / "dump.json").read_text())
    assert record["model"] == "Sequential" and record["updates"]
    assert (dump / "0-Sequential" / "index.html").exists()
    assert "compressed: 0 (replaced; 1024 bytes kept before, 128 after)" in done.stderr
    assert "pass fold_reconstruction" in done.stderr
    (log,) = trace.glob("*.log")
    text = log.read_text()
    for name in ("memrewrite_decisions", "memrewrite_compress_saved_inputs_diff"):
        assert f'"name": "{name}"' in text


@pytest.mark.slow
def test_a_script_that_fails_half_way_leaves_its_dump(script: Path, tmp_path: Path) -> None:
    done = run(script, "--fail", MEMREWRITE_DUMP=str(tmp_path / "dump"), RANK="1")
    assert done.returncode == 1 and "half-way" in done.stderr
    place = tmp_path / "dump" / "rank1" / "0-Sequential"
    assert json.loads((place / "dump.json").read_text())["graphs"]
    assert (place / "index.html").exists()


@pytest.mark.slow
def test_training_goes_on_where_no_dump_can_be_written(script: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = run(script, MEMREWRITE_DUMP=str(tmp_path / "taken"))
    assert done.returncode == 0 and "trained []" in done.stdout
    assert "no dump of Sequential" in done.stderr
    assert (tmp_path / "taken").read_text() == "a file"


def test_nothing_is_followed_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(autodump.VARIABLE, raising=False)
    model = memrewrite.compile(nn.Sequential(nn.Linear(4, 4)), backend="aot_eager")
    model(torch.randn(2, 4)).sum().backward()
    session = session_of(model)
    assert session.graphs and session.on_change is None and session not in autodump._places


def test_the_shell_runs_a_script(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = list(sys.argv)
    assert main(["dump", "--out", str(out), str(script), "--steps", "3"]) == 0
    text = capsys.readouterr().out
    assert "trained ['--steps', '3']" in text
    (page,) = out.glob("*-Sequential/index.html")  # numbered through the process
    assert text.splitlines()[-1] == str(page)
    assert sys.argv == before and autodump.VARIABLE not in os.environ


def test_a_script_without_us_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.py").write_text("print('nothing')")
    assert main(["dump", "--out", str(tmp_path / "out"), str(tmp_path / "empty.py")]) == 2
    assert "no model was compiled by memrewrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dump_without_a_run(tmp_path: Path) -> None:
    words = ["llama-60m", "--layers", "1", "--vocab", "64", "--seq", "8", "--velora"]
    assert main(["dump", *words, "--galore-rank", "8", "--out", str(tmp_path / "d")]) == 0
    record = json.loads((tmp_path / "d" / "dump.json").read_text())
    assert {s["decision"] for s in record["report"]["sites"]} == {"compressed", "exact"}
    assert any(row["decision"] == "projected" for row in record["report"]["optimizer"])


def test_decisions_name_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    memrewrite.compile(model, velora=VeLoRA(8, sites=["2"]), backend="aot_eager")
    with caplog.at_level("INFO", logger="memrewrite"):
        model(torch.randn(6, 32)).sum().backward()
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("compressed: 2 (") for line in lines)
    assert any(line.startswith("exact: 0 (") for line in lines)
    assert any(line.startswith("saved for backward: ") for line in lines)
