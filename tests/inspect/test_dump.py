"""The dump: what it writes, and that it never harms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import Stack
from torch import Tensor, nn

import memrewrite
from memrewrite import VeLoRA
from memrewrite.record.decision import GraphRecord


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Stack(depth=1)
    options = VeLoRA(8, sites=["*.down_proj"])
    memrewrite.compile(model, velora=options, galore_rank=4, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(6, 32)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_what_is_written(tmp_path: Path) -> None:
    model, _optimizer = stepped()
    target = memrewrite.dump(model, tmp_path / "new" / "dump")
    record = json.loads((target / "dump.json").read_text())
    (graph,) = record["graphs"]
    passes = ["compress_saved_inputs", "fold_reconstruction", "return_coordinates", "lower_ir_ops"]
    passes += ["skip_absent_gradients", "add_rows_in_place"]
    assert [s["name"] for s in graph["stages"]] == ["joint", *passes, "forward", "backward"]
    assert [p["exact"] for p in graph["passes"]] == [False, True, True, True, True, True]
    compress = graph["stages"][1]
    assert any("velora_compress" in node["name"] for node in compress["inserted"])
    z = next(node for node in compress["inserted"] if "compress" in node["name"])
    assert z["line"].startswith(z["name"]) and z["module"] == "blocks.0"
    assert z["bytes"] == 4 * 6 * (48 // 8) and "down_proj" in z["source"]
    assert "x_hat" in graph["passes"][0]["identity"]
    assert set(graph["memory"]) == {"before", "after"}
    assert graph["memory"]["after"]["culprits"]
    assert "velora_compress" in (target / compress["diff"]).read_text()
    assert "blocks.0.down_proj" in (target / compress["file"]).read_text()
    assert "velora_" not in (target / graph["stages"][3]["file"]).read_text().split("return")[0]
    assert record["report"].pop("status") == memrewrite.report(model).status
    assert record["report"] == memrewrite.report(model).to_dict()
    shapes = [update["kind"]["shape"] for update in record["updates"]]
    assert len(shapes) == len(set(shapes)) == 2
    projected = (target / record["updates"][0]["stages"][2]["diff"]).read_text()
    assert "+galore_project" in projected and "-_fused_adamw_" in projected
    assert "addmm_" in (target / "update0" / "writes.txt").read_text()
    assert memrewrite.report(model).full() in (target / "report.txt").read_text()


def test_every_file_that_is_named_exists_and_no_other(tmp_path: Path) -> None:
    model, _optimizer = stepped()
    target = memrewrite.dump(model, tmp_path)
    (target / "graph0" / "9-old.txt").write_text("of a former dump")
    memrewrite.dump(model, tmp_path)
    record = json.loads((target / "dump.json").read_text())
    stages = [s for one in (*record["graphs"], *record["updates"]) for s in one["stages"]]
    named = {s[key] for s in stages for key in ("file", "diff") if key in s}
    found = {str(p.relative_to(target)) for p in target.glob("*/*")}
    assert named == found


def test_a_graph_break_gives_numbered_graphs(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).tanh()
            torch._dynamo.graph_break()
            return self.two(x)

    model = memrewrite.compile(Broken(), backend="aot_eager")
    model(torch.randn(5, 8)).sum().backward()
    target = memrewrite.dump(model, tmp_path)
    record = json.loads((target / "dump.json").read_text())
    assert [graph["modules"] for graph in record["graphs"]] == [["one"], ["two"]]
    assert (target / "graph1" / "forward.txt").exists()


def test_a_warm_cache_has_the_listings(tmp_path: Path) -> None:
    record = GraphRecord()
    record.show("joint", "a: f32[2] = input\n")
    record.store(tmp_path / "record.json")
    read = GraphRecord.load(tmp_path / "record.json")
    assert read is not None and read.listings() == [("joint", "a: f32[2] = input\n")]
    assert read == record


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not compiled by memrewrite"):
        memrewrite.dump(nn.Linear(2, 2), tmp_path)
    model = memrewrite.compile(nn.Sequential(nn.Linear(2, 2)), backend="aot_eager")
    with pytest.raises(ValueError, match="nothing has been compiled yet"):
        memrewrite.dump(model, tmp_path)
    assert not any(tmp_path.iterdir())
    model(torch.randn(3, 2)).sum().backward()
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="something other than a dump"):
        memrewrite.dump(model, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        memrewrite.dump(model, tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep me"
