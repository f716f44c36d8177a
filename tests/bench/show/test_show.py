"""Figures, tables, who beats whom, the page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from memrewrite.bench.configurations import parse
from memrewrite.bench.document import Document
from memrewrite.bench.show import pairs, pareto
from memrewrite.bench.show.page import write_page
from memrewrite.bench.show.summary import problems, summarise, summarise_training
from memrewrite.bench.show.table import loss_table, table


def row(name: str, memory: float, steps: list[float], ratios: list[float], **more: Any) -> Any:
    configuration = parse(name)
    run = {"repeat": 0, "error": None, "cold": True, "first_step_s": 10 * memory, "graphs": 1}
    run |= {"step_s": steps, "refresh_s": [], "ratios": ratios, "recompiles": 0}
    run |= {"memory": {"peak": memory * 1e6, "saved": memory * 5e5}, **more}
    return {
        "name": name,
        "configuration": vars(configuration),
        "exact": configuration.exact,
        "ours": configuration.ours,
        "baseline": configuration.baseline,
        "skipped": None,
        "runs": [run],
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    found = [
        row("torch.compile", 100, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
        row("budget-0.5", 60, [2.0, 2.2, 2.4], [1.0, 1.1, 1.2]),
        row("torch.compile+checkpointing", 30, [2.6], [1.3]),
        row("memrewrite", 60, [2.2], [1.1]),
        row("velora-all-16", 55, [1.6], [0.8]),
        row("eager", 130, [2.8], [1.4]),
    ]
    summarise(found)
    return found


def test_medians_and_ratios(rows: list[dict[str, Any]]) -> None:
    budget = rows[1]["summary"]
    assert budget["peak_ratio"] == 0.6 and budget["saved_ratio"] == 0.6
    assert budget["step_ratio"] == 1.1 and budget["step_s"] == 2.2
    assert budget["step_ratio_spread"] == pytest.approx([1.05, 1.15])
    assert budget["cold_first_step_s"] == 600


def test_repeats_are_spread() -> None:
    one = row("torch.compile", 100, [1.0], [1.0])
    one["runs"] += row("torch.compile", 104, [1.2], [1.0])["runs"]
    summarise([one])
    assert one["summary"]["peak"] == 102e6
    assert one["summary"]["peak_spread"] == [100e6, 104e6]


def test_who_beats_whom(rows: list[dict[str, Any]]) -> None:
    found = {v.rival["name"]: v for v in pareto.verdicts(rows)}
    assert set(found) == {"budget-0.5", "torch.compile+checkpointing", "eager"}
    budget = found["budget-0.5"]
    assert budget.best is not None and budget.best["name"] == "velora-all-16"
    assert budget.exact is not None and budget.exact["name"] == "memrewrite"
    assert found["torch.compile+checkpointing"].best is None
    assert "no memrewrite configuration" in pareto.line_of(found["torch.compile+checkpointing"])
    names = [r["name"] for r in pareto.front(rows)]
    assert names == ["velora-all-16", "torch.compile+checkpointing"]


def test_the_table(rows: list[dict[str, Any]]) -> None:
    rows[3]["runs"][0] |= {
        "error": {
            "stage": "first forward",
            "type": "RuntimeError",
            "message": "no",
            "out_of_memory": True,
        }
    }
    del rows[3]["runs"][0]["memory"]
    summarise(rows)
    lines = table(rows).splitlines()
    assert lines[0].split()[:3] == ["configuration", "memory", "MB"]
    assert "60.0 (0.60)" in lines[3] and "1.10 [1.05, 1.15]" in lines[3]
    assert "out of memory at first forward" in lines[5]
    assert problems(rows[3]) == ["memrewrite: out of memory at first forward: no"]
    assert '<a id="at-x-budget-0-5"></a>budget-0.5' in table(rows, "github", "at-x")


def trained(name: str, losses: dict[tuple[float, int], float | None]) -> dict[str, Any]:
    configuration = parse(name)
    runs = [
        {"lr": lr, "seed": seed, "loss": loss, "step_s": 0.5, "error": None}
        for (lr, seed), loss in losses.items()
    ]
    return {"name": name, "configuration": vars(configuration), "skipped": None, "runs": runs}


def test_losses_are_compared_seed_by_seed_at_each_rows_best_rate() -> None:
    base = trained("torch.compile", {(1e-3, 0): 4.0, (2e-3, 0): 4.2, (1e-3, 1): 5.0})
    ours = trained("velora-all-16", {(1e-3, 0): 4.5, (2e-3, 0): 4.1, (2e-3, 1): 5.3})
    frozen = trained("frozen-all", {(1e-3, 0): None, (2e-3, 0): 4.4, (2e-3, 1): 5.4})
    rows = [base, ours, frozen]
    summarise_training({"rows": rows, "request": {"batch": 2, "seq": 8}})
    found = ours["summary"]
    assert (found["lr"], found["seeds"], found["step_s"]) == (2e-3, 2, 0.5)
    assert found["loss"] == pytest.approx(4.7) and found["delta"] == pytest.approx(0.2)
    assert found["delta_spread"] == pytest.approx([0.1, 0.3])
    line = loss_table(rows).splitlines()[3]
    assert "50%" in line and "0.002 (edge)" in line  # frozen costs 0.4: half of it is kept
    rows.append(trained("slowed-all-0.25", {(1e-3, 0): 3.9, (2e-3, 0): 4.2, (1e-3, 1): 4.9}))
    summarise_training({"rows": rows, "request": {"batch": 2, "seq": 8}})
    assert "40%" in loss_table(rows).splitlines()[3]  # of 0.5: smaller steps were better by 0.1
    assert "accuracy" not in loss_table(rows) and " off" not in loss_table(rows).splitlines()[0]


def test_a_classifiers_accuracy_and_first_error_have_columns() -> None:
    row = trained("fp8", {(1e-3, 0): 0.7, (2e-3, 0): 0.5, (2e-3, 1): 0.6})
    for run, right in zip(row["runs"], (0.7, 0.8, 0.9), strict=True):
        run["accuracy"] = right
    row["first"] = {"gradient": {"cosine": 0.9, "relative_error": 0.43}}
    summarise_training({"rows": [row], "request": {"batch": 2, "seq": None}})
    header, _, line = loss_table([row]).splitlines()
    assert "accuracy" in header and "0.850 [0.800, 0.900]" in line and line.endswith("4.3e-01")


def test_pairs_are_compared_run_by_run() -> None:
    full = trained("galore", {(1e-3, 0): 4.0, (2e-3, 0): None, (1e-3, 1): 5.0})
    small = trained("galore+pushed", {(1e-3, 0): 4.02, (2e-3, 0): 9.0, (1e-3, 1): 4.95})
    for row, end in ((full, 4.2), (small, 4.5)):
        for run in row["runs"]:
            run["losses"] = [6.0, end]
    (line,) = pairs.lines_of([trained("torch.compile", {(1e-3, 0): 4.0}), full, small])
    assert line.startswith("`galore+pushed` beside `galore`, 2 runs")
    assert "by 0.3 nats" in line and "-1.00% to +0.50%" in line


def test_a_row_without_memory_says_why() -> None:
    one = trained("torch.compile", {(1e-3, 0): 4.0})
    error = {"type": "TimeoutError", "stage": "memory", "message": "x", "out_of_memory": False}
    one["failure"] = {"error": error}
    assert problems(one) == ["torch.compile: TimeoutError at memory: x"]


def test_the_page_prints_every_row(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    at = tmp_path / "small"
    asked = {"kind": "cost", "model": "llama-60m", "batch": 8, "seq": 256, "dtype": "fp32"}
    document = Document(at, {**asked, "vocab": 64, "layers": None, "rank": 8}, resume=False)
    document.data["rows"] = rows
    document.save()
    (at / "notes.md").write_text("Mind the *logits*.\n")
    (tmp_path / "older.md").write_text("# How it was\n\ntext\n")
    text = write_page(tmp_path).read_text()
    for each in rows:
        assert f'<a id="at-small-{each["name"].replace("+", "-").replace(".", "-")}"></a>' in text
    for words in ("Mind the *logits*.", "[How it was](older.md)", "small/pareto.svg", "CPU"):
        assert words in text
    assert "**velora-all-16** (memory 0.55, time 0.80)" in text
    picture = (at / "pareto.svg").read_text()
    assert picture.startswith("<?xml") and "velora-all-16" in picture.replace("<!-- ", "")
    assert write_page(tmp_path).read_text() == text
    assert (at / "pareto.svg").read_text() == picture


@pytest.mark.slow
def test_the_published_page_says_what_the_data_say(tmp_path: Path) -> None:
    published = ROOT / "docs" / "results"
    shutil.copytree(published, tmp_path / "results")
    assert write_page(tmp_path / "results").read_text() == (published / "README.md").read_text()


def test_a_page_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no bench\.json below"):
        write_page(tmp_path)
