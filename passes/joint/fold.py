"""Fold the reconstruction into the weight gradient, so that x^ never exists.   [exact]

    before                                          after
    z --> reconstruct(z, v) --> mm(a, x^)           z --> mm(a, z) --> reconstruct(., v)
          (N, D)                (O, D)                    (O, G)       (O, D)

    z --> reconstruct(z, v) --> permute --> mm(x^T, b)
          (N, D)                (D, N)      (D, O)
                       z --> permute --> mm(z^T, b) --> permute --> reconstruct(., v) --> permute
                             (G, N)      (G, O)         (O, G)      (O, D)                (D, O)

    chunked_loss(h, ..., x^) --> dw                 chunked_loss(h, ..., z) --> dw --> reconstruct
                             (O, D)                                         (O, G)     (O, D)

Identity: reconstruct is linear and acts on rows independently, so a matmul over the rows
commutes with it:  a (z (x) v) = (a z) (x) v.  The matmul is M times narrower, and the
only full-size tensor left is dW itself. Source: design; checked in float64 by tests.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes import chunked_loss
from passes.base import Pass, aten, call, is_transpose, operand
from passes.joint.find import is_chunked
from passes.ops import velora_reconstruct


def fold_reconstruction() -> Pass:
    """Move every reconstruct that feeds a matmul after that matmul."""

    def rewrite(gm: GraphModule) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=aten.mm.default):
            left, right = operand(node, 0), operand(node, 1)
            if right.target is velora_reconstruct:
                _replace(node, _folded(node, left, right))
            elif _transposed_reconstruction(left):
                _replace(node, _folded_across(node, operand(left, 0), right))
        for node in gm.graph.find_nodes(op="call_function", target=chunked_loss.op):
            x_hat = chunked_loss.x_of(node)
            if isinstance(x_hat, Node) and x_hat.target is velora_reconstruct:
                _fold_in_chunks(node, x_hat)
        gm.graph.eliminate_dead_code()

    identity = "dy^T (z (x) v) = (dy^T z) (x) v: a matmul M times narrower, and no x_hat"
    return Pass("fold_reconstruction", rewrite, exact=True, identity=identity)


def _transposed_reconstruction(node: Node) -> bool:
    return is_transpose(node) and operand(node, 0).target is velora_reconstruct


def _folded(matmul: Node, rows: Node, x_hat: Node) -> Node:
    z, v, features = x_hat.args
    small = call(matmul, aten.mm.default, rows, z)  # (O, G)
    return call(matmul, velora_reconstruct, small, v, features)  # (O, D)


def _folded_across(matmul: Node, x_hat: Node, columns: Node) -> Node:
    z, v, features = x_hat.args
    across = call(matmul, aten.permute.default, z, [1, 0])  # (G, N)
    small = call(matmul, aten.mm.default, across, columns)  # (G, O)
    rows = call(matmul, aten.permute.default, small, [1, 0])  # (O, G)
    full = call(matmul, velora_reconstruct, rows, v, features)  # (O, D)
    return call(matmul, aten.permute.default, full, [1, 0])  # (D, O)


def _fold_in_chunks(loss: Node, x_hat: Node) -> None:
    z, v, features = x_hat.args
    new = call(loss, loss.target, *chunked_loss.arguments_with(loss, x=z))
    _replace(loss, new)
    for dw in filter(is_chunked, list(new.users)):
        dw.meta["val"] = new.meta["val"][chunked_loss.DW]  # (O, G)
        full = call(dw, velora_reconstruct, dw, v, features)  # (O, D)
        dw.replace_all_uses_with(full)
        full.replace_input_with(full, dw)


def _replace(node: Node, replacement: Node) -> None:
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)
