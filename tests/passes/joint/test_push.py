"""Projected gradients: printed form, meaning, near misses, order, idempotence."""

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
from torch import Tensor
from torch.fx import GraphModule

from memrewrite.compiler.pipeline import run
from passes import chunked_loss
from passes.base import Pass, StandsFor, stands_for
from passes.joint.push import Projected, push_projections, return_projections
from passes.lower import lower_ir_ops

LINEAR = "linear"
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of W (6, 8) and x (5, 8) or (5, 6)
    "linear": lambda w, x: F.linear(torch.tanh(x), w),
    "transposed": lambda w, x: torch.tanh(x) @ w,
    "used twice": lambda w, x: F.linear(torch.tanh(x), w) + F.linear(torch.sin(x), w),
    "scaled": lambda w, x: F.linear(torch.tanh(x), w * 0.5),
    "cast": lambda w, x: F.linear(torch.tanh(x).float(), w.float()).double(),
    "loss in chunks": lambda w, x: chunked_loss.op(
        torch.tanh(x), w, None, torch.arange(5), [0.5, 0.0], True, 2, 0.1, True, 2, True
    )[0],
    "no matmul": lambda w, x: (torch.tanh(w) * x[0, 0]).sum(1, keepdim=True) + x[:1, :1],
}


def project(g: Tensor, p: Tensor, left: bool) -> Tensor:  # equations 11 and 12 of the paper
    return p.t() @ g if left else g @ p


def orthonormal(rows: int, rank: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q
    return q


def passes(left: bool) -> list[Pass]:
    """W is argument 0, its port argument 1, its P argument 3."""
    return [return_projections([Projected(0, 1, 3, left)]), push_projections()]


def pushed(
    fn: Callable[[Tensor, Tensor], Tensor], w: Tensor, x: Tensor, p: Tensor, left: bool
) -> GraphModule:
    port = torch.zeros_like(project(w, p, left))
    gm = joint_graph(
        lambda w, port, x: torch.ops.memrewrite.port_attach(fn(w, x), [port]), [w, port], [x]
    )
    add_vector(gm, p, 3)
    return gm


def example(form: str, left: bool, rank: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    w = torch.randn(6, 8, dtype=torch.float64)
    x = torch.randn(5, 6 if form == "transposed" else 8, dtype=torch.float64)
    return w, x, orthonormal(6 if left else 8, rank)


def printed(left: bool) -> str:
    w, x, p = example(LINEAR, left)
    gm = pushed(FORMS[LINEAR], w, x, p, left)
    run(gm, passes(left))
    return show(gm)


def test_printed_form_from_the_left() -> None:
    assert_expected_inline(
        printed(True),
        """\
tanh: [5, 8] = tanh.default(arg2_1)
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(tanh, t)
t_1: [6, 5] = t.default(arg3_1)
galore_project_default_2: [2, 5] = memrewrite.galore_project.default(t_1, v_3, True)
mm_default: [2, 8] = mm.default(galore_project_default_2, tanh)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(arg3_1, t_3)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, None, mm_default, tanh_backward)""",
    )


def test_printed_form_from_the_right() -> None:
    assert_expected_inline(
        printed(False),
        """\
tanh: [5, 8] = tanh.default(arg2_1)
galore_project_default_2: [5, 2] = memrewrite.galore_project.default(tanh, v_3, False)
t: [8, 6] = t.default(arg0_1)
mm: [5, 6] = mm.default(tanh, t)
t_1: [6, 5] = t.default(arg3_1)
mm_default: [6, 2] = mm.default(t_1, galore_project_default_2)
t_3: [6, 8] = t.default(t)
mm_2: [5, 8] = mm.default(arg3_1, t_3)
tanh_backward: [5, 8] = tanh_backward.default(mm_2, tanh)
return (mm, None, mm_default, tanh_backward)""",
    )


@given(
    form=st.sampled_from(sorted(FORMS)),
    left=st.booleans(),
    rank=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_what_is_returned_is_the_projected_gradient(
    form: str, left: bool, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    w, x, p = example(form, left, rank)
    gm = pushed(FORMS[form], w, x, p, left)
    plain = joint_graph(FORMS[form], [w], [x])
    dy = torch.randn_like(FORMS[form](w, x))
    y, dw, dx = execute(plain, w, x, dy)
    run(gm, [*passes(left), lower_ir_ops()])
    mine: Any = execute(gm, w, torch.zeros_like(project(w, p, left)), x, dy, p)
    assert mine[1] is None
    exact = {"rtol": 1e-10, "atol": 1e-10} if form != "cast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(mine[2], project(dw, p, left), **exact)
    torch.testing.assert_close((mine[0], mine[3]), (y, dx))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("form", [f for f in FORMS if f != "no matmul"])
def test_no_full_gradient_is_formed(form: str, left: bool) -> None:
    w, x, p = example(form, left)
    gm = pushed(FORMS[form], w, x, p, left)
    run(gm, [*passes(left), lower_ir_ops()])
    made = [n for n in gm.graph.nodes if n.op == "call_function"]
    products = [n.meta["val"] for n in made if "mm" in str(n.target) or "getitem" in str(n.target)]
    assert products
    assert all(value.shape != w.shape for value in products)


@pytest.mark.parametrize("left", [True, False])
def test_a_projection_of_the_activation_is_marked(left: bool) -> None:
    w, x, p = example(LINEAR, left)
    gm = pushed(FORMS[LINEAR], w, x, p, left)
    run(gm, passes(left))
    marks = [mark for n in gm.graph.nodes if (mark := stands_for(n)) is not None]
    assert marks == ([] if left else [StandsFor("galore", "tanh", kept=True)])


def test_a_gradient_that_something_else_reads_is_projected_whole() -> None:
    w, x, p = example(LINEAR, True)
    gm = pushed(FORMS[LINEAR], w, x, p, True)
    output = gm.graph.output_node()
    returned: Any = list(output.args[0])  # type: ignore[arg-type]
    output.args = ((*returned, returned[1]),)
    output.meta["gradient_of"] = [*output.meta["gradient_of"], None]
    run(gm, passes(True))
    dy = torch.ones(5, 6, dtype=w.dtype)
    _, dw, r, _, again = execute(gm, w, torch.zeros(2, 8), x, dy, p)
    assert dw is None
    torch.testing.assert_close(r, p.t() @ again)


def test_twice_is_once() -> None:
    w, x, p = example(LINEAR, False)
    gm = pushed(FORMS[LINEAR], w, x, p, False)
    run(gm, passes(False))
    once = show(gm)
    run(gm, passes(False))
    assert show(gm) == once


def test_nothing_to_project() -> None:
    gm = joint_graph(FORMS[LINEAR], [torch.randn(6, 8)], [torch.randn(5, 8)])
    before = show(gm)
    run(gm, [return_projections([Projected(0, 1, 3, True)]), push_projections()])
    assert show(gm) == before
