"""Real Hugging Face models: gradients against the oracle, two steps, the report read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface import MODELS
from models import check_against_oracle
from torch import Tensor

import memrewrite
from memrewrite import VeLoRA

# What stays exact in these models under sites="all", and why.
EXACT = {
    "mixtral": {
        f"model.layers.{i}.mlp.experts.{name}": "a stack of 4 expert weights"
        for i in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    },
}
AUTO = {
    "llama": ("self_attn.v_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_proj",),
    "bert": ("attention.self.value", "0.output.dense", "1.output.dense"),
    "vit": ("attention.v_proj", "mlp.fc2"),
    "t5": ("Attention.v", "DenseReluDense.wo"),
    "mixtral": ("self_attn.v_proj",),
}


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout that draws alike in eager and in a decomposed graph."""
    if not training or p == 0:
        return x
    return x * (torch.rand(x.shape, dtype=x.dtype) >= p) / (1 - p)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_follow_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "dropout", dropout)
    model, run = MODELS[name]()
    model = model.double().train()
    velora = VeLoRA(subtoken_size=8, sites="all")
    # the models themselves compute norms, rotations and routing in float32
    report = check_against_oracle(model, run, velora, 1e-6, backend="aot_eager")
    exact = {r.name: r.reason for r in report.sites if r.decision == "exact"}
    expected = EXACT.get(name, {})
    assert exact.keys() == expected.keys()
    assert all(exact[n].startswith(expected[n]) for n in expected)
    totals = report.totals
    assert totals["saved_bytes_after"] < totals["saved_bytes_before"]
    assert report.full().count("\n") > len(report.sites)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_with_the_default_options(name: str) -> None:
    model, run = MODELS[name]()
    model.train()
    memrewrite.compile(model, velora=VeLoRA(subtoken_size=8), backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # small: any draw must descend
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # the same dropout
        loss = run(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    sites: list[dict[str, Any]] = memrewrite.report(model).to_dict()["sites"]
    compressed = [row["name"] for row in sites if row["decision"] == "compressed"]
    assert {suffix for n in compressed for suffix in AUTO[name] if n.endswith(suffix)} == {
        *AUTO[name]
    }
    assert all(n.endswith(AUTO[name]) for n in compressed)
    reasons = {row["reason"].split(";")[0] for row in sites if row["decision"] == "exact"}
    assert any(r.startswith("not selected by sites='auto'") for r in reasons)
