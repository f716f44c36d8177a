"""Adam on the coordinates A of a VeLoRA gradient: G is never formed.   [exact]

    before, G = A (x) v, all (O, D)        after, A, m, s (O, G)
    m <- b1 m + (1 - b1) G                 m <- b1 m + (1 - b1) A
    s <- b2 s + (1 - b2) G^2               s <- b2 s + (1 - b2) A^2
    W <- W - c m / (sqrt(s) / k + eps)     W <- W - (c m (x) v) / (sqrt(s) / k (x) |v| + eps)

Identity: every value from G to the division is `small (x) w`, where w is v, v^2 or |v|:

    c (a (x) w) = c a (x) w                        (a (x) w) + (b (x) w) = (a + b) (x) w
    (a (x) v) (b (x) v) = a b (x) v^2              max(a (x) v^2, b (x) v^2) = max(a, b) (x) v^2
    sqrt(a (x) v^2) = sqrt(a) (x) |v|

so the same operation computes it on `small`, and it is expanded to D only where another
operation reads it: at eps, which is no multiple of |v|. A weight (D, O) has all of this
transposed. Exact as long as v does not change, and where nothing of full size is added to
G before the moments, as an L2 decay is.
Source: design; checked against torch's Adam in float64 by tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.base import CONVERT, Pass, arguments, aten, fixed, insert, operand
from passes.ops import velora_reconstruct

V, SQUARE, ABSOLUTE = "v", "v^2", "|v|"
SAME = (CONVERT, aten._to_copy.default, aten.neg.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)


def factor_updates(weight: int, vector: int, held: Mapping[int, str], left: bool = False) -> Pass:
    """Factor the lowered update of `weight` along the v (M,) in argument `vector`.

    held: argument -> its w, for those that become (O, G): the gradient and the first moment V,
    the second moment and its maximum SQUARE. left: the weight is (D, O), those are (G, O).
    Raises ValueError where a moment would not be of that form.
    """

    def rewrite(gm: GraphModule) -> None:
        place = arguments(gm.graph)
        w, v = place[weight].meta["val"], place[vector]
        size = fixed(v.meta["val"].shape[0])
        assert size is not None  # a graph of one kind of parameter is static
        features = w.shape[0 if left else 1]
        groups = -(-features // size)
        small = (groups, w.shape[1]) if left else (w.shape[0], groups)
        bases: dict[Node, str] = {}
        for argument, basis in held.items():
            node = place[argument]
            if tuple(node.meta["val"].shape) == small:
                return  # factored already
            node.meta["val"] = node.meta["val"].new_empty(small)
            bases[node] = basis
        for node in list(gm.graph.nodes):
            _follow(node, bases, _Spread(v, features, left))

    key = (weight, vector, tuple(sorted(held.items())), left)
    identity = "Adam(A (x) v) from the moments of A: each value up to eps is small (x) w"
    return Pass("factor_updates", rewrite, exact=True, key=key, identity=identity)


@dataclass(frozen=True)
class _Spread:
    """Expand small (x) w to full size."""

    v: Node
    features: int
    left: bool

    def __call__(self, before: Node, small: Node, basis: str) -> Node:
        """small (x) w: (O, G) -> (O, D); if left, (G, O) -> (D, O)."""
        v = self.v
        if basis == SQUARE:
            v = insert(before, aten.mul.Tensor, v, v)
        elif basis == ABSOLUTE:
            v = insert(before, aten.abs.default, v)
        if not self.left:
            return insert(before, velora_reconstruct, small, v, self.features)
        rows = insert(before, aten.permute.default, small, [1, 0])  # (O, G)
        full = insert(before, velora_reconstruct, rows, v, self.features)
        return insert(before, aten.permute.default, full, [1, 0])


def _follow(node: Node, bases: dict[Node, str], spread: _Spread) -> None:
    """Compute a node on small operands where the identity holds; else expand them."""
    read = [n for n in node.all_input_nodes if n in bases]
    if not read or node.op == "output":
        return
    basis = _basis(node, bases)
    if basis is not None:
        bases[node] = basis
        node.meta["val"] = (
            read[0].meta["val"].new_empty(read[0].meta["val"].shape, dtype=node.meta["val"].dtype)
        )
        return
    if node.target is aten.copy_.default and operand(node, 0) in bases:
        raise ValueError(
            f"{node.name} would store a value that is not A (x) v in {operand(node, 0).name}: an "
            "L2 decay, or another gradient, was added before the moments"
        )
    for n in read:
        node.replace_input_with(n, spread(node, n, bases[n]))


def _basis(node: Node, bases: Mapping[Node, str]) -> str | None:
    """The w of a node's result, if the node may act on small operands; else None."""
    first = bases.get(operand(node, 0))
    other = node.args[1] if len(node.args) > 1 else None
    second = bases.get(other) if isinstance(other, Node) else None
    if node.target in SAME:
        return first
    if node.target is aten.sqrt.default:
        return ABSOLUTE if first == SQUARE else None
    if node.target is aten.mul.Tensor and second is not None:
        return SQUARE if first == second == V else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return first if _is_scalar(other) else None
    if node.target in SUMS or node.target is aten.copy_.default:
        return first if first == second else None
    if node.target is aten.maximum.default:
        return first if first == second != V else None
    return None


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Node) and not _shape(value))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
