"""Lower the IR ops to plain aten, so that compress fuses with what produces x.   [exact]

    velora_compress(x, v)         pad? -> view (N, G, M) -> cast? -> mul v -> sum -> cast?
    velora_reconstruct(z, v, D)   cast? -> unsqueeze -> mul v -> cast? -> view -> (slice, clone)?
    galore_project(g, P)          permute? -> mm
    galore_project_back(z, P)     permute? -> mm

Identity: the definitions in `passes.ops`, op by op; steps marked ? are left out where
they do nothing. The nodes of z and x P keep their `StandsFor` marks.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.base import CONVERT, Pass, aten, call, fixed, insert, is_transpose, operand, size
from passes.ops import galore_project, galore_project_back, velora_compress, velora_reconstruct


def lower_ir_ops() -> Pass:
    """Replace every IR op by the aten ops that define it."""

    def rewrite(gm: GraphModule) -> None:
        for op, lowered in LOWERED.items():
            for node in gm.graph.find_nodes(op="call_function", target=op):
                replacement = lowered(node)
                if "stands_for" in node.meta:
                    replacement.meta["stands_for"] = node.meta["stands_for"]
                node.replace_all_uses_with(replacement)
                gm.graph.erase_node(node)

    identity = "the definitions of the IR ops, in plain aten"
    return Pass("lower_ir_ops", rewrite, exact=True, identity=identity)


def _compress(node: Node) -> Node:
    x, v = operand(node, 0), operand(node, 1)
    m, features = fixed(v.meta["val"].shape[0]), fixed(x.meta["val"].shape[1])
    assert m is not None and features is not None  # passes.joint.find matches static sizes only
    if features % m:
        padding = [0, -features % m]
        x = call(node, aten.constant_pad_nd.default, x, padding, shaped=_padded)  # (N, G*M)
    shape = [size(node, x, 0), -(-features // m), m]
    subtokens = call(node, aten.view.default, x, shape)  # (N, G, M)
    products = call(node, aten.mul.Tensor, _cast(node, subtokens, v), v)  # (N, G, M)
    return _cast(node, call(node, aten.sum.dim_IntList, products, [-1]), node)  # (N, G)


def _padded(x: Tensor, padding: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + padding[1])


def _reconstruct(node: Node) -> Node:
    z, v, features = operand(node, 0), operand(node, 1), node.args[2]
    column = call(node, aten.unsqueeze.default, _cast(node, z, v), -1)
    outer = _cast(node, call(node, aten.mul.Tensor, column, v), node)  # (N, G, M)
    m = fixed(v.meta["val"].shape[0])
    assert m is not None and isinstance(features, int)  # passes.joint.find: static sizes only
    padded = -(-features // m) * m
    rows = aten.reshape if is_transpose(z) else aten.view  # the products have the strides of z
    flat = call(node, rows.default, outer, [size(node, z, 0), padded])  # (N, G*M)
    if padded == features:
        return flat
    kept = call(node, aten.slice.Tensor, flat, 1, 0, features)  # (N, D)
    return call(node, aten.clone.default, kept)  # a gradient must not alias its padding


def _cast(like: Node, node: Node, target: Node) -> Node:
    dtype = target.meta["val"].dtype
    return node if node.meta["val"].dtype == dtype else call(like, CONVERT, node, dtype)


def _project(node: Node) -> Node:
    g, p, left = operand(node, 0), operand(node, 1), node.args[2]
    if left:
        return insert(node, aten.mm.default, insert(node, aten.permute.default, p, [1, 0]), g)
    return insert(node, aten.mm.default, g, p)  # (O, r)


def _project_back(node: Node) -> Node:
    z, p, left = operand(node, 0), operand(node, 1), node.args[2]
    if left:
        return insert(node, aten.mm.default, p, z)  # (O, D)
    return insert(node, aten.mm.default, z, insert(node, aten.permute.default, p, [1, 0]))


LOWERED = {
    velora_compress: _compress,
    velora_reconstruct: _reconstruct,
    galore_project: _project,
    galore_project_back: _project_back,
}
