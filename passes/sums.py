"""Keep a running sum in place of its last term.  [exact]

    before                                          after
    forward:  y = mm(...);  r' = r + y;  keeps y    forward:  keeps r'
    backward: r' = r + y;  reads r'                 backward: reads r'

Identity: none is needed; backward is handed what it would have computed. A min-cut sees
that y and r' have the same size and takes either. With every y of a stack of residual
blocks kept, backward adds them all up again before its first layer, and holds the sums
until its last: one sum a block is as many bytes, and no work. Edits the two halves of a
split; only where r' is all that backward reads y for, and is no larger than y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from passes.base import aten, storage_of, tensor_bytes
from passes.saved import readers


def keep_sums(
    forward: Graph, backward: Graph, outputs: int, hint: Callable[[Any], int]
) -> list[str]:
    """Exchange terms for sums until none is left; returns the names of the sums now kept."""
    sums: list[str] = []
    made = {node.name: node for node in forward.nodes}
    while (found := _find(forward, backward, outputs, made, hint)) is not None:
        index, total = found
        _exchange(forward, backward, index, made[total.name], total)
        sums.append(total.name)
    return sums


def _find(
    forward: Graph,
    backward: Graph,
    outputs: int,
    made: dict[str, Node],
    hint: Callable[[Any], int],
) -> tuple[int, Node] | None:
    returned: Any = forward.output_node().args[0]
    places = {node.name: node for node in backward.find_nodes(op="placeholder")}
    memories = [storage_of(n) for n in returned[outputs:] if isinstance(n, Node)]
    for index, term in enumerate(returned[outputs:], start=outputs):
        if term.op != "call_function" or memories.count(storage_of(term)) > 1:
            continue
        read = list(readers(backward, [places[term.name]]))
        if len(read) != 1 or read[0].target is not aten.add.Tensor:
            continue
        total = made.get(read[0].name)
        if total is None or total.target is not aten.add.Tensor or total in returned[outputs:]:
            continue
        if hint(tensor_bytes(total)) <= hint(tensor_bytes(storage_of(term))):
            return index, read[0]
    return None


def _exchange(forward: Graph, backward: Graph, index: int, kept: Node, total: Node) -> None:
    output = forward.output_node()
    returned: Any = output.args[0]
    term = returned[index]
    output.args = ((*returned[:index], kept, *returned[index + 1 :]),)
    place = next(n for n in backward.find_nodes(op="placeholder") if n.name == term.name)
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
