"""What a partitioned forward keeps for its backward.

A partitioner returns a forward graph whose outputs are the program's own, followed by
the tensors that it hands to backward. Several of them may be views of one memory: the
bytes of a step are the bytes of distinct memories. Reads the graph only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.base import is_view, memory_of, storage_of, tensor_bytes


@dataclass(frozen=True)
class Kept:
    """The distinct memories that a forward keeps, apart from parameters and state."""

    handed: dict[Node, tuple[Node, ...]]  # memory -> the views of it that backward is given

    @property
    def storages(self) -> tuple[Node, ...]:
        return tuple(self.handed)

    @property
    def bytes(self) -> Any:
        """Their sum; symbolic under dynamic shapes."""
        return sum((tensor_bytes(node) for node in self.handed), 0)

    def named(self, names: Collection[str]) -> Node | None:
        """The kept memory of one of these nodes, if any is kept."""
        for memory, views in self.handed.items():
            if memory.name in names or any(storage_of(v).name in names for v in views):
                return memory
        return None


def kept_for_backward(forward: Graph, num_outputs: int, free: Collection[int]) -> Kept:
    """The memories behind the outputs past `num_outputs`; `free` arguments cost nothing."""
    output = forward.output_node()
    roots: dict[int, Node] = {}
    handed: dict[Node, tuple[Node, ...]] = {}
    returned: Any = output.args[0]
    for node in returned[num_outputs:]:
        root = memory_of(node)
        value = root.meta.get("val")
        if isinstance(value, torch.Tensor) and root.meta.get("argument") not in free:
            root = roots.setdefault(value.untyped_storage()._cdata, root)
            handed[root] = (*handed.get(root, ()), node)
    return Kept(handed)


def readers(backward: Graph, handed: Collection[Node]) -> Iterator[Node]:
    """Who reads these kept tensors in backward, views looked through.

    They are named by the forward's nodes, or by backward's own.
    """
    names = {node.name for node in handed if node.graph is not backward}
    stack = [node for node in handed if node.graph is backward]
    if names:
        stack += [n for n in backward.find_nodes(op="placeholder") if n.name in names]
    seen: set[Node] = set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if is_view(user):
                stack.append(user)
            else:
                yield user


def exclusive_inputs(backward: Graph, z: Node) -> list[Node]:
    """The placeholders that backward reads for nothing but to rebuild z."""
    output = backward.output_node()
    needed: set[Node] = {z}
    stack: list[Node] = [output]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in needed:
                needed.add(operand)
                stack.append(operand)
    behind: set[Node] = set()
    stack = [z]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in behind:
                behind.add(operand)
                stack.append(operand)
    return [node for node in behind - needed if node.op == "placeholder"]
