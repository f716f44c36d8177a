"""Gradients that never came take no memory, and those that came count as ever: the pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import Builder, execute, show
from hypothesis import given, settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from memrewrite.compiler.pipeline import run
from memrewrite.compiler.sizes import hint
from passes.base import aten
from passes.joint.absent import (
    absent_gradients,
    absent_like,
    skip_absent_gradients,
    write_in_place,
)
from passes.split.live import timeline

Fn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def joint_of(fn: Fn, w: Tensor, x: Tensor) -> GraphModule:
    """(w, x, dloss, dlogits) -> loss, logits, dw, dx."""

    def joint(w: Tensor, x: Tensor, *tangents: Tensor) -> tuple[Tensor, ...]:
        w, x = w.detach().requires_grad_(), x.detach().requires_grad_()
        outputs = fn(w, x)
        return *outputs, *torch.autograd.grad(outputs, (w, x), tangents)

    mode = FakeTensorMode()
    tangents = [torch.zeros_like(y) for y in fn(w, x)]
    fakes = [mode.from_tensor(t) for t in (w, x, *tangents)]
    with mode:
        gm = make_fx(joint, tracing_mode="real")(*fakes)
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node.meta |= {"argument": i if i < 2 else None, "tangent": i >= 2}
        node.meta["output"] = i - 2 if i >= 2 else None
    for node in gm.graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])  # autograd's bookkeeping, no computation
    gm.graph.eliminate_dead_code()
    return gm


def with_loss(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, w)  # (N, O)
    return y.exp().sum(), y


def test_printed_form() -> None:
    gm = joint_of(with_loss, torch.randn(6, 8), torch.randn(5, 8))
    (step,) = run(gm, [skip_absent_gradients(hint, least=0)])
    assert step.exact
    assert_expected_inline(
        show(gm),
        """\
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(arg1_1, t)
exp: [5, 6] = exp.default(mm)
sum_1: [] = sum.default(exp)
expand: [5, 6] = expand.default(arg2_1, [5, 6])
mul: [5, 6] = mul.Tensor(expand, exp)
auto_functionalized:  = auto_functionalized(memrewrite.add_present.default, g=mul, t=arg3_1)
getitem: [5, 6] = <built-in function getitem>(auto_functionalized, 1)
t_1: [6, 5] = t.default(getitem)
mm_1: [6, 8] = mm.default(t_1, arg1_1)
t_2: [8, 6] = t.default(mm_1)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(getitem, t_3)
t_4: [6, 8] = t.default(t_2)
return (sum_1, mm, t_4, mm_2)""",
    )


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), seed=st.integers(0, 99), absent=st.booleans())
def test_it_adds_what_came_and_nothing_else(rows: int, seed: int, absent: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, x, t = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((6, 8), (rows, 8), (rows, 6))
    )
    if absent:
        t = torch.zeros_like(t)
    dloss = torch.randn((), generator=generator, dtype=torch.float64)
    gm = joint_of(with_loss, w, x)
    expected = execute(gm, w, x, dloss, t)
    run(gm, [skip_absent_gradients(hint, least=0)])
    given_ = absent_like(t.shape, t.dtype, t.device) if absent else t
    for found, wanted in zip(execute(gm, w, x, dloss, given_), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("absent", [True, False])
def test_op_by_op_it_is_the_same(absent: bool) -> None:
    w, x, t = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5, 6)
    t = absent_like(t.shape, t.dtype, t.device) if absent else t
    gm = joint_of(with_loss, w, x)
    run(gm, [skip_absent_gradients(hint, least=0)])
    expected = execute(gm, w, x, torch.ones(()), t)
    write_in_place(gm.graph)
    gm.graph.lint()
    assert not absent_gradients(gm.graph) and "auto_functionalized" not in show(gm)
    for found, wanted in zip(execute(gm, w, x, torch.ones(()), t), expected, strict=True):
        assert torch.equal(found, wanted)


def test_twice_is_once_and_small_ones_are_left_alone() -> None:
    gm = joint_of(with_loss, torch.randn(6, 8), torch.randn(5, 8))
    before = show(gm)
    run(gm, [skip_absent_gradients(hint)])
    assert show(gm) == before and not absent_gradients(gm.graph)
    run(gm, [skip_absent_gradients(hint, least=5 * 6 * 4)])
    once = show(gm)
    assert once != before
    assert [node.meta["output"] for node in absent_gradients(gm.graph)] == [1]
    run(gm, [skip_absent_gradients(hint, least=0)])
    assert show(gm) == once


def near_misses() -> dict[str, GraphModule]:
    found = {}

    def case(name: str, build: Callable[[Builder, Any, Any], Any], shape: Any = (4, 6)) -> None:
        b = Builder()
        x, t = b.place("x", 4, 6), b.place("t", *shape)
        t.meta |= {"tangent": True, "argument": None, "output": 0}
        graph = b.returns(*build(b, b.op(aten.tanh.default, x), t))
        found[name] = GraphModule(nn.Module(), graph)

    def scaled(b: Builder, x: Any, t: Any) -> Any:
        node = b.op(aten.add.Tensor, x, t)
        node.kwargs = {"alpha": 2}
        return [node]

    case("scaled", scaled)
    case("read twice", lambda b, x, t: [b.op(aten.add.Tensor, x, t), b.op(aten.sin.default, t)])
    case("multiplied", lambda b, x, t: [b.op(aten.mul.Tensor, x, t)])
    case("by itself", lambda b, x, t: [b.op(aten.add.Tensor, t, t)])
    case("broadcast", lambda b, x, t: [b.op(aten.add.Tensor, x, t)], (1, 6))
    case("to a number", lambda b, x, t: [b.op(aten.add.Tensor, t, 1.0)])
    case("to an input", lambda b, x, t: [b.op(aten.add.Tensor, x.args[0], t)])

    def transposed(b: Builder, x: Any, t: Any) -> Any:
        t.meta["val"] = t.meta["val"].t().contiguous().t()
        return [b.op(aten.add.Tensor, x, t)]

    case("in columns", transposed)
    wide = lambda b, x: b.op(torch.ops.prims.convert_element_type.default, x, torch.float64)  # noqa: E731
    case("in another dtype", lambda b, x, t: [b.op(aten.add.Tensor, wide(b, x), t)])
    return found


@pytest.mark.parametrize("name", near_misses())
def test_near_misses_are_left_alone(name: str) -> None:
    gm = near_misses()[name]
    before = show(gm)
    skip_absent_gradients(hint, least=0).rewrite(gm)
    assert show(gm) == before


def test_predicted_backward_lacks_the_zeros() -> None:
    gm = joint_of(with_loss, torch.randn(6, 8), torch.randn(5, 8))
    peaks = []
    for todo in ([], [skip_absent_gradients(hint, least=0)]):
        run(gm, todo)
        places = gm.graph.find_nodes(op="placeholder")
        left_out = absent_gradients(gm.graph)
        handed: Any = {n: (n.name, "incoming") for n in places if n not in left_out}
        peaks.append(sum(b.bytes for b in timeline(gm.graph, handed).buffers))
    assert peaks[0] - peaks[1] == 5 * 6 * 4  # t; the sum is where it was
