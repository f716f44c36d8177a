"""GaLore's gradients in coordinates, through real training: what comes, and what is made of it."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from huggingface import gpt2, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import only
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, UnsupportedError, VeLoRA
from memrewrite.gradients.basis import Projector, Sketch
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.session.session import session_of

RANK = 2
EARLY = 5  # steps that end behind the last of the early refreshes


class Net(nn.Module):
    """One weight is wide, one is tall, one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 30)
        self.down = nn.Linear(30, 24, bias=False)
        self.head = nn.Linear(24, 22)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head(self.down(torch.tanh(self.up(x)))).tanh().repeat(1, 2)[:, :24])


def net(gradients: Any = "coordinates", backend: str = "aot_eager", **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"rank": RANK, "update_every": 8, "sites": "all", "scale": 1.0, **options}
    galore = GaLore(gradients=gradients, **options)
    return memrewrite.compile(Net().double(), galore=galore, backend=backend)


def batch(step: int) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(step)).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = (model(batch(step)) - 1).square().mean()
    return loss


def backward(model: nn.Module, step: int, micro: int = 1) -> None:
    for part in range(micro):
        loss_of(model, step * micro + part).backward()  # type: ignore[no-untyped-call]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1) -> None:
    for step in steps:
        backward(model, step, micro)
        optimizer.step()
        optimizer.zero_grad()


def project(g: Tensor, p: Tensor, left: bool) -> Tensor:  # equations 11 and 12 of the paper
    return p.t() @ g if left else g @ p


def back(r: Tensor, p: Tensor, left: bool) -> Tensor:
    return p @ r if left else r @ p.t()


def matrices(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.ndim == 2]


class Reference:
    """Adam on R (algorithm 2 of the paper), one weight at a time."""

    def __init__(self, w: Tensor, how: dict[str, Any], decoupled: bool) -> None:
        self.w, self.how, self.decoupled, self.t = w.detach().clone(), how, decoupled, 0
        self.m = self.v = self.u = torch.zeros((), dtype=w.dtype)

    def step(self, r: Tensor, p: Tensor, left: bool) -> None:
        self.t, lr, decay = self.t + 1, self.how["lr"], self.how["weight_decay"]
        r = -r if self.how["maximize"] else r
        r = r if self.decoupled else r + decay * project(self.w, p, left)
        self.m, self.v = 0.9 * self.m + 0.1 * r, 0.999 * self.v + 0.001 * r * r
        self.u = torch.maximum(self.u, self.v) if self.how["amsgrad"] else self.v
        n = (self.m / (1 - 0.9**self.t)) / ((self.u / (1 - 0.999**self.t)).sqrt() + 1e-8)
        w = self.w * (1 - lr * decay) if self.decoupled else self.w
        self.w = w - lr * back(n, p, left)


_compiled: dict[str, Any] = {}


def started_over(side: str) -> Any:
    """As `net` makes it, but compiled once: compiling takes most of the time."""
    if side not in _compiled:
        _compiled[side] = net(side=side)
    model = _compiled[side]
    torch.manual_seed(0)
    model.load_state_dict(Net().double().state_dict())
    memrewrite.load_state_dict(model, {})
    model.zero_grad()
    return model


@pytest.mark.slow
@settings(max_examples=16)
@given(
    side=st.sampled_from(["short", "long", "left", "right"]),
    micro=st.integers(1, 4),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
)
def test_every_gradient_is_a_projection_and_every_step_is_the_papers(
    side: str, micro: int, amsgrad: bool, maximize: bool, decay: float, decoupled: bool
) -> None:
    model: Any = started_over(side)
    how: dict[str, Any] = {"lr": 1e-2, "weight_decay": decay}
    how |= {"amsgrad": amsgrad, "maximize": maximize}
    optimizer = (AdamW if decoupled else Adam)(model.parameters(), **how)
    references = [Reference(w, how, decoupled) for w in matrices(model)]
    sketches = 0
    for step in range(11):
        twin = Net().double()
        twin.load_state_dict(model.state_dict())
        backward(twin, step, micro)
        backward(model, step, micro)
        for w, g in zip(matrices(model), (p.grad for p in matrices(twin)), strict=True):
            assert isinstance(w.grad, ProjectedGrad) and not w.grad.is_dense
            basis: Any = w.grad.basis
            sketches += isinstance(basis, Sketch)
            seen = back(project(g, basis.p, basis.left), basis.p, basis.left)
            torch.testing.assert_close(w.grad.to_dense(), seen, rtol=1e-10, atol=1e-12)
        came = [w.grad.to_dense() for w in matrices(model)]
        optimizer.step()
        for w, g, reference in zip(matrices(model), came, references, strict=True):
            p = optimizer.state[w]["projector"]
            wide = w.shape[0] < w.shape[1]
            left = {"left": True, "right": False, "short": wide, "long": not wide}[side]
            reference.step(project(g, p, left), p, left)
            torch.testing.assert_close(w.detach(), reference.w, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
    assert sketches == 3 * 4  # steps 0, 2, 4 and 8


def test_the_norm_that_is_clipped_is_the_dense_ones() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        backward(model, step)
        dense = [p.grad.to_dense() if p.ndim == 2 else p.grad for p in model.parameters()]
        wanted = torch.stack([g.norm() for g in dense]).norm()
        found = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)
        assert all(not p.grad.is_dense for p in matrices(model))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("stop", only(range(1, 7), 4))
def test_resumed_bit_by_bit(stop: int) -> None:
    first, second = net(), net()
    ours, theirs = (AdamW(m.parameters(), lr=1e-2) for m in (first, second))
    fit(first, ours, range(stop))
    buffer = io.BytesIO()
    saved = first.state_dict(), ours.state_dict(), memrewrite.state_dict(first)
    torch.save(saved, buffer)
    buffer.seek(0)
    weights, state, bases = torch.load(buffer, weights_only=True)
    second.load_state_dict(weights)
    theirs.load_state_dict(state)
    memrewrite.load_state_dict(second, bases)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(first, ours, range(stop, stop + 5))
        fit(second, theirs, range(stop, stop + 5))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
def test_a_state_loaded_after_the_forward_warns_and_goes_on() -> None:
    first, second = net(), net()
    ours, theirs = (AdamW(m.parameters(), lr=1e-2) for m in (first, second))
    fit(first, ours, range(EARLY))
    second.load_state_dict(first.state_dict())
    backward(second, EARLY)  # in a basis of its own
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    with pytest.warns(MemrewriteWarning, match=r"before the first forward") as caught:
        theirs.step()
        theirs.zero_grad()
        fit(second, theirs, range(EARLY + 1, EARLY + 2))
    assert len(caught) == 1
    fit(first, ours, range(EARLY, EARLY + 2))
    for p, q in zip(matrices(first), matrices(second), strict=True):
        assert torch.equal(ours.state[p]["projector"], theirs.state[q]["projector"])


def test_a_state_of_other_options_is_refused() -> None:
    model = net()
    fit(model, AdamW(model.parameters(), lr=1e-2), range(2))
    state = memrewrite.state_dict(model)
    assert set(state) == {f"galore.warm.{name}" for name in ("up", "down", "head")}
    for other, match in (
        (net("dense"), "compiled without"),
        (net(rank=3), "options of the saved run"),
        (net(sites=["up"]), "no weight of that name"),
    ):
        with pytest.raises(ValueError, match=match):
            memrewrite.load_state_dict(other, state)


def test_a_gradient_of_zeros_is_no_failure_and_one_of_nans_keeps_the_projector() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        model.head.weight.zero_()  # up and down get no gradient
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, range(EARLY))
    before = optimizer.state[model.up.weight]["projector"].clone()
    for step in range(EARLY, 8):
        fit(model, optimizer, range(step, step + 1))
    (model(batch(0)) * torch.nan).sum().backward()
    with pytest.warns(MemrewriteWarning, match=r"could not refresh the projector of up"):
        optimizer.step()
    assert torch.equal(optimizer.state[model.up.weight]["projector"], before)


def test_velora_takes_the_weights_that_both_select() -> None:
    torch.manual_seed(0)
    velora, galore = VeLoRA(4, ["down"]), GaLore(RANK, sites="all", gradients="coordinates")
    model: Any = memrewrite.compile(
        Net().double(), velora=velora, galore=galore, backend="aot_eager"
    )
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    backward(model, 2)
    assert not isinstance(model.down.weight.grad.basis, Projector)
    assert isinstance(model.up.weight.grad.basis, Projector)
    rows = {row["name"]: row for row in memrewrite.report(model).to_dict()["optimizer"]}
    assert {n: rows[n]["decision"] for n in ("up", "down")} == {
        "up": "projected",
        "down": "factored",
    }
    assert rows["up"]["gradient_after"] == 30 * RANK * 8 < rows["up"]["gradient_before"]


def test_a_gradient_of_two_projectors_is_dense_and_still_right() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(1))
    backward(model, 1)
    first = model.up.weight.grad.to_dense().clone()
    memrewrite.load_state_dict(model, {})  # the next one is a sketch
    backward(model, 2)
    assert model.up.weight.grad.is_dense
    both = model.up.weight.grad.to_dense().clone()
    model.zero_grad()
    backward(model, 2)
    torch.testing.assert_close(first + model.up.weight.grad.to_dense(), both)
    model.up.weight.grad = both
    p, before = optimizer.state[model.up.weight]["projector"], model.up.weight.detach().clone()
    with pytest.warns(MemrewriteWarning, match="sketched"):  # the other weights' gradients
        optimizer.step()
    assert p is optimizer.state[model.up.weight]["projector"]  # no refresh is due
    moved = model.up.weight.detach() - before * (1 - 1e-2 * 1e-2)
    torch.testing.assert_close(moved @ p @ p.t(), moved)
    optimizer.zero_grad()
    fit(model, optimizer, range(3, 6))


def test_gradients_that_were_made_dense_refresh_on_the_same_steps() -> None:
    """As under DDP, whose buckets are dense."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for step in range(EARLY):
        backward(model, step)
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        assert model.up.weight.grad.is_dense
        optimizer.step()
        optimizer.zero_grad()
    rows = memrewrite.report(model).to_dict()["optimizer"]
    assert {row["last_refresh"] for row in rows if row["decision"] == "projected"} == {EARLY}


@pytest.mark.slow
def test_loss_scaling() -> None:
    models = [net(), net()]
    optimizers = [AdamW(m.parameters(), lr=1e-2) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(EARLY):
        scaler.scale(loss_of(models[0], step)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        fit(models[1], optimizers[1], range(step, step + 1))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("options", "match"), [({"stagger": True}, "stagger"), ({"refresh": "svd"}, "svd")]
)
def test_what_needs_full_gradients_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        GaLore(RANK, gradients="coordinates", **options)


def test_another_optimizer_is_refused_as_ever() -> None:
    model = net()
    backward(model, 0)
    with pytest.raises(UnsupportedError, match="SGD"):
        SGD(model.parameters(), lr=0.1).step()


def test_differentiating_twice_names_the_weight_and_the_remedy() -> None:
    model = net()
    loss = loss_of(model, 0)
    with pytest.raises(UnsupportedError, match=r"gradients='dense'"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.slow
def test_frozen_and_thawed() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(3))
    model.up.weight.requires_grad_(False)
    still = model.up.weight.clone()
    fit(model, optimizer, range(3, 6))
    assert torch.equal(still, model.up.weight)
    model.up.weight.requires_grad_(True)
    fit(model, optimizer, range(6, 12))
    assert not torch.equal(still, model.up.weight)
    backward(model, 12)
    assert not model.up.weight.grad.is_dense


@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_every_form_of_a_weight_in_real_models(make: Any) -> None:
    """Conv1D, an embedding that is tied to the head, biases: all that sites="all" selects."""
    model, run = make(layers=1)
    twin = copy.deepcopy(model)
    galore = GaLore(2, sites="all", gradients="coordinates", update_every=3)
    memrewrite.compile(model, galore=galore, backend="aot_eager")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        torch.manual_seed(step)
        run(model).backward()
        torch.manual_seed(step)
        run(twin).backward()
        small = 0
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if isinstance(p.grad, ProjectedGrad):
                basis: Any = p.grad.basis
                seen = back(project(q.grad, basis.p, basis.left), basis.p, basis.left)
                torch.testing.assert_close(p.grad.to_dense(), seen, rtol=1e-3, atol=1e-6)
                small += 1
        assert small >= 6
        optimizer.step()
        optimizer.zero_grad()
    rows = memrewrite.report(model).to_dict()["optimizer"]
    assert sum(row["gradient_after"] < row["gradient_before"] for row in rows) == small
    assert all("not part" not in row.reason for row in memrewrite.report(model).sites)


def test_a_model_that_moves_takes_its_bases_along() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    model.float()
    fresh = AdamW(model.parameters(), lr=1e-2)
    model(batch(0).float()).square().mean().backward()
    assert model.up.weight.grad.dtype == model.up.weight.grad.basis.p.dtype == torch.float32
    fresh.step()


def test_convolutions_keep_full_gradients() -> None:
    torch.manual_seed(0)
    galore = GaLore(1, sites="all", gradients="coordinates")
    model: Any = nn.Sequential(nn.Conv1d(24, 24, 3), nn.Flatten(), nn.Linear(96, 24))
    memrewrite.compile(model, galore=galore, backend="aot_eager")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 24, 6)).square().mean().backward()
        optimizer.step()
    assert type(model[0].weight.grad) is Tensor
    assert isinstance(model[2].weight.grad, ProjectedGrad)
    assert {"exp_avg", "projector"} <= set(optimizer.state[model[0].weight])


def test_moments_are_rotated() -> None:
    models = [net(moments=how) for how in ("keep", "rotate")]
    for model in models:
        fit(model, AdamW(model.parameters(), lr=1e-2), range(3))
    assert not torch.equal(models[0].up.weight, models[1].up.weight)


@pytest.mark.inductor
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dynamic", [True, False, None])
def test_other_batch_sizes(dynamic: bool | None, first: int) -> None:
    """Dynamo makes sizes dynamic at the second one: on the step of a refresh, or not."""
    torch.manual_seed(0)
    galore = GaLore(RANK, sites="all", gradients="coordinates", update_every=3)
    model: Any = memrewrite.compile(Net(), galore=galore, dynamic=dynamic, backend="aot_eager")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            model(torch.randn(4 + 2 * max(step, first), 24)).square().mean().backward()
            assert isinstance(model.up.weight.grad, ProjectedGrad)
            optimizer.step()
            optimizer.zero_grad()


def test_no_node_of_a_full_gradients_shape() -> None:
    model = net()
    fit(model, AdamW(model.parameters(), lr=1e-2), range(2))
    shapes = {f"[{w.shape[0]}, {w.shape[1]}]" for w in (model.up.weight, model.down.weight)}
    (graph,) = session_of(model).graphs
    variants = list(graph.variants.values())
    assert len(variants) == 2
    for variant in variants:
        text = dict(variant.record.listings())["backward"]
        made = [line for line in text.splitlines() if "mm(" in line or "mm.default(" in line]
        assert made and not [line for line in made if any(s in line for s in shapes)]


@pytest.mark.slow
def test_the_estimate_knows_the_small_gradients() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    told = memrewrite.estimate(model, batch(0), optimizer=optimizer).rewritten
    fit(model, optimizer, range(1))
    backward(model, 1)
    held = sum(p.grad.stored_bytes if p.ndim == 2 else p.grad.nbytes for p in model.parameters())
    assert told.gradients == held
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert told.optimizer_state == state
    assert told.refresh_peak is not None and told.refresh_peak > told.step_peak
