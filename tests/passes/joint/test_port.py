"""Gradient ports: printed form, meaning, silence on near misses, idempotence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import add_vector, execute, joint_graph, show
from hypothesis import given
from hypothesis import strategies as st
from oracle import compress, reconstruct
from torch import Tensor
from torch.fx import GraphModule

from memrewrite.compiler.pipeline import run
from passes.base import Pass
from passes.joint.fold import fold_reconstruction
from passes.joint.port import Ported, return_coordinates
from passes.joint.velora import compress_saved_inputs
from passes.lower import lower_ir_ops
from passes.ops import port_attach


def passes(size_at: int, scale: float = 1.0, left: bool = False) -> list[Pass]:
    """W is argument 0, its port argument 1, its v the last."""
    compressing = compress_saved_inputs({0: size_at}, frozenset({0, 1}), scale)
    return [compressing, fold_reconstruction(), return_coordinates([Ported(0, 1, left)])]


def ported(
    fn: Callable[[Tensor, Tensor], Tensor], weight: Tensor, x: Tensor, v: Tensor, left: bool = False
) -> GraphModule:
    groups = -(-x.shape[-1] // len(v))
    shape = (groups, weight.shape[1]) if left else (weight.shape[0], groups)
    port = torch.zeros(shape, dtype=weight.dtype)
    gm = joint_graph(
        lambda w, p, x: torch.ops.memrewrite.port_attach(fn(w, x), [p]), [weight, port], [x]
    )
    add_vector(gm, v, 3)
    return gm


def test_printed_form() -> None:
    gm = ported(
        lambda w, x: F.linear(torch.tanh(x), w), torch.randn(6, 8), torch.randn(5, 8), torch.ones(4)
    )
    run(gm, passes(3))
    assert_expected_inline(
        show(gm),
        """\
tanh: [5, 8] = tanh.default(arg2_1)
velora_compress_default: [5, 2] = memrewrite.velora_compress.default(tanh, v_3)
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(tanh, t)
t_1: [6, 5] = t.default(arg3_1)
mm_default_1: [6, 2] = mm.default(t_1, velora_compress_default)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(arg3_1, t_3)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, None, mm_default_1, tanh_backward)""",
    )


def test_printed_form_of_a_transposed_weight() -> None:
    gm = ported(
        lambda w, x: torch.tanh(x) @ w,
        torch.randn(8, 6),
        torch.randn(5, 8),
        torch.ones(4),
        left=True,
    )
    run(gm, passes(3, left=True))
    assert_expected_inline(
        show(gm),
        """\
tanh: [5, 8] = tanh.default(arg2_1)
velora_compress_default: [5, 2] = memrewrite.velora_compress.default(tanh, v_3)
permute_default_1: [2, 5] = permute.default(velora_compress_default, [1, 0])
mm_default_1: [2, 6] = mm.default(permute_default_1, arg3_1)
mm: [5, 6] = mm.default(tanh, arg0_1)
t_1: [6, 8] = t.default(arg0_1)
mm_2: [5, 8] = mm.default(arg3_1, t_1)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, None, mm_default_1, tanh_backward)""",
    )


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    out=st.integers(1, 5),
    features=st.integers(4, 11),
    size=st.integers(2, 4),
    scale=st.sampled_from([1.0, 0.5]),
    left=st.booleans(),
)
def test_coordinates_times_v_are_the_gradient(
    seed: int, rows: int, out: int, features: int, size: int, scale: float, left: bool
) -> None:
    torch.manual_seed(seed)
    w, x = (torch.randn(n, features, dtype=torch.float64) for n in (out, rows))
    v = F.normalize(torch.randn(size, dtype=torch.float64), dim=0)
    if left:
        gm = ported(lambda w, x: torch.tanh(x) @ w, w.t().contiguous(), x, v, left)
    else:
        gm = ported(lambda w, x: F.linear(torch.tanh(x), w), w, x, v)
    run(gm, [*passes(3, scale, left), lower_ir_ops()])
    dy = torch.randn(rows, out, dtype=torch.float64)
    port = torch.zeros(out, -(-features // size), dtype=torch.float64)
    across: Callable[[Tensor], Tensor] = torch.t if left else lambda t: t
    y, dw, a, dx = execute(gm, across(w).contiguous(), across(port), x, dy, v)
    z = compress(torch.tanh(x), v)
    assert dw is None and a.is_contiguous()
    a = across(a)
    torch.testing.assert_close(a, scale * dy.t() @ z)
    torch.testing.assert_close(
        reconstruct(a, v, features), scale * dy.t() @ reconstruct(z, v, features)
    )
    torch.testing.assert_close(y, F.linear(torch.tanh(x), w))
    torch.testing.assert_close(dx, (dy @ w) * (1 - torch.tanh(x) ** 2))
    assert not gm.graph.find_nodes(op="call_function", target=port_attach)


def test_running_it_twice_is_running_it_once() -> None:
    gm = ported(
        lambda w, x: F.linear(torch.tanh(x), w), torch.randn(6, 8), torch.randn(5, 8), torch.ones(4)
    )
    run(gm, passes(3))
    once = show(gm)
    run(gm, [return_coordinates([Ported(0, 1)])])
    assert show(gm) == once


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: F.linear(torch.tanh(x), w) + F.linear(torch.sin(x), w),  # two terms
        lambda w, x: torch.tanh(x) @ w,  # W is (D, O), and its port (O, G)
        lambda w, x: F.linear(torch.tanh(x), w * 2),  # its gradient is scaled by a graph of its own
    ],
    ids=["tied", "transposed", "of a product"],
)
def test_other_gradients_stay_what_they_were(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    w, x, v = torch.randn(8, 8), torch.randn(5, 8), torch.ones(4) / 2
    gm = ported(fn, w, x, v)
    plain = joint_graph(fn, [w], [x])
    add_vector(plain, v, 2)
    run(gm, passes(3))
    run(plain, [compress_saved_inputs({0: 2}, frozenset({0})), fold_reconstruction()])
    dy = torch.randn(5, 8)
    y, dw, a, dx = execute(gm, w, torch.zeros(8, 2), x, dy, v)
    wanted: Any = execute(plain, w, x, dy, v)
    assert a is None
    for mine, theirs in zip((y, dw, dx), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_output_that_is_an_input_is_still_a_copy() -> None:
    gm = joint_graph(
        lambda w, p, x: torch.ops.memrewrite.port_attach(x, [p]),
        [torch.randn(8, 8), torch.zeros(8, 2)],
        [torch.randn(5, 8)],
    )
    add_vector(gm, torch.ones(4), 3)
    run(gm, passes(3))
    (y,) = list(gm.graph.output_node().args[0][:1])  # type: ignore[index,union-attr]
    assert y.target is torch.ops.aten.clone.default
