"""Adam's moments in 8 bits: the form by itself, the update, state, resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memrewrite
from memrewrite.moments.int8 import Int8
from memrewrite.optim.attachment import compiled

FORM = Int8(least=1)
FIRST, SECOND = "exp_avg", "exp_avg_sq"


def round_trip(value: Tensor, name: str) -> Tensor:
    stored = FORM.write(value, name=name)
    return FORM.read(stored, name=name, shape=tuple(value.shape), dtype=value.dtype)


@given(
    shape=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    exponent=st.floats(-25, 25),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_what_is_read_is_within_one_code_of_what_was_written(
    shape: list[int], exponent: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    m = torch.randn(shape, dtype=dtype) * 10**exponent
    v = (torch.randn(shape, dtype=dtype) * 10 ** (exponent / 2)).square()
    for x, name, n, k, codes in ((m, FIRST, 127, 2, 0.5), (v, SECOND, 255, 4, 1.0)):
        read = round_trip(x, name)
        share, back = largest_share(x), largest_share(read, of=x)  # (code / n)^k
        assert ((share ** (1 / k) - back ** (1 / k)).abs() * n).max() <= codes + 1e-3
        assert read.isfinite().all() and (read * x >= 0).all()
    assert torch.equal(round_trip(v, SECOND) > 0, v > 0)


def largest_share(x: Tensor, of: Tensor | None = None) -> Tensor:
    """|x| as shares of the largest number of its row of 256."""
    rows, known = (
        nn.functional.pad(t.abs().reshape(-1), (0, -t.numel() % 256)).view(-1, 256)
        for t in (x, x if of is None else of)
    )
    return (rows / known.amax(1, keepdim=True)).view(-1)[: x.numel()].view(x.shape).clamp(max=1)


def test_rounding_keeps_the_mean_of_the_second_moment_and_repeats() -> None:
    """By the fourth root; decayed by 0.999 a step, v would else stay at its code."""
    torch.manual_seed(0)
    v = torch.rand(400, 256)
    v[:, 0] = 1
    code = FORM.write(v, name=SECOND)[0].double()
    assert torch.equal(FORM.write(v.clone(), name=SECOND)[0].double(), code)
    error = code - 255 * v.double().sqrt().sqrt()
    assert abs(error[:, 1:].mean()) < 5 * error.std() / v.numel() ** 0.5
    kept = exact = v.clone()
    for _ in range(700):
        square = v / 2 * torch.randn_like(v).square()
        kept, exact = (0.999 * x + 0.001 * square for x in (kept, exact))
        kept = round_trip(kept, SECOND)
    assert abs((kept / exact)[:, 1:].mean() - 1) < 0.01


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_rows_of_zeros_and_numbers_that_are_not_finite(name: str) -> None:
    value = torch.rand(4, 256)
    value[1], value[2, 3], value[3, 5] = 0, float("inf"), float("nan")
    back = round_trip(value, name)
    assert back[:2].isfinite().all() and not back[1].any()
    assert not back[2].isfinite().all() and not back[3].isfinite().any()
    zeros = FORM.zeros(value, name=name)
    assert all(map(torch.equal, zeros, FORM.write(torch.zeros_like(value), name=name)))


# --- the update ---------------------------------------------------------------------------------


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights of whole rows, one of none, and one that is not contiguous."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 9, bias=False))
    model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    return model.to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(80, 32, generator=torch.Generator().manual_seed(step))
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def reference(
    w: Tensor, g: Tensor, state: dict[str, Any], t: int, lr: float, decay: float
) -> Tensor:
    """AdamW of w (n,), with m and v stored in 8 bits."""
    m, s = state.get("m", (torch.zeros_like(g), 0)), state.get("v", (torch.zeros_like(g), 0))
    m = m[0] * m[0].abs() * (m[1] * (1 / 127**2)) * 0.9 + g * (1 - 0.9)
    v = (s[0] * s[0]) * (s[0] * s[0]) * (s[1] * (1 / 255**4)) * 0.999 + g * g * (1 - 0.999)
    largest, high = (x.abs().view(-1, 256).amax(1, keepdim=True).expand(-1, 256) for x in (m, v))
    largest, high = largest.reshape(-1), high.reshape(-1)
    code = (m.abs() * (127**2 / largest.clamp(min=1e-30))).sqrt().round()
    state["m"] = torch.where(m < 0, -code, code), largest
    bits = v.view(torch.int32)
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B
    u = ((bits ^ (bits >> 16)) & 0xFFFF) * (1 / 65536)
    code = ((v.sqrt() * (255**2 / high.clamp(min=1e-37).sqrt())).sqrt() + u).floor()
    state["v"] = torch.where(v > 0, code.clamp(1, 255), 0), high
    f = {
        k: torch.tensor(x, dtype=torch.float64).float()
        for k, x in {
            "c": 1 - lr * decay,
            "a": lr / (1 - 0.9**t),
            "r": (1 - 0.999**t) ** 0.5,
        }.items()
    }
    return w * f["c"] - m * f["a"] / (v.sqrt() / f["r"] + 1e-8)


def test_each_step_is_the_references_bit_by_bit() -> None:
    torch.manual_seed(0)
    model, expected, state = nn.Linear(64, 32, bias=False), None, dict[str, Any]()
    memrewrite.compile(model, moments=FORM, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for t in range(1, 30):
        x = torch.randn(5, 64)
        model(x).square().mean().backward()
        w, g = (p.detach().clone().view(-1) for p in (model.weight, model.weight.grad))
        optimizer.step()
        expected = reference(w, g, state, t, 1e-2, 0.1)
        assert torch.equal(model.weight.detach().view(-1), expected)
        optimizer.zero_grad()


def test_one_compiled_update_serves_every_weight_of_whole_rows() -> None:
    models, known, after = [net(), net()], set(compiled), list[list[Tensor]]()
    for model, backend in zip(models, ("inductor", "aot_eager"), strict=True):
        memrewrite.compile(model, moments=FORM, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optimizer, range(1))
        after.append([p.detach().clone() for p in model.parameters()])
        train(model, optimizer, range(1, 4))
    kinds = [kind for kind, backend in set(compiled) - known if backend == "inductor"]
    assert sorted(kind.shape for kind in kinds) == [(7, 256), (9, 64), (64,)]
    for p, q, first, second in zip(*(m.parameters() for m in models), *after, strict=True):
        torch.testing.assert_close(first, second)  # nothing was read from a code yet
        assert (p - q).norm() < 0.01 * (p - first).norm()  # rounding errors may change a code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_resumed_run_goes_on_bit_by_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    """Scales are wider than bfloat16, to which `load_state_dict` casts floats."""

    def started() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net(dtype)
        memrewrite.compile(model, moments=FORM, backend="aot_eager")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)

    straight, optimizer = started()
    train(straight, optimizer, range(3))
    torch.save([straight.state_dict(), optimizer.state_dict()], tmp_path / "c.pt")
    train(straight, optimizer, range(3, 6))
    resumed, other = started()
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(state[0]), other.load_state_dict(state[1])
    train(resumed, other, range(3, 6))
    assert all(map(torch.equal, resumed.parameters(), straight.parameters()))


def test_state_takes_a_quarter_and_begins_from_adams_own() -> None:
    torch.manual_seed(0)
    model = nn.Linear(512, 256)
    stock = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = torch.optim.AdamW(stock.parameters(), lr=1e-3)
    x = torch.randn(4, 512)
    for net, steps in ((model, optimizer), (stock, before)):
        net(x).square().mean().backward()
        steps.step(), steps.zero_grad()
    memrewrite.compile(model, moments="int8", backend="aot_eager")
    model(x).square().mean().backward()
    with pytest.warns(memrewrite.MemrewriteWarning, match="in full: they are stored as"):
        optimizer.step()
    state = optimizer.state[model.weight]
    taken = sum(t.nbytes for t in state.values() if t.ndim)
    assert taken == 2 * (model.weight.numel() + 4 * model.weight.numel() // 256)
    assert taken < 0.26 * 2 * model.weight.nbytes
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.float32  # too small to gain
    predicted = memrewrite.estimate(model, x, optimizer=optimizer).rewritten.optimizer_state
    assert predicted == taken + 2 * model.bias.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_without_moments_goes_on_from_state_in_8_bits(dtype: torch.dtype) -> None:
    model = net(dtype)
    memrewrite.compile(model, moments=Int8(), backend="aot_eager")
    model[0].weight = nn.Parameter(torch.randn(128, 32).to(dtype) / 6)
    model[2].weight = nn.Parameter(torch.randn(9, 128).to(dtype) / 11)
    model[0].bias = nn.Parameter(torch.zeros(128, dtype=dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, range(2))
    plain = copy.deepcopy(memrewrite.restore(model))
    memrewrite.compile(plain, backend="aot_eager")
    second = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    second.load_state_dict(optimizer.state_dict())
    with pytest.warns(
        memrewrite.MemrewriteWarning, match="stored as 'int8' are in full from here on"
    ):
        train(plain, second, range(2, 3))
    state = second.state[plain[0].weight]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].shape == (128, 32) and state["exp_avg"].dtype == dtype


# --- GaLore in 8 bits -----------------------------------------------------------------------------


def projected(form: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    galore = memrewrite.GaLore(8, update_every=3, **options)
    memrewrite.compile(model, galore=galore, moments=form, backend="aot_eager")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("how", ["keep", "rotate"])
def test_galore_in_8_bits_is_near_galore_and_goes_on_bit_by_bit(how: Any, tmp_path: Any) -> None:
    start = net()
    (plain, first), (model, optimizer) = (projected(form, moments=how) for form in (None, FORM))
    for one, steps in ((plain, first), (model, optimizer)):
        train(one, steps, range(4))
    for p, q, w in zip(*(m.parameters() for m in (model, plain, start)), strict=True):
        assert 0 < (p - q).norm() < 0.1 * (q - w).norm()
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "c.pt")
    train(model, optimizer, range(4, 8))
    resumed, other = projected(FORM, moments=how)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(state[0]), other.load_state_dict(state[1])
    train(resumed, other, range(4, 8))
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))


def test_galore_in_8_bits_takes_what_is_predicted_and_begins_from_galores_own() -> None:
    plain, first = projected(None)
    train(plain, first, range(2))
    model, optimizer = projected(FORM)
    x = torch.randn(5, 32)
    predicted = memrewrite.estimate(model, x, optimizer=optimizer).rewritten.optimizer_state
    optimizer.load_state_dict(first.state_dict())
    with pytest.warns(memrewrite.MemrewriteWarning, match="in full: they are stored as"):
        train(model, optimizer, range(2, 4))
    taken = {k: t for s in optimizer.state.values() for k, t in s.items() if t.ndim}
    assert {t.dtype for k, t in taken.items() if "scale" not in k} == {torch.uint8}
    held = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    rows = memrewrite.report(model).optimizer
    assert held == predicted == sum(row.bytes_after for row in rows)


def test_galore_without_moments_goes_on_from_state_in_8_bits() -> None:
    model, optimizer = projected(FORM)
    train(model, optimizer, range(4))
    plain, second = projected(None)
    plain.load_state_dict(model.state_dict()), second.load_state_dict(optimizer.state_dict())
    with pytest.warns(memrewrite.MemrewriteWarning, match="are in full from here on"):
        train(plain, second, range(4, 6))
    state = second.state[plain[0].weight]
    assert {k: tuple(t.shape) for k, t in state.items() if t.ndim} == {
        **{"exp_avg": (64, 8), "exp_avg_sq": (64, 8)},
        "projector": (32, 8),
    }


def test_coordinates_of_backward_keep_their_moments() -> None:
    model, optimizer = projected(FORM, gradients="coordinates")
    predicted = memrewrite.estimate(model, torch.randn(5, 32), optimizer=optimizer)
    train(model, optimizer, range(4))
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    held = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert predicted.rewritten.optimizer_state == held
