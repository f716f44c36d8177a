"""Small gradients through real training: the trajectory is that of the full ones."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import only
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers.pytorch_utils import Conv1D

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, UnsupportedError, VeLoRA
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.gradients.packing import VECTOR

M = 4


class Net(nn.Module):
    """D is no multiple of M in the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Across(Net):
    """Its second weight is (D, O), GPT-2's way; D is no multiple of M there either."""

    def __init__(self) -> None:
        super().__init__()
        self.down = Conv1D(6, 10)


def net(
    gradients: Any = "coordinates", seed: int = 0, kind: type[Net] = Net, **options: Any
) -> Net:
    torch.manual_seed(seed)
    options = {"lr_scale": 1.0, **options}  # the trajectory of full gradients
    velora = VeLoRA(subtoken_size=M, sites="all", gradients=gradients, **options)
    return memrewrite.compile(kind().double(), velora=velora, backend="aot_eager")


def batch(step: int) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = model(batch(step)).square().mean()
    return loss


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    micro: int = 1,
    between: Callable[[nn.Module], object] = lambda model: None,
) -> None:
    for step in steps:
        for part in range(micro):
            loss_of(model, step * micro + part).backward()  # type: ignore[no-untyped-call]
        between(model)
        optimizer.step()
        optimizer.zero_grad()


def same(ours: nn.Module, theirs: nn.Module, close: float = 1e-10) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=close, atol=close)


def factored(optimizer: torch.optim.Optimizer) -> list[bool]:
    return [VECTOR in s for p, s in optimizer.state.items() if p.ndim == 2]


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


_compiled: dict[tuple[str, type[Net]], Net] = {}


def started_over(gradients: str, kind: type[Net]) -> Net:
    """As `net` makes it, but compiled once: compiling takes most of the time."""
    model = _compiled.get((gradients, kind)) or net(gradients, kind=kind)
    _compiled[gradients, kind] = model
    torch.manual_seed(0)
    model.load_state_dict(kind().double().state_dict())
    memrewrite.load_state_dict(model, {})
    model.zero_grad()
    return model


@pytest.mark.slow
@settings(max_examples=12)
@given(
    how=st.sampled_from(["fused", "foreach", "single"]),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    decay=st.sampled_from([0.0, 0.1]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    micro=st.integers(1, 4),
    clipped=st.booleans(),
    kind=st.sampled_from([Net, Across]),
)
def test_the_trajectory_is_that_of_full_gradients(
    how: str, eps: float, decay: float, amsgrad: bool, maximize: bool, micro: int, clipped: bool,
    kind: type[Net],
) -> None:  # fmt: skip
    flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}
    wanted: dict[str, Any] = {**flags[how], "eps": eps, "weight_decay": decay}
    wanted |= {"amsgrad": amsgrad, "maximize": maximize, "lr": 1e-2}
    models = [started_over(gradients, kind) for gradients in ("coordinates", "dense")]
    optimizers = [AdamW(model.parameters(), **wanted) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        fit(model, optimizer, range(12), micro, clip if clipped else lambda model: None)
    same(*models)
    assert all(factored(optimizers[0])) and not any(factored(optimizers[1]))


@pytest.mark.parametrize("kind", only([Net, Across], Across))
def test_a_hundred_steps_in_double_precision(kind: type[Net]) -> None:
    models = [net("coordinates", kind=kind), net("dense", kind=kind)]
    for model in models:
        optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        fit(model, optimizer, range(100), between=clip)
    same(*models)


@pytest.mark.parametrize("scale", only(["sqrt", 0.25, None], 0.25))
def test_the_step_is_scaled_and_the_decay_is_not(scale: Any) -> None:
    ours, theirs = net(lr_scale=scale), net("dense")
    factor = scale if isinstance(scale, float) else M**-0.5
    fit(ours, AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1), range(6))
    weights = [theirs.up.weight, theirs.down.weight]
    slow = {"params": weights, "lr": 1e-2 * factor, "weight_decay": 0.1 / factor}
    groups = [slow, {"params": [theirs.up.bias], "weight_decay": 0.1}]
    fit(theirs, AdamW(groups, lr=1e-2), range(6))
    same(ours, theirs)


def halve_and_double(model: nn.Module) -> None:
    for p in model.parameters():
        if p.ndim == 2:
            p.grad = p.grad.clamp(-1e9, 1e9)  # the same values, in full


FLAGS: list[dict[str, Any]] = [{}, {"fused": True}, {"foreach": False}, {"amsgrad": True}]
ADAMS = [(kind, flags) for kind in (Adam, AdamW) for flags in FLAGS]
FORMS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], object]]] = {
    "small": ({}, lambda model: None),
    "dense": ({"gradients": "dense"}, lambda model: None),
    "made dense": ({}, halve_and_double),
}


@pytest.mark.parametrize(("kind", "optimizer"), only(ADAMS, (AdamW, {"fused": True})))
def test_a_step_does_not_depend_on_the_form_of_the_gradient(kind: Any, optimizer: Any) -> None:
    decay = 0.1 if kind is AdamW else 0.0
    models = []
    for options, between in FORMS.values():
        models.append(model := net(lr_scale=None, **options))
        found = kind(model.parameters(), lr=1e-2, weight_decay=decay, **optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(4):
            scaler.scale(loss_of(model, step)).backward()  # type: ignore[no-untyped-call]
            between(model)
            scaler.step(found)
            scaler.update()
            found.zero_grad()
    same(models[0], models[1])
    same(models[0], models[2])
    other = net(lr_scale=1.0)  # the scale is seen at all
    fit(other, kind(other.parameters(), lr=1e-2, weight_decay=decay, **optimizer), range(4))
    assert not torch.allclose(other.up.weight, models[0].up.weight, rtol=1e-4)


@pytest.mark.slow
def test_a_scale_acts_on_running_means_and_beside_an_l2_decay() -> None:
    for options, decay in (({"init": "running_mean"}, 0.0), ({}, 0.1)):
        ours, theirs = (net(lr_scale=scale, **options) for scale in (0.5, 1.0))
        fit(ours, Adam(ours.parameters(), lr=1e-2, weight_decay=decay), range(4))
        slow = {"params": [theirs.up.weight, theirs.down.weight], "lr": 5e-3}
        groups = [slow, {"params": [theirs.up.bias]}]
        fit(theirs, Adam(groups, lr=1e-2, weight_decay=decay), range(4))
        same(ours, theirs)


def test_a_scale_that_cannot_act_says_so() -> None:
    model = net(lr_scale=0.5)
    with pytest.warns(MemrewriteWarning) as told:
        fit(model, SGD(model.parameters(), lr=0.1), range(2))
    (said,) = [str(w.message) for w in told if "lr_scale" in str(w.message)]
    assert "lr_scale=0.5" in said and "SGD steps 2 compressed weights without it" in said
    torch.manual_seed(0)
    velora = VeLoRA(subtoken_size=M, sites="all", lr_scale="sqrt")
    tied = memrewrite.compile(Tied().double(), velora=velora, backend="aot_eager")
    with pytest.warns(MemrewriteWarning, match=r"lr_scale='sqrt' does not act on 1 compressed"):
        fit(tied, AdamW(tied.parameters()), range(2))


def test_moments_are_small_and_plain() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), amsgrad=True)
    fit(model, optimizer, range(2))
    state = optimizer.state[model.down.weight]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    small = (6, 3)  # ten channels are three sub-tokens
    assert shapes == {
        "step": (),
        "exp_avg": small,
        "exp_avg_sq": small,
        "max_exp_avg_sq": small,
        VECTOR: (M,),
    }
    assert all(type(value) is Tensor for value in state.values())


def test_resuming_is_bit_exact() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(5))
    file = io.BytesIO()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "memrewrite": memrewrite.state_dict(model),
    }
    torch.save(saved, file)
    fit(model, optimizer, range(5, 10))
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = net(seed=1)
    again.load_state_dict(loaded["model"])
    memrewrite.load_state_dict(again, loaded["memrewrite"])
    other = AdamW(again.parameters(), lr=1e-2)
    other.load_state_dict(loaded["optimizer"])
    fit(again, other, range(5, 10))
    assert all(factored(other))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("gradients", ["coordinates", "dense"])
def test_a_closure_compiles_the_first_graph_within_the_step(gradients: Any) -> None:
    """As Lightning steps."""
    models = [net(gradients, lr_scale=None) for _ in range(2)]
    optimizers = [AdamW(model.parameters(), lr=1e-2) for model in models]
    fit(models[0], optimizers[0], range(2))
    for step in range(2):

        def closure(step: int = step) -> Any:
            optimizers[1].zero_grad()
            loss = loss_of(models[1], step)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizers[1].step(closure)
    same(*models)
    assert factored(optimizers[0]) == factored(optimizers[1])


def test_schedules_groups_closures_and_scaling() -> None:
    models = [net("coordinates"), net("dense")]
    for model in models:
        groups = [{"params": [model.up.weight], "lr": 1e-3}, {"params": [model.down.weight]}]
        optimizer = AdamW([*groups, {"params": [model.up.bias]}], lr=1e-2)
        schedule = OneCycleLR(optimizer, 1e-2, total_steps=20)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(6):
            scaler.scale(loss_of(model, step)).backward()  # type: ignore[no-untyped-call]
            if step % 2:
                scaler.unscale_(optimizer)
                clip(model)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, 20)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
    same(*models)


def clamp(parameter: Any) -> None:
    parameter.grad.clamp_(-1e-3, 1e-3)


def replace(parameter: Any) -> None:
    parameter.grad = torch.ones_like(parameter)


GIVE_UP: dict[str, Callable[[Net, torch.optim.Optimizer], object]] = {
    "a hook that writes": lambda model, _: model.down.weight.register_post_accumulate_grad_hook(
        lambda p: clamp(p)
    ),
    "a dense gradient is added": lambda model, _: model.down.weight.register_hook(
        lambda g: g + 1e-3
    ),
    "the gradient is replaced": lambda model, _: (
        model.down.weight.register_post_accumulate_grad_hook(
            lambda p: setattr(p, "grad", torch.ones_like(p))
        )
    ),
}


@pytest.mark.parametrize("what", only(GIVE_UP, "a hook that writes"))
def test_stock_adam_takes_over_from_the_same_moments(what: str) -> None:
    models = [net("coordinates"), net("dense")]
    states = []
    for model in models:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        fit(model, optimizer, range(4))
        GIVE_UP[what](model, optimizer)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(model, optimizer, range(4, 8))
        states.append((optimizer, [w for w in told if w.category is MemrewriteWarning]))
    same(*models)
    (ours, told), (_, silence) = states
    assert len(told) == 1 and "becomes full-size" in str(told[0].message) and not silence
    assert factored(ours) == [True, False]


def test_an_l2_decay_keeps_the_dense_path() -> None:
    models = [net("coordinates"), net("dense")]
    for model in models:
        optimizer = Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
        fit(model, optimizer, range(5))
        assert not any(factored(optimizer))
    same(*models)


def test_full_size_state_of_another_run_goes_on_as_it_is() -> None:
    old, new = net("dense"), net("coordinates")
    first = AdamW(old.parameters(), lr=1e-2)
    fit(old, first, range(3))
    new.load_state_dict(old.state_dict())
    memrewrite.load_state_dict(new, memrewrite.state_dict(old))
    second = AdamW(new.parameters(), lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fit(old, first, range(3, 6))
    with pytest.warns(MemrewriteWarning, match="holds full-size Adam state"):
        fit(new, second, range(3, 6))
    same(old, new)
    assert not any(factored(second))


def test_factored_state_without_small_gradients_is_spread() -> None:
    ours, dense = net("coordinates"), net("dense")
    first = AdamW(ours.parameters(), lr=1e-2)
    fit(ours, first, range(3))
    dense.load_state_dict(ours.state_dict())
    memrewrite.load_state_dict(dense, memrewrite.state_dict(ours))
    second = AdamW(dense.parameters(), lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with pytest.warns(MemrewriteWarning, match="no compiled graph returns a small gradient"):
        fit(dense, second, range(3, 4))
    fit(dense, second, range(4, 6))
    fit(ours, first, range(3, 6))
    same(ours, dense)


def test_another_v_breaks_the_identity_and_is_noticed() -> None:
    models = [net("coordinates"), net("dense")]
    for model in models:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        fit(model, optimizer, range(3))
        state = memrewrite.state_dict(model)
        memrewrite.load_state_dict(model, {key: v.flip(0) for key, v in state.items()})
        if model is models[0]:
            with pytest.warns(MemrewriteWarning, match="its v was replaced"):
                fit(model, optimizer, range(3, 4))
        else:
            fit(model, optimizer, range(3, 4))
        fit(model, optimizer, range(4, 6))
    same(*models)


def test_other_optimizers_get_dense_gradients_and_one_warning() -> None:
    models = [net("coordinates"), net("dense")]
    for model in models:
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(model, optimizer, range(4))
        words = [str(w.message) for w in told if w.category is MemrewriteWarning]
        if model is models[0]:
            assert len(words) == 1 and "1,120 bytes are built from 304" in words[0]
        else:
            assert not words
    same(*models)


def test_gradients_say_what_they_are() -> None:
    model = net()
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    grad = model.down.weight.grad
    assert isinstance(grad, ProjectedGrad) and grad.shape == (6, 10)
    assert grad.coordinates is not None and grad.coordinates.shape == (6, 3)
    (taken,) = torch.autograd.grad(loss_of(model, 0), [model.down.weight])
    torch.testing.assert_close(taken.to_dense(), grad.to_dense())
    assert type(model.up.bias.grad) is Tensor


def test_gradients_of_a_transposed_weight_lie_as_it_does() -> None:
    model = net(kind=Across)
    optimizer = AdamW(model.parameters())
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    grad = model.down.weight.grad
    assert isinstance(grad, ProjectedGrad) and grad.shape == (10, 6)
    assert grad.coordinates is not None and grad.coordinates.shape == (3, 6)
    optimizer.step()
    state = optimizer.state[model.down.weight]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (3, 6)
    rows = memrewrite.report(model).optimizer
    (row,) = [r for r in rows if r.name == "down"]
    assert row.gradient_after == 3 * 6 * 8 and row.decision == "factored"


@pytest.mark.slow
def test_state_of_a_transposed_weight_becomes_full_size_again() -> None:
    models = [net("coordinates", kind=Across), net("dense", kind=Across)]
    for model in models:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        fit(model, optimizer, range(4))
        model.down.weight.register_hook(lambda grad: grad + 0.0 * grad.sign())  # a dense one
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            fit(model, optimizer, range(4, 8))
        assert optimizer.state[model.down.weight]["exp_avg"].shape == (10, 6)
    same(*models)


def test_a_second_derivative_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrewrite.gradients.basis import Vector
    from memrewrite.gradients.port import Port

    weight = nn.Parameter(torch.ones(4, 8))
    basis = Vector(torch.ones(4) / 2)
    port = Port.apply(weight, basis, "body.down")  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedError, match=r"body.down \(4, 8\).*leave the weight out"):
        torch.autograd.grad(port.sum(), [weight], create_graph=True)


def test_a_retained_graph_gives_its_gradient_again() -> None:
    ours, theirs = net(), net("dense")
    for model in (ours, theirs):
        loss = loss_of(model, 0)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert isinstance(p.grad, ProjectedGrad) is (p.ndim == 2)
        dense = p.grad.to_dense() if isinstance(p.grad, ProjectedGrad) else p.grad
        torch.testing.assert_close(dense, q.grad, rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    """One weight, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_shared_weight_keeps_its_dense_gradient() -> None:
    models = []
    for gradients in ("coordinates", "dense"):
        torch.manual_seed(0)
        velora = VeLoRA(subtoken_size=M, sites="all", gradients=gradients)  # type: ignore[arg-type]
        model = memrewrite.compile(Tied().double(), velora=velora, backend="aot_eager")
        optimizer = AdamW(model.parameters(), lr=1e-2)
        fit(model, optimizer, range(4))
        assert not any(factored(optimizer))
        models.append(model)
    same(*models)


def test_frozen_and_thawed_after_compiling() -> None:
    models = [net("coordinates"), net("dense")]
    for model in models:
        optimizer = AdamW(model.parameters(), lr=1e-2)
        fit(model, optimizer, range(3))
        model.down.weight.requires_grad_(False)
        fit(model, optimizer, range(3, 5))
        model.down.weight.requires_grad_(True)
        fit(model, optimizer, range(5, 8))
    same(*models)


def test_running_means_stay_dense() -> None:
    torch.manual_seed(0)
    velora = VeLoRA(subtoken_size=M, sites="all", init="running_mean")
    model = memrewrite.compile(Net().double(), velora=velora, backend="aot_eager")
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(2))
    assert not any(factored(optimizer))


def test_velora_wins_over_galore_where_both_are_asked() -> None:
    torch.manual_seed(0)
    velora = VeLoRA(subtoken_size=M, sites=["down"])
    galore = GaLore(2, sites=["up", "down"])
    model = memrewrite.compile(Net().double(), velora=velora, galore=galore, backend="aot_eager")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(3))
    assert VECTOR in optimizer.state[model.down.weight]
    assert "projector" in optimizer.state[model.up.weight]


def test_no_graph_of_ours_holds_a_full_gradient() -> None:
    from memrewrite.optim.hook import updates_of
    from memrewrite.session.session import session_of

    model = net()
    optimizer = AdamW(model.parameters())  # without it, the session has no updates
    fit(model, optimizer, range(1))
    session = session_of(model)
    (graph,) = session.graphs
    (binding,) = graph.bindings.values()
    backward = dict(binding.variant.record.listings())["backward"]
    full = [line for line in backward.splitlines() if "[10, 8]" in line or "[6, 10]" in line]
    assert len(full) == 1 and " = input" in full[0]  # the second W itself, for dx
    updates = updates_of(session)
    # up's is over rows of (M,), of which 7 are an example
    assert {update.kind.shape for update in updates} == {(6, 10), (7, M)}
    for update in updates:
        captured, factored = (dict(update.stages())[k] for k in ("captured", "factor_updates"))
        columns = update.kind.shape[1]
        assert re.search(rf"grad_1: f64\[\w+, {columns}\]", captured)
        assert re.search(r"grad_1: f64\[(6, 3|\w+, 1)\]", factored)
