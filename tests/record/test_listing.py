"""Listings of graphs: what each pass changes, and that a wrong one shows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import add_vector, joint_graph

from memrewrite.compiler.pipeline import run
from memrewrite.moments.projected import ProjectedKind
from memrewrite.moments.update import add_input, capture
from memrewrite.record.listing import changed, described, difference, listing
from passes.base import Pass
from passes.joint.fold import fold_reconstruction
from passes.joint.velora import compress_saved_inputs
from passes.lower import lower_ir_ops
from passes.update.accumulate import accumulate_in_place
from passes.update.adam import hyperparameters_as_inputs, lower_fused_adam
from passes.update.galore import Projection, project_updates


def small() -> Any:
    gm = joint_graph(
        lambda w, x: F.linear(torch.tanh(x), w), [torch.randn(6, 8)], [torch.randn(5, 8)]
    )
    add_vector(gm, torch.ones(4) / 2, 2)
    return gm


def test_the_listing_of_a_compression() -> None:
    gm = small()
    before = listing(gm.graph)
    run(gm, [compress_saved_inputs({0: 2}, frozenset([0])), fold_reconstruction()])
    assert_expected_inline(
        difference(before, listing(gm.graph), ("joint", "folded")),
        """\
--- joint
+++ folded
@@ -4,9 +4,11 @@
 v_2: f32[4] = input
 tanh: f32[5, 8] = tanh(arg1_1)
+velora_compress_default: f32[5, 2] = memrewrite.velora_compress(tanh, v_2)
 t: f32[8, 6] = t(arg0_1)
 mm: f32[5, 6] = mm(tanh, t)
 t_1: f32[6, 5] = t(arg2_1)
-mm_1: f32[6, 8] = mm(t_1, tanh)
-t_2: f32[8, 6] = t(mm_1)
+mm_default_1: f32[6, 2] = mm(t_1, velora_compress_default)
+velora_reconstruct_default_1: f32[6, 8] = memrewrite.velora_reconstruct(mm_default_1, v_2, 8)
+t_2: f32[8, 6] = t(velora_reconstruct_default_1)
 t_3: f32[6, 8] = t(t)
 mm_2: f32[5, 8] = mm(arg2_1, t_3)
""",
    )


def test_a_pass_that_drops_a_node_is_seen_in_the_diff() -> None:
    def drop(gm: torch.fx.GraphModule) -> None:
        tanh = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)[0]
        tanh.replace_all_uses_with(tanh.args[0])
        gm.graph.erase_node(tanh)

    gm = small()
    before = listing(gm.graph)
    run(gm, [Pass("wrong", drop, exact=True)])
    after = listing(gm.graph)
    assert changed(before, after) == ({}, {"tanh": "tanh: f32[5, 8] = tanh(arg1_1)"})
    assert "\n-tanh: f32[5, 8] = tanh(" in difference(before, after, ("before", "after"))


def test_a_line_as_data() -> None:
    line = "mm_3: f32[64, 16] = mm(view_7, permute_2)  # model.up_proj: h = self.up_proj(x)"
    found = described("mm_3", line)
    assert found["module"] == "model.up_proj" and found["source"] == "h = self.up_proj(x)"
    assert found["bytes"] == 4 * 64 * 16
    assert described("a", "a: bf16[s0, 16] = tanh(b)")["bytes"] is None
    assert described("a", "a: i64[] = sum(b)")["bytes"] == 8
    assert described("a", "a = split(b, 3)")["bytes"] == 0


def diffs(gm: Any, todo: list[Pass]) -> str:
    """What each pass did to the listing."""
    texts = [("before", listing(gm.graph))]
    run(gm, todo, lambda one, graph: texts.append((one.name, listing(graph))))
    return "\n".join(difference(a[1], b[1], (a[0], b[0])) for a, b in pairwise(texts))


def test_golden_diffs_of_the_joint_passes() -> None:
    todo = [
        compress_saved_inputs({0: 2}, frozenset([0])),
        fold_reconstruction(),
        lower_ir_ops(),
    ]
    assert_expected_inline(
        diffs(small(), todo),
        """\
--- before
+++ compress_saved_inputs
@@ -4,9 +4,11 @@
 v_2: f32[4] = input
 tanh: f32[5, 8] = tanh(arg1_1)
+velora_compress_default: f32[5, 2] = memrewrite.velora_compress(tanh, v_2)
+velora_reconstruct_default: f32[5, 8] = memrewrite.velora_reconstruct(velora_compress_default, v_2, 8)
 t: f32[8, 6] = t(arg0_1)
 mm: f32[5, 6] = mm(tanh, t)
 t_1: f32[6, 5] = t(arg2_1)
-mm_1: f32[6, 8] = mm(t_1, tanh)
-t_2: f32[8, 6] = t(mm_1)
+mm_default: f32[6, 8] = mm(t_1, velora_reconstruct_default)
+t_2: f32[8, 6] = t(mm_default)
 t_3: f32[6, 8] = t(t)
 mm_2: f32[5, 8] = mm(arg2_1, t_3)

--- compress_saved_inputs
+++ fold_reconstruction
@@ -5,10 +5,10 @@
 tanh: f32[5, 8] = tanh(arg1_1)
 velora_compress_default: f32[5, 2] = memrewrite.velora_compress(tanh, v_2)
-velora_reconstruct_default: f32[5, 8] = memrewrite.velora_reconstruct(velora_compress_default, v_2, 8)
 t: f32[8, 6] = t(arg0_1)
 mm: f32[5, 6] = mm(tanh, t)
 t_1: f32[6, 5] = t(arg2_1)
-mm_default: f32[6, 8] = mm(t_1, velora_reconstruct_default)
-t_2: f32[8, 6] = t(mm_default)
+mm_default_1: f32[6, 2] = mm(t_1, velora_compress_default)
+velora_reconstruct_default_1: f32[6, 8] = memrewrite.velora_reconstruct(mm_default_1, v_2, 8)
+t_2: f32[8, 6] = t(velora_reconstruct_default_1)
 t_3: f32[6, 8] = t(t)
 mm_2: f32[5, 8] = mm(arg2_1, t_3)

--- fold_reconstruction
+++ lower_ir_ops
@@ -4,11 +4,15 @@
 v_2: f32[4] = input
 tanh: f32[5, 8] = tanh(arg1_1)
-velora_compress_default: f32[5, 2] = memrewrite.velora_compress(tanh, v_2)
+view_default: f32[5, 2, 4] = view(tanh, [5, 2, 4])
+mul_tensor: f32[5, 2, 4] = mul(view_default, v_2)
+sum_dim_int_list: f32[5, 2] = sum(mul_tensor, [-1])
 t: f32[8, 6] = t(arg0_1)
 mm: f32[5, 6] = mm(tanh, t)
 t_1: f32[6, 5] = t(arg2_1)
-mm_default_1: f32[6, 2] = mm(t_1, velora_compress_default)
-velora_reconstruct_default_1: f32[6, 8] = memrewrite.velora_reconstruct(mm_default_1, v_2, 8)
-t_2: f32[8, 6] = t(velora_reconstruct_default_1)
+mm_default_1: f32[6, 2] = mm(t_1, sum_dim_int_list)
+unsqueeze_default: f32[6, 2, 1] = unsqueeze(mm_default_1, -1)
+mul_tensor_1: f32[6, 2, 4] = mul(unsqueeze_default, v_2)
+view_default_1: f32[6, 8] = view(mul_tensor_1, [6, 8])
+t_2: f32[8, 6] = t(view_default_1)
 t_3: f32[6, 8] = t(t)
 mm_2: f32[5, 8] = mm(arg2_1, t_3)
""",  # noqa: E501
    )


def test_golden_diffs_of_the_update_passes() -> None:
    cpu = torch.device("cpu")
    kind = ProjectedKind((6, 4), torch.float32, cpu, 2, False, 0.25, False, False, True, True)
    gm = capture(kind)
    projection = Projection(
        add_input(gm, "projector", (kind.side, kind.rank)), left=False, scale=0.25
    )
    todo = [
        hyperparameters_as_inputs(),
        project_updates({0: projection}),
        lower_fused_adam(),
        lower_ir_ops(),
        accumulate_in_place(),
    ]
    assert_expected_inline(
        diffs(gm, todo),
        """\
--- before
+++ hyperparameters_as_inputs
@@ -5,5 +5,10 @@
 step_1: f32[] = input
 projector: f32[4, 2] = input
+lr: f64[] = input
+beta1: f64[] = input
+beta2: f64[] = input
+weight_decay: f64[] = input
+eps: f64[] = input
 _foreach_add_ = _foreach_add_([step_1], 1)
-_fused_adamw_ = _fused_adamw_([weight_1], [grad_1], [m_1], [v_1], [], [step_1], lr=0.001, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-08, amsgrad=False, maximize=False)
+_fused_adamw_ = _fused_adamw_([weight_1], [grad_1], [m_1], [v_1], [], [step_1], lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
 return []

--- hyperparameters_as_inputs
+++ project_updates
@@ -1,6 +1,6 @@
 weight_1: f32[6, 4] = input
 grad_1: f32[6, 4] = input
-m_1: f32[6, 4] = input
-v_1: f32[6, 4] = input
+m_1: f32[6, 2] = input
+v_1: f32[6, 2] = input
 step_1: f32[] = input
 projector: f32[4, 2] = input
@@ -11,4 +11,12 @@
 eps: f64[] = input
 _foreach_add_ = _foreach_add_([step_1], 1)
-_fused_adamw_ = _fused_adamw_([weight_1], [grad_1], [m_1], [v_1], [], [step_1], lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
+galore_project_default: f32[6, 2] = memrewrite.galore_project(grad_1, projector, False)
+zeros_like_default: f32[6, 2] = zeros_like(galore_project_default)
+_fused_adamw__default = _fused_adamw_([zeros_like_default], [galore_project_default], [m_1], [v_1], [], [step_1], lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False)
+galore_project_back_default: f32[6, 4] = memrewrite.galore_project_back(zeros_like_default, projector, False)
+mul_tensor: f64[] = mul(lr, weight_decay)
+rsub_scalar: f64[] = rsub(mul_tensor, 1)
+mul_tensor_1: f32[6, 4] = mul(weight_1, rsub_scalar)
+add_tensor: f32[6, 4] = add(mul_tensor_1, galore_project_back_default, alpha=0.25)
+copy__default: f32[6, 4] = copy_(weight_1, add_tensor)
 return []

--- project_updates
+++ lower_fused_adam
@@ -13,5 +13,29 @@
 galore_project_default: f32[6, 2] = memrewrite.galore_project(grad_1, projector, False)
 zeros_like_default: f32[6, 2] = zeros_like(galore_project_default)
-_fused_adamw__default = _fused_adamw_([zeros_like_default], [galore_project_default], [m_1], [v_1], [], [step_1], lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False)
+_to_copy_default: f64[] = _to_copy(step_1, dtype=torch.float64)
+pow_tensor_tensor: f64[] = pow(beta1, _to_copy_default)
+rsub_scalar_1: f64[] = rsub(pow_tensor_tensor, 1)
+pow_tensor_tensor_1: f64[] = pow(beta2, _to_copy_default)
+rsub_scalar_2: f64[] = rsub(pow_tensor_tensor_1, 1)
+sqrt_default: f64[] = sqrt(rsub_scalar_2)
+div_tensor: f64[] = div(lr, rsub_scalar_1)
+mul_tensor_2: f32[6, 2] = mul(m_1, beta1)
+rsub_scalar_3: f64[] = rsub(beta1, 1)
+mul_tensor_3: f32[6, 2] = mul(galore_project_default, rsub_scalar_3)
+add_tensor_1: f32[6, 2] = add(mul_tensor_2, mul_tensor_3)
+mul_tensor_4: f32[6, 2] = mul(galore_project_default, galore_project_default)
+mul_tensor_5: f32[6, 2] = mul(v_1, beta2)
+rsub_scalar_4: f64[] = rsub(beta2, 1)
+mul_tensor_6: f32[6, 2] = mul(mul_tensor_4, rsub_scalar_4)
+add_tensor_2: f32[6, 2] = add(mul_tensor_5, mul_tensor_6)
+sqrt_default_1: f32[6, 2] = sqrt(add_tensor_2)
+div_tensor_1: f32[6, 2] = div(sqrt_default_1, sqrt_default)
+mul_tensor_7: f32[6, 2] = mul(add_tensor_1, div_tensor)
+add_tensor_3: f32[6, 2] = add(div_tensor_1, eps)
+div_tensor_2: f32[6, 2] = div(mul_tensor_7, add_tensor_3)
+sub_tensor: f32[6, 2] = sub(zeros_like_default, div_tensor_2)
+copy__default_1: f32[6, 2] = copy_(m_1, add_tensor_1)
+copy__default_2: f32[6, 2] = copy_(v_1, add_tensor_2)
+copy__default_3: f32[6, 2] = copy_(zeros_like_default, sub_tensor)
 galore_project_back_default: f32[6, 4] = memrewrite.galore_project_back(zeros_like_default, projector, False)
 mul_tensor: f64[] = mul(lr, weight_decay)

--- lower_fused_adam
+++ lower_ir_ops
@@ -11,6 +11,6 @@
 eps: f64[] = input
 _foreach_add_ = _foreach_add_([step_1], 1)
-galore_project_default: f32[6, 2] = memrewrite.galore_project(grad_1, projector, False)
-zeros_like_default: f32[6, 2] = zeros_like(galore_project_default)
+mm_default: f32[6, 2] = mm(grad_1, projector)
+zeros_like_default: f32[6, 2] = zeros_like(mm_default)
 _to_copy_default: f64[] = _to_copy(step_1, dtype=torch.float64)
 pow_tensor_tensor: f64[] = pow(beta1, _to_copy_default)
@@ -22,7 +22,7 @@
 mul_tensor_2: f32[6, 2] = mul(m_1, beta1)
 rsub_scalar_3: f64[] = rsub(beta1, 1)
-mul_tensor_3: f32[6, 2] = mul(galore_project_default, rsub_scalar_3)
+mul_tensor_3: f32[6, 2] = mul(mm_default, rsub_scalar_3)
 add_tensor_1: f32[6, 2] = add(mul_tensor_2, mul_tensor_3)
-mul_tensor_4: f32[6, 2] = mul(galore_project_default, galore_project_default)
+mul_tensor_4: f32[6, 2] = mul(mm_default, mm_default)
 mul_tensor_5: f32[6, 2] = mul(v_1, beta2)
 rsub_scalar_4: f64[] = rsub(beta2, 1)
@@ -38,9 +38,10 @@
 copy__default_2: f32[6, 2] = copy_(v_1, add_tensor_2)
 copy__default_3: f32[6, 2] = copy_(zeros_like_default, sub_tensor)
-galore_project_back_default: f32[6, 4] = memrewrite.galore_project_back(zeros_like_default, projector, False)
+permute_default: f32[2, 4] = permute(projector, [1, 0])
+mm_default_1: f32[6, 4] = mm(zeros_like_default, permute_default)
 mul_tensor: f64[] = mul(lr, weight_decay)
 rsub_scalar: f64[] = rsub(mul_tensor, 1)
 mul_tensor_1: f32[6, 4] = mul(weight_1, rsub_scalar)
-add_tensor: f32[6, 4] = add(mul_tensor_1, galore_project_back_default, alpha=0.25)
+add_tensor: f32[6, 4] = add(mul_tensor_1, mm_default_1, alpha=0.25)
 copy__default: f32[6, 4] = copy_(weight_1, add_tensor)
 return []

--- lower_ir_ops
+++ accumulate_in_place
@@ -39,9 +39,7 @@
 copy__default_3: f32[6, 2] = copy_(zeros_like_default, sub_tensor)
 permute_default: f32[2, 4] = permute(projector, [1, 0])
-mm_default_1: f32[6, 4] = mm(zeros_like_default, permute_default)
 mul_tensor: f64[] = mul(lr, weight_decay)
 rsub_scalar: f64[] = rsub(mul_tensor, 1)
-mul_tensor_1: f32[6, 4] = mul(weight_1, rsub_scalar)
-add_tensor: f32[6, 4] = add(mul_tensor_1, mm_default_1, alpha=0.25)
-copy__default: f32[6, 4] = copy_(weight_1, add_tensor)
+_local_scalar_dense_default = _local_scalar_dense(rsub_scalar)
+addmm__default: f32[6, 4] = addmm_(weight_1, zeros_like_default, permute_default, beta=_local_scalar_dense_default, alpha=0.25)
 return []
""",  # noqa: E501
    )
