"""The bench without processes: names, figures, tables, who beats whom, the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import memrewrite
from memrewrite.bench.configurations import SETS, chosen, parse
from memrewrite.bench.document import Document
from memrewrite.bench.run import meters, optimizers, training
from memrewrite.bench.run.cost import Cost, Settings
from memrewrite.bench.run.process import Failed
from memrewrite.bench.run.subject import Request, prepare, weights_of
from memrewrite.bench.run.worker import compare, draws
from memrewrite.bench.show import pairs, pareto
from memrewrite.bench.show.page import write_page
from memrewrite.bench.show.summary import problems, summarise, summarise_training
from memrewrite.bench.show.table import loss_table, table
from memrewrite.cli import main
from memrewrite.predict.models import from_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("name", "stagger"), [("galore", False), ("galore+staggered", True)])
def test_a_staggered_row_has_no_step_on_which_all_refresh(
    name: str, stagger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(memrewrite, "compile", lambda model, **facts: asked.update(facts))
    prepare(parse(name), Request("llama-tiny", 2, 16, 256, 1, rank=32, refresh=6))
    assert asked["galore"] == memrewrite.GaLore(32, update_every=6, stagger=stagger)
    assert parse(name).projected is not stagger


@pytest.mark.parametrize("sites", ["auto", "all", "galore"])
def test_a_slowed_control_slows_what_it_is_the_control_of(sites: Any) -> None:
    model = from_config("llama-tiny", vocab=2048, layers=1, device="cpu")
    controlled = weights_of(model, sites, rank=32)
    optimizer = optimizers.make(parse(f"slowed-{sites}-0.25"), model, 8e-3, 32, 100)
    rest, slow = optimizer.param_groups
    assert {id(p) for p in slow["params"]} == {id(p) for p in controlled}
    assert (rest["lr"], slow["lr"]) == (8e-3, 2e-3)
    assert len(rest["params"]) + len(slow["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].split(".")[-2] for p in controlled}
    assert {"v_proj", "down_proj"} <= kinds and "embed_tokens" not in kinds
    assert ("lm_head" in kinds, len(kinds)) == {"auto": (False, 2), "all": (True, 8)}.get(
        sites, (False, 7)
    )


# --- configurations ------------------------------------------------------------------------


def test_a_name_is_its_parts() -> None:
    found = parse("velora-all-32+checkpointing+budget-0.5+galore")
    assert (found.engine, found.velora, found.sites) == ("memrewrite", 32, "all")
    assert found.checkpointing and found.galore and found.functorch
    assert not found.exact and found.ours and found.baseline == "torch.compile"
    assert parse("budget-0.5").functorch == {"activation_memory_budget": 0.5}
    assert parse("lora+velora-all-16").baseline == "lora+torch.compile"
    assert parse("my:own").own == "my:own" and not parse("my:own").exact
    assert parse("fp8").fp8 == parse("fp8-2.5").fp8 == 2.5 and not parse("torch.compile").inductor
    (how,) = parse("memrewrite+fp8-0").inductor["post_grad_fusion_options"].values()
    assert how["size_in_mb"] == 0


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("eager+checkpointing", True),
        ("aggressive", True),
        ("memrewrite+checkpointing", True),
        ("fp8", False),
        ("memrewrite+fp8-0", False),
        ("velora-auto-16", False),
        ("adafactor", False),
        ("frozen-all", False),
        ("slowed-galore-0.25", False),
    ],
)
def test_which_are_exact(name: str, exact: bool) -> None:
    assert parse(name).exact is exact


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.compil", "did you mean 'torch.compile'"),
        ("budget-2", "no part of a configuration"),
        ("fp8-all", "no part of a configuration"),
        ("velora-all-0", "no part of a configuration"),
        ("velora-all-x", "no part of a configuration"),
        ("eager+memrewrite", "disagree about engine"),
        ("budget-0.5+budget-0.25", "disagree about budget"),
        ("lr-sqrt", "velora's weights"),
        ("velora-all-16+dense+lr-sqrt", "small gradients"),
        ("dense", "how velora returns"),
        ("slowed-all-2", "no part of a configuration"),
        ("slowed-all-0.5+galore", "nothing else"),
        ("velora-all-16+pushed", "how galore takes"),
        ("galore+pushed+staggered", "when galore refreshes"),
        ("staggered", "when galore refreshes"),
        ("peft-velora-16", "needs lora"),
        ("", "name a configuration"),
        ("nothing-*", "matches"),
    ],
)
def test_names_that_mean_nothing(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen(name)


def test_sets_and_patterns() -> None:
    assert [c.name for c in chosen("quick")] == list(SETS["quick"])
    assert {c.name for c in chosen("budget-*")} == {"budget-0.75", "budget-0.5", "budget-0.25"}
    assert [c.name for c in chosen("eager, eager,torch.compile")] == ["eager", "torch.compile"]
    everything = {c.name for c in chosen("all")}
    assert {*SETS["activations"], *SETS["optimizers"], *SETS["lora"]} <= everything
    assert not any(parse(name).only_training for name in everything)


# --- figures -------------------------------------------------------------------------------


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
    assert (found["lr"], found["seeds"], found["tokens_per_s"]) == (2e-3, 2, 32)
    assert found["loss"] == pytest.approx(4.7) and found["delta"] == pytest.approx(0.2)
    assert found["delta_spread"] == pytest.approx([0.1, 0.3])
    line = loss_table(rows).splitlines()[3]
    assert "50%" in line and "0.002 (edge)" in line  # frozen costs 0.4: half of it is kept
    rows.append(trained("slowed-all-0.25", {(1e-3, 0): 3.9, (2e-3, 0): 4.2, (1e-3, 1): 4.9}))
    summarise_training({"rows": rows, "request": {"batch": 2, "seq": 8}})
    assert "40%" in loss_table(rows).splitlines()[3]  # of 0.5: smaller steps were better by 0.1


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


def test_the_rate_rises_then_falls() -> None:
    values = [training._schedule(step, 100) for step in range(100)]
    assert values[:5] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert values[19] == values[20] == 1.0 == max(values)
    assert values == [*sorted(values[:20]), *sorted(values[20:], reverse=True)]
    assert 0 < values[-1] < 1e-3


def test_starting_over_forgets_weights_and_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        @staticmethod
        def build(seed: int) -> Any:
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(32, 32, bias=False)), (), {}

    model, _, _ = Asked.build(0)
    velora = memrewrite.VeLoRA(subtoken_size=8, sites="all")
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    model(torch.randn(4, 32)).sum().backward()
    before = memrewrite.state_dict(model)
    with torch.no_grad():
        model[0].weight.zero_()
    training._start_over(model, Asked(), 0)  # type: ignore[arg-type]
    assert torch.equal(model[0].weight, Asked.build(0)[0][0].weight)
    x = torch.randn(4, 32) + 1
    model(x).sum().backward()
    (v,) = memrewrite.state_dict(model).values()
    mean = x.view(-1, 8).sum(0)
    torch.testing.assert_close(v, mean / mean.norm())
    assert not torch.equal(v, *before.values())


def test_validation_draws_no_dropout() -> None:
    asked = Request("gpt2-small", batch=2, seq=16, vocab=300, layers=1, dropout=True)
    model, _, _ = asked.build()
    held_out = np.arange(100, dtype=np.uint16)
    one, other = (training._validation(model.train(), held_out, asked) for _ in range(2))
    assert one == other and model.training


def test_gradients_are_compared_as_one_vector(tmp_path: Path) -> None:
    path = tmp_path / "reference"
    torch.save([torch.tensor([3.0]), torch.tensor([4.0])], path)
    found = compare([torch.tensor([3.0]), torch.tensor([0.0])], str(path))
    assert found == {"cosine": pytest.approx(0.6), "relative_error": pytest.approx(0.8)}
    with pytest.raises(ValueError, match="other shapes"):
        compare([torch.tensor([3.0])], str(path))


def test_gradients_of_two_draws_are_not_compared() -> None:
    from memrewrite.predict.models import from_config

    kept, off = (from_config("gpt2-small", layers=1, dropout=on) for on in (True, False))
    assert draws(kept) and not draws(off)
    assert not draws(from_config("vit-small", layers=1))


# --- meters --------------------------------------------------------------------------------

ALLOCATE = """
import torch
from memrewrite.bench.run.meters import meter, unique_bytes
reading = meter("cpu")
torch.ones(1000).sum()
for megabytes in (100, 400):
    before = reading.settle()
    held = torch.ones(megabytes * 250_000)
    taken = reading.peak() - before
    assert abs(taken / (megabytes * 1e6) - 1) < 0.02, (megabytes, taken)
    del held
    reading.reset()
    assert reading.peak() - before < 2e6
assert unique_bytes([(x := torch.ones(8)), x.view(2, 4)]) == 32
"""


def test_a_known_allocation_is_measured_to_two_percent() -> None:
    environment = {**os.environ, **meters.FREE_AT_ONCE}
    subprocess.run([sys.executable, "-c", ALLOCATE], cwd=ROOT, env=environment, check=True)


def test_the_card_that_is_asked_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    names = ("synchronize", "memory_allocated", "max_memory_allocated", "max_memory_reserved")
    for name in (*names, "reset_peak_memory_stats", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: asked.append(device) or (1, 2))
    card = meters.meter("cuda:1")
    for read in (card.settle, card.reset, card.peak, card.reserved, card.taken, card.wait):
        read()
    assert card.available() == 1
    assert len(asked) >= 8 and set(asked) == {(torch.device("cuda:1"),)}


def test_what_fails_makes_room_and_what_fits_is_started() -> None:
    class Worker:
        configuration, closed = parse("eager"), False

        def __init__(self, **answer: int) -> None:
            self.answer = answer

        def ask(self, do: str, **facts: Any) -> dict[str, int]:
            if not self.answer:
                raise Failed({"stage": do, "message": "planted"})
            return dict(self.answer)

        def close(self) -> None:
            self.closed = True

    def start(child: Any) -> bool:
        return bench._start(child, {"error": None})

    said = (lambda text: None), (lambda: None)
    bench = Cost(None, Request("eager"), [], Settings(), *said)  # type: ignore[arg-type]
    bench.scratch = Path("nowhere")
    bench._cache = lambda configuration: Path()  # type: ignore[method-assign]
    fits, fills, fails = Worker(taken=10, available=21), Worker(taken=11, available=21), Worker()
    assert bench._room() and start(fits) and bench._room()
    assert start(fills) and not bench._room()
    assert not start(fails) and fails.closed and not (fits.closed or fills.closed)


# --- documents and pages -------------------------------------------------------------------


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


def test_the_published_page_says_what_the_data_say(tmp_path: Path) -> None:
    published = ROOT / "docs" / "results"
    shutil.copytree(published, tmp_path / "results")
    assert write_page(tmp_path / "results").read_text() == (published / "README.md").read_text()


def test_a_page_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no bench\.json below"):
        write_page(tmp_path)


# --- the shell -----------------------------------------------------------------------------


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
