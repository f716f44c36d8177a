"""The tensors that a partitioned forward saves for its backward.   (reads only)

The outputs of a forward graph are the outputs of the program, then the tensors saved for
backward. Several of these may be views of one storage: saved bytes count each storage once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.base import base_of, is_view, storage_root, tensor_bytes


@dataclass(frozen=True)
class Kept:
    """The distinct storages that a forward saves, excluding parameters and state."""

    views: dict[Node, tuple[Node, ...]]  # storage -> the views of it that backward reads

    @property
    def storages(self) -> tuple[Node, ...]:
        return tuple(self.views)

    @property
    def bytes(self) -> Any:
        """Their total size; symbolic under dynamic shapes."""
        return sum((tensor_bytes(node) for node in self.views), 0)

    def named(self, names: Collection[str]) -> Node | None:
        """The saved storage of one of these nodes, or None."""
        for storage, views in self.views.items():
            if storage.name in names or any(base_of(v).name in names for v in views):
                return storage
        return None


def kept_for_backward(forward: Graph, num_outputs: int, free: Collection[int]) -> Kept:
    """The storages of the outputs after `num_outputs`; arguments in `free` are not counted."""
    output = forward.output_node()
    roots: dict[int, Node] = {}
    views: dict[Node, tuple[Node, ...]] = {}
    returned: Any = output.args[0]
    for node in returned[num_outputs:]:
        root = storage_root(node)
        value = root.meta.get("val")
        if isinstance(value, torch.Tensor) and root.meta.get("argument") not in free:
            root = roots.setdefault(value.untyped_storage()._cdata, root)
            views[root] = (*views.get(root, ()), node)
    return Kept(views)


def readers(backward: Graph, saved: Collection[Node]) -> Iterator[Node]:
    """The nodes of backward that read these saved tensors, directly or through views.

    saved: nodes of the forward or of the backward graph; a saved tensor has one name in both.
    """
    names = {node.name for node in saved if node.graph is not backward}
    stack = [node for node in saved if node.graph is backward]
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
    """The placeholders that backward reads only to compute z."""
    output = backward.output_node()
    needed: set[Node] = {z}
    stack: list[Node] = [output]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in needed:
                needed.add(operand)
                stack.append(operand)
    above: set[Node] = set()
    stack = [z]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in above:
                above.add(operand)
                stack.append(operand)
    return [node for node in above - needed if node.op == "placeholder"]
