"""Return a weight gradient in the coordinates of a projector.   [approximate, then exact]

    return_projections                       push_projections
    dW (O, D) --> gradient of W              mm(l, r) --> dW (O, D)
      '--> project(dW, P) --> of the port      '--> project(P, left) --> R (r, D)
           gradient of W: none               mm(project(l, P, left), r) --> R

The first is GaLore's approximation: it drops the part of dW outside the span of P. The second
is exact given P, and dW is never formed:

    P^T (l r) = (P^T l) r        (l r) P = l (r P)        project(a + b) = project(a) + project(b)
    project(c a) = c project(a)                P^T a^T = (a P)^T        a^T P = (P^T a)^T

For a linear layer, dW = dy^T x, that is (dy P)^T x from the left and dy^T (x P) from the
right, where x P (N, r) may be saved for backward in place of x (N, D). A loss in chunks has dW
in the forward, from the same operands: `passes.chunked_loss`. A gradient of any other form is
projected where it is complete, and freed within backward.
Source: Zhao et al. 2024, arXiv:2403.03507, equation 11; pushing it into backward: design.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from passes import chunked_loss
from passes.base import (
    CASTS,
    CONVERT,
    Pass,
    StandsFor,
    arguments,
    aten,
    backward_nodes,
    base_of,
    call,
    is_transpose,
    is_view,
    operand,
)
from passes.joint.attach import detach_ports, is_zeros_of_port
from passes.joint.find import is_chunked, scaled_by_tensor
from passes.ops import galore_project

NAME = "galore"


@dataclass(frozen=True)
class Projected:
    """Argument positions of a weight, its port and its P; P^T dW if left, else dW P."""

    weight: int
    port: int
    projector: int
    left: bool


def return_projections(projections: Iterable[Projected]) -> Pass:
    """Return project(dW, P) as the gradient of each weight's port."""
    projections = tuple(projections)

    def rewrite(gm: GraphModule) -> None:
        output, place = gm.graph.output_node(), arguments(gm.graph)
        gradient_of = output.meta["gradient_of"]
        returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        for one in projections:
            if one.port not in gradient_of:
                continue
            at, small_at = gradient_of.index(one.weight), gradient_of.index(one.port)
            if isinstance(returned[at], Node) and is_zeros_of_port(returned[small_at]):
                p = place[one.projector]
                returned[small_at] = _project(returned[at], returned[at], p, one.left)
                returned[at] = None
        output.args = (tuple(returned),)
        detach_ports(gm.graph)
        gm.graph.eliminate_dead_code()

    identity = "R = P^T dW (or dW P) is returned, and W's gradient is read as P R (or R P^T)"
    changes = frozenset(w for one in projections for w in (one.weight, one.port))
    return Pass(
        name="return_projections",
        rewrite=rewrite,
        exact=False,
        key=projections,
        identity=identity,
        drops=True,
        changes=changes,
    )


def push_projections() -> Pass:
    """Move every projection of a weight gradient towards the operands of its matmul."""

    def rewrite(gm: GraphModule) -> None:
        backward = backward_nodes(gm.graph)
        todo = list(gm.graph.find_nodes(op="call_function", target=galore_project))
        while todo:
            node = todo.pop()
            g = operand(node, 0)
            inside = g in backward or is_chunked(g)
            pushed = _pushed(node) if inside and set(g.users) == {node} else None
            if pushed is not None:
                result, made = pushed
                todo += made
                node.replace_all_uses_with(result)
                gm.graph.erase_node(node)
                _erase_unread(g)
        for node in gm.graph.find_nodes(op="call_function", target=galore_project):
            if operand(node, 0) not in backward:  # x P, which may be saved in place of x
                storage = base_of(operand(node, 0)).name
                node.meta["stands_for"] = StandsFor(NAME, storage, kept=True)

    identity = "P^T (l r) = (P^T l) r, (l r) P = l (r P), and projection is linear"
    return Pass("push_projections", rewrite, exact=True, identity=identity)


def _pushed(node: Node) -> tuple[Node, list[Node]] | None:
    """A node equal to project(g, P), and its projections to push further; None if no rule fits."""
    g, p, left = operand(node, 0), operand(node, 1), bool(node.args[2])
    if g.target is aten.mm.default:
        first, second = operand(g, 0), operand(g, 1)
        if left:
            first = _project(node, first, p, left)  # (r, N)
        else:
            second = _project(node, second, p, left)  # (N, r)
        return call(node, aten.mm.default, first, second), []
    if g.target in CASTS:
        small = _project(node, operand(g, 0), p, left)
        return call(node, CONVERT, small, g.meta["val"].dtype), [small]
    if is_transpose(g) and is_transpose(operand(g, 0)):
        small = _project(node, operand(operand(g, 0), 0), p, left)
        return small, [small]
    if is_transpose(g):
        small = _project(node, operand(g, 0), p, not left)
        return call(node, aten.permute.default, small, [1, 0]), [small]
    if is_chunked(g):
        return _projected_in_chunks(g, p, left), []
    if scaled_by_tensor(g) or (g.target is aten.mul.Tensor and isinstance(g.args[1], float)):
        small = _project(node, operand(g, 0), p, left)
        return call(node, aten.mul.Tensor, small, g.args[1]), [small]
    if g.target is aten.add.Tensor and not g.kwargs and len(g.all_input_nodes) == 2:
        both = [_project(node, term, p, left) for term in g.all_input_nodes]
        if both[0].meta["val"].shape == both[1].meta["val"].shape:
            return call(node, aten.add.Tensor, *both), both
    return None


def _projected_in_chunks(dw: Node, p: Node, left: bool) -> Node:
    """The dw of a loss in chunks that computes project(dw, P) itself."""
    loss = operand(dw, 0)
    x = chunked_loss.x_of(loss) or operand(loss, 0)
    how = {"p": p} if left else {"x": _project(loss, x, p, left)}  # (V, r), (N, r)
    new = call(loss, loss.target, *chunked_loss.arguments_with(loss, **how))
    loss.replace_all_uses_with(new)
    loss.graph.erase_node(loss)
    return call(dw, operator.getitem, new, chunked_loss.DW)


def _project(like: Node, g: Node, p: Node, left: bool) -> Node:
    """project(g, P) in the dtype of g."""
    dtype = g.meta["val"].dtype
    if p.meta["val"].dtype != dtype:
        p = call(like, CONVERT, p, dtype)
    return call(like, galore_project, g, p, left)


def _erase_unread(node: Node) -> None:
    """Erase the node and the views that only it reads, which would count as readers."""
    above = node.all_input_nodes
    node.graph.erase_node(node)
    for view in above:
        if not view.users and is_view(view):
            _erase_unread(view)
