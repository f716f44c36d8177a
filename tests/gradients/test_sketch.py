"""The sketch of a gradient: what it holds, what is made of it, and from where it starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memrewrite.gradients import sketch
from memrewrite.gradients.basis import Sketch
from memrewrite.gradients.range_finder import ZERO, Refreshed

F64 = torch.float64


def project(g: Tensor, p: Tensor, left: bool) -> Tensor:  # equations 11 and 12 of the paper
    return p.t() @ g if left else g @ p


def seen(g: Tensor, basis: Sketch) -> Tensor:
    """What a backward returns for it."""
    return project(g, basis.p, basis.left)


def refreshed(g: Tensor, basis: Sketch, rank: int, old: Tensor | None = None) -> Refreshed:
    found = sketch.refresh(seen(g, basis), basis, old, rank, g.shape)
    assert isinstance(found, Refreshed)
    return found


def energy(g: Tensor, p: Tensor, left: bool) -> float:
    return float(project(g, p, left).square().sum() / g.square().sum())


def spectrum(rows: int, columns: int, power: float, seed: int = 0) -> Tensor:
    """Singular values 1, 2^-power, 3^-power, ..."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, min(rows, columns), dtype=F64, generator=generator)).Q
        for n in (rows, columns)
    )
    return (u * torch.arange(1, min(rows, columns) + 1, dtype=F64) ** -power) @ v.t()


@given(
    left=st.booleans(),
    rows=st.integers(6, 40),
    columns=st.integers(6, 40),
    rank=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_a_gradient_of_low_rank_is_held_whole(
    left: bool, rows: int, columns: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    g = torch.randn(rows, rank, dtype=F64) @ torch.randn(rank, columns, dtype=F64)
    found = refreshed(g, sketch.start("w", g, rank, left), rank)
    p = found.projector
    torch.testing.assert_close(p.t() @ p, torch.eye(rank, dtype=F64))
    assert energy(g, p, left) == pytest.approx(1.0, abs=1e-9)


@given(left=st.booleans(), seed=st.integers(0, 1000), warm=st.booleans())
def test_coordinates_are_those_of_what_the_basis_sees(left: bool, seed: int, warm: bool) -> None:
    torch.manual_seed(seed)
    g, rank = torch.randn(30, 26, dtype=F64), 3
    r = torch.randn(rank, 26, dtype=F64) if left else torch.randn(30, rank, dtype=F64)
    basis = sketch.start("w", g, rank, left, r if warm else None)
    p = refreshed(g, basis, rank).projector
    held = g @ basis.p @ basis.p.t() if left else basis.p @ basis.p.t() @ g
    found = sketch.coordinates(seen(g, basis), basis, p, left)
    torch.testing.assert_close(found, project(held, p, left))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_sketches_that_follow_one_another_are_a_power_iteration(left: bool, power: float) -> None:
    g, rank = spectrum(200, 160, power), 16
    best = float(torch.linalg.svdvals(g)[:rank].square().sum() / g.square().sum())
    r, found = None, []
    for _ in range(4):
        p = refreshed(g, sketch.start("w", g, rank, left, r), rank).projector
        r = project(g, p, left)
        found.append(energy(g, p, left) / best)
    assert found == sorted(found)
    assert found[0] > 0.4 and found[-1] > 0.97


@pytest.mark.parametrize("left", [True, False])
def test_the_energy_is_estimated_from_the_random_columns(left: bool) -> None:
    g, rank = spectrum(200, 160, 0.5), 16
    p = refreshed(g, sketch.start("w", g, rank, left), rank).projector
    found = refreshed(g, sketch.start("w", g, rank, left, project(g, p, left)), rank)
    assert found.energy == pytest.approx(energy(g, found.projector, left), rel=0.25)


@pytest.mark.parametrize("left", [True, False])
def test_where_it_starts(left: bool) -> None:
    like, rank = torch.empty(40, 50), 4
    r = torch.randn(rank, 50) if left else torch.randn(40, rank)
    warm, cold = sketch.start("w", like, rank, left, r), sketch.start("w", like, rank, left)
    assert warm.left is cold.left is not left and (warm.warm, cold.warm) == (rank, 0)
    for basis in (warm, cold):
        torch.testing.assert_close(basis.p.t() @ basis.p, torch.eye(rank + 16), atol=1e-5, rtol=0)
    columns = r.t() if left else r
    first = warm.p[:, :rank]
    torch.testing.assert_close(first @ (first.t() @ columns), columns, atol=1e-5, rtol=1e-5)
    assert torch.equal(cold.p, sketch.start("w", like, rank, left).p)
    assert not torch.equal(cold.p, sketch.start("v", like, rank, left).p)
    for useless in (torch.zeros_like(r), r * torch.nan):
        assert torch.equal(cold.p, sketch.start("w", like, rank, left, useless).p)


def test_a_basis_is_never_wider_than_its_side() -> None:
    assert sketch.start("w", torch.empty(6, 9), 4, True).p.shape == (9, 9)
    assert sketch.start("w", torch.empty(6, 9), 4, False).p.shape == (6, 6)


def test_zeros_and_nans_have_no_projector() -> None:
    g = torch.zeros(8, 8)
    basis = sketch.start("w", g, 2, True)
    assert sketch.refresh(seen(g, basis), basis, None, 2, g.shape) == ZERO
    assert "NaN" in str(sketch.refresh(seen(g + torch.nan, basis), basis, None, 2, g.shape))


def test_when_one_is_due() -> None:
    assert [n for n in range(25) if sketch.is_due(n, 10)] == [0, 2, 4, 10, 20]
    assert [n for n in range(7) if sketch.is_due(n, 3)] == [0, 2, 3, 6]
    assert all(sketch.is_due(n, 1) for n in range(5))
