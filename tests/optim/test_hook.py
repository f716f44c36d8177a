"""GaLore in a stock Adam or AdamW: attached by nothing but its own step."""

from __future__ import annotations

import warnings
from typing import Any

import galore_oracle
import pytest
import torch
from galore_net import BODY, Net, collected, compiled, fit, net, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

import memrewrite
from memrewrite import GaLore


@given(
    st.sampled_from(["short", "long", "left", "right"]),
    st.sampled_from([Adam, AdamW]),
    st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_every_flavour_of_adam_steps_as_the_paper_does(
    side: Any, kind: Any, flavour: Any, amsgrad: bool, maximize: bool, decay: float, other: float
) -> None:
    model = net(GaLore(rank=2, update_every=5, refresh="svd", side=side))
    stock = net(None)
    before, steps = weights(model), range(12)
    settings = {**flavour, "amsgrad": amsgrad, "maximize": maximize, "lr": 0.02}

    def build(of: nn.Module) -> Optimizer:
        named = dict(of.named_parameters())
        special = [named.pop("down.weight")]
        groups = [{"params": list(named.values()), "weight_decay": decay}]
        groups.append({"params": special, "weight_decay": other, "lr": 0.01, "betas": (0.5, 0.9)})
        return kind(groups, **settings)

    fit(model, build(model), steps)
    fit(stock, build(stock), steps)
    for name, got in weights(model).items():
        if name not in BODY:
            torch.testing.assert_close(got, stock.get_parameter(name).detach(), rtol=0, atol=0)
            continue
        last = name == "down.weight"
        rows, columns = before[name].shape
        left = {"short": rows < columns, "long": rows >= columns}.get(side, side == "left")
        expected = galore_oracle.train(
            before[name], collected(stock, name, steps), 2, left, 5, 0.25,
            0.01 if last else 0.02, (0.5, 0.9) if last else (0.9, 0.999), 1e-8,
            other if last else decay, kind is AdamW, amsgrad, maximize,
        )  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_state_is_the_projected_moments_and_the_projector_and_no_other_tensor() -> None:
    model = net(GaLore(rank=3))
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        numbers = sum(v.numel() for v in state.values() if v.ndim)
        if name in BODY:
            scalars = {"step", "projector_stale"}
            assert set(state) == {"exp_avg", "exp_avg_sq", "projector", *scalars}
            assert numbers == 2 * 3 * max(p.shape) + 3 * min(p.shape)
        else:
            assert numbers == 2 * p.numel()


def test_convolutions_and_embeddings_can_be_selected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Flatten(), nn.Linear(12, 40))
    compiled(model, galore=GaLore(rank=2, sites="all"))
    optimizer, before = AdamW(model.parameters(), weight_decay=0.0), weights(model)
    fit(model, optimizer, range(3))
    conv = model[0].weight
    assert tuple(optimizer.state[conv]["projector"].shape) == (12, 2)
    assert tuple(optimizer.state[conv]["exp_avg"].shape) == (2, 36)
    moved = (conv.detach() - before["0.weight"]).flatten(1)
    assert int(torch.linalg.matrix_rank(moved, rtol=1e-3)) == 2


def test_channels_last_weights_are_updated_in_place() -> None:
    one, other = (nn.Sequential(nn.Conv2d(4, 12, 3)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    other.to(memory_format=torch.channels_last)
    for model in (one, other):
        compiled(model, galore=GaLore(2, sites="all"))
        fit(model, AdamW(model.parameters()), range(3))
    torch.testing.assert_close(one[0].weight, other[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    model = compiled(Net().to(dtype), galore_rank=2)
    optimizer = AdamW(model.parameters(), lr=0.05)
    before = weights(model)
    fit(model, optimizer, range(3))
    assert {optimizer.state[model.up.weight][k].dtype for k in ("exp_avg", "projector")} == {dtype}
    assert not torch.equal(model.up.weight, before["up.weight"])


def test_no_warning_in_a_usual_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = memrewrite.compile(net(None).float(), galore_rank=2, backend="aot_eager")
        optimizer, ids = AdamW(model.parameters(), fused=True), torch.arange(12)
        for _ in range(2):
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
