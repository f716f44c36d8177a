"""Accumulate a matmul into the weight that it updates.   [exact]

    before                                        after
    mm(a, b) --> S                                addmm_(W, a, b, beta=c, alpha=s)
    copy_(W, add(mul(W, c)?, S, alpha=s))

Identity: a GEMM computes beta W + alpha a b into W. S, of W's size, is never allocated,
and W is read and written once. Only for matrices: a weight of more dimensions has no
matrix view in every memory format. Source: design.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from passes.base import CONVERT, Pass, aten


def accumulate_in_place() -> Pass:
    """Replace each write of W + s (a b) into W by one in-place addmm."""

    def rewrite(gm: GraphModule) -> None:
        for write in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
            _accumulate(write)
        gm.graph.eliminate_dead_code()

    identity = "copy_(W, c W + s a b) = addmm_(W, a, b, beta=c, alpha=s)"
    return Pass("accumulate_in_place", rewrite, exact=True, identity=identity)


def _accumulate(write: Node) -> None:
    w, total = write.args
    if not (isinstance(w, Node) and isinstance(total, Node) and total.target is aten.add.Tensor):
        return
    kept, product = (_unwidened(n) for n in total.args[:2])
    if kept is None or product is None or product.target is not aten.mm.default:
        return
    factor: Any = 1
    if kept.target is aten.mul.Tensor:
        base, factor = kept.args
        kept = _unwidened(base)
    if kept is not w:
        return
    graph = write.graph
    with graph.inserting_before(write):
        if isinstance(factor, Node):
            number = graph.call_function(aten._local_scalar_dense.default, (factor,))
            number.meta["val"] = None  # a number, known when it runs
            factor = number
        settings = {"beta": factor, "alpha": total.kwargs.get("alpha", 1)}
        moved = graph.call_function(aten.addmm_.default, (w, *product.args), settings)
    moved.meta["val"] = w.meta["val"]
    write.replace_all_uses_with(moved)
    graph.erase_node(write)


def _unwidened(value: Any) -> Node | None:
    """The operand of a cast to the compute dtype, which addmm accumulates in as well."""
    if not isinstance(value, Node):
        return None
    operand = value.args[0] if value.target is CONVERT else value
    return operand if isinstance(operand, Node) else None
