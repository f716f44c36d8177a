"""Cut an update in three graphs: scalars, a compiled body, writes into weights.   [exact]

    step, lr, betas --> 0-d arithmetic --> c...          scalars
    G, m, v, P, c...  --> ops --> Z                      body
    W, Z, P, c...     --> addmm_ into W                  writes

Identity: running the three in this order runs the graph. Scalar arithmetic leaves the body
because a code generator would inline it into every loop (a power per element); in-place
matmuls leave it because a code generator would functionalize them, with a copy of W before
and after. Scalar tensors are cast to the dtype of the body; Python numbers are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.base import aten, is_view


@dataclass(frozen=True)
class Pieces:
    """Run as: c = scalars(*0-d inputs); z = body(*others, *c[body_reads]);
    writes(*others[write_inputs], *z, *c[write_reads])."""

    scalars: GraphModule
    body: GraphModule
    writes: GraphModule
    body_reads: tuple[int, ...]
    write_inputs: tuple[int, ...]
    write_reads: tuple[int, ...]


def cut(gm: GraphModule, dtype: torch.dtype) -> Pieces:
    """The pieces of an update graph whose body computes in `dtype`."""
    scalar = _scalars(gm.graph)
    last = _writes(gm.graph, scalar)
    places = gm.graph.find_nodes(op="placeholder")
    tensors = [n for n in places if n not in scalar]
    body = [n for n in gm.graph.nodes if n.op == "call_function" and n not in scalar | last]
    crossing = [n for n in scalar if any(user not in scalar for user in n.users)]
    to_body = [n for n in crossing if _read_by(n, body)]
    to_writes = [n for n in crossing if _read_by(n, last)]
    written = [n for n in tensors if _read_by(n, last)]
    produced = [n for n in body if _read_by(n, last)]
    return Pieces(
        _scalar_piece(gm, scalar, crossing, dtype),
        _piece(gm, [*tensors, *to_body], body, produced),
        _piece(gm, [*written, *produced, *to_writes], last, []),
        tuple(crossing.index(n) for n in to_body),
        tuple(tensors.index(n) for n in written),
        tuple(crossing.index(n) for n in to_writes),
    )


def _scalars(graph: Graph) -> dict[Node, None]:
    """0-d inputs, and the nodes that depend on nothing else, in order."""
    inside: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            scalar = node.meta["val"].ndim == 0
        else:
            read = node.all_input_nodes
            scalar = node.op != "output" and bool(read) and all(n in inside for n in read)
        if scalar:
            inside[node] = None
    return inside


def _writes(graph: Graph, scalar: dict[Node, None]) -> dict[Node, None]:
    """In-place matmuls and the views that only they read, in order."""
    found = set(graph.find_nodes(op="call_function", target=aten.addmm_.default))
    for node in reversed(graph.nodes):
        only = node.users and all(user in found for user in node.users)
        if only and is_view(node) and node not in scalar:
            found.add(node)
    return {n: None for n in graph.nodes if n in found}


def _read_by(node: Node, readers: Iterable[Node]) -> bool:
    return any(user in readers for user in node.users)


def _piece(
    gm: GraphModule, inputs: Sequence[Node], nodes: Iterable[Node], outputs: Sequence[Node]
) -> GraphModule:
    graph, copied = Graph(), dict[Node, Node]()
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta["val"] = node.meta["val"]
    for node in nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(tuple(copied[n] for n in outputs))
    return GraphModule(gm, graph)


def _scalar_piece(
    gm: GraphModule, scalar: dict[Node, None], crossing: list[Node], dtype: torch.dtype
) -> GraphModule:
    inputs = [n for n in scalar if n.op == "placeholder"]
    piece = _piece(gm, inputs, [n for n in scalar if n.op != "placeholder"], crossing)
    output = piece.graph.output_node()
    with piece.graph.inserting_before(output):
        values = [
            piece.graph.call_function(aten._to_copy.default, (new,), {"dtype": dtype})
            if isinstance(old.meta["val"], Tensor)
            else new
            for new, old in zip(output.args[0], crossing, strict=True)  # type: ignore[arg-type]
        ]
    output.args = (tuple(values),)
    piece.recompile()
    return piece
