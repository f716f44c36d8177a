"""Lower the IR ops to plain aten, so that compress fuses with what produces x.   [exact]

    velora_compress(x, v)         pad? -> view (N, G, M) -> cast? -> mul v -> sum -> cast?
    velora_reconstruct(z, v, D)   cast? -> unsqueeze -> mul v -> cast? -> view -> (slice, clone)?

Identity: the definitions in `passes.ops`, op by op; steps marked ? are left out where
they do nothing. The node that holds z keeps its `velora` mark.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass, aten, call
from passes.ops import velora_compress, velora_reconstruct

convert = torch.ops.prims.convert_element_type.default


def lower_ir_ops() -> Pass:
    """Replace every memrewrite op by the aten ops that define it."""

    def rewrite(gm: GraphModule) -> None:
        for op, lowered in ((velora_compress, _compress), (velora_reconstruct, _reconstruct)):
            for node in gm.graph.find_nodes(op="call_function", target=op):
                replacement = lowered(node)
                if "velora" in node.meta:
                    replacement.meta["velora"] = node.meta["velora"]
                node.replace_all_uses_with(replacement)
                gm.graph.erase_node(node)

    return Pass("lower_ir_ops", rewrite, exact=True)


def _compress(node: Node) -> Node:
    x, v = node.args
    m = v.meta["val"].shape[0]  # type: ignore[union-attr]
    features = int(x.meta["val"].shape[1])  # type: ignore[union-attr]
    if features % m:
        x = call(node, aten.constant_pad_nd.default, x, [0, -features % m])  # (N, G*M)
    subtokens = call(node, aten.view.default, x, [-1, -(-features // m), m])  # (N, G, M)
    products = call(node, aten.mul.Tensor, _cast(node, subtokens, v), v)  # (N, G, M)
    return _cast(node, call(node, aten.sum.dim_IntList, products, [-1]), node)  # (N, G)


def _reconstruct(node: Node) -> Node:
    z, v, features = node.args
    column = call(node, aten.unsqueeze.default, _cast(node, z, v), -1)  # type: ignore[arg-type]
    outer = _cast(node, call(node, aten.mul.Tensor, column, v), node)  # (N, G, M)
    groups, m = outer.meta["val"].shape[1:]
    flat = call(node, aten.view.default, outer, [-1, int(groups) * int(m)])  # (N, G*M)
    if int(groups) * int(m) == features:
        return flat
    kept = call(node, aten.slice.Tensor, flat, 1, 0, features)  # (N, D)
    return call(node, aten.clone.default, kept)  # a gradient must not alias its padding


def _cast(like: Node, node: Node, target: Node) -> Node:
    dtype = target.meta["val"].dtype
    return node if node.meta["val"].dtype == dtype else call(like, convert, node, dtype)
