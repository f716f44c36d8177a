"""ProjectedGrad: it is its dense value, whatever is done to it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from memrewrite.gradients.basis import Vector
from memrewrite.gradients.gradient import ProjectedGrad


def gradient(
    rows: int = 3, features: int = 10, size: int = 4, seed: int = 0, v: Tensor | None = None
) -> ProjectedGrad:
    torch.manual_seed(seed)
    if v is None:
        v = nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0)
    a = torch.randn(rows, -(-features // len(v)), dtype=torch.float64)
    return ProjectedGrad(a, Vector(v), (rows, features))


OUT_OF_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda g, h: g + h,
    "sub": lambda g, h: g - h,
    "alpha": lambda g, h: torch.add(g, h, alpha=0.5),
    "scaled": lambda g, h: 2.5 * g / 3,
    "by a 0-d tensor": lambda g, h: g * torch.tensor(2.0, dtype=torch.float64),
    "neg": lambda g, h: -g,
    "clone": lambda g, h: g.clone(),
    "detach": lambda g, h: g.detach(),
    "double": lambda g, h: g.to(torch.float32).double(),
    "norm": lambda g, h: g.norm(),
    "norm 1": lambda g, h: g.norm(p=1),
    "norm of rows": lambda g, h: g.norm(dim=1),
    "finite": lambda g, h: torch.isfinite(g).all(),
    "plus a number": lambda g, h: g + 1.0,
    "matmul": lambda g, h: g @ h.t(),
    "sum": lambda g, h: g.sum(),
    "index": lambda g, h: g[1, 2:5],
    "where": lambda g, h: torch.where(g > 0, g, h),
    "zeros_like": lambda g, h: torch.zeros_like(g),
    "deepcopy": lambda g, h: copy.deepcopy(g),
}
SMALL = {"add", "sub", "alpha", "scaled", "by a 0-d tensor", "neg", "clone", "detach", "double"}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_operations_equal_the_dense_ones(name: str) -> None:
    g = gradient()
    h = gradient(seed=1, v=g.basis.v)
    result = OUT_OF_PLACE[name](g, h)
    wanted = OUT_OF_PLACE[name](g.to_dense(), h.to_dense())
    if isinstance(result, ProjectedGrad):
        assert name in SMALL | {"deepcopy"} and not result.is_dense
        result = result.to_dense()
    else:
        assert name not in SMALL
    torch.testing.assert_close(result, wanted, check_dtype=name != "double")
    assert not g.is_dense


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "add_": lambda g, h: g.add_(h),
    "sub_": lambda g, h: g.sub_(h, alpha=2),
    "mul_": lambda g, h: g.mul_(0.5),
    "div_": lambda g, h: g.div_(torch.tensor(3.0, dtype=torch.float64)),
    "zero_": lambda g, h: g.zero_(),
    "neg_": lambda g, h: g.neg_(),
    "copy_": lambda g, h: g.copy_(h),
    "clamp_": lambda g, h: g.clamp_(-0.1, 0.1),
    "add a number": lambda g, h: g.add_(1.0),
    "add a dense one": lambda g, h: g.add_(h.to_dense()),
    "write an entry": lambda g, h: g.__setitem__((0, 0), 5.0),
    "foreach": lambda g, h: torch._foreach_mul_([g, torch.ones(2)], 2.0),
    "foreach zero": lambda g, h: torch._foreach_zero_([g]),
}
STAY_SMALL = {"add_", "sub_", "mul_", "div_", "zero_", "neg_", "copy_", "foreach", "foreach zero"}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations_equal_the_dense_ones(name: str) -> None:
    g = gradient()
    h = gradient(seed=1, v=g.basis.v)
    plain, other = g.to_dense().clone(), h.to_dense()
    IN_PLACE[name](g, h)
    IN_PLACE[name](plain, h if name == "add a dense one" else other)
    torch.testing.assert_close(g.to_dense(), plain)
    assert g.is_dense is (name not in STAY_SMALL)
    IN_PLACE["mul_"](g, h)  # a dense one goes on as well
    torch.testing.assert_close(g.to_dense(), plain * 0.5)


def test_another_basis_is_added_densely() -> None:
    g, h = gradient(), gradient(seed=1)
    assert not g.basis.same(h.basis)
    total = g + h
    assert not isinstance(total, ProjectedGrad)
    torch.testing.assert_close(total, g.to_dense() + h.to_dense())


@given(
    rows=st.integers(1, 5), features=st.integers(2, 13), size=st.integers(2, 6),
    seed=st.integers(0, 999), left=st.booleans(),
)  # fmt: skip
def test_the_norm_needs_no_dense_value(
    rows: int, features: int, size: int, seed: int, left: bool
) -> None:
    g = gradient(rows, features, min(size, features), seed)
    if left:
        small, v = g.coordinates, g.basis.v  # type: ignore[union-attr]
        g = ProjectedGrad(small.t().contiguous(), Vector(v, left), (features, rows))
    torch.testing.assert_close(g.norm(), g.to_dense().norm(), rtol=1e-12, atol=1e-12)


def parameters() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Two equal lists; the first one's first gradient is projected."""
    g = gradient()
    ours = [nn.Parameter(torch.ones(3, 10).double()), nn.Parameter(torch.ones(4).double())]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    ours[0].grad, ours[1].grad = g, torch.randn(4).double()
    theirs[0].grad, theirs[1].grad = g.to_dense().clone(), ours[1].grad.clone()
    return ours, theirs


def same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        grad: Any = p.grad
        dense = grad.to_dense() if isinstance(grad, ProjectedGrad) else grad
        torch.testing.assert_close(dense, q.grad, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("most", [0.1, 1e9])
def test_clipping_the_norm_stays_small(most: float, foreach: bool) -> None:
    ours, theirs = parameters()
    mine = nn.utils.clip_grad_norm_(ours, most, foreach=foreach)
    torch.testing.assert_close(mine, nn.utils.clip_grad_norm_(theirs, most), rtol=1e-6, atol=0)
    assert isinstance(ours[0].grad, ProjectedGrad) and not ours[0].grad.is_dense
    same(ours, theirs)


def test_clipping_values_is_dense_and_right() -> None:
    ours, theirs = parameters()
    nn.utils.clip_grad_value_(ours, 0.05)
    nn.utils.clip_grad_value_(theirs, 0.05)
    same(ours, theirs)


def test_unscaling() -> None:
    ours, theirs = parameters()
    for list_ in (ours, theirs):
        found, inverse = torch.zeros(1), torch.full((1,), 0.5)
        grads = [p.grad for p in list_]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
        assert not found
    same(ours, theirs)
    bad = gradient()
    assert bad.coordinates is not None
    bad.coordinates[0, 0] = float("inf")
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([bad], found, torch.ones(1))
    assert found


@pytest.mark.parametrize("none", [True, False])
def test_zero_grad(none: bool) -> None:
    ours, _ = parameters()
    torch.optim.SGD(ours, lr=1.0).zero_grad(set_to_none=none)
    if none:
        assert ours[0].grad is None
    else:
        assert isinstance(ours[0].grad, ProjectedGrad) and not ours[0].grad.to_dense().any()


STOCK = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    lambda p: torch.optim.Adafactor(p, lr=0.1),
    lambda p: torch.optim.RMSprop(p, lr=0.1),
    lambda p: torch.optim.NAdam(p, lr=0.1),
]


@pytest.mark.parametrize("make", STOCK)
def test_stock_optimizers_see_the_dense_gradient(make: Any) -> None:
    ours, theirs = parameters()
    for list_ in (ours, theirs):
        optimizer = make(list_)
        optimizer.step()
        optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_autograd_accumulates_coordinates() -> None:
    class Port(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor, g: ProjectedGrad) -> Tensor:
            ctx.g = g
            return w.new_zeros(())

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
            return ctx.g, None

    g = gradient()
    h = gradient(seed=1, v=g.basis.v)
    w = nn.Parameter(torch.ones(3, 10, dtype=torch.float64))
    seen: list[Any] = []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(type(p.grad)))
    for each in (g, h):
        Port.apply(w, each.clone()).backward()  # type: ignore[no-untyped-call]
    assert isinstance(w.grad, ProjectedGrad) and not w.grad.is_dense
    torch.testing.assert_close(w.grad.to_dense(), g.to_dense() + h.to_dense())
    assert seen == [ProjectedGrad, ProjectedGrad]
    (taken,) = torch.autograd.grad(Port.apply(w, g), [w])  # type: ignore[no-untyped-call]
    assert isinstance(taken, ProjectedGrad)


def test_a_write_through_a_view_is_not_lost() -> None:
    g = gradient()
    plain = g.to_dense().clone()
    flat = g.view(-1)
    assert not g.is_dense  # looking does no harm
    flat.mul_(2)
    assert g.is_dense
    torch.testing.assert_close(g.to_dense(), plain * 2)
    h = gradient()
    row = h[0]
    h.mul_(3)  # the view must see it
    torch.testing.assert_close(row, plain[0] * 3)
    torch.testing.assert_close(h.to_dense(), plain * 3)


@pytest.mark.parametrize("reach", [lambda g: g.data, lambda g: g.detach()])
@pytest.mark.parametrize("write", [lambda g: g.clamp_(-0.1, 0.1), lambda g: g[0].zero_()])
def test_a_dense_write_through_the_same_tensor_is_not_lost(reach: Any, write: Any) -> None:
    g = gradient()
    plain = g.to_dense().clone()
    write(reach(g))
    write(plain)
    torch.testing.assert_close(g.to_dense(), plain)
    assert g.is_dense
    reach(g).mul_(2)  # of one that is dense already
    torch.testing.assert_close(g.to_dense(), plain * 2)
    assert not reach(gradient()).is_dense


def test_old_ways_of_reaching_a_gradient() -> None:
    g = gradient()
    plain = g.to_dense().clone()
    g.data.mul_(2)
    torch.testing.assert_close(g.to_dense(), plain * 2)
    assert g.tolist() == (plain * 2).tolist() and (g.numpy() == (plain * 2).numpy()).all()
    assert not g.is_dense and g.stored_bytes == 9 * 8 and g.nbytes == 30 * 8
    g.data = plain + 1
    torch.testing.assert_close(g.to_dense(), plain + 1)


def test_pickling_and_printing() -> None:
    g = gradient()
    assert "coordinates=(3, 3), v=(4,)" in repr(g)
    assert str(g) == repr(g)
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), g.to_dense())
    g.clamp_(min=0)
    assert "dense" in repr(g)
