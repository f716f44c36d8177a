"""The dump: what it writes, that a wrong pass shows, and that it never harms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import add_vector, joint_graph
from models import Stack
from torch import Tensor, nn

import memrewrite
from memrewrite import VeLoRA
from memrewrite.listing import changed, difference, listing
from memrewrite.pipeline import run
from memrewrite.record import GraphRecord
from passes.base import Pass
from passes.fold import fold_reconstruction
from passes.velora import compress_saved_inputs


def small() -> Any:
    gm = joint_graph(
        lambda w, x: F.linear(torch.tanh(x), w), [torch.randn(6, 8)], [torch.randn(5, 8)]
    )
    add_vector(gm, torch.ones(4) / 2, 2)
    return gm


def test_the_listing_of_a_compression() -> None:
    gm = small()
    before = listing(gm.graph)
    run(gm, [compress_saved_inputs({0: 2}, frozenset([0])), fold_reconstruction()])
    assert_expected_inline(
        difference(before, listing(gm.graph), ("joint", "folded")),
        """\
--- joint
+++ folded
@@ -4,9 +4,11 @@
 v_2: f32[4] = input
 tanh: f32[5, 8] = tanh(arg1_1)
+velora_compress_default: f32[5, 2] = memrewrite.velora_compress(tanh, v_2)
 t: f32[8, 6] = t(arg0_1)
 mm: f32[5, 6] = mm(tanh, t)
 t_1: f32[6, 5] = t(arg2_1)
-mm_1: f32[6, 8] = mm(t_1, tanh)
-t_2: f32[8, 6] = t(mm_1)
+mm_default_1: f32[6, 2] = mm(t_1, velora_compress_default)
+velora_reconstruct_default_1: f32[6, 8] = memrewrite.velora_reconstruct(mm_default_1, v_2, 8)
+t_2: f32[8, 6] = t(velora_reconstruct_default_1)
 t_3: f32[6, 8] = t(t)
 mm_2: f32[5, 8] = mm(arg2_1, t_3)
""",
    )


def test_a_pass_that_drops_a_node_is_seen_in_the_diff() -> None:
    def drop(gm: torch.fx.GraphModule) -> None:
        tanh = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)[0]
        tanh.replace_all_uses_with(tanh.args[0])
        gm.graph.erase_node(tanh)

    gm = small()
    before = listing(gm.graph)
    run(gm, [Pass("wrong", drop, exact=True)])
    after = listing(gm.graph)
    assert changed(before, after) == ({}, {"tanh": "tanh: f32[5, 8] = tanh(arg1_1)"})
    assert "\n-tanh: f32[5, 8] = tanh(" in difference(before, after, ("before", "after"))


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
    passes = ["compress_saved_inputs", "fold_reconstruction", "lower_ir_ops"]
    assert [s["name"] for s in graph["stages"]] == ["joint", *passes, "forward", "backward"]
    assert [p["exact"] for p in graph["passes"]] == [False, True, True]
    compress = graph["stages"][1]
    assert any("velora_compress" in node["name"] for node in compress["inserted"])
    assert all(node["line"].startswith(node["name"]) for node in compress["inserted"])
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
    assert str(memrewrite.report(model)) in (target / "report.txt").read_text()


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
    with pytest.raises(FileExistsError, match="something else than a dump"):
        memrewrite.dump(model, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        memrewrite.dump(model, tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep me"
