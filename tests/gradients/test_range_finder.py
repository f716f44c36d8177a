"""Bases: orthonormal, near the best, deterministic, sign-stable, robust."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memrewrite.gradients.range_finder import Refreshed, aligned, refresh, rotate_moments


def decaying(rows: int, columns: int, power: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall like j^-power."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    k = min(rows, columns)
    return u[:, :k] * torch.arange(1, k + 1).float() ** -power @ v[:, :k].t()


def basis(g: Tensor, rank: int, left: bool, method: str, old: Tensor | None = None) -> Refreshed:
    new = refresh(g, old, rank, left, method, seed=0)
    assert isinstance(new, Refreshed), new
    return new


@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(1, 40), st.booleans(),
    st.sampled_from(["svd", "randomized"]),
)  # fmt: skip
def test_columns_are_orthonormal_and_energy_is_what_they_hold(
    rows: int, columns: int, rank: int, left: bool, method: str
) -> None:
    rank = min(rank, rows, columns)
    g = torch.randn(rows, columns, dtype=torch.float64)
    new = basis(g, rank, left, method)
    p = new.projector
    assert p.shape == (rows if left else columns, rank)
    torch.testing.assert_close(p.t() @ p, torch.eye(rank, dtype=g.dtype), rtol=0, atol=1e-12)
    held = (p.t() @ g if left else g @ p).square().sum() / g.square().sum()
    assert new.energy == pytest.approx(float(held), abs=1e-12)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("left", [True, False])
def test_randomized_captures_98_percent_of_what_svd_captures(power: float, left: bool) -> None:
    g = decaying(96, 240, power)
    best = basis(g, 24, left, "svd").energy
    assert basis(g, 24, left, "randomized").energy >= 0.98 * best


def test_randomized_finds_the_singular_vectors_of_a_low_rank_gradient() -> None:
    g = (decaying(30, 50).double())[:, :5] @ torch.randn(5, 20, dtype=torch.float64)
    exact, random = (basis(g, 5, True, m).projector for m in ("svd", "randomized"))
    torch.testing.assert_close(exact, random, rtol=0, atol=1e-7)


def test_signs_follow_the_basis_before() -> None:
    g = decaying(20, 30).double()
    old = basis(g, 6, True, "svd").projector
    flipped = old * torch.tensor([1, -1, 1, -1, -1, 1.0], dtype=torch.float64)
    again = basis(g, 6, True, "svd", old=flipped).projector
    torch.testing.assert_close(again, flipped)


def test_without_a_basis_before_the_largest_entry_is_positive() -> None:
    p = aligned(torch.tensor([[0.1, 0.6], [-0.9, 0.8]]), None)
    assert torch.equal(p, torch.tensor([[-0.1, 0.6], [0.9, 0.8]]))


def test_nearly_equal_gradients_give_nearly_equal_bases() -> None:
    """What canonical vectors are for: without them a rounding error turns the moments."""
    g = decaying(64, 128)
    noisy = g * (1 + 5e-7 * torch.randn_like(g))
    old = basis(decaying(64, 128, seed=0) + 0.01 * torch.randn(64, 128), 8, True, "randomized")
    one, two = (basis(x, 8, True, "randomized", old.projector).projector for x in (g, noisy))
    assert float((one - two).abs().max()) < 1e-4


def test_the_global_generator_is_left_alone_and_the_seed_decides() -> None:
    g = torch.randn(30, 40)
    before = torch.get_rng_state()
    first = refresh(g, None, 8, True, "randomized", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = refresh(g, None, 8, True, "randomized", seed=3)
    assert isinstance(first, Refreshed) and isinstance(again, Refreshed)
    assert torch.equal(first.projector, again.projector)


@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused_with_a_reason(method: str, bad: float) -> None:
    g = torch.randn(6, 8)
    g[2, 3] = bad
    assert "NaN or Inf" in str(refresh(g, None, 2, True, method, 0))


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_gradients_of_any_size_have_the_same_basis(size: float, method: str) -> None:
    g = decaying(12, 20)
    one, other = basis(g, 3, True, method), basis(g * size, 3, True, method)
    torch.testing.assert_close(one.projector, other.projector, rtol=0, atol=1e-5)
    assert one.energy == pytest.approx(other.energy, rel=1e-4)


def test_a_zero_gradient_has_no_basis() -> None:
    assert refresh(torch.zeros(4, 5), None, 2, True, "svd", 0) == "the gradient is zero"


def test_no_convergence_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert "did not converge" in str(refresh(torch.randn(4, 5), None, 2, True, "svd", 0))


def test_low_precision_gradients_are_decomposed_in_float32() -> None:
    g = decaying(20, 30)
    low = basis(g.bfloat16(), 4, True, "svd")
    assert low.projector.dtype == torch.bfloat16
    exact = basis(g.bfloat16().float(), 4, True, "svd")
    torch.testing.assert_close(low.projector, exact.projector.bfloat16())


def test_convolutions_are_read_as_matrices() -> None:
    g = torch.randn(8, 3, 2, 2)
    assert basis(g, 3, False, "svd").projector.shape == (12, 3)
    assert basis(g, 3, True, "svd").projector.shape == (8, 3)


@pytest.mark.parametrize("left", [True, False])
def test_rotated_moments_are_exact_for_constant_gradients_within_both_bases(left: bool) -> None:
    """m is a vector and turns as one; v = m^2 where nothing varies, so it turns as m^2."""
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    old = torch.eye(6, 4, dtype=torch.float64)
    new = old @ q  # the same span
    m = torch.randn((4, 5) if left else (5, 4), dtype=torch.float64)
    state = {"exp_avg": m * 0.1, "exp_avg_sq": m.square() * 0.001}
    rotate_moments(state, new, old, left, bias1=0.1, bias2=0.001)
    turned = q.t() @ m if left else m @ q
    torch.testing.assert_close(state["exp_avg"], turned * 0.1)
    torch.testing.assert_close(state["exp_avg_sq"], turned.square() * 0.001)


def test_rotating_into_the_same_basis_changes_nothing() -> None:
    p = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    state = {k: torch.rand(3, 5, dtype=torch.float64) for k in ("exp_avg", "max_exp_avg_sq")}
    state["exp_avg_sq"] = state["exp_avg"].square() + torch.rand(3, 5, dtype=torch.float64)
    before = {k: v.clone() for k, v in state.items()}
    rotate_moments(state, p, p, True, bias1=1.0, bias2=1.0)
    for key, value in state.items():
        torch.testing.assert_close(value, before[key])
