"""What cannot be projected is refused by name, before anything moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from galore_net import EXACT, compiled, fit, gradients, net, weights
from torch import nn
from torch.optim import SGD, AdamW

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, UnsupportedError


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"galore_rank": 0}, ValueError, "below 1"),
        ({"galore_rank": "128"}, TypeError, "must be an int"),
        ({"galore": 128}, TypeError, r"GaLore\(rank=128\)"),
        ({"galore_rank": 2, "galore": GaLore(rank=3)}, ValueError, "two ranks"),
        ({"galore_rank": 128}, ValueError, r"up \(16, 8\): too small for rank 128"),
        ({"galore": GaLore(2, sites=["*.q_proj"])}, ValueError, "matches no module"),
        ({"galore_rank": 2, "frozen": True}, ValueError, "unfreeze the weights first"),
    ],
)
def test_compile_refuses_and_leaves_the_model(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = net(None)
    if arguments.pop("frozen", False):
        model.requires_grad_(False)
    with pytest.raises(error, match=words):
        memrewrite.compile(model, **arguments)
    assert model._compiled_call_impl is None


def test_one_layer_too_small_stays_plain_with_its_reason() -> None:
    model = net(GaLore(rank=9))
    rows = {r["name"]: r for r in memrewrite.report(model).to_dict()["optimizer"]}
    assert rows["mix"]["decision"] == "projected"
    assert rows["up"]["decision"] == "plain" and "too small for rank 9" in rows["up"]["reason"]


def test_selected_weights_of_a_kind_that_is_not_projected_are_named() -> None:
    model = nn.Module()
    model.complex = nn.Linear(8, 8, dtype=torch.complex64)
    model.stack = nn.Module()
    model.stack.experts = nn.Parameter(torch.randn(3, 8, 8))
    model.good = nn.Linear(8, 8)
    with pytest.warns(MemrewriteWarning, match=r"complex \(8, 8\) .*complex64.*experts.*a stack"):
        memrewrite.compile(model, galore=GaLore(2, sites="all"), backend="aot_eager")
    rows = {row.name: row.decision for row in memrewrite.report(model).optimizer}
    assert rows["good"] == "projected" and rows["complex"] == "plain"


class Overriding(AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Inheriting(AdamW):
    pass


def test_a_subclass_that_overrides_step_is_refused_and_one_that_does_not_works() -> None:
    model = net()
    gradients(model, 0)
    before = weights(model)
    for optimizer in (Overriding(model.parameters()), SGD(model.parameters(), 0.1)):
        with pytest.raises(UnsupportedError, match=type(optimizer).__name__):
            optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    good = Inheriting(model.parameters())
    good.step()
    assert "projector" in good.state[model.up.weight]


def test_differentiable_optimizers_are_refused() -> None:
    model = net()
    gradients(model, 0)
    with pytest.raises(UnsupportedError, match="differentiable"):
        AdamW(model.parameters(), differentiable=True, foreach=False).step()


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    gradients(model, 0)
    model.embedding.weight.grad = torch.zeros(12, 8, dtype=torch.float64).to_sparse()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"\(12, 8\) has a sparse gradient"):
        optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert not any(optimizer.state.values())


def test_a_weight_that_cannot_be_gathered_is_refused_by_name() -> None:
    model = net(GaLore(rank=3))
    optimizer = AdamW(model.parameters())
    gradients(model, 0)
    before = weights(model)
    model.mix.weight.placements = [object()]  # type: ignore[attr-defined] # of some parallelism
    with pytest.raises(UnsupportedError, match=r"mix \(16, 16\), which is sharded over ranks"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_replaced_parameter_is_refused_by_name() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    model.mix.weight = nn.Parameter(model.mix.weight.detach().clone())
    other = net()  # noqa: F841  (whoever comes and goes)
    gradients(model, 1)
    with pytest.raises(UnsupportedError, match=r"mix \(16, 16\) was replaced"):
        optimizer.step()


def test_a_second_compile_with_equal_options_is_silent_and_with_others_refused() -> None:
    model = net()
    assert memrewrite.compile(model, galore=EXACT, backend="aot_eager") is model
    with pytest.raises(ValueError, match="restore"):
        memrewrite.compile(model, galore_rank=3, backend="aot_eager")


def test_a_part_of_a_compiled_model_is_not_compiled_again() -> None:
    whole = compiled(nn.Sequential(net(None), nn.Linear(12, 12).double()), galore=EXACT)
    with pytest.raises(TypeError, match="part of a Sequential that is compiled"):
        memrewrite.compile(whole[0], galore_rank=3)
