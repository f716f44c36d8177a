"""Save a compressed form of the activation that weight gradients read.   [approximate]

    before                                 after
    x --> linear --> y                     x --> linear --> y
    |                                      '---> compress(x, ...) --> z...
    :  (N, D) saved for backward                 :  z saved
    '--> mm(dy^T, x) --> dW                      reconstruct(z..., ...) --> mm(dy^T, x^) --> dW

Identity: none; dW = dy^T x^, where x^ = reconstruct(compress(x)). dx and db do not read x and
are exact. Both functions are traced into the graph, so that a compiler can fuse them with the
producer of x and the reader of x^. Weights that read one tensor (q, k, v; gate, up) share one z.

`hold` separates the two until the graph is partitioned. Without it a compiler would simplify
a cast to fewer bits and back to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes import chunked_loss
from passes.base import (
    Pass,
    StandsFor,
    arguments,
    aten,
    base_of,
    call,
    is_transpose,
    operand,
    size,
    storage_root,
)
from passes.emit import Decompositions, emit, provenance_of
from passes.joint.find import WeightGradient, shared_inputs, weight_gradients
from passes.ops import hold


@dataclass(frozen=True)
class Codec:
    """How a method compresses an activation, and how it reconstructs it.

    why_not(x (N, D)): the reason not to compress x, or None.
    compress(x, *inputs): one tensor or several. reconstruct(z, *inputs, shape=, dtype=): x^.
    decompositions: those of AOTAutograd, for operations that the inner compiler lacks.
    """

    name: str
    why_not: Callable[[Tensor], str | None]
    compress: Callable[..., Any]
    reconstruct: Callable[..., Tensor]
    decompositions: Decompositions


def compress_activations(
    codec: Codec,
    inputs: Mapping[int, tuple[int, ...]],
    weights: frozenset[int],
    key: tuple[Hashable, ...] = (),
) -> Pass:
    """Compress the activation of each weight in `inputs`: argument of W -> those of extra inputs.

    `weights`: every argument that is a parameter; a value computed only from them is no activation.
    """

    def rewrite(gm: GraphModule) -> None:
        place = arguments(gm.graph)
        for group in chosen_groups(gm.graph, weights, inputs):
            # A loss in chunks has computed its weight gradient before there is anything to save.
            if not group[0].chunked and codec.why_not(value_of(group[0])) is None:
                leader = min(gradient.weight for gradient in group)
                _compress(group, codec, [place[i] for i in inputs[leader]])

    return Pass(
        name=f"compress_activations[{codec.name}]",
        rewrite=rewrite,
        exact=False,
        key=(codec.name, tuple(sorted(inputs.items())), weights, *key),
        identity=f"dW = dy^T x_hat, x_hat = reconstruct(compress(x)) of {codec.name}",
        changes=frozenset(inputs),
    )


def chosen_groups(
    graph: Graph, weights: frozenset[int], chosen: Mapping[int, Any]
) -> list[list[WeightGradient]]:
    """The gradients of chosen weights, grouped by the activation that they read."""
    found = weight_gradients(graph, set(weights)).gradients
    return shared_inputs(gradient for gradient in found if gradient.weight in chosen)


def _compress(group: list[WeightGradient], codec: Codec, inputs: Sequence[Node]) -> None:
    first = group[0]
    x = rows(first)  # (N, D)
    mark = StandsFor(codec.name, first.storage_name)
    how = {**provenance_of(base_of(x)), "stands_for": mark}
    table = codec.decompositions
    kept = emit([x, *inputs], codec.name, codec.compress, decompositions=table, meta=how)
    held = [_held(z, x, mark) for z in kept]
    for gradient in group:
        shape = [size(gradient.matmul, x, 0), gradient.features]
        back = _reader(codec, len(held), x.meta["val"].dtype)
        how = {**provenance_of(gradient.matmul), "stands_for": mark}
        found = emit([*held, *inputs], codec.name, back, shape, table, how)
        if len(found) != 1 or not _alike(found[0].meta["val"], x.meta["val"]):
            raise TypeError(
                f"{codec.name}.reconstruct returned {', '.join(map(_described, found))} in place "
                f"of {_described(x)}: the shape and dtype that it is given"
            )
        read_instead(gradient, found[0])


def _reader(codec: Codec, count: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """codec.reconstruct with z as compress returned it: one tensor, or a tuple."""

    def function(*values: Any) -> Tensor:
        *tensors, shape = values
        kept, rest = tensors[:count], tensors[count:]
        z = kept[0] if count == 1 else tuple(kept)
        return codec.reconstruct(z, *rest, shape=tuple(shape), dtype=dtype)

    return function


def _held(z: Node, x: Node, mark: StandsFor) -> Node:
    """hold(z), marked as what may be saved; z is copied where it shares the storage of x."""
    if storage_root(z) is storage_root(x) or z.op == "placeholder":
        z = call(z, aten.clone.default, z)
    node = call(z, hold, z)
    node.meta["stands_for"] = StandsFor(mark.method, mark.storage, kept=True)
    return node


def release(graph: Graph) -> bool:
    """Remove the `hold` nodes of a partitioned graph; returns whether there were any."""
    found = graph.find_nodes(op="call_function", target=hold)
    for node in found:
        z = operand(node, 0)
        z.meta["stands_for"] = node.meta["stands_for"]
        node.replace_all_uses_with(z)
        graph.erase_node(node)
    return bool(found)


# --- shared with passes.joint.velora --------------------------------------------------------


def value_of(gradient: WeightGradient) -> Tensor:
    """The fake value of x, (N, D)."""
    value: Tensor = gradient.operand.meta["val"]
    return value.t() if gradient.transposed else value


def rows(gradient: WeightGradient) -> Node:
    """The activation as (N, D), also where the matmul reads it transposed."""
    x = gradient.operand
    if not gradient.transposed:
        return x
    if is_transpose(x):
        return operand(x, 0)
    return call(x, aten.permute.default, x, [1, 0])


def read_instead(gradient: WeightGradient, x_hat: Node, scale: float = 1.0) -> None:
    """Let the matmul of a weight gradient read x^ (N, D) in place of x."""
    matmul = gradient.matmul
    if gradient.chunked:
        return _read_in_chunks(matmul, x_hat, scale)
    left, right = operand(matmul, 0), operand(matmul, 1)
    if gradient.transposed:
        left = call(matmul, aten.permute.default, x_hat, [1, 0])  # (D, N)
    else:
        right = x_hat
    product = call(matmul, aten.mm.default, left, right)
    scaled = product if scale == 1.0 else call(matmul, aten.mul.Tensor, product, scale)
    matmul.replace_all_uses_with(scaled)
    matmul.graph.erase_node(matmul)


def _read_in_chunks(dw: Node, x_hat: Node, scale: float) -> None:
    loss = operand(dw, 0)
    loss.replace_all_uses_with(call(loss, loss.target, *chunked_loss.arguments_with(loss, x=x_hat)))
    loss.graph.erase_node(loss)
    if scale != 1.0:
        scaled = call(dw, aten.mul.Tensor, dw, scale)
        dw.replace_all_uses_with(scaled)
        scaled.replace_input_with(scaled, dw)


def _alike(one: Tensor, other: Tensor) -> bool:
    return str(one.shape) == str(other.shape) and one.dtype == other.dtype


def _described(node: Node) -> str:
    value = node.meta["val"]
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
