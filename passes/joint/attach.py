"""The two ends of `attach(y, ports)` in a joint graph, which a pass on ports takes away.

Differentiation gives every port a gradient of zeros, and y a copy. Reads and edits nothing else.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from passes.base import aten, call, memory_of, operand
from passes.ops import port_attach

ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.full.default)


def is_zeros_of_port(gradient: Any) -> bool:
    """True for what `attach` gives a port, False for what a pass has put there."""
    return isinstance(gradient, Node) and gradient.target in ZEROS


def detach_ports(graph: Graph) -> None:
    """y itself, or a copy where its memory is somebody else's too: it was fresh before."""
    for node in graph.find_nodes(op="call_function", target=port_attach):
        y = operand(node, 0)
        output: Any = graph.output_node().args[0]
        others = [n for n in output if isinstance(n, Node) and n is not node]
        memory = memory_of(y)
        shared = memory.op == "placeholder" or memory in map(memory_of, others)
        node.replace_all_uses_with(call(node, aten.clone.default, y) if shared else y)
        graph.erase_node(node)
