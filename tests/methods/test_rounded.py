"""activations="int8" in real models, and beside what else saves memory."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from huggingface import MODELS
from models import Run, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite.session.session import session_of


@pytest.fixture(autouse=True)
def round_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.split.rounded.LEAST", 64)


def error(ours: nn.Module, theirs: nn.Module) -> float:
    """Of all gradients, relative."""
    mine, right = gradients(ours), gradients(theirs)
    off = torch.stack([(mine[name] - right[name]).norm() for name in right])
    return float(off.norm() / torch.stack([g.norm() for g in right.values()]).norm())


def step(model: nn.Module, loss_of: Run) -> Tensor:
    torch.manual_seed(1)  # of dropout
    loss = loss_of(model)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    torch.manual_seed(0)
    model, loss_of = MODELS[name]()
    ours = copy.deepcopy(model)
    for one, how in ((ours, "int8"), (model, None)):
        memrewrite.compile(one, activations=how, backend="aot_eager")
    assert torch.equal(step(ours, loss_of), step(model, loss_of))
    assert 0 < error(ours, model) < 0.02
    totals = memrewrite.report(ours).to_dict()["totals"]
    assert totals["saved_bytes_after"] < 0.8 * totals["saved_bytes_before"]
    assert "rounded: " in str(memrewrite.report(ours))


def test_the_masks_of_a_dropout_take_one_bit_and_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))
    memrewrite.compile(model, activations="int8", backend="aot_eager")
    model(torch.randn(32, 64)).square().mean().backward()
    found = [r for b in session_of(model).bindings() for r in b.variant.record.rounded]
    assert [one.after for one in found if one.bits == 1] == [32 * 64 // 8]
    assert model[0].bias.grad.isfinite().all()


def test_masked_scores_of_an_attention_with_dropout_stay_exact() -> None:
    """It is written out, and its scores are -inf where they are masked."""
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 128, "n_head": 4, "vocab_size": 500, "n_positions": 64}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(0, 500, (8, 64))
    memrewrite.compile(model, activations="int8", backend="aot_eager")
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    found = [r for b in session_of(model).bindings() for r in b.variant.record.rounded]
    assert any("may hold infinities" in one.reason for one in found)


def test_what_checkpoints_save_is_rounded_and_attention_made_again_from_it() -> None:
    """Without checkpoints q and k need 16 bits; here their log-sum-exp is made again as well."""
    torch.manual_seed(0)
    model, loss_of = MODELS["llama"]()
    model.train()
    exact, ours = copy.deepcopy(model), copy.deepcopy(model)
    for one, how in ((exact, None), (ours, "int8")):
        for module in one.model.layers:
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        memrewrite.compile(one, activations=how, backend="aot_eager")
        step(one, loss_of)
    found = [r for b in session_of(ours).bindings() for r in b.variant.record.rounded]
    assert {one.bits for one in found if not one.reason} == {8}
    assert 0 < error(ours, exact) < 0.03


def test_bfloat16_keeps_attention_exact() -> None:
    torch.manual_seed(0)
    model, loss_of = MODELS["llama"]()
    exact, ours = copy.deepcopy(model.bfloat16()), model
    for one, how in ((exact, None), (ours, "int8")):
        memrewrite.compile(one, activations=how, backend="aot_eager")
        step(one, loss_of)
    found = [r for b in session_of(ours).bindings() for r in b.variant.record.rounded]
    assert any("attention" in one.reason for one in found)
    assert 0 < error(ours, exact) < 0.05


@pytest.mark.parametrize("more", [{"galore_rank": 4}, {"velora": True}, {"dynamic": True}])
def test_beside_other_options(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, loss_of = MODELS["llama"]()
    exact, ours = copy.deepcopy(model), model
    for one, how in ((exact, None), (ours, "int8")):
        memrewrite.compile(one, activations=how, moments="int8", backend="aot_eager", **more)
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(2):
            loss = step(one, loss_of)
            optimizer.step(), optimizer.zero_grad()
        step(one, loss_of)
    assert loss.isfinite() and 0 < error(ours, exact) < 0.05


def test_loss_scaling_sees_what_overflowed() -> None:
    """Groups with numbers that are not finite stay so, and the step is skipped."""
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8))
    memrewrite.compile(model, activations="int8", backend="aot_eager")
    x = torch.randn(16, 64)
    x[3, 5] = float("inf")
    model(x).sum().backward()
    assert not model[0].weight.grad.isfinite().all()
