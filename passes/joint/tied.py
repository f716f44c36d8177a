"""Weights used twice: add rows into the gradient that exists.   [exact]

A tied embedding has two gradients of the vocabulary's size, its own of a few rows and the head's:

    before   z = full(0); p = put(z, i, g); dW = a + p     p, a (V, D)   i: rows, g: their gradient
    after    dW = put(a, i, g)

Identity: a + put(0, i, g) = put(a, i, g), where put adds the rows of g to the rows i. Only the
order of the sums changes. They are in the dtype of the result, so that low precision, in which
torch sums the rows in float32 first, is left as it is. `a` is overwritten where nothing else reads
it (Inductor's rule for operations in place). Source: design.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass, aten, operand

PUTS = {
    aten._unsafe_masked_index_put_accumulate.default,
    aten.index_add.default,
    aten.scatter_add.default,
}
MAY_PUT = {aten.index_put.default, aten._unsafe_index_put.default}  # with accumulate=True
FULL_PRECISION = (torch.float32, torch.float64)


def add_rows_in_place() -> Pass:
    """Add a tensor that holds a few rows by adding these rows."""

    def rewrite(gm: GraphModule) -> None:
        for total in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            terms = total.args
            for a, p in (terms, reversed(terms)):
                if isinstance(a, Node) and isinstance(p, Node) and _may_be_added(total, a, p):
                    _add_rows(total, a, p)
                    break
        gm.graph.eliminate_dead_code()

    identity = "a + put(0, i, g) = put(a, i, g)"
    return Pass("add_rows_in_place", rewrite, exact=True, identity=identity)


def adds_rows(node: Node) -> bool:
    """True for put(a, i, g): a scatter that adds."""
    if node.op != "call_function" or "alpha" in node.kwargs:
        return False
    accumulates = node.target in MAY_PUT and len(node.args) > 3 and node.args[3] is True
    return node.target in PUTS or accumulates


def _may_be_added(total: Node, a: Node, p: Node) -> bool:
    """True where p = put(0, i, g) is read by `total` alone, and a agrees with it in all it is."""
    if a is p or a.op != "call_function" or len(a.users) > 1 or len(p.users) > 1 or total.kwargs:
        return False
    if not adds_rows(p) or not _is_zeros(operand(p, 0)):
        return False
    kinds = {_kind(node) for node in (total, a, p)}
    return len(kinds) == 1 and total.meta["val"].dtype in FULL_PRECISION


def _is_zeros(node: Node) -> bool:
    if node.target is aten.full.default:
        return bool(node.args[1] == 0)
    return node.target in (aten.zeros.default, aten.new_zeros.default)


def _kind(node: Node) -> tuple[object, ...]:
    value = node.meta["val"]  # sizes as text: comparing dynamic ones would guard
    return str(value.shape), str(value.stride()), value.dtype, value.device


def _add_rows(total: Node, a: Node, p: Node) -> None:
    with total.graph.inserting_before(total):
        rows = total.graph.call_function(p.target, (a, *p.args[1:]), p.kwargs)  # type: ignore[arg-type]
    rows.meta = {**p.meta, "val": total.meta["val"]}
    total.replace_all_uses_with(rows)
    total.graph.erase_node(total)
