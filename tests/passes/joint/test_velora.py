"""The three VeLoRA passes: printed form, meaning, idempotence, silence, order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import add_vector, execute, joint_graph, show
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import compress, reconstruct
from torch import Tensor
from torch.fx import GraphModule

from memrewrite.compiler.pipeline import run
from passes.base import Pass, fixed, stands_for
from passes.joint.fold import fold_reconstruction
from passes.joint.velora import compress_saved_inputs
from passes.lower import lower_ir_ops


def passes(*vectors: tuple[int, int], weights: int = 1, scale: float = 1.0) -> list[Pass]:
    compress = compress_saved_inputs(dict(vectors), frozenset(range(weights)), scale)
    return [compress, fold_reconstruction(), lower_ir_ops()]


def small() -> GraphModule:
    gm = joint_graph(
        lambda w, x: F.linear(torch.tanh(x), w), [torch.randn(6, 8)], [torch.randn(5, 8)]
    )
    add_vector(gm, torch.ones(4) / 2, 2)
    return gm


def test_printed_form_of_each_pass() -> None:
    gm = small()
    compress, fold, lower = passes((0, 2))
    run(gm, [compress])
    assert_expected_inline(
        show(gm),
        """\
tanh: [5, 8] = tanh.default(arg1_1)
velora_compress_default: [5, 2] = memrewrite.velora_compress.default(tanh, v_2)
velora_reconstruct_default: [5, 8] = memrewrite.velora_reconstruct.default(velora_compress_default, v_2, 8)
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(tanh, t)
t_1: [6, 5] = t.default(arg2_1)
mm_default: [6, 8] = mm.default(t_1, velora_reconstruct_default)
t_2: [8, 6] = t.default(mm_default)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(arg2_1, t_3)
t_4: [6, 8] = t.default(t_2)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, t_4, tanh_backward)""",  # noqa: E501
    )
    run(gm, [fold])
    assert_expected_inline(
        show(gm),
        """\
tanh: [5, 8] = tanh.default(arg1_1)
velora_compress_default: [5, 2] = memrewrite.velora_compress.default(tanh, v_2)
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(tanh, t)
t_1: [6, 5] = t.default(arg2_1)
mm_default_1: [6, 2] = mm.default(t_1, velora_compress_default)
velora_reconstruct_default_1: [6, 8] = memrewrite.velora_reconstruct.default(mm_default_1, v_2, 8)
t_2: [8, 6] = t.default(velora_reconstruct_default_1)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(arg2_1, t_3)
t_4: [6, 8] = t.default(t_2)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, t_4, tanh_backward)""",
    )
    run(gm, [lower])
    assert_expected_inline(
        show(gm),
        """\
tanh: [5, 8] = tanh.default(arg1_1)
view_default: [5, 2, 4] = view.default(tanh, [5, 2, 4])
mul_tensor: [5, 2, 4] = mul.Tensor(view_default, v_2)
sum_dim_int_list: [5, 2] = sum.dim_IntList(mul_tensor, [-1])
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(tanh, t)
t_1: [6, 5] = t.default(arg2_1)
mm_default_1: [6, 2] = mm.default(t_1, sum_dim_int_list)
unsqueeze_default: [6, 2, 1] = unsqueeze.default(mm_default_1, -1)
mul_tensor_1: [6, 2, 4] = mul.Tensor(unsqueeze_default, v_2)
view_default_1: [6, 8] = view.default(mul_tensor_1, [6, 8])
t_2: [8, 6] = t.default(view_default_1)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(arg2_1, t_3)
t_4: [6, 8] = t.default(t_2)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, t_4, tanh_backward)""",
    )


def test_x_hat_never_exists_after_the_fold() -> None:
    gm = small()
    run(gm, passes((0, 2))[:2])
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if "velora" in str(n.target)]
    assert shapes == [(5, 2), (6, 8)]  # z and dW; no (N, D) reconstruction


HALF = settings(max_examples=settings().max_examples // 2)  # of the profile's


@st.composite
def linears(draw: st.DrawFn) -> dict[str, Any]:
    """A linear in one of its forms, with its input, its v and a scale."""
    lead = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return {
        "lead": lead,
        "features": draw(st.integers(1, 12)),
        "outputs": draw(st.integers(1, 7)),
        "size": draw(st.integers(2, 7)),
        "transposed": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "half": draw(st.booleans()),
        "dynamic": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.1, -2.0])),
        "seed": draw(st.integers(0, 99)),
    }


def build(case: dict[str, Any]) -> tuple[GraphModule, list[Tensor], Tensor, Tensor]:
    """The joint graph, its arguments, what the linear reads as (N, D), and v."""
    torch.manual_seed(case["seed"])
    d, o, lead = case["features"], case["outputs"], case["lead"]
    weight = torch.randn((d, o) if case["transposed"] else (o, d)).double()
    bias, x = torch.randn(o).double(), torch.randn(*lead, d).double()

    def fn(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        h, w = torch.sin(x), w.t() if case["transposed"] else w
        if case["half"]:  # the casts that autocast inserts, in a precision that stays exact
            h, w = h.float().double(), w.double()
        return F.linear(h, w, b) if case["bias"] else F.linear(h, w)

    v = torch.randn(case["size"]).double()
    v /= v.norm()
    dynamic = case["dynamic"] and min(lead) > 1  # sizes 0 and 1 are never dynamic
    gm = joint_graph(fn, [weight, bias], [x], dynamic=dynamic)
    add_vector(gm, v, 3)
    rows = torch.sin(x).float().double() if case["half"] else torch.sin(x)
    return gm, [weight, bias, x, torch.randn(*lead, o).double(), v], rows.reshape(-1, d), v


@given(linears())
def test_the_gradient_is_the_papers_and_everything_else_is_untouched(case: dict[str, Any]) -> None:
    gm, args, rows, v = build(case)
    exact = execute(gm, *args)
    run(gm, passes((0, 3), weights=2, scale=case["scale"]))
    assert not any("memrewrite" in str(n.target) for n in gm.graph.nodes)
    result = execute(gm, *args)
    x_hat = reconstruct(compress(rows, v), v, case["features"])
    dw = case["scale"] * args[3].reshape(-1, case["outputs"]).t() @ x_hat
    torch.testing.assert_close(
        result[1], dw.t() if case["transposed"] else dw, rtol=1e-10, atol=1e-12
    )
    for ours, theirs in zip(result[:1] + result[2:], exact[:1] + exact[2:], strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@HALF
@given(linears())
def test_fold_and_lower_are_exact(case: dict[str, Any]) -> None:
    gm, args, _, _ = build(case)
    compress, fold, lower = passes((0, 3), weights=2, scale=case["scale"])
    run(gm, [compress])
    before = execute(gm, *args)
    for one in (fold, lower):
        assert one.exact
        run(gm, [one])
        for ours, theirs in zip(execute(gm, *args), before, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@HALF
@given(linears())
def test_exact_where_every_subtoken_is_parallel_to_v(case: dict[str, Any]) -> None:
    case = {**case, "features": case["size"] * 2, "half": False, "scale": 1.0}
    gm, args, _, v = build(case)
    groups = torch.rand(*case["lead"], 2, 1).double() * 0.9
    args[2] = torch.asin((groups * v).flatten(-2))  # sin(x) = groups (x) v
    exact = execute(gm, *args)
    run(gm, passes((0, 3), weights=2))
    torch.testing.assert_close(execute(gm, *args)[1], exact[1], rtol=1e-9, atol=1e-12)


@HALF
@given(linears())
def test_running_a_pass_twice_is_running_it_once(case: dict[str, Any]) -> None:
    gm, _, _, _ = build(case)
    for one in passes((0, 3), weights=2):
        run(gm, [one])
        once = show(gm)
        run(gm, [one])
        assert show(gm) == once
    run(gm, passes((0, 3), weights=2))
    assert show(gm) == once


@HALF
@given(linears())
def test_dynamic_sizes_stay_dynamic(case: dict[str, Any]) -> None:
    case = {**case, "dynamic": True, "lead": [max(n, 2) for n in case["lead"]]}
    gm, _, _, _ = build(case)
    x = gm.graph.find_nodes(op="placeholder")[2].meta["val"]
    shape_env = x.fake_mode.shape_env
    guards = len(shape_env.guards)
    run(gm, passes((0, 3), weights=2))
    assert len(shape_env.guards) == guards  # a new guard would be a new recompile
    sums = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    (z,) = [n for n in sums if stands_for(n)]
    known = [fixed(length) for length in x.shape[:-1]]  # tracing itself fixes some
    assert (fixed(z.meta["val"].shape[0]) is None) == (None in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    weight, x = torch.randn(6, 20).to(dtype), torch.randn(9, 20).to(dtype)
    gm = joint_graph(lambda w, x: F.linear(torch.tanh(x), w), [weight], [x])
    v = torch.nn.functional.normalize(torch.randn(8), dim=0)
    add_vector(gm, v, 2)
    dy = torch.randn(9, 6).to(dtype)
    run(gm, passes((0, 2)))
    z = compress(torch.tanh(x).float(), v).to(dtype)
    small = dy.t() @ z  # rounded as the exact matmul would be
    result = execute(gm, weight, x, dy, v)
    assert result[1].dtype == dtype
    torch.testing.assert_close(result[1], reconstruct(small.float(), v, 20).to(dtype))


def test_one_z_for_q_k_and_v() -> None:
    def qkv(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return F.linear(h, q) * F.linear(h, k) * F.linear(h, v)

    weights = [torch.randn(6, 8).double() for _ in range(3)]
    x, v = torch.randn(2, 5, 8).double(), torch.ones(4).double() / 2
    gm = joint_graph(qkv, weights, [x])
    for position in (4, 5, 6):
        add_vector(gm, v * (position == 4), position)  # only the leader's v is read
    run(gm, passes((0, 4), (1, 5), (2, 6), weights=3)[:1])
    zs = [n for n in gm.graph.nodes if stands_for(n)]
    assert len(zs) == 1
    dy = torch.randn(2, 5, 6).double()
    result = execute(gm, *weights, x, dy, v, 0 * v, 0 * v)
    x_hat = reconstruct(compress(torch.tanh(x), v), v, 8)
    outputs = [F.linear(torch.tanh(x), w) for w in weights]
    for i in range(3):
        others = torch.stack([o for j, o in enumerate(outputs) if j != i]).prod(0)
        expected = torch.einsum("bno,bnd->od", dy * others, x_hat)
        torch.testing.assert_close(result[1 + i], expected, rtol=1e-10, atol=1e-12)


def test_silence_where_nothing_is_selected() -> None:
    gm = small()
    before = show(gm)
    run(gm, [compress_saved_inputs({}, frozenset({0})), fold_reconstruction(), lower_ir_ops()])
    assert show(gm) == before


def test_equal_configuration_makes_equal_passes() -> None:
    a, b = passes((0, 2))[0], passes((0, 2))[0]
    assert a == b and hash(a) == hash(b)
    assert a != passes((0, 2), scale=2.0)[0] and not a.exact
