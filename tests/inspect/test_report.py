"""The report: honest before the first step, complete after it, plain data throughout."""

from __future__ import annotations

import json

import pytest
import torch
from models import Stack, check_against_oracle, loss_of
from torch import nn

import memrewrite
from memrewrite import VeLoRA
from memrewrite.session.session import session_of


def test_before_the_first_step_it_says_so() -> None:
    model = memrewrite.compile(Stack(), velora=True, backend="aot_eager")
    report = memrewrite.report(model)
    assert "nothing has been compiled yet" in str(report)
    assert {r.decision for r in report.sites} == {"exact"}
    assert report.totals["saved_bytes_after"] == 0


def test_rows_add_up_and_are_plain_data() -> None:
    model = memrewrite.compile(
        Stack(), velora=VeLoRA(subtoken_size=8, sites=["blocks.0.*"]), backend="aot_eager"
    )
    loss_of(torch.randn(4, 5, 32))(model).backward()
    data = memrewrite.report(model).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data) == {"sites", "optimizer", "totals"}
    rows = {row["name"]: row for row in data["sites"]}
    assert rows["blocks.0.up_proj"]["bytes_before"] == 0  # counted at gate_proj
    assert rows["blocks.0.gate_proj"]["bytes_before"] == 4 * 5 * 32 * 4
    assert "shared with blocks.0.up_proj" in rows["blocks.0.gate_proj"]["reason"]
    exact = rows["blocks.1.down_proj"]
    assert exact["decision"] == "exact" and exact["reason"].startswith("not selected by sites")
    totals = data["totals"]
    sites = [sum(row[k] for row in data["sites"]) for k in ("bytes_before", "bytes_after")]
    assert sites[0] <= totals["saved_bytes_before"] and sites[1] <= totals["saved_bytes_after"]
    freed = totals["saved_bytes_before"] - totals["saved_bytes_after"]
    assert sites[0] - sites[1] <= freed


def test_the_running_example_of_the_readme() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    memrewrite.compile(model, velora=VeLoRA(sites="all"), backend="aot_eager")
    loss_of(torch.randn(32, 64))(model).backward()
    rows = memrewrite.report(model).sites
    assert [r.decision for r in rows] == ["compressed", "compressed"]


@pytest.mark.slow
def test_lora_adapters_over_a_frozen_base() -> None:
    from huggingface import llama
    from peft import LoraConfig, get_peft_model

    model, run = llama(layers=1)
    config = LoraConfig(r=4, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).double()
    velora = VeLoRA(subtoken_size=8, sites="auto")
    report = check_against_oracle(adapted, run, velora, 1e-6, backend="aot_eager")
    compressed = {r.name for r in report.sites if r.decision == "compressed"}
    assert len(compressed) == 2 and all(n.endswith("lora_A.default") for n in compressed)
    frozen = [r for r in report.sites if r.name.endswith("v_proj.base_layer")]
    assert {r.reason for r in frozen} == {"not trained"}


def test_a_recompile_replaces_its_forerunner_in_the_totals() -> None:
    model = memrewrite.compile(Stack(1), velora=True, backend="aot_eager", dynamic=False)
    loss_of(torch.randn(16, 32))(model).backward()
    small = memrewrite.report(model).totals
    loss_of(torch.randn(32, 32))(model).backward()
    large = memrewrite.report(model).totals
    assert len(session_of(model).graphs) == 2 and large["graphs"] == small["graphs"] == 1
    assert large["saved_bytes_after"] == 2 * small["saved_bytes_after"]


def test_a_model_without_a_linear_of_its_own_is_printed() -> None:
    import warnings

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.r(x)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = memrewrite.compile(Net(), velora=memrewrite.VeLoRA(4, "all"), backend="aot_eager")
        model(torch.randn(2, 3, 8)).sum().backward()
    assert "decision" in str(memrewrite.report(model))
