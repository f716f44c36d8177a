"""Factored Adam: printed form, meaning against torch's own, idempotence, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import show
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from memrewrite.compiler.pipeline import run
from memrewrite.moments.optimizers import ADAMW, Flags
from memrewrite.moments.projected import ProjectedKind
from memrewrite.moments.update import capture
from passes.lower import lower_ir_ops
from passes.update.adam import hyperparameters_as_inputs, lower_fused_adam
from passes.update.factor import SQUARE, V, factor_updates

LR, BETAS = 1e-2, (0.9, 0.99)


def captured(
    shape: tuple[int, int], size: int, *, amsgrad: bool = False, maximize: bool = False,
    decay: bool = True, decoupled: bool = True,
) -> tuple[GraphModule, dict[int, str], int]:  # fmt: skip
    """The lowered update, what is held factored, and the argument of v."""
    flags = (amsgrad, maximize, decay, decoupled)
    kind = ProjectedKind(shape, torch.float64, torch.device("cpu"), 1, False, 1.0, *flags)
    gm = capture(kind)
    run(gm, [hyperparameters_as_inputs(), lower_fused_adam()])
    places = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(places[-1]):
        node = gm.graph.placeholder("vector")
    with places[0].meta["val"].fake_mode:
        node.meta["val"] = torch.empty(size, dtype=torch.float64)
    node.meta["argument"] = len(places)
    return gm, {1: V, 2: V, 3: SQUARE, **({4: SQUARE} if amsgrad else {})}, len(places)


def test_printed_form() -> None:
    gm, held, v = captured((3, 6), 4)
    run(gm, [factor_updates(0, v, held)])
    assert_expected_inline(
        show(gm),
        """\
_foreach_add_:  = _foreach_add_.Scalar([step_1], 1)
_to_copy_default: [] = _to_copy.default(step_1, dtype=torch.float64)
pow_tensor_tensor: [] = pow.Tensor_Tensor(beta1, _to_copy_default)
rsub_scalar: [] = rsub.Scalar(pow_tensor_tensor, 1)
pow_tensor_tensor_1: [] = pow.Tensor_Tensor(beta2, _to_copy_default)
rsub_scalar_1: [] = rsub.Scalar(pow_tensor_tensor_1, 1)
sqrt_default: [] = sqrt.default(rsub_scalar_1)
div_tensor: [] = div.Tensor(lr, rsub_scalar)
mul_tensor: [] = mul.Tensor(lr, weight_decay)
rsub_scalar_2: [] = rsub.Scalar(mul_tensor, 1)
mul_tensor_1: [3, 6] = mul.Tensor(weight_1, rsub_scalar_2)
mul_tensor_2: [3, 2] = mul.Tensor(m_1, beta1)
rsub_scalar_3: [] = rsub.Scalar(beta1, 1)
mul_tensor_3: [3, 2] = mul.Tensor(grad_1, rsub_scalar_3)
add_tensor: [3, 2] = add.Tensor(mul_tensor_2, mul_tensor_3)
mul_tensor_4: [3, 2] = mul.Tensor(grad_1, grad_1)
mul_tensor_5: [3, 2] = mul.Tensor(v_1, beta2)
rsub_scalar_4: [] = rsub.Scalar(beta2, 1)
mul_tensor_6: [3, 2] = mul.Tensor(mul_tensor_4, rsub_scalar_4)
add_tensor_1: [3, 2] = add.Tensor(mul_tensor_5, mul_tensor_6)
sqrt_default_1: [3, 2] = sqrt.default(add_tensor_1)
div_tensor_1: [3, 2] = div.Tensor(sqrt_default_1, sqrt_default)
mul_tensor_7: [3, 2] = mul.Tensor(add_tensor, div_tensor)
abs_default: [4] = abs.default(vector)
velora_reconstruct_default: [3, 6] = memrewrite.velora_reconstruct.default(div_tensor_1, abs_default, 6)
add_tensor_2: [3, 6] = add.Tensor(velora_reconstruct_default, eps)
velora_reconstruct_default_1: [3, 6] = memrewrite.velora_reconstruct.default(mul_tensor_7, vector, 6)
div_tensor_2: [3, 6] = div.Tensor(velora_reconstruct_default_1, add_tensor_2)
sub_tensor: [3, 6] = sub.Tensor(mul_tensor_1, div_tensor_2)
copy__default: [3, 2] = copy_.default(m_1, add_tensor)
copy__default_1: [3, 2] = copy_.default(v_1, add_tensor_1)
copy__default_2: [3, 6] = copy_.default(weight_1, sub_tensor)
return ()""",  # noqa: E501
    )


def spread(a: Tensor, v: Tensor, features: int) -> Tensor:
    return (a[..., None] * v).flatten(-2)[..., :features]


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    features=st.integers(2, 13),
    size=st.integers(2, 5),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    decay=st.sampled_from([0.0, 0.1]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    zero=st.booleans(),
    left=st.booleans(),
)
@example(0, 3, 7, 4, 1e-8, 0.1, True, False, True, False)  # padding, decay, maximum, a zero
@example(0, 3, 7, 4, 1e-8, 0.1, True, False, True, True)
@example(1, 2, 8, 4, 1e-3, 0.1, False, False, False, False)
def test_the_trajectory_is_adams(
    seed: int, rows: int, features: int, size: int, eps: float, decay: float, amsgrad: bool,
    maximize: bool, zero: bool, left: bool,
) -> None:  # fmt: skip
    if features < size:
        features += size
    torch.manual_seed(seed)
    v = torch.randn(size, dtype=torch.float64)
    if zero and eps:  # at eps = 0 torch's own Adam divides zero by zero there
        v[0] = 0
    v /= v.norm()
    across: Any = (lambda t: t.t().contiguous()) if left else lambda t: t
    start = across(torch.randn(rows, features, dtype=torch.float64))
    groups = -(-features // size)
    full = torch.nn.Parameter(start.clone())
    stock = torch.optim.AdamW(
        [full], lr=LR, betas=BETAS, eps=eps, weight_decay=decay, amsgrad=amsgrad, maximize=maximize
    )
    gm, held, at = captured(
        tuple(start.shape), size, amsgrad=amsgrad, maximize=maximize, decay=decay != 0
    )
    run(gm, [factor_updates(0, at, held, left), lower_ir_ops()])
    weight, step = start.clone(), torch.zeros((), dtype=torch.float64)
    state = [across(torch.zeros(rows, groups, dtype=torch.float64)) for _ in held][1:]
    group = {"lr": LR, "betas": BETAS, "eps": eps, "weight_decay": decay}
    for _ in range(100):
        a = across(torch.randn(rows, groups, dtype=torch.float64))
        full.grad = across(spread(across(a), v, features))
        stock.step()
        gm(weight, a, *state, step, *ADAMW.numbers(group, Flags(decays=decay != 0)), v)
    torch.testing.assert_close(weight, full.detach(), rtol=1e-10, atol=1e-10)
    theirs = stock.state[full]
    mine = [
        across(spread(across(s), w, features)) for s, w in zip(state[:2], (v, v * v), strict=True)
    ]
    torch.testing.assert_close(mine[0], theirs["exp_avg"])
    torch.testing.assert_close(mine[1], theirs["exp_avg_sq"])


def test_running_it_twice_is_running_it_once() -> None:
    gm, held, v = captured((3, 6), 4, amsgrad=True)
    run(gm, [factor_updates(0, v, held)])
    once = show(gm)
    run(gm, [factor_updates(0, v, held)])
    assert show(gm) == once


def test_no_value_of_full_size_but_the_step_itself() -> None:
    gm, held, v = captured((3, 8), 4, amsgrad=True)
    run(gm, [factor_updates(0, v, held)])
    values: list[Any] = [n.meta["val"] for n in gm.graph.nodes if n.op == "call_function"]
    full = [n for n in values if n is not None and tuple(n.shape) == (3, 8)]
    # m (x) v, sqrt(s) (x) |v|, + eps, the quotient; W decayed, minus it, stored
    assert len(full) == 7


def test_an_l2_decay_is_refused() -> None:
    gm, held, v = captured((3, 8), 4, decoupled=False)
    with pytest.raises(Exception, match="L2 decay"):
        run(gm, [factor_updates(0, v, held)])
