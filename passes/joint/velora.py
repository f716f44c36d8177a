"""VeLoRA: keep one number per sub-token in place of a linear's input.   [approximate]

    before                                 after
    x --> linear --> y                     x --> linear --> y
    |                                      '---> compress(x, v) --> z
    :  (N, D) kept for backward                  :  (N, G) kept, D = G M
    '--> mm(dy^T, x) --> dW                      reconstruct(z, v) --> mm(dy^T, x^) --> dW

Identity it applies: x^ = z (x) v, the projection of every sub-token of x onto the unit
vector v. dW = scale * dy^T x^ equals scale * dW exactly iff every sub-token is parallel
to v. dx and db do not read x and are untouched. Weights that read one tensor (q, k, v;
gate, up) share one v and one z: the decision belongs to the tensor, not to the layer.
Source: Miles et al. 2024, arXiv:2405.17991, algorithm 1; reference velora/velora.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from passes.base import Pass, arguments, aten, call, is_transpose, operand, storage_of
from passes.joint.find import WeightGradient, shared_inputs, weight_gradients
from passes.ops import velora_compress, velora_reconstruct


def compress_saved_inputs(
    vectors: Mapping[int, int], weights: frozenset[int], scale: float = 1.0
) -> Pass:
    """Compress the input of each weight in `vectors`: argument of W -> argument of v.

    `weights` are all arguments that are parameters: no activation is made of them alone.
    """

    def rewrite(gm: GraphModule) -> None:
        placeholder = arguments(gm.graph)
        found = weight_gradients(gm.graph, set(weights)).gradients
        selected = [gradient for gradient in found if gradient.weight in vectors]
        for group in shared_inputs(selected):
            leader = min(gradient.weight for gradient in group)
            _compress(group, placeholder[vectors[leader]], scale)

    key = (tuple(sorted(vectors.items())), weights, scale)
    identity = "dW = scale dy^T x_hat, x_hat = z (x) v, z[n,g] = <x[n, gM:gM+M], v>"
    return Pass("compress_saved_inputs", rewrite, exact=False, key=key, identity=identity)


def _compress(group: list[WeightGradient], v: Node, scale: float) -> None:
    first = group[0]
    x = _rows(first)  # (N, D)
    z = call(storage_of(x), velora_compress, x, v)  # (N, G)
    z.meta.update(velora=first.storage_name, velora_z=True)
    for gradient in group:
        matmul = gradient.matmul
        x_hat = call(matmul, velora_reconstruct, z, v, gradient.features)  # (N, D)
        left, right = operand(matmul, 0), operand(matmul, 1)
        if gradient.transposed:
            left = call(matmul, aten.permute.default, x_hat, [1, 0])  # (D, N)
        else:
            right = x_hat
        product = call(matmul, aten.mm.default, left, right)
        scaled = product if scale == 1.0 else call(matmul, aten.mul.Tensor, product, scale)
        matmul.replace_all_uses_with(scaled)
        matmul.graph.erase_node(matmul)


def _rows(gradient: WeightGradient) -> Node:
    """x as (N, D), whichever way the matmul reads it."""
    x = gradient.operand
    if not gradient.transposed:
        return x
    if is_transpose(x):
        return operand(x, 0)
    return call(x, aten.permute.default, x, [1, 0])
