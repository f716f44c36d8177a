"""A running sum kept in place of its last term: the same values, never more bytes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from graphs import Builder, show
from hypothesis import given, settings
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from memrewrite.compiler.sizes import hint
from passes.base import aten
from passes.split.saved import kept_for_backward
from passes.split.sums import keep_sums


def halves(blocks: int, masked: bool = False) -> tuple[Graph, Graph]:
    """y_i = h_i w, h_{i+1} = h_i + y_i; every y is kept, backward wants cos of every sum.

    Where masked, h_{i+1} = h_i + y_i mask 1.25: a dropout, whose mask is an argument here.
    """
    f = Builder()
    h, w = f.place("h", 5, 8), f.place("w", 8, 8)
    mask = f.place("mask", 5, 8)

    def dropped(b: Builder, y: Node, mask: Node) -> Node:
        y = b.op(aten.view.default, y, [5, 8])
        return b.op(aten.mul.Tensor, b.op(aten.mul.Tensor, y, mask), 1.25) if masked else y

    total, ys = h, []
    for _ in range(blocks):
        y = f.op(aten.mm.default, total, w)
        ys.append(y)
        total = f.op(aten.add.Tensor, total, dropped(f, y, mask))
    forward = f.returns(total, h, mask, *ys)
    b = Builder()
    total, mask = b.place(h.name, 5, 8), b.place(mask.name, 5, 8)
    places = [b.place(y.name, 5, 8) for y in ys]
    dy = b.place("dy", 5, 8)
    for y in places:
        total = b.op(aten.add.Tensor, total, dropped(b, y, mask))
        dy = b.op(aten.mul.Tensor, b.op(aten.cos.default, total), dy)
        dy = b.op(aten.mul.Tensor, dy, mask) if masked else dy
    return forward, b.returns(dy)


def run(graph: Graph, *args: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(Interpreter(GraphModule(torch.nn.Module(), graph)).run(*args))


@settings(max_examples=10, deadline=None)
@given(blocks=st.integers(1, 5), masked=st.booleans(), seed=st.integers(0, 99))
def test_the_halves_compute_what_they_computed(blocks: int, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, w, dy = (torch.randn(*s, generator=generator) for s in ((5, 8), (8, 8), (5, 8)))
    mask = torch.rand(5, 8, generator=generator).gt(0.2).float()
    forward, backward = halves(blocks, masked)
    y, *kept = run(forward, h, w, mask)
    (expected,) = run(backward, *kept, dy)
    before = kept_for_backward(forward, 1, free={1}).bytes
    sums = keep_sums(forward, backward, 1, hint)
    assert len(sums) == blocks
    backward.lint()
    forward.lint()
    y_again, *kept = run(forward, h, w, mask)
    assert torch.equal(y, y_again)
    assert torch.equal(run(backward, *kept, dy)[0], expected)
    assert kept_for_backward(forward, 1, free={1}).bytes <= before
    assert not backward.find_nodes(op="call_function", target=aten.add.Tensor)
    assert keep_sums(forward, backward, 1, hint) == []


def test_the_exchange_as_printed() -> None:
    forward, backward = halves(1)
    keep_sums(forward, backward, 1, hint)
    assert show(GraphModule(torch.nn.Module(), forward)) == (
        "mm_default: [5, 8] = mm.default(h, w)\n"
        "view_default: [5, 8] = view.default(mm_default, [5, 8])\n"
        "add_tensor: [5, 8] = add.Tensor(h, view_default)\n"
        "return (add_tensor, h, mask, add_tensor)"
    )
    assert show(GraphModule(torch.nn.Module(), backward)) == (
        "cos_default: [5, 8] = cos.default(add_tensor)\n"
        "mul_tensor: [5, 8] = mul.Tensor(cos_default, dy)\n"
        "return (mul_tensor,)"
    )
    names = [n.name for n in backward.find_nodes(op="placeholder")]
    assert names == ["h", "mask", "add_tensor", "dy"]


def test_a_dropout_before_the_sum_as_printed() -> None:
    forward, backward = halves(1, masked=True)
    assert keep_sums(forward, backward, 1, hint) == ["add_tensor"]
    assert show(GraphModule(torch.nn.Module(), backward)) == (
        "cos_default: [5, 8] = cos.default(add_tensor)\n"
        "mul_tensor_2: [5, 8] = mul.Tensor(cos_default, dy)\n"
        "mul_tensor_3: [5, 8] = mul.Tensor(mul_tensor_2, mask)\n"
        "return (mul_tensor_3,)"
    )


def near_miss(
    use_twice: bool = False, widen: bool = False, share: bool = False, other: Any = None
) -> tuple[Graph, Graph]:
    f = Builder()
    h, w = f.place("h", 5, 8), f.place("w", 8, 8 if not widen else 1)
    y = f.op(aten.mm.default, h, w)
    total = f.op(aten.add.Tensor, h, y)
    view = f.op(aten.view.default, y, [-1])
    forward = f.returns(total, h, y, *([view] if share else []))
    b = Builder()
    x, term = b.place(h.name, 5, 8), b.place(y.name, *y.meta["val"].shape)
    rest = [b.place(view.name, y.meta["val"].numel())] if share else []
    addend = other(b, term) if other else term
    grad = b.op(aten.cos.default, b.op(aten.add.Tensor, x, addend))
    if use_twice:
        grad = b.op(aten.mul.Tensor, grad, term)
    return forward, b.returns(grad, *(b.op(aten.sin.default, r) for r in rest))


def test_silent_where_another_part_keeps_the_memory() -> None:
    f = Builder()
    h, w = f.place("h", 5, 8), f.place("w", 8, 16)
    y = f.op(aten.mm.default, h, w)
    one = f.op(aten.slice.Tensor, y, 1, 0, 8)
    two = f.op(aten.slice.Tensor, y, 1, 8, 16)
    forward = f.returns(f.op(aten.add.Tensor, h, one), h, one, two)
    b = Builder()
    x, first, second = b.place(h.name, 5, 8), b.place(one.name, 5, 8), b.place(two.name, 5, 8)
    total = b.op(aten.add.Tensor, x, first)
    backward = b.returns(b.op(aten.cos.default, total), b.op(aten.sin.default, second))
    assert keep_sums(forward, backward, 1, hint) == []


def test_silent_where_backward_reads_the_term_itself_or_the_sum_is_larger() -> None:
    def halfway(b: Builder, y: Node) -> Node:  # not elementwise
        return b.op(aten.cumsum.default, y, 0)

    def branching(b: Builder, y: Node) -> Node:  # read by two operations on the way
        sine = b.op(aten.sin.default, y)
        return b.op(aten.mul.Tensor, sine, b.op(aten.cos.default, sine))

    misses: list[dict[str, Any]] = [{"use_twice": True}, {"widen": True}, {"share": True}]
    for miss in (*misses, {"other": halfway}, {"other": branching}):
        forward, backward = near_miss(**miss)
        printed = str(forward), str(backward)
        assert keep_sums(forward, backward, 1, hint) == []
        assert (str(forward), str(backward)) == printed
    assert keep_sums(*near_miss(), 1, hint) == ["add_tensor"]
