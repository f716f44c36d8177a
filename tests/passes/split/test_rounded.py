"""Saved activations in few bits: the format, the rule by readers, both graphs, whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import Builder, show
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Stack, assert_same, gradients, loss_of, relative_errors
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn import functional as F

import memrewrite
from memrewrite import Rounded
from memrewrite.session.session import session_of
from passes.base import aten
from passes.split.groups import Groups, Packed
from passes.split.rounded import Decision, round_saved
from passes.split.saved import kept_for_backward
from passes.split.tolerance import Rounding

# --- the format -----------------------------------------------------------------------------------


def error_and_scale(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """|x^ - x| and the spacing of codes, of each number."""
    codes, scale = groups.write(x)
    back = groups.read(codes, scale, x.shape[-1], x.dtype)
    spacing = scale.to(x.dtype).repeat_interleave(groups.size, -1)[..., : x.shape[-1]]
    return (back - x).abs(), spacing


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    bits=st.sampled_from([4, 8, 16]),
    size=st.sampled_from([2, 6, 32]),
    random=st.booleans(),
    exponent=st.floats(-20, 20),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_numbers_move_by_half_a_code_or_one_at_random(
    shape: list[int],
    bits: int,
    size: int,
    random: bool,
    exponent: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=dtype) * 10**exponent
    groups = Groups(bits, size, random)
    error, spacing = error_and_scale(x, groups)
    arithmetic = 4 * 2 ** (bits - 1) * torch.finfo(dtype).eps  # of x / s, in codes
    assert (error <= spacing * ((1 if random else 0.5) + arithmetic)).all()
    codes, _ = groups.write(x)
    filled = -(-shape[-1] // size) * size
    assert codes.nbytes == x.numel() // shape[-1] * filled * bits // 8
    assert all(map(torch.equal, groups.write(x), groups.write(x.clone())))


def test_rounding_at_random_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 32)
    x[:, 0] = 1
    codes, scale = Groups(4, 32, random=True).write(x)
    error = Groups(4, 32).read(codes, scale, 32, x.dtype) - x
    assert abs(error.mean()) < 4 * error.std() / x.numel() ** 0.5


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_zeros_stay_and_what_is_not_finite_shows(bits: int) -> None:
    x = torch.randn(5, 64)
    x[1], x[2, 3], x[3, 40], x[4, 0] = 0, float("inf"), float("nan"), 1e30
    groups = Groups(bits, 32)
    back = groups.read(*groups.write(x), 64, x.dtype)
    assert not back[1].any() and back[[0, 1, 4]].isfinite().all()
    assert not back[2, :32].isfinite().any() and back[2, 32:].isfinite().all()
    assert not back[3, 32:].isfinite().any() and back[3, :32].isfinite().all()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_groups_follow_the_memory(order: tuple[int, ...]) -> None:
    dense = torch.randn(4, 5, 64)
    x = dense.permute([order.index(i) for i in range(3)])
    back = Groups(8, 32, order=order).read(*Groups(8, 32, order=order).write(x), 64, x.dtype)
    assert back.stride() == x.stride()
    assert torch.equal(
        back.permute(order), Groups(8, 32).read(*Groups(8, 32).write(dense), 64, x.dtype)
    )


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_booleans_take_a_bit_each(shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(shape) < 0.5
    order = tuple(torch.randperm(len(shape)).tolist())
    packed = Packed(order).write(x.permute([order.index(i) for i in range(len(shape))]))
    assert packed.numel() == x.numel() // shape[-1] * -(-shape[-1] // 8)
    back = Packed(order).read(packed, shape[-1], torch.bool)
    assert torch.equal(back.permute(order), x)


# --- the graphs -----------------------------------------------------------------------------------

SOFTMAX = "its exponential is read, and it may hold infinities"
Reads = Callable[[Builder, Node, Node], Node]
SIZE = 128  # squared: the least that is rounded


def halves(reads: Reads, matmul: bool = True) -> tuple[Graph, Graph]:
    """A forward that saves h, and a backward that reads it."""
    f, b = Builder(), Builder()
    x = f.place("x", SIZE, SIZE)
    h = f.op(aten.mm.default, x, x) if matmul else f.op(aten.sin.default, x)
    forward = f.returns(f.op(aten.sum.default, h), h)
    place, dy = b.place(h.name, SIZE, SIZE), b.place("dy", SIZE, SIZE)
    dy.meta["tangent"] = True
    return forward, b.returns(reads(b, place, dy))


def weight_gradient(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.mm.default, dy, b.op(aten.view.default, h, [SIZE, SIZE]))


def product(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.mul.Tensor, dy, h)


def pointwise(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.mul.Tensor, dy, b.op(aten.cos.default, h))


def softmax(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.exp.default, b.op(aten.sub.Tensor, h, dy))


def opaque(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.mul.Tensor, dy, b.op(aten.cumsum.default, h, 0))


def compared(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.mul.Tensor, dy, b.op(aten.gt.Scalar, h, 0))


def compared_with_another(b: Builder, h: Node, dy: Node) -> Node:
    return b.op(aten.mul.Tensor, dy, b.op(aten.gt.Scalar, h, 0.5))


def returned(b: Builder, h: Node, dy: Node) -> Node:
    return h


def rounded(
    reads: Reads, how: Rounding, matmul: bool = True, free: Any = ()
) -> tuple[Graph, Graph, list[Decision]]:
    forward, backward = halves(reads, matmul)
    return forward, backward, round_saved(forward, backward, 1, how, free, {0})


@pytest.mark.parametrize(
    ("reads", "matmul", "eight", "four"),
    [
        (weight_gradient, False, 8, 4),
        (product, True, 8, 4),
        (product, False, 8, 8),
        (pointwise, True, 8, 8),
        (softmax, True, SOFTMAX, SOFTMAX),
        (opaque, True, 16, 16),
        (compared, True, 8, 8),
        (compared_with_another, True, "gt compares it", "gt compares it"),
        (returned, True, "backward returns it", "backward returns it"),
    ],
)
def test_readers_decide(reads: Reads, matmul: bool, eight: int | str, four: int | str) -> None:
    for bits, wanted in ((8, eight), (4, four)):
        forward, _, (found,) = rounded(reads, Rounding(bits), matmul)
        assert (found.bits or found.reason) == wanted
        after = kept_for_backward(forward, 1, ()).bytes
        scales = 2 * SIZE * SIZE // 32
        assert (
            after
            == found.after
            == (SIZE * SIZE * wanted // 8 + scales if isinstance(wanted, int) else found.before)
        )


def test_a_mask_stays_exact() -> None:
    """No weight enters it; it may hold infinities."""
    forward, backward = halves(pointwise)
    (found,) = round_saved(forward, backward, 1, Rounding(), (), {7})
    assert found.reason == "no weight enters it"


def test_printed_form() -> None:
    forward, backward, _ = rounded(pointwise, Rounding())
    assert_expected_inline(
        show(GraphModule(nn.Module(), forward)),
        """\
mm_default: [128, 128] = mm.default(x, x)
view: [128, 4, 32] = view.default(mm_default, [128, -1, 32])
abs_1: [128, 4, 32] = abs.default(view)
amax: [128, 4] = amax.default(abs_1, [-1])
mul: [128, 4] = mul.Tensor(amax, 0.007904773622047244)
_to_copy: [128, 4] = _to_copy.default(mul, dtype=torch.bfloat16)
_to_copy_1: [128, 4] = _to_copy.default(_to_copy, dtype=torch.float32)
clamp: [128, 4] = clamp.default(_to_copy_1, 1e-30)
reciprocal: [128, 4] = reciprocal.default(clamp)
mul_1: [128, 4] = mul.Tensor(reciprocal, 1)
unsqueeze: [128, 4, 1] = unsqueeze.default(mul_1, -1)
mul_2: [128, 4, 32] = mul.Tensor(view, unsqueeze)
round_1: [128, 4, 32] = round.default(mul_2)
clamp_1: [128, 4, 32] = clamp.default(round_1, -127, 127)
view_1: [128, 128] = view.default(clamp_1, [128, 128])
_to_copy_2: [128, 128] = _to_copy.default(view_1, dtype=torch.int8)
sum_default: [] = sum.default(mm_default)
return (sum_default, _to_copy_2, _to_copy)""",
    )
    assert_expected_inline(
        show(GraphModule(nn.Module(), backward)),
        """\
view: [128, 4, 32] = view.default(_to_copy_2, [128, 4, -1])
_to_copy: [128, 4, 32] = _to_copy.default(view, dtype=torch.float32)
_to_copy_1: [128, 4] = _to_copy.default(_to_copy, dtype=torch.float32)
unsqueeze: [128, 4, 1] = unsqueeze.default(_to_copy_1, -1)
mul: [128, 4, 32] = mul.Tensor(_to_copy, unsqueeze)
view_1: [128, 128] = view.default(mul, [128, 128])
cos_default: [128, 128] = cos.default(view_1)
mul_tensor: [128, 128] = mul.Tensor(dy, cos_default)
return (mul_tensor,)""",
    )


@settings(max_examples=20, deadline=None)
@given(
    reads=st.sampled_from([weight_gradient, product, pointwise, opaque]),
    how=st.builds(Rounding, st.sampled_from([4, 8]), st.sampled_from([16, 32]), st.booleans()),
    seed=st.integers(0, 99),
)
def test_backward_reads_what_is_restored(reads: Reads, how: Rounding, seed: int) -> None:
    torch.manual_seed(seed)
    x, dy = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    _, plain = halves(reads)
    forward, backward, (found,) = rounded(reads, how)
    total, *codes = run(forward, x)
    random = how.random and reads is weight_gradient
    groups = Groups(found.bits or 0, how.group, random)
    h = groups.read(*groups.write(x @ x), SIZE, x.dtype)
    assert torch.equal(total, (x @ x).sum())
    torch.testing.assert_close(run(backward, *codes, dy), run(plain, h, dy), rtol=0, atol=0)


def run(graph: Graph, *args: Tensor) -> Any:
    with torch.no_grad():
        found = Interpreter(GraphModule(nn.Module(), graph)).run(*args)
    return found if len(found) > 1 else found[0]


def test_a_comparison_with_zero_is_exact() -> None:
    forward, backward, _ = rounded(compared, Rounding())
    x, dy = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    x[0] = 0
    x[1:] *= 1e-3 ** torch.rand(SIZE - 1, SIZE)
    _, *codes = run(forward, x)
    assert torch.equal(run(backward, *codes, dy), dy * (x @ x > 0))


def test_twice_is_once() -> None:
    forward, backward, _ = rounded(pointwise, Rounding())
    before = [show(GraphModule(nn.Module(), graph)) for graph in (forward, backward)]
    assert round_saved(forward, backward, 1, Rounding(), (), {0}) == []
    assert before == [show(GraphModule(nn.Module(), graph)) for graph in (forward, backward)]


def test_one_copy_serves_all_views_of_a_storage() -> None:
    f, b = Builder(), Builder()
    x = f.place("x", SIZE, SIZE)
    h = f.op(aten.mm.default, x, x)
    views = [h, f.op(aten.permute.default, f.op(aten.view.default, h, [SIZE, 2, 64]), [1, 0, 2])]
    forward = f.returns(f.op(aten.sum.default, h), *views)
    places = [b.place(h.name, SIZE, SIZE), b.place(views[1].name, 2, SIZE, 64)]
    dy = b.place("dy", SIZE, SIZE)
    dy.meta["tangent"] = True
    shaped = [dy, b.op(aten.view.default, dy, [2, SIZE, 64])]
    cosines = [b.op(aten.cos.default, place) for place in places]
    products = [b.op(aten.mul.Tensor, *both) for both in zip(cosines, shaped, strict=True)]
    sums = [b.op(aten.sum.default, one) for one in products]
    backward = b.returns(*sums)
    (found,) = round_saved(forward, backward, 1, Rounding(), (), {0})
    assert found.bits == 8
    value = torch.randn(SIZE, SIZE)
    _, *codes = run(forward, value)
    assert len(codes) == 2
    one, other = run(backward, *codes, torch.ones(SIZE, SIZE))
    torch.testing.assert_close(one, other)
    assert abs(one - (value @ value).cos().sum()) < 0.1 * SIZE


def test_low_precision_keeps_what_would_need_16_bits() -> None:
    forward, backward = halves(opaque)
    for graph in (forward, backward):
        for node in graph.nodes:
            if isinstance(node.meta.get("val"), Tensor):
                node.meta["val"] = node.meta["val"].bfloat16()
    (found,) = round_saved(forward, backward, 1, Rounding(), (), {0})
    assert found.reason == "cumsum reads it"


# --- models ---------------------------------------------------------------------------------------


def compiled(model: nn.Module, how: Any, **options: Any) -> nn.Module:
    return memrewrite.compile(
        copy.deepcopy(model), activations=how, **{"backend": "aot_eager", **options}
    )


class Gate(nn.Module):
    """y = silu(x A) * (x B), whose backward reads both products."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.a(x)) * self.b(x)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_rounded_products(bits: int) -> None:
    torch.manual_seed(0)
    model, x, dy = Gate().double(), torch.randn(256, 64).double(), torch.randn(256, 96).double()
    ours = compiled(model, Rounded(bits, 16))
    y = ours(x)
    y.backward(dy)
    eight, few = Groups(8, 16), Groups(bits, 16)
    torch.testing.assert_close(y, model(x), rtol=1e-12, atol=1e-12)
    both = ((eight, model.a), (few, model.b))  # b is a factor of products alone
    a, b = (g.read(*g.write(weight(x)), 96, x.dtype) for g, weight in both)
    s = a.sigmoid()
    da, db = dy * b * s * (1 + a * (1 - s)), dy * a * s
    torch.testing.assert_close(ours.a.weight.grad, da.t() @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.b.weight.grad, db.t() @ x, rtol=1e-10, atol=1e-10)


def test_a_stack_in_8_bits_is_near_and_repeats_and_takes_what_is_reported() -> None:
    torch.manual_seed(0)
    model, x = Stack(2, 64, 96), torch.randn(512, 64)
    found = []
    for how in (None, "int8", "int8", "int4"):
        ours = compiled(model, how)
        loss = loss_of(x)(ours)
        loss.backward()
        found.append((loss.detach(), gradients(ours)))
    assert all(torch.equal(found[0][0], loss) for loss, _ in found)
    assert_same(found[1][1], found[2][1])
    for (_, got), most in zip(found[1:], (0.02, 0.02, 0.3), strict=True):
        assert 0 < max(relative_errors(got, found[0][1]).values()) < most
    kept = memrewrite.saved_tensors(ours, x)
    totals = memrewrite.report(ours).to_dict()["totals"]
    held = [row for row in kept if row.kind in ("exact", "compressed", "input")]
    assert sum(row.bytes for row in held) == totals["saved_bytes_after"]
    assert totals["saved_bytes_after"] < 0.5 * totals["saved_bytes_before"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(4, 64, 3, 1, 64).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 64, 64))


@pytest.mark.parametrize(("how", "bits"), [("int8", [16, 16]), ("int4", [8, 16])])
def test_attention_reads_q_and_k_in_16_bits(how: str, bits: list[int]) -> None:
    """Here q, k and v are slices of one storage."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 64, 64)
    ours = compiled(model, how)
    for one in (ours, model):
        loss_of(x)(one).backward()
    found = decisions(ours)
    assert sorted(one.bits for one in found if one.bits) == bits
    worst = max(relative_errors(gradients(ours), gradients(model)).values())
    assert 0 < worst < (1e-3 if how == "int8" else 0.02)


def decisions(model: nn.Module) -> list[Any]:
    bindings = session_of(model).bindings()
    return [one for binding in bindings for one in binding.variant.record.rounded]


def test_where_nothing_is_rounded_the_first_step_says_so() -> None:
    ours = compiled(Gate(), "int8")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(torch.randn(2, 64)).sum().backward()
    with pytest.warns(memrewrite.MemrewriteWarning, match="rounds no saved tensor: none of floats"):
        optimizer.step()
    optimizer.step()


def test_dynamic_shapes() -> None:
    torch.manual_seed(0)
    model = Stack(2, 64, 96)
    ours = compiled(model, "int8", dynamic=True)
    for rows in (300, 512, 400):
        x = torch.randn(rows, 64)
        for one in (ours, model):
            one.zero_grad(), loss_of(x)(one).backward()
        assert 0 < max(relative_errors(gradients(ours), gradients(model)).values()) < 0.02


def test_with_velora_and_under_inductor() -> None:
    """VeLoRA's z stays; what it leaves is rounded."""
    torch.manual_seed(0)
    model, x = Stack(1, 64, 96), torch.randn(512, 64)
    velora = memrewrite.VeLoRA(16, "all", gradients="dense")
    exact, ours = (
        compiled(model, how, velora=velora, backend="inductor") for how in (None, "int8")
    )
    for one in (exact, ours):
        loss_of(x)(one).backward()
    worst = relative_errors(gradients(ours), gradients(exact))
    assert 0 < max(worst.values()) < 0.02
    kept = memrewrite.saved_tensors(ours, x)
    assert any(row.kind == "compressed" and row.dtype == torch.float32 for row in kept)


def test_wrong_options() -> None:
    for wrong in ({"bits": 3}, {"group": 7}, {"group": True}, {"stochastic": "always"}):
        with pytest.raises(ValueError):
            Rounded(**wrong)
