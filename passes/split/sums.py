"""Save a running sum in place of its last term.  [exact]

    before                                                   after
    forward:  y = mm(...);  r' = r + dropout(y);  saves y    forward:  saves r'
    backward: r' = r + dropout(y);  reads r'                 backward: reads r'

Identity: none is needed; backward receives what it would have recomputed. To a min-cut, y and
r' cost the same. Where it saves every y of a stack of residual blocks, backward recomputes all
their sums first, and holds each until it is read; saving one sum per block takes the same bytes
and no recomputation. Edits the forward and the backward graph, only where backward reads y for
nothing but r', directly or through elementwise operations, and r' is no larger than y.
Source: design.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.base import aten, storage_root, tensor_bytes
from passes.split.saved import readers


def keep_sums(
    forward: Graph, backward: Graph, outputs: int, hint: Callable[[Any], int]
) -> list[str]:
    """Replace saved terms by sums until none is left; returns the names of the saved sums."""
    made = {node.name: node for node in forward.nodes}
    sums: list[str] = []
    while found := _sweep(forward, backward, outputs, made, hint):
        sums += found
    return sums


def _sweep(
    forward: Graph,
    backward: Graph,
    outputs: int,
    made: dict[str, Node],
    hint: Callable[[Any], int],
) -> list[str]:
    returned: Any = forward.output_node().args[0]
    kept = returned[outputs:]
    places = {node.name: node for node in backward.find_nodes(op="placeholder")}
    views = Counter(storage_root(node) for node in kept)
    names = {node.name for node in kept}
    sums = []
    for index, term in enumerate(kept, start=outputs):
        storage = storage_root(term)
        if storage.op != "call_function" or views[storage] > 1 or term.name not in places:
            continue  # an argument is live anyway, another view saves it, or it is an RNG state
        total = _only_sum(places[term.name])
        if total is None or total.name in names or total.name not in made:
            continue
        if hint(tensor_bytes(total)) <= hint(tensor_bytes(storage)):
            _exchange(forward, backward, index, places[term.name], made[total.name], total)
            names.add(total.name)
            sums.append(total.name)
    return sums


def _only_sum(place: Node) -> Node | None:
    """The sum that is the only reader of this, directly or through elementwise operations."""
    node = place
    while len(read := list(islice(readers(place.graph, [node]), 2))) == 1:
        (node,) = read
        if node.target is aten.add.Tensor:
            return node
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            return None
    return None


def _exchange(
    forward: Graph, backward: Graph, index: int, place: Node, kept: Node, total: Node
) -> None:
    output = forward.output_node()
    returned: Any = output.args[0]
    output.args = ((*returned[:index], kept, *returned[index + 1 :]),)
    with backward.inserting_before(place):
        handed = backward.placeholder(f"{total.name}_kept")
    handed.meta = {**place.meta, **kept.meta}
    total.replace_all_uses_with(handed)
    _erase(backward, total)
    handed.name = kept.name
    if not place.users:
        backward.erase_node(place)


def _erase(graph: Graph, node: Node) -> None:
    """Erase the node, and every operand that only it reads."""
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        if not operand.users and operand.op == "call_function":
            _erase(graph, operand)
