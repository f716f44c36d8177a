"""Remove `attach(y, ports)` from a joint graph, after a pass has used the ports.   [exact]

Differentiation gives every port a gradient of zeros, and copies y.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from passes.base import aten, call, operand, storage_root
from passes.ops import port_attach

ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.full.default)


def is_zeros_of_port(gradient: Any) -> bool:
    """True for the zeros that `attach` returns for a port, False for what a pass replaced."""
    return isinstance(gradient, Node) and gradient.target in ZEROS


def detach_ports(graph: Graph) -> None:
    """Replace `attach(y, ports)` by y, or by a copy where an input or output shares its storage.

    Legal because an output that did not alias anything before must not start to.
    """
    for node in graph.find_nodes(op="call_function", target=port_attach):
        y = operand(node, 0)
        output: Any = graph.output_node().args[0]
        others = [n for n in output if isinstance(n, Node) and n is not node]
        root = storage_root(y)
        shared = root.op == "placeholder" or root in map(storage_root, others)
        node.replace_all_uses_with(call(node, aten.clone.default, y) if shared else y)
        graph.erase_node(node)
