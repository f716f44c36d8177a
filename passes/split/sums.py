"""Keep a running sum in place of its last term.  [exact]

    before                                                   after
    forward:  y = mm(...);  r' = r + dropout(y);  keeps y    forward:  keeps r'
    backward: r' = r + dropout(y);  reads r'                 backward: reads r'

Identity: none is needed; backward is handed what it would have computed. A min-cut sees
that y and r' have the same size and takes either. With every y of a stack of residual
blocks kept, backward adds them all up again before its first layer, and holds the sums
until its last: one sum a block is as many bytes, and no work. Edits the two halves of a
split; only where r' is all that backward reads y for, directly or through elementwise
operations that serve nothing else, and is no larger than y.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.base import aten, memory_of, tensor_bytes
from passes.split.saved import readers


def keep_sums(
    forward: Graph, backward: Graph, outputs: int, hint: Callable[[Any], int]
) -> list[str]:
    """Exchange terms for sums until none is left; returns the names of the sums now kept."""
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
    sharers = Counter(memory_of(node) for node in kept)
    names = {node.name for node in kept}
    sums = []
    for index, term in enumerate(kept, start=outputs):
        memory = memory_of(term)
        if memory.op != "call_function" or sharers[memory] > 1 or term.name not in places:
            continue  # arguments live anyway; views keep a memory; RNG states have other names
        total = _only_sum(places[term.name])
        if total is None or total.name in names or total.name not in made:
            continue
        if hint(tensor_bytes(total)) <= hint(tensor_bytes(memory)):
            _exchange(forward, backward, index, places[term.name], made[total.name], total)
            names.add(total.name)
            sums.append(total.name)
    return sums


def _only_sum(place: Node) -> Node | None:
    """The sum that is all backward reads this for, if it is."""
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
    """This node, and the views that were made for it alone."""
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        if not operand.users and operand.op == "call_function":
            _erase(graph, operand)
