"""Which weights an optimizer steps: groups, frozen, added and pruned weights, neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from galore_net import fit, gradients, net, weights
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adamw import adamw

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, UnsupportedError


def test_frozen_parameters_and_parameters_without_gradient_are_skipped() -> None:
    model = net()
    model.mix.weight.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    before = weights(model)
    fit(model, optimizer, range(2))
    model.zero_grad()
    optimizer.step()
    assert torch.equal(model.mix.weight, before["mix.weight"])
    assert not optimizer.state[model.mix.weight]
    assert int(optimizer.state[model.up.weight]["step"]) == 2
    model.mix.weight.requires_grad_(True)  # unfrozen: projected from its first step on
    fit(model, optimizer, range(1))
    assert "projector" in optimizer.state[model.mix.weight]


def test_parameters_added_later_are_projected() -> None:
    model = net()
    optimizer = AdamW(model.up.parameters())
    fit(model, optimizer, range(2))
    optimizer.add_param_group({"params": model.down.parameters(), "lr": 0.5})
    fit(model, optimizer, range(2))
    assert "projector" in optimizer.state[model.down.weight]
    assert int(optimizer.state[model.up.weight]["step"]) == 4
    assert int(optimizer.state[model.down.weight]["step"]) == 2


def test_two_optimizers_on_one_model_and_two_models() -> None:
    model, other = net(), net(seed=1)
    one, two = AdamW(model.up.parameters()), Adam([*model.down.parameters(), *other.parameters()])
    gradients(model, 0)
    gradients(other, 0)
    one.step()
    two.step()
    assert "projector" in one.state[model.up.weight]
    assert "projector" in two.state[model.down.weight]
    assert "projector" in two.state[other.mix.weight]
    assert model.up.weight not in two.state


def test_a_model_that_is_not_compiled_trains_as_ever() -> None:
    plain, stock = net(None), net(None)
    net()  # hooks are installed
    optimizer = AdamW(plain.parameters())
    moments = [[torch.zeros_like(p) for p in stock.parameters()] for _ in "mv"]
    counts = [torch.tensor(0.0) for _ in stock.parameters()]
    for step in range(2):
        fit(plain, optimizer, range(step, step + 1))
        gradients(stock, step)
        with torch.no_grad():  # torch's own function, which no hook surrounds
            adamw(
                [*stock.parameters()], [p.grad for p in stock.parameters()], *moments, [], counts,
                foreach=False, amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=1e-2,
                eps=1e-8, maximize=False,
            )  # fmt: skip
    for name, value in weights(plain).items():
        assert torch.equal(value, stock.get_parameter(name)), name
    for state in optimizer.state.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def test_attaching_early() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    assert memrewrite.compile(optimizer) is optimizer
    fit(model, optimizer, range(1))
    assert "projector" in optimizer.state[model.up.weight]
    with pytest.raises(UnsupportedError, match=r"SGD.*Adam or AdamW"):
        memrewrite.compile(SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="compile the model first"):
        memrewrite.compile(AdamW(net(None).parameters()))


class Foreign(Optimizer):
    """Some other optimizer, whose state looks like anything."""

    def __init__(self, params: Any, state: Any) -> None:
        super().__init__(params, {})
        self.given = state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.given


@pytest.mark.parametrize(
    "state", [{"projector": torch.eye(4)}, {"projector": torch.zeros(3)}, torch.zeros(3), [1], 7]
)
def test_other_optimizers_on_other_models_are_left_alone(state: Any) -> None:
    net()
    linear = nn.Linear(4, 4)
    optimizer, before = Foreign(linear.parameters(), state), weights(linear)
    optimizer.step()
    optimizer.step()
    assert [optimizer.state[p] is state for p in linear.parameters()] == [True, True]
    torch.testing.assert_close(weights(linear), before, rtol=0, atol=0)


def test_a_model_that_was_edited_does_not_break_its_neighbours() -> None:
    model = net(GaLore(rank=2, sites=["up"]))
    del model.up
    other = nn.Linear(4, 4)
    other.weight.grad = torch.ones(4, 4)
    before = other.weight.detach().clone()
    SGD(other.parameters(), 0.1).step()
    assert torch.equal(other.weight, before - 0.1)


def test_pruning_midway_keeps_the_state() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    prune.l1_unstructured(model.mix, "weight", 0.3)  # type: ignore[no-untyped-call]
    parameter = model.mix.weight_orig
    fit(model, optimizer, range(1, 2))
    assert int(optimizer.state[parameter]["step"]) == 2
    assert "projector" in optimizer.state[parameter]


def test_an_optimizer_over_copies_of_the_parameters_is_reported() -> None:
    model = net()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = AdamW(copies)
    with pytest.warns(MemrewriteWarning, match="no optimizer has stepped its parameters") as caught:
        for step in range(30):
            gradients(model, step)
            for p, master in zip(model.parameters(), copies, strict=True):
                master.grad = p.grad
            optimizer.step()
    assert len(caught) == 1
