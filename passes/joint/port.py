"""Return a VeLoRA weight gradient as its coordinates.   [exact]

    before                                        after
    mm(dy^T, z) --> A (O, G)                      mm(dy^T, z) --> A (O, G)
      '--> reconstruct(A, v) (O, D)                 '--> s A --> gradient of port
             '--> views, casts, s --> gradient of W      gradient of W: none
    y --> attach(y, port) --> returned            y --> returned

Identity: dW = A (x) v, and the reader of the port's gradient has v. Sums, scaling and norms of
gradients are the same in A, because v has length one. A port is an input of zeros whose only
purpose is that autograd returns A as its gradient: no forward value depends on it. The port of
a transposed weight (D, O) takes A^T (G, O). A gradient of another form (several terms, the other
side) is returned in full, and the port's gradient is None.
Source: design.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from passes.base import (
    CONVERT,
    Pass,
    aten,
    call,
    is_transpose,
    operand,
)
from passes.joint.attach import detach_ports, is_zeros_of_port
from passes.joint.find import SAME, scaled_by_tensor
from passes.ops import velora_reconstruct


@dataclass(frozen=True)
class Coordinates:
    """A gradient that is factor * reconstruct(small, v)."""

    small: Node  # (O, G)
    factors: tuple[float | Node, ...]  # a node: a tensor without dimensions


@dataclass(frozen=True)
class Ported:
    """Argument positions of a weight and its port; left: W is (D, O), and the port (G, O)."""

    weight: int
    port: int
    left: bool = False


def return_coordinates(ports: Sequence[Ported]) -> Pass:
    """Return A for each of `ports` whose weight has a gradient of the form A (x) v."""

    def rewrite(gm: GraphModule) -> None:
        output = gm.graph.output_node()
        gradient_of = output.meta["gradient_of"]
        returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        for one in ports:
            if one.port not in gradient_of:
                continue
            at, small_at = gradient_of.index(one.weight), gradient_of.index(one.port)
            if is_zeros_of_port(returned[small_at]):
                found = _coordinates(returned[at], output, one.left)
                returned[small_at] = None if found is None else _emit(found, returned[at])
                returned[at] = returned[at] if found is None else None
        output.args = (tuple(returned),)
        detach_ports(gm.graph)
        gm.graph.eliminate_dead_code()

    identity = "dW = A (x) v: A is returned, and W's gradient is read as A (x) v"
    name = "return_coordinates"
    return Pass(name, rewrite, exact=True, key=tuple(ports), identity=identity, drops=True)


def factored_gradients(graph: Graph, weights: Iterable[int]) -> list[int]:
    """The weights whose whole gradient is c A (x) v, in either orientation."""
    output = graph.output_node()
    returned: Any = output.args[0]
    gradient = dict(zip(output.meta["gradient_of"], returned, strict=True))
    return [
        w
        for w in weights
        if any(_coordinates(gradient.get(w), output, left, make=False) for left in (False, True))
    ]


def _coordinates(node: Any, user: Node, left: bool, make: bool = True) -> Coordinates | None:
    """A gradient as factors * reconstruct(A, v), through nodes that have no other reader; or None.

    make: insert the transpose that A needs; False leaves the graph as it is.
    """
    factors: list[float | Node] = []
    transposed = False
    while isinstance(node, Node) and set(node.users) == {user}:
        if node.target is velora_reconstruct:
            small = _across(operand(node, 0)) if left and make else operand(node, 0)
            return Coordinates(small, tuple(factors)) if transposed == left else None
        if node.target is aten.mul.Tensor and isinstance(node.args[1], float):
            factors.append(node.args[1])
        elif scaled_by_tensor(node):
            factors.append(operand(node, 1))
        elif is_transpose(node):
            transposed = not transposed
        elif node.target not in SAME:
            return None
        node, user = operand(node, 0), node
    return None


def _across(small: Node) -> Node:
    """small^T."""
    if is_transpose(small):
        return operand(small, 0)
    return call(small, aten.permute.default, small, [1, 0])


def _emit(found: Coordinates, gradient: Node) -> Node:
    """A times its factors, in the dtype of the gradient that it replaces."""
    small, dtype = found.small, gradient.meta["val"].dtype
    if small.meta["val"].dtype != dtype:
        small = call(gradient, CONVERT, small, dtype)
    for factor in found.factors:
        small = call(gradient, aten.mul.Tensor, small, factor)
    return small
