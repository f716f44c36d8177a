"""The update's passes: printed form, meaning, idempotence, silence on near misses, order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import galore_oracle
import pytest
import torch
from expecttest import assert_expected_inline
from graphs import show
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.optim.adam import adam

from memrewrite.compiler.backend import Engine
from memrewrite.compiler.pipeline import run
from memrewrite.gradients import range_finder
from memrewrite.moments.projected import ProjectedKind
from memrewrite.moments.update import add_input, build, capture, trace
from passes.base import copy_graph
from passes.lower import lower_ir_ops
from passes.update.accumulate import accumulate_in_place
from passes.update.adam import hyperparameters_as_inputs, lower_fused_adam
from passes.update.galore import Projection, project_updates
from passes.update.pieces import cut

EAGER = Engine("aot_eager", None, None, None)
KIND = ProjectedKind(
    (6, 4), torch.float64, torch.device("cpu"), 2, False, 0.25, False, False, True, True
)  # fmt: skip


def captured(kind: ProjectedKind = KIND) -> tuple[GraphModule, int]:
    gm = capture(kind)
    return gm, add_input(gm, "projector", (kind.side, kind.rank))


def test_printed_form_of_each_pass() -> None:
    gm, p = captured()
    assert_expected_inline(
        show(gm),
        """\
_foreach_add_:  = _foreach_add_.Scalar([step_1], 1)
_fused_adamw_:  = _fused_adamw_.default([weight_1], [grad_1], [m_1], [v_1], [], [step_1], lr=0.001, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-08, amsgrad=False, maximize=False)
return ()""",  # noqa: E501
    )
    run(gm, [hyperparameters_as_inputs()])
    assert_expected_inline(
        show(gm),
        """\
_foreach_add_:  = _foreach_add_.Scalar([step_1], 1)
_fused_adamw_:  = _fused_adamw_.default([weight_1], [grad_1], [m_1], [v_1], [], [step_1], lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
return ()""",  # noqa: E501
    )
    run(gm, [project_updates({0: Projection(p, left=False, scale=0.25)})])
    assert_expected_inline(
        show(gm),
        """\
_foreach_add_:  = _foreach_add_.Scalar([step_1], 1)
galore_project_default: [6, 2] = memrewrite.galore_project.default(grad_1, projector, False)
zeros_like_default: [6, 2] = zeros_like.default(galore_project_default)
_fused_adamw__default:  = _fused_adamw_.default([zeros_like_default], [galore_project_default], [m_1], [v_1], [], [step_1], lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False)
galore_project_back_default: [6, 4] = memrewrite.galore_project_back.default(zeros_like_default, projector, False)
mul_tensor: [] = mul.Tensor(lr, weight_decay)
rsub_scalar: [] = rsub.Scalar(mul_tensor, 1)
mul_tensor_1: [6, 4] = mul.Tensor(weight_1, rsub_scalar)
add_tensor: [6, 4] = add.Tensor(mul_tensor_1, galore_project_back_default, alpha=0.25)
copy__default: [6, 4] = copy_.default(weight_1, add_tensor)
return ()""",  # noqa: E501
    )
    run(gm, [lower_fused_adam(), lower_ir_ops()])
    assert_expected_inline(
        show(gm),
        """\
_foreach_add_:  = _foreach_add_.Scalar([step_1], 1)
mm_default: [6, 2] = mm.default(grad_1, projector)
zeros_like_default: [6, 2] = zeros_like.default(mm_default)
_to_copy_default: [] = _to_copy.default(step_1, dtype=torch.float64)
pow_tensor_tensor: [] = pow.Tensor_Tensor(beta1, _to_copy_default)
rsub_scalar_1: [] = rsub.Scalar(pow_tensor_tensor, 1)
pow_tensor_tensor_1: [] = pow.Tensor_Tensor(beta2, _to_copy_default)
rsub_scalar_2: [] = rsub.Scalar(pow_tensor_tensor_1, 1)
sqrt_default: [] = sqrt.default(rsub_scalar_2)
div_tensor: [] = div.Tensor(lr, rsub_scalar_1)
mul_tensor_2: [6, 2] = mul.Tensor(m_1, beta1)
rsub_scalar_3: [] = rsub.Scalar(beta1, 1)
mul_tensor_3: [6, 2] = mul.Tensor(mm_default, rsub_scalar_3)
add_tensor_1: [6, 2] = add.Tensor(mul_tensor_2, mul_tensor_3)
mul_tensor_4: [6, 2] = mul.Tensor(mm_default, mm_default)
mul_tensor_5: [6, 2] = mul.Tensor(v_1, beta2)
rsub_scalar_4: [] = rsub.Scalar(beta2, 1)
mul_tensor_6: [6, 2] = mul.Tensor(mul_tensor_4, rsub_scalar_4)
add_tensor_2: [6, 2] = add.Tensor(mul_tensor_5, mul_tensor_6)
sqrt_default_1: [6, 2] = sqrt.default(add_tensor_2)
div_tensor_1: [6, 2] = div.Tensor(sqrt_default_1, sqrt_default)
mul_tensor_7: [6, 2] = mul.Tensor(add_tensor_1, div_tensor)
add_tensor_3: [6, 2] = add.Tensor(div_tensor_1, eps)
div_tensor_2: [6, 2] = div.Tensor(mul_tensor_7, add_tensor_3)
sub_tensor: [6, 2] = sub.Tensor(zeros_like_default, div_tensor_2)
copy__default_1: [6, 2] = copy_.default(m_1, add_tensor_1)
copy__default_2: [6, 2] = copy_.default(v_1, add_tensor_2)
copy__default_3: [6, 2] = copy_.default(zeros_like_default, sub_tensor)
permute_default: [2, 4] = permute.default(projector, [1, 0])
mm_default_1: [6, 4] = mm.default(zeros_like_default, permute_default)
mul_tensor: [] = mul.Tensor(lr, weight_decay)
rsub_scalar: [] = rsub.Scalar(mul_tensor, 1)
mul_tensor_1: [6, 4] = mul.Tensor(weight_1, rsub_scalar)
add_tensor: [6, 4] = add.Tensor(mul_tensor_1, mm_default_1, alpha=0.25)
copy__default: [6, 4] = copy_.default(weight_1, add_tensor)
return ()""",
    )
    run(gm, [accumulate_in_place()])
    pieces = cut(gm, torch.float64)
    assert_expected_inline(
        show(pieces.body),
        """\
mm_default: [6, 2] = mm.default(grad_1, projector)
zeros_like_default: [6, 2] = zeros_like.default(mm_default)
mul_tensor_2: [6, 2] = mul.Tensor(m_1, beta1)
mul_tensor_3: [6, 2] = mul.Tensor(mm_default, rsub_scalar_3)
add_tensor_1: [6, 2] = add.Tensor(mul_tensor_2, mul_tensor_3)
mul_tensor_4: [6, 2] = mul.Tensor(mm_default, mm_default)
mul_tensor_5: [6, 2] = mul.Tensor(v_1, beta2)
mul_tensor_6: [6, 2] = mul.Tensor(mul_tensor_4, rsub_scalar_4)
add_tensor_2: [6, 2] = add.Tensor(mul_tensor_5, mul_tensor_6)
sqrt_default_1: [6, 2] = sqrt.default(add_tensor_2)
div_tensor_1: [6, 2] = div.Tensor(sqrt_default_1, sqrt_default)
mul_tensor_7: [6, 2] = mul.Tensor(add_tensor_1, div_tensor)
add_tensor_3: [6, 2] = add.Tensor(div_tensor_1, eps)
div_tensor_2: [6, 2] = div.Tensor(mul_tensor_7, add_tensor_3)
sub_tensor: [6, 2] = sub.Tensor(zeros_like_default, div_tensor_2)
copy__default_1: [6, 2] = copy_.default(m_1, add_tensor_1)
copy__default_2: [6, 2] = copy_.default(v_1, add_tensor_2)
copy__default_3: [6, 2] = copy_.default(zeros_like_default, sub_tensor)
return (zeros_like_default,)""",
    )
    assert_expected_inline(
        show(pieces.writes),
        """\
permute_default: [2, 4] = permute.default(projector, [1, 0])
addmm__default: [6, 4] = addmm_.default(weight_1, zeros_like_default, permute_default, beta=_local_scalar_dense_default, alpha=0.25)
return ()""",  # noqa: E501
    )
    assert not [n for n in pieces.scalars.graph.nodes if "mm" in str(n.target)]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    rows, columns = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    return {
        "shape": (rows, columns),
        "rank": min(draw(st.integers(1, 12)), rows, columns),
        "left": draw(st.booleans()),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "decay": draw(st.sampled_from([0.0, 0.1])),
        "decoupled": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.25])),
        "lr": draw(st.sampled_from([0.1, 1e-3])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.5, 0.9)])),
        "seed": draw(st.integers(0, 1000)),
    }


@given(cases())
def test_sixty_steps_with_three_refreshes_equal_the_paper(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])

    def normal() -> Tensor:
        return torch.randn(case["shape"], generator=generator, dtype=torch.float64)

    w, grads = normal(), [normal() for _ in range(60)]
    rank, left, every = case["rank"], case["left"], 20
    settings = {k: case[k] for k in ("lr", "betas", "decay", "decoupled", "amsgrad", "maximize")}
    expected = galore_oracle.train(w, grads, rank, left, every, case["scale"], eps=1e-8, **settings)
    kind = ProjectedKind(
        case["shape"], w.dtype, w.device, rank, left, case["scale"], case["amsgrad"],
        case["maximize"], case["decay"] != 0, case["decoupled"],
    )  # fmt: skip
    got = trained(kind, w.clone(), grads, every, case)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(got, w)


def trained(
    kind: ProjectedKind, w: Tensor, grads: list[Tensor], every: int, case: dict[str, Any]
) -> Tensor:
    update = build(kind, EAGER)
    state = [torch.zeros(kind.state_shape, dtype=w.dtype) for _ in range(3 if kind.amsgrad else 2)]
    numbers = [case["lr"], *case["betas"], *([case["decay"]] if kind.decays else []), 1e-8]
    hyper = [torch.tensor(n, dtype=torch.float64) for n in numbers]
    p, step = None, torch.zeros(())
    for t, g in enumerate(grads):
        if t % every == 0:
            new = range_finder.refresh(g, p, kind.rank, kind.left, "svd", t)
            assert isinstance(new, range_finder.Refreshed)
            p = new.projector
        assert p is not None
        update.apply([w, g, *state, p], update.numbers(step, hyper))
    assert float(step) == len(grads)
    return w


def test_at_full_rank_and_scale_one_sgd_like_coordinates_are_adam_rotated() -> None:
    """P square orthogonal: the step is P Adam(P^T g), so Adam itself where P is a permutation."""
    kind = replace(KIND, shape=(4, 4), rank=4, scale=1.0, decays=False)
    w, g = torch.randn(2, 4, 4, dtype=torch.float64)
    stock = torch.nn.Parameter(w.clone())
    stock.grad = g.clone()
    optimizer = torch.optim.AdamW([stock], lr=0.1, weight_decay=0.0)
    state = [torch.zeros(4, 4, dtype=torch.float64) for _ in range(2)]
    p, step = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]], torch.zeros(())
    hyper = [torch.tensor(n, dtype=torch.float64) for n in (0.1, 0.9, 0.999, 1e-8)]
    update = build(kind, EAGER)
    for _ in range(5):
        optimizer.step()
        update.apply([w, g, *state, p], update.numbers(step, hyper))
    torch.testing.assert_close(w, stock.detach(), rtol=1e-12, atol=1e-12)


def two_parameters() -> GraphModule:
    """One fused node over a (6, 4) and a (3, 5) parameter, as a foreach optimizer has it."""

    def update(*tensors: Tensor) -> tuple[()]:
        columns = [list(tensors[i::5]) for i in range(5)]
        adam(
            *columns[:4], [], columns[4], fused=True, amsgrad=False, beta1=0.9, beta2=0.999,
            lr=1e-3, weight_decay=0.01, eps=1e-8, maximize=False, decoupled_weight_decay=True,
        )  # fmt: skip
        return ()

    shapes = [(6, 4)] * 4 + [()], [(3, 5)] * 4 + [()]
    examples = [torch.empty(s, device="meta") for pair in zip(*shapes, strict=True) for s in pair]
    return trace(reorder(update), examples)


def reorder(update: Any) -> Any:
    return lambda *tensors: update(*tensors[::2], *tensors[1::2])


def test_untouched_parameters_keep_the_fused_node() -> None:
    gm = two_parameters()
    p = add_input(
        gm,
        "projector",
        (KIND.side, KIND.rank),
    )
    run(gm, [project_updates({0: Projection(p, left=False, scale=1.0)})])
    fused = gm.graph.find_nodes(op="call_function", target=torch.ops.aten._fused_adamw_.default)
    shapes = [[tuple(n.meta["val"].shape) for n in node.args[0]] for node in fused]
    assert sorted(shapes) == [[(3, 5)], [(6, 2)]]
    stock = next(n for n in fused if n.args[0][0].op == "placeholder")
    assert stock.kwargs["weight_decay"] == 0.01


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_graph_states_shrink_and_no_other_argument(amsgrad: bool) -> None:
    kind = replace(KIND, amsgrad=amsgrad)
    gm, p = captured(kind)
    run(gm, [project_updates({0: Projection(p, left=False, scale=1.0)})])
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.find_nodes(op="placeholder")]
    assert shapes == [(6, 4), (6, 4), *[(6, 2)] * (3 if amsgrad else 2), (), (4, 2)]


def test_passes_twice_are_passes_once() -> None:
    gm, p = captured()
    both = [hyperparameters_as_inputs(), project_updates({0: Projection(p, False, 1.0)})]
    for one in (*both, lower_fused_adam(), lower_ir_ops()):
        run(gm, [one])
        if one.name == "project_updates":
            continue  # finds the node over Z, which no argument is
        before = show(gm)
        run(gm, [one])
        assert show(gm) == before, one.name


def test_projecting_twice_projects_once() -> None:
    gm, p = captured()
    one = project_updates({0: Projection(p, False, 1.0)})
    run(gm, [one])
    before = show(gm)
    run(gm, [one])
    assert show(gm) == before


@pytest.mark.parametrize("missed", [1, 2, 4])
def test_nothing_happens_to_an_argument_that_is_no_parameter(missed: int) -> None:
    gm, p = captured()
    before = show(gm)
    run(gm, [project_updates({missed: Projection(p, False, 1.0)})])
    assert show(gm) == before


def test_a_graph_without_a_fused_node_is_left_alone() -> None:
    gm = trace(lambda a: (a + 1,), [torch.empty(3, device="meta")])
    before = show(gm)
    run(gm, [hyperparameters_as_inputs(), project_updates({0: Projection(0, True, 1.0)})])
    run(gm, [lower_fused_adam(), lower_ir_ops()])
    assert show(gm) == before


def test_a_failing_pass_leaves_the_graph_as_it_was() -> None:
    gm, _ = captured()
    before = show(gm)
    with pytest.raises(KeyError):
        run(gm, [hyperparameters_as_inputs(), project_updates({0: Projection(99, True, 1.0)})])
    assert show(gm) == before


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_lowered_alone_the_fused_node_is_torchs_adam(
    decoupled: bool, decays: bool, amsgrad: bool, maximize: bool
) -> None:
    """Without the projection, the exact passes must give torch's own trajectory."""
    kind = replace(KIND, decoupled=decoupled, decays=decays, amsgrad=amsgrad, maximize=maximize)
    gm = capture(kind)
    run(gm, [hyperparameters_as_inputs(), lower_fused_adam()])
    pieces = cut(gm, torch.float64)
    w = torch.randn(6, 4, dtype=torch.float64)
    stock = torch.nn.Parameter(w.clone())
    decay = 0.3 if decays else 0.0
    optimizer = torch.optim.Adam(
        [stock], 0.05, (0.8, 0.95), 1e-6, decay, amsgrad,
        maximize=maximize, decoupled_weight_decay=decoupled,
    )  # fmt: skip
    state = [torch.zeros_like(w) for _ in range(3 if amsgrad else 2)]
    numbers = [0.05, 0.8, 0.95, *([decay] if decays else []), 1e-6]
    hyper, step = [torch.tensor(n, dtype=torch.float64) for n in numbers], torch.zeros(())
    for _ in range(10):
        stock.grad = torch.randn_like(w)
        optimizer.step()
        numbers = pieces.scalars(step, *hyper)
        pieces.body(w, stock.grad, *state, *(numbers[i] for i in pieces.body_reads))
    torch.testing.assert_close(w, stock.detach(), rtol=1e-12, atol=1e-12)


def test_no_full_size_state_is_allocated_while_capturing() -> None:
    kind = replace(KIND, shape=(1 << 20, 1 << 20), dtype=torch.float32)  # 4 TiB each
    gm = capture(kind)
    assert tuple(gm.graph.find_nodes(op="placeholder")[2].meta["val"].shape) == kind.shape


def test_configuration_makes_equal_passes() -> None:
    one, other = Projection(5, True, 0.5), Projection(5, False, 0.5)
    assert project_updates({0: one}) == project_updates({0: one})
    assert project_updates({0: one}) != project_updates({0: other})


def test_a_copied_graph_is_the_same_one_with_nodes_of_its_own() -> None:
    gm, _ = captured()
    copied = copy_graph(gm.graph)
    assert str(copied) == str(gm.graph) and not {*copied.nodes} & {*gm.graph.nodes}
    for old, new in zip(gm.graph.nodes, copied.nodes, strict=True):
        assert (old.name, old.meta) == (new.name, new.meta) and old.meta is not new.meta


def writes(kind: ProjectedKind) -> list[str]:
    gm, p = captured(kind)
    projection = Projection(p, kind.left, kind.scale)
    run(gm, [hyperparameters_as_inputs(), project_updates({0: projection})])
    run(gm, [lower_fused_adam(), lower_ir_ops(), accumulate_in_place()])
    before = show(gm)
    run(gm, [accumulate_in_place()])
    assert show(gm) == before
    return [str(n.target) for n in gm.graph.nodes if "addmm_" in str(n.target)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("decays", [True, False])
def test_matrices_are_accumulated_into(dtype: torch.dtype, left: bool, decays: bool) -> None:
    assert writes(replace(KIND, dtype=dtype, left=left, decays=decays)) == ["aten.addmm_.default"]


def test_weights_of_more_dimensions_are_not() -> None:
    assert writes(replace(KIND, shape=(6, 4, 3))) == []


def accumulated(update: Any, *shapes: tuple[int, ...]) -> bool:
    gm = trace(lambda *t: (update(*t),), [torch.empty(s, device="meta") for s in shapes])
    run(gm, [accumulate_in_place()])
    return any("addmm_" in str(n.target) for n in gm.graph.nodes)


def test_only_a_write_of_w_plus_a_matmul_into_w_itself_is_accumulated() -> None:
    square = [(3, 3)] * 3
    assert accumulated(lambda w, a, b: w.copy_(w + a @ b), *square)
    assert not accumulated(lambda w, a, b: w.copy_(a + a @ b), *square)  # another W
    assert not accumulated(lambda w, a, b: w.copy_(w + a * b), *square)  # no matmul
    assert not accumulated(lambda w, a, b: w.copy_(w - a @ b), *square)  # no sum
    assert not accumulated(lambda w, a, b: w.copy_(w.t() + a @ b), *square)  # not W as it is
    assert not accumulated(lambda w, a, b: w + a @ b, *square)  # no write


@given(st.sampled_from([1.0, 0.5]), st.booleans(), st.integers(1, 5), st.integers(1, 5))
def test_accumulating_writes_what_was_written(
    scale: float, decays: bool, rows: int, inner: int
) -> None:
    def update(w: Tensor, a: Tensor, b: Tensor) -> Any:
        return (w.copy_(torch.add(w * 0.5 if decays else w, a @ b, alpha=scale)),)

    tensors = [torch.randn(s, dtype=torch.float64) for s in ((rows, 4), (rows, inner), (inner, 4))]
    gm = trace(update, tensors)
    run(gm, [accumulate_in_place()])
    ours, theirs = tensors[0].clone(), tensors[0].clone()
    gm(ours, *tensors[1:])
    update(theirs, *tensors[1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert any("addmm_" in str(n.target) for n in gm.graph.nodes)
