"""Bad input is refused clearly, and the model is left as it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import Stack, assert_same, loss_of
from torch import nn

import memrewrite
from memrewrite import UnsupportedError, VeLoRA


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"subtoken_size": 0}, ValueError, "below 1"),
        ({"subtoken_size": -3}, ValueError, "below 1"),
        ({"subtoken_size": 2.0}, TypeError, "must be an int"),
        ({"subtoken_size": True}, TypeError, "must be an int"),
        ({"scale": float("nan")}, ValueError, "not finite"),
        ({"scale": "0.1"}, TypeError, "must be a number"),
        ({"init": "mean"}, ValueError, "batch_mean"),
        ({"lr_scale": 0}, ValueError, "not positive"),
        ({"lr_scale": "half"}, TypeError, "must be a number"),
        ({"gradients": "small"}, ValueError, "'coordinates' nor 'dense'"),
        ({"sites": "*.v_proj"}, ValueError, r"sites=\['\*.v_proj'\]"),
        ({"sites": []}, ValueError, "velora=False"),
        ({"sites": [3]}, TypeError, "list of patterns"),
        ({"sites": 7}, TypeError, "callable"),
    ],
)
def test_options_are_checked_where_they_are_written(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        VeLoRA(**arguments)


def test_options_are_values() -> None:
    assert VeLoRA(sites=["a", "b"]) == VeLoRA(sites=("a", "b"))
    assert hash(VeLoRA(sites=["a"])) == hash(VeLoRA(sites=["a"]))
    with pytest.raises(AttributeError):
        VeLoRA().scale = 2.0  # type: ignore[misc]


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"velora": "yes"}, TypeError, "pass True, False or"),
        ({"velora": 1}, TypeError, "VeLoRA"),
        ({"velora": VeLoRA(subtoken_size=64)}, ValueError, "compresses none"),
        ({"velora": VeLoRA(subtoken_size=1)}, ValueError, "compresses none"),
        ({"velora": VeLoRA(sites=["*.nothing"])}, ValueError, r"matches no module.*gate_proj"),
        ({"velora": VeLoRA(sites=["*.up_proj", "x"])}, ValueError, "'x' matches no module"),
        ({"velora": VeLoRA(sites=lambda n, m: False)}, ValueError, "callable accepts"),
        ({"galore_rank": 8.0}, TypeError, "must be an int"),
        ({"galore": object()}, TypeError, "GaLore"),
        ({"backend": "cudagraphs"}, UnsupportedError, "inductor"),
        ({"mode": "default", "options": {"max_autotune": True}}, ValueError, "not both"),
        ({"options": {"no_such_option": 1}}, RuntimeError, "no_such_option"),
        ({"mode": "fastest"}, RuntimeError, "fastest"),
        ({"unheard_of": 1}, TypeError, "unheard_of"),
    ],
)
def test_compile_refuses_and_leaves_the_model_as_it_was(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = Stack(1)
    with pytest.raises(error, match=words):
        memrewrite.compile(model, **arguments)
    assert model._compiled_call_impl is None
    with pytest.raises(ValueError, match="not compiled by memrewrite"):
        memrewrite.report(model)
    memrewrite.compile(model, velora=True, backend="aot_eager")  # and it can still be compiled


def test_a_model_without_linears_and_things_that_are_no_model() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        memrewrite.compile(NoLinear(), velora=True)
    exact = memrewrite.compile(NoLinear(), backend="aot_eager")  # exact rewrites need no linear
    exact(torch.randn(2, 8)).sum().backward()
    assert memrewrite.report(exact).sites == ()
    for thing in (lambda x: x, nn.Linear, None):
        with pytest.raises(TypeError, match=r"torch.nn.Module"):
            memrewrite.compile(thing)  # type: ignore[type-var]


def test_a_model_that_is_already_compiled() -> None:
    with pytest.raises(TypeError, match="_orig_mod"):
        memrewrite.compile(torch.compile(Stack(1)))
    inner = Stack(1)
    inner.blocks[0].compile()
    with pytest.raises(TypeError, match=r"submodule 'blocks.0'"):
        memrewrite.compile(inner)
    model = Stack(1)
    model.compile()
    with pytest.raises(TypeError, match=r"nn\.Module\.compile"):
        memrewrite.compile(model)


def test_a_restored_model_trains_eagerly_without_a_word() -> None:
    model = memrewrite.restore(memrewrite.compile(Stack(depth=1), backend="aot_eager"))
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()


def test_compiling_twice() -> None:
    model = Stack(1)
    assert memrewrite.compile(model, velora=True, backend="aot_eager") is model
    assert memrewrite.compile(model, velora=VeLoRA(), backend="aot_eager") is model
    loss_of(torch.randn(4, 32))(model).backward()
    before = memrewrite.state_dict(model)
    with pytest.raises(ValueError, match="restore"):
        memrewrite.compile(model, velora=False, backend="aot_eager")
    assert_same(memrewrite.state_dict(model), before)
    assert memrewrite.restore(model) is model
    memrewrite.compile(model, velora=False, backend="aot_eager")


def test_restore_undoes_compile() -> None:
    model = Stack(1)
    assert model._compiled_call_impl is None
    memrewrite.compile(model, velora=True, backend="aot_eager")
    memrewrite.restore(model)
    assert model._compiled_call_impl is None
    with pytest.raises(ValueError, match="not compiled"):
        memrewrite.restore(model)


def test_the_same_module_comes_back() -> None:
    model = Stack(1)
    keys = list(model.state_dict())
    seen = []
    memrewrite.compile(model, velora=True, backend="aot_eager")
    model.register_forward_hook(lambda *a: seen.append(1))
    loss_of(torch.randn(4, 32))(model).backward()
    assert isinstance(model, Stack) and list(model.state_dict()) == keys
    assert seen == [1]


def test_a_deepcopy_is_an_eager_model_that_can_be_compiled() -> None:
    model, x = Stack(1), torch.randn(4, 32)
    memrewrite.compile(model, velora=True, backend="aot_eager")
    loss_of(x)(model).backward()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="deepcopy"):
        memrewrite.report(twin)
    torch.testing.assert_close(twin(x), model(x))
    memrewrite.compile(twin, velora=True, backend="aot_eager")
    memrewrite.load_state_dict(twin, memrewrite.state_dict(model))
    loss_of(x)(twin).backward()
    assert memrewrite.report(twin).totals == memrewrite.report(model).totals


def test_nothing_selected_is_trained() -> None:
    model = Stack(1).requires_grad_(False)
    with pytest.warns(memrewrite.MemrewriteWarning, match="compresses nothing.*not trained"):
        memrewrite.compile(model, velora=True)


def test_a_single_small_layer_stays_exact() -> None:
    model = Stack(1, 32, 48)
    model.head = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 10))
    memrewrite.compile(model, velora=VeLoRA(sites="all"), backend="aot_eager")
    loss_of(torch.randn(4, 32))(model).backward()
    row = next(r for r in memrewrite.report(model).sites if r.name == "head.1")
    assert row.decision == "exact"
    assert row.reason.startswith("too small to gain anything: 4 input features")


def test_an_outer_compile_that_takes_over_is_noticed() -> None:
    model = memrewrite.compile(Stack(1), velora=True, backend="aot_eager")
    outer = torch.compile(lambda x: model(x).square().mean(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer(torch.randn(4, 32)).backward()
    with pytest.warns(memrewrite.MemrewriteWarning, match="passes never ran"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once is enough


def test_a_wrapper_by_torch_compile_leaves_the_passes_in_place() -> None:
    model = memrewrite.compile(Stack(1), velora=True, backend="aot_eager")
    loss_of(torch.randn(4, 32))(torch.compile(model, backend="eager")).backward()
    assert any(r.decision == "compressed" for r in memrewrite.report(model).sites)


def test_a_model_that_trains_with_us_is_not_complained_about() -> None:
    model = memrewrite.compile(Stack(1), velora=True, backend="aot_eager")
    bystander = nn.Linear(3, 3)
    other = torch.optim.SGD(bystander.parameters(), lr=0.1)
    bystander(torch.randn(2, 3)).sum().backward()
    other.step()  # says nothing about a model whose parameters it does not hold
    loss_of(torch.randn(4, 32))(model).backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
