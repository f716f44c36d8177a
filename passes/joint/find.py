"""Find the matmuls that compute weight gradients, and the activation that each reads.

For y = x W^T with x (N, D), W (O, D) and dy (N, O), reverse mode leaves in the graph

    dW  = mm(permute(dy), x)      (O, D)        nn.Linear, F.linear, x @ W.T
    dW  = mm(permute(x), dy)      (D, O)        Conv1D, x @ W

possibly under views and casts, possibly as one term of a sum where W has several uses.
The search starts at the gradient that is returned for W, so that the weight is certain,
and stops at any other operation: no other pattern is rewritten. Reads the graph only.

The gradient of a head whose loss runs in chunks is g dw, where dw is a result of
`passes.chunked_loss`; its activation is what dw reads there.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from passes import chunked_loss
from passes.base import (
    CASTS,
    aten,
    backward_nodes,
    base_of,
    batch_nodes,
    fixed,
    is_transpose,
    is_view,
    operand,
    value_key,
)
from passes.ops import velora_reconstruct

SAME = CASTS | {aten.alias.default}
BATCHED = (
    "its gradient is a batched matmul (of einsum or bmm), which is not rewritten; F.linear(x, W) "
    "or x @ W is"
)


@dataclass(frozen=True)
class WeightGradient:
    """One matmul of one weight's gradient, and the activation that it reads."""

    weight: int  # argument position of W
    matmul: Node  # (O, D), or (D, O) when transposed
    operand: Node  # what the matmul reads: (N, D), or (D, N) when transposed
    transposed: bool
    features: int  # D, the channels of x
    matmul_name: str  # a name identifies a node in every copy of the graph
    storage_name: str  # of the activation's `base_of`
    chunked: bool = False  # `matmul` is the dw of a chunked loss, and computed in the forward


@dataclass(frozen=True)
class Found:
    """The weight gradients of a graph, and why those of other weights do not match."""

    gradients: tuple[WeightGradient, ...]
    refused: dict[int, str]  # argument position -> reason


def weight_gradients(graph: Graph, weights: set[int]) -> Found:
    """Every matmul that is a term of the gradient of one of `weights`."""
    output = graph.output_node()
    backward = backward_nodes(graph)
    activations = batch_nodes(graph, weights) - backward
    found: list[WeightGradient] = []
    refused: dict[int, str] = {}
    returned: Any = output.args[0]
    for node, weight in zip(returned, output.meta["gradient_of"], strict=True):
        if weight not in weights or not isinstance(node, Node):
            continue
        terms = list(_terms(node, output))
        matches = [
            _match(weight, term, backward, activations) or _match_chunked(weight, term)
            for term in terms
        ]
        found += [match for match in matches if match]
        if not any(matches):
            refused[weight] = _reason(terms)
    return Found(tuple(found), refused)


def shared_inputs(gradients: Iterable[WeightGradient]) -> list[list[WeightGradient]]:
    """Gradients grouped by the activation that they read: q, k and v are one group."""
    groups: dict[Hashable, list[WeightGradient]] = {}
    for gradient in gradients:
        x, transposed = gradient.operand, gradient.transposed
        if transposed and is_transpose(x):
            x, transposed = operand(x, 0), False
        groups.setdefault((value_key(x), transposed), []).append(gradient)
    return list(groups.values())


def _terms(node: Node, user: Node) -> Iterator[Node]:
    """The terms of a gradient, through views and casts that have no other reader."""
    if set(node.users) != {user}:
        return
    if is_view(node) or node.target in CASTS:
        yield from _terms(operand(node, 0), node)
    elif node.target is aten.add.Tensor and not node.kwargs:
        for term in node.all_input_nodes:
            yield from _terms(term, node)
    else:
        yield node


def _match(
    weight: int, node: Node, backward: set[Node], activations: set[Node]
) -> WeightGradient | None:
    if node.target is not aten.mm.default:
        return None
    left, right = operand(node, 0), operand(node, 1)
    if left in backward and right in activations:
        x, transposed = right, False
    elif left in activations and right in backward:
        x, transposed = left, True
    else:
        return None
    storage = base_of(x)
    if velora_reconstruct in (x.target, storage.target) or "stands_for" in storage.meta:
        return None  # compressed already
    features = fixed(x.meta["val"].shape[0 if transposed else 1])
    if features is None:
        return None  # a dynamic number of features has no static number of sub-tokens
    return WeightGradient(weight, node, x, transposed, features, node.name, base_of(x).name)


def _match_chunked(weight: int, node: Node) -> WeightGradient | None:
    while len(node.users) == 1 and (node.target in SAME or scaled_by_tensor(node)):
        node = operand(node, 0)
    if not is_chunked(node) or len(node.users) != 1:
        return None
    loss = operand(node, 0)
    x = operand(loss, 0)
    if chunked_loss.x_of(loss) is not None or chunked_loss.projected(loss):
        return None  # compressed already
    features = fixed(x.meta["val"].shape[1])
    if features is None:
        return None
    name = base_of(x).name
    return WeightGradient(weight, node, x, False, features, node.name, name, chunked=True)


def is_chunked(node: Node) -> bool:
    """Whether a node is the dw of a loss in chunks."""
    if node.target is not operator.getitem or node.args[1] != chunked_loss.DW:
        return False
    return operand(node, 0).target is chunked_loss.op


def scaled_by_tensor(node: Node) -> bool:
    """Whether a node is x times a tensor without dimensions, such as the gradient of a loss."""
    if node.target is not aten.mul.Tensor or not isinstance(node.args[1], Node):
        return False
    factor = node.args[1].meta["val"]
    return bool(isinstance(factor, Tensor) and factor.ndim == 0)


def _reason(terms: list[Node]) -> str:
    if not terms:
        return "its gradient matmul also serves another output"
    if any(term.target is aten.mm.default for term in terms):
        return "its gradient matmul reads no activation of fixed width"
    if any(term.target is aten.bmm.default for term in terms):
        return BATCHED
    return f"its gradient is {terms[0].name}, not a matmul"
