"""Forms of an optimizer's moments, and rows of optimizers, from outside of the package."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Stack, assert_same, loss_of
from torch import Tensor, nn

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, VeLoRA
from memrewrite.compiler.backend import Engine
from memrewrite.moments.moment import MOMENTS
from memrewrite.moments.optimizers import ADAM, ADAMW, Flags, Row, row_of
from memrewrite.moments.stored import StoredKind
from memrewrite.moments.update import build
from memrewrite.session.session import session_of


# --- the proof: a form of moments in fifteen lines ---------------------------------------------
class BF16(memrewrite.Moment):
    """bf16 in place of fp32."""

    name = "bf16"

    def write(self, value: Tensor, *, name: str) -> Tensor:
        return value.bfloat16()

    def read(self, stored: Tensor, *, name: str, shape: Any, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)


# ----------------------------------------------------------------------------------------------


class Int8(memrewrite.Moment):
    """Two parts: 8-bit values, and a scale for each row; of second moments the root, rounded up."""

    name = "int8"
    parts = ("", "_scale")

    def declines(self, weight: Tensor) -> str | None:
        return None if weight.ndim == 2 else "no matrix"

    def write(self, value: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
        value = value if name == "exp_avg" else value.sqrt()
        scale = value.abs().amax(1, keepdim=True) / 127
        steps = value / scale.clamp_min(1e-30)
        return (steps.round() if name == "exp_avg" else steps.ceil().clamp(max=127)).to(
            torch.int8
        ), scale

    def read(
        self, stored: tuple[Tensor, Tensor], *, name: str, shape: Any, dtype: torch.dtype
    ) -> Tensor:
        values, scale = stored
        value = values.to(dtype) * scale.to(dtype)
        return value if name == "exp_avg" else value.square()


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 32, generator=generator).to(next(model.parameters()).dtype)
        loss_of(x)(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(
    model: nn.Module, form: memrewrite.Moment, steps: range, lr: float, decay: float
) -> dict[str, Tensor]:
    """AdamW (Loshchilov & Hutter), whose moments go through a form from one step to the next."""
    moments: dict[Any, Any] = {}
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 32, generator=generator).to(next(model.parameters()).dtype)
        loss_of(x)(model).backward()
        for p in model.parameters():
            assert p.grad is not None
            kept = form.declines(p) is None
            how: dict[str, Any] = {"shape": tuple(p.shape), "dtype": p.dtype}
            old = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
            new = []
            for name, m, b, g in zip(
                ("exp_avg", "exp_avg_sq"), old, (0.9, 0.999), (p.grad, p.grad.square()), strict=True
            ):
                whole = form.read(m, name=name, **how) if kept and p in moments else m
                new.append(b * whole + (1 - b) * g)
            t = step + 1
            root = (new[1] / (1 - 0.999**t)).sqrt() + 1e-8
            with torch.no_grad():
                p.mul_(1 - lr * decay).sub_(lr * (new[0] / (1 - 0.9**t)) / root)
            names = ("exp_avg", "exp_avg_sq")
            pairs = zip(names, new, strict=True)
            moments[p] = [form.write(m, name=n) if kept else m for n, m in pairs]
            p.grad = None
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("form", [BF16(), Int8()], ids=lambda form: form.name)
def test_adam_follows_its_form(form: memrewrite.Moment) -> None:
    torch.manual_seed(0)
    model = Stack(1).double()
    eager, stock = copy.deepcopy(model), copy.deepcopy(model)
    memrewrite.compile(model, moments=form, backend="aot_eager")
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), range(6))
    fit(stock, torch.optim.AdamW(stock.parameters(), lr=1e-2, weight_decay=0.1), range(6))
    expected = by_hand(eager, form, range(6), 1e-2, 0.1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)
    assert any(
        not torch.allclose(p, q, rtol=1e-4, atol=1e-6)
        for p, q in zip(model.parameters(), stock.parameters(), strict=True)
    )


def test_state_is_plain_tensors_and_half_as_many_bytes() -> None:
    model = Stack(1)
    memrewrite.compile(model, moments=BF16(), backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = memrewrite.estimate(model, torch.randn(6, 32), optimizer=optimizer)
    fit(model, optimizer, range(2))
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert {t.dtype for t in moments} == {torch.bfloat16}
    taken, full = sum(t.nbytes for t in moments), 2 * sum(p.nbytes for p in model.parameters())
    assert taken == full // 2 == before.rewritten.optimizer_state
    assert before.plain.optimizer_state == full
    rows = memrewrite.report(model).optimizer
    assert {row.decision for row in rows} == {"stored"}
    assert sum(row.bytes_after for row in rows) == taken


@pytest.mark.parametrize("form", [BF16(), Int8()], ids=lambda form: form.name)
def test_a_run_goes_on_bit_by_bit_from_a_checkpoint(form: memrewrite.Moment, tmp_path: Any) -> None:
    def started() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Stack(1)
        memrewrite.compile(model, moments=form, backend="aot_eager")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    straight, optimizer = started()
    fit(straight, optimizer, range(3))
    torch.save([straight.state_dict(), optimizer.state_dict()], tmp_path / "c.pt")
    fit(straight, optimizer, range(3, 6))
    resumed, other = started()
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    fit(resumed, other, range(3, 6))
    assert_same(dict(straight.named_parameters()), dict(resumed.named_parameters()))
    dtypes = [{k: v.dtype for k, v in s.items()} for s in optimizer.state.values()]
    assert dtypes == [{k: v.dtype for k, v in s.items()} for s in other.state.values()]


def test_full_size_state_is_taken_over_and_told_once() -> None:
    model = Stack(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    stepped = {n: p.detach().clone() for n, p in model.named_parameters()}
    memrewrite.compile(model, moments=Int8(), backend="aot_eager")
    with pytest.warns(MemrewriteWarning, match="stored as 'int8' from here on") as caught:
        fit(model, optimizer, range(2, 4))
    assert len([w for w in caught if "stored as" in str(w.message)]) == 1
    assert optimizer.state[model.head.weight]["exp_avg"].dtype == torch.int8
    assert optimizer.state[model.head.bias]["exp_avg"].dtype == torch.float32
    assert any(not torch.equal(p, stepped[n]) for n, p in model.named_parameters())


def test_state_of_another_form_is_refused() -> None:
    model = Stack(1)
    memrewrite.compile(model, moments=Int8(), backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(1))
    state = optimizer.state[model.head.weight]
    del state["exp_avg_scale"]
    state["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"\(10, 32\).*neither moments as 'int8' stores them"):
        fit(model, optimizer, range(1, 2))


def test_beside_velora_and_galore_it_takes_the_rest() -> None:
    torch.manual_seed(0)
    model = Stack(1)
    how: dict[str, Any] = {
        "velora": VeLoRA(8, ["*.down_proj"]),
        "galore": GaLore(4, sites=["*.up_proj"]),
    }
    memrewrite.compile(model, moments=BF16(), backend="aot_eager", **how)
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(2))
    decisions = {row.name: row.decision for row in memrewrite.report(model).optimizer}
    assert decisions["blocks.0.down_proj"] == "factored"
    assert decisions["blocks.0.up_proj"] == "projected"
    assert decisions["blocks.0.gate_proj"] == decisions["head"] == "stored", decisions


def test_optimizers_and_states_that_it_cannot_serve_are_refused() -> None:
    model = Stack()
    memrewrite.compile(model, moments=Int8(), backend="aot_eager")
    told = r"'int8' is to store the moments of a weight \(48, 32\), but its optimizer is"
    for wrong, more in (
        (torch.optim.SGD(model.parameters(), lr=1e-2), r" a torch\.optim\.sgd\.SGD"),
        (torch.optim.Adam(model.parameters(), differentiable=True), " differentiable=True"),
    ):
        with pytest.raises(memrewrite.UnsupportedError, match=told + more):
            fit(model, wrong, range(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.zero_grad()
    fit(model, optimizer, range(1))
    memrewrite.restore(model)
    memrewrite.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match=r"storage format \(exp_avg_scale, exp_avg_sq_scale\)"):
        fit(model, optimizer, range(1))


def test_scalars_are_left_to_the_optimizer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = Stack(1), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) * self.scale
            return out

    model = Scaled()
    memrewrite.compile(model, moments=BF16(), backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    assert optimizer.state[model.scale]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.inner.head.weight]["exp_avg"].dtype == torch.bfloat16


def test_what_is_no_form_is_refused() -> None:
    for wrong, told in ((3, "moments=3 is a int"), ("int2", "'int2' is not registered")):
        with pytest.raises((TypeError, ValueError), match=told):
            memrewrite.compile(Stack(1), moments=wrong)  # type: ignore[arg-type]


def test_a_form_is_registered_by_name_once() -> None:
    memrewrite.register("bf16-of-a-test", BF16)
    try:
        with pytest.raises(ValueError, match="is registered already"):
            memrewrite.register("bf16-of-a-test", BF16)
        model = memrewrite.compile(Stack(1), moments="bf16-of-a-test", backend="aot_eager")
        assert session_of(model).moments == BF16()
    finally:
        del MOMENTS["bf16-of-a-test"]
    with pytest.raises(TypeError, match="makes a dict: neither"):
        memrewrite.register("a dict", dict)  # type: ignore[arg-type]


# --- optimizers as rows -----------------------------------------------------------------------


def lion(flags: Flags) -> Any:
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2, as a functional step."""

    def update(
        weight: Tensor, grad: Tensor, m: Tensor, step: Tensor, lr: Tensor, beta1: Tensor,
        beta2: Tensor, *decay: Tensor,
    ) -> tuple[()]:  # fmt: skip
        direction = (m * beta1 + grad * (1 - beta1)).sign()
        kept = weight * (1 - lr * decay[0]) if decay else weight
        weight.copy_(kept - direction * lr)
        m.copy_(m * beta2 + grad * (1 - beta2))
        return ()

    def plain(weight: Tensor, grad: Tensor, m: Tensor, step: Tensor, lr: Tensor, beta1: Tensor,
              beta2: Tensor) -> Any:  # fmt: skip
        return update(weight, grad, m, step, lr, beta1, beta2)

    def decayed(weight: Tensor, grad: Tensor, m: Tensor, step: Tensor, lr: Tensor, beta1: Tensor,
                beta2: Tensor, weight_decay: Tensor) -> Any:  # fmt: skip
        return update(weight, grad, m, step, lr, beta1, beta2, weight_decay)

    return decayed if flags.decays else plain


LION = Row("Lion", lion, {"exp_avg": None}, ("lr", "beta1", "beta2", "weight_decay"))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("form", [None, BF16()], ids=["full", "bf16"])
def test_a_third_optimizer_is_one_row(decay: float, form: memrewrite.Moment | None) -> None:
    """Captured, rewritten and run as the others are."""

    class Full(memrewrite.Moment):
        name = "full"

        def write(self, value: Tensor, *, name: str) -> Tensor:
            return value.clone()

        def read(self, stored: Tensor, *, name: str, shape: Any, dtype: torch.dtype) -> Tensor:
            return stored.to(dtype)

    kept = form or Full()
    flags = Flags(decays=decay != 0, decoupled=True)
    kind = StoredKind((5, 3), torch.float32, torch.device("cpu"), flags, LION, kept)
    update = build(kind, Engine("aot_eager", None, None, None))
    torch.manual_seed(0)
    w, step = torch.randn(5, 3), torch.zeros(())
    state, expected, m = kind.zeros(w), w.clone(), torch.zeros(5, 3)
    group = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": decay}
    for _ in range(4):
        g = torch.randn(5, 3)
        update.apply([w, g, state["exp_avg"]], update.numbers(step, LION.numbers(group, flags)))
        whole = m if form is None else m.bfloat16().float()
        expected = expected * (1 - 0.1 * decay) - 0.1 * (0.9 * whole + (1 - 0.9) * g).sign()
        m = 0.99 * whole + (1 - 0.99) * g
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-6)
    assert state["exp_avg"].dtype == (torch.float32 if form is None else torch.bfloat16)


def test_adam_and_adamw_are_two_rows() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    adam, adamw = torch.optim.Adam([p]), torch.optim.AdamW([p])
    assert row_of(adam, adam.param_groups[0]) is ADAM
    assert row_of(adamw, adamw.param_groups[0]) is ADAMW
    sgd = torch.optim.SGD([p])
    assert row_of(sgd, sgd.param_groups[0]) is None
