"""v: how it comes about, that nothing else is touched, and that it round-trips."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import Stack, assert_same, gradients, loss_of, relative_errors
from torch import Tensor, nn

import memrewrite
from memrewrite import VeLoRA
from memrewrite.session.session import session_of

X = torch.randn(6, 32, dtype=torch.float64)


def trained(velora: VeLoRA, x: Tensor = X, model: nn.Module | None = None) -> nn.Module:
    model = model or Stack(1).double()
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    loss_of(x)(model).backward()
    return model


@pytest.mark.parametrize("init", ["batch_mean", "running_mean", "ones", "random"])
def test_every_init_gives_a_unit_vector_per_shared_input(init: Any) -> None:
    state = memrewrite.state_dict(trained(VeLoRA(subtoken_size=8, sites="all", init=init)))
    vectors = {k: v for k, v in state.items() if k.startswith("velora.v.")}
    layers = [f"blocks.0.{n}_proj" for n in ("gate", "up", "down")]
    assert set(vectors) == {f"velora.v.{name}" for name in (*layers, "head")}
    # one input, one v, under the name of each weight that reads it
    of = {n: vectors[f"velora.v.blocks.0.{n}_proj"] for n in ("gate", "up", "down")}
    assert torch.equal(of["gate"], of["up"])
    assert torch.equal(of["gate"], of["down"]) is (init == "ones")
    for v in vectors.values():
        assert v.shape == (8,) and v.dtype == torch.float64
        torch.testing.assert_close(v.norm(), torch.ones_like(v.norm()))
    if init == "ones":
        assert all(torch.equal(v, torch.ones(8).double() / 8**0.5) for v in vectors.values())


def test_running_mean_follows_all_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    xs = [torch.randn(5, 20).double() + i for i in range(3)]
    velora = VeLoRA(subtoken_size=8, sites=["0"], init="running_mean")
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    for i, x in enumerate(xs):
        loss_of(x)(model).backward()
        v = memrewrite.state_dict(model)["velora.v.0"]
        torch.testing.assert_close(v, oracle.unit_mean(xs[: i + 1], 8))
    assert set(memrewrite.state_dict(model)) == {"velora.v.0", "velora.sum.0"}


def test_a_running_mean_does_not_disturb_pending_backwards() -> None:
    """Each of them reads the v of its own forward, as if it had run right behind it."""
    velora = VeLoRA(subtoken_size=8, sites="all", init="running_mean")
    pending, at_once = Stack(1).double(), Stack(1).double()
    at_once.load_state_dict(pending.state_dict())
    for model in (pending, at_once):
        memrewrite.compile(model, velora=velora, backend="aot_eager")
    vectors = []
    for i in range(3):
        loss_of(X.roll(i, 1) + i)(at_once).backward()
        vectors.append(memrewrite.state_dict(at_once)["velora.v.blocks.0.down_proj"])
    assert not torch.allclose(vectors[0], vectors[1], rtol=1e-3)
    losses = [loss_of(X.roll(i, 1) + i)(pending) for i in range(3)]
    sum(losses, torch.zeros(())).backward()
    errors = relative_errors(gradients(pending), gradients(at_once))
    assert max(errors.values()) < 1e-12, errors


class Noisy(nn.Module):
    """Dropout, a buffer that the forward writes, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(self.norm(x), 0.3, self.training))


def test_calibration_touches_neither_rng_nor_buffers() -> None:
    results = []
    for init in ("batch_mean", "ones"):  # with and without a calibration replay
        torch.manual_seed(0)
        model = Noisy().double()
        torch.manual_seed(7)
        x = X.clone()
        trained(VeLoRA(subtoken_size=8, sites="all", init=init), x, model)
        assert torch.equal(x, X)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        results.append((torch.rand(3), buffers, model.linear.bias.grad))
    (random_a, buffers_a, bias_a), (random_b, buffers_b, bias_b) = results
    assert torch.equal(random_a, random_b)
    assert_same(buffers_a, buffers_b)
    assert torch.equal(bias_a, bias_b)
    assert buffers_a["norm.num_batches_tracked"] == 1


def test_calibration_happens_on_the_first_training_batch_only() -> None:
    model = Stack(1).double()
    velora = VeLoRA(subtoken_size=8, sites="all")
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    with torch.no_grad():
        model(X)
    assert memrewrite.state_dict(model) == {}
    loss_of(X)(model).backward()
    first = memrewrite.state_dict(model)
    loss_of(X + 5)(model).backward()
    assert_same(memrewrite.state_dict(model), first)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    velora = VeLoRA(subtoken_size=8, sites="all")
    model = trained(velora)
    path = tmp_path / "velora.pt"
    torch.save(memrewrite.state_dict(model), path)
    other = Stack(1).double()
    other.load_state_dict(model.state_dict())
    memrewrite.compile(other, velora=velora, backend="aot_eager")
    memrewrite.load_state_dict(other, torch.load(path, weights_only=True))
    model.zero_grad()
    for m in (model, other):  # a batch that would calibrate to something else
        loss_of(X * X)(m).backward()
    assert_same(gradients(other), gradients(model))


def test_a_running_mean_resumes() -> None:
    velora = VeLoRA(subtoken_size=8, sites="all", init="running_mean")
    model = trained(velora)
    other = Stack(1).double()
    other.load_state_dict(model.state_dict())
    memrewrite.compile(other, velora=velora, backend="aot_eager")
    memrewrite.load_state_dict(other, memrewrite.state_dict(model))
    for m in (model, other):
        loss_of(X + 3)(m).backward()
    assert_same(memrewrite.state_dict(other), memrewrite.state_dict(model))


@pytest.fixture(scope="module")
def fitted() -> nn.Module:
    """Compiled and trained once, for tests that change nothing."""
    return trained(VeLoRA(subtoken_size=8, sites="all"))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"velora.v.nowhere": torch.ones(8)}, "no weight of that name"),
        ({"velora.v.head": torch.ones(4)}, "subtoken_size is 8"),
        ({"something": torch.ones(8)}, "not an entry of a memrewrite state"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    state: dict[str, Tensor], words: str, fitted: nn.Module
) -> None:
    model = fitted
    before = memrewrite.state_dict(model)
    with pytest.raises(ValueError, match=words):
        memrewrite.load_state_dict(model, before | state)
    assert_same(memrewrite.state_dict(model), before)
    exact = memrewrite.compile(Stack(1), backend="aot_eager")
    with pytest.raises(ValueError, match="without velora"):
        memrewrite.load_state_dict(exact, before)


def test_a_compiled_model_can_be_collected() -> None:
    model = trained(VeLoRA(subtoken_size=8))
    reference = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None


def test_where_calibration_cannot_see_x_v_is_ones_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from memrewrite.calibration import observe

    monkeypatch.setattr(observe, "MATMULS", {})
    monkeypatch.setattr(observe, "LINEARS", {})
    model = trained(VeLoRA(subtoken_size=8, sites=["head"]))
    row = next(r for r in memrewrite.report(model).sites if r.name == "head")
    assert "v is ones, because calibration could not see x" in row.reason
    assert session_of(model).vectors.unseen == {"head"}
